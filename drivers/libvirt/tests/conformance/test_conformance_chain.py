"""The conformance kit on real sites: replicas on a file system without file clones.

Source and inventory behave the same for both kinds of replicas, and are tested with the other one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asrcore.testing.conformance import (
    CycleConformance,
    FailoverConformance,
    PointConformance,
    ReplicationConformance,
    SiteConformance,
)
from drivers.libvirt.tests.conformance.rig import LibvirtRig
from tests.lab import Lab

pytestmark = [pytest.mark.system, pytest.mark.long]


class TestChain(SiteConformance, CycleConformance, PointConformance, ReplicationConformance, FailoverConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, lab: Lab) -> Iterator[LibvirtRig]:
        with LibvirtRig(lab, "/srv/ext4") as rig:
            yield rig

    def test_it_is_this_kind(self, rig: LibvirtRig) -> None:
        assert rig.target_site.status().details["replica kind"].startswith("chain")
