"""The pipeline against a model, with failures of reads, writes, flushes, space, links and the engine itself.

A source and a replica in memory; each attempt resumes from what the previous one made durable, as a cycle does. As long
as something fails, nothing is sealed and the head is unchanged; at the end the replica equals the model, byte by byte,
and no more memory was used than workers x pieces.
"""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import attrs
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from asrcore.driver import CycleWriter, DiskReader, DiskView, Replica, SealSpec, StoredPoint, Tracking
from asrcore.errors import AsrError, Cancelled, DriverFailed, SiteUnreachable, TargetFull, ViewLost
from asrcore.model.extent import Extent, clip, intersect, normalise, subtract, union
from asrcore.model.machine import Disk
from asrcore.model.watch import Watch
from asrcore.replication import pair, transfer
from asrcore.replication.throttle import Throttle
from asrcore.replication.transfer import Counts, Transfer
from asrcore.units import KiB

GRAIN = 64 * KiB
COPY, NEAR, FAR = 128 * KiB, 128 * KiB, 256 * KiB


class Killed(BaseException):
    """Simulates SIGKILL: unflushed data are lost."""


ERRORS: dict[str, Callable[[], BaseException]] = {
    "view-lost": lambda: ViewLost(machine="web", detail="the job has ended"),
    "unreachable": lambda: SiteUnreachable(site="a", detail="EAGAIN"),
    "eio": lambda: DriverFailed(operation="reading a disk", site="a", detail="EIO"),
    "full": lambda: TargetFull(where="b", detail="ENOSPC"),
    "cancelled": lambda: Cancelled(work="copying"),
    "killed": Killed,
}
CALLS = ["read", "write", "zero", "same", "flush", "digests", "read-replica"]


@attrs.define
class Faults:
    """The n-th call of a name from now on fails, once; `half`: after half of its data was moved."""

    planned: list[tuple[str, int, str, bool]]
    seen: dict[str, int] = attrs.field(factory=dict)
    lock: threading.Lock = attrs.field(factory=threading.Lock)

    def strike(self, call: str, half: Callable[[], None] = lambda: None) -> None:
        with self.lock:
            self.seen[call] = count = self.seen.get(call, 0) + 1
            due = next((item for item in self.planned if item[0] == call and item[1] <= count), None)
            if due is None:
                return
            self.planned.remove(due)
            self.seen.clear()
        if due[3]:
            half()
        raise ERRORS[due[2]]()


class Tracked(bytearray):
    """A buffer that is counted as long as it exists."""

    live, peak = 0, 0
    lock = threading.Lock()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.counted = len(self)
        with Tracked.lock:
            Tracked.live += self.counted
            Tracked.peak = max(Tracked.peak, Tracked.live)

    def __del__(self) -> None:
        with Tracked.lock:
            Tracked.live -= self.counted


