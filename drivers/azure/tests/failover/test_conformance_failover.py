"""The conformance kit for the failover role: managed disks, networks and machines in the tests' cloud."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asrcore.testing.conformance import FailoverConformance
from drivers.azure.tests.failover.rig import FailoverRig
from drivers.azure.tests.peers.arm.server import Cloud
from drivers.azure.tests.peers.storage import Storage


class TestMachines(FailoverConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, storage: Storage, cloud: Cloud) -> Iterator[FailoverRig]:
        with FailoverRig(storage, cloud) as rig:
            yield rig
