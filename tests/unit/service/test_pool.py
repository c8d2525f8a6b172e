"""Which work may run at the same time. Work runs until the test releases it; the test advances the clock."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from asrcore.model.watch import Stopped, Watch
from asrcore.service.pool import Lanes


class Bench:
    """A pool with 8 quick and 8 slow places."""

    def __init__(self) -> None:
        self.now = 0.0
        self.gates: dict[str, threading.Event] = {}
        self.ended = threading.Semaphore(0)
        self.lanes = Lanes("test", quick=8, slow=8, ended=self.ended.release, clock=lambda: self.now)

    def start(self, key: str, site: str = "a") -> bool:
        gate = threading.Event()

        def work(watch: Watch) -> None:
            while not gate.wait(0.01):
                watch.check()

        if started := self.lanes.start(key, site, work):
            self.gates[key] = gate
        return started

    def fill(self, site: str) -> int:
        """Start work of a site until it is refused; returns the number of started works."""
        count = 0
        while self.start(f"{site}{self.now}-{count}", site):
            count += 1
        return count

    def end(self, key: str) -> None:
        self.gates[key].set()
        assert self.ended.acquire(timeout=10)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.lanes.close()


def test_one_site_leaves_a_quarter_of_the_places_to_the_others(bench: Bench) -> None:
    assert bench.fill("a") == 6
    assert bench.fill("b") == 2
    assert not bench.lanes.has_room("c")


def test_a_key_runs_once_at_a_time(bench: Bench) -> None:
    assert bench.start("web")
    assert not bench.start("web")
    bench.end("web")
    assert bench.start("web")


def test_long_work_makes_room_for_short_work(bench: Bench) -> None:
    assert bench.fill("a") == 6
    assert not bench.lanes.has_room("a")
    bench.now = 11.0
    assert bench.lanes.has_room("a")
    assert bench.fill("a") == 6  # of 12 places that one site may have at most


def test_a_site_that_hangs_leaves_room_for_the_others_for_ever(bench: Bench) -> None:
    for bench.now in (0.0, 11.0, 22.0, 33.0):
        bench.fill("hung")
    assert not bench.lanes.has_room("hung")
    for number in range(100):
        assert bench.start(f"web{number}", "well")
        bench.end(f"web{number}")


def test_the_number_of_threads_is_bounded(bench: Bench) -> None:
    started = 0
    for bench.now in (0.0, 11.0, 22.0, 33.0):
        started += bench.fill("a") + bench.fill("b")
    assert started == 16


def test_ending_lets_go_of_what_runs_and_starts_nothing_more(bench: Bench) -> None:
    seen: list[type[BaseException]] = []

    def work(watch: Watch) -> None:
        try:
            while True:
                watch.check()
        except Stopped as stopped:
            seen.append(type(stopped))
            raise

    assert bench.lanes.start("web", "a", work)
    bench.lanes.close()
    assert seen == [Stopped]
    assert not bench.start("other")


def test_a_defect_in_one_work_does_not_stop_the_others(bench: Bench) -> None:
    def broken(_: Watch) -> None:
        raise ZeroDivisionError

    assert bench.lanes.start("web", "a", broken)
    assert bench.ended.acquire(timeout=10)
    assert bench.start("web")
