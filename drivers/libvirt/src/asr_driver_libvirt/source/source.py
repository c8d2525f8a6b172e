"""The source role: frozen views of machines, running or off, and the checkpoints that track their changes."""

from __future__ import annotations

import contextlib
import logging
import posixpath
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import libvirt

from asr_driver_libvirt.host import paused, stalled
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.host.nvram import NvramReader
from asr_driver_libvirt.host.power import power_of
from asr_driver_libvirt.source import backup_jobs, off_marks, readiness, scratch, versions
from asr_driver_libvirt.source.begin import Begin, parsed_mark
from asr_driver_libvirt.source.facts import gather
from asr_driver_libvirt.source.frozen import FilesFrozen, JobFrozen, LateFrozen, image_stamp
from asr_driver_libvirt.source.ours import Ours
from asr_driver_libvirt.source.space import SpaceMeter
from asr_driver_libvirt.source.tracking import DiskPlan, plan_tracking
from asr_driver_libvirt.source.view import Frozen, LibvirtDiskView, LibvirtMachineView, LibvirtView
from asr_driver_libvirt.source.watch import ViewWatch
from asr_driver_libvirt.xml import backup as backup_xml
from asr_driver_libvirt.xml.backup import BackupDisk, RunningBackup
from asr_driver_libvirt.xml.description import describe
from asr_driver_libvirt.xml.domain import DomainDisk, DomainModel, neutral_disk, parse_domain
from asr_driver_libvirt.xml.mark import CheckpointName, LibvirtMark, MarkedDisk, view_key
from asr_storage.qemu import img
from asr_storage.qemu.process import QemuError
from asrcore.crashpoint import reach
from asrcore.driver import FrozenView, Source, Tracking, ViewRequest
from asrcore.errors import (
    AsrError,
    DriverFailed,
    MachineBusy,
    MarksLeft,
    NotReady,
    ScratchSpaceLow,
    SourcePaused,
    UnsupportedOperation,
    ViewLost,
)
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy
from asrcore.units import format_size

__all__ = ["LibvirtSource"]

_log = logging.getLogger(__name__)
_INACTIVE = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
# Of a running machine: what it runs with now (CPU model as it was expanded, disks as plugged), fit to be defined.
_RUNNING = libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE
_START_EVENT_SECONDS = 5.0
_UNUSED_HOLD_SECONDS = 2 * _START_EVENT_SECONDS
_SPACE_AGE = 5.0  # seconds for which free space counts as known when a view is opened; from then on it is watched


