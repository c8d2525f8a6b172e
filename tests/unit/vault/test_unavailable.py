"""Errors of a PostgreSQL server that pass: each is one of the catalogue, and the vault works again afterwards."""

from __future__ import annotations

import select
from collections.abc import Callable
from contextlib import suppress

import psycopg
import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError, ProgrammingError

from asrcore.errors import VaultForbidden, VaultPooled, VaultReadOnly, VaultUnavailable
from asrcore.vault import Vault
from asrcore.vault._place import Place
from asrcore.vault._store import translated
from tests.postgres import Cluster
from tests.unit.vault.test_server import execute


def add(vault: Vault) -> None:
    vault.add_event(at=1.0, machine="", kind="test", text="a line")


def cut_off(url: str) -> None:
    execute(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()")


def test_a_standby_is_named_and_the_primary_is_found_again(url: str, postgres: Cluster) -> None:
    name = postgres.name(url)
    with Vault.open(url) as vault:
        add(vault)
        execute(url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        with suppress(psycopg.OperationalError):
            cut_off(url)
        for _ in range(2):
            with pytest.raises(VaultReadOnly, match="read-only transaction") as caught:
                add(vault)
            assert "target_session_attrs=read-write" in caught.value.action_text
        execute(postgres.url("postgres"), f"ALTER DATABASE {name} RESET default_transaction_read_only")
        add(vault)
        assert len(vault.events()) == 2


def test_a_lost_privilege_is_named(url: str) -> None:
    role = f"r{url.partition('?')[0].rpartition('/')[2]}"
    execute(url, f"CREATE ROLE {role} LOGIN")
    tables = "ON ALL TABLES IN SCHEMA public"
    execute(url, f"GRANT ALL {tables} TO {role}")
    execute(url, f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")
    try:
        with Vault.open(url.replace("postgres@", f"{role}@")) as vault:
            add(vault)
            execute(url, f"REVOKE INSERT {tables} FROM {role}")
            with pytest.raises(VaultForbidden, match="permission denied for table events"):
                add(vault)
            execute(url, f"GRANT ALL {tables} TO {role}")
            add(vault)
    finally:
        execute(url, f"DROP OWNED BY {role}")
        execute(url, f"DROP ROLE {role}")


def too_slow(connection: Connection) -> None:
    connection.exec_driver_sql("SET LOCAL statement_timeout = 50")
    connection.exec_driver_sql("SELECT pg_sleep(5)")


def failed_before(connection: Connection) -> None:
    with suppress(DBAPIError):
        connection.exec_driver_sql("SELECT 1/0")
    connection.exec_driver_sql("SELECT 1")


def read_only(connection: Connection) -> None:
    connection.exec_driver_sql("SET LOCAL transaction_read_only = on")
    connection.exec_driver_sql("DELETE FROM events")


def idle(connection: Connection) -> None:
    """Until the server has ended the session of this transaction, as it does with that of a suspended host."""
    connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 50")
    driver = connection.connection.driver_connection
    assert driver is not None
    assert select.select([driver.fileno()], [], [], 20)[0], "the session ends"
    connection.exec_driver_sql("SELECT 1")


@pytest.mark.parametrize("work", [too_slow, failed_before, read_only, idle])
def test_a_transaction_that_the_server_refuses_is_an_error_of_the_catalogue(
    work: Callable[[Connection], None], url: str
) -> None:
    with Vault.open(url) as vault:

        def fail() -> None:
            with vault._write("test") as connection:
                work(connection)

        with pytest.raises(VaultUnavailable):
            fail()
        add(vault)


STATES = ["08006", "25006", "25P02", "25P03", "40001", "40P01", "42501", "53100", "53300", "55006", "55P03", "57014"]
STATES += ["57P01", "57P03", "58030", "42P01", "42703"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("wrapped", [InternalError, ProgrammingError])
def test_every_state_that_passes_is_known_however_it_is_wrapped(state: str, wrapped: type[DBAPIError]) -> None:
    place = Place.of("postgresql://asr:secret@db/asr")
    error = translated(place, wrapped("SELECT", {}, psycopg.errors.lookup(state)("at db, password secret")))
    assert isinstance(error, VaultUnavailable)
    assert "secret" not in str(error)
    assert error.retry


@pytest.mark.parametrize(
    "said", ["unsupported startup parameter: options", "transaction blocks not allowed in statement pooling mode"]
)
def test_what_a_pooler_says_is_known(said: str) -> None:
    place = Place.of("postgresql://db/asr")
    assert isinstance(translated(place, OperationalError("BEGIN", {}, psycopg.OperationalError(said))), VaultPooled)


def test_a_defect_stays_a_defect() -> None:
    place = Place.of("postgresql://db/asr")
    assert translated(place, ProgrammingError("SELEC", {}, psycopg.errors.SyntaxError("at SELEC"))) is None
