"""Creating and opening: only a vault is opened, other files are not changed, no password is shown."""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from asrcore.errors import (
    AsrError,
    HostIncomplete,
    InvalidValue,
    NotAVault,
    VaultDamaged,
    VaultExists,
    VaultNotFound,
    VaultTooNew,
    VaultUnavailable,
)
from asrcore.vault import Vault, _upgrade
from tests.unit.vault import samples


@pytest.fixture
def vault(path: Path) -> Iterator[Vault]:
    """The properties of a file that these tests compare."""
    with Vault.open(path) as opened:
        yield opened


def test_a_created_vault_opens_again(tmp_path: Path) -> None:
    with Vault.create(tmp_path / "vault.db") as vault:
        vault.add_site(samples.NORTH)
    with Vault.open(tmp_path / "vault.db") as vault:
        assert vault.sites() == [samples.NORTH]


@pytest.mark.parametrize("form", ["path", "text", "url", "pysqlite", "relative", "link"])
def test_a_place_may_be_given_as(form: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(path)
    forms: dict[str, str | Path] = {
        "path": path,
        "text": str(path),
        "url": f"sqlite:///{path}",
        "pysqlite": f"sqlite+pysqlite:///{path}",
        "relative": "vault.db",
        "link": "link",
    }
    with Vault.open(forms[form]) as vault:
        assert vault.url == str(forms[form])
        assert vault.site("north") == samples.NORTH


def test_directories_are_made(tmp_path: Path) -> None:
    odd = tmp_path / "a %d, 'b'" / "c" / "vault.db"
    Vault.create(odd).close()
    assert sorted(item.name for item in odd.parent.iterdir()) == ["vault.db", "vault.db.users"]


def test_files_are_for_the_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Vault.create(tmp_path / "x" / "vault.db") as vault, vault.engine_lock("test"):
            vault.add_site(samples.NORTH)
            files = list((tmp_path / "x").iterdir())
            assert {item.name.removeprefix("vault.db") for item in files} == {"", "-wal", "-shm", ".lock", ".users"}
            assert {stat.S_IMODE(item.stat().st_mode) for item in files} == {0o600}
    finally:
        os.umask(before)


def test_is_durable_and_does_not_block_readers(vault: Vault) -> None:
    with vault._read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}


