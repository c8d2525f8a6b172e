"""The conformance kit: subclass `DriverConformance`, give it a rig, and every rule of the contract is tested.

    from asrcore.testing.conformance import ConformanceRig, DriverConformance

    class MyRig(ConformanceRig): ...            # your platform: its docstrings say what each method is for

    class TestMyDriver(DriverConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def rig(cls):
            with MyRig() as rig:
                yield rig

Tests ask for capabilities, never for names: what the connected sites do not claim is skipped, with the reason.
A driver with one role only may subclass the parts that concern it.
"""

from __future__ import annotations

from asrcore.testing.conformance._cycles import CycleConformance
from asrcore.testing.conformance._failover import FailoverConformance
from asrcore.testing.conformance._points import PointConformance
from asrcore.testing.conformance._replication import ReplicationConformance
from asrcore.testing.conformance._site import InventoryConformance, SiteConformance
from asrcore.testing.conformance._source import SourceConformance, TrackingConformance
from asrcore.testing.conformance.copying import Sent, delta_copy, full_copy, verify
from asrcore.testing.conformance.rig import ConformanceRig

__all__ = [
    "ConformanceRig",
    "CycleConformance",
    "DriverConformance",
    "FailoverConformance",
    "InventoryConformance",
    "PointConformance",
    "ReplicationConformance",
    "Sent",
    "SiteConformance",
    "SourceConformance",
    "TrackingConformance",
    "delta_copy",
    "full_copy",
    "verify",
]


class DriverConformance(
    SiteConformance,
    InventoryConformance,
    SourceConformance,
    TrackingConformance,
    CycleConformance,
    PointConformance,
    ReplicationConformance,
    FailoverConformance,
):
    """All of the contract."""
