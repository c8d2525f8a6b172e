"""A vault on PostgreSQL: what is specific to a database server. Everything else is tested on both, see `conftest`."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import attrs
import psycopg
import pytest

from asrcore.errors import (
    NotAssigned,
    NotAVault,
    ServerReplaced,
    VaultExists,
    VaultInUse,
    VaultNotFound,
    VaultTooNew,
    VaultUnavailable,
)
from asrcore.vault import Vault, _rows, _upgrade, _versions
from tests.postgres import Cluster
from tests.unit.vault import samples
from tests.unit.vault.test_upgrade import NEXT, NOW, PATCH


@pytest.fixture
def empty(postgres: Cluster) -> Iterator[str]:
    """An empty database, for this test only."""
    url = postgres.create()
    yield url
    postgres.drop(url)


def execute(url: str, statement: str) -> list[tuple[object, ...]]:
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def version(url: str) -> list[tuple[object, ...]]:
    return execute(url, "SELECT version_num FROM asr_version")


def test_a_hosts_clock_is_compared_with_the_servers(empty: str) -> None:
    with Vault.create(empty) as vault:
        for ahead in (-600.0, 0.0, 90.0):
            assert vault.clock_skew(lambda ahead=ahead: time.time() + ahead) == pytest.approx(ahead, abs=1)  # type: ignore[misc]


def test_made_once_and_found_again(empty: str) -> None:
    with pytest.raises(VaultNotFound):
        Vault.open(empty)
    with Vault.create(empty) as vault:
        vault.add_site(samples.NORTH)
    with pytest.raises(VaultExists):
        Vault.create(empty)
    with Vault.open(empty) as vault:
        assert vault.sites() == [samples.NORTH]


def test_a_database_of_something_else_is_left_alone(empty: str) -> None:
    execute(empty, "CREATE TABLE songs (title TEXT)")
    for action in (Vault.open, Vault.create):
        with pytest.raises(NotAVault):
            action(empty)
    assert execute(empty, "SELECT tablename FROM pg_tables WHERE schemaname='public'") == [("songs",)]


def test_no_such_database(empty: str) -> None:
    for action in (Vault.open, Vault.create):
        with pytest.raises(VaultUnavailable, match="does not exist"):
            action(empty.replace("?", "x?"))


def test_of_two_who_create_one_wins(empty: str) -> None:
    code = """
    from asrcore.errors import VaultExists
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        Vault.create(sys.argv[1]).close()
        print("made")
    except VaultExists:
        print("was there")
    """
    children = [samples.child(code, empty) for _ in range(3)]
    for process in children:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    said = [process.communicate("\n", timeout=60) for process in children]
    assert sorted(out for out, _ in said) == ["made\n", "was there\n", "was there\n"], said


def test_a_killed_creation_leaves_an_empty_database(empty: str) -> None:
    code = """
    from asrcore.vault import _upgrade
    from asrcore.crashpoint import reach
    migrate = _upgrade.migrate
    _upgrade.migrate = lambda connection: (migrate(connection), reach("test.migrated"))
    Vault.create(sys.argv[1])
    """
    status, said = samples.run(code, empty, ASRCORE_CRASH_AT="test.migrated")
    assert status == -signal.SIGKILL, said
    Vault.create(empty).close()


def test_lost_connections_are_made_again(empty: str) -> None:
    """A server that restarts, or a firewall that drops its state: the next use reconnects."""
    with Vault.create(empty) as vault:
        vault.add_site(samples.NORTH)
        execute(empty, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        assert vault.sites() == [samples.NORTH]


def test_a_connection_lost_in_a_transaction_records_nothing(empty: str) -> None:
    with Vault.create(empty) as vault:

        def cut_off() -> None:
            with vault._write("test") as connection:
                connection.exec_driver_sql("INSERT INTO sites VALUES ('x', 'memory', '{}')")
                execute(empty, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")

        with pytest.raises(VaultUnavailable):
            cut_off()
        assert vault.sites() == []


# -- upgrades ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(empty: str) -> str:
    """A vault of today's version, which the `future` upgrades."""
    with Vault.create(empty) as vault:
        vault.add_site(samples.NORTH)
        vault.add_site(samples.SOUTH)
        vault.add_policy(samples.GOLD)
        vault.add_protection(samples.machine())
    return empty


