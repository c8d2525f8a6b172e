"""The schema's versions: code and migrations agree; an older vault is upgraded completely or not at all."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import attrs
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.schema import CreateTable

from asrcore.errors import VaultDamaged, VaultInUse, VaultTooNew
from asrcore.vault import Vault, _rows, _schema, _upgrade, _versions
from tests.unit.vault import samples

NOW = _versions.REVISIONS[-1]
NEXT = f"""
import sqlalchemy as sa
from alembic import op
revision = "next"
down_revision = "{NOW}"

def upgrade() -> None:
    op.add_column("sites", sa.Column("note", sa.Text, nullable=False, server_default="none"))
    with op.batch_alter_table("protections") as table:  # SQLite: the table is rebuilt
        table.alter_column("test_network", new_column_name="test_net")
"""

# A future asrcore, in another process.
PATCH = f"""
    from asrcore.vault import _schema, _upgrade, _vault
    from pathlib import Path
    _vault.REVISIONS = ("{NOW}", "next")
    _upgrade.MIGRATIONS = Path(sys.argv[2])
"""


@pytest.fixture
def future(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    migrations = tmp_path / "future" / "migrations"
    shutil.copytree(_upgrade.MIGRATIONS, migrations, ignore=shutil.ignore_patterns("__pycache__"))
    (migrations / "versions" / "next.py").write_text(NEXT)
    monkeypatch.setattr("asrcore.vault._vault.REVISIONS", (NOW, "next"))
    monkeypatch.setattr(_upgrade, "MIGRATIONS", migrations)
    return migrations


def query(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(sql).fetchall()


def test_migrations_make_the_schema_of_the_code(vault: Vault) -> None:
    with vault._read() as connection:
        options = {"version_table": _versions.VERSION_TABLE, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, _schema.metadata) == []


def test_known_revisions_are_those_on_disk() -> None:
    script = ScriptDirectory(str(_upgrade.MIGRATIONS))
    assert tuple(item.revision for item in reversed(list(script.walk_revisions()))) == _versions.REVISIONS


def test_the_schema_is_one_for_postgresql_too() -> None:
    dialect = PGDialect()  # type: ignore[no-untyped-call]
    for table in _schema.metadata.sorted_tables:
        assert str(CreateTable(table).compile(dialect=dialect))


def test_an_older_vault_is_upgraded_and_a_copy_kept(path: Path, future: Path) -> None:
    with Vault.open(path):
        pass
    assert query(path, "SELECT name, note FROM sites") == [("north", "none"), ("south", "none")]
    assert query(path, "SELECT version_num FROM asr_version") == [("next",)]
    copy = path.with_name(f"vault.db.version-{NOW}")
    assert query(copy, "SELECT version_num FROM asr_version") == [(NOW,)]
    assert query(copy, "SELECT id FROM protections") == query(path, "SELECT id FROM protections") == [("id-1",)]
    assert copy.stat().st_mode & 0o777 == 0o600


def test_the_kept_copy_is_a_vault_of_the_older_version(
    path: Path, future: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Vault.open(path).close()
    monkeypatch.undo()
    with Vault.open(path.with_name(f"vault.db.version-{NOW}")) as vault:
        assert vault.protection("web-1") == samples.machine()
    with pytest.raises(VaultTooNew):
        Vault.open(path)


def test_a_vault_of_the_first_version_is_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "first.db"
    first = tmp_path / "migrations"
    newer = [f"v{number}.py" for number in _versions.REVISIONS[1:]]
    shutil.copytree(_upgrade.MIGRATIONS, first, ignore=shutil.ignore_patterns("__pycache__", *newer))
    with monkeypatch.context() as patch:
        patch.setattr("asrcore.vault._vault.REVISIONS", ("0001",))
        patch.setattr(_upgrade, "MIGRATIONS", first)
        Vault.create(path).close()
    policy = attrs.evolve(samples.GOLD, keep=7200.0)
    body = json.loads(str(_rows.policy_row(policy)["body"]))
    del body["bandwidth"]
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO policies VALUES ('gold', ?)", [json.dumps(body)])
    with Vault.open(path) as vault:
        assert vault.policy("gold") == policy
        assert policy.bandwidth == ()
        vault.add_site(samples.NORTH)
        vault.add_site(samples.SOUTH)
        vault.add_protection(samples.machine())
        samples.record(vault, 1, kept=True)
        assert vault.last_kept_at("id-1") == 1001.0


def test_a_running_engine_keeps_its_vault(path: Path, future: Path) -> None:
    code = """
    with Vault.open(sys.argv[1]) as vault, vault.engine_lock("old engine"):
        print("locked", flush=True)
        sys.stdin.readline()
    """
    with samples.child(code, path) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == "locked\n"
        with pytest.raises(VaultInUse, match="old engine"):
            Vault.open(path)
        engine.communicate("\n", timeout=60)
    assert query(path, "SELECT version_num FROM asr_version") == [(NOW,)]
    Vault.open(path).close()
    assert query(path, "SELECT version_num FROM asr_version") == [("next",)]


def test_two_upgrade_at_once(path: Path, future: Path) -> None:
    code = PATCH + '    Vault.open(sys.argv[1]).close(); print("open")'
    children = [samples.child(code, path, future) for _ in range(3)]
    said = [process.communicate(timeout=60) for process in children]
    assert [out for out, _ in said] == ["open\n"] * 3, said
    assert query(path, "SELECT version_num FROM asr_version") == [("next",)]


@pytest.mark.parametrize(
    ("place", "version"),
    [("vault.upgrade.copied", NOW), ("vault.upgrade.written", NOW), ("vault.upgrade.committed", "next")],
)
def test_a_killed_upgrade_did_all_or_nothing(place: str, version: str, path: Path, future: Path) -> None:
    code, said = samples.run(PATCH + "    Vault.open(sys.argv[1])", path, future, ASRCORE_CRASH_AT=place)
    assert code == -signal.SIGKILL, said
    assert query(path, "SELECT version_num FROM asr_version") == [(version,)]
    Vault.open(path).close()
    assert query(path, "SELECT note FROM sites") == [("none",), ("none",)]


def test_a_failed_upgrade_changes_nothing(path: Path, future: Path) -> None:
    broken = NEXT + "    op.execute(\"UPDATE protections SET policy='gone'\")\n"
    (future / "versions" / "next.py").write_text(broken)
    with pytest.raises(VaultDamaged, match="refers to nothing"):
        Vault.open(path)
    assert query(path, "SELECT version_num FROM asr_version") == [(NOW,)]
    assert query(path, "SELECT policy, test_network FROM protections") == [("gold", "")]


def test_a_killed_creation_leaves_no_vault(tmp_path: Path) -> None:
    place = tmp_path / "vault.db"
    code, said = samples.run("Vault.create(sys.argv[1])", place, ASRCORE_CRASH_AT="vault.create.filled")
    assert code == -signal.SIGKILL, said
    assert not place.exists()
    Vault.create(place).close()
    with Vault.open(place) as vault:
        assert vault.protections() == []
