"""Machines made of recovery points. Their disks are copies: neither a test nor a failover ever writes to a point.

A machine that the driver made has a file `made-of` in its folder, with the id of its replica. It is built aside and
moved to its place at once, so a machine is there as a whole or not at all.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import attrs

from asr_driver_folder import files
from asr_driver_folder.replica import FolderReplica
from asr_driver_folder.target import FolderTarget
from asrcore.crashpoint import reach
from asrcore.driver import Failover, Instance, PromoteSpec, TestSpec
from asrcore.errors import AlreadyExists, WrongState
from asrcore.model.machine import Machine, PowerState
from asrcore.model.watch import Watch

__all__ = ["FolderFailover"]


def _made_of(folder: Path) -> str:
    made_of = folder / "made-of"
    return made_of.read_text() if made_of.exists() else ""


class FolderFailover(Failover):
    """See `Failover`."""

    def __init__(self, target: FolderTarget) -> None:
        self._target, self._inventory, self._place = target, target.inventory, target.inventory.place

    def _make(self, replica: FolderReplica, point_id: str, machine: Machine, watch: Watch) -> Instance:
        """The machine of a point, in its place; one that is there is left alone."""
        folder, new = self._place.path / machine.id, self._place.ours("new", machine.id)
        if folder.exists() and _made_of(folder) != replica.id:
            raise AlreadyExists(kind="machine", name=machine.id)
        if not folder.exists():
            with self._place.writing(new):
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir(parents=True)
                for disk_id, size in replica.record().point(point_id).stored.disks.items():
                    image = replica.disks(point_id) / f"{disk_id}.raw"
                    files.build(new / image.name, size, (image, files.data(image)))
                    watch.check()
                (new / "made-of").write_text(replica.id)
                files.sync(new / "made-of")
                files.save(new / "machine.json", machine)
                self._place.move(new, folder)
        return Instance(machine.id, machine.name)

    # -- test

    def start_test(self, spec: TestSpec, watch: Watch) -> Instance:
        replica = self._target.replica(spec.replica_id)
        machine = replica.description(spec.point_id).machine
        nics = tuple(attrs.evolve(nic, network=spec.network) for nic in machine.nics)
        machine = attrs.evolve(machine, id=f"test-{spec.test_id}", name=spec.name, nics=nics)
        instance = self._make(replica, spec.point_id, machine, watch)
        reach("folder.test-made")
        self._inventory.power_on(machine.id)
        return instance

    def stop_test(self, replica_id: str, test_id: str) -> None:
        if test_id in self.tests(replica_id):
            self._place.remove(self._place.path / f"test-{test_id}")

    def tests(self, replica_id: str) -> list[str]:
        found = sorted(self._place.path.glob("test-*"))
        return [folder.name.removeprefix("test-") for folder in found if _made_of(folder) == replica_id]

    # -- failover

    def promote(self, spec: PromoteSpec, watch: Watch) -> Instance:
        replica = self._target.replica(spec.replica_id)
        machine = replica.description(spec.point_id).machine
        folder = self._place.path / machine.id
        with replica.change(spec.epoch) as record:
            if record.promoted is None:
                self._refuse_twins(machine)
            elif record.promoted != spec.point_id and _made_of(folder) == replica.id:
                if self._inventory.machine(machine.id).power is not PowerState.OFF:
                    why, event = "What it wrote would be lost.", "be replaced by another point"
                    raise WrongState(machine=machine.id, event=event, state="running", reason=why, possible="stop it")
                self._place.remove(folder)
            record.promoted = spec.point_id
        reach("folder.promotion-recorded")
        if folder.exists() and _made_of(folder) != replica.id:  # it is fenced: it was looked at before the record
            with self._place.writing(folder):
                self._place.move(folder, self._aside(replica, folder))
        reach("folder.twin-aside")
        nics = tuple(attrs.evolve(nic, network=spec.networks.target(nic.network)) for nic in machine.nics)
        return self._make(replica, spec.point_id, attrs.evolve(machine, nics=nics), watch)

    def _refuse_twins(self, machine: Machine) -> None:
        for other in self._inventory.machines():
            twin = other.id == machine.id or other.name == machine.name
            if twin and self._inventory.fenced(other.id) is None:
                raise AlreadyExists(kind="machine", name=other.name)

    def _aside(self, replica: FolderReplica, folder: Path) -> Path:
        return self._place.ours("aside", f"{folder.name}@{replica.id}")

    def undo(self, replica_id: str, epoch: int) -> None:
        replica = self._target.replica(replica_id)
        with replica.change(epoch) as record:
            if record.promoted is None:
                return
            folder = self._place.path / record.point(record.promoted).description.machine.id
            if _made_of(folder) == replica_id:  # else an undo that was killed has brought back the former machine
                self._place.remove(folder)
            reach("folder.promoted-removed")
            aside = self._aside(replica, folder)
            if aside.exists():
                self._place.move(aside, folder)
            reach("folder.twin-back")
            record.promoted = None

    def commit(self, replica_id: str, epoch: int, watch: Watch) -> None:
        if replica_id not in self._target.replicas():
            return  # deleted by a commit that was killed before it returned
        replica = self._target.replica(replica_id)
        replica.raise_epoch(epoch)
        record = replica.record()
        if record.promoted is None:
            why, possible = "No machine was made of its points.", "fail over first"
            raise WrongState(machine=record.name, event="commit", state="protected", reason=why, possible=possible)
        for test_id in self.tests(replica_id):
            self.stop_test(replica_id, test_id)
        aside = self._aside(replica, self._place.path / record.point(record.promoted).description.machine.id)
        if _made_of(aside):  # made by an earlier failover; the disks that the user made stay in `.asr/aside`
            self._place.remove(aside)
        reach("folder.twin-removed")
        self._target.delete_replica(replica_id, epoch)
