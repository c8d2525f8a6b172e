"""Cycles, points and the reversal: the mark and the head move together, in the vault's transaction only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrcore.errors import AlreadyProtected, PointNotFound, StaleBase, WrongCycle, WrongState
from asrcore.model.epoch import next_generation
from asrcore.model.point import Mark
from asrcore.model.protection import CycleMode, NetworkMap, Protection, TestRun
from asrcore.model.state import Event, State
from asrcore.vault import Vault, _cycles
from tests.unit.vault import samples
from tests.unit.vault.samples import cycle, machine, point, record, stats


def ids(vault: Vault) -> list[str]:
    return [item.id for item in vault.points("id-1")]


def test_the_head_and_the_number_of_points_of_all_machines(vault: Vault) -> None:
    vault.add_protection(machine(2))
    assert (vault.heads(), vault.point_counts()) == ({}, {})
    for number in (1, 2, 3):
        record(vault, number, kept=True)
    assert vault.heads() == {"id-1": vault.points("id-1")[-1]}
    assert vault.point_counts() == {"id-1": 3}
    vault.mark_dropping("id-1", ["p1"])
    assert vault.point_counts() == {"id-1": 2} == {"id-1": len(vault.points("id-1"))}


def test_what_is_known_of_a_point_is_kept_with_it(vault: Vault) -> None:
    for number in (1, 2):
        record(vault, number, kept=True)
    assert vault.damaged_counts() == {}
    vault.note_proved_to("id-1", "p1", 2**41)
    assert vault.points("id-1")[0].proved_to == 2**41
    assert vault.note_examined("id-1", "p1", damaged="disk vda: a byte", proved_at=None) == ""
    found = vault.points("id-1")[0]
    assert (found.damaged, found.proved_at, found.proved_to) == ("disk vda: a byte", None, 0)
    assert vault.damaged_counts() == {"id-1": 1}
    assert vault.note_examined("id-1", "p1", damaged="", proved_at=5.5) == "disk vda: a byte"
    found = vault.points("id-1")[0]
    assert (found.damaged, found.proved_at, found.proved_to) == ("", 5.5, 0)
    assert vault.note_examined("id-1", "none", damaged="x", proved_at=None) is None
    assert vault.damaged_counts() == {}
    vault.note_examined("id-1", "p1", damaged="x", proved_at=6.5)
    vault.mark_dropping("id-1", ["p1"])
    assert vault.damaged_counts() == {}


def test_old_points_come_with_the_head_and_without_those_between(vault: Vault) -> None:
    assert vault.last_kept_at("id-1") is None
    for number in (1, 2, 3, 4):
        record(vault, number, kept=number < 4)
    assert [item.id for item in vault.aging_points("id-1", 1002.0)] == ["p1", "p4"]
    assert [item.id for item in vault.aging_points("id-1", 9999.0)] == ids(vault)
    assert vault.last_kept_at("id-1") == 1003.0
    vault.mark_dropping("id-1", ["p1", "p3"])
    assert [item.id for item in vault.aging_points("id-1", 1002.0)] == ["p4"]
    assert vault.last_kept_at("id-1") == 1002.0


def test_the_newest_cycle_of_all_machines(vault: Vault) -> None:
    vault.add_protection(machine(2))
    assert vault.last_cycles() == {}
    record(vault, 1)
    record(vault, 2)
    assert vault.last_cycles() == {"id-1": stats(2)}


def test_the_head_is_what_was_recorded_last_whatever_the_clock_said(vault: Vault) -> None:
    record(vault, 1)
    vault.begin_cycle("id-1", cycle(2))
    vault.record_point("id-1", "c2", attrs.evolve(point(2), taken_at=1.0), stats=stats(2))
    assert vault.heads()["id-1"].id == "p2"


def test_a_pending_cycle_is_what_was_put_in(vault: Vault) -> None:
    begun = vault.begin_cycle("id-1", cycle(1))
    assert begun == vault.protection("id-1") == attrs.evolve(machine(), pending=cycle(1))
    assert vault.protections() == [begun]
    assert begun.pending is not None
    assert begun.pending.plan["vda"] == cycle(1).plan["vda"]


def test_a_replan_replaces_the_record(vault: Vault) -> None:
    vault.begin_cycle("id-1", cycle(1))
    other = attrs.evolve(cycle(1), taken_at=2000.0, view_mark=Mark("later"), plan={})
    assert vault.replan_cycle("id-1", other).pending == other
    assert vault.protection("id-1").pending == other


def test_only_the_cycle_under_way_is_accepted(vault: Vault) -> None:
    actions: list[Callable[[], object]] = [
        lambda: vault.replan_cycle("id-1", cycle(1)),
        lambda: vault.record_point("id-1", "c1", point(1), stats=stats(1)),
    ]
    for action in actions:
        with pytest.raises(WrongCycle, match="none is pending"):
            action()
    before = vault.begin_cycle("id-1", cycle(1))
    assert vault.begin_cycle("id-1", cycle(1)) == before
    actions = [
        lambda: vault.begin_cycle("id-1", cycle(2)),
        lambda: vault.replan_cycle("id-1", cycle(2)),
        lambda: vault.abandon_cycle("id-1", "c2"),
        lambda: vault.record_point("id-1", "c2", point(2), stats=stats(2)),
    ]
    for action in actions:
        with pytest.raises(WrongCycle, match="c1 is pending"):
            action()
    with pytest.raises(WrongCycle, match="its point is p1, not p2"):
        vault.record_point("id-1", "c1", point(2), stats=stats(1))
    assert vault.protection("id-1") == before
    assert ids(vault) == []


def test_a_delta_builds_on_the_head(vault: Vault) -> None:
    record(vault, 1)
    for base in (None, "p0"):
        with pytest.raises(StaleBase):
            vault.begin_cycle("id-1", cycle(2, base, CycleMode.DELTA))
    vault.begin_cycle("id-1", cycle(2, "p1", CycleMode.DELTA))
    with pytest.raises(StaleBase):
        vault.replan_cycle("id-1", cycle(2, "p0", CycleMode.DELTA))


def test_an_abandoned_cycle_leaves_mark_and_head(vault: Vault) -> None:
    before = record(vault, 1)
    vault.begin_cycle("id-1", cycle(2))
    assert vault.abandon_cycle("id-1", "c2") == before
    assert vault.abandon_cycle("id-1", "c2") == before
    assert vault.protection("id-1") == before


def test_recording_moves_everything_at_once(vault: Vault) -> None:
    vault.transition("id-1", Event.REPLICA_CREATED, attempt=3, retry_at=5.0, error={"code": "x"})
    vault.begin_cycle("id-1", cycle(1))
    recorded = vault.record_point("id-1", "c1", point(1), event=Event.COPIED, stats=stats(1))
    expected = attrs.evolve(
        machine(), state=State.FINALIZING, head_point="p1", mark=Mark("mark-1"), last_cycle_at=1001.1
    )
    assert recorded == vault.protection("id-1") == expected
    assert vault.points("id-1") == [point(1)]
    assert vault.cycles("id-1") == [stats(1)]


def test_recording_again_changes_nothing(vault: Vault) -> None:
    record(vault, 1)
    before = vault.begin_cycle("id-1", cycle(2, "p1"))
    again = vault.record_point("id-1", "c1", point(1, kept=True), event=Event.COMMIT, stats=stats(1))
    assert again == vault.protection("id-1") == before
    assert vault.points("id-1") == [point(1)]
    assert vault.cycles("id-1") == [stats(1)]


def test_a_wrong_state_records_nothing(vault: Vault) -> None:
    before = vault.begin_cycle("id-1", cycle(1))
    with pytest.raises(WrongState):
        vault.record_point("id-1", "c1", point(1), event=Event.RESYNCED, stats=stats(1))
    assert vault.protection("id-1") == before
    assert (vault.points("id-1"), vault.cycles("id-1")) == ([], [])


def test_a_head_that_is_not_kept_gives_way(vault: Vault) -> None:
    record(vault, 1)
    record(vault, 2, kept=True)
    assert ids(vault) == ["p2"]
    record(vault, 3)
    assert ids(vault) == ["p2", "p3"]
    vault.pin_point("id-1", "p3", True)
    record(vault, 4)
    record(vault, 5)
    assert ids(vault) == ["p2", "p3", "p5"]
    assert [item.pinned for item in vault.points("id-1")] == [False, True, False]


def test_order_is_that_of_recording_even_if_a_clock_went_back(vault: Vault) -> None:
    record(vault, 9, kept=True)
    record(vault, 2, kept=True)
    assert ids(vault) == ["p9", "p2"]
    assert vault.protection("id-1").head_point == "p2"


def test_forgetting_the_mark_keeps_the_points(vault: Vault) -> None:
    before = record(vault, 1)
    forgotten = vault.forget_mark("id-1", "bitmap is gone")
    assert forgotten == attrs.evolve(before, mark=None, resync_reason="bitmap is gone")
    assert vault.protection("id-1") == forgotten


def test_a_finished_resync_has_no_reason_any_more(vault: Vault) -> None:
    vault.transition("id-1", Event.REPLICA_CREATED)
    vault.begin_cycle("id-1", cycle(1))
    vault.record_point("id-1", "c1", point(1), event=Event.COPIED, stats=stats(1))
    for event in (Event.FINALIZED, Event.LOSE_TRACKING, Event.START_RESYNC):
        vault.transition("id-1", event, resync_reason="lost")
    vault.begin_cycle("id-1", cycle(2))
    done = vault.record_point("id-1", "c2", point(2), event=Event.RESYNCED, stats=stats(2))
    assert (done.state, done.resync_reason) == (State.PROTECTED, "")


def test_dropping_goes_through_the_vault_twice(vault: Vault) -> None:
    for number in range(1, 6):
        record(vault, number, kept=True)
    vault.pin_point("id-1", "p2", True)
    vault.update("id-1", failover_point="p4", test=TestRun("t", "p3", "m", 0.0))
    assert vault.mark_dropping("id-1", ["p5", "p4", "p3", "p2", "p1", "p0"]) == ["p1"]
    vault.update("id-1", test=None)
    assert vault.mark_dropping("id-1", ["p1", "p3"]) == ["p3"]
    assert vault.dropping("id-1") == ["p1", "p3"]
    assert ids(vault) == ["p2", "p4", "p5"]
    with pytest.raises(PointNotFound):
        vault.pin_point("id-1", "p1", True)
    vault.forget_points("id-1", ["p1", "p0"])
    assert vault.dropping("id-1") == ["p3"]
    vault.forget_points("id-1", ["p3", "p5"])
    assert ids(vault) == ["p2", "p4", "p5"], "the head stays"


def test_many_points_at_once(vault: Vault) -> None:
    for number in range(1, 9):
        record(vault, number, kept=True)
    many = [f"x{number}" for number in range(3000)] + ["p1", "p2"]
    assert vault.mark_dropping("id-1", many) == ["p1", "p2"]
    vault.forget_points("id-1", many)
    assert vault.dropping("id-1") == []


def test_pinning_what_is_not_there(vault: Vault) -> None:
    with pytest.raises(PointNotFound, match="'web-1' has no recovery point 'p7'"):
        vault.pin_point("id-1", "p7", True)


def test_statistics_are_bounded(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cycles, "STATISTICS_ROWS", 5)
    vault.add_protection(samples.machine(2))
    record(vault, 1, protection_id="id-2")
    for number in range(1, 9):
        record(vault, number)
    assert [item.id for item in vault.cycles("id-1")] == ["c4", "c5", "c6", "c7", "c8"]
    assert [item.id for item in vault.cycles("id-1", limit=2)] == ["c7", "c8"]
    assert [item.id for item in vault.cycles("id-1", since=1006.5)] == ["c6", "c7", "c8"]
    assert [item.id for item in vault.cycles("id-2")] == ["c1"]
    monkeypatch.setattr(_cycles, "STATISTICS_AGE", 2.5)
    record(vault, 9)
    assert [item.id for item in vault.cycles("id-1")] == ["c7", "c8", "c9"]


def committed(vault: Vault) -> None:
    record(vault, 1, kept=True)
    record(vault, 2)
    with vault._write("test") as connection:
        connection.exec_driver_sql("UPDATE protections SET state='committed', epoch=4, planned=true")
    vault.update(
        "id-1", target_machine="uuid-t", failover_point="p2", attempt=2, networks=NetworkMap({"a": "b"}), error={"x": 1}
    )


def reverse(vault: Vault, replica_id: str = "back-1") -> Protection:
    return vault.start_reverse(
        "id-1",
        replica_id=replica_id,
        source_machine="uuid-t",
        seed_machine="uuid-1",
        networks=NetworkMap({"b": "a"}),
        test_network="lab",
    )


def test_a_reversal_turns_everything_at_once(vault: Vault) -> None:
    committed(vault)
    expected = attrs.evolve(
        machine(),
        state=State.REVERSING,
        source_site="south",
        source_machine="uuid-t",
        target_site="north",
        replica_id="back-1",
        seed_machine="uuid-1",
        networks=NetworkMap({"b": "a"}),
        test_network="lab",
        epoch=next_generation(4),
    )
    assert reverse(vault) == vault.protection("id-1") == expected
    assert (ids(vault), vault.dropping("id-1")) == ([], [])
    assert len(vault.cycles("id-1")) == 2


def test_an_interrupted_reversal_is_not_turned_again(vault: Vault) -> None:
    committed(vault)
    first = reverse(vault)
    vault.begin_cycle("id-1", cycle(7))
    assert reverse(vault, "back-2") == attrs.evolve(first, pending=cycle(7))


def test_a_reversal_waits_for_the_fence(vault: Vault) -> None:
    committed(vault)
    before = vault.update("id-1", fence_due=True)
    with pytest.raises(WrongState, match="cannot be re-protected"):
        reverse(vault)
    assert vault.protection("id-1") == before
    assert ids(vault) == ["p1", "p2"]


def test_a_reversal_needs_a_committed_machine_that_is_free(vault: Vault) -> None:
    with pytest.raises(WrongState):
        reverse(vault)
    committed(vault)
    vault.add_protection(attrs.evolve(machine(2), source_site="south", source_machine="uuid-t", target_site="north"))
    with pytest.raises(AlreadyProtected, match="as 'web-2'"):
        reverse(vault)
    assert vault.protection("id-1").state is State.COMMITTED


def test_unknown_machine_has_no_points_and_marks_nothing(vault: Vault) -> None:
    assert (vault.points("id-9"), vault.dropping("id-9"), vault.cycles("id-9")) == ([], [], [])


def test_only_a_recorded_point_writes_a_mark() -> None:
    """Invariant 2, checked in the code's text as well: everything else can only remove the mark."""
    source = inspect.getsource(_cycles) + "".join(
        inspect.getsource(getattr(Vault, name)) for name in ("update", "transition", "forget_mark", "_change")
    )
    assert [line.strip() for line in source.splitlines() if "mark=" in line] == [
        "mark=pending.view_mark,",
        "self._store(connection, protection, head_point=None, mark=None)",
        "mark=None,",
        "protection = self._store(connection, protection, head_point=head, mark=None, pending=None)",
        "return self._store(connection, protection, mark=None, resync_reason=reason)",
    ]


