"""Policies refuse invalid values; windows follow the time of day."""

from __future__ import annotations

import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.errors import InvalidValue
from asrcore.model.point import Consistency
from asrcore.model.policy import ALWAYS, DEFAULT_LADDER, MIN_INTERVAL, Bandwidth, Policy, Rung, Window
from asrcore.units import DAY, HOUR


def test_defaults_are_the_references() -> None:
    policy = Policy("gold")
    assert (policy.interval, policy.point_interval, policy.keep) == (300, 300, DAY)
    assert policy.ladder == DEFAULT_LADDER
    assert policy.consistency is Consistency.CRASH
    assert not policy.resync_window.contains(12 * HOUR), "outside office hours"


def test_five_seconds_are_accepted() -> None:
    assert Policy("fast", interval=5.0, point_interval=5.0).interval == MIN_INTERVAL


NAN, INF = math.nan, math.inf
BAD: list[tuple[str, dict[str, object]]] = [
    ("policy name", {"name": ""}),
    ("policy name", {"name": "a" * 65}),
    ("policy name", {"name": "two\nlines"}),
    ("interval", {"interval": 4.9}),
    ("interval", {"interval": -300.0}),
    ("interval", {"interval": 2 * DAY, "point_interval": 2 * DAY, "keep": 3 * DAY}),
    ("interval", {"interval": NAN}),
    ("point interval", {"point_interval": 299.0}),
    ("point interval", {"point_interval": 8 * DAY, "keep": 30 * DAY}),
    ("point interval", {"point_interval": NAN}),
    ("keep", {"keep": 299.0}),
    ("keep", {"keep": 366 * DAY}),
    ("keep", {"keep": INF}),
    ("freeze limit", {"freeze_limit": 0.5}),
    ("freeze limit", {"freeze_limit": 61.0}),
    ("resync threshold", {"resync_threshold": 0.0}),
    ("resync threshold", {"resync_threshold": 1.01}),
    ("resync threshold", {"resync_threshold": NAN}),
    ("retention ladder", {"ladder": (Rung(HOUR, HOUR), Rung(HOUR, 2 * HOUR))}),
    ("retention ladder", {"ladder": (Rung(HOUR, 2 * HOUR), Rung(DAY, HOUR))}),
    ("retention ladder", {"ladder": (Rung(-1.0, HOUR),)}),
    ("retention ladder", {"ladder": (Rung(0.0, 0.0),)}),
    ("retention ladder", {"ladder": (Rung(0.0, NAN),)}),
    ("bandwidth", {"bandwidth": (Bandwidth(1e6), Bandwidth(7999.0))}),
    ("bandwidth", {"bandwidth": (Bandwidth(NAN),)}),
    ("bandwidth", {"bandwidth": (Bandwidth(INF),)}),
    ("consistency", {"consistency": Consistency.OFFLINE}),
]


@pytest.mark.parametrize(("what", "values"), BAD, ids=[f"{what}-{i}" for i, (what, _) in enumerate(BAD)])
def test_senseless_values_are_refused(what: str, values: dict[str, object]) -> None:
    with pytest.raises(InvalidValue, match=rf"^{what}: "):
        Policy(**{"name": "p", **values})  # type: ignore[arg-type]


def test_changing_a_policy_checks_it_again() -> None:
    with pytest.raises(InvalidValue, match=r"^keep: "):
        attrs.evolve(Policy("p"), keep=1.0)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("09:00-17:00", [9, 12, 16.99], [0, 8.99, 17, 23.99]),
        ("18:30-06:00", [18.5, 23.99, 0, 5.99], [6, 12, 18.49]),
        ("00:00-00:00", [0, 12, 23.99], []),
        ("always", [0, 12, 23.99], []),
    ],
)
def test_window(text: str, inside: list[float], outside: list[float]) -> None:
    window = Window.parse(text)
    assert all(window.contains(hour * HOUR) for hour in inside)
    assert not any(window.contains(hour * HOUR) for hour in outside)


@pytest.mark.parametrize("text", ["", "18:30", "18-06", "24:00-06:00", "18:60-06:00", "a:b-c:d", "1:2-3:4-5:6", "-"])
def test_malformed_windows_are_refused(text: str) -> None:
    with pytest.raises(InvalidValue, match=r"^window: "):
        Window.parse(text)


minutes = st.integers(0, 24 * 60 - 1).map(lambda minute: minute * 60.0)


@given(minutes, minutes)
def test_window_is_written_as_it_is_read(start: float, end: float) -> None:
    window = Window(start, end)
    again = Window.parse(str(window))
    assert again == window or start == end
    assert str(ALWAYS) == "always"


@given(minutes, minutes, st.floats(0, DAY, exclude_max=True))
def test_every_second_is_in_a_window_or_in_its_complement(start: float, end: float, second: float) -> None:
    if start != end:
        assert Window(start, end).contains(second) is not Window(end, start).contains(second)


def test_bandwidth_is_read_and_shown() -> None:
    rule = Bandwidth.parse("20Mbit@08:00-18:00")
    assert rule == Bandwidth(2.5e6, Window(8 * HOUR, 18 * HOUR))
    assert str(rule) == "20 Mbit/s 08:00-18:00"
    assert Bandwidth.parse("1Gbit") == Bandwidth.parse("1Gbit@always") == Bandwidth(125e6)


@pytest.mark.parametrize("text", ["", "20", "20Mbit@", "20Mbit@8-18", "@08:00-18:00", "20Mbit@08:00-18:00@x"])
def test_bad_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(InvalidValue):
        Bandwidth.parse(text)
