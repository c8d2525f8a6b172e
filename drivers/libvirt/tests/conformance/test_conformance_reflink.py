"""The conformance kit on real sites: replicas on a file system with file clones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asrcore.testing.conformance import DriverConformance
from drivers.libvirt.tests.conformance.rig import LibvirtRig
from tests.lab import Lab

pytestmark = pytest.mark.system


class TestReflink(DriverConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, lab: Lab) -> Iterator[LibvirtRig]:
        with LibvirtRig(lab, "/srv/xfs") as rig:
            yield rig

    def test_it_is_this_kind(self, rig: LibvirtRig) -> None:
        assert rig.target_site.status().details["replica kind"].startswith("reflink")
