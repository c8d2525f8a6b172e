"""Settings, readiness, identity, the packed program, and which agents may connect."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest

from asr_driver_physical.enrol.package import mobility_service
from asr_driver_physical.enrol.push import Access, Limits, config, link_files, probe, unit
from asr_driver_physical.errors import SpoolFull
from asr_driver_physical.servers.hub import Gateway
from asr_driver_physical.servers.identity import FenceRecord, Identity, ServerRecord
from asr_driver_physical.servers.machine import machine_of
from asr_driver_physical.servers.readiness import (
    AGENT_LIFE,
    RENEW_SECONDS,
    boot_bus,
    certificate_finding,
    findings,
    renewal_due,
)
from asr_driver_physical.servers.spool import Spool
from asr_driver_physical.settings import SiteSettings, parse_address
from asr_driver_physical.site import PhysicalSite
from asr_mobility import __main__ as agent
from asr_mobility.channel import Channel, ChannelClosed
from asr_mobility.service import Service
from asrcore.errors import AccessDenied, InvalidSetting, InvalidValue, SecretKeyUnusable, SiteUnreachable
from asrcore.model.finding import Severity
from asrcore.model.machine import Firmware, PowerState
from asrcore.units import DAY, HOUR, GiB, MiB
from asrcore.wire import Component, Role
from drivers.physical.tests.rig import old_python, wait_until

SERVER = Component(Role.PROCESS_SERVER, "x")

FACTS: dict[str, Any] = {
    "machine": {
        "id": "5e0c0a70-1ab0-4d5e-8c11-0a77aa010001",
        "hostname": "box",
        "cpus": 4,
        "memory": 8 * GiB - 5_000_000,
        "firmware": "bios",
        "secure_boot": False,
        "tpm": False,
        "os": "Debian GNU/Linux 12",
        "kernel": "6.1",
        "vendor": "Acme",
        "disks": [{"id": "S1", "name": "sda", "size": 10 * GiB, "stable": True, "read_only": False}],
        "nics": [{"name": "ens3", "mac": "52:54:00:00:00:01", "driver": "e1000e"}],
    },
    "identity": "aa" * 16,
    "root": True,
    "python": "3.9",
    "systemd": True,
    "tracking": "",
    "lockdown": "none",
    "mounts": [{"path": "/", "kind": "ext4", "device": "sda2", "read_only": False}],
    "fstab": [{"device": "UUID=1", "path": "/"}],
    "swap": [],
    "encrypted": [],
    "multipath": [],
    "arrays": [],
    "boot_loader": ["sda"],
    "initramfs": {"image": "/boot/initrd", "listed": True, "drivers": ["ahci", "virtio_blk", "virtio_pci"]},
    "network": [],
    "free": GiB,
    "memory_limit": 0,
}


def changed(**parts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(FACTS), **parts}


def codes(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [(item.code, item.severity.value) for item in findings(facts)]


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings() -> None:
    parsed = SiteSettings.parse({"listen": "10.0.0.1", "identity": "/i", "spool": "/s", "spool_limit": "2GiB"})
    assert (parsed.host, parsed.port, parsed.spool_limit) == ("10.0.0.1", 9443, 2 * GiB)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("listen", "10.0.0.1:port"),
        ("listen", "10.0.0.1:99999"),
        ("identity", "relative"),
        ("spool_limit", "much"),
        ("spool", ""),
    ],
)
def test_bad_settings_are_named(name: str, value: str) -> None:
    good = {"listen": "10.0.0.1", "identity": "/i", "spool": "/s"}
    with pytest.raises(InvalidSetting) as caught:
        SiteSettings.parse({**good, name: value})
    assert caught.value.attributes["setting"] == name


@pytest.mark.parametrize(
    ("text", "address"),
    [("[::1]:7", ("::1", 7)), ("::1", ("::1", 9443)), ("box:1", ("box", 1)), ("box", ("box", 9443))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address("listen", text) == address


# -- readiness ---------------------------------------------------------------------------------------------------------


def test_a_good_server_has_no_findings() -> None:
    assert codes(FACTS) == []


@pytest.mark.parametrize(
    ("parts", "code", "severity"),
    [
        ({"root": False}, "not-root", "error"),
        ({"python": "3.8"}, "python-old", "error"),
        ({"systemd": False}, "no-systemd", "error"),
        ({"tracking": "bpf(0): Operation not permitted"}, "tracking-unavailable", "error"),
        ({"free": 1000}, "server-full", "error"),
        ({"memory_limit": 128 << 20}, "memory-short", "warning"),
        ({"boot_loader": []}, "no-boot-loader", "error"),
        ({"fstab": [{"device": "/dev/sda2", "path": "/"}]}, "fstab-by-name", "error"),
        ({"multipath": ["dm-1"]}, "disk-multipath", "error"),
        ({"encrypted": ["dm-1"]}, "disk-encrypted", "warning"),
        ({"initramfs": {"listed": False, "drivers": []}}, "initramfs-unknown", "warning"),
        ({"initramfs": {"listed": True, "drivers": ["ahci"]}}, "initramfs-without-virtio", "warning"),
        ({"initramfs": {"listed": True, "drivers": ["nvme"]}}, "initramfs-without-virtio", "error"),
        (
            {"mounts": [{"path": "/boot/efi", "kind": "vfat", "device": "sda1", "read_only": False}]},
            "not-freezable",
            "info",
        ),
    ],
)
def test_findings(parts: dict[str, Any], code: str, severity: str) -> None:
    assert codes(changed(**parts)) == [(code, severity)]
    assert all(item.action and item.cause for item in findings(changed(**parts)))


def test_network_names_are_kept_by_address() -> None:
    nic = {"name": "ens3", "mac": "52:54:00:00:00:01", "driver": "e1000e", "named_in": ["/etc/x"], "kept": False}
    facts = changed(network=[nic])
    assert codes(facts) == [("nic-name-by-place", "warning")]
    ((path, text),) = link_files(facts).items()
    assert path == "/etc/systemd/network/10-asr-ens3.link"
    assert "MACAddress=52:54:00:00:00:01" in text
    assert "Name=ens3" in text
    kept = changed(network=[{**nic, "kept": True}])
    assert codes(kept) == [("nic-name-kept", "info")]
    assert link_files(kept) == {}


@pytest.mark.parametrize(
    ("drivers", "bus"), [(["virtio_blk", "virtio_pci"], "virtio"), (["ahci"], "sata"), (["ata_piix"], "ide")]
)
def test_the_replica_boots_from_a_bus_that_the_system_knows(drivers: list[str], bus: str) -> None:
    facts = changed(initramfs={"listed": True, "drivers": drivers})
    assert boot_bus(facts) == bus
    machine = machine_of(
        ServerRecord("box", "", "", facts, machine_id=facts["machine"]["id"]), facts["machine"], PowerState.RUNNING
    )
    assert (machine.disks[0].bus, machine.firmware, machine.memory) == (bus, Firmware.BIOS, 8 * GiB)


# -- identity and access of agents ---------------------------------------------------------------------------------


def enrol(identity: Identity, tmp_path: Path, name: str = "box") -> ssl.SSLContext:
    """The TLS context of an enrolled server."""
    issued = identity.issue(name)
    identity.save(ServerRecord(name, issued.fingerprint, "aa" * 16, FACTS))
    return dialler(identity, tmp_path, issued.certificate, issued.key)


def dialler(identity: Identity, tmp_path: Path, certificate: bytes, key: bytes) -> ssl.SSLContext:
    (tmp_path / "c.pem").write_bytes(certificate)
    (tmp_path / "k.pem").write_bytes(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(identity.path / "ca.pem")
    context.load_cert_chain(tmp_path / "c.pem", tmp_path / "k.pem")
    return context


def dial(place: SiteSettings, context: ssl.SSLContext, hardware: str = "aa" * 16) -> Channel:
    carrier = context.wrap_socket(socket.create_connection((place.host, place.port), 10))
    me = {"name": "box", "identity": hardware}
    return Channel(carrier, dialled=True, me=me, serve=lambda call, arguments: ({"call": call}, b"content"))


def test_an_enrolled_server_is_asked(place: SiteSettings, identity: Identity, gateway: Gateway, tmp_path: Path) -> None:
    with closing(dial(place, enrol(identity, tmp_path))):
        head, body = gateway.call("box", "anything", {})
        assert (head["call"], bytes(body)) == ("anything", b"content")
        with closing(Gateway("dc", place, identity)) as other:  # another process, such as a verb during the service
            assert not other.listens
            assert list(other.connected()) == ["box"]
            assert bytes(other.call("box", "anything", {})[1]) == b"content"


def test_what_is_secret_is_readable_by_its_owner_only(identity: Identity) -> None:
    for name in ("key.pem", "ca-key.pem"):
        assert (identity.path / name).stat().st_mode & 0o077 == 0
    assert "PRIVATE" not in repr(identity.issue("box"))


def test_the_authority_s_key_is_encrypted(identity: Identity) -> None:
    assert b"ENCRYPTED" in (identity.path / "ca-key.pem").read_bytes()
    opener = identity.path.with_name(f"{identity.path.name}.key")
    assert opener.stat().st_mode & 0o077 == 0
    opener.rename(opener.with_name("elsewhere"))
    Identity(identity.path).tls.context(server=True)  # it can listen without it
    with pytest.raises(SecretKeyUnusable, match="No such file"):
        identity.issue("box")


@pytest.mark.parametrize(
    "wrong", ["none", "other-authority", "process-server", "expired", "forgotten", "superseded", "hardware"]
)
def test_who_is_not_enrolled_is_refused(
    wrong: str, place: SiteSettings, identity: Identity, gateway: Gateway, tmp_path: Path
) -> None:
    context, hardware = enrol(identity, tmp_path), "aa" * 16
    if wrong == "none":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(identity.path / "ca.pem")
    elif wrong == "other-authority":
        issued = Identity(tmp_path / "other").issue("box")
        context = dialler(identity, tmp_path, issued.certificate, issued.key)
    elif wrong == "process-server":
        mine = [(identity.path / name).read_bytes() for name in ("certificate.pem", "key.pem")]
        context = dialler(identity, tmp_path, *mine)
    elif wrong == "expired":
        issued = identity._sign(Component(Role.AGENT, "box"), -1 * HOUR)
        identity.save(ServerRecord("box", issued.fingerprint, "aa" * 16, FACTS))
        context = dialler(identity, tmp_path, issued.certificate, issued.key)
    elif wrong == "forgotten":
        identity.forget("box")
    elif wrong == "superseded":
        identity.save(ServerRecord("box", "00", "aa" * 16, FACTS))
    else:
        hardware = "bb" * 16  # a copy of the disks
    with pytest.raises((OSError, ChannelClosed)):  # noqa: PT012 - it may be reported at the first message only
        channel = dial(place, context, hardware)
        channel.wait_ended(20)
        raise ChannelClosed(channel.reason)
    assert gateway.connected() == {}


@pytest.mark.parametrize("shown", ["good", "other-authority", "expired", "agent", "none"])
def test_the_agent_refuses_what_is_no_process_server(shown: str, identity: Identity, tmp_path: Path) -> None:
    """With the agent's own connection code."""
    (tmp_path / "ca.pem").write_bytes(identity.authority)
    (tmp_path / "agent.pem").write_bytes(identity.issue("box").pem)
    if shown == "other-authority":
        pem = Identity(tmp_path / "other")._sign(SERVER, 1 * DAY).pem
    elif shown == "agent":
        pem = identity.issue("other").pem
    else:
        pem = identity._sign(SERVER, (-1 if shown == "expired" else 1) * HOUR).pem
    (tmp_path / "shown.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "shown.pem")

    def answer(listener: socket.socket) -> None:
        plain, _ = listener.accept()
        with plain, contextlib.suppress(OSError):
            if shown != "none":
                context.wrap_socket(plain, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        expected = contextlib.nullcontext() if shown == "good" else pytest.raises(OSError)
        with expected as reported:
            agent._dial(f"127.0.0.1:{listener.getsockname()[1]}", agent._context(tmp_path)).close()
        thread.join(20)
    why = {
        "other-authority": "unable to get local issuer|signature failure",
        "expired": "expired",
        "agent": "purpose|not a process",
    }
    if reported is not None:
        assert re.search(why.get(shown, ""), str(reported.value)), reported.value


def test_who_is_removed_is_let_go(place: SiteSettings, identity: Identity, gateway: Gateway, tmp_path: Path) -> None:
    with closing(dial(place, enrol(identity, tmp_path))) as channel:
        wait_until(lambda: gateway.connected() != {}, "it is connected")
        identity.forget("box")
        assert channel.wait_ended(20), "an existing connection survives the removal"
        assert gateway.connected() == {}


@pytest.mark.parametrize("wrong", [-900 * DAY, 0.0, 900 * DAY])
def test_a_clock_that_was_set_does_not_put_off_the_renewal(wrong: float) -> None:
    """A certificate that was issued by a clock ahead, or is looked at by one behind, may end any time."""
    now = time.time()
    assert renewal_due(now + wrong + AGENT_LIFE, now) is (wrong != 0.0)
    assert renewal_due(now + RENEW_SECONDS - 1, now)
    assert not renewal_due(0.0, now)


@pytest.mark.parametrize("life", [20 * DAY, AGENT_LIFE + 900 * DAY], ids=["ends-soon", "issued-by-a-clock-ahead"])
def test_a_certificate_is_renewed_in_time(
    life: float, place: SiteSettings, identity: Identity, gateway: Gateway, tmp_path: Path
) -> None:
    """Through the agent's own service; the former one is valid until the new one is used, and no longer."""
    home = tmp_path / "home"
    home.mkdir()
    issued = identity._sign(Component(Role.AGENT, "box"), life)
    identity.save(ServerRecord("box", issued.fingerprint, "aa" * 16, FACTS, None, issued.ends))
    (home / "ca.pem").write_bytes(identity.authority)
    (home / "agent.pem").write_bytes(issued.pem)
    me = {"name": "box", "identity": "aa" * 16}
    former = agent._context(home)
    where = f"{place.host}:{place.port}"
    with closing(Channel(agent._dial(where, former), dialled=True, me=me, serve=Service(home).serve)):
        wait_until(lambda: (home / "agent.pem").read_bytes() != issued.pem, "the renewal")
        assert (home / "agent.pem").stat().st_mode & 0o077 == 0
    with closing(Channel(agent._dial(where, former), dialled=True, me=me)) as again:
        assert again.peer, "it was not used yet"
    with closing(Channel(agent._dial(where, agent._context(home)), dialled=True, me=me)):
        record = identity.server("box")
        assert record is not None
        assert abs(record.ends - time.time() - AGENT_LIFE) < DAY
        assert not record.renewals
    with pytest.raises((OSError, ChannelClosed)):
        Channel(agent._dial(where, former), dialled=True, me=me)


def test_a_certificate_that_ends_soon_is_told() -> None:
    day = 24 * 3600.0
    assert certificate_finding(0) is None
    assert certificate_finding(100 * day, now=50 * day) is None
    found = certificate_finding(100 * day, now=90 * day)
    assert found is not None
    assert (found.code, found.severity) == ("certificate-ends", Severity.WARNING)
    assert "in 10 days" in found.what
    past = certificate_finding(100 * day, now=101 * day)
    assert past is not None
    assert "expired" in past.what


def test_a_site_tells_of_certificates_that_end(place: SiteSettings, identity: Identity) -> None:
    identity.save(ServerRecord("box", "00", "aa" * 16, FACTS, None, time.time() + 24 * 3600))
    identity.save(ServerRecord("other", "00", "aa" * 16, FACTS, None, time.time() + 800 * 24 * 3600))
    with closing(PhysicalSite("dc", place)) as site:
        reported = site.status().details["certificates"]
    assert "box" in reported
    assert "other" not in reported


def test_a_second_identity_is_not_made_silently(place: SiteSettings, identity: Identity) -> None:
    PhysicalSite("dc", place).close()
    place.identity.rename(place.identity.with_name("moved"))
    for _ in range(2):
        with pytest.raises(InvalidSetting, match="enrolled with"):
            PhysicalSite("dc", place)
    Identity(place.identity)  # a different identity
    with pytest.raises(InvalidSetting, match="enrolled with"):
        PhysicalSite("dc", place)
    shutil.rmtree(place.identity)
    place.identity.with_name("moved").rename(place.identity)
    PhysicalSite("dc", place).close()


def test_a_record_is_changed_in_one_step(identity: Identity) -> None:
    """Concurrent changes are not lost, and removed entries do not return."""
    identity.save(ServerRecord("box", "00", "aa" * 16, changed(free=0)))

    def count() -> None:
        for _ in range(50):
            identity.change(
                "box", lambda record: attrs.evolve(record, facts={**record.facts, "free": record.facts["free"] + 1})
            )

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = identity.server("box")
    assert record is not None
    assert record.facts["free"] == 200
    identity.forget("box")
    assert identity.change("box", lambda record: attrs.evolve(record, fence=FenceRecord(1, ""))) is None
    assert identity.servers() == []


# -- the spool ---------------------------------------------------------------------------------------------------------


def test_the_limit_of_the_spool_holds_for_all_servers_together(tmp_path: Path) -> None:
    limit, piece = 8 * MiB, memoryview(bytes(MiB))
    full: list[SpoolFull] = []

    class Slow(Spool):
        def used(self) -> int:
            found = super().used()
            time.sleep(0.02)  # later writes are not included
            return found

    def fill(name: str) -> None:
        spool = Slow(tmp_path, name, limit)
        try:
            for number in range(8):
                spool.put(0, [(number * MiB, piece)])
        except SpoolFull as problem:
            full.append(problem)

    threads = [threading.Thread(target=fill, args=(f"box{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one = Spool(tmp_path, "box0", limit)
    assert len(full) >= 7
    assert str(tmp_path) in str(full[0])
    assert limit - 2 * MiB < one.used() <= limit
    for number in range(8):
        Spool(tmp_path, f"box{number}", limit).clear()
    one.put(0, [(0, piece)])


def test_a_server_that_is_away_is_told(gateway: Gateway) -> None:
    with pytest.raises(SiteUnreachable, match="box is not connected"):
        gateway.call("box", "anything", {}, timeout=0.2)


@pytest.mark.parametrize("name", ["", "../x", "a b", "x" * 64])
def test_names_of_servers(identity: Identity, name: str) -> None:
    with pytest.raises(InvalidValue):
        identity.issue(name)


# -- the program -------------------------------------------------------------------------------------------------------


def test_the_program_is_one_file_for_an_old_python(tmp_path: Path) -> None:
    path = tmp_path / "agent.pyz"
    path.write_bytes(mobility_service())
    assert mobility_service() == path.read_bytes(), "the same sources produce the same file"
    assert len(path.read_bytes()) < 100_000
    done = subprocess.run([old_python(), "-I", path, "probe"], capture_output=True, text=True, timeout=60, check=True)
    assert set(json.loads(done.stdout)) == set(FACTS)


def test_parts_of_the_program_on_an_old_python(tmp_path: Path) -> None:
    program = tmp_path / "agent.pyz"
    program.write_bytes(mobility_service())
    tests = Path(__file__).with_name("test_mobility.py")
    script = (
        f"import sys, runpy; sys.path.insert(0, {str(program)!r}); runpy.run_path({str(tests)!r}, None, '__main__')"
    )
    done = subprocess.run([old_python(), "-I", "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK" in done.stderr


def test_what_is_installed_names_its_limits() -> None:
    limits = Limits(cpu=30, memory=1 << 28, bandwidth=1000)
    text = unit("/usr/bin/python3", limits, FACTS)
    assert "CPUQuota=30%" in text
    assert f"MemoryMax={1 << 28}\n" in text
    assert "ExecStopPost=/usr/bin/python3 /opt/asr-mobility/asr-mobility.pyz thaw" in text
    assert json.loads(config("box", ["h:1", "i:2"], "aa", limits))["bandwidth"] == 1000


def test_the_limit_of_memory_follows_the_disks() -> None:
    large = changed()
    large["machine"]["disks"] = [{**FACTS["machine"]["disks"][0], "size": 4 << 40} for _ in range(3)]
    least = {"small": unit("python3", Limits(), FACTS), "large": unit("python3", Limits(), large)}
    assert f"MemoryMax={256 * MiB}\n" in least["small"]
    limit = int(least["large"].split("MemoryMax=")[1].split()[0])
    assert 512 * MiB < limit < 520 * MiB
    assert codes({**large, "memory_limit": limit}) == []
    assert codes({**large, "memory_limit": 256 * MiB}) == [("memory-short", "warning")]


def test_a_server_that_nobody_answers_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises((SiteUnreachable, AccessDenied)):
        probe(Access("127.0.0.1", port))


def test_findings_have_stable_severities() -> None:
    assert {item.severity for item in findings(changed(tracking="x"))} == {Severity.ERROR}
