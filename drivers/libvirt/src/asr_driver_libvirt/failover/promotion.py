"""Failovers: the machine of a recovery point under its own name, undo, and commit.

`promotion.json` in the replica's directory is written before anything is changed at the site and deleted last, so that
each of the three can be repeated after a crash. It keeps what had the machine's identity before.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import attrs
import libvirt

from asr_driver_libvirt.failover import flatten
from asr_driver_libvirt.failover.instances import (
    Platform,
    disks_of,
    disks_of_domain,
    hold,
    make_images,
    of_point,
    released,
    write_nvram,
)
from asr_driver_libvirt.xml import instance
from asr_driver_libvirt.xml.domain import FENCE_URI, fence_from_xml, parse_domain, parse_xml
from asr_storage.files.durable import fsync_directory, remove_tree, write_durably
from asr_storage.replica.replica import FileReplica
from asr_storage.replica.store import Home, Layout, Record, ReplicaKind
from asrcore import codec
from asrcore.crashpoint import reach
from asrcore.driver import Instance, PromoteSpec
from asrcore.errors import AlreadyExists, StaleEpoch, WrongState
from asrcore.model.protection import NetworkMap
from asrcore.model.watch import Watch

__all__ = ["Phase", "Promotion", "commit", "load", "promote", "undo"]

_log = logging.getLogger(__name__)
_HOLDER = "promotion"


class Phase(Enum):
    """The phase of a promotion."""

    MAKING = "making"
    """The machine may exist or not."""
    MADE = "made"
    """The machine is defined; it may have run."""
    UNDOING = "undoing"
    """The machine is being removed; what was put aside is restored."""
    COMMITTING = "committing"
    """The commit has begun and cannot be undone."""


@attrs.frozen
class Promotion:
    """A failover that is not committed. `aside`: the definition that had the identity before, with its fence."""

    phase: Phase
    point_id: str
    machine_id: str
    name: str
    directory: str
    networks: Mapping[str, str]
    aside: str | None = None
    aside_autostart: bool = False


def load(home: Home) -> Promotion | None:
    """The promotion under way, or None."""
    try:
        return codec.load(Promotion, home.promotion.read_bytes())
    except FileNotFoundError:
        return None


def _save(home: Home, promotion: Promotion) -> Promotion:
    write_durably(home.promotion, codec.dump(promotion))
    return promotion


def _own(replica: FileReplica, record: Record, epoch: int) -> Record:
    """Raises StaleEpoch; a higher epoch is from now on the replica's."""
    if epoch < record.epoch:
        raise StaleEpoch(replica=replica.replica_id, epoch=epoch, owner=record.epoch)
    if epoch > record.epoch:
        record = attrs.evolve(record, epoch=epoch)
        replica.home.save(record)
    return record


# -- promote -----------------------------------------------------------------------------------------------------


