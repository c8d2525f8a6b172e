"""The scenario of a protected machine in chapters: each is one verb, and starts from the folder that another one left.

The machine keeps running between the chapters (`before`); the engine is killed within them (`verb`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import attrs

from asrcore.engine import Engine
from asrcore.errors import AsrError, DriverFailed, TargetFull, TrackingLost, WrongState
from asrcore.model.extent import Extent
from asrcore.model.point import Consistency, RecoveryPoint
from asrcore.model.state import State
from asrcore.replication import transfer
from asrcore.replication.context import Context
from asrcore.testing.memory._content import BLOCK
from asrcore.units import HOUR, KiB
from asrcore.vault import Job
from tests.crash.memory._workspace import MACHINE, POLICY, Workspace

__all__ = ["CHAPTERS", "Chapter"]

Verb = Callable[[Workspace, Engine], Job | None]


@attrs.frozen
class Chapter:
    """`after`: the chapter from whose end this one starts; with `killed` the engine was killed at that place of it.

    `again` is the operator's action when the kill came before the job was recorded. `fails`: errors with which the job
    may end. `gives_up`: an interrupted cycle need not be resumed.
    """

    name: str
    after: str
    verb: Verb
    reaches: Callable[[Workspace, Engine], bool]
    killed: str = ""
    before: Callable[[Workspace], None] = lambda stage: None
    again: Verb | None = None
    repaired: Callable[[Workspace], None] = lambda stage: None
    fails: tuple[type[AsrError], ...] = ()
    gives_up: bool = False
    again_read: int = 0
    """Bytes that may be read a second time, because the source could not freeze its disks."""
    writes: bool = True
    """Whether the guest may write between kill and restart."""


def _state(wanted: State) -> Callable[[Workspace, Engine], bool]:
    return lambda stage, engine: engine.vault.protection(MACHINE).state is wanted


_protected = _state(State.PROTECTED)


# -- protection ----------------------------------------------------------------------------------------------------


def _protect(stage: Workspace, engine: Engine) -> Job:
    return engine.protect(MACHINE, source="a", target="b", policy="gold")


def _protect_again(stage: Workspace, engine: Engine) -> Job:
    """The machine may be recorded although its job is not: then it is resumed, as the service does."""
    return engine.replicate(MACHINE) if engine.vault.protections() else _protect(stage, engine)


def _life(seed: int, hours: float = 0.1) -> Callable[[Workspace], None]:
    """The guest writes where it runs."""

    def live(stage: Workspace) -> None:
        stage.clock.forward(hours * HOUR)
        with stage.vault() as vault:
            protection = next(iter(vault.protections()), None)
        site = stage.lives_at(protection)
        assert site is not None
        stage.write(site, seed)

    return live


def _view_lost(seed: int) -> Callable[[Workspace], None]:
    """The guest writes, and the view that the interrupted cycle was reading is lost."""

    def live(stage: Workspace) -> None:
        _life(seed)(stage)
        for world in stage.worlds.values():
            with world.change() as state:
                for machine in state.machines.values():
                    machine.views.clear()

    return live


def _going_on(stage: Workspace, engine: Engine) -> Job | None:
    """No new action: the restarted engine resumes what was interrupted."""
    return next(iter(engine.vault.jobs(active=True)), None)


def _weaker_guest(stage: Workspace) -> None:
    """Its agent has failed: points are less consistent from now on, and must record it."""
    stage.machine("a").configure(consistency=Consistency.CRASH)
    _life(3)(stage)


def _three_cycles(stage: Workspace, engine: Engine) -> Callable[[], bool]:
    """Cycles of 70 s: the point of the second one is not kept, the third replaces it."""
    heads = [engine.vault.protection(MACHINE).head_point]
    stage.clock.forward(70)

    def there() -> bool:
        head = engine.vault.protection(MACHINE).head_point
        if head != heads[-1]:
            heads.append(head)
            stage.clock.forward(70)
        return len(heads) > 3

    return there


def _until_quarantined(stage: Workspace, engine: Engine) -> Callable[[], bool]:
    return lambda: _quarantined(stage, engine)


def _serve(until: Callable[[Workspace, Engine], Callable[[], bool]]) -> Verb:
    """`asr run` until something has happened."""

    def serve(stage: Workspace, engine: Engine) -> None:
        stop, there = threading.Event(), until(stage, engine)

        def watch() -> None:
            while not there() and not stop.wait(0.02):
                pass
            stop.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            engine.run(stop)
        finally:
            stop.set()
            watcher.join()

    return serve


def _replicate(stage: Workspace, engine: Engine) -> Job:
    return engine.replicate(MACHINE, keep=True)


def _restless(stage: Workspace) -> None:
    """The source cannot freeze a disk: it is read while it changes, and settled at the end."""
    stage.machine("a").configure(holds_still=False)
    _life(21)(stage)


def _replicate_restless(stage: Workspace, engine: Engine) -> Job:
    """The guest writes while the copy is in progress."""
    copy = transfer.Transfer.copy
    wrote: list[int] = []

    def copy_while_it_writes(self: transfer.Transfer, extents: Iterable[Extent]) -> None:
        copy(self, extents)
        if not wrote:
            wrote.append(1)
            stage.write("a", 22, 64 * KiB)

    transfer.Transfer.copy = copy_while_it_writes  # type: ignore[method-assign]
    return _replicate(stage, engine)


def _after_a_day(stage: Workspace) -> None:
    """No engine ran for 30 hours, and a person has accepted the clock since."""
    _life(5, hours=30)(stage)
    with stage.vault() as vault:
        (protection,) = vault.protections()
        Context(vault, clock=stage.clock, elapsed=stage.clock).aging.meet([(protection.id, POLICY.interval)])
        assert vault.accept_clock(stage.clock(), "right")
        stage.note(**{"old points": _expired(stage, vault.points(protection.id))})


def _expired(stage: Workspace, points: Iterable[RecoveryPoint]) -> int:
    now = stage.clock()
    return sum(now - point.taken_at > 24 * HOUR for point in points)


def _thinned(stage: Workspace, engine: Engine) -> bool:
    """A share of the older points is deleted."""
    left = _expired(stage, engine.points(MACHINE))
    return _protected(stage, engine) and left < int(str(stage.notes["old points"]))


def _lose_tracking(stage: Workspace) -> None:
    _life(6)(stage)
    stage.machine("a").lose_tracking()
    stage.note(**{"tracking lost": True})


def _resync(stage: Workspace, engine: Engine) -> Job | None:
    return engine.resync(MACHINE, now=True)


def _resynced(stage: Workspace, engine: Engine) -> bool:
    stage.note(**{"tracking lost": False})
    return _protected(stage, engine)


def _tamper(stage: Workspace) -> None:
    """Storage at the target is damaged, in the head and in the point that shares its file."""
    _life(8)(stage)
    with stage.away.change() as state:
        (replica,) = state.replicas.values()
        newest = replica.points[-1]
        for disks in (replica.head, newest.disks):
            disks["vda"].write(5 * BLOCK, b"\xff" * BLOCK)
            disks["vdb"].write(0, b"rot")
        first = newest.point.taken_at
    stage.note(tampered=(first, float("inf")))


def _repair(stage: Workspace, engine: Engine) -> Job:
    return engine.verify(MACHINE, repair=True)


def _repaired(stage: Workspace, engine: Engine) -> bool:
    """The newest point is the repaired one."""
    first, _ = stage.notes["tampered"]
    stage.note(tampered=(first, engine.points(MACHINE)[-1].taken_at))
    return _protected(stage, engine)


# -- tests ---------------------------------------------------------------------------------------------------------


def _test(stage: Workspace, engine: Engine) -> Job:
    return engine.failover_test(MACHINE, point=engine.points(MACHINE)[0].id)


def _test_latest(stage: Workspace, engine: Engine) -> Job:
    return engine.failover_test(MACHINE)


def _tested(stage: Workspace, engine: Engine) -> bool:
    """The test machine has the content of its point, and is isolated."""
    run = engine.vault.protection(MACHINE).test
    assert run is not None
    point = next(point for point in engine.points(MACHINE) if point.id == run.point_id)
    with stage.away.look() as state:
        machine = state.machine(run.machine_id)
        assert all(nic.network == "" for nic in machine.base.nics)
        assert machine.power.value == "running"
    test = stage.away.machine(run.machine_id)
    found = {disk.id: test.sha256(disk.id) for disk in test.value.disks}
    assert found == stage.truth("a", point.taken_at).disks
    return _protected(stage, engine)


def _scribble(stage: Workspace) -> None:
    """The test machine writes; its writes must not appear anywhere else."""
    with stage.vault() as vault:
        run = vault.protection(MACHINE).test
    assert run is not None
    stage.away.machine(run.machine_id).write("vda", 0, b"a test wrote this")
    _life(10)(stage)


def _cleaned(stage: Workspace, engine: Engine) -> bool:
    return engine.vault.protection(MACHINE).test is None and _protected(stage, engine)


# -- failover ------------------------------------------------------------------------------------------------------


def _cut(stage: Workspace) -> None:
    _life(12)(stage)
    stage.home.cut()


def _older(stage: Workspace, engine: Engine) -> Job:
    """To a point that is not the newest: what the source wrote since is discarded."""
    return engine.failover_unplanned(MACHINE, point=engine.points(MACHINE)[0].id)


def _latest(stage: Workspace, engine: Engine) -> Job:
    return engine.failover_unplanned(MACHINE)


def _failed_over(stage: Workspace, engine: Engine) -> bool:
    protection = engine.vault.protection(MACHINE)
    point = next(point for point in engine.points(MACHINE) if point.id == protection.failover_point)
    stage.note(**{"failover taken at": point.taken_at})
    return protection.state is State.FAILED_OVER


def _failed_over_planned(stage: Workspace, engine: Engine) -> bool:
    """No data is lost: the running machine has the content that the source had when it stopped."""
    moved = _failed_over(stage, engine)
    source = engine.vault.protection(MACHINE).source_site
    assert stage.truth(source, stage.notes["failover taken at"]) == stage.truth(source, stage.clock())
    return moved


def _failed_over_owing(stage: Workspace, engine: Engine) -> bool:
    assert engine.vault.protection(MACHINE).fence_due
    return _failed_over(stage, engine)


def _failed_over_to_newest(stage: Workspace, engine: Engine) -> bool:
    """To the last point that the target had sealed, although the engine was killed before it could record it."""
    with stage.away.look() as state:
        (replica,) = state.replicas.values()
        replica.apply()
        newest = replica.points[-1].point.id
    return engine.vault.protection(MACHINE).failover_point == newest and _failed_over_owing(stage, engine)


def _return(stage: Workspace) -> None:
    stage.home.restore()


def _quarantined(stage: Workspace, engine: Engine) -> bool:
    return _failed_over(stage, engine) and not engine.vault.protection(MACHINE).fence_due


def _undo(stage: Workspace, engine: Engine) -> Job:
    return engine.failover_undo(MACHINE)


def _undone(stage: Workspace, engine: Engine) -> bool:
    return _protected(stage, engine) and stage.running_at() == ["a"] and stage.power("b") is None


def _planned(stage: Workspace, engine: Engine) -> Job:
    return engine.failover_planned(MACHINE)


def _full(stage: Workspace) -> None:
    _life(15)(stage)
    stage.away.fill(100)


def _aborted(stage: Workspace, engine: Engine) -> bool:
    """A planned failover whose last delta fails leaves the machine where it was, running.

    Killed before it had failed, it is resumed and succeeds, because the target has space by then.
    """
    if engine.vault.protection(MACHINE).state is State.FAILED_OVER:
        return _failed_over_planned(stage, engine)
    return _undone(stage, engine)


def _commit(stage: Workspace, engine: Engine) -> Job:
    return engine.failover_commit(MACHINE)


def _reprotect(stage: Workspace, engine: Engine) -> Job:
    return engine.reprotect(MACHINE)


def _works_there(stage: Workspace) -> None:
    """The machine runs at the site it failed over to."""
    with stage.vault() as vault:
        site = vault.protection(MACHINE).target_site
    stage.learn(site)
    stage.write(site, 16)


def _committed_back(stage: Workspace, engine: Engine) -> bool:
    """The first site's own disks are kept, whatever happened to the machine there."""
    assert stage.home.left_disks == [f"{MACHINE}/vda", f"{MACHINE}/vdb"]
    return _state(State.COMMITTED)(stage, engine)


