"""The vault's database fails under a running service: nothing ends, and nothing is the machines' failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from asrcore.errors import VaultUnavailable
from asrcore.model.state import State
from asrcore.vault import Vault
from tests.unit.service.test_scheduler import Service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    made.engine.wait(made.engine.protect("web", source="a", target="b", policy="gold"), timeout=30)
    yield made
    made.close()


def test_a_blip_of_the_vault_is_not_the_machine_s_failure(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, left = Vault.begin_cycle, [True] * 3

    def answer(vault: Vault, *arguments: Any, **named: Any) -> Any:
        if left:
            left.pop()
            raise VaultUnavailable(url=vault.url, detail="the server closed the connection unexpectedly")
        return begin(vault, *arguments, **named)

    monkeypatch.setattr(Vault, "begin_cycle", answer)
    service.replicate_soon()
    before = service.engine.vault.protection("web")
    service.until(lambda: service.engine.vault.protection("web").last_cycle_at != before.last_cycle_at)
    after = service.engine.vault.protection("web")
    assert not left
    assert (after.state, after.attempt, after.retry_at, after.error) == (State.PROTECTED, 0, None, None)


def test_an_error_that_is_no_error_of_the_catalogue_does_not_end_the_service(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, policies = [], Vault.policies

    def answer(vault: Vault) -> Any:
        asked.append(1)
        if len(asked) <= 3:
            raise sqlalchemy.exc.InternalError("SELECT", {}, Exception("of a kind that is not known yet"))
        return policies(vault)

    service.replicate_soon()
    before = service.engine.vault.protection("web").last_cycle_at
    monkeypatch.setattr(Vault, "policies", answer)
    service.until(lambda: service.engine.vault.protection("web").last_cycle_at != before)
    assert service.thread.is_alive()
    assert len(asked) > 3