class LibvirtSource(Source):
    """Pull-mode backups with checkpoints; the image files of a machine that is off."""

    def __init__(self, host: LibvirtHost, clock: Callable[[], float] = time.time) -> None:
        self._host = host
        self._clock = clock
        self._nvram = NvramReader(host)
        self._swept: set[str] = set()
        self._ours: dict[str, Ours] = {}
        self._unsure: dict[str, list[str]] = {}
        self._meter = SpaceMeter(host)
        self._watch = ViewWatch(host, self._meter)

    def close(self) -> None:
        """What this process opened and did not close counts as left over."""
        self._watch.guard.close()

    def _of(self, machine_id: str) -> Ours:
        return self._ours.setdefault(machine_id, Ours(self._host.settings.owner))

    # -- readiness

    def findings(self, machine_id: str, policy: Policy) -> list[Finding]:
        """Raises MachineNotFound, SiteUnreachable."""
        with self._host.guard("checking a machine", machine_id):
            facts = gather(self._host, self._host.domain(machine_id), self._nvram, self._meter, self._of(machine_id))
        return readiness.findings(facts, policy)

    # -- views

    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        """One machine. Raises MachineNotFound, MachineBusy, NotReady, ViewLost, SiteUnreachable, DriverFailed."""
        if len(requests) != 1:
            raise UnsupportedOperation(driver=self._host.driver, operation="freeze several machines at one instant")
        request = requests[0]
        self._of(request.machine_id).learn([request.since], request.view_id)
        for last in (False, False, True):
            with self._host.guard("opening a frozen view", request.machine_id):
                domain = self._host.domain(request.machine_id)
                active = domain.isActive()
                try:
                    return self._open(domain, request, consistency, freeze_limit)
                except (libvirt.libvirtError, DriverFailed, ViewLost) as error:
                    # It was started or stopped just now: then it is opened the other way.
                    if last or domain.isActive() == active:
                        raise
                    _log.info("%s was started or stopped while a view was opened: %s", domain.name(), error)
        raise AssertionError("the last try returns or raises")

    def _open(
        self, domain: libvirt.virDomain, request: ViewRequest, consistency: Consistency, freeze_limit: float
    ) -> LibvirtView:
        held = bool(domain.isActive()) and self._is_held(domain, request.machine_id)
        if domain.isActive():
            found = self._again(domain, request, held=held)
            if found is not None:
                return found
        if held:
            paused.release(domain)
        if domain.isActive():
            return self._open_job(domain, request, consistency, freeze_limit)
        if self._host.settings.local:
            return self._open_files(domain, request)
        return self._open_remote(domain, request)

    def _is_held(self, domain: libvirt.virDomain, machine_id: str) -> bool:
        """Whether this vault holds it, or an engine that has ended. Raises MachineBusy if another vault does."""
        holder, owner = paused.holder(domain), self._host.settings.owner
        if holder in (None, owner):
            return holder is not None
        if not holder:
            backup_jobs.refuse_if_busy(domain, self._of(machine_id))
            if backup_jobs.current_backup(domain) is not None:
                paused.mark(domain, owner)  # of this vault, before its site had a tag
                return True
            if self._is_abandoned(domain):
                return True
        raise MachineBusy(machine=domain.name(), work=f"the reading of another vault (tag {holder or 'none'})")

    def _is_abandoned(self, domain: libvirt.virDomain) -> bool:
        """Whether an engine that has ended holds it, for which there is no tag: one that lives begins a backup at once
        or releases it."""
        return not self._host.lifecycle.wait(
            lambda: backup_jobs.current_backup(domain) is not None or paused.holder(domain) != "", _UNUSED_HOLD_SECONDS
        )

    def _again(self, domain: libvirt.virDomain, request: ViewRequest, *, held: bool) -> LibvirtView | None:
        """The view of that id if it is still frozen; any other job of this driver is ended."""
        backup_jobs.refuse_if_busy(domain, self._of(request.machine_id))
        backup = backup_jobs.current_backup(domain)
        if backup is None or backup.name is None:
            stalled.resume(domain, self._host.settings.owner)
            return None
        if backup.name.view == view_key(request.view_id) and not backup_jobs.has_stopped(domain):
            view = self._attach(domain, backup, backup.name, request, held=held)
            if view is not None:
                return view
        _log.info("ending backup %s of %s, which is no longer read", backup.name, domain.name())
        backup_jobs.end_backup(self._host, domain)
        return None

    def _attach(
        self,
        domain: libvirt.virDomain,
        backup: RunningBackup,
        name: CheckpointName,
        request: ViewRequest,
        *,
        held: bool,
    ) -> LibvirtView | None:
        checkpoint = backup_jobs.find_checkpoint(domain, str(name))
        mark: Mark | None = None
        if checkpoint is None:  # nothing was tracked
            xml, plans = domain.XMLDesc(_RUNNING), None
        else:
            text = checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_SECURE)
            xml = backup_xml.checkpoint_domain(text)
            notes = backup_jobs.Notes.read(backup_xml.checkpoint_description(text))
            if notes is None:
                return None
            mark, plans = Mark(notes[0]), _plans_again(request, notes)
            if plans is None:
                return None
        model = parse_domain(xml)
        disks = [disk for disk in model.hard_disks if disk.id in backup.disk_ids]
        if plans is None:
            since = parsed_mark(request)
            plans = plan_tracking(disks, given=request.since is not None, since=since, whole=set(), stamps={})
        if {disk.id for disk in disks} != set(backup.disk_ids) or set(plans) != set(backup.disk_ids):
            return None
        sizes = self._sizes(domain, disks)
        power = PowerState.OFF if held else power_of(domain)
        description = describe(model, xml, sizes, power, self._read_nvram(model))
        places = () if held else scratch.places(self._host, disks, model.uuid)
        self._watch.guard.view(model.uuid, str(name), held=held, places=places)
        frozen = JobFrozen(self._host, model.uuid, name, backup.server, held=held, places=places, watch=self._watch)
        views = self._disk_views(frozen, disks, sizes, plans, request)
        notices = self._notices(domain, model)
        halted = "" if held else stalled.why(domain)
        machine = LibvirtMachineView(description, name.consistency, mark, views, notices, halted)
        return LibvirtView(name.taken_at, machine, frozen)

    # a running (or held) machine

    def _open_job(
        self,
        domain: libvirt.virDomain,
        request: ViewRequest,
        consistency: Consistency,
        freeze_limit: float,
        *,
        held: Consistency | None = None,
        stamp: str = "",
    ) -> LibvirtView:
        """`held`: the machine is off and was started, held, to be read; its consistency."""
        live = parse_domain(domain.XMLDesc(0))
        xml = domain.XMLDesc(_RUNNING if held is None else _INACTIVE)
        disks = _checked(live, request.machine_id)
        sizes = self._sizes(domain, disks)
        since = parsed_mark(request)
        whole = backup_jobs.whole_bitmaps(domain, live, since)
        plans = plan_tracking(disks, given=request.since is not None, since=since, whole=whole, stamps={})
        halted = stalled.why(domain) if held is None else ""
        if held is None:  # a machine that is held overwrites nothing
            self._check_space(scratch.places(self._host, disks, live.uuid), live.name, halted)
        begin = Begin(
            self._host, self._clock, domain, request, disks, sizes, stamp, held, self._watch, halted=bool(halted)
        )
        name, frozen, plans = begin.run(plans, consistency, freeze_limit, agent=live.agent_connected)
        try:
            power = PowerState.OFF if held is not None else power_of(domain)
            description = describe(live, xml, sizes, power, self._read_nvram(live))
            views = self._disk_views(frozen, disks, sizes, plans, request)
            notices = self._notices(domain, live)
        except BaseException:
            frozen.close()
            raise
        mark = begin.mark(name).token() if any(disk.tracked for disk in begin.disks) else None
        notices += [readiness.old_image(disk) for disk in begin.disks if disk.old]
        machine = LibvirtMachineView(description, name.consistency, mark, views, notices, halted)
        return LibvirtView(name.taken_at, machine, frozen)

    def _check_space(self, places: Sequence[str], name: str, halted: str) -> None:
        space = self._meter.shortest(places, _SPACE_AGE)
        if space is None:
            return
        if halted:
            raise SourcePaused(machine=name, site=self._host.name, detail=halted)
        raise ScratchSpaceLow(
            machine=name,
            site=self._host.name,
            place=space.place,
            free=format_size(space.free),
            wanted=format_size(space.reserve),
        )

    # a machine that is off

    def _open_remote(self, domain: libvirt.virDomain, request: ViewRequest) -> LibvirtView:
        xml = domain.XMLDesc(_INACTIVE)
        model = parse_domain(xml)
        disks = _checked(model, request.machine_id)
        since = parsed_mark(request)
        consistency = _consistency_off(domain, since)
        stamp = self._host.lifecycle.stamp(model.uuid)
        tagged = since is not None and self._of(model.uuid).tagged(since.checkpoint)
        if since is not None and request.since is not None and tagged and _all_stamped(disks, since, stamp):
            return self._unchanged_remote(domain, request, model, xml, since, stamp)
        self._hold(domain)
        try:
            lifecycle = self._host.lifecycle
            heard = lifecycle.wait(lambda: lifecycle.stamp(model.uuid) != stamp, _START_EVENT_SECONDS)
            stamp = lifecycle.stamp(model.uuid) if heard else ""
            return self._open_job(domain, request, consistency, 1.0, held=consistency, stamp=stamp)
        except BaseException:
            with contextlib.suppress(libvirt.libvirtError):
                self._let_go(domain)
            raise

    def _let_go(self, domain: libvirt.virDomain) -> None:
        paused.release(domain, self._host.settings.owner)
        self._watch.guard.ended(domain.UUIDString())

    def _hold(self, domain: libvirt.virDomain) -> None:
        reach("libvirt.hold")
        guard, machine = self._watch.guard, domain.UUIDString()
        guard.hold(machine, started=False)
        try:
            paused.hold(domain, self._host.settings.owner)
            guard.hold(machine, started=True)
        except (libvirt.libvirtError, ValueError) as error:
            guard.ended(machine)
            raise DriverFailed(
                operation="reading the disks of a stopped machine (starting it with its processors stopped)",
                site=self._host.name,
                detail=str(error),
            ) from error
        reach("libvirt.held")

    def _unchanged_remote(
        self,
        domain: libvirt.virDomain,
        request: ViewRequest,
        model: DomainModel,
        xml: str,
        since: LibvirtMark,
        stamp: str,
    ) -> LibvirtView:
        host = self._host

        def unchanged() -> None:
            with host.guard("confirming a view", model.uuid):
                if host.domain(model.uuid).isActive() or host.lifecycle.stamp(model.uuid) != stamp:
                    raise ViewLost(machine=model.uuid, detail="the machine was started while it was read")

        def open_() -> Frozen:
            with host.guard("opening a frozen view", model.uuid):
                late = host.domain(model.uuid)
                self._hold(late)
                name = CheckpointName.make(request.view_id, self._clock(), consistency, host.settings.owner)
                self._watch.guard.view(model.uuid, str(name), held=True, places=())
                try:
                    parts = [BackupDisk(disk.id, scratch.path(host, disk, model.uuid, str(name))) for disk in disks]
                    server = backup_jobs.begin_backup(host, late, parts, None)
                except BaseException:
                    with contextlib.suppress(libvirt.libvirtError):
                        self._let_go(late)
                        self._watch.guard.ended(str(name))
                    raise
                return JobFrozen(host, model.uuid, name, server, held=True, watch=self._watch)

        disks = list(model.hard_disks)
        consistency = _consistency_off(domain, since)
        taken_at = self._clock()
        sizes = self._sizes(domain, disks)
        plans = plan_tracking(disks, given=True, since=since, whole=set(), stamps={disk.id: stamp for disk in disks})
        frozen = LateFrozen(open_, unchanged)
        description = describe(model, xml, sizes, PowerState.OFF, self._read_nvram(model))
        views = self._disk_views(frozen, disks, sizes, plans, request)
        notices = self._notices(domain, model)
        machine = LibvirtMachineView(description, consistency, request.since, views, notices)
        return LibvirtView(taken_at, machine, frozen)

    def _open_files(self, domain: libvirt.virDomain, request: ViewRequest) -> LibvirtView:
        xml = domain.XMLDesc(_INACTIVE)
        model = parse_domain(xml)
        disks = versions.marked(self._host, _checked(model, request.machine_id))
        since = parsed_mark(request)
        consistency = _consistency_off(domain, since)
        stamps = {disk.id: image_stamp(disk.path) for disk in disks}
        whole = _whole_offline(disks, since)
        plans = plan_tracking(disks, given=request.since is not None, since=since, whole=whole, stamps=stamps)
        checkpoint = since.checkpoint if since is not None else ""
        good = {disk.id for disk in disks if disk.tracked and disk.id in whole}
        if good != {disk.id for disk in disks if disk.tracked} or not self._of(model.uuid).tagged(checkpoint):
            made = self._checkpoint_off(domain, request, disks)
            if made:
                checkpoint, good = made, {disk.id for disk in disks if disk.tracked}
                stamps = {disk.id: image_stamp(disk.path) for disk in disks}
        taken_at = self._clock()
        sizes = self._sizes(domain, disks)
        mark = LibvirtMark(
            checkpoint,
            {disk.id: MarkedDisk(disk.path, sizes[disk.id], disk.id in good, stamps[disk.id]) for disk in disks},
            shut_down=consistency is Consistency.OFFLINE,
        ).token()
        frozen = FilesFrozen(
            self._host,
            model.uuid,
            {disk.id: disk for disk in disks},
            stamps,
            {disk_id: plan.base for disk_id, plan in plans.items()},
        )
        frozen.confirm()
        description = describe(model, xml, sizes, PowerState.OFF, self._read_nvram(model))
        views = self._disk_views(frozen, disks, sizes, plans, request)
        notices = [*self._notices(domain, model), *(readiness.old_image(disk) for disk in disks if disk.old)]
        machine = LibvirtMachineView(description, consistency, mark, views, notices)
        return LibvirtView(taken_at, machine, frozen)

    def _checkpoint_off(self, domain: libvirt.virDomain, request: ViewRequest, disks: Sequence[DomainDisk]) -> str:
        """Begin tracking in a machine that is off, so that the first cycle after its start sends a delta; "" when it
        cannot be started: then it is compared once more after its start. It is held for about two seconds, once."""
        owner = self._host.settings.owner
        name = str(CheckpointName.make(request.view_id, self._clock(), Consistency.OFFLINE, owner))
        parts = [BackupDisk(disk.id, "", tracked=disk.tracked) for disk in disks]
        try:
            self._hold(domain)
            try:
                notes = ""
                if request.since is not None:  # names the checkpoint before, which may have no tag
                    notes = backup_jobs.Notes.write(LibvirtMark(name, {}), request.since.token, {})
                domain.checkpointCreateXML(backup_xml.checkpoint_xml(name, parts, notes), 0)
            finally:
                self._let_go(domain)
        except (DriverFailed, libvirt.libvirtError) as error:
            _log.warning("no new change tracking in %s while it is off: %s", domain.name(), error)
            return ""
        return name

    # parts

    def _notices(self, domain: libvirt.virDomain, model: DomainModel) -> list[Finding]:
        """Two calls of libvirt in each cycle."""
        others = backup_jobs.checkpoints_of_others(domain, self._of(model.uuid))
        return readiness.notices(domain.snapshotNum(0), others, self._unsure.get(model.uuid, []))

    def _sizes(self, domain: libvirt.virDomain, disks: Sequence[DomainDisk]) -> dict[str, int]:
        return {disk.id: domain.blockInfo(disk.id)[0] for disk in disks}

    def _read_nvram(self, model: DomainModel) -> bytes | None:
        return self._nvram.read(model.nvram) if model.nvram else None

    def _disk_views(
        self,
        frozen: Frozen,
        disks: Sequence[DomainDisk],
        sizes: Mapping[str, int],
        plans: Mapping[str, DiskPlan],
        request: ViewRequest,
    ) -> dict[str, LibvirtDiskView]:
        since = parsed_mark(request)
        known = since.disks if since is not None else {}
        views = {}
        for disk in disks:
            size, before = sizes[disk.id], known.get(disk.id)
            grown_from = before.size if before is not None and before.size < size else None
            views[disk.id] = LibvirtDiskView(frozen, neutral_disk(disk, size), plans[disk.id], grown_from=grown_from)
        return views

    # -- marks

    def keep_marks(self, machine_id: str, keep: Sequence[Mark]) -> None:
        """Releases checkpoints, jobs, held machines and scratch files of this driver that no kept mark needs. A machine
        that is off keeps its checkpoints until it runs or protection ends: libvirt deletes bitmaps of running machines
        only. Raises SiteUnreachable, and MarksLeft if protection ends and something stays."""
        kept = {parsed.checkpoint for mark in keep if (parsed := LibvirtMark.parse(mark)) is not None}
        ours = self._of(machine_id)
        ours.learn(keep)
        with self._host.guard("releasing marks", machine_id):
            domain = self._host.domain(machine_id)
            job = backup_jobs.current_backup(domain) if domain.isActive() else None
            # A kept mark needs its checkpoint, not its view's job: one that no process reads from any more (its engine
            # was killed after the seal) would fill its scratch files until the next view.
            needed = kept & self._host.reading
            found = None if job is None else job.name
            if found is not None and str(found) not in needed and backup_jobs.is_our_backup(domain, found, ours):
                with contextlib.suppress(DriverFailed):
                    backup_jobs.end_backup(self._host, domain, backup_jobs.TIDY_SECONDS)
                job = backup_jobs.current_backup(domain)
            if job is None and domain.isActive():
                stalled.resume(domain, ours.owner)
                holder = paused.holder(domain)
                if holder == ours.owner or (holder == "" and self._is_abandoned(domain)):
                    paused.release(domain, holder)
            sweeps = machine_id not in self._swept or not keep
            names = {found.getName() for found in backup_jobs.our_checkpoints(domain, ours)} if sweeps else set()
            stays: MarksLeft | None = None
            if not keep and not domain.isActive():
                stays = self._end_off(domain)
            if domain.isActive():
                stays = self._release(domain, kept)
            if sweeps:
                self._sweep(domain, "" if job is None or job.name is None else str(job.name), names)
            if stays is not None and not keep:
                raise stays

    def _end_off(self, domain: libvirt.virDomain) -> MarksLeft | None:
        model = parse_domain(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        try:
            off_marks.end_tracking(self._host, domain, model, self._of(model.uuid))
        except MarksLeft as problem:
            return problem
        return None

    def _release(self, domain: libvirt.virDomain, kept: set[str]) -> MarksLeft | None:
        """What stays."""
        stays: dict[str, str] = {}
        for checkpoint in backup_jobs.our_checkpoints(domain, self._of(domain.UUIDString())):
            if checkpoint.getName() in kept:
                continue
            reach("libvirt.release")
            try:
                backup_jobs.delete_checkpoint(checkpoint)
            except libvirt.libvirtError as error:
                _log.warning("checkpoint %s is not deleted yet: %s", checkpoint.getName(), error)
                stays[checkpoint.getName()] = str(error)
                if not domain.isActive():
                    break  # it stopped meanwhile; a later call continues
        if not stays:
            return None
        model = parse_domain(domain.XMLDesc(0))
        detail = "; ".join(stays.values())
        return off_marks.left(self._host, model, list(stays), detail, active=domain.isActive() == 1)

    def _sweep(self, domain: libvirt.virDomain, in_use: str, names: AbstractSet[str]) -> None:
        """`names`: of the vault's checkpoints. Repeated as long as there is something that may be another vault's: a
        later mark or view may name it."""
        model = parse_domain(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE if not domain.isActive() else 0))
        try:
            ours = self._of(model.uuid)
            unsure = scratch.sweep(self._host, model, in_use, lambda name: name in names or ours(name))
        except (OSError, libvirt.libvirtError) as error:
            _log.warning("left-over scratch files of %s cannot be searched: %s", model.name, error)
            unsure = []
        self._unsure[model.uuid] = unsure
        if not unsure:
            self._swept.add(model.uuid)


