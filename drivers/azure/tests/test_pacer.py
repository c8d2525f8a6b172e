"""The pacer, with a simulated clock."""

from __future__ import annotations

from asr_driver_azure.cloud.pacer import Pacer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def pacer(clock: Clock, *, requests: float = 10, parallel: int = 8) -> Pacer:
    return Pacer(requests, parallel, clock=lambda: clock.now, sleep=clock.sleep)


def ask(paced: Pacer, times: int = 1) -> None:
    for _ in range(times):
        with paced.request():
            pass
        paced.well()


def test_requests_keep_their_distance() -> None:
    clock = Clock()
    ask(pacer(clock), 21)
    assert clock.now - 100 >= 2.0 - 1e-9


def test_a_busy_service_is_left_alone_and_asked_less() -> None:
    clock = Clock()
    paced = pacer(clock)
    ask(paced)
    paced.busy(7)
    assert paced.parallel == 4
    ask(paced)
    assert clock.now - 100 >= 7
    for _ in range(5):
        paced.busy(0.1)
    assert (paced.parallel, paced.delays) == (1, 6)


def test_it_recovers() -> None:
    clock = Clock()
    paced = pacer(clock)
    paced.busy(0.1)
    ask(paced, 500)
    assert paced.parallel == 8
