"""Sites, policies and machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest

from asrcore.errors import (
    AlreadyExists,
    AlreadyProtected,
    InvalidValue,
    NotFound,
    StillInUse,
    WrongState,
)
from asrcore.model.finding import Finding, Severity
from asrcore.model.point import Mark
from asrcore.model.policy import Policy
from asrcore.model.protection import NetworkMap, Protection, Site, TestRun
from asrcore.model.state import Event, State
from asrcore.vault import Changes, Vault
from tests.unit.vault import samples

OWN_METHODS = {
    "mark": Mark("x"),
    "head_point": "p9",
    "state": State.PROTECTED,
    "pending": None,
    "id": "other",
    "source_site": "south",
    "source_machine": "x",
    "target_site": "north",
    "home_site": "south",
    "replica_id": "x",
    "created_at": 0.0,
    "last_cycle_at": 0.0,
}


def test_sites(vault: Vault) -> None:
    vault.add_site(Site("east", "memory", {}))
    assert [site.name for site in vault.sites()] == ["east", "north", "south"]
    vault.update_site(Site("east", "other", {"a": "ü"}))
    assert vault.site("east") == Site("east", "other", {"a": "ü"})
    vault.remove_site("east")
    actions: tuple[Callable[[], object], ...] = (lambda: vault.site("east"), lambda: vault.remove_site("east"))
    for action in actions:
        with pytest.raises(NotFound) as caught:
            action()
        assert "asr site list" in caught.value.action_text
    with pytest.raises(NotFound):
        vault.update_site(Site("east", "memory", {}))


def test_policies(vault: Vault) -> None:
    vault.add_policy(Policy("slow", interval=600, point_interval=900))
    assert [policy.name for policy in vault.policies()] == ["gold", "slow"]
    vault.update_policy(Policy("slow", interval=700, point_interval=900))
    assert vault.policy("slow").interval == 700
    vault.remove_policy("slow")
    with pytest.raises(NotFound, match="policy 'slow'"):
        vault.policy("slow")


def test_names_are_unique(vault: Vault) -> None:
    with pytest.raises(AlreadyExists, match="site 'north'"):
        vault.add_site(samples.NORTH)
    with pytest.raises(AlreadyExists, match="policy 'gold'"):
        vault.add_policy(samples.GOLD)


@pytest.mark.parametrize("name", ["", " a", "a\n", "a\0", "x" * 65, "\ud800"], ids=repr)
def test_names_are_checked(name: str, vault: Vault) -> None:
    with pytest.raises(InvalidValue):
        vault.add_site(Site(name, "memory", {}))
    with pytest.raises(InvalidValue):
        vault.add_protection(attrs.evolve(samples.machine(2), name=name * 4))


@pytest.mark.parametrize("name", ["", " lead", "-rf", "../../etc/x", "a/b", ".hidden", "a\0"], ids=repr)
def test_what_an_operator_names_fits_a_command_line(name: str, vault: Vault) -> None:
    with pytest.raises(InvalidValue):
        vault.add_policy(Policy(name))
    with pytest.raises(InvalidValue):
        vault.add_site(Site(name, "memory", {}))


def test_what_is_in_use_stays(vault: Vault) -> None:
    with pytest.raises(StillInUse, match="site 'south' is in use by web-1"):
        vault.remove_site("south")
    with pytest.raises(StillInUse, match="policy 'gold' is in use by web-1"):
        vault.remove_policy("gold")
    for number in range(2, 9):
        vault.add_protection(samples.machine(number))
    with pytest.raises(StillInUse, match="web-5 and 3 more"):
        vault.remove_site("north")
    assert len(vault.sites()) == 2


def test_a_machine_is_found_by_name_and_id(vault: Vault) -> None:
    assert vault.protection("web-1") == vault.protection("id-1") == samples.machine()
    vault.add_protection(samples.machine(2))
    assert vault.protections() == [samples.machine(1), samples.machine(2)]
    with pytest.raises(NotFound) as caught:
        vault.protection("web-3")
    assert "asr status" in caught.value.action_text


def test_adding_the_same_machine_again_changes_nothing(vault: Vault) -> None:
    vault.transition("id-1", Event.REPLICA_CREATED)
    assert vault.add_protection(samples.machine()).state is State.INITIAL_COPY
    assert vault.protection("id-1").state is State.INITIAL_COPY


def test_a_machine_is_protected_once(vault: Vault) -> None:
    with pytest.raises(AlreadyProtected, match="'uuid-1' of site 'north' is already protected, as 'web-1'"):
        vault.add_protection(attrs.evolve(samples.machine(2), source_machine="uuid-1"))
    with pytest.raises(AlreadyProtected, match="a machine named 'web-1'"):
        vault.add_protection(attrs.evolve(samples.machine(2), name="web-1"))
    vault.add_protection(attrs.evolve(samples.machine(2), source_site="south", source_machine="uuid-1"))
    assert len(vault.protections()) == 2


@pytest.mark.parametrize("field", ["policy", "home_site", "source_site", "target_site"])
def test_a_machine_needs_what_it_names(field: str, vault: Vault) -> None:
    wrong: dict[str, Any] = {field: "nowhere"}
    with pytest.raises(NotFound, match="'nowhere'"):
        vault.add_protection(attrs.evolve(samples.machine(2), **wrong))


def test_a_new_machine_has_no_points(vault: Vault) -> None:
    with pytest.raises(ValueError, match="come with points"):
        vault.add_protection(attrs.evolve(samples.machine(2), mark=Mark("x")))


def test_every_changeable_field_changes(vault: Vault) -> None:
    vault.add_policy(Policy("slow"))
    changes: dict[str, Any] = {
        "name": "ünder 'quotes'",
        "policy": "slow",
        "networks": NetworkMap({"lan": "dmz"}),
        "test_network": "lab",
        "replica_kind": "reflink",
        "epoch": 3,
        "target_machine": "uuid-t",
        "failover_point": "p1",
        "planned": True,
        "fence_due": True,
        "seed_machine": "uuid-s",
        "test": TestRun("t1", "p1", "uuid-x", 7.0),
        "last_test_at": 8.5,
        "last_scrub_at": 9.5,
        "resync_reason": "because",
        "attempt": 4,
        "retry_at": 9.5,
        "error": {"code": "target-full", "retry": True},
        "notices": (Finding("machine-has-snapshots", Severity.WARNING, "what", "cause", "action"),),
        "restored": True,
    }
    assert set(changes) == set(Changes.__annotations__)
    expected = attrs.evolve(samples.machine(), **changes)
    assert vault.update("id-1", **changes) == expected
    assert vault.protection("id-1") == expected
    assert vault.update("id-1", test=None, error=None) == attrs.evolve(expected, test=None, error=None)


def test_every_other_field_has_its_own_method(vault: Vault) -> None:
    assert set(OWN_METHODS) | set(Changes.__annotations__) == {field.name for field in attrs.fields(Protection)}
    for name, value in OWN_METHODS.items():
        changes: Any = {name: value}
        with pytest.raises(TypeError, match=name):
            vault.update("id-1", **changes)
        with pytest.raises(TypeError, match=name):
            vault.transition("id-1", Event.REPLICA_CREATED, **changes)
    assert vault.protection("id-1") == samples.machine()


def test_a_refused_change_changes_nothing(vault: Vault) -> None:
    vault.add_protection(samples.machine(2))
    vault.update("id-1", epoch=5)
    with pytest.raises(ValueError, match="ownership never goes back"):
        vault.update("id-1", epoch=4, attempt=1)
    with pytest.raises(NotFound):
        vault.update("id-1", policy="nowhere", attempt=1)
    with pytest.raises(AlreadyProtected):
        vault.update("id-1", name="web-2", attempt=1)
    with pytest.raises(NotFound):
        vault.update("id-9", attempt=1)
    assert vault.protection("id-1") == attrs.evolve(samples.machine(), epoch=5)


def test_a_transition_comes_with_its_changes(vault: Vault) -> None:
    changed = vault.transition("id-1", Event.REPLICA_CREATED, attempt=2)
    assert (changed.state, changed.attempt) == (State.INITIAL_COPY, 2)
    assert vault.protection("id-1") == changed
    with pytest.raises(WrongState, match="cannot be failed over while it is initial-copy"):
        vault.transition("id-1", Event.FAIL_OVER, attempt=3)
    assert vault.protection("id-1") == changed


def test_removing_a_machine_takes_all_of_it(vault: Vault) -> None:
    samples.record(vault, 1, kept=True)
    vault.begin_cycle("id-1", samples.cycle(2))
    vault.remove_protection("id-1")
    vault.remove_protection("id-1")
    assert vault.protections() == []
    vault.add_protection(samples.machine())
    assert vault.protection("id-1") == samples.machine()
    assert (vault.points("id-1"), vault.cycles("id-1")) == ([], [])