class ModelReader(DiskReader):
    def __init__(self, content: bytes | bytearray, faults: Faults, call: str) -> None:
        self.content, self.faults, self.call = content, faults, call

    def read_into(self, offset: int, buffer: memoryview) -> None:
        def fill(length: int) -> None:
            buffer[:length] = self.content[offset : offset + length]

        assert offset + len(buffer) <= len(self.content)
        self.faults.strike(self.call, lambda: fill(len(buffer) // 2))
        fill(len(buffer))


class ModelView(DiskView):
    def __init__(self, content: bytes, faults: Faults, at_source: bool) -> None:
        self.disk = Disk("vda", len(content))
        self.tracking = Tracking.NONE
        self.hashes_at_source = at_source
        self.content, self.faults = content, faults

    def changed(self) -> list[Extent]:
        raise NotImplementedError

    def allocated(self) -> list[Extent]:
        return allocation(self.content)

    def reader(self) -> DiskReader:
        return ModelReader(self.content, self.faults, "read")

    def digests(self, extent: Extent) -> bytes:
        self.faults.strike("digests")
        return ModelView(self.content, Faults([]), False).plain_digests(extent)

    def plain_digests(self, extent: Extent) -> bytes:
        return super().digests(extent)


def allocation(content: bytes | bytearray) -> list[Extent]:
    blocks = range(0, len(content), GRAIN)
    return normalise(
        Extent(at, len(part), zero=not any(part)) for at in blocks if (part := bytes(content[at : at + GRAIN]))
    )


class ModelReplica:
    """The calls that a comparison makes on a replica."""

    def __init__(self, head: bytes, faults: Faults, at_target: bool) -> None:
        self.head, self.faults, self.hashes_at_target = head, faults, at_target

    def allocated(self, disk_id: str) -> list[Extent]:
        return allocation(self.head)

    def reader(self, disk_id: str) -> DiskReader:
        return ModelReader(self.head, self.faults, "read-replica")

    def digests(self, disk_id: str, extent: Extent, *_: object) -> bytes:
        self.faults.strike("digests")
        return ModelView(self.head, Faults([]), False).plain_digests(extent)

    def compare(self, disk_id: str, extent: Extent, ours: bytes, *rest: Any) -> list[Extent]:
        return Replica.compare(cast(Replica, self), disk_id, extent, ours, *rest)


@attrs.define
class Journal:
    """The durable part of a cycle: calls in order."""

    calls: list[tuple[str, int, bytes | int]] = attrs.field(factory=list)

    def applied_to(self, head: bytes, size: int) -> bytes:
        base = head.ljust(size, b"\0")[:size]
        content = bytearray(base)
        for kind, offset, what in self.calls:
            if isinstance(what, bytes):
                content[offset : offset + len(what)] = what
            else:
                content[offset : offset + what] = base[offset : offset + what] if kind == "same" else bytes(what)
        return bytes(content)

    def done(self) -> list[Extent]:
        return normalise(
            Extent(offset, len(what) if isinstance(what, bytes) else what) for _, offset, what in self.calls
        )


class ModelWriter(CycleWriter):
    def __init__(self, journal: Journal, faults: Faults) -> None:
        self.journal, self.faults = journal, faults
        self.fresh: list[tuple[str, int, bytes | int]] = []
        self.lock = threading.Lock()

    def _note(self, call: tuple[str, int, bytes | int]) -> None:
        with self.lock:
            self.fresh.append(call)

    def done(self, disk_id: str) -> list[Extent]:
        return self.journal.done()

    def write(self, disk_id: str, offset: int, data: memoryview) -> None:
        assert isinstance(data.obj, Tracked), "data are sent from the buffer into which they were read"
        self.faults.strike("write", lambda: self._note(("data", offset, bytes(data[: len(data) // 2]))))
        self._note(("data", offset, bytes(data)))

    def zero(self, disk_id: str, offset: int, length: int) -> None:
        self.faults.strike("zero")
        self._note(("zero", offset, length))

    def same(self, disk_id: str, offset: int, length: int) -> None:
        self.faults.strike("same")
        self._note(("same", offset, length))

    def flush(self) -> None:
        with self.lock:
            fresh, self.fresh = self.fresh, []
        try:
            self.faults.strike("flush")
        except BaseException:
            with self.lock:
                self.fresh[:0] = fresh
            raise
        with self.lock:
            self.journal.calls += fresh

    def seal(self, spec: SealSpec) -> StoredPoint:
        raise AssertionError("the pipeline never seals")

    def discard(self) -> None:
        raise NotImplementedError


@contextmanager
def small_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "COPY_PIECE", COPY)
        patch.setattr(transfer, "FAR_COPY_PIECE", COPY // 2)
        patch.setattr(transfer, "FLUSH_EVERY", 256 * KiB)
        patch.setattr(pair, "NEAR_PIECE", NEAR)
        patch.setattr(pair, "FAR_PIECE", FAR)
        patch.setattr(pair, "NEAR_WORKERS", 3)  # fewer than there are pieces
        patch.setattr(pair, "FAR_WORKERS", 2)
        for module in (transfer, pair):
            patch.setattr(module, "bytearray", Tracked, raising=False)
        gc.collect()
        Tracked.peak = Tracked.live
        yield


def content_of(seed: int, size: int, kinds: list[int]) -> bytes:
    """Blocks of 32 KiB: zeroes, noise, or noise that starts with zeroes."""
    noise = random.Random(seed)
    parts = []
    for kind in kinds:
        part = b"" if kind == 0 else noise.randbytes(32 * KiB)
        parts.append(part.ljust(32 * KiB, b"\0") if kind < 2 else bytes(8 * KiB) + part[8 * KiB :])
    return b"".join(parts).ljust(size, b"\0")[:size]


def work_through(
    journal: Journal,
    planned: list[Extent],
    faults: Faults,
    cover: Callable[[Transfer, list[Extent]], None],
    view: ModelView,
) -> list[str]:
    """Repeat attempts until one succeeds; returns the errors of the others."""
    problems: list[str] = []
    most = len(faults.planned)
    while True:
        writer = ModelWriter(journal, faults)
        work = Transfer(view, writer, Counts(), Watch(), Throttle())
        try:
            cover(work, subtract(planned, writer.done("vda")))
            writer.flush()
        except Killed:
            problems.append("killed")
        except AsrError as problem:
            problems.append(problem.code)
            with suppress(AsrError, Killed):
                writer.flush()
        else:
            return problems
        assert len(problems) <= most, "each fault occurs once"
        gc.collect()  # the traceback of an error keeps the buffers of its frames alive


SIZES = st.integers(1, 2 * 1024).map(lambda sectors: sectors * 512)
KINDS = st.lists(st.sampled_from([0, 0, 1, 2]), max_size=32)
FAULTS = st.lists(
    st.tuples(st.sampled_from(CALLS), st.integers(1, 6), st.sampled_from(sorted(ERRORS)), st.booleans()), max_size=5
)


@pytest.mark.once
@settings(deadline=None, max_examples=100)
@given(
    size=SIZES,
    kinds=KINDS,
    ranges=st.lists(st.tuples(st.integers(0, 2047), st.integers(1, 800), st.booleans()), max_size=8),
    planned=FAULTS,
)
def test_a_copy_is_what_was_planned(
    size: int, kinds: list[int], ranges: list[tuple[int, int, bool]], planned: list[tuple[str, int, str, bool]]
) -> None:
    source, head = content_of(1, size, kinds), content_of(2, size, kinds[::-1])
    known_zero = [item for item in allocation(source) if item.zero]
    extents = union(Extent(start * 512, length * 512) for start, length, _ in ranges)
    extents = clip(extents, size)
    zeroes = [Extent(item.offset, item.length, zero=True) for item in intersect(extents, known_zero)]
    extents = union(subtract(extents, zeroes), zeroes)
    faults, journal = Faults(list(planned)), Journal()
    view = ModelView(source, faults, False)
    with small_steps():
        before = Tracked.live
        problems = work_through(journal, extents, faults, lambda work, left: work.copy(left), view)
        assert Tracked.peak - before <= transfer.COPY_WORKERS * COPY
        assert Tracked.live == before
    expected = bytearray(head)
    for item in extents:
        expected[item.offset : item.end] = source[item.offset : item.end]
    assert journal.applied_to(head, size) == bytes(expected)
    event(f"{len(problems)} attempts failed")


@pytest.mark.once
@settings(deadline=None, max_examples=100)
@given(
    size=SIZES,
    old_size=SIZES,
    kinds=KINDS,
    changes=st.lists(st.tuples(st.integers(0, 2047), st.integers(0, 3)), max_size=6),
    at_source=st.booleans(),
    at_target=st.booleans(),
    planned=FAULTS,
)
def test_a_comparison_makes_both_equal_and_sends_what_differs(
    size: int,
    old_size: int,
    kinds: list[int],
    changes: list[tuple[int, int]],
    at_source: bool,
    at_target: bool,
    planned: list[tuple[str, int, str, bool]],
) -> None:
    source = content_of(1, size, kinds)
    changed = bytearray(source)
    for sector, what in changes:
        if sector * 512 < size:
            changed[sector * 512 : sector * 512 + 100] = bytes([what]) * len(changed[sector * 512 : sector * 512 + 100])
    head = bytes(changed).ljust(old_size, b"\0")[:old_size]
    faults, journal = Faults(list(planned)), Journal()
    view, replica = ModelView(source, faults, at_source), ModelReplica(head, faults, at_target)

    def compare(work: Transfer, left: list[Extent]) -> None:
        work.compare(left, cast(Replica, replica), old_size)

    with small_steps():
        before = Tracked.live
        problems = work_through(journal, [Extent(0, size)], faults, compare, view)
        most = pair.FAR_WORKERS * FAR if at_source or at_target else pair.NEAR_WORKERS * 2 * NEAR
        assert Tracked.peak - before <= most
        assert Tracked.live == before
    assert journal.applied_to(head, size) == source
    assert not subtract([Extent(0, size)], journal.done())
    if not problems:
        inside = min(size, old_size // GRAIN * GRAIN)
        differing = [
            at for at in range(0, inside, GRAIN) if source[at : at + GRAIN] != head[at : at + GRAIN][: size - at]
        ]
        sent = normalise(Extent(at, len(what)) for kind, at, what in journal.calls if isinstance(what, bytes))
        allowed = [Extent(at, GRAIN) for at in differing] + [Extent(inside, max(0, size - inside))]
        assert not subtract(sent, allowed), "only blocks that differ are sent"
    event(f"{len(problems)} attempts failed")


@pytest.mark.parametrize(("far", "piece"), [(False, 1024 * KiB), (True, 512 * KiB)], ids=["near", "far"])
def test_what_a_cut_link_loses_is_small(far: bool, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "bytearray", Tracked, raising=False)
    content, journal, faults = random.Random(5).randbytes(3 * 1024 * KiB), Journal(), Faults([])
    view = ModelView(content, faults, far)
    work_through(journal, view.allocated(), faults, lambda work, left: work.copy(left), view)
    assert {len(what) for _, _, what in journal.calls if isinstance(what, bytes)} == {piece}
    assert journal.applied_to(b"", len(content)) == content
