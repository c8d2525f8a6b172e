"""Gathered writes, while several threads write, drain and discard."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from asr_driver_azure.blobs.pageblob import MOST
from asr_driver_azure.blobs.uploader import Uploader

SECONDS = 60.0


class Line:
    """The destination of puts: each waits until it is released."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._through: Counter[str] = Counter()
        self.begun = 0
        self.arrived: list[tuple[int, bytes]] = []

    def put(self, disk: str, offset: int, data: memoryview) -> None:
        """Put pages as to a blob; `arrived` has the first byte of each."""
        with self._changed:
            self.begun += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._through[disk] > 0, SECONDS)
            self._through[disk] -= 1
            self.arrived.append((offset, bytes(data[:1])))
            self._changed.notify_all()

    def let(self, count: int, disk: str = "a") -> None:
        """Release this many more puts of a disk."""
        with self._changed:
            self._through[disk] += count
            self._changed.notify_all()

    def wait(self, true: Callable[[], bool]) -> None:
        """Wait until a condition is true."""
        with self._changed:
            assert self._changed.wait_for(true, SECONDS)


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def uploader(line: Line) -> Iterator[Uploader]:
    made = Uploader(line.put, 4)
    yield made
    line.let(1000)
    line.let(1000, "b")
    made.close()


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def window(letter: bytes) -> memoryview:
    return memoryview(letter * MOST)


def queued(uploader: Uploader, line: Line, beside: ThreadPoolExecutor) -> Future[None]:
    """Two puts of one window: the second, of a write that has not returned, waits for the first."""
    uploader.write("a", 0, window(b"1"))
    line.wait(lambda: line.begun == 1)
    uploader.write("a", 0, window(b"2")[: MOST // 2])  # gathered: this much has been accepted
    rest = beside.submit(uploader.write, "a", MOST // 2, window(b"2")[: MOST // 2])
    while uploader._sent < 2:
        assert not rest.done()
    return rest


def test_drain_waits_for_a_put_that_waits_for_another(
    uploader: Uploader, line: Line, beside: ThreadPoolExecutor
) -> None:
    queued(uploader, line, beside)
    drained = beside.submit(uploader.drain)
    line.let(1)
    line.wait(lambda: line.begun == 2)
    assert not drained.done()
    line.let(1)
    drained.result(SECONDS)
    assert line.arrived == [(0, b"1"), (0, b"2")]


def test_what_is_forgotten_does_not_arrive_later(uploader: Uploader, line: Line, beside: ThreadPoolExecutor) -> None:
    """Otherwise a put could undo the next clear."""
    queued(uploader, line, beside)
    forgotten = beside.submit(uploader.forget, "a", 0, MOST)
    line.let(1)
    line.wait(lambda: line.begun == 2)
    assert not forgotten.done()
    line.let(1)
    forgotten.result(SECONDS)
    assert len(line.arrived) == 2


def test_drain_does_not_wait_for_what_others_write(uploader: Uploader, line: Line, beside: ThreadPoolExecutor) -> None:
    uploader.write("a", 0, window(b"1"))
    line.wait(lambda: line.begun == 1)
    drained = beside.submit(uploader.drain)
    while not getattr(uploader._changed, "_waiters"):  # noqa: B009 - it waits from here on
        assert not drained.done()
    uploader.write("b", 0, window(b"2"))
    line.wait(lambda: line.begun == 2)
    assert not drained.done()
    line.let(1)
    drained.result(SECONDS)
    assert line.arrived == [(0, b"1")]
