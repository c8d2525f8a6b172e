"""A simulated link: the pace keeps it busy, and little is in flight when it is cut."""

from __future__ import annotations

import pytest

from asrcore.units import MiB
from asrcore.wire import pace as pacing
from asrcore.wire.pace import FLOOR, Pace

FRAME = 256 * 1024
WINDOW = 8 * MiB


def simulated(rate: float, round_trip: float, seconds: float = 20.0) -> tuple[float, int]:
    """A sender that always has more data: bytes per second that arrive in the second half, and bytes in flight at its
    end. `rate` of the link in bytes per second, `round_trip` in seconds."""
    now = 0.0
    pace = Pace(WINDOW, lambda: now)
    free_at, answers, arrived, under_way = 0.0, list[float](), 0, 0
    while now < seconds:
        if pace.allows(FRAME):
            pace.sent(FRAME)
            under_way += FRAME
            free_at = max(free_at, now) + FRAME / rate
            answers.append(free_at + round_trip)
            continue
        now = answers.pop(0)
        pace.acknowledged(1)
        under_way -= FRAME
        arrived += FRAME if now > seconds / 2 else 0
    return arrived / (seconds / 2), under_way


@pytest.mark.parametrize("round_trip", [0.001, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("rate", [1.25e6, 12.5e6, 125e6], ids=["10 Mbit", "100 Mbit", "1 Gbit"])
def test_the_link_is_busy_and_little_is_under_way(rate: float, round_trip: float) -> None:
    got, under_way = simulated(rate, round_trip)
    assert got > 0.85 * min(rate, WINDOW / (round_trip + FRAME / rate))
    assert under_way <= max(FLOOR, rate * max(0.21, 2.1 * (round_trip + FRAME / rate))) + FRAME


def test_frames_are_small_on_a_slow_link() -> None:
    """A cut loses half of one, on average, on each connection."""
    pace = Pace(WINDOW)
    sizes = []
    for limit in (FLOOR, MiB, 2 * MiB + 1, WINDOW):
        pace.limit = limit
        sizes.append(pace.frame)
    assert sizes == [pacing.FRAME, 2 * pacing.FRAME, 4 * pacing.FRAME, MiB]


def test_a_frame_may_always_be_under_way() -> None:
    pace = Pace(1000)
    assert pace.allows(10**6)
    pace.sent(10**6)
    assert not pace.allows(1)
    pace.acknowledged(1)
    assert pace.allows(1)
