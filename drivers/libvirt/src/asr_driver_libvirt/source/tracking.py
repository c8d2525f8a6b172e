"""What is known of each disk's changes since a mark. Pure: anything uncertain is LOST."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

import attrs

from asr_driver_libvirt.xml.domain import DomainDisk
from asr_driver_libvirt.xml.mark import LibvirtMark
from asrcore.driver import Tracking

__all__ = ["DiskPlan", "plan_tracking"]


@attrs.frozen
class DiskPlan:
    """`base`: checkpoint whose bitmap has the changes ("": none). `unchanged`: known without reading a bitmap."""

    tracking: Tracking
    reason: str = ""
    base: str = ""
    unchanged: bool = False

    def lost(self, reason: str) -> DiskPlan:
        """The same disk after its bitmap turned out to be unusable."""
        return DiskPlan(Tracking.LOST, reason) if self.base else self


def plan_tracking(
    disks: Iterable[DomainDisk],
    *,
    given: bool,
    since: LibvirtMark | None,
    whole: AbstractSet[str],
    stamps: Mapping[str, str],
) -> dict[str, DiskPlan]:
    """A plan per disk id.

    `given`: a mark was asked from; `since`: its content, None when it could not be read. `whole`: disks in which the
    mark's bitmap was found whole. `stamps`: for a machine that is off, the state of each image now.
    """
    return {disk.id: _plan(disk, given, since, whole, stamps.get(disk.id, "")) for disk in disks}


def _plan(disk: DomainDisk, given: bool, since: LibvirtMark | None, whole: AbstractSet[str], stamp: str) -> DiskPlan:
    kind = "qcow2 (version 2)" if disk.old else disk.format
    untracked = "" if disk.tracked else f"QEMU cannot track changes in a {kind} image"
    if not given:
        return DiskPlan(Tracking.NONE, untracked or "no mark was given")
    if since is None:
        return DiskPlan(Tracking.LOST, "the mark cannot be read")
    known = since.disks.get(disk.id)
    if known is None:
        return DiskPlan(Tracking.NEW, "the disk was added since")
    if stamp and stamp == known.stamp and disk.path == known.path:
        return DiskPlan(Tracking.CHANGED, unchanged=True)
    if untracked:
        return DiskPlan(Tracking.NONE, untracked)
    if known.tracked and disk.id in whole:
        return DiskPlan(Tracking.CHANGED, base=since.checkpoint)
    if disk.path != known.path:
        return DiskPlan(Tracking.NEW, f"the disk was replaced: {known.path} before, {disk.path} now")
    if not known.tracked:
        return DiskPlan(Tracking.LOST, "the disk was not tracked at the last point")
    return DiskPlan(
        Tracking.LOST,
        f"bitmap {since.checkpoint} of {disk.id} is missing or inconsistent: QEMU or its host did not end cleanly",
    )
