"""Freezing a running machine: the guest's freeze, the backup job with its checkpoint, the thaw."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import attrs
import libvirt

from asr_driver_libvirt.host import stalled
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.source import backup_jobs, scratch, versions
from asr_driver_libvirt.source.frozen import JobFrozen
from asr_driver_libvirt.source.guest_agent import GuestFreeze
from asr_driver_libvirt.source.tracking import DiskPlan, plan_tracking
from asr_driver_libvirt.source.watch import ViewWatch
from asr_driver_libvirt.xml import backup as backup_xml
from asr_driver_libvirt.xml.backup import BackupDisk
from asr_driver_libvirt.xml.domain import DomainDisk
from asr_driver_libvirt.xml.mark import CheckpointName, LibvirtMark, MarkedDisk
from asrcore.crashpoint import reach
from asrcore.driver import ViewRequest
from asrcore.model.point import Consistency

__all__ = ["Begin", "parsed_mark"]

_log = logging.getLogger(__name__)
# A bitmap that was found whole may break until the backup begins: then once more, without bitmaps.
_BROKEN_BITMAP = (libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT, libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT)


class Begin:
    """Freezes a running machine: guest freeze, backup job with checkpoint, thaw."""

    def __init__(
        self,
        host: LibvirtHost,
        clock: Callable[[], float],
        domain: libvirt.virDomain,
        request: ViewRequest,
        disks: Sequence[DomainDisk],
        sizes: Mapping[str, int],
        stamp: str,
        held: Consistency | None,
        watch: ViewWatch,
        *,
        halted: bool,
    ) -> None:
        self._watch = watch
        self._halted = halted
        self._host = host
        self._clock = clock
        self._domain = domain
        self._request = request
        self.disks = disks
        self._sizes = sizes
        self._stamp = stamp
        self._held = held

    def run(
        self, plans: dict[str, DiskPlan], consistency: Consistency, freeze_limit: float, *, agent: bool
    ) -> tuple[CheckpointName, JobFrozen, dict[str, DiskPlan]]:
        """Returns the plans as they turned out."""
        with GuestFreeze(self._domain, consistency, freeze_limit, agent=agent and self._held is None) as freeze:
            expected = self._held or freeze.expected()
            for last in (False, False, True):
                try:
                    name, frozen = self._begin(plans, expected)
                    break
                except libvirt.libvirtError as error:
                    if last or (remedied := self._remedied(plans, error)) is None:
                        raise
                    plans = remedied
            honest = (self._held or freeze.expected()) is expected
        if honest:
            return name, frozen, plans
        # The guest was thawed before the view stood: the consistency in its name was not obtained.
        _log.warning("the guest was thawed too early; the view is taken again without a freeze: %s", freeze.problem)
        frozen.close()
        return self.run(plans, Consistency.CRASH, freeze_limit, agent=False)

    def _remedied(self, plans: Mapping[str, DiskPlan], error: libvirt.libvirtError) -> dict[str, DiskPlan] | None:
        """The plans without the bitmap that QEMU refused; None if it refused something else."""
        if versions.REFUSAL in str(error) and any(disk.tracked for disk in self.disks):
            found = versions.marked(self._host, self.disks)
            if not any(disk.old for disk in found):  # it cannot be read which one it is
                found = [attrs.evolve(disk, old=disk.format == "qcow2") for disk in found]
            self.disks = found
            since = parsed_mark(self._request)
            given = self._request.since is not None
            compared = plan_tracking(found, given=given, since=since, whole=set(), stamps={})
            return {disk.id: compared[disk.id] if disk.old else plans[disk.id] for disk in found}
        if error.get_error_code() in _BROKEN_BITMAP and any(plan.base for plan in plans.values()):
            reason = f"its bitmap broke ({error.get_error_message()})"
            return {disk_id: plan.lost(reason) for disk_id, plan in plans.items()}
        return None

    def _begin(self, plans: Mapping[str, DiskPlan], consistency: Consistency) -> tuple[CheckpointName, JobFrozen]:
        name = CheckpointName.make(self._request.view_id, self._clock(), consistency, self._host.settings.owner)
        uuid = self._request.machine_id
        parts = [
            BackupDisk(disk.id, scratch.path(self._host, disk, uuid, str(name)), plans[disk.id].base, disk.tracked)
            for disk in self.disks
        ]
        checkpoint = None
        if any(part.tracked for part in parts):
            since = "" if self._request.since is None else self._request.since.token
            notes = backup_jobs.Notes.write(self.mark(name), since, plans)
            checkpoint = backup_xml.checkpoint_xml(str(name), parts, notes)
        if self._halted:
            stalled.note(self._domain, str(name))
        held = self._held is not None
        places = () if held else scratch.places(self._host, self.disks, uuid)
        guard = self._watch.guard
        guard.view(uuid, str(name), held=held, places=places)
        reach("libvirt.begin")
        try:
            server = backup_jobs.begin_backup(self._host, self._domain, parts, checkpoint)
        except libvirt.libvirtError:
            guard.ended(str(name))
            raise
        reach("libvirt.begun")
        return name, JobFrozen(self._host, uuid, name, server, held=held, places=places, watch=self._watch)

    def mark(self, name: CheckpointName) -> LibvirtMark:
        """The mark of the view of that name."""
        disks = {disk.id: MarkedDisk(disk.path, self._sizes[disk.id], disk.tracked, self._stamp) for disk in self.disks}
        return LibvirtMark(str(name), disks, shut_down=self._held is Consistency.OFFLINE)


def parsed_mark(request: ViewRequest) -> LibvirtMark | None:
    """The mark that the view is asked from; None without one, or for one of another driver."""
    return None if request.since is None else LibvirtMark.parse(request.since)
