"""A vault behind a connection pooler: in session mode only."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from asrcore.errors import VaultPooled
from asrcore.vault import Vault
from tests.postgres import Cluster
from tests.unit.vault.pooler import Pooler

Through = Callable[..., str]


@pytest.fixture
def through(url: str, postgres: Cluster) -> Iterator[Through]:
    """The vault's URL through a pooler."""
    with ExitStack() as stack:

        def make(*, transaction: bool, strict: bool = False) -> str:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asr-pool-")))
            server = Path(url.partition("host=")[2])
            made = Pooler(folder, server, postgres.name(url), transaction=transaction, strict=strict)
            stack.callback(made.close)
            return made.url

        yield make


def test_one_that_refuses_the_session_s_settings_is_named(through: Through) -> None:
    for action in (Vault.open, Vault.create):
        with pytest.raises(VaultPooled, match="unsupported startup parameter: options") as caught:
            action(through(transaction=False, strict=True))
        assert "pool_mode = session" in caught.value.action_text


@pytest.mark.parametrize("busy", [False, True])
def test_one_in_transaction_mode_is_refused(busy: bool, through: Through) -> None:
    pooled = through(transaction=True)
    with ExitStack() as stack:
        if busy:  # another client's transaction has the session that was free
            stack.enter_context(_transaction(pooled))
        for action in (Vault.open, Vault.create):
            with pytest.raises(VaultPooled, match="the same session"):
                action(pooled)


def _transaction(url: str) -> ExitStack:
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(url))
        connection.execute("SELECT 1")
        return stack.pop_all()


def test_one_in_session_mode_is_used(through: Through) -> None:
    with Vault.open(through(transaction=False)) as vault:
        lock = vault.session_lock("asr run")
        try:
            for _ in range(3):
                lock.keep()
                vault.add_event(at=1.0, machine="", kind="test", text="a line")
            assert str(vault.engine_holder()).startswith("asr run")
        finally:
            lock.close()
        assert vault.engine_holder() is None
        assert len(vault.events()) == 3
