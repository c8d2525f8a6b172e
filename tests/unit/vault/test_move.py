"""Moving a vault: never two live ones, and the next call completes a killed move."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asrcore.errors import VaultExists, VaultInUse, VaultMoved
from asrcore.model.policy import Policy
from asrcore.vault import Vault, move


@pytest.fixture
def here(tmp_path: Path) -> Path:
    path = tmp_path / "here.db"
    with Vault.create(path) as vault:
        vault.add_policy(Policy("gold"))
    return path


def test_the_moved_vault_holds_everything_and_the_old_place_says_so(here: Path, tmp_path: Path) -> None:
    there = move(here, tmp_path / "there.db", "test")
    with Vault.open(there) as vault:
        assert [policy.name for policy in vault.policies()] == ["gold"]
    with pytest.raises(VaultMoved):
        Vault.open(here)


def test_a_vault_can_come_back_to_its_old_place(here: Path, tmp_path: Path) -> None:
    there = move(here, tmp_path / "there.db", "test")
    move(there, here, "test")
    with Vault.open(here) as vault:
        assert [policy.name for policy in vault.policies()] == ["gold"]
    with pytest.raises(VaultMoved):
        Vault.open(there)


def test_a_vault_in_use_stays(here: Path, tmp_path: Path) -> None:
    with Vault.open(here) as vault, vault.engine_lock("asr run"), pytest.raises(VaultInUse):
        move(here, tmp_path / "there.db", "test")
    Vault.open(here).close()
    assert not (tmp_path / "there.db").exists()


def test_a_vault_that_somebody_has_open_stays_and_keeps_what_is_written(here: Path, tmp_path: Path) -> None:
    with Vault.open(here) as vault:
        with pytest.raises(VaultInUse):
            move(here, tmp_path / "there.db", "test")
        vault.add_policy(Policy("silver"))
    there = move(here, tmp_path / "there.db", "test")
    with Vault.open(there) as vault:
        assert {policy.name for policy in vault.policies()} == {"gold", "silver"}
    assert sorted(path.name for path in tmp_path.glob("here.db-*")) == []


def test_another_file_is_not_overwritten(here: Path, tmp_path: Path) -> None:
    (tmp_path / "there.db").write_text("something else")
    with pytest.raises(VaultExists):
        move(here, tmp_path / "there.db", "test")
    assert (tmp_path / "there.db").read_text() == "something else"
    Vault.open(here).close()


@pytest.mark.parametrize("place", ["vault.move.copied", "vault.move.renamed"])
def test_a_killed_move_never_leaves_two_and_is_ended_by_the_next(here: Path, tmp_path: Path, place: str) -> None:
    there = tmp_path / "there.db"
    code = f"from asrcore.vault import move; move({str(here)!r}, {str(there)!r}, 'test')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ASRCORE_CRASH_AT": place}, timeout=60, check=False
    )
    assert done.returncode == -9
    assert not there.exists()
    move(here, there, "test")
    with Vault.open(there) as vault:
        assert [policy.name for policy in vault.policies()] == ["gold"]
