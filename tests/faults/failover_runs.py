"""Failovers whose sites fail and whose engine is killed, at any place: one run in this process, on memory sites.

`Story` makes a protected machine once and puts vault and sites back to that for each run, so that a run takes
milliseconds. A run is what the job's durable log makes of it: a step that was killed, or during which the vault did not
answer, is run again; a step that raised an error ends the job.
"""

from __future__ import annotations

import copy
import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest

import asrcore.crashpoint
from asrcore.errors import AsrError, DriverFailed, ShutdownFailed, SiteUnreachable, TargetFull, VaultUnavailable
from asrcore.model.health import Level
from asrcore.model.machine import PowerState
from asrcore.model.protection import Protection
from asrcore.model.state import State
from asrcore.model.watch import Watch
from asrcore.procedures.catalogue import PROCEDURES
from asrcore.procedures.procedure import Arguments, Work
from asrcore.service.scheduler import Scheduler, _to_fence
from asrcore.service.status import MachineStatus
from asrcore.testing.faults import Faults, When, faulty_site
from tests.unit.rig import DirectEngine, Killed, Rig

__all__ = ["FAULTS", "Fault", "Run", "Story"]


@attrs.frozen
class Fault:
    """Calls at one site that fail: the first `times` of each. `done`: those whose reply only is lost."""

    site: str
    operations: tuple[str, ...]
    error: AsrError
    done: tuple[str, ...] = ()
    times: int = 10_000


_FAILED = DriverFailed(operation="a call", site="b", detail="injected")
_LOST = SiteUnreachable(site="b", detail="injected")
_ALL_OF_TARGET = (
    *(f"target.{name}" for name in ("replica", "failover_findings")),
    *(f"replica.{name}" for name in ("info", "raise_epoch", "open_cycle", "description")),
    *(f"failover.{name}" for name in ("promote", "undo", "tests", "stop_test")),
    *(f"inventory.{name}" for name in ("machine", "power_on", "power_off", "fenced")),
)
_AFTER_START = ("inventory.power_on", "failover.undo", "inventory.machine", "inventory.power_off")

FAULTS: Mapping[str, Fault | None] = {
    "none": None,
    "findings": Fault("b", ("target.failover_findings",), _FAILED),
    "epoch": Fault("b", ("replica.raise_epoch",), _FAILED),
    "cycle": Fault("b", ("replica.open_cycle",), TargetFull(where="b", detail="injected")),
    "seal": Fault("b", ("writer.seal",), _LOST),
    "promote": Fault("b", ("failover.promote",), _FAILED),
    "promote-reply": Fault("b", ("failover.promote",), _LOST, done=("failover.promote",)),
    "promote-undo": Fault("b", ("failover.promote", "failover.undo"), _FAILED),
    "promote-undo-reply": Fault(
        "b", ("failover.promote", "failover.undo"), _LOST, done=("failover.promote", "failover.undo")
    ),
    "start": Fault("b", ("inventory.power_on",), _FAILED),
    "start-reply": Fault("b", ("inventory.power_on",), _LOST, done=("inventory.power_on",)),
    "start-undo": Fault("b", ("inventory.power_on", "failover.undo"), _FAILED),
    "start-reply-lost": Fault("b", _AFTER_START, _LOST, done=("inventory.power_on",)),
    "start-reply-undo-reply": Fault("b", _AFTER_START, _LOST, done=("inventory.power_on", "failover.undo")),
    "target-lost": Fault("b", _ALL_OF_TARGET, _LOST),
    "stop": Fault("a", ("inventory.power_off",), ShutdownFailed(machine="web", seconds=1.0)),
    "fence": Fault("a", ("inventory.fence",), _FAILED),
    "seal-once": Fault("b", ("writer.seal",), _LOST, times=1),
    "promote-once": Fault("b", ("failover.promote",), _FAILED, times=1),
    "promote-undo-once": Fault("b", ("failover.promote", "failover.undo"), _FAILED, times=1),
    "start-once": Fault("b", ("inventory.power_on",), _FAILED, times=1),
    "start-undo-once": Fault("b", ("inventory.power_on", "failover.undo"), _FAILED, times=1),
    "fence-once": Fault("a", ("inventory.fence",), _FAILED, times=1),
    "source-restart": Fault("a", ("inventory.power_on", "inventory.unfence"), _FAILED),
}


