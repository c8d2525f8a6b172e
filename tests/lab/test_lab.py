"""The lab does what it promises: the other system tests depend on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import REPLICA_DIRS, Audit, CommandFailed, Kind, Lab, LabError
from tests.lab._console import parse_audit, parse_console
from tests.lab._places import PROJECT

pytestmark = pytest.mark.system

DIRECT = "direct"
CONNECT = """
import socket, sys
socket.create_connection((sys.argv[1], 16509), timeout=2).close()
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("test-lab") as lab:
        yield lab


@pytest.fixture(scope="module")
def direct(lab: Lab) -> str:
    """A running guest with three disks at site a."""
    lab.define_guest("a", Kind.BIOS_DIRECT, DIRECT, rate=20)
    lab.start("a", DIRECT)
    return DIRECT


def connects(lab: Lab, source: str, target: str) -> bool:
    """Whether libvirtd's TCP port of one site can be reached from the other."""
    address = lab.sites[target].address
    return lab.run_in(source, [sys.executable, "-c", CONNECT, address], check=False).returncode == 0


def audit_now(lab: Lab, name: str) -> Audit:
    return parse_audit(lab.command("a", name, "audit"))


def leftovers(name: str) -> list[str]:
    """What is left of a lab on the machine, found without the lab's code."""
    places = (PROJECT / "build/lab/sites" / name, Path("/run/asr-lab") / name)
    found = [str(path) for path in places if path.exists()]
    for command in (["ip", "netns", "list"], ["losetup", "--list"], ["mount"], ["ps", "-eo", "args"]):
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        marks = (f"asr-lab-{name}-", f"/lab/sites/{name}/", f"/asr-lab/{name}/")
        found += [line for line in printed.splitlines() if any(mark in line for mark in marks)]
    for view in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            if f"/lab/sites/{name}/" in view.read_text():
                found.append(f"mounts of {view.parent}")
        except OSError:
            continue  # has ended meanwhile
    return found


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.long if kind is not Kind.BIOS_DISK else (), id=kind.value) for kind in Kind],
)
def test_guest_boots_and_survives_power_loss(lab: Lab, kind: Kind) -> None:
    name = f"power-{kind.value}"
    uefi = kind is Kind.UEFI
    lab.define_guest("a", kind, name, rate=20)
    lab.start("a", name)
    (fresh,) = lab.console("a", name).audits
    assert fresh.intact
    assert (fresh.rows, fresh.areas) == (0, 3 if kind is Kind.BIOS_DIRECT else 1)

    lab.wait_row("a", name, 30)
    lab.kill_qemu("a", name)
    acknowledged = lab.console("a", name).last_ack
    assert acknowledged is not None
    lab.start("a", name)
    console = lab.console("a", name)
    assert console.errors == ()
    after = console.audits[-1]
    assert after.intact
    assert after.first == 1
    assert acknowledged.row <= after.last <= acknowledged.row + 1
    assert after.last_time >= acknowledged.time
    hardware = console.hardware[-1]
    assert hardware.firmware == ("uefi" if uefi else "bios")
    assert hardware.nvram_boots == (1 if uefi else None)
    assert "Nehalem" in hardware.cpu
    lab.remove_guest("a", name)


def test_orderly_shutdown_loses_no_row(lab: Lab, direct: str) -> None:
    lab.wait_row("a", direct, 10)
    seconds = lab.shutdown("a", direct)
    assert seconds < 10
    console = lab.console("a", direct)
    down = console.down[-1]
    assert console.last_ack is not None
    assert (down.boot, down.last) == (console.ready[-1], console.last_ack.row)
    lab.start("a", direct)
    after = lab.console("a", direct).audits[-1]
    assert after.intact
    assert after.last == down.last


ZERO_SECTOR_4 = "dd if=/dev/zero of=rows bs=512 seek=4 count=1 conv=notrunc"
MISPLACE_SECTOR_7 = "dd if=rows of=rows bs=512 skip=7 seek=4 count=1 conv=notrunc"
SOME = -1


