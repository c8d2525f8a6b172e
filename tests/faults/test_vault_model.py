"""An earlier copy of the vault is put back between random steps of a machine's life.

A person orders anything at any time, also right after a restore, and the service looks as it does. Whatever the vault
believes: the machine runs at one site, what stands behind a failed-over machine is never written, and no kept point is
deleted but with its replica, which only a commit or the end of protection deletes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from asrcore.errors import AsrError
from asrcore.model.finding import Severity
from asrcore.model.machine import PowerState
from asrcore.model.policy import ALWAYS, Policy
from asrcore.model.watch import Watch
from asrcore.service.scheduler import Scheduler
from asrcore.testing.memory import MemoryWorld
from asrcore.units import DAY, MINUTE
from tests.put_back import put_back, take_copy
from tests.unit.rig import DirectEngine, Rig

pytestmark = pytest.mark.once

VERBS: dict[str, Callable[[DirectEngine], object]] = {
    "replicate": lambda engine: engine.replicate("web", keep=True),
    "resync": lambda engine: engine.resync("web", now=True),
    "test": lambda engine: engine.failover_test("web"),
    "cleanup": lambda engine: engine.failover_cleanup("web"),
    "planned": lambda engine: engine.failover_planned("web"),
    "unplanned": lambda engine: engine.failover_unplanned("web"),
    "undo": lambda engine: engine.failover_undo("web"),
    "commit": lambda engine: engine.failover_commit("web"),
    "reprotect": lambda engine: engine.reprotect("web"),
    "adopt": lambda engine: engine.adopt("web"),
}


class _Here:
    """In place of the service's threads: work is done where it is started."""

    def start(self, key: str, site: str, work: Callable[[Watch], None]) -> bool:
        work(Watch())
        return True

    def has_room(self, site: str) -> bool:
        return True


class PutBack(RuleBasedStateMachine):
    copies = Bundle("copies")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.rig = Rig(Path(self.folder.name))
        policy = Policy("gold", interval=MINUTE, point_interval=MINUTE, keep=100 * DAY, ladder=(), resync_window=ALWAYS)
        self.rig.engine.vault.update_policy(policy)
        self.rig.protect()
        self.taken = 0
        self.kept: dict[str, set[str]] = {}
        self.standing: dict[str, tuple[str, ...]] = {}  # points of replicas with a promotion, when it was made
        self._begin()

    def _begin(self) -> None:
        vault = self.rig.engine.vault
        vault.begin_incarnation(put_back=bool(vault.was_put_back()))
        self.service = Scheduler(self.rig.engine.context, self.rig.engine._submit)
        self.service._cycles = self.service._fences = _Here()  # type: ignore[assignment]

    def teardown(self) -> None:
        self.rig.engine.close()
        self.folder.cleanup()

    @property
    def running(self) -> list[MemoryWorld]:
        found = []
        for world in (self.rig.home, self.rig.away):
            with world.look() as state:
                if "web" in state.machines and state.machines["web"].power is PowerState.RUNNING:
                    found.append(world)
        return found

    # -- what happens ------------------------------------------------------------------------------------------------

    @rule(target=copies)
    def a_copy_is_made(self) -> Path:
        self.taken += 1
        vault = Path(self.rig.vault)
        return take_copy(vault, vault.with_name(f"copy-{self.taken}.db"))

    @rule(copy=copies, directory=st.booleans())
    def a_copy_is_put_back(self, copy: Path, directory: bool) -> None:
        self.rig.home.crash()
        self.rig.away.crash()
        self.rig.engine.close()
        put_back(copy, Path(self.rig.vault), directory=directory)
        self.rig.engine = self.rig._engine()
        self._begin()

    @rule(
        target=copies, verbs=st.lists(st.sampled_from(sorted(VERBS)), min_size=1, max_size=4), directory=st.booleans()
    )
    def much_happens_before_a_copy_is_put_back(self, verbs: list[str], directory: bool) -> object:
        copy = self.a_copy_is_made()
        for verb in verbs:
            self.a_person_orders(verb)
            self.what_must_hold()
        self.a_copy_is_put_back(copy, directory)
        return multiple()

    @rule(verb=st.sampled_from(sorted(VERBS)))
    def a_person_orders(self, verb: str) -> None:
        with suppress(AsrError):
            VERBS[verb](self.rig.engine)

    @rule(seconds=st.sampled_from([1.0, MINUTE, 3 * MINUTE]))
    def time_passes(self, seconds: float) -> None:
        for world in self.running:
            world.machine("web").write("vda", 0, str(self.rig.clock.now).encode())
        self.rig.clock.now += seconds
        with suppress(AsrError):
            self.service._look()
        self.service._start_cycles()

    @rule()
    def another_server_takes_over(self) -> None:
        protection = self.rig.protection
        self.rig.engine.vault.update(protection.id, epoch=protection.epoch + 1)

    # -- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def what_must_hold(self) -> None:
        running = [world.name for world in self.running]
        assert len(running) <= 1, "it runs at both sites"
        (status,) = self.rig.engine.status()
        critical = [item.code for item in status.health.reasons if item.severity is Severity.ERROR]
        assert running or set(critical) - {"no-engine"}, "it runs nowhere, and health says nothing"
        for world in (self.rig.home, self.rig.away):
            with world.look() as state:
                for replica in state.replicas.values():
                    held = tuple(point.point.id for point in replica.points)
                    known = self.kept.setdefault(replica.id, set())
                    assert known <= set(held), "a kept point was deleted"
                    known |= {point.point.id for point in replica.points if point.point.kept}
                    if replica.promotion is None:
                        self.standing.pop(replica.id, None)
                    else:
                        standing = self.standing.setdefault(replica.id, held)
                        assert standing == held, "a cycle was written over the machine that runs"


TestPutBack = PutBack.TestCase
TestPutBack.settings = settings(max_examples=12, stateful_step_count=20, deadline=None, derandomize=True)
