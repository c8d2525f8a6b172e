"""The kit: machines made from recovery points."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import pytest

from asrcore.driver import (
    Capability,
    CycleSpec,
    Failover,
    Fence,
    Instance,
    Promoted,
    PromoteSpec,
    Replica,
    ReplicaSpec,
    Target,
    TestSpec,
    ViewRequest,
)
from asrcore.errors import MachineNotFound, PointNotFound, ReplicaNotFound, ReplicaPromoted, StaleEpoch
from asrcore.model.finding import Severity
from asrcore.model.machine import Machine, PowerState
from asrcore.model.point import Consistency
from asrcore.model.protection import NetworkMap
from asrcore.model.watch import Watch
from asrcore.testing.conformance._base import FREEZE_LIMIT, Base, SourceBench, needs, new_id, target_of, wait_for_power
from asrcore.testing.conformance.copying import delta_copy, differences, fingerprint, full_copy, replica_fingerprint
from asrcore.testing.conformance.rig import ConformanceRig

__all__ = ["FailoverConformance"]

SOURCE, TARGET, FAILOVER = Capability.SOURCE, Capability.TARGET, Capability.FAILOVER
POWER, FENCE = Capability.POWER, Capability.FENCE


class _Protected:
    """A replica of the rig's machine."""

    def __init__(self, rig: ConformanceRig) -> None:
        self.rig = rig
        self.id = new_id("replica")
        self._tests: list[str] = []
        source = SourceBench(rig)
        try:
            with source.open() as view:
                description = source.of(view).description
                spec = ReplicaSpec(self.id, description.machine.name, 1, description)
                self.target.create_replica(spec, Watch())
                full_copy(view, rig.machine_id, self.replica, new_id("point"))
        finally:
            source.close()
        self.add_point()

    @property
    def target(self) -> Target:
        return target_of(self.rig).target

    @property
    def failover(self) -> Failover:
        return target_of(self.rig).failover

    @property
    def replica(self) -> Replica:
        return self.target.replica(self.id)

    @property
    def points(self) -> list[str]:
        """Ids, oldest first; at least two."""
        return [point.id for point in self.replica.info().points]

    def machine(self, point_id: str) -> Machine:
        """The machine as it was at a point."""
        return self.replica.description(point_id).machine

    def add_point(self) -> str:
        """One more cycle, by comparison or delta."""
        point_id = new_id("point")
        source = SourceBench(self.rig)
        try:
            self.rig.change(self.rig.machine_id)
            with source.open(consistency=Consistency.CRASH) as view:
                delta_copy(view, self.rig.machine_id, self.replica, point_id)
        finally:
            source.close()
        return point_id

    def content(self) -> dict[tuple[str, str], bytes]:
        """Digests of every disk of every point."""
        replica = self.replica
        return {
            (point.id, disk_id): replica_fingerprint(replica, disk_id, size, point.id)
            for point in replica.info().points
            for disk_id, size in point.disks.items()
        }

    def higher_epoch(self) -> int:
        """Take ownership, as a failover does first."""
        epoch = self.replica.info().epoch + 1
        self.replica.raise_epoch(epoch)
        return epoch

    def start_test(self, point_id: str, *, test_id: str = "", network: str = "") -> tuple[str, Instance]:
        """Start a test, which is always stopped at the end."""
        test_id = test_id or new_id("test")
        self._tests.append(test_id)
        spec = TestSpec(test_id, self.id, point_id, f"asr-{test_id}", network)
        return test_id, self.failover.start_test(spec, Watch())

    def clean(self) -> None:
        """Stop tests, undo a promotion; the replica stays."""
        if self.id in self.target.replicas():
            for test_id in self._tests:
                self.failover.stop_test(self.id, test_id)
            self.failover.undo(self.id, self.replica.info().epoch)
        self._tests.clear()

    def delete(self) -> None:
        """Delete the replica and a machine that was made from it by a commit."""
        self.clean()
        if self.id in self.target.replicas():
            self.target.delete_replica(self.id, self.replica.info().epoch)


def _hardware(machine: Machine) -> dict[str, object]:
    return {
        "name": machine.name,
        "cpus": machine.cpus,
        "memory": machine.memory,
        "firmware": machine.firmware,
        "disks": {disk.id: disk.size for disk in machine.disks},
        "macs": [nic.mac for nic in machine.nics],
    }


