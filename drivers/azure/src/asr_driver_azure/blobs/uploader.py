"""Writes gathered into large puts, several of them on their way at once.

A disk is cut into windows of 4 MiB, the largest put. What is written into a window is gathered until the window is
full, until others need its room, or until `drain`; each run of bytes in it is then one put. Puts of one window follow
each other, so that the later write counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import attrs

from asr_driver_azure.blobs.pageblob import MOST
from asr_driver_azure.blobs.ranges import RangeSet

__all__ = ["Uploader"]

_OPEN = 4
"""Windows filled at the same time: the engine's threads send neighbouring pieces."""

_Key = tuple[str, int]


@attrs.define
class _Window:
    data: bytearray
    filled: RangeSet = attrs.field(factory=RangeSet)


class Uploader:
    """`put(disk, offset, data)` is called in `parallel` threads. Memory: parallel + 4 windows."""

    def __init__(self, put: Callable[[str, int, memoryview], None], parallel: int) -> None:
        self._put = put
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="azure-put")
        self._most = parallel + _OPEN
        self._changed = threading.Condition()
        self._open: dict[_Key, _Window] = {}
        self._going: dict[int, _Key] = {}  # closed and not arrived, by number; one may wait for another of its key
        self._busy: set[_Key] = set()
        self._sent = 0
        self._spare: list[bytearray] = []
        self._error: BaseException | None = None

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        """Take over a copy of `data`. Raises what an earlier put raised."""
        at = 0
        while at < len(data):
            number, start = divmod(offset + at, MOST)
            length = min(len(data) - at, MOST - start)
            with self._changed:
                window = self._window((disk, number))
                window.data[start : start + length] = data[at : at + length]
                window.filled.add(start, start + length)
                if window.filled.within(0, MOST)[0].length == MOST:
                    self._send((disk, number))
            at += length

    def forget(self, disk: str, start: int, end: int) -> None:
        """Gathered data of this range is not sent; puts in flight have arrived when this returns."""
        with self._changed:
            for key in [key for key in self._open if _meets(key, disk, start, end)]:
                base = key[1] * MOST
                self._open[key].filled.remove(max(start - base, 0), min(end - base, MOST))
                if not self._open[key].filled:
                    self._spare.append(self._open.pop(key).data)
            while any(_meets(key, disk, start, end) for key in self._going.values()):
                self._changed.wait()
            self._check()

    def drain(self) -> None:
        """Send all; return when it has arrived. Does not wait for concurrent writes. Raises what a put raised."""
        with self._changed:
            for key in list(self._open):
                self._send(key)
            last = self._sent
            while any(number <= last for number in self._going):
                self._changed.wait()
            self._check()

    def close(self) -> None:
        """Send nothing more. Puts in flight arrive."""
        with self._changed:
            self._open.clear()
        self._pool.shutdown(wait=True)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _window(self, key: _Key) -> _Window:
        """The window that gathers for the key; waits for room. The lock is held."""
        self._check()
        while key not in self._open:
            if len(self._open) >= _OPEN:
                self._send(next(iter(self._open)))
            elif len(self._open) + len(self._going) >= self._most:
                self._changed.wait()
            else:
                self._open[key] = _Window(self._spare.pop() if self._spare else bytearray(MOST))
            self._check()
        return self._open[key]

    def _send(self, key: _Key) -> None:
        window = self._open.pop(key, None)
        if window is None:
            return  # another thread sent it while this one waited
        self._sent = number = self._sent + 1
        self._going[number] = key
        while key in self._busy:
            self._changed.wait()
        self._busy.add(key)
        self._pool.submit(self._arrive, number, key, window)

    def _arrive(self, number: int, key: _Key, window: _Window) -> None:
        try:
            for run in window.filled.extents():
                if self._error is not None:
                    break
                self._put(key[0], key[1] * MOST + run.offset, memoryview(window.data)[run.offset : run.end])
        except BaseException as error:  # noqa: BLE001 - it is raised by whoever writes or drains next
            self._error = self._error or error
        with self._changed:
            self._busy.discard(key)
            del self._going[number]
            self._spare.append(window.data)
            self._changed.notify_all()


def _meets(key: _Key, disk: str, start: int, end: int) -> bool:
    return key[0] == disk and key[1] * MOST < end and start < (key[1] + 1) * MOST
