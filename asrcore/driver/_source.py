"""The source role: frozen machines are read, and what changes is tracked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum

import attrs

from asrcore.closing import Closing
from asrcore.driver._digests import Digest, digests_of
from asrcore.driver._reader import DiskReader
from asrcore.model.extent import Extent
from asrcore.model.finding import Finding
from asrcore.model.machine import Description, Disk
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy

__all__ = ["DiskView", "FrozenView", "MachineView", "Source", "Tracking", "ViewRequest"]


class Tracking(Enum):
    """What is known of a disk's changes since the mark that the view was asked for."""

    CHANGED = "changed"
    """`changed()` is complete."""
    NEW = "new"
    """The disk was not part of the mark: it was added or replaced."""
    LOST = "lost"
    """Unknown: compare."""
    NONE = "none"
    """This disk cannot be tracked here (or no mark was given): compare each time."""


@attrs.frozen
class ViewRequest:
    """One machine of a view. `view_id` names the view: a view of that id that is still frozen at the source is
    opened again, with the same `taken_at` and mark, so that a restarted engine reads the same instant. When it is
    no longer frozen a new view is made under that id, with a new mark that differs from the former one's (which
    may be `since`). `since`: the mark from which changes are counted."""

    machine_id: str
    view_id: str
    since: Mark | None


class DiskView(ABC):
    """One disk of a frozen machine."""

    disk: Disk
    tracking: Tracking
    reason: str = ""
    """Why `tracking` is LOST or NONE, for people."""
    whole: bool = True
    """Whether every range shows the instant of the view, so that `verify` can compare all of it; False where only
    what changed is held still."""
    hashes_at_source: bool = False
    """`digests` is computed where the data is: a comparison asks for it first and reads only what differs."""

    @property
    def near(self) -> bool:
        """Whether a request costs little beside the bytes that it reads. False behind a link that is slow, far or may
        be cut: the engine then reads in smaller pieces, and many small extents in one `read_each`.

        A driver may set it as an attribute of its class. By default what hashes where the data is counts as far.
        """
        return not self.hashes_at_source

    @abstractmethod
    def changed(self) -> list[Extent]:
        """Extents changed since the mark, sorted, only when tracking is CHANGED. What was discarded is `zero`."""

    @abstractmethod
    def allocated(self) -> list[Extent]:
        """The whole disk, sorted and without gaps; what is known to read as zeroes is `zero`."""

    @abstractmethod
    def reader(self) -> DiskReader:
        """A new reader; the caller closes it."""

    digest: Digest = Digest.BLAKE3
    """What `digests` computes."""

    def digests(self, extent: Extent) -> bytes:
        """Digests of the blocks of an extent, see `digests_of`. An agent computes them where the data is."""
        with self.reader() as reader:
            return digests_of(reader, extent, self.digest)


class MachineView(ABC):
    """One machine of a frozen view: all its disks at one instant."""

    description: Description
    consistency: Consistency
    """As obtained, which may be lower than asked for (invariant 5 in docs/explanation/architecture.md)."""
    mark: Mark | None
    """To be kept once the point is recorded; None when nothing is tracked."""
    disks: Mapping[str, DiskView]
    notices: Sequence[Finding] = ()
    """What an operator should know of the machine although it can be read, such as snapshots that were made since it
    was protected. Shown with its health until a later view has others; none is an ERROR."""
    halted: str = ""
    """Why the platform paused the running machine, such as an error of a disk; "" if it did not, or if a person paused
    it. A machine that is halted is replicated, and reported (`source-paused`)."""


class FrozenView(Closing, ABC):
    """Machines frozen at one barrier. Reads through it give the content of `taken_at` however long they take."""

    taken_at: float
    machines: Mapping[str, MachineView]

    def settle(self) -> Mapping[str, Mapping[str, Sequence[Extent]]]:
        """What has to be read again, by machine and disk. Called when all planned extents are flushed, and again
        when what it returned is flushed, until it returns nothing.

        A source that cannot hold a whole disk still (an agent without snapshots below it) names what changed while it
        was read, in as many rounds as it needs, and freezes briefly for the last one; from then on `taken_at`,
        consistency and marks are those of that instant. A source that froze at the opening returns nothing.
        """
        return {}

    def confirm(self) -> None:
        """Called after the last read and before the seal. Raises ViewLost when the reads may not all have shown
        the same instant; a source that freezes for certain has nothing to do."""


class Source(ABC):
    """Reads frozen machines and tracks what changes. Views never disturb the workload beyond the freeze limit."""

    @abstractmethod
    def findings(self, machine_id: str, policy: Policy) -> list[Finding]:
        """Readiness of the machine as a source under this policy."""

    @abstractmethod
    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        """Freeze the machines at one barrier (one machine unless the site has GROUPS).

        A consistency that cannot be obtained is no error: the view states what it obtained. From the instant of the
        view on, changes are tracked for its new mark. A lost mark is reported per disk (`Tracking.LOST`).
        Raises MachineNotFound, ViewLost, SiteUnreachable, DriverFailed.
        """

    @abstractmethod
    def keep_marks(self, machine_id: str, keep: Sequence[Mark]) -> None:
        """Release every mark of this machine except these, and everything left over from asrcore's views of it.

        Called after a point is recorded, and with nothing to keep when protection ends: then after a call with the
        recorded marks, by which a driver may recognise what is this vault's. What cannot be released now (a stopped
        machine) is released by a later call.
        """
