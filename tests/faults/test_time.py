"""Clocks that are set at random: no point is lost, the RPO is never shown smaller than it is, replication continues.

The service's own code runs, without threads: a step of the model lets time pass, sets a clock, cuts a site or restarts
the engine, and then the service looks. True time is what the monotonic clock counts.

What no engine can know is allowed for, and no more. Between two processes only recorded times can be compared, so:

- a clock that is set back while no engine runs, by less than the newest point is old, makes that point look younger
  until the next one (`unseen`);
- a clock that is set forward while no engine runs counts as time: at once by no more than a restart takes, and
  otherwise when the clock has held for an hour (`believed`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asrcore.model.health import CLOCK_TOLERANCE
from asrcore.model.point import RecoveryPoint
from asrcore.model.policy import ALWAYS, Policy
from asrcore.model.watch import Watch
from asrcore.replication import retry
from asrcore.replication.aging import BELIEVED
from asrcore.service import status
from asrcore.service.scheduler import Scheduler
from asrcore.testing.memory import MemoryWorld
from asrcore.units import DAY, HOUR, MINUTE
from tests.unit.rig import Rig

pytestmark = pytest.mark.once

INTERVAL = 5 * MINUTE
KEEP = 2 * DAY
STEPS = st.sampled_from([-40 * DAY, -3 * DAY, -HOUR, -61.0, -3.0, -1.0, 1.0, 3.0, 61.0, HOUR, 3 * DAY, 40 * DAY])


class _Here:
    """In place of the service's threads: work is done where it is started."""

    def start(self, key: str, site: str, work: Callable[[Watch], None]) -> bool:
        work(Watch())
        return True

    def has_room(self, site: str) -> bool:
        return True


