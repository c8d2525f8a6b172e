"""Compression of sent data: zstd at a level that fits link and cores; data that does not shrink is sent as it is."""

from __future__ import annotations

import threading
import time
from typing import Any

import attrs

from asrcore.wire.frames import ZSTD, Bytes, Frame, ProtocolError

__all__ = ["COMPRESSION", "Packer", "unpacked"]

COMPRESSION = ("zstd",)
# MB/s on one core by level (measured): -5 950, -1 707, 1 572, 3 375. A slower level pays where the link is even slower.
LEVELS = (-5, -1, 1, 3, 6, 9)
_SMALL = 512  # bytes: less is not worth compressing
_SAMPLE = 4096
_SHRINKS = 0.95
_FAST_LINK = 80e6  # bytes per second: with a faster link the cores are the bottleneck, at the other side too
_ROUND = 0.25  # seconds between two decisions

_local = threading.local()


def _compressor(level: int) -> Any:
    made = _local.__dict__.setdefault("compressors", {})
    if level not in made:
        import zstandard  # noqa: PLC0415 - only a sender of bulk data needs it

        made[level] = zstandard.ZstdCompressor(level=level, write_checksum=False)
    return made[level]


def _shrinks(data: memoryview) -> bool:
    """Whether a sample from three places of the data shrinks."""
    if len(data) <= 4 * _SAMPLE:
        return True
    middle = len(data) // 2
    sample = b"".join(data[at : at + _SAMPLE] for at in (0, middle, len(data) - _SAMPLE))
    return len(_compressor(LEVELS[0]).compress(sample)) < len(sample) * _SHRINKS


@attrs.define
class Packer:
    """For one connection. `sent` is given the time that sending took, and adapts the level. Thread-safe."""

    enabled: bool = True
    _index: int = 2  # from which either end is not far
    _busy: float = 0.0
    _waited: float = 0.0
    _bytes: int = 0
    _since: float = attrs.field(factory=time.monotonic)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, repr=False)

    @property
    def level(self) -> int:
        """Of zstd, now."""
        return LEVELS[self._index]

    def pack(self, data: Bytes) -> tuple[Bytes, int, int]:
        """Body, flags and plain size of a frame for this data."""
        view = memoryview(data)
        if not self.enabled or len(view) < _SMALL:
            return data, 0, 0
        begun = time.monotonic()
        packed = _compressor(self.level).compress(view) if _shrinks(view) else b""
        with self._lock:
            self._busy += time.monotonic() - begun
        if packed and len(packed) < len(view) * _SHRINKS:
            return packed, ZSTD, len(view)
        return data, 0, 0

    def sent(self, size: int, seconds: float) -> None:
        """That many bytes were sent, which took that long, waiting for room in the window included."""
        with self._lock:
            self._waited += seconds
            self._bytes += size
            now = time.monotonic()
            passed = now - self._since
            if passed < _ROUND:
                return
            share = self._busy / (self._busy + self._waited) if self._busy + self._waited else 0.0
            if self._bytes / passed > _FAST_LINK or share > 0.6:
                self._index = max(0, self._index - 1)
            elif share < 0.3:
                self._index = min(len(LEVELS) - 1, self._index + 1)
            self._busy = self._waited = 0.0
            self._bytes, self._since = 0, now


def unpacked(frame: Frame) -> Bytes:
    """The body as it was before `pack`. Raises ProtocolError if it is not what its frame says."""
    if not frame.flags & ZSTD:
        return frame.body
    import zstandard  # noqa: PLC0415

    decompressor = _local.__dict__.get("decompressor")
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    try:
        # The packed data also states the size, which would be allocated without a check.
        if zstandard.frame_content_size(frame.body) != frame.plain:
            raise ProtocolError("packed", "its sizes differ")
        result: bytes = decompressor.decompress(frame.body)
    except zstandard.ZstdError as problem:
        raise ProtocolError("packed", str(problem)) from problem
    if len(result) != frame.plain:
        raise ProtocolError("packed", f"{len(result)} bytes instead of {frame.plain}")
    return result
