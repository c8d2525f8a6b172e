"""A site that runs machines, and a replica with one point in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asrcore.testing.conformance._target_bench import TargetBench
from drivers.azure.tests.failover.rig import FailoverRig
from drivers.azure.tests.peers.arm.server import Cloud
from drivers.azure.tests.peers.storage import Storage


@pytest.fixture(scope="module")
def rig(storage: Storage, cloud: Cloud) -> Iterator[FailoverRig]:
    with FailoverRig(storage, cloud) as made:
        yield made


@pytest.fixture
def target(rig: FailoverRig) -> Iterator[TargetBench]:
    bench = TargetBench(rig)
    bench.first_points("p1")
    yield bench
    rig.target_site.failover.undo(bench.id, bench.replica.info().epoch)
    bench.close()
    rig.remove_target_machine(bench.id)
    assert rig.cloud.names() == []