@pytest.mark.parametrize(
    ("damage", "shows"),
    [
        pytest.param("printf x >> rows", {"torn": 1}, id="half a row at the end"),
        pytest.param(ZERO_SECTOR_4, {"bad": 1, "gaps": 1, "torn": 0}, id="a row is gone"),
        pytest.param(MISPLACE_SECTOR_7, {"bad": 1, "gaps": 1}, id="a row in another's place"),
        pytest.param("truncate -s 10240 rows", {"ahead": SOME, "bad": 0}, id="ledger older than the other disks"),
        pytest.param("dd if=/dev/zero of=/dev/vdb bs=4096 seek=1 count=2048", {"behind": SOME}, id="older disk"),
        pytest.param("fill /dev/vdb 1 1", {"blocks_bad": 256, "bad": 0}, id="garbage on a disk"),
        pytest.param("fill /mnt/lab-ledger/area 1 1", {"blocks_bad": 256}, id="garbage in a file"),
    ],
)
def test_audit_shows_damage(lab: Lab, direct: str, damage: str, shows: dict[str, int]) -> None:
    lab.wait_row("a", direct, 100)
    lab.command("a", direct, "pause")
    lab.command("a", direct, "cd /mnt/lab-ledger && cp rows area /tmp && dd if=/dev/vdb of=/tmp/vdb bs=1M count=9")
    before = audit_now(lab, direct)
    lab.command("a", direct, damage if damage.startswith("fill") else f"cd /mnt/lab-ledger && {damage}")
    found = audit_now(lab, direct)
    put_back = "cat /tmp/rows > rows; cat /tmp/area > area; cat /tmp/vdb > /dev/vdb; rm /tmp/rows /tmp/area /tmp/vdb"
    lab.command("a", direct, f"cd /mnt/lab-ledger && {put_back}")
    after = audit_now(lab, direct)
    lab.command("a", direct, "resume")
    assert before.intact
    assert after.intact
    assert not found.intact
    for field, count in shows.items():
        seen = getattr(found, field)
        assert seen > 0 if count == SOME else seen == count


def test_freeze_by_the_guest_agent_holds_the_workload(lab: Lab, direct: str) -> None:
    site = lab.sites["a"]
    site.virsh("domfsfreeze", direct)
    try:
        held = lab.console("a", direct).last_ack
        with pytest.raises(LabError):
            lab.wait_row("a", direct, (held.row if held else 0) + 3, timeout=1)
    finally:
        site.virsh("domfsthaw", direct)
    lab.wait_row("a", direct, (held.row if held else 0) + 3, timeout=10)


def test_trim_gives_space_back(lab: Lab, direct: str) -> None:
    image = lab.host_path("a", f"/srv/images/{direct}-sda.qcow2")
    lab.command("a", direct, "fill /mnt/lab-scratch/big 0 32")
    filled = image.stat().st_blocks * 512
    lab.command("a", direct, "rm /mnt/lab-scratch/big; sync; fstrim /mnt/lab-scratch")
    assert filled - image.stat().st_blocks * 512 > 24 << 20


def test_failing_guest_command_says_so(lab: Lab, direct: str) -> None:
    with pytest.raises(LabError, match=r"(?s)failed with status 1.*No such file"):
        lab.command("a", direct, "cat /nowhere")


def test_sites_do_not_know_each_other(lab: Lab, direct: str) -> None:
    assert lab.state("a", direct) == "running"
    with pytest.raises(CommandFailed, match="failed to get domain"):
        lab.state("b", direct)
    image = f"/srv/images/{direct}-vda.qcow2"
    assert lab.run_in("a", ["test", "-e", image], check=False).returncode == 0
    for hidden in (image, lab.sites["a"].socket, lab.sites["a"].disk_dir / image.lstrip("/")):
        assert lab.run_in("b", ["test", "-e", hidden], check=False).returncode == 1
    uuids = {lab.sites[site].virsh("capabilities").stdout.split("<uuid>")[1][:36] for site in lab.sites}
    assert len(uuids) == 2


def test_only_the_link_joins_the_sites(lab: Lab, direct: str) -> None:
    listed = ["virsh", "-c", lab.sites["a"].remote_uri, "list", "--name"]
    assert direct in lab.run_in("b", listed).stdout
    assert direct not in lab.run_in("b", ["virsh", "-c", lab.sites["b"].inner_uri, "list", "--name"]).stdout
    for carrier in (True, False):
        lab.cut(carrier=carrier)
        assert not connects(lab, "b", "a")
        assert not connects(lab, "a", "b")
        lab.restore()
        assert connects(lab, "b", "a")
    assert direct in lab.run_in("b", listed).stdout


def test_slow_link_is_slow(lab: Lab) -> None:
    serve = "import socket; s = socket.create_server(('', 7000)); print('up', flush=True); c = s.accept()[0]\n"
    serve += "while c.recv(65536): pass\nc.sendall(b'done')"
    send = "import socket; s = socket.create_connection(('10.77.0.1', 7000)); s.sendall(bytes(1 << 20))\n"
    send += "s.shutdown(socket.SHUT_WR); assert s.recv(9) == b'done'"
    lab.slow(8)
    try:
        with lab.popen_in("a", [sys.executable, "-c", serve], stderr=None) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"up\n"
            begun = time.monotonic()
            lab.run_in("b", [sys.executable, "-c", send])
            assert 0.8 < time.monotonic() - begun < 4
    finally:
        lab.restore()