@pytest.fixture
def future(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    migrations = tmp_path / "future" / "migrations"
    shutil.copytree(_upgrade.MIGRATIONS, migrations, ignore=shutil.ignore_patterns("__pycache__"))
    (migrations / "versions" / "next.py").write_text(NEXT)
    return migrations


def test_a_vault_of_the_first_version_is_read_as_it_was(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "migrations"
    newer = [f"v{number}.py" for number in _versions.REVISIONS[1:]]
    shutil.copytree(_upgrade.MIGRATIONS, first, ignore=shutil.ignore_patterns("__pycache__", *newer))
    with monkeypatch.context() as patch:
        patch.setattr("asrcore.vault._vault.REVISIONS", ("0001",))
        patch.setattr(_upgrade, "MIGRATIONS", first)
        Vault.create(empty).close()
    policy = attrs.evolve(samples.GOLD, keep=7200.0)
    body = json.loads(str(_rows.policy_row(policy)["body"]))
    del body["bandwidth"]
    execute(empty, f"INSERT INTO policies VALUES ('gold', '{json.dumps(body)}')")
    with Vault.open(empty) as vault:
        assert vault.policy("gold") == policy
        vault.add_site(samples.NORTH)
        vault.add_site(samples.SOUTH)
        vault.add_protection(samples.machine())
        samples.record(vault, 1, kept=True)
        assert vault.last_kept_at("id-1") == 1001.0


def test_two_upgrade_at_once(old: str, future: Path) -> None:
    code = PATCH + '    Vault.open(sys.argv[1]).close(); print("open")'
    children = [samples.child(code, old, future) for _ in range(3)]
    said = [process.communicate(timeout=60) for process in children]
    assert [out for out, _ in said] == ["open\n"] * 3, said
    assert version(old) == [("next",)]
    assert execute(old, "SELECT name, note FROM sites ORDER BY name") == [("north", "none"), ("south", "none")]
    with pytest.raises(VaultTooNew):
        Vault.open(old)


@pytest.mark.parametrize(("at", "after"), [("vault.upgrade.written", NOW), ("vault.upgrade.committed", "next")])
def test_a_killed_upgrade_did_all_or_nothing(at: str, after: str, old: str, future: Path) -> None:
    status, said = samples.run(PATCH + "    Vault.open(sys.argv[1])", old, future, ASRCORE_CRASH_AT=at)
    assert status == -signal.SIGKILL, said
    assert version(old) == [(after,)]
    assert execute(old, "SELECT name FROM protections") == [("web-1",)]


def test_a_running_engine_keeps_its_vault(old: str, future: Path) -> None:
    code = PATCH + "    Vault.open(sys.argv[1])"
    with Vault.open(old) as vault, vault.engine_lock("old engine"):
        status, said = samples.run(code, old, future)
        assert status == 1
        assert VaultInUse.__name__ in said
        assert "old engine" in said
        assert version(old) == [(NOW,)]
    assert samples.run(code, old, future) == (0, "")
    assert version(old) == [("next",)]


def test_servers_keep_their_vault_also_when_their_lock_is_lost(old: str, future: Path) -> None:
    """The lock is lost when the database restarts, and taken again some seconds later."""
    code = PATCH + "    Vault.open(sys.argv[1])"
    with Vault.open(old) as vault:
        vault.join("one", "s1", host="host-1", sites=None, lease=60.0)
        vault.assign(lambda servers, machines: {"id-1": "s1"})
        status, said = samples.run(code, old, future)
        assert (status, version(old)) == (1, [(NOW,)])
        assert "one on host-1" in said
        execute(old, "UPDATE servers SET beat_at = beat_at - 61")
        assert samples.run(code, old, future) == (0, "")
        assert version(old) == [("next",)]
        with pytest.raises((NotAssigned, VaultUnavailable)):  # it was only paused, and does not know this schema
            vault.update("id-1", attempt=1)
        with pytest.raises(ServerReplaced):
            vault.beat()
