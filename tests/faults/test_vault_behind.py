"""A vault that was put back to an earlier copy: it is noticed before anything is changed, and nothing is lost.

The sites went on after the copy was made. What they know better is adopted, or a person is asked; the machine never
runs at both sites, and a source that was given up is never replicated over the one that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asrcore.errors import ReplicaNotFound, SiteUnreachable, TrackingLost, VaultBehind
from asrcore.model.epoch import generation
from asrcore.model.health import Level
from asrcore.model.machine import PowerState
from asrcore.model.protection import Protection
from asrcore.model.state import State
from asrcore.model.watch import Watch
from asrcore.procedures.adopt import adopt_impact
from asrcore.service.scheduler import Scheduler, _to_fence
from asrcore.units import MINUTE
from tests.unit.rig import DirectEngine, Rig, facts

pytestmark = pytest.mark.once

OFF, RUNNING = PowerState.OFF, PowerState.RUNNING
DIRECTORY = pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    made.machine.write("vda", 0, b"in the copy")
    made.protect()
    yield made
    made.engine.close()


def go_on(rig: Rig, text: bytes = b"after the copy", **given: bool) -> str:
    """A cycle after the copy was made; the id of its point."""
    rig.source_machine().write("vda", 0, text)
    return str(facts(rig.engine.replicate("web", **given))["point"])


def serve_fence(rig: Rig) -> None:
    """What the service does about quarantines."""
    scheduler = Scheduler(rig.engine.context, lambda kind, protection, arguments: None)
    assert _to_fence(rig.protection) is not None
    scheduler._fence(rig.protection, Watch())


def world(rig: Rig) -> object:
    """All that must not change when a command is refused, but for what the vault says of the refusal."""

    def power(site: str) -> object:
        with (rig.home if site == "a" else rig.away).look() as state:
            return {name: (item.power, item.fence, sorted(item.marks)) for name, item in state.machines.items()}

    def replicas(site: str) -> object:
        with (rig.home if site == "a" else rig.away).look() as state:
            return {
                name: (
                    item.epoch,
                    [point.point.id for point in item.points],
                    item.promotion is None,
                    sorted(item.tests),
                )
                for name, item in state.replicas.items()
            }

    protection = rig.protection
    kept = (protection.state, protection.epoch, protection.head_point, protection.mark, protection.fence_due)
    points = [point.id for point in rig.engine.points("web")]
    return power("a"), power("b"), replicas("a"), replicas("b"), kept, points


def refused(rig: Rig, work: Callable[[], object]) -> VaultBehind:
    """The work is refused and nothing is changed, and the machine's health says so."""
    before = world(rig)
    with pytest.raises(VaultBehind) as caught:
        work()
    assert world(rig) == before
    (status,) = rig.engine.status()
    assert status.health.level is Level.CRITICAL
    assert "vault-behind" in [reason.code for reason in status.health.reasons]
    return caught.value


# -- points that only the target knows -----------------------------------------------------------------------------


@DIRECTORY
@pytest.mark.parametrize("lost", [False, True], ids=["primary-runs", "primary-lost"])
def test_a_failover_runs_the_newest_point_of_the_target(rig: Rig, lost: bool, directory: bool) -> None:
    copy = rig.backup()
    newest = go_on(rig)
    content = rig.content()
    rig.put_back(copy, directory=directory)
    if lost:
        rig.home.cut()
    done = facts(rig.engine.failover_unplanned("web"))
    assert done["point"] == newest
    assert rig.content(newest) == content
    assert (rig.protection.state, rig.power("b")) == (State.FAILED_OVER, RUNNING)
    assert lost or rig.power("a") is OFF


def test_a_point_that_only_the_target_knows_can_be_chosen(rig: Rig) -> None:
    copy = rig.backup()
    middle = go_on(rig, b"the middle", keep=True)
    go_on(rig, b"the newest")
    rig.put_back(copy)
    rig.home.cut()
    assert facts(rig.engine.failover_unplanned("web", point=middle))["point"] == middle
    assert [point.id for point in rig.engine.points("web")][1:2] == [middle]


def test_a_planned_failover_after_a_restore_loses_nothing(rig: Rig) -> None:
    copy = rig.backup()
    go_on(rig)
    rig.put_back(copy)
    rig.machine.write("vda", 0, b"in no point yet")
    truth = rig.truth()
    rig.engine.failover_planned("web")
    assert rig.away.machine("web").sha256("vda") == truth["vda"]
    assert (rig.power("a"), rig.power("b")) == (OFF, RUNNING)


