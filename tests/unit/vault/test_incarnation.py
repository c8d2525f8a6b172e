"""An earlier copy of a vault is recognised when it is put back, and nothing else is taken for one."""

from __future__ import annotations

import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from asrcore.vault import Vault, _schema, move
from tests.postgres import Cluster
from tests.put_back import put_back, take_copy
from tests.unit.vault import samples


def renewed(place: str | Path) -> None:
    """What an engine does that starts and ends."""
    with Vault.open(place) as vault:
        assert vault.was_put_back() is False
        vault.begin_incarnation()


def found(place: str | Path) -> bool | None:
    with Vault.open(place) as vault:
        return vault.was_put_back()


def test_a_vault_that_goes_on_is_no_copy(place: str) -> None:
    for _ in range(3):
        renewed(place)


def test_the_machines_of_a_vault_that_was_put_back_are_asked_first(place: str) -> None:
    with Vault.open(place) as vault:
        vault.begin_incarnation(put_back=True)
        assert vault.protection("id-1").restored
        assert not vault.update("id-1", restored=False).restored


def test_a_copy_of_the_file_is_noticed_until_it_has_begun(path: Path, tmp_path: Path) -> None:
    renewed(path)
    copy = take_copy(path, tmp_path / "copy.db")
    renewed(path)
    assert not found(path)
    put_back(copy, path)
    assert found(path)
    assert found(path)
    with Vault.open(path) as vault:
        vault.begin_incarnation(put_back=True)
    renewed(path)


def test_a_copy_that_is_used_alone_is_noticed(path: Path, tmp_path: Path) -> None:
    renewed(path)
    copy = take_copy(path, tmp_path / "copy.db")
    copy.with_name("copy.db.incarnation").unlink()
    assert found(copy)


@pytest.mark.parametrize("at", ["vault.begin-incarnation.beside", "vault.begin-incarnation.written"])
def test_a_kill_is_no_copy(path: Path, at: str) -> None:
    renewed(path)
    code = """
    with Vault.open(sys.argv[1]) as vault:
        vault.begin_incarnation()
    """
    for _ in range(2):
        status, said = samples.run(code, path, ASRCORE_CRASH_AT=at)
        assert status == -signal.SIGKILL, said
        assert not found(path)


def test_a_vault_that_was_moved_is_no_copy(path: Path, tmp_path: Path) -> None:
    renewed(path)
    assert not found(move(path, tmp_path / "moved.db", "test"))


def test_only_the_owner_reads_the_token(path: Path) -> None:
    renewed(path)
    assert path.with_name("vault.db.incarnation").stat().st_mode & 0o777 == 0o600


@pytest.fixture
def url(postgres: Cluster) -> str:
    made = postgres.create()
    Vault.create(made).close()
    return made


def test_a_restored_dump_is_noticed(postgres: Cluster, url: str, tmp_path: Path) -> None:
    renewed(url)
    tools = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_dump"))[-1].parent
    dump = subprocess.run([tools / "pg_dump", "--clean", "--if-exists", url], check=True, capture_output=True).stdout
    renewed(url)
    subprocess.run([tools / "psql", "-q", "-v", "ON_ERROR_STOP=1", url], input=dump, check=True, capture_output=True)
    assert found(url), "into the same database"
    with Vault.open(url) as vault:
        vault.begin_incarnation(put_back=True)
    renewed(url)
    assert not found(url)


def test_another_database_is_noticed(postgres: Cluster, url: str) -> None:
    renewed(url)
    assert found(postgres.create(Cluster.name(url)))
    assert not found(url)


def change_timeline(url: str) -> None:
    """What a standby that becomes the primary shows, and a cluster that is restored to a point in time."""
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        place = "UPDATE incarnation SET place = replace(place, 'timeline=00000001', 'timeline=00000002')"
        assert connection.execute(place).rowcount == 1
        connection.execute("UPDATE incarnation SET written_by = txid_current()")


def test_another_timeline_is_noticed(url: str) -> None:
    renewed(url)
    change_timeline(url)
    assert found(url)


def test_a_standby_that_takes_over_from_the_primary_is_no_copy_for_servers_at_work(url: str) -> None:
    with Vault.open(url) as alive, Vault.open(url) as joining:
        alive.join("one", "s-1", host="h", sites=None, lease=60.0)
        alive.begin_incarnation()
        change_timeline(url)
        joining.join("two", "s-2", host="h", sites=None, lease=60.0)
        assert joining.was_put_back() is None
        alive.begin_incarnation()
        assert joining.was_put_back() is False
        change_timeline(url)
        alive.leave()
        assert joining.was_put_back()


def renewed_by_server(url: str) -> None:
    with Vault.open(url) as vault:
        vault.join("one", "s-0", host="h", sites=None, lease=60.0)
        vault.begin_incarnation()
        vault.leave()


@pytest.mark.parametrize("place", ["database", "timeline"])
def test_servers_that_start_together_notice_an_earlier_copy(postgres: Cluster, url: str, place: str) -> None:
    renewed_by_server(url)
    copy = url
    if place == "timeline":
        change_timeline(url)
    else:
        copy = postgres.create(Cluster.name(url))
    with Vault.open(copy) as first, Vault.open(copy) as second:
        first.join("one", "s-1", host="h", sites=None, lease=60.0)
        second.join("two", "s-2", host="h", sites=None, lease=60.0)
        assert first.was_put_back()
        assert second.was_put_back()
        first.begin_incarnation(put_back=True)
        assert second.was_put_back() is False
        second.begin_incarnation()
        assert first.was_put_back() is False


def test_servers_that_start_together_with_a_new_vault_agree(url: str) -> None:
    with Vault.open(url) as first, Vault.open(url) as second:
        first.join("one", "s-1", host="h", sites=None, lease=60.0)
        second.join("two", "s-2", host="h", sites=None, lease=60.0)
        assert first.was_put_back() is second.was_put_back() is False
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(lambda vault: vault.begin_incarnation(), [first, second]):
                pass
    assert not found(url)


def test_a_server_notices_that_the_database_lost_its_heartbeat(url: str) -> None:
    with Vault.open(url) as vault:
        vault.join("one", "s-1", host="h", sites=None, lease=60.0)
        vault.beat()
        vault.beat()
        assert not vault.lost_transactions()
        with vault._write("test") as connection:
            connection.execute(_schema.servers.update().values(beat_at=_schema.servers.c.beat_at - 0.5))
        vault.beat()
        assert vault.lost_transactions()
        assert not vault.lost_transactions(), "once"
        vault.beat()
        assert not vault.lost_transactions()
