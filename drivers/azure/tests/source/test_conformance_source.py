"""The conformance kit for the failback: inventory, power, quarantine, views and marks of a machine in Azure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asrcore.testing.conformance import (
    InventoryConformance,
    ReplicationConformance,
    SourceConformance,
    TrackingConformance,
)
from drivers.azure.tests.peers.arm.server import Cloud
from drivers.azure.tests.peers.storage import Storage
from drivers.azure.tests.source.rig import SourceRig


class TestTheWayHome(InventoryConformance, SourceConformance, TrackingConformance, ReplicationConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, storage: Storage, cloud: Cloud) -> Iterator[SourceRig]:
        with SourceRig(storage, cloud) as rig:
            yield rig