def test_replication_adopts_what_stands_still_and_compares(rig: Rig) -> None:
    kept = go_on(rig, keep=True)
    copy = rig.backup()
    later = [go_on(rig, f"{number}".encode(), keep=True) for number in range(3)]
    rig.put_back(copy)
    refused(rig, lambda: rig.engine.replicate("web"))
    rig.clock.now += MINUTE
    with pytest.raises(TrackingLost):  # the mark of the newest point is not known: it is compared
        rig.engine.replicate("web")
    states = [rig.protection.state]
    rig.engine.resync("web", now=True)
    assert [*states, rig.protection.state] == [State.RESYNC_PENDING, State.PROTECTED]
    assert rig.content() == rig.truth()
    assert {kept, *later} <= {point.id for point in rig.engine.points("web")}
    (entry,) = [item for item in rig.engine.vault.events(machine="web") if item.kind == "adopt"]
    assert entry.data["points"] == sorted(later)


def test_the_refusal_is_logged_once(rig: Rig) -> None:
    copy = rig.backup()
    go_on(rig)
    rig.put_back(copy)
    for _ in range(3):
        with pytest.raises(VaultBehind):
            rig.engine.replicate("web")
    assert len([item for item in rig.engine.vault.events(machine="web") if item.kind == "vault"]) == 1


def test_a_refused_cycle_counts_as_one_failure(rig: Rig) -> None:
    copy = rig.backup()
    go_on(rig)
    rig.put_back(copy)
    for failures in (1, 2, 3):
        with pytest.raises(VaultBehind):
            rig.engine.replicate("web")
        assert rig.protection.attempt == failures
    with pytest.raises(VaultBehind):
        rig.engine.verify("web")
    assert rig.protection.attempt == 3, "a refused command is no failed cycle"
    assert rig.protection.retry_at is not None


def test_a_look_at_what_would_be_adopted_records_nothing(rig: Rig) -> None:
    with rig.away.change() as state:
        state.replicas = {}
    before = rig.protection, len(rig.engine.vault.events())
    with pytest.raises(VaultBehind):
        adopt_impact(rig.engine.context, "web")
    assert (rig.protection, len(rig.engine.vault.events())) == before
    refused(rig, lambda: rig.engine.adopt("web"))


def test_retention_keeps_points_that_only_the_target_knew_as_the_policy_says(rig: Rig) -> None:
    copy = rig.backup()
    later = go_on(rig, keep=True)
    rig.put_back(copy)
    rig.engine.adopt("web")
    rig.engine.resync("web", now=True)
    replica = rig.engine.context.site("b").target.replica(rig.protection.replica_id)
    assert later in {point.id for point in replica.info().points}
    assert later in {point.id for point in rig.engine.points("web")}


def test_an_interrupted_cycle_of_the_newer_vault_is_discarded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = rig.backup()
    rig.machine.write("vda", 0, b"interrupted")
    with rig.killed_at("cycle.disk-copied", monkeypatch) as reached:
        rig.engine.replicate("web")
    assert reached
    rig.put_back(copy)
    rig.engine.replicate("web")
    assert rig.content() == rig.truth()


@pytest.mark.parametrize("later", [1, 2])
def test_the_point_of_a_cycle_that_the_copy_shows_under_way_is_adopted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, later: int
) -> None:
    rig.machine.write("vda", 0, b"interrupted")
    with rig.killed_at("cycle.disk-copied", monkeypatch) as reached:
        rig.engine.replicate("web", keep=True)
    assert reached
    copy = rig.backup()
    kept = [go_on(rig, keep=True), *(go_on(rig, f"{number}".encode(), keep=True) for number in range(later))]
    rig.put_back(copy)
    assert rig.protection.pending is not None
    assert rig.protection.pending.point_id == kept[0]
    rig.engine.adopt("web")
    assert [point.id for point in rig.engine.points("web")][-len(kept) :] == kept
    rig.engine.resync("web", now=True)
    assert set(kept) <= {point.id for point in rig.engine.points("web")}
    assert rig.content() == rig.truth()


# -- failed over since ---------------------------------------------------------------------------------------------

VERBS: dict[str, Callable[[DirectEngine], object]] = {
    "replicate": lambda engine: engine.replicate("web"),
    "resync": lambda engine: engine.resync("web", now=True),
    "verify": lambda engine: engine.verify("web"),
    "test": lambda engine: engine.failover_test("web"),
    "planned": lambda engine: engine.failover_planned("web"),
    "unplanned": lambda engine: engine.failover_unplanned("web"),
    "unprotect": lambda engine: engine.unprotect("web"),
}


@DIRECTORY
@pytest.mark.parametrize("verb", VERBS)
def test_a_failover_that_the_vault_does_not_know_refuses_everything(rig: Rig, verb: str, directory: bool) -> None:
    copy = rig.backup()
    rig.engine.failover_unplanned("web")
    rig.put_back(copy, directory=directory)
    for _ in range(5):  # a take-over by another server raises the epoch by one
        rig.engine.vault.update(rig.protection.id, epoch=rig.protection.epoch + 1)
    error = refused(rig, lambda: VERBS[verb](rig.engine))
    assert "asr machine adopt web" in error.action_text
    assert (rig.power("a"), rig.power("b")) == (OFF, RUNNING)


