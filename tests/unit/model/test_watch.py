"""Progress and cancellation."""

from __future__ import annotations

import threading

import pytest

from asrcore.errors import Cancelled
from asrcore.model.watch import Stopped, Watch


def test_progress_is_reported() -> None:
    reported: list[tuple[str, int, int]] = []
    watch = Watch(lambda work, done, total: reported.append((work, done, total)))
    watch.start("copy", 100)
    watch.advance(40)
    watch.advance(60)
    watch.start("check", 5)
    assert reported == [("copy", 0, 100), ("copy", 40, 100), ("copy", 100, 100), ("check", 0, 5)]


def test_cancelled_work_ends_at_its_next_step_and_counts_nothing() -> None:
    watch = Watch()
    watch.start("copy", 100)
    watch.advance(10)
    watch.cancel()
    with pytest.raises(Cancelled, match="copy was cancelled"):
        watch.advance(10)
    with pytest.raises(Cancelled):
        watch.check()
    assert watch.done == 10


def test_cancelled_before_it_began() -> None:
    watch = Watch()
    watch.cancel()
    with pytest.raises(Cancelled, match="the work was cancelled"):
        watch.check()


def test_an_engine_that_ends_is_no_failure_of_the_work() -> None:
    watch = Watch()
    watch.cancel()
    watch.stop()
    with pytest.raises(Stopped) as raised:  # also if it was cancelled: the next start handles that
        watch.advance(10)
    assert not isinstance(raised.value, Exception), "code that undoes failed work must not catch it"


def test_threads_add_up() -> None:
    watch = Watch()
    watch.start("copy", 40_000)

    def work() -> None:
        for _ in range(10_000):
            watch.advance(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watch.done == 40_000
