"""The conformance kit for the target role: page blobs in Azurite behind the strict proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asrcore.testing.conformance import (
    CycleConformance,
    PointConformance,
    ReplicationConformance,
    SiteConformance,
)
from drivers.azure.tests.peers.storage import Storage
from drivers.azure.tests.target.rig import TargetRig


class TestPageBlobs(SiteConformance, CycleConformance, PointConformance, ReplicationConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, storage: Storage) -> Iterator[TargetRig]:
        with TargetRig(storage) as rig:
            yield rig
