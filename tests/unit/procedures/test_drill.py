"""Test failover on memory sites: it disturbs nothing, and its clean-up leaves nothing."""

from __future__ import annotations

import pytest

from asrcore.errors import MachineNotFound
from asrcore.model.machine import PowerState
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
