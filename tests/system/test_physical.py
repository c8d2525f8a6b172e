"""A physical server, replicated through a process server to a master target, in various failures. Each time the replica
equals the frozen disks, byte for byte, as the witness on the server reports them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab import Lab
from tests.lab._site import wait_until
from tests.system.asr_cli import AsrFailed
from tests.system.physical import NAME, Scene
from tests.system.two_sites import sent_bytes

pytestmark = [pytest.mark.system, pytest.mark.long, pytest.mark.timeout(900)]

HOT = (
    "while :; do test -e /run/calm || "
    "dd if=/dev/urandom of=/srv/plain/hot bs=64k count=32 conv=notrunc,fdatasync; sleep 1; done"
)
BULK = 16 << 20


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Lab("physical") as lab, Scene(lab) as made:
        made.use_a_disk_of_its_own()
        made.start_target()
        made.set_up(silence="5s")
        made.server.start(timeout=400)
        made.push()
        made.listen()
        made.place_witness()
        made.server.ssh(f"nohup sh -c '{HOT}' > /dev/null 2>&1 &")
        made.protected_with_witness()  # the initial copy, under load
        yield made


def compared(scene: Scene) -> None:
    """Tracking was lost: a delta reports it, a comparison makes the replica equal again."""
    with pytest.raises(AsrFailed) as caught:
        scene.asr("replicate", NAME)
    assert caught.value.error is not None
    assert caught.value.error["code"] == "tracking-lost"
    scene.witnessed("resync", NAME, "--now")


def test_delta_under_load(scene: Scene) -> None:
    facts = scene.witnessed("replicate", NAME)
    assert facts["mode"] == "delta"
    assert facts["consistency"] == "filesystem"


def test_agent_killed(scene: Scene) -> None:
    scene.server.ssh("systemctl kill -s KILL asr-mobility")
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"


def test_file_system_trimmed(scene: Scene) -> None:
    scene.server.ssh("dd if=/dev/urandom of=/srv/plain/gone bs=1M count=8 conv=fsync")
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"
    scene.server.ssh("rm /srv/plain/gone && sync")
    said = scene.server.ssh("fstrim -av").stdout
    trimmed = sum(int(count) for count in re.findall(r"\((\d+) bytes\) trimmed", said))
    assert trimmed >= 8 << 20, said
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"


SEEN = (
    "nohup sh -c 'while test ! -e /run/seen-enough; do ps -efww; sleep 0.1; done > /run/seen 2>&1' > /dev/null 2>&1 &"
)


def secrets(scene: Scene) -> list[str]:
    """Lines of the server's private key; the first is the same in all keys of its kind."""
    pem = scene.server.ssh("cat /opt/asr-mobility/agent.pem").stdout
    return pem.partition("BEGIN PRIVATE KEY-----")[2].partition("-----END")[0].split()[1:]


def test_pushed_again(scene: Scene) -> None:
    """Like an upgrade: tracking continues, the certificate is replaced, and its key appears nowhere on the way."""
    known = secrets(scene)
    scene.server.ssh(f"rm -f /run/seen-enough; {SEEN}")
    scene.push()
    scene.server.ssh("touch /run/seen-enough")
    fresh = secrets(scene)
    assert fresh
    assert set(fresh).isdisjoint(known)
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"
    processes = scene.server.ssh("cat /run/seen").stdout
    assert "asr-mobility.pyz probe" in processes, "the process list was not recorded"
    journal = scene.server.ssh("journalctl --no-pager").stdout
    assert "connected to 10.78.0.1:9443" in journal
    for text in (processes, journal):
        assert not [secret for secret in [*known, *fresh, "PRIVATE KEY"] if secret in text]


def test_pushed_with_another_identity(scene: Scene) -> None:
    """As from a second process server with its own identity: refused, and replication continues."""
    words = ["--identity", "/srv/asr/other", "--name", NAME, "--server", "10.78.0.1"]
    done = scene.enrol("push", *words, check=False)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "enrolled with another identity" in done.stderr
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"


KILL = """\
rm -f /run/witness/hanging /run/took; echo 100 > /run/witness/hang
while ! test -e /run/witness/hanging; do sleep 0.2; done
begun=$(date +%s)
rm /run/witness/hang
systemctl kill -s KILL asr-mobility
echo thawed > /srv/data/thawed && sync -f /srv/data
echo $(($(date +%s) - begun)) > /run/took
"""


