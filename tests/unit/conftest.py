"""Settings of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from asrcore.vault import Vault
from tests.postgres import Cluster, cluster
from tests.unit.rig import Rig

# pytest-timeout sets the time limits: a deadline per example fails without a defect on a busy machine.
settings.register_profile("asrcore", deadline=None)
settings.load_profile("asrcore")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: a long test that starts last runs alone, with the other processors idle."""
    items.sort(key=lambda item: item.get_closest_marker("once") is None)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Two memory sites, an engine, a running machine that is not protected yet."""
    made = Rig(tmp_path)
    made.machine.write("vda", 0, bytes(range(256)) * 1000)
    yield made
    made.engine.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL server, started when the first test needs it."""
    with cluster() as server:
        yield server


@pytest.fixture
def url(postgres: Cluster) -> Iterator[str]:
    """A vault on that server, deleted at the end."""
    url = postgres.create()
    Vault.create(url).close()
    yield url
    postgres.drop(url)
