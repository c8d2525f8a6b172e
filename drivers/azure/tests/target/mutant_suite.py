"""The kit against broken variants of this driver. Not collected directly: `test_mutants` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from asr_driver_azure.blobs import pageblob, record, uploader, vhd
from asr_driver_azure.target import replica, writer
from asrcore.testing.conformance import CycleConformance, PointConformance
from drivers.azure.tests.peers.storage import Storage
from drivers.azure.tests.target import test_replica
from drivers.azure.tests.target.rig import TargetRig


class Mutant:
    """A broken driver: the patch of `broken` applies to the whole class."""

    def broken(self, patch: pytest.MonkeyPatch) -> None:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _break(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken(monkeypatch)


class Kit(Mutant, CycleConformance, PointConformance):
    @pytest.fixture
    def rig(self, storage: Storage) -> Iterator[TargetRig]:
        with TargetRig(storage) as rig:
            yield rig


class TestNoFooter(Kit):
    def broken(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(vhd, "footer", lambda size, identity: bytes(512))

    def test_a_blob_is_a_disk(self, rig: TargetRig, target: Any, tmp_path: Path) -> None:
        test_replica.test_a_blob_is_a_disk_that_qemu_reads(rig, target, tmp_path)


class TestZerosSkippedOnADirtyBlob(Kit):
    def broken(self, patch: pytest.MonkeyPatch) -> None:
        def zero(self: writer.AzureWriter, disk_id: str, offset: int, length: int) -> None:
            self._note(disk_id, offset, length)

        patch.setattr(writer.AzureWriter, "zero", zero)


class TestFullListTakenForADiff(Kit):
    def broken(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(pageblob.PageBlob, "changed", lambda self, since, size: self.stored(size))

    def test_zeroes_are_put_back(self, target: Any) -> None:
        test_replica.test_zeroes_of_a_discarded_cycle_are_put_back(target)


class TestPointBeforeItsAcknowledgement(Kit):
    """The record has the point before Azure has acknowledged the snapshots; it is completed afterwards. This is correct
    unless the engine dies in between."""

    def broken(self, patch: pytest.MonkeyPatch) -> None:
        seal, take = writer.AzureWriter.seal, writer.AzureWriter._snapshot
        patch.setattr(writer.AzureWriter, "_snapshot", lambda self, disk: "2030-01-01T00:00:00.0000000Z")

        def early(self: writer.AzureWriter, spec: Any) -> Any:
            point = seal(self, spec)
            taken = {disk_id: take(self, disk) for disk_id, disk in self._disks.items()}

            def complete(kept: record.Record) -> record.Record:
                disks = {
                    disk_id: attrs.evolve(disk, snapshot=taken[disk_id])
                    for disk_id, disk in kept.points[-1].disks.items()
                }
                return attrs.evolve(kept, points=(*kept.points[:-1], attrs.evolve(kept.points[-1], disks=disks)))

            self._container.change(self._id, self._site, complete)
            return point

        patch.setattr(writer.AzureWriter, "seal", early)

    def test_a_recorded_point_is_whole(self, rig: TargetRig, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        test_replica.test_a_recorded_point_is_whole(rig, target, monkeypatch, "sealed")


class TestFlushBeforeTheAcknowledgement(Kit):
    """Data in flight count as done."""

    def broken(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(uploader.Uploader, "drain", lambda self: None)


class TestEpochIgnored(Kit):
    def broken(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(record.Record, "own", lambda self, epoch: None)
        for module in (replica, writer):
            patch.setattr(module, "lease_of", lambda replica_id, epoch: record.lease_of(replica_id, 0))