def _unprotect(stage: Workspace, engine: Engine) -> Job:
    return engine.unprotect(MACHINE)


def _unprotected(stage: Workspace, engine: Engine) -> bool:
    """Only the machine is left at either site."""
    assert stage.machine("a").marks == stage.machine("a").views == []
    return engine.vault.protections() == [] and stage.running_at() == ["a"]


def _unprotect_again(stage: Workspace, engine: Engine) -> Job | None:
    return _unprotect(stage, engine) if engine.vault.protections() else None


CHAPTERS = {
    chapter.name: chapter
    for chapter in (
        Chapter("enable", "", _protect, _protected, again=_protect_again),
        Chapter("delta", "enable", _replicate, _protected, before=_life(1)),
        Chapter("service", "delta", _serve(_three_cycles), _protected, before=_weaker_guest),
        Chapter("retention", "service", _replicate, _thinned, before=_after_a_day),
        Chapter(
            "lost", "retention", _replicate, _state(State.RESYNC_PENDING), before=_lose_tracking,
            fails=(TrackingLost, WrongState),
        ),
        Chapter("resync", "lost", _resync, _resynced, before=_life(7)),
        Chapter("repair", "resync", _repair, _repaired, before=_tamper, gives_up=True),
        Chapter("test", "repair", _test, _tested, before=_life(9)),
        Chapter("test-again", "test", _test_latest, _tested, before=_scribble),
        Chapter("cleanup", "test-again", lambda stage, engine: engine.failover_cleanup(MACHINE), _cleaned),
        Chapter("site-lost", "cleanup", _older, _failed_over_owing, before=_cut),
        Chapter("returns", "site-lost", _serve(_until_quarantined), _quarantined, before=_return),
        Chapter("undo", "returns", _undo, _undone),
        Chapter("undo-owing", "site-lost", _undo, _undone, before=_return),
        Chapter("unplanned", "undo", _older, _failed_over, before=_life(13)),
        Chapter("planned", "undo", _planned, _failed_over_planned, before=_life(14)),
        Chapter(
            "aborted", "undo", _planned, _aborted, before=_full, fails=(TargetFull, DriverFailed),
            repaired=lambda stage: stage.away.make_room(), writes=False,
        ),
        Chapter("commit", "planned", _commit, _state(State.COMMITTED)),
        Chapter("reprotect", "commit", _reprotect, _protected, before=_works_there),
        Chapter("back", "reprotect", _planned, _failed_over_planned, before=_life(17)),
        Chapter("commit-back", "back", _commit, _committed_back),
        Chapter("reprotect-back", "commit-back", _reprotect, _protected, before=_works_there),
        Chapter("unprotect", "reprotect-back", _unprotect, _unprotected, again=_unprotect_again),
        # Killed twice: the resumed work is interrupted again.
        Chapter("copy-resumed", "enable", _going_on, _protected, killed="cycle.flushed:3", before=_view_lost(2)),
        Chapter("delta-resumed", "delta", _going_on, _protected, killed="cycle.flushed:2", before=_view_lost(4)),
        Chapter("resync-resumed", "resync", _going_on, _resynced, killed="cycle.flushed:2", before=_view_lost(18)),
        Chapter(
            "reprotect-resumed", "reprotect", _going_on, _protected, killed="cycle.flushed:2", before=_view_lost(19)
        ),
        Chapter(
            "restless", "delta", _replicate_restless, _protected, before=_restless, again_read=256 * KiB
        ),
        Chapter("given-up", "service", _resync, _resynced, killed="cycle.flushed:2", before=_life(20), gives_up=True),
        # The newest point is sealed but not recorded; the one before it and the source are lost.
        Chapter(
            "lost-after-seal", "service", _latest, _failed_over_to_newest, killed="cycle.sealed:3", before=_cut,
            gives_up=True,
        ),
    )
}  # fmt: skip
