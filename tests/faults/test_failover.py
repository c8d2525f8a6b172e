"""A failover takes nothing before the target can give: the engine is killed, and the vault does not answer, at every
place of planned and unplanned failovers, and of an undo, whose sites fail at every step.

Afterwards the source runs or the target runs; never both; neither only with a critical reason that names the way out,
which works.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asrcore.errors import DriverFailed, SiteUnreachable
from asrcore.model.state import State
from tests.faults.failover_runs import FAULTS, Run, Story

KINDS = ("failover-planned", "failover-unplanned", "failover-undo")


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
    """With the sites repaired, the service and the command that health names end it; all then continues as before."""
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


def begun(run: Run, kind: str, fault: str) -> Run:
    """Ready for the job: for an undo the machine is failed over, and its source is there to be released."""
    if kind == "failover-undo":
        assert run.job("failover-unplanned") is None
    run.fail(FAULTS[fault])
    return run


def one(run: Run, kind: str, fault: str, *, at: str, blinks: bool = False) -> None:
    error = run.job(kind, at=at, blinks=blinks)
    if fault == "none":
        assert error is None, "a kill, or a vault that does not answer, is no failure of the failover"
        assert run.running == (["a"] if kind == "failover-undo" else ["b"])
    try:
        ends_well(run)
    finally:
        run.close()


def each(story: Story, kind: str, fault: str, monkeypatch: pytest.MonkeyPatch, *, some: bool = False) -> None:
    """Undisturbed, then killed at each place that it reached; `some`: without a fault at all but every second
    transaction, with a fault at a few."""
    first = begun(story.run(monkeypatch), kind, fault)
    first.job(kind)
    places = [place for place in first.reached() if not place.startswith(_OF_A_CYCLE)]
    ends_well(first, again=True)
    first.close()
    assert len(places) > 8 or fault in ("findings", "target-lost")
    for number, place in enumerate(places):
        one_of = 1 if not some else 24 if fault != "none" else 2 if place.startswith("vault.") else 1
        if (number + zlib.crc32(fault.encode())) % one_of == 0:
            # Before a transaction is committed a kill is as one before it, so there the vault does not answer.
            one(begun(story.run(monkeypatch), kind, fault), kind, fault, at=place, blinks=".written" in place)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_machine_runs_at_one_site(kind: str, fault: str, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    each(story, kind, fault, monkeypatch, some=True)


# Calls of a planned failover, one in each step that can be taken back.
ONCE = (
    ("b", "replica.raise_epoch"),
    ("a", "inventory.power_off"),
    ("b", "writer.seal"),
    ("b", "failover.promote"),
    ("b", "inventory.power_on"),
)


def once(run: Run, site: str, operation: str) -> None:
    run.faults[site].add(operation, DriverFailed(operation="a call", site=site, detail="injected once"))


@pytest.mark.parametrize("blinks", [False, True])
@pytest.mark.parametrize(("site", "operation"), ONCE)
def test_a_failover_that_is_being_taken_back_is_not_tried_again(
    site: str, operation: str, blinks: bool, story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call fails once; the engine is killed, or the vault does not answer, at each place of the taking back. What the
    source has written since it was released is not lost."""
    first = story.run(monkeypatch)
    once(first, site, operation)
    assert first.job("failover-planned") is not None
    places = [place for place in first.reached() if not place.startswith(_OF_A_CYCLE)]
    first.close()
    for place in places[-7:]:
        run = story.run(monkeypatch)
        once(run, site, operation)
        serve = run._serve

        def written(run: Run = run, serve: Callable[[], None] = serve) -> None:
            if "a" in run.running:
                run.rig.machine.write("vda", 0, b"since it is released")
            serve()

        monkeypatch.setattr(run, "_serve", written)
        try:
            run.job("failover-planned", at=place, blinks=blinks)
            (runs,) = run.running
            world = run.rig.home if runs == "a" else run.rig.away
            with run.rig.home.look() as home, world.look() as here:
                wrote, has = bytearray(20), bytearray(20)
                home.machines["web"].disks["vda"].content.read_into(0, memoryview(wrote))
                here.machines["web"].disks["vda"].content.read_into(0, memoryview(has))
            assert wrote == has, place
            ends_well(run)
        finally:
            run.close()


def test_a_target_that_is_lost_while_the_failover_is_taken_back(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is killed when the source is released; then the target can neither be cleaned up again nor asked."""
    run = story.run(monkeypatch)
    once(run, "b", "inventory.power_on")
    lost = SiteUnreachable(site="b", detail="injected")
    run.faults["b"].add("failover.undo", lost, at=2, times=10_000)
    run.faults["b"].add("inventory.machine", lost, times=10_000)
    try:
        assert run.job("failover-planned", at="undo.released") is not None
        assert run.protection.state is State.PROTECTED
        assert run.running == ["a"]
        ends_well(run)
    finally:
        run.close()


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_place_with_each_fault(kind: str, fault: str, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    each(story, kind, fault, monkeypatch)
