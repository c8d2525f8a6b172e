"""The limit holds, follows the time of day, and never keeps a cancelled copy waiting. Time passes only in waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.errors import Cancelled
from asrcore.model.policy import Bandwidth, Window
from asrcore.model.watch import Stopped, Watch
from asrcore.replication.cycle import run_cycle
from asrcore.replication.throttle import BURST, Throttle, limit
from asrcore.units import HOUR, KiB, MiB
from tests.unit.rig import Rig

MBIT = 125_000.0


class Time(Watch):
    """A watch whose waits advance the clock, some of them by more than requested."""

    def __init__(self, start: float = 0.0, late: float = 0.0) -> None:
        super().__init__()
        self.now = start
        self.late = late
        self.waits: list[float] = []

    def wait(self, seconds: float) -> None:
        self.check()
        assert seconds > 0
        self.waits.append(seconds)
        self.now += seconds + self.late

    def throttle(self, *rules: Bandwidth) -> Throttle:
        made = Throttle(lambda: self.now, lambda: self.now)
        made.rules = rules
        return made


@given(
    rate=st.floats(64_000 / 8, 1e9),
    pieces=st.lists(st.integers(1, 4 * MiB), min_size=1, max_size=50),
    late=st.floats(0, BURST / 2),
)
def test_what_is_sent_is_what_the_rate_allows(rate: float, pieces: list[int], late: float) -> None:
    time = Time(late=late)
    throttle = time.throttle(Bandwidth(rate))
    sent = 0
    for piece in pieces:
        throttle.take(piece, time)
        allowed = rate * time.now
        assert sent <= allowed + BURST * rate + 1, "more than the rate"
        assert sent >= allowed - max(pieces) - (late + BURST) * rate - 1, "less than the rate"
        sent += piece


def test_a_minute_in_pieces_holds_within_five_percent() -> None:
    time = Time(late=0.001)
    throttle = time.throttle(Bandwidth(20 * MBIT))
    sent = 0
    while time.now < 60:
        throttle.take(512 * KiB, time)
        sent += 512 * KiB
    assert sent == pytest.approx(60 * 20 * MBIT, rel=0.05)


def test_time_without_traffic_is_not_saved_up() -> None:
    time = Time()
    throttle = time.throttle(Bandwidth(20 * MBIT))
    throttle.take(1, time)
    time.now += 1e6
    throttle.take(int(BURST * 20 * MBIT) + int(20 * MBIT), time)
    before = time.now
    throttle.take(1, time)
    assert time.now - before == pytest.approx(1.0)


def test_without_rules_nobody_waits() -> None:
    time = Time()
    throttle = time.throttle()
    for _ in range(1000):
        throttle.take(4 * MiB, time)
    assert time.waits == []


def at(hour: float) -> float:
    return datetime(2026, 11, 23, tzinfo=UTC).timestamp() + hour * HOUR


def test_the_lowest_rule_that_is_open_holds() -> None:
    rules = (Bandwidth.parse("20Mbit@08:00-18:00"), Bandwidth.parse("5Mbit@12:00-13:00"), Bandwidth.parse("50Mbit"))
    limits = {hour: limit(rules, at(hour), UTC) for hour in (7.99, 8.0, 12.0, 13.0, 18.0)}
    assert limits == {7.99: 50 * MBIT, 8.0: 20 * MBIT, 12.0: 5 * MBIT, 13.0: 20 * MBIT, 18.0: 50 * MBIT}
    assert limit(rules[:2], at(3), UTC) is None


def test_a_window_that_ends_ends_the_wait() -> None:
    """A large debt at a low rate would last for hours; the window closes in the middle of it."""
    start = datetime(2026, 11, 23, 17, 59, 59).timestamp()  # noqa: DTZ001 - windows are local time
    time = Time(start)
    throttle = time.throttle(Bandwidth(8000.0, Window(8 * HOUR, 18 * HOUR)))
    for _ in range(10):
        throttle.take(4 * MiB, time)
    assert 0.5 < time.now - start < 2.0


def test_a_rule_that_is_changed_holds_at_once() -> None:
    time = Time()
    throttle = time.throttle(Bandwidth(8000.0))
    throttle.take(4 * MiB, time)

    def relieve(seconds: float) -> None:
        time.now += seconds
        throttle.rules = ()

    time.wait = relieve  # type: ignore[method-assign]
    throttle.take(4 * MiB, time)
    assert time.now < 1.0


@pytest.mark.parametrize(("end", "error"), [(Watch.cancel, Cancelled), (Watch.stop, Stopped)], ids=["cancel", "stop"])
def test_who_waits_is_reached_at_once(end: Callable[[Watch], None], error: type[BaseException]) -> None:
    watch, raised = Watch(), threading.Event()

    def wait() -> None:
        with pytest.raises(error):
            watch.wait(3600)
        raised.set()

    threading.Thread(target=wait, daemon=True).start()
    end(watch)
    assert raised.wait(10)
    throttle = Throttle()
    throttle.rules = (Bandwidth(8000.0),)
    throttle.take(8000 * 3600, watch)  # an hour's debt
    with pytest.raises(error):
        throttle.take(1, watch)


def test_all_machines_of_a_policy_share_one_limit_and_cycles_send_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    rig.protect()
    vault, context = rig.engine.vault, rig.engine.context
    policy = attrs.evolve(vault.policy("gold"), bandwidth=(Bandwidth(1e9),))
    vault.update_policy(policy)
    throttle = context.throttle(policy)
    assert context.throttle(policy) is throttle
    assert context.throttle(attrs.evolve(policy, name="other")) is not throttle
    taken: list[int] = []
    monkeypatch.setattr(throttle, "take", lambda size, watch: taken.append(size))
    rig.machine.write("vda", 0, b"x" * 64 * KiB + bytes(64 * KiB) + b"y" * 4096)
    result = run_cycle(context, rig.protection.id, Watch())
    assert throttle.rules == policy.bandwidth
    assert sum(taken) == result.counts.sent == 68 * KiB
    rig.engine.close()
