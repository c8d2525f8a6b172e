"""A physical server, replicated through a process server to a master target: what it goes through, and each time the
replica is what was frozen, byte for byte (the witness on the server tells)."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.lab import Lab
from tests.lab._site import wait_until
from tests.system.cockpit import AsrFailed
from tests.system.physical import NAME, Scene

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

HOT = "while :; do dd if=/dev/urandom of=/srv/plain/hot bs=64k count=32 conv=notrunc,fdatasync; sleep 1; done"


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Lab("physical") as lab, Scene(lab) as made:
        made.start_target()
        made.set_up()
        made.server.start(timeout=400)
        made.push()
        made.place_witness()
        made.server.ssh(f"nohup sh -c '{HOT}' > /dev/null 2>&1 &")
        made.protected_with_witness()  # the initial copy, under load
        yield made


def compared(scene: Scene) -> None:
    """Tracking was lost: a delta says so, a comparison makes the replica equal again, a delta goes on."""
    with pytest.raises(AsrFailed) as told:
        scene.asr("replicate", NAME)
    assert told.value.error is not None
    assert told.value.error["code"] == "tracking-lost"
    scene.witnessed("resync", NAME, "--now")
    scene.witnessed("replicate", NAME)


def test_delta_under_load(scene: Scene) -> None:
    facts = scene.witnessed("replicate", NAME)
    assert facts["mode"] == "delta"
    assert facts["consistency"] == "filesystem"


def test_agent_killed(scene: Scene) -> None:
    scene.server.ssh("systemctl kill -s KILL asr-mobility")
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"


def test_file_system_trimmed(scene: Scene) -> None:
    scene.server.ssh("fstrim -a")
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
    """The dead man is outside of the service's control group. The server kills by itself: nobody logs in to one that is
    frozen."""
    scene.server.ssh(f"nohup sh -c '{KILL}' > /dev/null 2>&1 &")
    scene.asr.run("replicate", NAME, timeout=300)
    wait_until(lambda: scene.server.ssh("cat /run/took", check=False).stdout != "", "thawed", 120, 1)
    assert int(scene.server.ssh("cat /run/took").stdout) < 40, "long before the limit of 60 s"
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"


def test_link_slow_and_cut(scene: Scene) -> None:
    """To the master target: at 1 Mbit/s, then cut, then as before."""
    scene.lab.slow(1)
    job = scene.begin("replicate", NAME)
    time.sleep(8)
    scene.lab.cut()
    job.wait(300)
    scene.lab.restore()
    assert scene.witnessed("replicate", NAME)["mode"] == "delta"


def test_server_restarted(scene: Scene) -> None:
    scene.server.reboot()
    scene.place_witness()
    compared(scene)


def test_power_cut(scene: Scene) -> None:
    scene.server.cut_power()
    scene.server.start(timeout=400)
    scene.place_witness()
    compared(scene)
    assert scene.server.audit().intact


def test_removal_leaves_nothing(scene: Scene) -> None:
    scene.enrol("remove", "--identity", "/srv/asr/dc", "--name", NAME)
    left = "ls -A /opt /sys/fs/bpf /tmp/asr-* /etc/systemd/network/10-asr-* /run/asr-* 2>/dev/null | grep -v '^$\\|:$'"
    assert scene.server.ssh(left, check=False).stdout == ""
    assert scene.server.ssh("cat /proc/sys/kernel/tainted").stdout.strip() == "0"
    assert "not be found" in scene.server.ssh("systemctl status asr-mobility", check=False).stderr
    assert list(scene.lab.host_path("a", "/srv/asr/dc/servers").iterdir()) == []
