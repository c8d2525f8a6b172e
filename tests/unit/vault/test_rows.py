"""Values are read back as they were stored; an unreadable value is reported, never guessed."""

from __future__ import annotations

from contextlib import suppress

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection

from asrcore.errors import VaultDamaged
from asrcore.model.extent import Extent
from asrcore.model.point import Consistency
from asrcore.model.policy import Bandwidth, Policy, Rung, Window
from asrcore.vault import Job, Vault
from asrcore.vault._rows import pack_plan, unpack_plan
from tests.unit.vault import samples

extents = st.builds(Extent, st.integers(0, 2**62), st.integers(0, 2**60), st.booleans())
plans = st.dictionaries(st.text(max_size=12), st.lists(extents, max_size=20).map(tuple), max_size=4)


@given(plan=plans)
def test_a_plan_comes_back(plan: dict[str, tuple[Extent, ...]]) -> None:
    assert unpack_plan(pack_plan(plan)) == plan


@given(plan=plans, where=st.floats(0, 0.999), value=st.integers(1, 255))
def test_a_damaged_plan_is_reported(plan: dict[str, tuple[Extent, ...]], where: float, value: int) -> None:
    packed = bytearray(pack_plan(plan))
    packed[int(where * len(packed))] ^= value
    with suppress(ValueError):
        assert unpack_plan(bytes(packed)) == plan  # a bit that does not matter
    with pytest.raises(ValueError, match="cannot be read"):
        unpack_plan(pack_plan(plan)[:-1])


def test_a_large_plan_is_small() -> None:
    plan = {"vda": tuple(Extent(number * 131072, 65536, number % 7 == 0) for number in range(100_000))}
    packed = pack_plan(plan)
    assert len(packed) < 300_000
    assert unpack_plan(packed) == plan


def test_a_policy_comes_back(vault: Vault) -> None:
    policy = Policy(
        "all",
        interval=7.5,
        point_interval=60,
        keep=7200,
        ladder=(Rung(60, 600), Rung(3600, 1200)),
        consistency=Consistency.APPLICATION,
        freeze_limit=3.25,
        resync_window=Window(3600, 7200),
        resync_threshold=0.125,
        bandwidth=(Bandwidth(2.5e6, Window(28800, 64800)), Bandwidth(1.25e7)),
        verify_every=86400.5,
        scrub_every=43200.5,
    )
    assert all(getattr(policy, field.name) != field.default for field in attrs.fields(Policy))
    vault.add_policy(policy)
    assert vault.policy("all") == policy


DAMAGE = {
    "state": "UPDATE protections SET state='dreaming'",
    "networks": "UPDATE protections SET networks='[1]'",
    "test": "UPDATE protections SET test='{\"x\":1}'",
    "error": "UPDATE protections SET error='{'",
    "cycle-mode": "UPDATE pending_cycles SET mode='x'",
    "plan": "UPDATE pending_cycles SET plan=CAST('' AS BYTEA)",
    "consistency": "UPDATE points SET consistency='hopeful'",
    "statistics": "UPDATE cycles SET mode='x'",
    "settings": "UPDATE sites SET settings='nothing'",
    "policy-value": "UPDATE policies SET body=replace(body, '\"interval\":5.0', '\"interval\":-1')",
    "policy-field": "UPDATE policies SET body='{}'",
    "job": "UPDATE jobs SET state='x'",
    "log": "UPDATE events SET data=''",
}


def damage(connection: Connection, what: str) -> None:
    statement = DAMAGE[what]
    if connection.dialect.name == "sqlite":
        statement = statement.replace("BYTEA", "BLOB")
    assert connection.exec_driver_sql(statement).rowcount > 0


def read_all(vault: Vault) -> None:
    for protection in vault.protections():
        assert protection.pending is not None
        len(protection.pending.plan)
        vault.points(protection.id)
        vault.cycles(protection.id)
    for listing in (vault.sites, vault.policies, vault.jobs, vault.events):
        listing()


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_row_is_reported(what: str, vault: Vault) -> None:
    samples.record(vault, 1)
    vault.begin_cycle("id-1", samples.cycle(2))
    vault.add_job(Job("j1", "x"))
    vault.add_event(0, "", "x", "x")
    with vault._write("damage") as connection:
        damage(connection, what)
    with pytest.raises(VaultDamaged) as caught:
        read_all(vault)
    assert vault.url in str(caught.value)


def test_a_protection_with_a_damaged_plan_is_still_listed(vault: Vault) -> None:
    """So that its state can be seen, and the cycle abandoned."""
    vault.begin_cycle("id-1", samples.cycle(1))
    with vault._write("damage") as connection:
        damage(connection, "plan")
    assert [item.name for item in vault.protections()] == ["web-1"]
    assert vault.abandon_cycle("id-1", "c1").pending is None