@pytest.mark.parametrize("then", ["undo", "commit"])
def test_a_person_records_a_failover_that_the_vault_does_not_know(rig: Rig, then: str) -> None:
    copy = rig.backup()
    go_on(rig)
    rig.engine.failover_unplanned("web")
    point = rig.protection.failover_point
    rig.put_back(copy)
    assert facts(rig.engine.adopt("web"))["state"] == "failed-over"
    assert (rig.protection.failover_point, rig.protection.target_machine) == (point, "web")
    serve_fence(rig)
    assert (rig.power("a"), rig.power("b")) == (OFF, RUNNING)
    if then == "commit":
        rig.engine.failover_commit("web")
        rig.engine.reprotect("web")
        assert rig.content() == rig.truth()
    else:
        rig.engine.failover_undo("web")
        assert rig.engine.machines("b") == []
        assert rig.power("a") is RUNNING


def test_a_failover_that_was_killed_half_way_is_recorded_as_that(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = rig.backup()
    with rig.killed_at("failover.promoted", monkeypatch) as reached:
        rig.engine.failover_unplanned("web")
    assert reached
    rig.put_back(copy)
    assert facts(rig.engine.adopt("web"))["state"] == "failing-over"
    rig.engine.failover_unplanned("web")
    assert (rig.power("a"), rig.power("b")) == (OFF, RUNNING)


def test_a_failover_that_was_undone_since_waits_for_a_person(rig: Rig) -> None:
    copy = rig.backup()
    rig.engine.failover_unplanned("web")
    rig.engine.failover_undo("web")
    rig.put_back(copy)
    refused(rig, lambda: rig.engine.replicate("web"))
    rig.engine.adopt("web")
    rig.engine.replicate("web")
    assert rig.content() == rig.truth()
    assert rig.power("a") is RUNNING


@DIRECTORY
def test_an_undo_that_the_vault_does_not_know(rig: Rig, directory: bool) -> None:
    """It believes that the machine runs at the target: nothing may quarantine the source."""
    rig.engine.failover_unplanned("web")
    copy = rig.backup()
    rig.engine.failover_undo("web")
    go_on(rig)
    rig.put_back(copy, directory=directory)
    refused(rig, lambda: rig.engine.failover_undo("web"))
    refused(rig, lambda: rig.engine.failover_commit("web"))
    serve_fence(rig)
    assert rig.power("a") is RUNNING
    assert rig.engine.status()[0].health.level is Level.CRITICAL
    rig.engine.adopt("web")
    assert rig.protection.state is State.RESYNC_PENDING
    rig.engine.resync("web", now=True)
    assert (rig.protection.state, rig.power("a")) == (State.PROTECTED, RUNNING)
    assert rig.content() == rig.truth()


@DIRECTORY
def test_a_reversal_that_the_vault_does_not_know(rig: Rig, directory: bool) -> None:
    copy = rig.backup()
    rig.engine.failover_unplanned("web")
    rig.engine.failover_commit("web")
    rig.engine.reprotect("web")
    rig.put_back(copy, directory=directory)
    before = world(rig)
    for verb in ("replicate", "verify", "planned", "unplanned", "test"):
        with pytest.raises(ReplicaNotFound):
            VERBS[verb](rig.engine)
    assert world(rig) == before
    with pytest.raises(VaultBehind) as caught:
        rig.engine.adopt("web")
    assert "asr unprotect web" in caught.value.action_text
    rig.engine.unprotect("web")
    assert (rig.power("a"), rig.power("b")) == (OFF, RUNNING)
    rig.engine.protect("web", source="b", target="a", policy="gold")
    assert rig.content() == rig.truth()


def failed_back(rig: Rig) -> None:
    rig.engine.failover_planned("web")
    rig.engine.failover_commit("web")
    assert (rig.power("a"), rig.power("b")) == (RUNNING, OFF)


@DIRECTORY
def test_a_failback_that_a_committed_vault_does_not_know(rig: Rig, directory: bool) -> None:
    rig.engine.failover_unplanned("web")
    rig.engine.failover_commit("web")
    copy = rig.backup()
    rig.engine.reprotect("web")
    failed_back(rig)
    rig.put_back(copy, directory=directory)
    serve_fence(rig)
    assert rig.power("a") is RUNNING
    with pytest.raises(VaultBehind):
        rig.engine.reprotect("web")
    assert rig.power("a") is RUNNING


@DIRECTORY
@pytest.mark.parametrize("ends", ["failed-over", "committed"])
def test_a_failback_that_a_reversed_vault_does_not_know(rig: Rig, ends: str, directory: bool) -> None:
    rig.engine.failover_unplanned("web")
    rig.engine.failover_commit("web")
    rig.engine.reprotect("web")
    copy = rig.backup()
    if ends == "committed":
        failed_back(rig)
    else:
        rig.engine.failover_planned("web")
    rig.put_back(copy, directory=directory)
    serve_fence(rig)
    assert (rig.power("a"), rig.power("b")) == (RUNNING, OFF)


@DIRECTORY
def test_a_commit_that_the_vault_does_not_know_is_repeated(rig: Rig, directory: bool) -> None:
    rig.engine.failover_unplanned("web")
    copy = rig.backup()
    rig.engine.failover_commit("web")
    rig.put_back(copy, directory=directory)
    rig.engine.failover_commit("web")
    assert (rig.protection.state, rig.power("a"), rig.power("b")) == (State.COMMITTED, OFF, RUNNING)


def test_an_undo_that_was_owed_is_not_completed_over_a_later_failover(rig: Rig) -> None:
    rig.engine.failover_unplanned("web")
    rig.home.cut()
    rig.engine.failover_undo("web")
    assert rig.protection.undo_due
    copy = rig.backup()
    rig.home.restore()
    rig.engine.replicate("web")
    rig.engine.failover_unplanned("web")
    rig.engine.failover_commit("web")
    rig.put_back(copy, directory=True)
    Scheduler(rig.engine.context, lambda kind, protection, arguments: None)._finish_undo(rig.protection, Watch())
    assert (rig.power("a"), rig.power("b")) == (OFF, RUNNING)


@pytest.mark.parametrize("restored", [False, True])
def test_a_fence_waits_for_the_target_only_if_the_vault_was_put_back(rig: Rig, restored: bool) -> None:
    rig.home.cut()
    rig.engine.failover_unplanned("web")
    rig.engine.vault.update(rig.protection.id, restored=restored)
    rig.home.restore()
    rig.away.cut()
    serve_fence(rig)
    assert rig.power("a") is (RUNNING if restored else OFF)
    rig.away.restore()
    serve_fence(rig)
    assert rig.power("a") is OFF
    assert not rig.protection.restored


def test_a_failed_over_machine_is_compared_though_its_source_is_lost(rig: Rig) -> None:
    rig.home.cut()
    rig.engine.failover_unplanned("web")
    rig.engine.vault.update(rig.protection.id, restored=True)
    serve_fence(rig)
    assert not rig.protection.restored


def test_without_its_replica_a_machine_of_a_restored_vault_names_the_way_out(rig: Rig) -> None:
    rig.engine.vault.update(rig.protection.id, restored=True)
    with rig.away.change() as state:
        state.replicas = {}
    error = refused(rig, lambda: rig.engine.replicate("web"))
    assert "asr unprotect web" in error.action_text


def test_an_undo_waits_for_the_target_if_the_vault_was_put_back(rig: Rig) -> None:
    rig.engine.failover_unplanned("web")
    rig.engine.vault.update(rig.protection.id, restored=True)
    rig.away.cut()
    with pytest.raises(SiteUnreachable):
        rig.engine.failover_undo("web")
    assert rig.power("a") is OFF
    rig.away.restore()
    rig.engine.failover_undo("web")
    assert rig.power("a") is RUNNING


def test_unprotect_says_what_only_the_target_knew(rig: Rig) -> None:
    copy = rig.backup()
    later = go_on(rig)
    rig.put_back(copy)
    done = facts(rig.engine.unprotect("web"))
    assert done["deleted_unknown_points"] == [later]


# -- two copies of a vault at work ---------------------------------------------------------------------------------


def test_an_old_copy_beside_the_vault_adopts_nothing_and_the_vault_stays_the_owner(rig: Rig, tmp_path: Path) -> None:
    old = DirectEngine.open(str(rig.backup()), rig.plugins)
    old.context.clock = old.context.elapsed = rig.clock
    try:
        for number in range(5):
            go_on(rig, f"{number}".encode())
            rig.clock.now += MINUTE
            with pytest.raises(VaultBehind):
                old.replicate("web")
        # The newer engine dies; the older one takes over what it left, and the newer one is refused from then on.
        rig.clock.now += MINUTE
        with pytest.raises(TrackingLost):
            old.replicate("web")
        old.resync("web", now=True)
        refused(rig, lambda: rig.engine.replicate("web"))
        refused(rig, lambda: rig.engine.failover_unplanned("web"))
    finally:
        old.close()


def test_generations_count_failovers_and_not_take_overs(rig: Rig) -> None:
    first: Protection = rig.protection
    rig.engine.failover_unplanned("web")
    assert generation(rig.protection.epoch) == generation(first.epoch) + 1
    rig.engine.failover_undo("web")
    assert generation(rig.protection.epoch) == generation(first.epoch) + 2
