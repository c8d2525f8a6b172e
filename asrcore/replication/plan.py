"""What a cycle has to do, decided without I/O: per disk, what to copy and what to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

import attrs

from asrcore.driver import Tracking
from asrcore.model.extent import Extent, clip, normalise, subtract, total, union
from asrcore.model.protection import CycleMode

__all__ = [
    "DiskFacts",
    "DiskWork",
    "Method",
    "ResyncDue",
    "method_of",
    "total_bytes",
    "work_of",
    "work_resumed",
    "work_with",
]


class Method(Enum):
    """How a disk is covered."""

    CHANGES = "changes"
    """Copy what the source says has changed."""
    ALL = "all"
    """Copy all allocated data to a disk that is new at the target."""
    COMPARE = "compare"
    """Compare the whole disk."""


@attrs.frozen
class DiskFacts:
    """What is known of a disk before its extents are asked for. Sizes in bytes; `at_target` None: not there."""

    id: str
    size: int
    tracking: Tracking
    reason: str = ""
    at_target: int | None = None


@attrs.frozen
class DiskWork:
    """Extents of one disk to copy and to compare, sorted; `plan` is both."""

    copy: tuple[Extent, ...] = ()
    compare: tuple[Extent, ...] = ()

    @property
    def plan(self) -> tuple[Extent, ...]:
        """All that has to be covered."""
        return tuple(union(self.copy, self.compare))

    @property
    def bytes(self) -> int:
        """How much that is."""
        return total(self.copy) + total(self.compare)


class ResyncDue(Exception):  # a decision of the planner, caught by the cycle; never seen by people
    """No delta is possible: the machine needs a comparison. A decision for the cycle, never seen by people."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def method_of(facts: DiskFacts, mode: CycleMode) -> Method:
    """How to cover a disk in a cycle of that mode. Raises ResyncDue in a delta whose changes are not known.

    A disk that the target does not have yet is copied whatever the source knows: it is created empty.
    """
    if facts.at_target is None:
        return Method.ALL
    if mode is CycleMode.FULL:
        return Method.ALL
    if mode is CycleMode.COMPARE or facts.tracking in (Tracking.NONE, Tracking.NEW):
        return Method.COMPARE
    if facts.tracking is Tracking.LOST:
        raise ResyncDue(f"disk {facts.id}: {facts.reason or 'its change log is lost'}")
    return Method.CHANGES


def work_of(facts: DiskFacts, method: Method, extents: Sequence[Extent], threshold: float) -> DiskWork:
    """The work of a disk. `extents`: what changed for CHANGES, what is allocated for ALL, unused for COMPARE.

    Raises ResyncDue when the change log holds `threshold` of the disk or more in data to be sent. Discarded ranges do
    not count: a guest's first fstrim marks all its free space as changed, but nothing of it has to be sent.
    """
    if method is Method.COMPARE:
        return DiskWork(compare=_whole(facts.size))
    extents = clip(extents, facts.size)
    if method is Method.ALL:
        # A first copy may meet what an earlier, discarded one left in the replica: its zeroes have to be sent, too.
        fresh = facts.at_target is None
        return DiskWork(copy=tuple(item for item in extents if not (fresh and item.zero)))
    changed = total(item for item in extents if not item.zero)
    if changed and changed >= threshold * facts.size:
        share = round(100 * changed / facts.size)
        raise ResyncDue(f"disk {facts.id}: the change log holds {share} % of the disk")
    return DiskWork(copy=tuple(extents))


def work_with(work: DiskWork, size: int, again: Sequence[Extent]) -> DiskWork:
    """The same and what is to be sent `again`, unless it is compared anyway: a comparison finds what differs."""
    more = subtract(clip(again, size), work.compare)
    return attrs.evolve(work, copy=tuple(union(work.copy, more))) if more else work


def work_resumed(
    facts: DiskFacts,
    mode: CycleMode,
    *,
    planned: Sequence[Extent] | None,
    done: Sequence[Extent],
    changed: Sequence[Extent] | None,
) -> tuple[DiskWork, DiskWork]:
    """The work of a disk in a cycle that was interrupted: (first, rest).

    `first` is what changed between the interrupted view and this one. It is sent and made durable before the cycle
    is recorded as reading from the new view, because from then on all that is done counts as of that view. `rest` is
    what was planned and is not done. `planned` None: the disk was not in the cycle; then the caller plans it again.
    `changed` None: not known (compare all), unless the very same view could be opened again: then pass ().
    """
    if planned is None:
        raise ValueError("a disk that was not planned is not resumed")
    if changed is None:
        return DiskWork(compare=_whole(facts.size)), DiskWork()
    compares = mode is CycleMode.COMPARE or (facts.tracking is Tracking.NONE and mode is CycleMode.DELTA)
    if facts.at_target is None:
        compares = False  # the disk came with this cycle: there is nothing to compare with
    first = tuple(clip(changed, facts.size))
    rest = tuple(subtract(clip(planned, facts.size), [*done, *first]))
    if compares:
        plain = tuple(Extent(item.offset, item.length) for item in rest)
        return DiskWork(compare=tuple(normalise(Extent(i.offset, i.length) for i in first))), DiskWork(compare=plain)
    return DiskWork(copy=first), DiskWork(copy=rest)


def _whole(size: int) -> tuple[Extent, ...]:
    return (Extent(0, size),) if size else ()


def total_bytes(work: Mapping[str, DiskWork]) -> int:
    """Bytes in all disks' work."""
    return sum(item.bytes for item in work.values())
