"""Operations on a folder, each in a separate process: prepare a chapter, run it, resume after a kill."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

from asrcore.engine import Engine
from asrcore.errors import AsrError
from asrcore.model.protection import CycleMode
from asrcore.model.state import State
from asrcore.procedures import verify
from asrcore.replication import aging, pair, proof, transfer
from asrcore.testing.memory._content import BLOCK
from asrcore.units import HOUR, KiB
from asrcore.vault import Job
from tests.crash.memory import _invariants as invariants
from tests.crash.memory._scenario import CHAPTERS, Chapter
from tests.crash.memory._workspace import MACHINE, Workspace

__all__ = ["VERBS"]

PATIENCE = 120.0  # seconds for a job that takes one second on an idle machine
_WRITTEN = 32 * KiB  # bytes that the guest writes between kill and restart
# Two ranges and a discard on each of two disks; each may touch one block more than it fills.
_DIRTY = 2 * (_WRITTEN // 2 + _WRITTEN // 4 + 16 * KiB + 3 * BLOCK)


def _small_steps() -> None:
    """Several pieces and flushes although the disks here are small."""
    transfer.FLUSH_EVERY = 64 * KiB
    transfer.COPY_PIECE = 32 * KiB
    pair.NEAR_PIECE = 64 * KiB
    # With several workers, the scheduler decides how much is flushed at a place.
    transfer.COPY_WORKERS = pair.NEAR_WORKERS = 1
    proof.REGION = 256 * KiB
    verify.SAVE_SECONDS = 0.0
    # A chapter may begin long after the one whose folder it continues: that is no gap of the service.
    aging.BELIEVED = HOUR


def prepare(folder: Path, chapter: Chapter, place: str) -> None:
    """Run the chapter's `before`, and note the jobs that have already ended."""
    stage = Workspace(folder) if folder.exists() else Workspace.make(folder)
    chapter.before(stage)
    with stage.vault() as vault:
        stage.note(ended=[job.id for job in vault.jobs() if job.state.ended])


def live(folder: Path, chapter: Chapter, place: str) -> None:
    """Run the chapter, up to `place` if given: the process is killed there."""
    _small_steps()
    stage = Workspace(folder)
    os.environ["ASRCORE_CRASH_AT" if place else "ASRCORE_CRASH_LOG"] = place or str(folder / "reached")
    with stage.engine() as engine:
        engine.start()
        job = chapter.verb(stage, engine)
        _wait(engine, chapter, [job] if job else [])
        assert place or chapter.reaches(stage, engine), engine.status()
    assert not place, f"{place} was not reached"


def go_on(folder: Path, chapter: Chapter, place: str) -> None:
    """A new engine after the kill, or after the chapter if there was none: all work must end."""
    _small_steps()
    stage = Workspace(folder)
    with stage.vault() as vault:
        invariants.check_always(stage, vault)
        cycle = invariants.interrupted(stage, vault)
    written = _life_in_between(stage, chapter, place) if place else 0
    chapter.repaired(stage)
    with stage.engine() as engine:
        engine.start()
        _bring_to_its_end(stage, engine, chapter, after_kill=bool(place))
        assert chapter.reaches(stage, engine), f"the state is {engine.status()}"
        invariants.check_always(stage, engine.vault)
        invariants.check_at_rest(stage, engine.vault)
        written += _live_on(stage, engine)
        if cycle is not None:
            resumed = invariants.check_resumed(engine.vault, cycle, written + chapter.again_read, 12)
            assert resumed or chapter.gives_up, "a cycle that could be resumed was abandoned"
            stage.note(done=cycle.done, left=cycle.left, resumed=resumed)
        os._exit(0)  # nothing is left to check; a clean shutdown of DBOS would take a quarter of the time


def _life_in_between(stage: Workspace, chapter: Chapter, place: str) -> int:
    """The guest writes while no engine runs; the view that was being read may be lost meanwhile."""
    with stage.vault() as vault:
        site = stage.lives_at(next(iter(vault.protections()), None))
    if site is None or not chapter.writes:
        return 0
    number = zlib.crc32(f"{chapter.name}/{place}".encode())
    stage.write(site, number, _WRITTEN)
    if number % 2:
        stage.machine(site).lose_views()
    return _DIRTY


def _bring_to_its_end(stage: Workspace, engine: Engine, chapter: Chapter, *, after_kill: bool) -> None:
    mine = [job for job in engine.vault.jobs() if job.id not in stage.notes["ended"]]
    if after_kill and not mine:
        job = (chapter.again or chapter.verb)(stage, engine)
        mine = [job] if job else []
    _wait(engine, chapter, mine)


def _wait(engine: Engine, chapter: Chapter, jobs: list[Job]) -> None:
    for job in jobs:
        try:
            engine.wait(job, timeout=PATIENCE)
        except AsrError as error:
            if not isinstance(error, chapter.fails):
                raise


def _live_on(stage: Workspace, engine: Engine) -> int:
    """The machine afterwards: from every state it can be protected again, with a delta as the next cycle.

    Returns the number of bytes that the guest may have changed meanwhile.
    """
    verbs: dict[State, Callable[[str], Job | None]] = {
        State.RESYNC_PENDING: lambda machine: engine.resync(machine, now=True),
        State.FAILED_OVER: engine.failover_commit,
        State.COMMITTED: engine.reprotect,
    }
    stage.home.restore()
    stage.away.make_room()
    if not engine.vault.protections():
        return 0
    while (protection := engine.vault.protection(MACHINE)).state is not State.PROTECTED:
        if protection.state is State.COMMITTED:
            invariants.check_at_rest(stage, engine.vault)
            stage.learn(protection.target_site)
        job = verbs[protection.state](MACHINE)
        assert job is not None
        engine.wait(job, timeout=PATIENCE)
    stage.note(**{"tracking lost": False})
    stage.clock.forward(600)
    stage.write(protection.source_site, 99, _WRITTEN)
    job = engine.replicate(MACHINE)
    engine.wait(job, timeout=PATIENCE)
    _check_delta(stage, engine)
    return _DIRTY


def _check_delta(stage: Workspace, engine: Engine) -> None:
    protection = engine.vault.protection(MACHINE)
    invariants.check_always(stage, engine.vault)
    invariants.check_at_rest(stage, engine.vault)
    last = engine.vault.cycles(protection.id)[-1]
    assert last.mode is CycleMode.DELTA
    assert stage.truth(protection.source_site, last.taken_at) == stage.truth(protection.source_site, stage.clock())
    machine = stage.machine(protection.source_site)
    assert protection.mark is not None
    assert machine.marks == [protection.mark.token]
    assert machine.views == []
    with stage.worlds[protection.target_site].look() as state:
        assert state.replica(protection.replica_id).journal is None


VERBS: dict[str, Callable[[Path, Chapter, str], None]] = {"prepare": prepare, "live": live, "go_on": go_on}


def work(verb: str, folder: str, chapter: str, place: str) -> None:
    """Run one of the three operations, by name."""
    VERBS[verb](Path(folder), CHAPTERS[chapter], place)