def promote(platform: Platform, layout: Layout, replica: FileReplica, spec: PromoteSpec, watch: Watch) -> Instance:
    """See Failover.promote."""
    with replica.working("promoting a replica") as found:
        record = _own(replica, found, spec.epoch)
        point = of_point(record, spec.point_id)
        description = replica.home.description(spec.point_id)
        source = platform.domain_xml(description)
        model = parse_domain(source)
        promotion = load(replica.home)
        if promotion is not None and promotion.phase is Phase.COMMITTING:
            raise _refused(promotion.name, "be promoted again", "being committed", "It cannot be undone.", "commit")
        if promotion is not None and promotion.phase is Phase.UNDOING:
            _take_back(platform, replica, record, promotion)
            promotion, record = None, replica.home.load()
        if promotion is not None and _is_made(platform, promotion, spec):
            return Instance(promotion.machine_id, promotion.name)
        if promotion is not None and promotion.phase is Phase.MADE:
            _remove_machine(platform, replica.replica_id, promotion, only_stopped=True)
        if promotion is None:
            aside, autostart = _in_the_way(platform, model.uuid, model.name)
            directory = layout.machine(model.name, replica.replica_id)
            promotion = Promotion(
                phase=Phase.MAKING,
                point_id=spec.point_id,
                machine_id=model.uuid,
                name=model.name,
                directory=str(directory),
                networks=dict(spec.networks.networks),
                aside=aside,
                aside_autostart=autostart,
            )
        else:
            promotion = attrs.evolve(
                promotion,
                phase=Phase.MAKING,
                point_id=spec.point_id,
                name=model.name,
                networks=dict(spec.networks.networks),
            )
        _save(replica.home, promotion)
        reach("failover.promote.begun")
        watch.check()
        record = hold(replica, record, _HOLDER, point)
        reach("failover.promote.held")
        directory = Path(promotion.directory)
        remove_tree(directory)
        directory.mkdir(0o711)
        fsync_directory(directory.parent)
        images = make_images(replica, record, _HOLDER, point, directory, own=True)
        nvram = write_nvram(description, directory)
        reach("failover.promote.images")
        xml = instance.promoted(
            source,
            made=instance.Made(replica.replica_id, spec.point_id, "promotion"),
            disks=disks_of_domain(description, images),
            nvram=nvram,
            networks=NetworkMap(promotion.networks),
            known_networks=platform.network_names(),
            exists=os.path.exists,
        )
        watch.check()
        there = platform.find(promotion.machine_id)
        if there is not None:
            _check_replaceable(platform, there, replica.replica_id, promotion)
            platform.undefine(there, tpm=False)
            reach("failover.promote.put-aside")
        platform.define(xml)
        reach("failover.promote.defined")
        _save(replica.home, attrs.evolve(promotion, phase=Phase.MADE))
        reach("failover.promote.done")
        return Instance(promotion.machine_id, promotion.name)


def _is_made(platform: Platform, promotion: Promotion, spec: PromoteSpec) -> bool:
    same = promotion.point_id == spec.point_id and promotion.networks == dict(spec.networks.networks)
    if promotion.phase is not Phase.MADE or not same:
        return False
    there = platform.find(promotion.machine_id)
    made = platform.made(there) if there is not None else None
    return made is not None and made.replica_id == spec.replica_id and made.role == "promotion"


def _in_the_way(platform: Platform, machine_id: str, name: str) -> tuple[str | None, bool]:
    """The fenced definition that has the identity now. Raises AlreadyExists, WrongState for any other machine."""
    namesake = platform.find_name(name)
    if namesake is not None and namesake.UUIDString() != machine_id:
        raise AlreadyExists(kind="machine", name=name)
    there = platform.find(machine_id)
    if there is None:
        return None, False
    xml = platform.definition(there)
    if not _fenced(xml):
        raise AlreadyExists(kind="machine", name=name)
    if platform.running(there):
        raise _refused(name, "be put aside", "running", "It is quarantined but running.", "stop it first")
    return xml, platform.autostarts(there)


def _fenced(xml: str) -> bool:
    found = parse_xml(xml).iterfind(f"metadata/{{{FENCE_URI}}}fence")
    return any(fence_from_xml(instance.element_text(element)) is not None for element in found)


def _check_replaceable(platform: Platform, domain: libvirt.virDomain, replica_id: str, promotion: Promotion) -> None:
    """What is about to be undefined must be the driver's own, or what was recorded as put aside."""
    made = platform.made(domain)
    ours = made is not None and made.replica_id == replica_id and made.role == "promotion"
    if not ours and promotion.aside is None:
        raise AlreadyExists(kind="machine", name=promotion.name)
    if platform.running(domain):
        raise _refused(promotion.name, "be replaced", "running", "Its writes would be lost.", "stop it first")


def _remove_machine(platform: Platform, replica_id: str, promotion: Promotion, *, only_stopped: bool) -> None:
    """Undefine the machine that was created from this replica; any other machine with that UUID is left alone."""
    there = platform.find(promotion.machine_id)
    made = platform.made(there) if there is not None else None
    if there is None or made is None or made.replica_id != replica_id or made.role != "promotion":
        return
    if only_stopped and platform.running(there):
        reason = "What it has written since the failover would be lost."
        raise _refused(promotion.name, "be replaced by another point", "running", reason, "stop it first")
    platform.remove(there, tpm=False)


