"""A failover takes nothing before the target can give: the engine is killed, and the vault does not answer, at every
place of planned and unplanned failovers whose sites fail at every step.

Afterwards the source runs or the target runs; never both; neither only with a critical reason that names the way out,
which works.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from asrcore.model.state import State
from tests.faults.failover_runs import FAULTS, Run, Story

KINDS = ("failover-planned", "failover-unplanned")


@pytest.fixture(scope="module")
def story() -> Iterator[Story]:
    quick = Path("/dev/shm")  # a kill is no power failure: nothing depends on flushes to the disk
    folder = Path(tempfile.mkdtemp(prefix="asr-failover-", dir=quick if os.access(quick, os.W_OK) else None))
    made = Story(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


# Within a cycle: `tests/crash/memory` kills there.
_OF_A_CYCLE: tuple[str, ...] = ("cycle.", "source.", "target.cycle", "target.flush", "target.points", "target.seal")
_OF_A_CYCLE += ("vault.begin-cycle", "vault.forget-points", "vault.mark-dropping", "vault.record-point")


def ends_well(run: Run, *, again: bool = False) -> None:
    """With the sites repaired, the service and the command that health names end it; then all goes on as before."""
    run.check()
    run.serve()
    run.repair()
    run.serve()
    if run.protection.state in (State.FAILING_OVER, State.UNDOING):
        assert any("asr failover undo web" in reason.action for reason in run.status.health.reasons)
        assert run.job("failover-undo") is None
        run.check()
    if run.protection.state is State.FAILED_OVER:
        assert run.running == ["b"]
        assert not run.protection.fence_due
        assert run.job("failover-undo") is None
    assert run.protection.state is State.PROTECTED
    assert not run.protection.undo_due
    assert run.running == ["a"]
    assert run.job("replicate") is None
    run.check()
    if again:
        assert run.job("failover-planned") is None
        assert run.running == ["b"]


def one(run: Run, kind: str, fault: str, *, at: str, blinks: bool = False) -> None:
    run.fail(FAULTS[fault])
    run.job(kind, at=at, blinks=blinks)
    try:
        ends_well(run)
    finally:
        run.close()


def each(story: Story, kind: str, fault: str, monkeypatch: pytest.MonkeyPatch, *, one_of: int = 1) -> None:
    """Undisturbed, then killed at each place that it reached, or at one of so many."""
    first = story.run(monkeypatch)
    first.fail(FAULTS[fault])
    first.job(kind)
    places = [place for place in first.reached() if not place.startswith(_OF_A_CYCLE)]
    ends_well(first, again=True)
    first.close()
    assert len(places) > 8 or fault in ("findings", "target-lost")
    for number, place in enumerate(places):
        if (number + zlib.crc32(fault.encode())) % one_of == 0:
            # Before a transaction is committed a kill is as one before it, so there the vault does not answer.
            one(story.run(monkeypatch), kind, fault, at=place, blinks=".written" in place)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_machine_runs_at_one_site(kind: str, fault: str, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place without a fault, and some places with each fault."""
    each(story, kind, fault, monkeypatch, one_of=1 if fault == "none" else 16)


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_place_with_each_fault(kind: str, fault: str, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    each(story, kind, fault, monkeypatch)