def test_create_leaves_an_existing_vault_alone(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(VaultExists):
        Vault.create(path)
    assert path.read_bytes() == before


def test_of_two_who_create_one_wins(tmp_path: Path) -> None:
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
    children = [samples.child(code, tmp_path / "vault.db") for _ in range(3)]
    for process in children:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    said = [process.communicate("\n", timeout=60) for process in children]
    assert sorted(out for out, _ in said) == ["made\n", "was there\n", "was there\n"], said
    Vault.open(tmp_path / "vault.db").close()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["vault.db", "vault.db.users"]


def test_what_appears_while_a_vault_is_made_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "vault.db"
    monkeypatch.setattr(_upgrade, "reach", lambda name: place.write_text("mine"))
    with pytest.raises(NotAVault):
        Vault.create(place)
    assert place.read_text() == "mine"
    assert [item.name for item in tmp_path.iterdir()] == ["vault.db"]


def foreign_sqlite(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL").close()
        database.execute("CREATE TABLE songs (title TEXT)").close()


FOREIGN: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("Dear vault,\n" * 50),
    "short": lambda path: path.write_text("x"),
    "empty": lambda path: path.touch(),
    "garbage": lambda path: path.write_bytes(os.urandom(9000)),
    "directory": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "another-database": foreign_sqlite,
    "empty-database": lambda path: sqlite3.connect(path).execute("PRAGMA user_version=1").connection.close(),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_things_are_refused_and_left_as_they_are(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "thing"
    FOREIGN[kind](place)
    before = place.read_bytes() if place.is_file() else b""
    for action in (Vault.open, Vault.create):
        with pytest.raises(NotAVault) as caught:
            action(place)
        assert str(place) in str(caught.value)
    assert [item.name for item in tmp_path.iterdir()] == ["thing"]
    assert not place.is_file() or place.read_bytes() == before


def test_a_database_that_only_claims_to_be_a_vault_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "vault.db")) as database:
        database.execute(f"PRAGMA application_id={0x41735256}").close()
        database.execute("CREATE TABLE songs (title TEXT)").close()
    with pytest.raises(NotAVault, match="is not a vault"):
        Vault.open(tmp_path / "vault.db")


@pytest.mark.parametrize("size", [100, 4096, 9000])
def test_a_truncated_vault_is_reported(size: int, path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises((VaultDamaged, NotAVault)):
        Vault.open(path)


def test_a_vault_with_damaged_pages_is_reported(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    with pytest.raises((VaultDamaged, NotAVault)), Vault.open(path) as vault:
        vault.protections()


def test_a_vault_with_a_damaged_schema_or_text_is_reported(path: Path) -> None:
    with Vault.open(path) as opened:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE sites SET driver = CAST(x'ff' AS TEXT)")
        with pytest.raises(VaultDamaged, match="UTF-8"):
            opened.sites()
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("ALTER TABLE events RENAME TO lost")
        with pytest.raises(VaultDamaged, match="no such table"):
            opened.events()


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("nothing.db", "no/such/directory/vault.db", "file/vault.db"):
        with pytest.raises(VaultNotFound) as caught:
            Vault.open(tmp_path / place)
        assert f"asr --vault {tmp_path / place} init" in caught.value.action_text
    with pytest.raises(VaultUnavailable):
        Vault.create(tmp_path / "file" / "vault.db")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_newer_vault_is_left_as_it_is(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE asr_version SET version_num='0417'").close()
    before = path.read_bytes()
    with pytest.raises(VaultTooNew, match=r"has version 0417, newer than"):
        Vault.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "url",
    [
        "",
        ":memory:",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///x?mode=ro",
        "mysql://root:S3cret@host/db",
        "nonsense://x",
        "://",
        "postgresql://user:S3cret@host",
        "postgresql://user:S3/cr@et@host:notaport/db?password=S3cret",
        "a\nb",
        "a\0b",
        "file:x?mode=ro",
        "~nobodyatall/vault.db",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    for action in (Vault.open, Vault.create):
        with pytest.raises(InvalidValue) as caught:
            action(url)
        assert "S3cret" not in everything(caught.value)


def everything(error: BaseException) -> str:
    """Every text about it that a person or a log may see."""
    shown = "".join(traceback.format_exception(error)) + repr(error)
    return shown + (repr(error.as_dict()) + repr(error.attributes) if isinstance(error, AsrError) else "")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:S3cr%40et@127.0.0.1:1/asr",
        "postgresql+psycopg://me:S3cr@et@127.0.0.1:1/asr",
        "postgresql://me@127.0.0.1:1/asr?password=S3cr%40et",
        "postgresql://127.0.0.1:1/asr?user=me&sslpassword=S3cr%40et",
    ],
)
def test_a_server_that_does_not_answer_and_no_password_shown(url: str) -> None:
    for action in (Vault.open, Vault.create):
        with pytest.raises(VaultUnavailable) as caught:
            action(url)
        shown = everything(caught.value)
        assert "S3cr" not in shown
        assert "127.0.0.1" in str(caught.value)


def test_a_server_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(HostIncomplete, match="lacks psycopg"):
        Vault.open("postgresql://127.0.0.1:1/asr")


def test_settings_of_sites_are_not_in_errors_of_the_database(vault: Vault) -> None:
    with vault._write("break") as connection:
        connection.exec_driver_sql("ALTER TABLE sites RENAME TO gone")
    with pytest.raises(Exception, match="no such table") as caught:
        vault.update_site(samples.NORTH)
    assert "hunter2" not in everything(caught.value)


def test_closing_twice_is_fine_and_use_after_it_is_reported(path: Path) -> None:
    with Vault.open(path) as vault:
        vault.close()
        vault.close()
        with pytest.raises(RuntimeError, match="closed"):
            vault.sites()


def test_opening_does_not_import_alembic(path: Path) -> None:
    code = "Vault.open(sys.argv[1]).close(); print([name for name in sys.modules if 'alembic' in name])"
    assert samples.run(code, path) == (0, "[]\n")