def _content_at_target(rig: ConformanceRig) -> dict[str, bytes]:
    """Digests of the machine's disks at the target, read as a re-protect reads them."""
    source = target_of(rig).source
    request = ViewRequest(rig.machine_id, new_id("view"), None)
    with source.open_view([request], consistency=Consistency.CRASH, freeze_limit=FREEZE_LIMIT) as view:
        content = {disk_id: fingerprint(disk) for disk_id, disk in view.machines[rig.machine_id].disks.items()}
    source.keep_marks(rig.machine_id, [])
    return content


def _assert_same(seen: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    assert seen.keys() == wanted.keys()
    for disk_id, content in wanted.items():
        assert differences(seen[disk_id], content) == [], f"disk {disk_id} differs from the point at these offsets"


class FailoverConformance(Base):
    """A test leaves nothing behind; a promotion can be undone until it is committed; no point is ever written."""

    @pytest.fixture
    def protected(self, rig: ConformanceRig) -> Iterator[_Protected]:
        """A replica that all tests share; each leaves its points unchanged."""
        protected = rig.notes.get("protected")
        if not isinstance(protected, _Protected):
            protected = _Protected(rig)
            rig.notes["protected"] = protected
            rig.shared.callback(protected.delete)
        yield protected
        protected.clean()

    @pytest.fixture
    def own(self, rig: ConformanceRig) -> Iterator[_Protected]:
        """A replica for this test only; its machine is deleted afterwards."""
        own = _Protected(rig)
        yield own
        own.delete()
        rig.remove_target_machine(rig.machine_id)

    def _machines(self, rig: ConformanceRig) -> set[str]:
        return {machine.id for machine in target_of(rig).inventory.machines()}

    # -- test failover

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_a_test_runs_under_its_own_name(self, rig: ConformanceRig, protected: _Protected) -> None:
        point = protected.points[0]
        test_id, instance = protected.start_test(point)
        wait_for_power(target_of(rig), instance.machine_id, PowerState.RUNNING, rig.boot_timeout)
        machine = target_of(rig).inventory.machine(instance.machine_id)
        assert machine.name == instance.name == f"asr-{test_id}"
        assert instance.machine_id != rig.machine_id
        assert {disk.id: disk.size for disk in machine.disks} == dict(protected.replica.info().points[0].disks)
        assert protected.failover.tests(protected.id) == [test_id]

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_a_test_is_isolated(self, rig: ConformanceRig, protected: _Protected) -> None:
        point = protected.points[0]
        _, instance = protected.start_test(point)
        real = {nic.network for nic in protected.machine(point).nics}
        machine = target_of(rig).inventory.machine(instance.machine_id)
        assert {nic.network for nic in machine.nics} & real == set(), "plugged into a network of the real machine"

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_starting_a_test_again_returns_it(self, rig: ConformanceRig, protected: _Protected) -> None:
        test_id, instance = protected.start_test(protected.points[0])
        before = self._machines(rig)
        assert protected.start_test(protected.points[0], test_id=test_id)[1] == instance
        assert self._machines(rig) == before

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_a_test_changes_no_point(self, rig: ConformanceRig, protected: _Protected) -> None:
        before = protected.content()
        for point in (protected.points[0], protected.points[-1]):
            test_id, instance = protected.start_test(point)
            rig.change_instance(instance)
            assert protected.content() == before
            protected.failover.stop_test(protected.id, test_id)
        assert protected.content() == before

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_replication_goes_on_during_a_test(self, rig: ConformanceRig, protected: _Protected) -> None:
        tested = protected.add_point()
        _, instance = protected.start_test(tested)
        rig.change_instance(instance)
        rig.check_instance(instance)
        before = {key: value for key, value in protected.content().items() if key[0] != tested}
        newest = protected.add_point()
        protected.replica.drop_points([tested], protected.replica.info().epoch)
        protected.add_point()
        assert newest in protected.points
        rig.check_instance(instance)
        after = protected.content()
        assert {key: after[key] for key in before} == before
        wait_for_power(target_of(rig), instance.machine_id, PowerState.RUNNING, rig.boot_timeout)

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_two_tests_at_once(self, rig: ConformanceRig, protected: _Protected) -> None:
        points = protected.points
        first, one = protected.start_test(points[0])
        second, two = protected.start_test(points[1])
        assert one.machine_id != two.machine_id
        assert sorted(protected.failover.tests(protected.id)) == sorted([first, second])
        protected.failover.stop_test(protected.id, first)
        rig.check_instance(two)
        assert protected.failover.tests(protected.id) == [second]

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_stopping_a_test_leaves_nothing(self, rig: ConformanceRig, protected: _Protected) -> None:
        before = self._machines(rig)
        test_id, instance = protected.start_test(protected.points[0])
        assert self._machines(rig) == before | {instance.machine_id}
        for _ in range(2):
            protected.failover.stop_test(protected.id, test_id)
            assert self._machines(rig) == before
            assert protected.failover.tests(protected.id) == []
        protected.failover.stop_test(protected.id, "no-such-test")
        assert protected.failover.tests("no-such-replica") == []

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_stopping_a_test_leaves_no_files(self, rig: ConformanceRig, protected: _Protected) -> None:
        before = rig.target_leftovers(protected.id)
        test_id, instance = protected.start_test(protected.points[0])
        rig.change_instance(instance)
        protected.failover.stop_test(protected.id, test_id)
        assert rig.target_leftovers(protected.id) == before

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_a_test_outlives_the_engine(self, rig: ConformanceRig, protected: _Protected) -> None:
        test_id, instance = protected.start_test(protected.points[0])
        rig.restart()
        assert protected.failover.tests(protected.id) == [test_id]
        rig.check_instance(instance)
        protected.failover.stop_test(protected.id, test_id)
        with pytest.raises(MachineNotFound):
            target_of(rig).inventory.machine(instance.machine_id)

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_failover_to_an_unknown_point(self, rig: ConformanceRig, protected: _Protected) -> None:
        before = self._machines(rig)
        with pytest.raises(PointNotFound):
            protected.start_test("no-such-point")
        spec = PromoteSpec(protected.id, "no-such-point", protected.higher_epoch(), NetworkMap())
        with pytest.raises(PointNotFound):
            protected.failover.promote(spec, Watch())
        assert self._machines(rig) == before
        assert protected.failover.tests(protected.id) == []

    # -- failover

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_failover_findings_change_nothing(self, rig: ConformanceRig, protected: _Protected) -> None:
        """They may be asked at any time, also of a machine that is promoted already."""
        point = protected.points[0]
        networks = {nic.network: rig.other_network() for nic in protected.machine(point).nics}
        before, machines = protected.replica.info(), self._machines(rig)
        spec = PromoteSpec(protected.id, point, before.epoch + 1, NetworkMap(networks))
        for promoted in (False, True):
            if promoted:
                protected.failover.promote(spec, Watch())
                before, machines = protected.replica.info(), self._machines(rig)
            found = protected.target.failover_findings(spec)
            assert [item for item in found if item.severity is Severity.ERROR] == []
            assert protected.replica.info() == before
            assert self._machines(rig) == machines

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_failover_findings_read_the_point(self, rig: ConformanceRig, protected: _Protected) -> None:
        epoch = protected.higher_epoch()
        spec = PromoteSpec(protected.id, protected.points[0], epoch, NetworkMap())
        with pytest.raises(PointNotFound):
            protected.target.failover_findings(attrs.evolve(spec, point_id="no-such-point"))
        with pytest.raises(ReplicaNotFound):
            protected.target.failover_findings(attrs.evolve(spec, replica_id="no-such-replica"))
        with pytest.raises(StaleEpoch):
            protected.target.failover_findings(attrs.evolve(spec, epoch=epoch - 1))

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_a_promoted_machine_is_the_machine(self, rig: ConformanceRig, protected: _Protected) -> None:
        point = protected.points[0]
        spec = PromoteSpec(protected.id, point, protected.higher_epoch(), NetworkMap())
        instance = protected.failover.promote(spec, Watch())
        machine = target_of(rig).inventory.machine(instance.machine_id)
        assert (instance.machine_id, instance.name) == (rig.machine_id, protected.machine(point).name)
        assert _hardware(machine) == _hardware(protected.machine(point))

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_a_promoted_machine_is_not_started(self, rig: ConformanceRig, protected: _Protected) -> None:
        spec = PromoteSpec(protected.id, protected.points[0], protected.higher_epoch(), NetworkMap())
        instance = protected.failover.promote(spec, Watch())
        assert target_of(rig).inventory.machine(instance.machine_id).power is PowerState.OFF

    @needs(source=[SOURCE], target=[TARGET, FAILOVER, SOURCE])
    def test_a_promoted_machine_holds_its_point(self, rig: ConformanceRig, protected: _Protected) -> None:
        for point in protected.points[:2]:
            spec = PromoteSpec(protected.id, point, protected.higher_epoch(), NetworkMap())
            protected.failover.promote(spec, Watch())
            self._check_content(rig, protected, point)

    def _check_content(self, rig: ConformanceRig, protected: _Protected, point_id: str) -> None:
        """Assert that the stopped machine's disks are the point's, where the target is a source and can read them."""
        if SOURCE in target_of(rig).status().capabilities:
            wanted = {key[1]: value for key, value in protected.content().items() if key[0] == point_id}
            _assert_same(_content_at_target(rig), wanted)

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_networks_are_mapped(self, rig: ConformanceRig, protected: _Protected) -> None:
        point = protected.points[0]
        nics = protected.machine(point).nics
        if not nics:
            pytest.skip("the rig's machine has no network card")
        networks = {nic.network: rig.other_network() for nic in nics}
        spec = PromoteSpec(protected.id, point, protected.higher_epoch(), NetworkMap(networks))
        instance = protected.failover.promote(spec, Watch())
        machine = target_of(rig).inventory.machine(instance.machine_id)
        assert [nic.network for nic in machine.nics] == [networks[nic.network] for nic in nics]

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_promoting_again_returns_the_machine(self, rig: ConformanceRig, protected: _Protected) -> None:
        spec = PromoteSpec(protected.id, protected.points[0], protected.higher_epoch(), NetworkMap())
        instance = protected.failover.promote(spec, Watch())
        before = self._machines(rig)
        assert protected.failover.promote(spec, Watch()) == instance
        rig.restart()
        assert protected.failover.promote(spec, Watch()) == instance
        assert self._machines(rig) == before

    @needs(source=[SOURCE], target=[TARGET, FAILOVER, POWER])
    def test_another_point_replaces_the_machine(self, rig: ConformanceRig, protected: _Protected) -> None:
        before = protected.content()
        first, second = protected.points[:2]
        epoch = protected.higher_epoch()
        instance = protected.failover.promote(PromoteSpec(protected.id, first, epoch, NetworkMap()), Watch())
        self._run(rig, instance)
        target_of(rig).inventory.power_off(instance.machine_id, graceful=False, timeout=rig.boot_timeout)
        protected.failover.promote(PromoteSpec(protected.id, second, epoch, NetworkMap()), Watch())
        assert target_of(rig).inventory.machine(instance.machine_id).power is PowerState.OFF
        assert protected.content() == before
        self._check_content(rig, protected, second)

    def _run(self, rig: ConformanceRig, instance: Instance) -> None:
        target_of(rig).inventory.power_on(instance.machine_id)
        wait_for_power(target_of(rig), instance.machine_id, PowerState.RUNNING, rig.boot_timeout)
        rig.change_instance(instance)

    @needs(source=[SOURCE], target=[TARGET, FAILOVER, POWER])
    def test_undo_leaves_the_replica_as_before(self, rig: ConformanceRig, protected: _Protected) -> None:
        before, points, machines = protected.content(), protected.replica.info().points, self._machines(rig)
        for point in (points[0].id, points[-1].id):
            epoch = protected.higher_epoch()
            instance = protected.failover.promote(PromoteSpec(protected.id, point, epoch, NetworkMap()), Watch())
            self._run(rig, instance)
            for _ in range(2):
                protected.failover.undo(protected.id, epoch)
                assert self._machines(rig) == machines
                assert protected.replica.info().points == points
        assert protected.content() == before
        assert protected.add_point() in protected.points, "replication does not continue"

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_a_promoted_replica_takes_no_cycle(self, rig: ConformanceRig, protected: _Protected) -> None:
        """Nor of a newer epoch: an engine whose vault was restored from a backup does not know of the failover."""
        epoch, before = protected.higher_epoch(), protected.content()
        protected.failover.promote(PromoteSpec(protected.id, protected.points[0], epoch, NetworkMap()), Watch())
        info = protected.replica.info()
        for writer in (epoch, epoch + 1):
            with pytest.raises(ReplicaPromoted):
                protected.replica.open_cycle(CycleSpec(new_id("cycle"), writer, info.head, info.disks))
        assert protected.content() == before
        protected.failover.undo(protected.id, protected.higher_epoch())
        assert protected.add_point() in protected.points, "replication does not continue after an undo"

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_a_promotion_is_reported(self, rig: ConformanceRig, protected: _Protected) -> None:
        """A vault that was restored from a backup learns of the failover by it."""
        assert protected.replica.info().promoted is None
        spec = PromoteSpec(protected.id, protected.points[0], protected.higher_epoch(), NetworkMap())
        made = protected.failover.promote(spec, Watch())
        assert protected.replica.info().promoted == Promoted(spec.point_id, made.machine_id)
        protected.failover.undo(protected.id, protected.higher_epoch())
        assert protected.replica.info().promoted is None

    @needs(source=[SOURCE], target=[TARGET, FAILOVER])
    def test_failover_of_a_stale_epoch_is_refused(self, rig: ConformanceRig, protected: _Protected) -> None:
        epoch = protected.higher_epoch()
        spec = PromoteSpec(protected.id, protected.points[0], epoch, NetworkMap())
        with pytest.raises(StaleEpoch):
            protected.failover.promote(attrs.evolve(spec, epoch=epoch - 1), Watch())
        assert rig.machine_id not in self._machines(rig)
        protected.failover.promote(spec, Watch())
        with pytest.raises(StaleEpoch):
            protected.failover.undo(protected.id, epoch - 1)
        with pytest.raises(StaleEpoch):
            protected.failover.commit(protected.id, epoch - 1, Watch())
        assert rig.machine_id in self._machines(rig)

    @needs(source=[SOURCE], target=[TARGET, FAILOVER, FENCE])
    def test_undo_brings_back_what_was_put_aside(self, rig: ConformanceRig, protected: _Protected) -> None:
        point = protected.points[0]
        former = protected.machine(point)
        rig.make_target_machine(former)
        try:
            disks = {disk.id: rig.target_sha256(former.id, disk.id) for disk in former.disks}
            inventory = target_of(rig).inventory
            inventory.fence(former.id, Fence(1, "conformance"))
            epoch = protected.higher_epoch()
            instance = protected.failover.promote(PromoteSpec(protected.id, point, epoch, NetworkMap()), Watch())
            assert instance.machine_id == former.id
            self._check_content(rig, protected, point)
            protected.failover.undo(protected.id, epoch)
            inventory = target_of(rig).inventory
            assert inventory.machine(former.id).power is PowerState.OFF
            assert inventory.fenced(former.id) == Fence(1, "conformance")
            assert {disk.id: rig.target_sha256(former.id, disk.id) for disk in former.disks} == disks
        finally:
            protected.clean()
            rig.remove_target_machine(former.id)

    # -- commit

    @needs(source=[SOURCE], target=[TARGET, FAILOVER, POWER])
    def test_commit_leaves_the_machine_alone(self, rig: ConformanceRig, own: _Protected) -> None:
        point = own.points[0]
        disks = own.replica.info().points[0].disks
        epoch = own.higher_epoch()
        instance = own.failover.promote(PromoteSpec(own.id, point, epoch, NetworkMap()), Watch())
        target_of(rig).inventory.power_on(instance.machine_id)
        wait_for_power(target_of(rig), instance.machine_id, PowerState.RUNNING, rig.boot_timeout)
        for _ in range(2):
            own.failover.commit(own.id, epoch, Watch())
            assert own.id not in own.target.replicas()
            machine = target_of(rig).inventory.machine(instance.machine_id)
            assert machine.power is PowerState.RUNNING, "a commit does not disturb the machine"
        own.target.delete_replica(own.id, epoch)
        rig.check_instance(instance)
        machine = target_of(rig).inventory.machine(instance.machine_id)
        assert {disk.id: disk.size for disk in machine.disks} == dict(disks)

    @needs(source=[SOURCE], target=[TARGET, FAILOVER, SOURCE])
    def test_commit_of_a_stopped_machine_keeps_its_content(self, rig: ConformanceRig, own: _Protected) -> None:
        point = own.points[0]
        content = {key[1]: value for key, value in own.content().items() if key[0] == point}
        epoch = own.higher_epoch()
        own.failover.promote(PromoteSpec(own.id, point, epoch, NetworkMap()), Watch())
        own.failover.commit(own.id, epoch, Watch())
        own.target.delete_replica(own.id, epoch)
        _assert_same(_content_at_target(rig), content)