class _Inline:
    """A thread that runs at once, so that a kill within it is seen."""

    def __init__(self, *, target: Callable[[], None], name: str, daemon: bool) -> None:
        self.start = target


class Story:
    """A machine `web` that is protected from `a` to `b`, with a newer write than its newest point."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rig = Rig(folder)
        self.rig.machine.write("vda", 0, b"in the first point")
        self.rig.protect()
        self.rig.machine.write("vda", 0, b"in no point yet...")
        self._worlds = [copy.deepcopy(world._state) for world in (self.rig.home, self.rig.away)]
        self._kept = folder / "kept.db"
        _copy(Path(self.rig.vault), self._kept)

    def run(self, monkeypatch: pytest.MonkeyPatch) -> Run:
        """A new run, from the beginning."""
        _copy(self._kept, Path(self.rig.vault))
        for world, state in zip((self.rig.home, self.rig.away), self._worlds, strict=True):
            world.crash()
            world._state = copy.deepcopy(state)
        return Run(self.rig, monkeypatch)

    def close(self) -> None:
        """End."""
        self.rig.engine.close()


def _copy(source: Path, target: Path) -> None:
    """A database, also one that is open: so its statements are compiled once, not in each run."""
    with closing(sqlite3.connect(source)) as there, closing(sqlite3.connect(target)) as here:
        there.backup(here)


def _keep(facts: dict[str, object], work: Work) -> None:
    facts.update(json.loads(json.dumps(work.facts)))


class Run:
    """One machine's life; `check` after each step of it."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rig = rig
        self.faults = {"a": Faults(), "b": Faults()}
        self._patch = monkeypatch
        self._cannot_ask = False
        self._engine = self._open()

    def _open(self) -> DirectEngine:
        engine = DirectEngine(self.rig.engine.vault, self.rig.plugins, self.rig.clock)
        plain = engine.context.site
        self._patch.setattr(engine.context, "site", lambda name: faulty_site(plain(name), self.faults[name]))
        return engine

    def fail(self, fault: Fault | None) -> None:
        """Let the fault happen from now on."""
        if fault is not None:
            self._cannot_ask = fault.site == "b" and "inventory.machine" in fault.operations
            for operation in fault.operations:
                when = When.AFTER if operation in fault.done else When.BEFORE
                self.faults[fault.site].add(operation, fault.error, times=fault.times, when=when)

    def repair(self) -> None:
        """From now on nothing fails."""
        for faults in self.faults.values():
            faults.clear()

    def close(self) -> None:
        """End."""
        self._engine.context.close()

    # -- what can be seen ----------------------------------------------------------------------------------------------

    @property
    def protection(self) -> Protection:
        return self._engine.vault.protection("web")

    @property
    def running(self) -> list[str]:
        """Sites at which the machine runs."""
        found = []
        for name, world in (("a", self.rig.home), ("b", self.rig.away)):
            with world.look() as state:
                if "web" in state.machines and state.machines["web"].power is PowerState.RUNNING:
                    found.append(name)
        return found

    @property
    def status(self) -> MachineStatus:
        return self._engine.status()[0]

    def check_never_both(self) -> None:
        """At any time; but for a source whose fence is owed, because it could not be stopped, and for a target that
        cannot even be asked at an undo: then a person has decided which one counts."""
        protection = self.protection
        owed = protection.fence_due and not protection.undo_due
        owed = owed or (self._cannot_ask and (protection.undo_due or protection.state is State.UNDOING))
        assert len(self.running) <= 1 or owed, "it runs at both sites"

    def check(self) -> None:
        """When no job works on the machine."""
        self.check_never_both()
        health, state = self.status.health, self.protection.state
        ways_out = [reason.action for reason in health.reasons if "`asr " in reason.action]
        if not self.running or state in (State.FAILING_OVER, State.UNDOING):
            assert health.level is Level.CRITICAL, f"runs at {self.running or 'no site'}, {state}"
            assert ways_out, "no reason names a command"
        if state is State.PROTECTED and not self.protection.undo_due:
            with self.rig.away.look() as world:
                assert world.machines == {}, "the target has a machine"
                assert [item.promotion for item in world.replicas.values()] == [None]
            with self.rig.home.look() as world:
                assert world.machines["web"].fence is None, "the source is quarantined"

    # -- what happens --------------------------------------------------------------------------------------------------

    def job(self, kind: str, *, at: str = "", blinks: bool = False, **arguments: object) -> AsrError | None:
        """Run a job to its end; its error. `at`: the engine is killed when it reaches this place, or with `blinks` the
        vault does not answer then."""
        given, facts = Arguments(**arguments), dict[str, object]()  # type: ignore[arg-type]
        with self._patch.context() as patch:
            fence = SimpleNamespace(Thread=_Inline, Event=threading.Event)
            patch.setattr("asrcore.procedures.failover.threading", fence)
            self._kill_at(patch, at, blinks)
            for step in PROCEDURES[kind].steps:
                while True:
                    work = Work(self._engine.context, "j1", self.protection.id, given, Watch(), dict(facts))
                    work.save = partial(_keep, facts, work)
                    try:
                        step.run(work)
                        asrcore.crashpoint.reach(f"step.{step.name}.done")
                    except Killed:
                        self._restart()
                        continue
                    except VaultUnavailable:
                        self._serve()
                        continue
                    except AsrError as error:
                        return error
                    work.save()
                    break
        return None

    def _kill_at(self, patch: pytest.MonkeyPatch, at: str, blinks: bool) -> None:
        def die(*_: object) -> None:
            if blinks:
                raise VaultUnavailable(url="memory", detail="injected")
            raise Killed(at)

        log = Path(self.rig.vault).with_name("places")
        log.unlink(missing_ok=True)
        patch.setattr("asrcore.crashpoint.os.kill", die)
        patch.setattr("asrcore.crashpoint._seen", type(asrcore.crashpoint._seen)())
        if at:
            patch.setenv("ASRCORE_CRASH_AT", at)
        else:
            patch.setenv("ASRCORE_CRASH_LOG", str(log))

    def _restart(self) -> None:
        """Another engine; before it resumes the job, its service does what is due."""
        self.check_never_both()
        self.rig.home.crash()
        self.rig.away.crash()
        self._engine.context.close()
        self._engine = self._open()
        self._serve()

    def _serve(self) -> None:
        """What the service does beside a job: it keeps fences."""
        self.check_never_both()
        scheduler = Scheduler(self._engine.context, lambda kind, protection, arguments: None)
        if _to_fence(self.protection) is not None:
            scheduler._fence(self.protection, Watch())
        self.check_never_both()

    def serve(self) -> None:
        """What the service does while no job works on the machine."""
        self._serve()
        scheduler = Scheduler(self._engine.context, lambda kind, protection, arguments: None)
        if self.protection.undo_due:
            scheduler._finish_undo(self.protection, Watch())
        self._cannot_ask = self._cannot_ask and self.protection.undo_due
        self.check()

    def reached(self) -> list[str]:
        """Places that the former job reached, which was not killed: `NAME`, and `NAME:2` where it came there again."""
        log = Path(self.rig.vault).with_name("places")
        seen: Counter[str] = Counter()
        found = []
        for name in log.read_text().splitlines() if log.exists() else []:
            seen[name] += 1
            found.append(name if seen[name] == 1 else f"{name}:{seen[name]}")
        return found
