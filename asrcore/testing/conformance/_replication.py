"""The kit: source and target together; content equals the frozen source, however it was sent.

Invariant 6 in docs/explanation/architecture.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from asrcore.driver import Capability, CycleSpec, CycleWriter, DiskView, Replica, ReplicaSpec, SealSpec, Tracking
from asrcore.model.extent import Extent, split, subtract, total
from asrcore.model.watch import Watch
from asrcore.testing.conformance._base import Base, SourceBench, needs, new_id, target_of
from asrcore.testing.conformance.copying import delta_copy, full_copy, verify
from asrcore.testing.conformance.rig import ConformanceRig
from asrcore.units import KiB

__all__ = ["ReplicationConformance"]

SOURCE, TRACKING, TARGET = Capability.SOURCE, Capability.TRACKING, Capability.TARGET


class ReplicationConformance(Base):
    """The rig's machine into a replica."""

    @pytest.fixture
    def replica_id(self, rig: ConformanceRig, bench: SourceBench) -> Iterator[str]:
        """A new replica for the rig's machine."""
        replica_id = new_id("replica")
        with bench.open() as view:
            description = bench.of(view).description
        target_of(rig).target.create_replica(ReplicaSpec(replica_id, "conformance", 1, description), Watch())
        yield replica_id
        target_of(rig).target.delete_replica(replica_id, 1)

    def _replica(self, rig: ConformanceRig, replica_id: str) -> Replica:
        return target_of(rig).target.replica(replica_id)

    @needs(source=[SOURCE], target=[TARGET])
    def test_a_full_copy_is_equal(self, rig: ConformanceRig, bench: SourceBench, replica_id: str) -> None:
        with bench.open() as view, bench.unmoved(view):
            sent = full_copy(view, rig.machine_id, self._replica(rig, replica_id), "p1")
            verify(view, rig.machine_id, self._replica(rig, replica_id))
            assert sent.point.consistency is bench.of(view).consistency
            assert self._replica(rig, replica_id).description("p1") == bench.of(view).description

    @needs(source=[SOURCE, TRACKING], target=[TARGET])
    def test_deltas_are_equal(self, rig: ConformanceRig, bench: SourceBench, replica_id: str) -> None:
        replica = self._replica(rig, replica_id)
        with bench.open() as view:
            full_copy(view, rig.machine_id, replica, "p0")
            mark = bench.of(view).mark
        for number in range(1, 4):
            rig.change(rig.machine_id)
            with bench.open(mark) as view:
                rig.change(rig.machine_id)
                with bench.unmoved(view):
                    delta_copy(view, rig.machine_id, replica, f"p{number}")
                    verify(view, rig.machine_id, replica)
                mark = bench.of(view).mark
            assert mark is not None
            bench.source.keep_marks(rig.machine_id, [mark])

    def _send(self, disk: DiskView, writer: CycleWriter, extents: Iterable[Extent]) -> None:
        with disk.reader() as reader:
            for piece in split(extents, 64 * KiB):
                data = memoryview(bytearray(piece.length))
                reader.read_into(piece.offset, data)
                writer.write(disk.disk.id, piece.offset, data)

    @needs(source=[SOURCE], target=[TARGET])
    def test_an_interrupted_copy_goes_on(self, rig: ConformanceRig, bench: SourceBench, replica_id: str) -> None:
        """The engine is killed in the middle of a copy: what was flushed is not read again, and the result is equal."""
        view_id = new_id("view")
        view = bench.open(view_id=view_id)
        machine, taken_at = bench.of(view), view.taken_at
        sizes = {disk_id: disk.disk.size for disk_id, disk in machine.disks.items()}
        spec = CycleSpec("c1", 1, None, sizes)
        writer = self._replica(rig, replica_id).open_cycle(spec)
        for disk in machine.disks.values():
            self._send(disk, writer, [Extent(0, disk.disk.size // 1024 * 512)])
        writer.flush()
        bench.forget(view)
        rig.abandon(writer)
        rig.restart()

        view = bench.open(view_id=view_id)
        if view.taken_at != taken_at:
            pytest.skip("the view did not survive the engine")
        machine = bench.of(view)
        with bench.unmoved(view), self._replica(rig, replica_id).open_cycle(spec) as writer:
            for disk_id, disk in machine.disks.items():
                rest = subtract([Extent(0, disk.disk.size)], writer.done(disk_id))
                assert total(rest) <= disk.disk.size // 2 + 64 * KiB, "flushed data is not reported as done"
                self._send(disk, writer, rest)
            while rounds := {disk: again for disk, again in view.settle().get(rig.machine_id, {}).items() if again}:
                for disk_id, again in rounds.items():
                    self._send(machine.disks[disk_id], writer, again)
            view.confirm()
            writer.seal(SealSpec("p1", view.taken_at, machine.consistency, True, machine.description))
            verify(view, rig.machine_id, self._replica(rig, replica_id))

    @needs(source=[SOURCE, TRACKING], target=[TARGET])
    def test_after_a_loss_only_differences_travel(
        self, rig: ConformanceRig, bench: SourceBench, replica_id: str
    ) -> None:
        replica = self._replica(rig, replica_id)
        with bench.open() as view:
            full_copy(view, rig.machine_id, replica, "p1")
            mark = bench.of(view).mark
        rig.change(rig.machine_id)
        rig.lose_tracking(rig.machine_id)
        with bench.open(mark) as view, bench.unmoved(view):
            disks = bench.of(view).disks.values()
            assert Tracking.CHANGED not in {disk.tracking for disk in disks}
            sent = delta_copy(view, rig.machine_id, replica, "p2")
            verify(view, rig.machine_id, replica)
            assert 0 < sent.data + sent.zeroed < sum(disk.disk.size for disk in disks) / 2
            assert sent.same > 0
