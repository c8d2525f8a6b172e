"""A vault with two sites, a policy and a machine, in a directory of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from asrcore.vault import Vault
from tests.unit.vault import samples


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vault") / "vault.db"
    with Vault.create(path) as vault:
        vault.add_site(samples.NORTH)
        vault.add_site(samples.SOUTH)
        vault.add_policy(samples.GOLD)
        vault.add_protection(samples.machine())
    return path


@pytest.fixture
def path(made_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made_once, tmp_path / "vault.db"))


@pytest.fixture
def vault(path: Path) -> Iterator[Vault]:
    with Vault.open(path) as opened:
        yield opened
