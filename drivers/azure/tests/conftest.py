"""One Azurite behind one proxy for each test process, and a cloud for those who run machines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from drivers.azure.tests.peers.arm.server import Cloud
from drivers.azure.tests.peers.azurite import Azurite
from drivers.azure.tests.peers.proxy import Proxy
from drivers.azure.tests.peers.storage import Storage


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """Storage of this test process."""
    with Azurite(tmp_path_factory.mktemp("azurite")) as made:
        yield made


@pytest.fixture(scope="module")
def storage(azurite: Azurite) -> Iterator[Storage]:
    """Azurite as Azure would be: behind a strict proxy, whose faults are the test's to switch."""
    with Proxy(azurite.port) as proxy:
        made = Storage(azurite, proxy)
        yield made
        made.close()


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Management whose machines run in words only. Snapshots may be taken as often as one likes."""
    with Cloud(tmp_path_factory.mktemp("cloud")) as made:
        made.compute.snapshot_window = 0.0
        yield made