def _plans_again(request: ViewRequest, notes: tuple[str, str, dict[str, DiskPlan]]) -> dict[str, DiskPlan] | None:
    """Plans of a view that is opened again; None when it was opened from another mark than it is asked from now."""
    mark, since, plans = notes
    if request.since is None:
        return {disk_id: DiskPlan(Tracking.NONE, "no mark was given") for disk_id in plans}
    if request.since.token == mark:
        return {disk_id: DiskPlan(Tracking.CHANGED, unchanged=True) for disk_id in plans}
    return plans if request.since.token == since else None


def _checked(model: DomainModel, machine_id: str) -> list[DomainDisk]:
    """The disks to be read. A disk that cannot be replicated may have been added after protection: then a point
    without it would be no copy of the machine."""
    found = [item for disk in model.hard_disks for item in readiness.disk_findings(disk)]
    errors = [item for item in found if item.severity is Severity.ERROR]
    if errors:
        raise NotReady(machine=machine_id, findings="; ".join(f"{item.code}: {item.what}" for item in errors))
    return list(model.hard_disks)


def _consistency_off(domain: libvirt.virDomain, since: LibvirtMark | None) -> Consistency:
    """OFFLINE only for a machine that was shut down. libvirt reports why it is off, until its daemon restarts; after a
    hold by this driver it says "destroyed", so the mark records it."""
    state, reason = domain.state()
    if state == libvirt.VIR_DOMAIN_SHUTOFF and reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN:
        return Consistency.OFFLINE
    ours = reason in (libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN)
    return Consistency.OFFLINE if ours and since is not None and since.shut_down else Consistency.CRASH


