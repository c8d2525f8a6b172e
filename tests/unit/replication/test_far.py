"""How often a copy or comparison asks a source for content that is scattered: over a far link that is its time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

import pytest

from asrcore.driver import DIGEST_BLOCK, DiskReader, DiskView, Replica
from asrcore.model.extent import Extent
from asrcore.replication import pair, transfer
from asrcore.units import KiB, MiB
from tests.unit.replication.test_transfer_model import (
    Faults,
    Journal,
    ModelReader,
    ModelReplica,
    ModelView,
    Tracked,
    work_through,
)

SIZE = 8 * MiB


@pytest.fixture(autouse=True)
def tracked_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model's writer expects to be given."""
    for module in (transfer, pair):
        monkeypatch.setattr(module, "bytearray", Tracked, raising=False)


class AskedReader(ModelReader):
    """Notes how many extents each request names."""

    asked: list[int]

    def read_each(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        self.asked.append(len(reads))
        super().read_each(reads)


class AskedView(ModelView):
    """A view that says itself whether it is near."""

    near = True

    def __init__(self, content: bytes, *, near: bool, at_source: bool) -> None:
        super().__init__(content, Faults([]), at_source)
        self.asked: list[int] = []
        self.near = near

    def reader(self) -> DiskReader:
        made = AskedReader(self.content, self.faults, "read")
        made.asked = self.asked
        return made


class OlderView(ModelView):
    """As a driver that knows nothing of `near`."""


@pytest.mark.parametrize("at_source", [False, True])
def test_a_driver_that_does_not_set_it_is_far_where_it_hashes(at_source: bool) -> None:
    assert OlderView(b"", Faults([]), at_source).near is not at_source


def test_a_class_may_set_it() -> None:
    class Far(ModelView):
        near = False

    assert not cast(DiskView, Far(b"", Faults([]), False)).near


@pytest.mark.parametrize(
    ("near", "length", "most"),
    [(True, 4 * KiB, 16), (False, 4 * KiB, 128), (True, 64 * KiB, 16), (False, 64 * KiB, 8)],
)
def test_scattered_extents_are_read_together(near: bool, length: int, most: int) -> None:
    content, journal = random.Random(1).randbytes(SIZE), Journal()
    view = AskedView(content, near=near, at_source=False)
    extents = [Extent(at, length) for at in range(0, SIZE, max(2 * length, 16 * KiB))]
    work_through(journal, extents, view.faults, lambda work, left: work.copy(left), view)
    assert max(view.asked) == most
    assert len(view.asked) == -(-len(extents) // most)
    expected = bytearray(SIZE)
    for item in extents:
        expected[item.offset : item.end] = content[item.offset : item.end]
    assert journal.applied_to(bytes(SIZE), SIZE) == bytes(expected)


@pytest.mark.parametrize("at_source", [False, True], ids=["digests of the target", "digests of both"])
def test_what_differs_in_a_piece_is_read_together(at_source: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "FAR_PIECE", 2 * MiB)
    content = random.Random(2).randbytes(SIZE)
    head = bytearray(content)
    differing = range(DIGEST_BLOCK, SIZE, 4 * DIGEST_BLOCK)
    for at in differing:
        head[at] ^= 1
    journal = Journal()
    view = AskedView(content, near=False, at_source=at_source)
    replica = cast(Replica, ModelReplica(bytes(head), view.faults, True))
    work_through(journal, [Extent(0, SIZE)], view.faults, lambda work, left: work.compare(left, replica, SIZE), view)
    # Hashed there, a piece of 2 MiB takes one more request, for its eight blocks that differ; read here, none.
    assert view.asked == ([8] * 4 if at_source else [1] * 4)
    assert journal.applied_to(bytes(head), SIZE) == content
    assert sum(len(what) for _, _, what in journal.calls if isinstance(what, bytes)) == len(differing) * DIGEST_BLOCK


def test_a_far_view_that_does_not_hash_is_compared_by_bytes() -> None:
    """Being far decides how much is asked for at a time, and not what is compared."""
    content = random.Random(3).randbytes(SIZE)
    head = bytearray(content)
    head[5 * DIGEST_BLOCK] ^= 1
    journal = Journal()
    view = AskedView(content, near=False, at_source=False)
    replica = cast(Replica, ModelReplica(bytes(head), view.faults, False))
    assert pair.piece_size(view, replica) == pair.FAR_PIECE
    assert pair.worker_count(view, replica) == pair.FAR_WORKERS
    work_through(journal, [Extent(0, SIZE)], view.faults, lambda work, left: work.compare(left, replica, SIZE), view)
    assert view.asked == [1] * (SIZE // pair.FAR_PIECE)
    assert journal.applied_to(bytes(head), SIZE) == content
    assert transfer.FAR_COPY_EXTENTS * 4 * KiB == transfer.FAR_COPY_PIECE
