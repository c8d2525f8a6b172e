"""Servers and the one engine of a vault on PostgreSQL: their lock and lease, and what they do when these are lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import psycopg
import pytest
from sqlalchemy import update

from asrcore.errors import AsrError, VaultInUse
from asrcore.model.server import ENGINE
from asrcore.service import member
from asrcore.service.member import Member, ServerIdentity
from asrcore.vault import SessionLock, Vault, _schema
from tests.unit.vault.test_server import execute

LEASE = 1.0
LONG = 5.0  # where a server must not lose it on a busy machine


def cut_off(url: str) -> None:
    """As a restart of the database does, or a failover to another one: every session ends."""
    with suppress(psycopg.OperationalError):
        execute(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()")


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it never happened"
        time.sleep(0.02)


@pytest.fixture
def vault(url: str) -> Iterator[Vault]:
    with Vault.open(url) as opened:
        yield opened


def silence(vault: Vault, seconds: float = 100 * LEASE) -> None:
    """As if no server had beaten for that long."""
    with vault._write("test") as connection:
        connection.execute(update(_schema.servers).values(beat_at=_schema.servers.c.beat_at - seconds))


# -- the lock ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lock(vault: Vault) -> Iterator[SessionLock]:
    made = vault.session_lock("asr run")
    yield made
    made.close()


def test_a_lock_whose_session_ended_is_taken_again(lock: SessionLock, vault: Vault, url: str) -> None:
    lock.keep()
    lock.keep()
    assert str(vault.engine_holder()).startswith("asr run")
    cut_off(url)
    assert vault.engine_holder() is None
    lock.keep()
    assert str(vault.engine_holder()).startswith("asr run")


def test_a_lock_that_its_session_lost_is_taken_again(lock: SessionLock, vault: Vault) -> None:
    """As behind a connection pooler that gives the session to others."""
    lock.keep()
    assert lock._connection is not None
    lock._connection.exec_driver_sql("SELECT pg_advisory_unlock_all()")
    lock.keep()
    assert str(vault.engine_holder()).startswith("asr run")


def test_a_lock_that_another_has_taken_meanwhile_is_refused(lock: SessionLock, url: str) -> None:
    lock.keep()
    cut_off(url)
    with Vault.open(url) as other, other.engine_lock("the other"), pytest.raises(VaultInUse, match="the other"):
        lock.keep()
    lock.keep()


# -- members -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def joined(url: str) -> Iterator[Callable[..., tuple[Vault, list[AsrError]]]]:
    with ExitStack() as stack:

        def join(name: str, session: str, *, alone: bool = False, lease: float = LEASE) -> tuple[Vault, list[AsrError]]:
            vault, lost = stack.enter_context(Vault.open(url)), list[AsrError]()
            lock = vault.session_lock(name, shared=not alone)
            stack.callback(lock.close)
            made = Member(
                vault, ServerIdentity(name, session, "here", lease=lease), lost.append, lock=lock, alone=alone
            )
            stack.callback(made.leave)
            made.join(threading.Event())
            return vault, lost

        yield join


Joined = Callable[..., tuple[Vault, list[AsrError]]]


def test_an_engine_whose_session_ended_has_its_lock_again_and_keeps_others_out(
    joined: Joined, vault: Vault, url: str
) -> None:
    _, lost = joined(ENGINE, "s1", alone=True, lease=LONG)
    for _ in range(2):
        cut_off(url)
        with pytest.raises(VaultInUse, match="engine on here"):
            joined(ENGINE, "s2", alone=True, lease=LONG)
        with pytest.raises(VaultInUse):
            joined("one", "s3", lease=LONG)
    until(lambda: vault.engine_holder() is not None)
    assert [item.session for item in vault.servers()] == ["s1"]
    assert not lost


def test_servers_whose_sessions_ended_have_their_lock_again(joined: Joined, vault: Vault, url: str) -> None:
    lost = joined("one", "s1", lease=LONG)[1] + joined("two", "s2", lease=LONG)[1]
    cut_off(url)
    with pytest.raises(VaultInUse, match="last seen 0 s ago"):
        joined(ENGINE, "s9", alone=True, lease=LONG)
    until(lambda: vault.engine_holder() is not None)
    assert [item.name for item in vault.servers()] == ["one", "two"]
    assert not lost


def test_an_engine_that_cannot_have_its_lock_again_ends(
    joined: Joined, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "LINGER", LEASE)
    _, lost = joined(ENGINE, "s1", alone=True)
    with Vault.open(url) as other:
        taken = other.session_lock("an older version")
        cut_off(url)
        until(lambda: _takes(taken))
        try:
            until(lambda: bool(lost))
        finally:
            taken.close()
    assert isinstance(lost[0], VaultInUse)
    assert "an older version" in str(lost[0])


def _takes(lock: SessionLock) -> bool:
    try:
        lock.keep()
    except VaultInUse:
        return False
    return True


class FormerSession:
    """A lock that a session which the database has not ended yet may hold."""

    def __init__(self) -> None:
        self.there = False

    def keep(self) -> None:
        if self.there:
            raise VaultInUse(holder="asr run (pid 1 on here)")


@pytest.mark.parametrize("outages", [1, 2])
def test_an_engine_waits_after_an_outage_until_the_database_has_ended_its_former_session(
    monkeypatch: pytest.MonkeyPatch, outages: int
) -> None:
    """However long the outage was, also of several leases, and one more while it waits."""
    now, lock, vault = [1000.0], FormerSession(), Mock(Vault)
    monkeypatch.setattr(member, "time", SimpleNamespace(monotonic=lambda: now[0]))
    one = Member(vault, ServerIdentity(ENGINE, "s1", "here"), Mock(), lock=cast("SessionLock", lock), alone=True)

    def beats(seconds: float) -> None:
        ends = now[0] + seconds
        while now[0] < ends:
            now[0] += member.LEASE / member.BEATS
            one._beat()

    beats(60)
    for _ in range(outages):
        now[0] += 600
        lock.there = True
        beats(member.LINGER - 3)
    lock.there = False
    beats(60)
    lock.there = True
    beats(member.LINGER)
    with pytest.raises(VaultInUse, match="asr run"):
        beats(2 * member.LEASE / member.BEATS)


def test_the_lock_of_a_host_that_is_gone_is_waited_for(joined: Joined, vault: Vault, url: str) -> None:
    """Its lease ends first; the database notices the end of its session some seconds later."""
    with Vault.open(url) as dead:
        lock = dead.session_lock("asr run")
        lock.keep()
        dead.join(ENGINE, "s0", host="there", sites=None, lease=LEASE, alone=True)
        threading.Timer(2 * LEASE, lock.close).start()
        joined(ENGINE, "s1", alone=True)
    assert [item.session for item in vault.servers()] == ["s1"]


def test_who_could_not_reach_the_vault_judges_nobody_for_a_lease(
    joined: Joined, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, beat = threading.Event(), Vault.beat
    spared: list[bool] = []
    assign = Vault.assign

    def beats(mine: Vault) -> None:
        if away.is_set():
            raise mine._place.unavailable("the server closed the connection")
        beat(mine)

    def assigns(mine: Vault, plan: object, *, spare_silent: bool = False) -> object:
        spared.append(spare_silent)
        return assign(mine, plan, spare_silent=spare_silent)  # type: ignore[arg-type]

    monkeypatch.setattr(Vault, "beat", beats)
    monkeypatch.setattr(Vault, "assign", assigns)
    vault.join("other", "s0", host="there", sites=None, lease=600 * LEASE)
    joined("one", "s1")
    until(lambda: spared[-1:] == [False])
    away.set()
    until(lambda: vault.servers()[0].silent > 0.8 * LEASE)
    silence(vault, 601 * LEASE)
    spared.clear()
    away.clear()
    until(lambda: bool(spared))
    assert spared[0]
    beat(vault)  # the other one is back as well
    until(lambda: False in spared)
    assert sorted(item.name for item in vault.servers()) == ["one", "other"]


@pytest.mark.parametrize(("ahead", "way"), [(600.0, "ahead of"), (-600.0, "behind")])
def test_a_wrong_clock_is_reported_once_and_so_is_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float, way: str
) -> None:
    with Vault.create(tmp_path / "vault.db") as vault:
        one = Member(vault, ServerIdentity("one", "s1", "host-1"), lambda problem: None)
        one._compare_clocks()  # a file has this host's clock
        for skew in (1.9, ahead, ahead, -1.9, 0.0):
            monkeypatch.setattr(type(vault), "clock_skew", lambda vault, clock, skew=skew: skew)
            one._compare_clocks()
        assert [event.text for event in vault.events(kinds=["server"])] == [
            f"the clock of host-1 is 10m 00s {way} the database's",
            "the clock of host-1 agrees with the database's again",
        ]
