"""The failover role: machines created from recovery points, as managed disks with the Azure resources around them."""

from __future__ import annotations

import attrs

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.blobs.record import Point, Promotion, Record, checked_id, lease_of
from asr_driver_azure.machines.builder import Builder
from asr_driver_azure.machines.machines import Machines
from asr_driver_azure.machines.record import owner_of, test_owner
from asr_driver_azure.target.replica import AzureReplica
from asrcore.crashpoint import reach
from asrcore.driver import Failover, Instance, PromoteSpec, TestSpec
from asrcore.errors import AlreadyExists, MachineNotFound, ReplicaNotFound, WrongState
from asrcore.model.watch import Watch

__all__ = ["AzureFailover"]


class AzureFailover(Failover):
    """See `Failover`."""

    def __init__(self, account: AzureAccount, machines: Machines) -> None:
        self._account = account
        self._container = account.container
        self._machines = machines
        self._builder = Builder(account)

    # -- test

    def start_test(self, spec: TestSpec, watch: Watch) -> Instance:
        checked_id("test id", spec.test_id)
        owner = test_owner(spec.replica_id, spec.test_id)
        known = self._machines.defined(owner)
        if known is None:
            replica = AzureReplica(self._account, spec.replica_id)

            def begin(record: Record) -> Record:
                point_id = record.tests.get(spec.test_id, spec.point_id)
                record.point(point_id)
                return attrs.evolve(record, tests={**record.tests, spec.test_id: point_id})

            # A test in a named network gets a card in it, never a public address: it may answer as the real machine.
            named = self._builder.networks_for([spec.network]) if spec.network else None
            record = self._container.change(spec.replica_id, self._account.name, begin).record
            reach("azure.test.recorded")
            point = record.point(record.tests[spec.test_id])
            description = replica.description(point.stored.id)
            networks = [attrs.evolve(named[0], public=False)] * max(1, len(description.machine.nics)) if named else None
            described = attrs.evolve(description, machine=attrs.evolve(description.machine, name=spec.name))
            known = self._builder.define(owner, f"test-{spec.test_id}", described, point.disks, networks, watch)
            self._builder.publish(known)
        self._builder.start(known)
        return Instance(known.machine_id, known.description.machine.name, self._builder.repairs(owner))

    def stop_test(self, replica_id: str, test_id: str) -> None:
        self._builder.remove(test_owner(replica_id, test_id))

        def end(record: Record) -> Record:
            return attrs.evolve(record, tests={key: at for key, at in record.tests.items() if key != test_id})

        try:
            self._container.change(replica_id, self._account.name, end)
        except ReplicaNotFound:
            return
        reach("azure.test.ended")

    def tests(self, replica_id: str) -> list[str]:
        try:
            return sorted(self._container.record(replica_id, self._account.name).tests)
        except ReplicaNotFound:
            return []

    # -- promotion

    def promote(self, spec: PromoteSpec, watch: Watch) -> Instance:
        record = self._container.record(spec.replica_id, self._account.name)
        record.own(spec.epoch)
        point = record.point(spec.point_id)
        description = AzureReplica(self._account, spec.replica_id).description(spec.point_id)
        machine = description.machine
        wanted = [spec.networks.target(nic.network) for nic in machine.nics]
        networks = self._builder.networks_for(wanted) or None
        self._builder.size_for(machine)
        promotion = self._make_room(record, spec, point, machine.id, machine.name)
        reach("azure.promotion.recorded")
        known = self._machines.defined(promotion.machine)
        if known is None:
            known = self._builder.define(promotion.machine, machine.id, description, point.disks, networks, watch)
            self._builder.base(known)
            self._builder.publish(known)
        return Instance(machine.id, machine.name, self._builder.repairs(known.name))

    def _make_room(self, record: Record, spec: PromoteSpec, point: Point, machine_id: str, name: str) -> Promotion:
        """Record the promotion; a replaceable machine with the same identity is put aside or deleted."""
        owner = owner_of(name, f"failover/{spec.replica_id}/{spec.point_id}/{spec.epoch}")
        former = record.promotion
        if former is not None and former.point_id == spec.point_id and self._machines.whole(former.machine):
            return former
        aside = former.aside if former else ""
        if former is not None and former.machine != owner:
            self._must_be_off(former)
            self._builder.remove(former.machine)
        if former is None:
            there = self._machines.find(machine_id)
            if there is not None and self._machines.fenced(machine_id) is None:
                raise AlreadyExists(kind="machine", name=machine_id)
            aside = there or ""
        promotion = Promotion(point.stored.id, machine_id, owner, aside)

        def begin(record: Record) -> Record:
            record.own(spec.epoch)
            record.point(spec.point_id)
            return attrs.evolve(record, promotion=promotion)

        self._container.change(spec.replica_id, self._account.name, begin)
        if aside:
            self._machines.put_aside(aside, True)
        return promotion

    def _must_be_off(self, former: Promotion) -> None:
        try:
            machine = self._machines.describe(former.machine_id).machine
        except MachineNotFound:
            return
        if self._machines.runs(former.machine):
            raise WrongState(
                machine=machine.name,
                event="be replaced by another point",
                state=machine.power.value,
                reason="What it has written since the failover would be lost.",
                possible="stop it first",
            )

    def undo(self, replica_id: str, epoch: int) -> None:
        record = self._container.record(replica_id, self._account.name)
        record.own(epoch)
        if record.promotion is None:
            return
        self._builder.remove(record.promotion.machine)
        if record.promotion.aside:
            self._machines.put_aside(record.promotion.aside, False)

        def forget(record: Record) -> Record:
            record.own(epoch)
            return attrs.evolve(record, promotion=None)

        self._container.change(replica_id, self._account.name, forget)
        reach("azure.undone")

    def commit(self, replica_id: str, epoch: int, watch: Watch) -> None:
        def begin(record: Record) -> Record:
            record.own(epoch)
            if record.promotion is None:
                raise WrongState(
                    machine=record.name,
                    event="be committed",
                    state="not failed over",
                    reason="No machine was created from this replica.",
                    possible="fail over first",
                )
            return attrs.evolve(record, promotion=attrs.evolve(record.promotion, committing=True))

        try:
            record = self._container.change(replica_id, self._account.name, begin).record
        except ReplicaNotFound:
            loaded = self._container.load(replica_id)
            if loaded is None:
                return  # an earlier commit, which was killed before it returned, deleted it
            record = loaded.record
            record.own(epoch)
        reach("azure.commit.begun")
        watch.check()
        for test_id in record.tests:
            self.stop_test(replica_id, test_id)
        if record.promotion is not None and record.promotion.aside:
            self._builder.remove(record.promotion.aside)
        if record.promotion is not None:
            self._builder.settle(record.promotion.machine)
            self._machines.unfence(record.promotion.machine_id, epoch)
        if not record.deleting:
            record = self._container.change(
                replica_id, self._account.name, lambda record: attrs.evolve(record, deleting=True)
            ).record
        reach("azure.commit.leaving")
        self._container.erase(record, [lease_of(replica_id, item) for item in record.leases])
        reach("azure.committed")
