"""Test failover on memory sites: it disturbs nothing, and its clean-up leaves nothing."""

from __future__ import annotations

import pytest

from asrcore.errors import DriverFailed, InvalidValue, MachineNotFound, ReplicaNotFound
from asrcore.model.machine import PowerState
from asrcore.procedures.drill import _name_of_test
from asrcore.service.status import document
from tests.unit.rig import Rig, facts


def test_a_test_runs_beside_replication_and_leaves_nothing(protected: Rig) -> None:
    job = protected.engine.failover_test("web")
    test_machine = str(facts(job)["machine_id"])
    assert protected.power("b", test_machine) is PowerState.RUNNING
    protected.machine.write("vda", 4096, b"while the test runs")
    protected.engine.replicate("web")
    assert protected.content() == protected.truth()
    protected.engine.failover_cleanup("web")
    assert protected.protection.test is None
    with pytest.raises(MachineNotFound):
        protected.engine.context.site("b").inventory.machine(test_machine)


def test_a_second_test_takes_the_place_of_the_first(protected: Rig) -> None:
    first = str(facts(protected.engine.failover_test("web"))["machine_id"])
    second = str(facts(protected.engine.failover_test("web"))["machine_id"])
    machines = {machine.id for machine in protected.engine.machines("b")}
    assert second in machines
    assert first not in machines


def test_a_point_that_a_test_stands_on_outlives_its_age_until_the_test_is_over(protected: Rig) -> None:
    tested = protected.engine.points("web")[0].id
    protected.engine.failover_test("web", point=tested)
    protected.clock.now += 400 * 86400
    protected.engine.replicate("web")
    assert tested in {point.id for point in protected.engine.points("web")}
    protected.engine.failover_cleanup("web")
    protected.clock.now += 10
    protected.engine.replicate("web")
    replica = protected.engine.context.site("b").target.replica(protected.protection.replica_id)
    assert tested not in {point.id for point in replica.info().points}


def test_a_test_that_fails_leaves_no_test(protected: Rig) -> None:
    """Neither a record, nor a machine, nor a point that is kept for it."""
    with pytest.raises(InvalidValue, match="nonet"):
        protected.engine.failover_test("web", network="nonet")
    _no_test(protected)
    protected.away.configure(refuses_start="no KVM")
    with pytest.raises(DriverFailed):
        protected.engine.failover_test("web")
    _no_test(protected)


def test_a_test_without_its_replica_leaves_no_test(protected: Rig) -> None:
    with protected.away.change() as state:
        replicas, state.replicas = state.replicas, {}
    with pytest.raises(ReplicaNotFound):
        protected.engine.failover_test("web")
    with protected.away.change() as state:
        state.replicas = replicas
    _no_test(protected)


def _no_test(rig: Rig) -> None:
    assert rig.protection.test is None
    assert rig.engine.machines("b") == []
    assert rig.engine.context.site("b").failover.tests(rig.protection.replica_id) == []
    (status,) = rig.engine.status()
    assert document(status)["test"] is None


@pytest.mark.parametrize("name", ["n" * 196, "n" * 240, "ü" * 120])
def test_the_name_of_a_test_is_shortened(rig: Rig, name: str) -> None:
    """The longest that libvirt has as a file name is 255 bytes, with what it puts around it."""
    rig.machine.rename(name)
    rig.engine.protect(name, source="a", target="b", policy="gold")
    made = str(facts(rig.engine.failover_test(name))["machine"])
    assert len(made.encode()) <= 200
    assert made.startswith(name[:80])
    assert made.endswith("-test")


def test_two_long_names_have_two_tests() -> None:
    names = {_name_of_test("n" * 240 + end) for end in ("1", "2")}
    assert len(names) == 2
    assert _name_of_test("web") == "web-test"
