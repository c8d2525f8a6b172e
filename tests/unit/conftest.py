"""Settings of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.postgres import Cluster, cluster
from tests.unit.rig import Rig

# Time limits belong to pytest-timeout: on a busy machine a deadline per example fails for no reason of ours.
settings.register_profile("asrcore", deadline=None)
settings.load_profile("asrcore")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: what begins last ends alone, with the other processors idle."""
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
    """A PostgreSQL server, started when the first test asks for it."""
    with cluster() as server:
        yield server
