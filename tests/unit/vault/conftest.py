"""A vault with two sites, a policy and a machine: a SQLite file, or a database in the tests' PostgreSQL."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from asrcore.vault import Vault, _schema
from tests.postgres import Cluster
from tests.unit.vault import samples


def _fill(vault: Vault) -> None:
    vault.add_site(samples.NORTH)
    vault.add_site(samples.SOUTH)
    vault.add_policy(samples.GOLD)
    vault.add_protection(samples.machine())


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vault") / "vault.db"
    with Vault.create(path) as vault:
        _fill(vault)
    return path


@pytest.fixture
def path(made_once: Path, tmp_path: Path) -> Path:
    """The SQLite file, for tests about files."""
    return Path(shutil.copy(made_once, tmp_path / "vault.db"))


@pytest.fixture(scope="session")
def database(postgres: Cluster) -> str:
    """A vault on the server, made once: emptying it is faster than making another one."""
    url = postgres.create()
    Vault.create(url).close()
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest) -> str:
    """The vault's location, as `--vault` accepts it."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("path"))
    url = str(request.getfixturevalue("database"))
    tables = ", ".join(table.name for table in _schema.metadata.sorted_tables)
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        connection.execute(f"TRUNCATE {tables} RESTART IDENTITY CASCADE".encode())
    with Vault.open(url) as vault:
        _fill(vault)
    return url


@pytest.fixture
def vault(place: str) -> Iterator[Vault]:
    with Vault.open(place) as opened:
        yield opened
