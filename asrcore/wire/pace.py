"""How much of a stream may be under way: just enough to keep the link busy, because a cut loses it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import attrs

from asrcore.units import KiB, MiB

__all__ = ["FLOOR", "FRAME", "Pace"]

FLOOR = 512 * KiB
FRAME = 64 * KiB
"""A frame has at least this many bytes of data, if there are that many."""
_MOST_FRAME = 1 * MiB
_FRAMES = 8  # on their way together, or more
_START = 1 * MiB
_ROUND = 0.25  # seconds between two decisions
_ENOUGH = 0.2  # seconds of what the link carries: enough for a round trip and a stall of the other side


@attrs.define
class Pace:
    """Of one stream, whose acknowledgements come in order. Not thread-safe. `most`: bytes, never more than that."""

    most: int
    limit: int = attrs.field(init=False)
    """Bytes that may be under way now."""
    _clock: Callable[[], float] = time.monotonic
    _flying: deque[tuple[float, int]] = attrs.field(factory=deque, init=False)
    _bytes: int = attrs.field(default=0, init=False)
    _arrived: int = attrs.field(default=0, init=False)
    _since: float = attrs.field(init=False)
    _quickest: float = attrs.field(default=float("inf"), init=False)

    def __attrs_post_init__(self) -> None:
        self.limit = min(_START, self.most)
        self._since = self._clock()

    def allows(self, size: int) -> bool:
        """Whether that many bytes may be sent now; a single frame always may."""
        return not self._flying or self._bytes + size <= self.limit

    @property
    def frame(self) -> int:
        """The best size of a frame in bytes, a power of two: on average half a frame is lost with its connection."""
        return min(max(FRAME, 1 << (self.limit // _FRAMES | 1).bit_length() - 1), _MOST_FRAME)

    def sent(self, size: int) -> None:
        """A frame is under way."""
        self._flying.append((self._clock(), size))
        self._bytes += size

    def acknowledged(self, count: int) -> None:
        """That many frames have arrived."""
        now = self._clock()
        for _ in range(min(count, len(self._flying))):
            at, size = self._flying.popleft()
            self._bytes -= size
            self._arrived += size
            self._quickest = min(self._quickest, now - at)  # later ones wait behind others and measure that wait, too
        passed = now - self._since
        if passed >= _ROUND:
            useful = self._arrived / passed * max(_ENOUGH, 2 * self._quickest)
            self.limit = max(min(FLOOR, self.most), min(int(useful), self.most))
            self._arrived, self._since = 0, now
