"""What a target knows better takes the place of what is recorded, in one transaction."""

from __future__ import annotations

import attrs
import pytest

from asrcore.errors import StaleEpoch
from asrcore.model.epoch import generation, next_generation, shown
from asrcore.model.point import Mark
from asrcore.model.state import State
from asrcore.vault import Changes, Vault
from tests.unit.vault import samples

LATE = 10_000.0  # no point of the samples is later


def ids(vault: Vault) -> list[str]:
    return [point.id for point in vault.points("id-1")]


def test_points_take_the_order_of_the_target(vault: Vault) -> None:
    for number in (1, 3, 5):
        samples.record(vault, number, kept=True)
    held = [samples.point(number, kept=True) for number in (1, 2, 3, 4)]
    found = vault.adopt(vault.protection("id-1"), held, Changes(epoch=next_generation(1)), counted_by=LATE)
    assert ids(vault) == ["p1", "p2", "p3", "p4"]
    assert vault.heads()["id-1"].id == found.head_point == "p4"
    assert (found.mark, found.state, found.epoch) == (None, State.RESYNC_PENDING, next_generation(1))
    counted = [point.taken_at for point in vault.aging_points("id-1", LATE)]
    assert counted == sorted(counted)


def test_a_known_head_keeps_its_mark(vault: Vault) -> None:
    samples.record(vault, 1, kept=True)
    before = vault.protection("id-1")
    held = [samples.point(0, kept=True), attrs.evolve(samples.point(1, kept=True), pinned=True)]
    found = vault.adopt(before, held, Changes(epoch=7), counted_by=LATE)
    assert (found.mark, found.head_point, found.state) == (before.mark, "p1", before.state)
    assert isinstance(found.mark, Mark)
    assert [(point.id, point.pinned) for point in vault.points("id-1")] == [("p0", False), ("p1", True)]


def test_a_point_from_the_future_counts_as_of_now(vault: Vault) -> None:
    samples.record(vault, 1, kept=True)
    future = attrs.evolve(samples.point(2, kept=True), taken_at=5 * LATE)
    vault.adopt(vault.protection("id-1"), [samples.point(1, kept=True), future], Changes(), counted_by=LATE)
    assert vault.counts()["id-1"].counted == LATE


def test_what_was_being_deleted_follows_the_policy_again(vault: Vault) -> None:
    for number in (1, 2):
        samples.record(vault, number, kept=True)
    vault.mark_dropping("id-1", ["p1"])
    held = [samples.point(number, kept=True) for number in (1, 2)]
    vault.adopt(vault.protection("id-1"), held, Changes(), counted_by=LATE)
    assert (ids(vault), vault.dropping("id-1")) == (["p1", "p2"], [])


def test_a_machine_that_has_moved_meanwhile_is_left_as_it_is(vault: Vault) -> None:
    samples.record(vault, 1, kept=True)
    compared = vault.protection("id-1")
    vault.update("id-1", epoch=9)
    with pytest.raises(StaleEpoch):
        vault.adopt(compared, [samples.point(2, kept=True)], Changes(), counted_by=LATE)
    assert ids(vault) == ["p1"]


def test_no_number_of_take_overs_reaches_the_next_generation() -> None:
    assert generation(1 + 10_000_000) == generation(1) == 0
    assert next_generation(1 + 10_000_000) == next_generation(1) > 1 + 10_000_000
    assert [shown(epoch) for epoch in (1, next_generation(1), next_generation(1) + 3)] == ["0.1", "1.0", "1.3"]