class Model:
    """The expected state of the vault, in the simplest form."""

    def __init__(self) -> None:
        self.head: str | None = None
        self.mark: Mark | None = None
        self.pending: int | None = None
        self.points: dict[str, bool] = {}


@settings(max_examples=25)
@given(steps=st.lists(st.sampled_from(["begin", "record", "keep", "abandon", "forget", "drop"]), max_size=25))
def test_any_course_of_cycles(steps: list[str], tmp_path_factory: pytest.TempPathFactory, made_once: Path) -> None:
    path = tmp_path_factory.mktemp("course") / "vault.db"
    path.write_bytes(made_once.read_bytes())
    model = Model()
    with Vault.open(path) as vault:
        for number, step in enumerate(steps):
            if step == "begin" and model.pending is None:
                model.pending = number
                vault.begin_cycle("id-1", cycle(number, model.head))
            elif step in ("record", "keep") and model.pending is not None:
                made = point(model.pending, kept=step == "keep")
                vault.record_point("id-1", f"c{model.pending}", made, stats=stats(model.pending))
                if model.head and not model.points[model.head]:
                    del model.points[model.head]
                model.head, model.mark = made.id, Mark(f"mark-{model.pending}")
                model.points[made.id] = made.kept
                model.pending = None
            elif step == "abandon" and model.pending is not None:
                vault.abandon_cycle("id-1", f"c{model.pending}")
                model.pending = None
            elif step == "forget":
                vault.forget_mark("id-1", "test")
                model.mark = None
            elif step == "drop":
                gone = vault.mark_dropping("id-1", list(model.points))
                vault.forget_points("id-1", gone)
                model.points = {key: kept for key, kept in model.points.items() if key not in gone}
            found = vault.protection("id-1")
            assert (found.head_point, found.mark) == (model.head, model.mark)
            assert (found.pending and found.pending.id) == (None if model.pending is None else f"c{model.pending}")
            assert ids(vault) == list(model.points)
            assert model.head is None or ids(vault)[-1] == model.head
