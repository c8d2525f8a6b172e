"""Changed blocks of one disk, as the kernel notes them in a pinned array.

The array, in pages: one byte for each granule, set by the tracking program; one for each coarse granule; the program's
counters; then what only this service writes: one byte of *age* for each granule, and a control page.

Changes are taken in turns, numbered 1, 2, 3, ... A turn's number is a mark: notes are cleared, and the granule's age
becomes that of the turn. So what changed since mark m is what is noted now, and what was taken in a turn after m. It is
reported on each request, until `keep` says that a mark and all before it are no longer needed. The array belongs to the
kernel: it outlives this process, not the kernel. A new array has another generation, and marks of an earlier one are
not known.

What is noted is checked: the kernel counts the sectors written to each disk, and so does the program. As long as the
difference between the two stays what it was when tracking began, nothing was missed.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from asr_mobility import bpf
from asr_mobility.bpf import COARSE, ELSEWHERE, EVENTS, OVERFLOW, PAGE, SECTORS

__all__ = ["PIN_ROOT", "Layout", "Run", "Tracker", "granule_shift", "joined", "map_bytes", "remove_pins", "tag"]

BPFFS = "/sys/fs/bpf"
PIN_ROOT = BPFFS + "/asr"
_MAGIC = b"asrtrk02"
_CONTROL = struct.Struct("<8sIIQ16s16sQQq")
_FIELDS = ("magic", "shift", "", "size", "identity", "generation", "base", "last", "unseen")
_UNKNOWN = -(1 << 62)
"""As `unseen`: the disk was never quiet enough to find it."""
_CHECKS, _CHECK_SECONDS = 5, 0.01
_LOOKS = 400
"""Readings of both counters before a disk counts as too busy to compare them: about 20 ms."""
_AGES = 254
"""Ages that a byte can represent; older turns are counted as younger than they are, which sends more than needed."""
_WINDOW = 16 * PAGE
"""The array is read in pieces: a copy of all of it would double the memory."""
_NOTHING = bytes(_WINDOW)
_MOST_GRANULES = 64 << 20
MOST_RUNS = 50_000
"""An answer may have 4 MiB of them, and a server several disks."""

Run = tuple[int, int]
"""First granule and how many."""


def tag(turn: int) -> int:
    """The byte that stands for a turn: never 0."""
    return 1 + turn % _AGES


def granule_shift(size: int) -> int:
    """Granules of 4 KiB to 64 GiB, of 16 KiB to 1 TiB, of 64 KiB to 4 TiB and so on. Memory is two bytes for each, 128
    MiB at most; with random writes of 4 KiB 1, 4 and 16 times the changed data is sent, with usual ones 1, 1.3 and 1.8
    times."""
    shift = 12 if size <= 64 << 30 else 14
    while size > _MOST_GRANULES << shift:
        shift += 2
    return shift


def map_bytes(size: int) -> int:
    """Memory for tracking a disk of that size."""
    return Layout(size, granule_shift(size)).pages * PAGE


class Layout:
    """Where the parts of the array are, in bytes but for the `*_page`."""

    def __init__(self, size: int, shift: int) -> None:
        self.granules = -(-size // (1 << shift))
        fine = -(-self.granules // PAGE)
        self.coarse_granules = -(-self.granules >> COARSE)
        coarse = -(-self.coarse_granules // PAGE)
        self.coarse_page, self.counters_page = fine, fine + coarse
        self.coarse, self.counters = self.coarse_page * PAGE, self.counters_page * PAGE
        self.ages = self.counters + PAGE
        self.control = self.ages + fine * PAGE
        self.pages = self.control // PAGE + 1


_NOTED = re.compile(rb"[^\0]+")


def joined(runs: Iterable[Run], most: int = MOST_RUNS) -> list[Run]:
    """Joins adjacent runs. Where there are too many for memory or an answer, runs are joined across the gaps between
    them."""
    made: list[Run] = []
    shift = 0

    def add(start: int, end: int) -> None:
        if made and start <= made[-1][0] + made[-1][1]:
            start = made.pop()[0]
        made.append((start, end - start))

    for first, count in runs:
        add(first >> shift, -(-(first + count) >> shift))
        while len(made) > most:
            shift += 1
            finer, made = made, []
            for start, length in finer:
                add(start >> 1, (start + length + 1) >> 1)
    return [(start << shift, length << shift) for start, length in made]


class Tracker:
    """Tracking of one disk; it continues when this process ends. `fresh`: it began just now, nothing before is known.

    `identity` is 16 bytes that distinguish this disk from another in its place.
    """

    def __init__(self, path: str, size: int, identity: bytes, shift: int = 0) -> None:
        """Resume the tracking of this disk, or begin it. Raises OSError where the kernel cannot."""
        self.path, self.size = path, size
        self.shift = shift or granule_shift(size)
        number = os.stat(path).st_rdev
        self._device = os.major(number), os.minor(number)
        self._sysfs = "/sys/dev/block/{}:{}".format(*self._device)
        self._layout = Layout(size, self.shift)
        name = "{}_{}".format(*self._device)  # a name in bpffs has no dots
        self._pins = os.path.join(PIN_ROOT, name + "_link"), os.path.join(PIN_ROOT, name + "_map")
        if not os.path.ismount(BPFFS):
            bpf.mount("bpf", BPFFS)
        Path(PIN_ROOT).mkdir(mode=0o700, exist_ok=True)
        self._held = -1
        self.fresh = not self._take_up(identity)
        if self.fresh:
            self._begin(identity)
        # Of a `keep` that was killed half way.
        self._forget(self.base)
        self.reset = ""
        """Why this process has given the tracking a new generation."""

    def _take_up(self, identity: bytes) -> bool:
        link, array = self._pins
        try:
            os.close(bpf.get_pinned(link))
            descriptor = bpf.get_pinned(array)
        except OSError:
            return False
        try:
            self._map = mmap.mmap(descriptor, self._layout.pages * PAGE)
        except (OSError, ValueError):
            return False  # of a disk of another size
        finally:
            os.close(descriptor)
        magic, shift, _, size, whose, *_ = _CONTROL.unpack_from(self._map, self._layout.control)
        if (magic, shift, size, whose) == (_MAGIC, self.shift, self.size, identity):
            return True
        self._map.close()
        return False

    def _begin(self, identity: bytes) -> None:
        remove_pins(*self._pins)
        layout = self._layout
        array = bpf.create_array(layout.pages)
        try:
            self._map = mmap.mmap(array, layout.pages * PAGE)
            control = (_MAGIC, self.shift, 0, self.size, identity, os.urandom(16), 0, 0, _UNKNOWN)
            _CONTROL.pack_into(self._map, layout.control, *control)
            self._held, pinnable = self._attach(array)
            self._set(unseen=self._difference())
            if pinnable:
                bpf.pin(self._held, self._pins[0])
                bpf.pin(array, self._pins[1])
                os.close(self._held)
                self._held = -1
        finally:
            os.close(array)

    def _attach(self, array: int) -> tuple[int, bool]:
        # Devices without request queues (device mapper, brd) report the completion of bios only.
        has_queue = Path(self._sysfs, "mq").is_dir()
        points: list[bpf.TracePoint | bpf.Request] = []
        typed = bpf.request() if has_queue else None
        if typed is not None:
            points.append(typed)
        points.append(bpf.trace_point("block_rq_complete" if has_queue else "block_bio_complete"))
        places = (0, self._layout.coarse_page, self._layout.counters_page)
        device = self._device[0] << 20 | self._device[1]
        while True:
            point = points.pop(0)
            program = bpf.tracking_program(array, device, self.shift, places, point)
            try:
                return bpf.attach(program, point)
            except OSError:  # a kernel that describes its types, and does not let programs use them
                if not points:
                    raise

    # -- control

    def _field(self, index: int) -> int:
        return int(_CONTROL.unpack_from(self._map, self._layout.control)[index])

    def _set(self, **fields: object) -> None:
        values = list(_CONTROL.unpack_from(self._map, self._layout.control))
        for name, value in fields.items():
            values[_FIELDS.index(name)] = value
        _CONTROL.pack_into(self._map, self._layout.control, *values)

    @property
    def generation(self) -> str:
        """Differs whenever something may have been missed since the one before."""
        generation: bytes = _CONTROL.unpack_from(self._map, self._layout.control)[5]
        return generation.hex()

    @property
    def base(self) -> int:
        """The oldest mark that is known."""
        return self._field(6)

    @property
    def last(self) -> int:
        """The newest mark."""
        return self._field(7)

    @property
    def counters(self) -> tuple[int, ...]:
        """Events, sectors, elsewhere, overflow: see `bpf`."""
        return struct.unpack_from("<4Q", self._map, self._layout.counters)

    def knows(self, generation: str, mark: int) -> bool:
        """Whether `changed_since(mark)` is complete."""
        self.check()
        return generation == self.generation and self.base <= mark <= self.last

    def check(self) -> bool:
        """Whether all that was written so far is noted; otherwise no mark made so far is known any more.

        A disk that is too busy, or whose I/O statistics are switched off, counts as noted until it can be checked.
        """
        expected = self._field(8)
        for _ in range(_CHECKS):  # a processor that was stopped by its host has noted a request and not yet counted it
            unseen = self._difference()
            missed = 0 if _UNKNOWN in (unseen, expected) else unseen - expected
            if not missed:
                break
            time.sleep(_CHECK_SECONDS)
        if missed or self.counters[OVERFLOW]:
            self.reset = "a request was too large to be noted"
            if missed:
                self.reset = f"{missed} sectors were written and not noted"
            # The new generation first: after a kill in between, nothing counts as known.
            self._set(generation=os.urandom(16), base=self.last, unseen=unseen)
            struct.pack_into("<Q", self._map, self._layout.counters + 8 * OVERFLOW, 0)
            return False
        if expected == _UNKNOWN != unseen:
            self._set(unseen=unseen)
        return True

    def _difference(self) -> int:
        """Sectors written by the kernel's count minus the noted ones. A value counts if it is found twice while nothing
        is completed between the readings: a request is noted shortly before it is counted."""
        if Path(self._sysfs, "queue/iostats").read_bytes().strip() == b"0":
            return _UNKNOWN
        found = _UNKNOWN
        statistics = os.open(self._sysfs + "/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for _ in range(_LOOKS):
                before, noted = _written(statistics), self.counters[SECTORS]
                if _written(statistics) == before:
                    if before - noted == found:
                        return found
                    found = before - noted
        finally:
            os.close(statistics)
        return _UNKNOWN

    # -- turns

    def begin_turn(self) -> int:
        """A new mark; what is taken from now on belongs to it."""
        turn = self.last + 1
        old, next_one = bytes([tag(turn)]), bytes([tag(turn + 1)])
        for at, ages in self._ages():
            if old in ages:  # of the turn that is 254 turns older: counted with the next one
                self._map[at : at + len(ages)] = ages.replace(old, next_one)
        self._set(last=turn)
        return turn

    def take(self) -> list[Run]:
        """Clear the notes and give their granules the age of the newest turn. Read the granules only after this: what
        is written from now on is noted again."""
        return joined(self._take())

    def _take(self) -> Iterator[Run]:
        layout, value = self._layout, bytes([tag(self.last)])
        for at, notes in self._noted(layout.coarse, layout.coarse_granules):
            for match in _NOTED.finditer(notes):
                first, count = at - layout.coarse + match.start(), match.end() - match.start()
                start, end = first << COARSE, min(first + count << COARSE, layout.granules)
                # The fine notes before the coarse one goes: killed in between, it is in both.
                self._map[start:end] = b"\x01" * (end - start)
                self._map[layout.coarse + first : layout.coarse + first + count] = bytes(count)
        for at, notes in self._noted(0, layout.granules):
            for match in _NOTED.finditer(notes):
                first, count = at + match.start(), match.end() - match.start()
                # Age before the note goes: killed in between, it is in both.
                self._map[layout.ages + first : layout.ages + first + count] = value * count
                self._map[first : first + count] = bytes(count)
                yield first, count

    def changed_since(self, mark: int) -> list[Run]:
        """What was taken in turns after `mark`; what is noted and not yet taken is not in it."""
        last = self.last
        if last == mark:
            return []
        tags = bytes(tag(turn) for turn in range(mark + 1, last + 1)) if last - mark < _AGES else b""
        reported = re.compile(b"[" + re.escape(tags) + b"]+") if tags else _NOTED
        return joined(
            (at - self._layout.ages + match.start(), match.end() - match.start())
            for at, ages in self._ages()
            for match in reported.finditer(ages)
        )

    def pending(self) -> int:
        """Granules that are noted and not yet taken, coarse ones in full."""
        layout = self._layout
        fine = sum(notes.count(b"\x01") for _, notes in self._noted(0, layout.granules))
        coarse = sum(notes.count(b"\x01") for _, notes in self._noted(layout.coarse, layout.coarse_granules))
        return fine + (coarse << COARSE)

    def keep(self, mark: int) -> None:
        """What was taken in turns up to this mark need not be reported again."""
        if mark > self.base:
            self._set(base=min(mark, self.last))  # first: after a kill in between, an older mark is not half known
        self._forget(self.base)

    def _forget(self, mark: int) -> None:
        last = self.last
        younger = bytes(tag(turn) for turn in range(max(mark + 1, last - _AGES + 1), last + 1))
        gone = bytes(set(range(1, _AGES + 1)) - set(younger))
        table = bytes(0 if value in gone else value for value in range(256))
        for at, ages in self._ages():
            kept = ages.translate(table)
            if kept != ages:
                self._map[at : at + len(ages)] = kept

    def _ages(self) -> Iterator[tuple[int, bytes]]:
        return self._noted(self._layout.ages, self._layout.granules)

    def _noted(self, start: int, length: int) -> Iterator[tuple[int, bytes]]:
        """Pieces of a part of the array that are not empty, with their places in the array."""
        for at in range(start, start + length, _WINDOW):
            piece = self._map[at : min(at + _WINDOW, start + length)]
            if piece != _NOTHING[: len(piece)]:
                yield at, piece

    # -- end

    def close(self) -> None:
        """Release it; tracking continues where it is pinned."""
        with suppress(BufferError):
            self._map.close()
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    @property
    def events(self) -> int:
        """Requests seen so far."""
        return self.counters[EVENTS]

    @property
    def elsewhere(self) -> int:
        """Commands with unknown location; see `bpf.ELSEWHERE`."""
        return self.counters[ELSEWHERE]


def _written(statistics: int) -> int:
    """Sectors written and discarded: fields 7 and 14 of Documentation/block/stat.rst of the kernel."""
    fields = os.pread(statistics, 400, 0).split()
    return int(fields[6]) + (int(fields[13]) if len(fields) > 13 else 0)


def remove_pins(*paths: str) -> None:
    """End tracking: of these pins, or of all pins."""
    names = paths or tuple(str(path) for path in Path(PIN_ROOT).glob("*"))
    for path in sorted(names):
        with suppress(FileNotFoundError):
            os.unlink(path)
    if not paths:
        with suppress(OSError):
            os.rmdir(PIN_ROOT)