def _refused(machine: str, event: str, state: str, reason: str, possible: str) -> WrongState:
    return WrongState(machine=machine, event=event, state=state, reason=reason, possible=possible)


# -- undo --------------------------------------------------------------------------------------------------------


def undo(platform: Platform, replica: FileReplica, epoch: int) -> None:
    """See Failover.undo."""
    with replica.working("undoing a failover") as found:
        record = _own(replica, found, epoch)
        promotion = load(replica.home)
        if promotion is None:
            return
        if promotion.phase is Phase.COMMITTING:
            raise _refused(
                promotion.name,
                "have its failover undone",
                "being committed",
                "Its recovery points are being deleted.",
                "commit",
            )
        promotion = _save(replica.home, attrs.evolve(promotion, phase=Phase.UNDOING))
        reach("failover.undo.begun")
        _take_back(platform, replica, record, promotion)


def _take_back(platform: Platform, replica: FileReplica, record: Record, promotion: Promotion) -> None:
    _remove_machine(platform, replica.replica_id, promotion, only_stopped=False)
    reach("failover.undo.undefined")
    if promotion.aside is not None and platform.find(promotion.machine_id) is None:
        domain = platform.define(promotion.aside)
        if promotion.aside_autostart:
            platform.set_autostart(domain)
    reach("failover.undo.restored")
    remove_tree(Path(promotion.directory))
    reach("failover.undo.removed")
    released(replica, record, _HOLDER)
    replica.home.promotion.unlink(missing_ok=True)
    fsync_directory(replica.home.path)
    reach("failover.undo.done")


# -- commit ------------------------------------------------------------------------------------------------------


def commit(platform: Platform, layout: Layout, replica: FileReplica, epoch: int, watch: Watch) -> None:
    """See Failover.commit. May take long with `chain`: it can be cancelled and repeated while the machine runs."""
    with replica.working("committing a failover") as found:
        record = _own(replica, found, epoch)
        promotion = load(replica.home)
        if promotion is None or promotion.phase in (Phase.MAKING, Phase.UNDOING):
            raise _refused(record.name, "be committed", "not failed over", "No machine was created.", "fail over first")
        domain = platform.find(promotion.machine_id)
        if domain is None:
            reason = "Its definition was removed at the site; only the recovery points are left."
            raise _refused(promotion.name, "be committed", "missing", reason, "undo the failover")
        promotion = _save(replica.home, attrs.evolve(promotion, phase=Phase.COMMITTING))
        reach("failover.commit.begun")
        if record.kind is ReplicaKind.CHAIN:
            flatten.flatten(platform, domain, Path(promotion.directory), watch, threading.Event())
        reach("failover.commit.flattened")
        _remove_superseded(layout, promotion)
        reach("failover.commit.superseded-removed")
        platform.unmark(domain, instance.MADE_URI)
        remove_tree(replica.home.path)
    reach("failover.commit.done")


def _remove_superseded(layout: Layout, promotion: Promotion) -> None:
    """Delete the disks that an earlier failover created for the machine; the user's own disks are kept."""
    if promotion.aside is None:
        return
    mine = Path(promotion.directory)
    still_used = set(disks_of(promotion.aside).values())
    for path in sorted(still_used):
        directory = _our_directory(layout, path)
        if directory is None:
            _log.info("disk %s of the machine before the failover is not deleted", path)
        elif directory != mine:
            remove_tree(directory)


def _our_directory(layout: Layout, path: str) -> Path | None:
    """The machine's directory that a disk is in, if the driver created it."""
    try:
        parts = Path(os.path.realpath(path)).relative_to(os.path.realpath(layout.machines)).parts
    except ValueError:
        return None
    return layout.machines / parts[0] if len(parts) == 2 else None