def _all_stamped(disks: Sequence[DomainDisk], since: LibvirtMark, stamp: str) -> bool:
    known = [since.disks.get(disk.id) for disk in disks]
    return all(
        marked is not None and marked.stamp == stamp and marked.path == disk.path
        for marked, disk in zip(known, disks, strict=True)
    )


def _whole_offline(disks: Sequence[DomainDisk], since: LibvirtMark | None) -> set[str]:
    """Disks of a machine that is off, on this host, whose image has the mark's bitmap, whole."""
    if since is None or not since.checkpoint:
        return set()
    whole = set()
    for disk in disks:
        if disk.tracked and disk.id in since.disks and since.disks[disk.id].tracked:
            with contextlib.suppress(QemuError, AsrError):
                if _has_bitmap(Path(disk.path), disk.format, since.checkpoint):
                    whole.add(disk.id)
    return whole


def _has_bitmap(image: Path, fmt: str, name: str) -> bool:
    info = img.info(image, fmt, in_use=True)
    if not any(bitmap.name == name and not bitmap.in_use for bitmap in info.bitmaps):
        return False
    # A snapshot continues the bitmap in its overlay: then only both together have all changes, and qemu-nbd serves one.
    while info.full_backing_file is not None:
        if info.backing_format is None:
            return False
        layer = Path(posixpath.join(image.parent, info.full_backing_file))
        info = img.info(layer, info.backing_format, in_use=True)
        if any(bitmap.name == name for bitmap in info.bitmaps):
            return False
        image = layer
    return True
