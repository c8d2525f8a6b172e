"""The link is cut in the middle of a copy: a catalogued error in time, and the next run resumes."""

from __future__ import annotations

import time

import pytest

from tests.system.rig import MIB, EngineError, Rig, wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


def received(rig: Rig) -> int:
    """Bytes received by site b over the link since it is up."""
    return int(rig.lab.run_in("b", ["cat", "/sys/class/net/wan0/statistics/rx_bytes"]).stdout)


def test_link_cut_in_the_initial_copy(rig: Rig) -> None:
    lab, name = rig.lab, rig.guest("cut", rate=2)
    lab.command("a", name, "fill /mnt/lab-scratch/big 0 48")
    lab.slow(40)
    try:
        before = received(rig)
        job = rig.engine("protect", name, source="a", target="xfs", policy="still")
        wait_for(lambda: received(rig) > before + 28 * MIB, "half of it is copied")
        lab.cut()
        begun = time.monotonic()
        with pytest.raises(EngineError) as failed:
            rig.engine("wait", job["id"], 80)
        assert time.monotonic() - begun < 60
        assert failed.value.code in ("site-unreachable", "view-lost", "timed-out")
        assert failed.value.exit_code == 6
        known = rig.protection(name)
        assert known["state"] == "initial-copy"
        assert known["retry_at"] is not None
        assert rig.points(name) == []
    finally:
        lab.restore()
    wait_for(lambda: _settled(rig), "site a is reached again", timeout=30)
    assert lab.state("a", name) == "running"
    facts = rig.job("replicate", name)
    assert rig.state(name) == "protected"
    sent = rig.engine("cycles", name)[-1]["bytes_sent"]
    assert sent < 40 * MIB, facts  # of the 48 and the other data on the disks
    cycle = rig.engine("frozen_cycle", name)
    assert rig.content(name, cycle["point"]) == cycle["content"]
    first = rig.points(name)[0]
    with rig.tested(name, first) as console:
        assert console.audits[-1].intact
    rig.forget(name)


@pytest.mark.long
def test_link_cut_in_a_delta(rig: Rig) -> None:
    """The other way to lose a link: the cable is unplugged. The delta is resumed, the older point is complete."""
    lab, name = rig.lab, rig.guest("cut-delta", rate=2)
    rig.protect(name)
    old = rig.points(name)[0]
    before = rig.content(name, old)
    lab.command("a", name, "fill /mnt/lab-scratch/big 0 32")
    lab.slow(24)
    try:
        so_far = received(rig)
        job = rig.engine("replicate", name, keep=True)
        wait_for(lambda: received(rig) > so_far + 14 * MIB, "part of it is copied")
        lab.cut(carrier=False)
        with pytest.raises(EngineError) as failed:
            rig.engine("wait", job["id"], 80)
        assert failed.value.exit_code == 6
        assert failed.value.seconds < 60
        assert rig.points(name) == [old]
        assert rig.content(name, old) == before
    finally:
        lab.restore()
    wait_for(lambda: _settled(rig), "site a is reached again", timeout=30)
    facts = rig.replicate(name)
    assert facts["resumed"]
    assert facts["mode"] == "delta"
    assert facts["bytes_sent"] < 26 * MIB
    cycle = rig.engine("frozen_cycle", name)
    assert rig.content(name, cycle["point"]) == cycle["content"]
    rig.forget(name)


def _settled(rig: Rig) -> bool:
    try:
        rig.engine("site_status", "a")
    except EngineError as error:
        assert error.exit_code == 6  # noqa: PT017 - it takes a while
        return False
    return True
