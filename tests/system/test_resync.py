"""Tracking is lost: source and replica are compared, the differences are sent, and the points are unchanged."""

from __future__ import annotations

import pytest

from tests.lab import Audit
from tests.system.rig import EngineError, Rig

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


@pytest.mark.parametrize(
    ("target", "started"),
    [
        pytest.param("xfs", True, id="xfs-started-again"),
        pytest.param("ext4", False, id="ext4-off", marks=pytest.mark.long),
    ],
)
def test_killed_qemu_is_compared_not_sent_again(rig: Rig, target: str, started: bool) -> None:
    lab = rig.lab
    name = rig.guest(f"killed-{target}", rate=20)
    rig.rows(name, 5)
    rig.protect(name, target)
    rig.lab.command("a", name, "fill /mnt/lab-scratch/big 0 24")
    rig.rows(name, 5)
    row = rig.paused(name)
    old = rig.replicate(name)["point"]
    before = rig.content(name, old)
    lab.command("a", name, "resume")
    rig.rows(name, 10)

    lab.kill_qemu("a", name)
    if started:
        rig.start(name)
    with pytest.raises(EngineError) as failed:
        rig.replicate(name)
    assert failed.value.code == "tracking-lost"
    assert failed.value.exit_code == 9
    known = rig.protection(name)
    assert known["state"] == "resync-pending"
    assert "bitmap" in known["resync_reason"]
    assert old in rig.points(name)

    facts = rig.job("resync", name, now=True)
    assert facts["mode"] == "compare"
    assert 0 < facts["bytes_sent"] < rig.allocated(name) / 2
    assert rig.state(name) == "protected"
    if started:
        cycle = rig.engine("frozen_cycle", name)
        assert cycle["mode"] == "delta"
        assert rig.content(name, cycle["point"]) == cycle["content"]
    else:
        assert rig.content(name) == rig.source_content(name)
    assert rig.content(name, old) == before
    assert _audit(rig, name, old).last == row
    rig.forget(name)


def _audit(rig: Rig, name: str, point: str) -> Audit:
    with rig.tested(name, point) as console:
        audit = console.audits[-1]
    assert audit.intact
    return audit


def test_resync_of_an_equal_machine_sends_next_to_nothing(rig: Rig) -> None:
    """Requested by hand, without `--now`: marked with the reason, then compared."""
    name = rig.guest("resync-asked")
    rig.protect(name)
    rig.paused(name)
    rig.replicate(name)
    assert rig.engine("resync", name) is None
    assert rig.state(name) == "resync-pending"
    assert rig.protection(name)["resync_reason"]
    facts = rig.job("resync", name, now=True)
    assert facts["bytes_sent"] < 1 << 20
    assert facts["bytes_same"] > 500 << 20
    assert rig.state(name) == "protected"
    rig.forget(name)
