"""The kit: recovery points of a replica, its disks, seeds, and its end."""

from __future__ import annotations

import hashlib

import attrs
import pytest

from asrcore.driver import Capability, Examination
from asrcore.errors import PointNotFound, ReplicaNotFound
from asrcore.model.extent import Extent
from asrcore.model.finding import Finding
from asrcore.model.machine import Disk, Firmware, Machine
from asrcore.model.policy import Policy
from asrcore.testing.conformance._base import needs, new_id
from asrcore.testing.conformance._cycles import TARGET, TargetBase
from asrcore.testing.conformance._target_bench import Data, TargetBench, Zero, noise
from asrcore.testing.conformance.rig import ConformanceRig
from asrcore.units import KiB, MiB

__all__ = ["PointConformance"]


def _examined(target: TargetBench, point_id: str, limit: int | None = None) -> Examination:
    """All of a point, in parts."""
    found = total = target.replica.examine(point_id, start=0, limit=limit)
    while found.end is not None:
        start = found.end
        found = target.replica.examine(point_id, start=start, limit=limit)
        assert found.end is None or found.end > start
        total = Examination(
            (*total.damage, *found.damage), total.read + found.read, total.proved + found.proved, found.end
        )
    return total


class PointConformance(TargetBase):
    """Points keep their content, description and disks, whatever happens to other points."""

    @needs(target=[TARGET])
    def test_a_kept_point_keeps_its_content(self, target: TargetBench) -> None:
        target.first_points("p1", "p2", "p3")
        target.cycle("p4", Zero(target.first, 0, 3 * MiB), Zero(target.second, 0, MiB))
        assert target.points == ["p1", "p2", "p3", "p4"]
        target.check()
        target.rig.restart()
        target.check()

    @needs(target=[TARGET])
    def test_a_head_that_is_not_kept_is_replaced(self, target: TargetBench) -> None:
        target.first_points("p1")
        target.cycle("p2", Data(target.first, 0, noise(64 * KiB)), keep=False)
        assert target.points == ["p1", "p2"]
        assert [point.kept for point in target.replica.info().points] == [True, False]
        target.check()
        target.cycle("p3", Data(target.first, 64 * KiB, noise(64 * KiB)), keep=False)
        assert target.points == ["p1", "p3"]
        target.check()
        target.cycle("p4", Data(target.first, MiB, noise(64 * KiB)))
        target.cycle("p5", keep=False)
        assert target.points == ["p1", "p4", "p5"]
        target.check()
        target.check_head()

    @needs(target=[TARGET])
    @pytest.mark.parametrize("dropped", [["p1"], ["p2"], ["p3"], ["p1", "p2"], ["p2", "p3"], ["p1", "p2", "p3"]])
    def test_dropping_keeps_the_others(self, target: TargetBench, dropped: list[str]) -> None:
        target.first_points("p1", "p2", "p3", "p4")
        for _ in range(2):
            target.replica.drop_points(dropped, 1)
            assert target.points == [point for point in ("p1", "p2", "p3", "p4") if point not in dropped]
            target.check()
        target.cycle("p5", Data(target.first, 0, noise(MiB)))
        target.rig.restart()
        target.check()
        target.check_head()

    @needs(target=[TARGET])
    def test_the_head_is_not_dropped(self, target: TargetBench) -> None:
        target.first_points("p1", "p2")
        target.replica.drop_points(["p1", "p2", "no-such-point"], 1)
        assert target.points == ["p2"]
        target.check()
        target.check_head()

    @needs(target=[TARGET])
    def test_a_pinned_point_is_not_dropped(self, target: TargetBench) -> None:
        target.first_points("p1", "p2", "p3")
        for _ in range(2):
            target.replica.pin("p1", True)
        assert [point.pinned for point in target.replica.info().points] == [True, False, False]
        target.replica.drop_points(["p1", "p2"], 1)
        assert target.points == ["p1", "p3"]
        target.check()
        target.replica.pin("p1", False)
        target.replica.drop_points(["p1"], 1)
        assert target.points == ["p3"]
        target.check()

    @needs(target=[TARGET])
    def test_a_pinned_head_is_not_replaced(self, target: TargetBench) -> None:
        target.first_points("p1")
        target.cycle("p2", Data(target.first, 0, noise(64 * KiB)), keep=False)
        target.replica.pin("p2", True)
        target.cycle("p3", Data(target.first, 0, noise(64 * KiB)))
        assert target.points == ["p1", "p2", "p3"]
        target.check()

    @needs(target=[TARGET])
    def test_each_point_has_its_description(self, target: TargetBench) -> None:
        target.first_points("p1", "p2", "p3")
        target.replica.drop_points(["p2"], 1)
        target.rig.restart()
        for point_id in ("p1", "p3"):
            assert target.replica.description(point_id) == target.descriptions[point_id]

    @needs(target=[TARGET])
    def test_an_unknown_point_is_not_found(self, target: TargetBench) -> None:
        target.first_points("p1")
        with pytest.raises(PointNotFound):
            target.replica.description("no-such-point")
        with pytest.raises(PointNotFound):
            target.replica.examine("no-such-point")
        with pytest.raises(PointNotFound):
            target.replica.pin("no-such-point", True)
        with pytest.raises(PointNotFound):
            target.replica.reader(target.first, "no-such-point").close()

    # -- damage

    @needs(target=[TARGET])
    def test_a_whole_point_is_found_whole(self, target: TargetBench) -> None:
        target.first_points("p1", "p2")
        target.cycle("p3", Data(target.first, 512, noise(4 * KiB)), Zero(target.second, 0, 64 * KiB), keep=False)
        for point_id in target.points:
            assert target.replica.examine(point_id).damage == ()
            found = _examined(target, point_id)
            assert found.damage == ()
            assert found.proved <= sum(target.sizes.values())
        target.replica.drop_points(["p1"], 1)
        target.rig.restart()
        for point_id in target.points:
            assert _examined(target, point_id).damage == ()
        target.check()

    @needs(target=[TARGET])
    def test_an_examination_may_be_divided(self, target: TargetBench) -> None:
        target.first_points("p1")
        whole = target.replica.examine("p1", start=0)
        assert whole.end is None
        parts = _examined(target, "p1", limit=192 * KiB)
        assert (parts.damage, parts.read) == (whole.damage, whole.read)
        assert parts.proved >= whole.proved  # the first examination may have recorded what was not known

    @needs(target=[TARGET])
    def test_damage_of_a_point_is_found(self, target: TargetBench) -> None:
        last = sorted(target.sizes)[-1]
        start = (target.sizes[last] - 1) // (64 * KiB) * 64 * KiB  # content that the point's own cycle wrote
        target.cycle("p1", Data(last, start, noise(target.sizes[last] - start)))
        target.cycle("p2", Data(target.first, 0, noise(64 * KiB)))
        target.rig.damage_point(target.id, "p1", last, target.sizes[last] - 1)
        for limit in (None, 192 * KiB):
            found = _examined(target, "p1", limit=limit)
            assert found.damage
            assert all(last in text for text in found.damage)

    @needs(target=[TARGET])
    def test_a_mark_of_damage_changes_nothing_else(self, target: TargetBench) -> None:
        target.first_points("p1", "p2")
        before = target.replica.info()
        for text in ("a block is lost", "", "a block is lost"):
            target.replica.mark_damaged("p1", text)
        target.rig.restart()
        marked = target.replica.info().points
        assert marked[0].damaged in ("a block is lost", "")  # a driver may leave it to the engine to keep it
        assert tuple(attrs.evolve(point, damaged="") for point in marked) == before.points
        target.check()
        target.replica.mark_damaged("p1", "")
        assert target.replica.info() == before

    @needs(target=[TARGET])
    def test_recorded_digests_are_those_of_the_head(self, target: TargetBench) -> None:
        target.first_points("p1", "p2")
        target.cycle("p3", Data(target.first, 512, noise(4 * KiB)), Zero(target.second, 0, 100 * KiB), keep=False)
        for disk_id, size in target.sizes.items():
            expected = target.expected["p3"][disk_id]
            assert target.replica.from_records().digests(disk_id, Extent(0, size)) == expected
            assert target.replica.from_records().compare(disk_id, Extent(0, size), expected) == []

    # -- disks that come and go

    @needs(target=[TARGET])
    def test_a_disk_may_come(self, target: TargetBench) -> None:
        target.first_points("p1")
        sizes = target.sizes | {"new": MiB}
        target.cycle("p2", Data("new", 64 * KiB, noise(64 * KiB)), sizes=sizes)
        assert dict(target.replica.info().disks) == sizes
        assert dict(target.replica.info().points[0].disks) == target.sizes
        target.check()

    @needs(target=[TARGET])
    def test_a_disk_may_go(self, target: TargetBench) -> None:
        target.first_points("p1")
        sizes = {target.first: target.sizes[target.first]}
        target.cycle("p2", Data(target.first, 0, noise(64 * KiB)), sizes=sizes)
        info = target.replica.info()
        assert dict(info.disks) == sizes
        assert [dict(point.disks) for point in info.points] == [target.sizes, sizes]
        target.check()

    @needs(target=[TARGET])
    def test_a_disk_may_grow(self, target: TargetBench) -> None:
        target.cycle("p1", Data(target.first, 0, noise(target.sizes[target.first])))
        sizes = target.sizes | {target.first: target.sizes[target.first] + 2 * MiB}
        target.cycle("p2", Data(target.first, target.sizes[target.first] + MiB, noise(64 * KiB)), sizes=sizes)
        info = target.replica.info()
        assert dict(info.disks) == sizes
        assert [dict(point.disks) for point in info.points] == [target.sizes, sizes]
        target.check()
        target.replica.drop_points(["p1"], 1)
        target.check()

    # -- the target

    @needs(target=[TARGET])
    def test_findings_are_findings(self, target: TargetBench) -> None:
        for item in target.target.findings(target.description("findings"), Policy("conformance")):
            assert isinstance(item, Finding)

    @needs(target=[TARGET])
    def test_capacity_makes_sense(self, target: TargetBench) -> None:
        capacity = target.target.capacity()
        if capacity.total is not None and capacity.free is not None:
            assert 0 < capacity.free <= capacity.total

    @needs(target=[TARGET])
    def test_a_deleted_replica_is_gone(self, target: TargetBench) -> None:
        target.first_points("p1", "p2")
        for _ in range(2):
            target.target.delete_replica(target.id, 1)
            assert target.id not in target.target.replicas()
            with pytest.raises(ReplicaNotFound):
                target.target.replica(target.id).info()

    @needs(target=[TARGET])
    def test_an_unknown_replica_is_not_found(self, target: TargetBench) -> None:
        with pytest.raises(ReplicaNotFound):
            target.target.replica("no-such-replica").info()

    @needs(target=[TARGET, Capability.SEED])
    def test_a_seed_is_the_first_content(self, rig: ConformanceRig) -> None:
        disks = tuple(Disk(disk_id, size) for disk_id, size in rig.disk_sizes.items())
        machine = Machine(new_id("seed"), new_id("seed"), 1, 64 * MiB, Firmware.BIOS, disks)
        seed = rig.make_target_machine(machine)
        try:
            before = {disk.id: rig.target_sha256(seed, disk.id) for disk in disks}
            target = TargetBench(rig, seed_machine=seed)
            try:
                assert target.replica.info().points == ()
                for disk_id, size in target.sizes.items():
                    content = bytearray(size)
                    with target.replica.reader(disk_id) as reader:
                        reader.read_into(0, memoryview(content))
                    assert hashlib.sha256(content).hexdigest() == before[disk_id]
                    target.head[disk_id] = bytes(content)
                target.cycle("p1", Data(target.first, 0, noise(64 * KiB)))
                target.check()
                assert {disk.id: rig.target_sha256(seed, disk.id) for disk in disks} == before
            finally:
                target.close()
        finally:
            rig.remove_target_machine(seed)