def test_popen_gives_the_pid_of_the_command_itself(lab: Lab) -> None:
    with lab.popen_in("b", ["sleep", "60"]) as sleeper:
        while Path(f"/proc/{sleeper.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.01)
        assert sleeper.pid in lab.sites["b"].processes()
        sleeper.kill()


def test_replica_directories(lab: Lab) -> None:
    for replica in REPLICA_DIRS:
        for site in ("a", "b"):
            lab.run_in(site, ["sh", "-ec", f"cd {replica.path}; echo {site} > whose"])
            assert lab.host_path(site, f"{replica.path}/whose").read_text() == f"{site}\n"
        cloned = lab.run_in(
            "a", ["cp", "--reflink=always", f"{replica.path}/whose", f"{replica.path}/clone"], check=False
        )
        assert (cloned.returncode == 0) == (replica.filesystem == "xfs")
        assert lab.host_path("a", f"{replica.path}/whose").read_text() == "a\n"
    for small in ("/srv/small", "/srv/small-xfs"):
        with pytest.raises(CommandFailed, match="No space left"):
            lab.run_in("a", ["dd", "if=/dev/zero", f"of={small}/big", "bs=1M", "count=400"])
        lab.run_in("a", ["rm", f"{small}/big"])


def test_site_burns_and_returns(lab: Lab) -> None:
    lab.define_guest("b", Kind.BIOS_DIRECT, "returns", autostart=True)
    lab.define_guest("b", Kind.BIOS_DIRECT, "stays-off")
    lab.start("b", "stays-off", wait=False)
    lab.start("b", "returns")
    qemus = [lab.qemu_pid("b", name) for name in ("returns", "stays-off")]
    lab.site_down("b")
    assert lab.sites["b"].hypervisor_processes() == []
    assert not any(Path(f"/proc/{pid}/cwd").exists() for pid in qemus)
    assert not connects(lab, "a", "b")
    assert lab.sites["b"].virsh("list", check=False).returncode != 0

    lab.site_up("b")
    lab.wait_ready("b", "returns", boots=2)
    assert lab.console("b", "returns").audits[-1].intact
    assert lab.state("b", "stays-off") == "shut off"
    assert connects(lab, "a", "b")


def test_same_name_twice_is_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match="in use by process"):
        Lab(lab.name).up()
    assert connects(lab, "b", "a")


def test_guest_defined_twice_is_refused(lab: Lab, direct: str) -> None:
    with pytest.raises(LabError, match="already defined at site a"):
        lab.define_guest("a", Kind.BIOS_DIRECT, direct)


@pytest.mark.parametrize("name", ["", "../x", "A", "a b", "x" * 30])
def test_bad_name_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="not a name"):
        Lab(name)


HOLD = """
import signal, sys, time
from tests.lab import Lab
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell inherit an ignored SIGINT
with Lab(sys.argv[1]) as lab:
    lab.define_guest("a", "bios-direct", "g")
    lab.start("a", "g", wait=False)
    print("up", flush=True)
    time.sleep(60)
"""


def hold(name: str) -> subprocess.Popen[str]:
    """Another process with a lab that is up."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD), name]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_killed_owner_is_cleared_away_by_the_next() -> None:
    name = "test-killed"
    with hold(name) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        owner.kill()
    assert leftovers(name)  # otherwise the check finds nothing
    with Lab(name) as lab:
        assert connects(lab, "b", "a")
    assert leftovers(name) == []


@pytest.mark.parametrize("seconds", [None, 0.05, 0.25, 0.6])
def test_interrupted_owner_leaves_nothing_behind(seconds: float | None) -> None:
    """Ctrl-C with the lab up (None), or this many seconds after its start began."""
    name = "test-interrupted"
    with hold(name) as owner:
        assert owner.stdout is not None
        if seconds is None:
            assert owner.stdout.readline() == "up\n"
        else:
            while not Path("/run/asr-lab", name).exists():
                assert owner.poll() is None
                time.sleep(0.01)
            time.sleep(seconds)
        os.kill(owner.pid, signal.SIGINT)
        assert owner.wait(30) != 0
    assert leftovers(name) == []


def test_lab_by_hand() -> None:
    name = "test-by-hand"

    def call(*words: str) -> str:
        command = [sys.executable, "-m", "tests.lab", *words]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True, timeout=60).stdout

    try:
        first = call("up", "--name", name)
        assert Lab(name).uri("a") in first
        with pytest.raises(LabError, match="is up"):
            Lab(name).up()
        assert call("up", "--name", name) == first
        assert connects(Lab(name), "b", "a")
        assert f"{name}: started on the command line" in call("status")
    finally:
        call("down", "--name", name)
    assert leftovers(name) == []
    call("down", "--name", name)


def test_console_text_is_read_up_to_the_last_whole_line() -> None:
    console = parse_console("noise LAB-READY 0a\r\nLAB-ACK 7 12.500000 0a\r\nLAB-ACK 8 12.6")
    assert console.ready == ("0a",)
    assert [(ack.row, ack.time, ack.boot) for ack in console.acks] == [(7, 12.5, "0a")]