def test_whole_service_killed_in_the_freeze(scene: Scene) -> None:
    """The watchdog process is outside the service's control group. The server itself kills the service: a login to a
    frozen server is impossible."""
    scene.server.ssh(f"nohup sh -c '{KILL}' > /dev/null 2>&1 &")
    scene.asr.run("replicate", NAME, timeout=300)
    wait_until(lambda: scene.server.ssh("cat /run/took", check=False).stdout != "", "thawed", 120, 1)
    assert int(scene.server.ssh("cat /run/took").stdout) < 40, "long before the limit of 60 s"
    scene.server.ssh("touch /run/calm")  # the next tests send over slow links
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"


def begun(scene: Scene, mbit: float, **options: Any) -> subprocess.Popen[bytes]:
    """A delta of 16 MiB in progress over a slow link, with 2 MiB sent."""
    scene.server.ssh(f"dd if=/dev/urandom of=/srv/plain/bulk bs=1M count={BULK >> 20} conv=notrunc,fsync")
    scene.lab.slow(mbit)
    before = sent_bytes(scene.lab)
    job = scene.begin("replicate", NAME, **options)
    wait_until(lambda: sent_bytes(scene.lab) > before + (2 << 20), "it is being sent", 120)
    return job


def test_link_slow(scene: Scene) -> None:
    """To the master target, at 1 Mbit/s."""
    scene.lab.slow(1)
    try:
        assert scene.witnessed("replicate", NAME)["mode"] == "delta"
    finally:
        scene.lab.restore()


def test_link_cut(scene: Scene) -> None:
    """To the master target, in the middle of a delta."""
    job = begun(scene, 8)
    scene.lab.cut()
    job.wait(300)
    scene.lab.restore()
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"


@pytest.mark.parametrize("settled", [False, True], ids=["while it sends", "right after the freeze"])
def test_process_server_loses_power(scene: Scene, settled: bool) -> None:
    """What was not durable on its disk is lost; what was durable is enough to resume."""
    if settled:
        job = scene.begin("replicate", NAME, env={"ASRCORE_CRASH_AT": "source.view.settled"})
        assert job.wait(300) == -signal.SIGKILL
    else:
        job = begun(scene, 8)
    kept, lost = (scene.lab.host_path("a", f"/srv/asr/{name}") for name in ("kept", "lost"))
    with kept.open("w") as file:
        file.write("kept")
        file.flush()
        os.fsync(file.fileno())
    lost.write_text("lost")
    scene.process_server_loses_power()
    job.wait(30)
    assert kept.read_text() == "kept"
    assert not lost.exists() or lost.read_text() != "lost", "the power cut lost nothing"
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"


def test_disk_grown(scene: Scene) -> None:
    """Grown by its storage while the server runs; tracking restarts, so it is compared."""
    size = scene.server.disk("DATA0001").stat().st_size + (64 << 20)
    scene.server.grow_data_disk(size)
    compared(scene)
    assert scene.heads()["DATA0001"].stat().st_size == size


def test_server_restarted(scene: Scene) -> None:
    scene.server.reboot()
    scene.place_witness()
    compared(scene)


def test_power_cut(scene: Scene) -> None:
    scene.server.cut_power()
    scene.server.start(timeout=400)
    scene.place_witness()
    compared(scene)
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"
    assert scene.server.audit().intact


def test_removal_leaves_nothing(scene: Scene) -> None:
    scene.enrol("remove", "--identity", "/srv/asr/dc", "--name", NAME)
    left = "ls -A /opt /sys/fs/bpf /tmp/asr-* /etc/systemd/network/10-asr-* /run/asr-* 2>/dev/null | grep -v '^$\\|:$'"
    assert scene.server.ssh(left, check=False).stdout == ""
    assert scene.server.ssh("cat /proc/sys/kernel/tainted").stdout.strip() == "0"
    assert "not be found" in scene.server.ssh("systemctl status asr-mobility", check=False).stderr
    assert list(scene.lab.host_path("a", "/srv/asr/dc/servers").iterdir()) == []
