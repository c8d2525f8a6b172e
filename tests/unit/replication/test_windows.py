"""Windows in local time, on days of 23, 24 and 25 hours."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.model.policy import ALWAYS, Window
from asrcore.replication.windows import is_open, opens_at
from asrcore.units import DAY

PARIS = ZoneInfo("Europe/Paris")
NIGHT = Window.parse("18:30-06:00")


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=PARIS).timestamp()


@pytest.mark.parametrize(
    ("now", "opening"),
    [
        ("2026-11-23T18:30", "2026-11-23T18:30"),
        ("2026-11-23T23:59", "2026-11-23T23:59"),
        ("2026-11-23T05:59", "2026-11-23T05:59"),
        ("2026-11-23T06:00", "2026-11-23T18:30"),
        ("2026-11-23T12:00", "2026-11-23T18:30"),
        ("2026-03-29T12:00", "2026-03-29T18:30"),  # 23 hours
        ("2026-10-25T12:00", "2026-10-25T18:30"),  # 25 hours
    ],
)
def test_night_window(now: str, opening: str) -> None:
    assert is_open(NIGHT, at(now), PARIS) is (now == opening)
    assert opens_at(NIGHT, at(now), PARIS) == at(opening)


def test_window_that_is_over_for_today_opens_tomorrow() -> None:
    window = Window.parse("01:00-02:00")
    assert opens_at(window, at("2026-11-23T12:00"), PARIS) == at("2026-11-24T01:00")


def test_opening_that_the_clock_jumps_over_comes_with_the_jump() -> None:
    window = Window.parse("02:30-04:00")  # 02:00 to 03:00 is missing on this day
    opening = opens_at(window, at("2026-03-29T01:00"), PARIS)
    assert is_open(window, opening, PARIS)
    assert opening == at("2026-03-29T03:30")


def test_without_a_zone_it_is_the_hosts() -> None:
    now = at("2026-11-23T12:00")
    host = datetime.fromtimestamp(now, UTC).astimezone().utcoffset()
    assert host is not None
    assert opens_at(NIGHT, now) == opens_at(NIGHT, now, timezone(host))


def test_always_is_open_now() -> None:
    assert opens_at(ALWAYS, 5.0, UTC) == 5.0


@given(st.floats(0, 4e9), st.floats(0, DAY - 1), st.floats(0, DAY - 1), st.integers(-14, 14))
def test_next_opening_is_at_most_a_day_ahead_and_open(now: float, start: float, end: float, offset: int) -> None:
    zone, window = timezone(timedelta(hours=offset)), Window(start // 60 * 60, end // 60 * 60)
    opening = opens_at(window, now, zone)
    assert now <= opening <= now + DAY
    assert is_open(window, opening, zone)