class Time(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.rig = Rig(Path(self.folder.name))
        self.ahead = {"engine": 0.0, "home": 0.0, "away": 0.0}
        self.taken: dict[str, float] = {}  # when each point was, in true time
        self.kept: set[str] = set()
        self.unseen = 0.0
        self.believed: dict[str, float] = {}  # by how much each point may count as too old
        self.doubted = 0.0  # what the clock was set forward without an engine, until that is corrected or accepted
        for world in (self.rig.home, self.rig.away):
            self._give_clock(world)
        policy = Policy(
            "gold",
            interval=INTERVAL,
            point_interval=INTERVAL,
            keep=KEEP,
            ladder=(),
            resync_window=ALWAYS,
            verify_every=0,
        )
        self.rig.engine.vault.update_policy(policy)
        self._begin()
        self.rig.protect()
        self._note()

    def _give_clock(self, world: MemoryWorld) -> None:
        world.clock = lambda: self.rig.clock() + self.ahead[world.name]

    def _begin(self) -> None:
        engine = self.rig.engine
        engine.context.elapsed = self.rig.clock
        engine.context.clock = lambda: self.rig.clock() + self.ahead["engine"]
        self.service = Scheduler(engine.context, engine._submit)
        self.service._cycles = self.service._fences = _Here()  # type: ignore[assignment]

    def teardown(self) -> None:
        self.rig.engine.close()
        self.folder.cleanup()

    @property
    def true(self) -> float:
        return self.rig.clock.now

    @property
    def points(self) -> list[RecoveryPoint]:
        return self.rig.engine.points("web")

    def _note(self) -> None:
        """What the service has just made is of now."""
        for point in self.points:
            if point.id not in self.taken:
                self.taken[point.id], self.believed[point.id], self.unseen = self.true, 0.0, 0.0
            if point.kept:
                self.kept.add(point.id)

    def _believe(self, seconds: float) -> None:
        for point in self.believed:
            self.believed[point] += seconds

    def _look(self, cut: bool = False) -> None:
        self.rig.home.cut() if cut else self.rig.home.restore()
        self.rig.machine.write("vda", 0, str(self.true).encode())
        held = self.rig.engine.vault.clock_state().held
        self.service._look()
        self.service._start_cycles()
        now_held = self.rig.engine.vault.clock_state().held
        if held and not now_held:
            self._believe(self.doubted)
            self.doubted = 0.0
        if now_held:
            assert self.kept <= {point.id for point in self.points}, "points were deleted while the clock is in doubt"
        self._note()

    # -- what happens ------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1.0, INTERVAL, 20 * MINUTE, HOUR, 6 * HOUR, DAY]), cut=st.booleans())
    def time_passes(self, seconds: float, cut: bool) -> None:
        self.rig.clock.now += seconds
        self._look(cut)

    @rule(seconds=STEPS, host=st.sampled_from(["engine", "engine", "home", "away"]), cut=st.booleans())
    def a_clock_is_set(self, seconds: float, host: str, cut: bool) -> None:
        self.ahead[host] += seconds
        if host == "engine" and seconds < -CLOCK_TOLERANCE:
            self.doubted = max(0.0, self.doubted + seconds)
        self._look(cut)

    @rule(cut=st.booleans())
    def the_clock_is_set_right(self, cut: bool) -> None:
        self.a_clock_is_set(-self.ahead["engine"], "engine", cut)

    @rule(
        away=st.sampled_from([0.0, 5.0, MINUTE, 5 * MINUTE, DAY]),
        step=st.just(0.0) | STEPS,
        run=st.sampled_from(["", "another"]),
        cut=st.booleans(),
    )
    def the_engine_restarts(self, away: float, step: float, run: str, cut: bool) -> None:
        self.rig.clock.now += away
        self.ahead["engine"] += step
        self.rig.restart()
        self._begin()
        if run:
            self.rig.engine.context.aging._run = f"{run}-{self.true}"
        self.unseen += max(0.0, -step)
        self._believe(min(max(0.0, step), BELIEVED))
        noticed = max(0.0, -step - (self.true - self.taken[self.points[-1].id]))
        self.doubted = max(0.0, self.doubted + max(0.0, step) - noticed)
        self._look(cut)

    @rule(seconds=st.sampled_from([20 * MINUTE, HOUR]), back=st.sampled_from([61.0, 15 * MINUTE]))
    def the_clock_goes_back_while_the_source_is_lost(self, seconds: float, back: float) -> None:
        self.time_passes(seconds, cut=True)
        self.a_clock_is_set(-back, "engine", cut=True)

    @rule(ahead=st.sampled_from([3 * DAY, 40 * DAY]), cut=st.booleans())
    def the_engine_starts_before_its_clock_is_set_right(self, ahead: float, cut: bool) -> None:
        self.the_engine_restarts(0.0, ahead, "another", cut)
        self.a_clock_is_set(-ahead, "engine", cut)
        for _ in range(2):
            self.time_passes(HOUR + 1, cut)

    @rule(step=st.sampled_from([61.0, -61.0, 3 * DAY]))
    def the_clock_is_set_when_points_are_old_enough(self, step: float) -> None:
        """Retention last ran before the source was lost: it would delete them in the first cycle after that."""
        for _ in range(3):
            self.time_passes(DAY, cut=True)
        self.a_clock_is_set(step, "engine", cut=False)
        for _ in range(2):
            self.time_passes(20 * MINUTE, cut=False)

    @rule()
    def replication_continues(self) -> None:
        """However wrong all clocks are, and whatever failed before: within a retry's longest wait there is a point."""
        for _ in range(2):
            self.rig.clock.now += retry.LAST_DELAY + 1
            self._look()
        assert self.true - self.taken[self.points[-1].id] < 1

    # -- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def no_kept_point_is_lost(self) -> None:
        left = {point.id for point in self.points}
        for point in self.kept - left:
            age = self.true - self.taken[point]
            assert age > KEEP - self.believed[point] - CLOCK_TOLERANCE, f"{point} was deleted {age} s old"
        self.kept &= left
        replica = self.rig.engine.context.site("b").target.replica(self.rig.protection.replica_id)
        assert left <= {point.id for point in replica.info().points}

    @invariant()
    def the_rpo_is_not_shown_smaller_than_it_is(self) -> None:
        (item,) = status.machines(self.rig.engine.vault, self.rig.engine.context.clock())
        true = self.true - self.taken[self.points[-1].id]
        codes = [reason.code for reason in item.health.reasons]
        if item.rpo_seconds is None:
            assert "clock-went-back" in codes
        else:
            assert item.rpo_seconds > true - self.unseen - 2 * CLOCK_TOLERANCE


TestTime = Time.TestCase
TestTime.settings = settings(max_examples=10, stateful_step_count=15, deadline=None, derandomize=True)
