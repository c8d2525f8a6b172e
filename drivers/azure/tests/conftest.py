"""One Azurite behind one proxy for each test process, and a cloud for tests that run machines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from drivers.azure.tests.peers.arm.server import Cloud
from drivers.azure.tests.peers.azurite import Azurite
from drivers.azure.tests.peers.proxy import Proxy
from drivers.azure.tests.peers.storage import Storage


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """The storage of this test process."""
    with Azurite(tmp_path_factory.mktemp("azurite")) as made:
        yield made


@pytest.fixture(scope="module")
def storage(azurite: Azurite) -> Iterator[Storage]:
    """Azurite behaving like Azure: behind a strict proxy, whose faults the test controls."""
    with Proxy(azurite.port) as proxy:
        made = Storage(azurite, proxy)
        yield made
        made.close()


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """A management server whose machines only pretend to run. The rate of snapshots is not limited."""
    with Cloud(tmp_path_factory.mktemp("cloud")) as made:
        made.compute.snapshot_window = 0.0
        yield made
