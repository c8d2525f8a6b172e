"""The kit run against each mutant: a test class each. Not collected directly: `test_mutants` runs it.

Two further classes run it against sites that claim little, to check that it skips what is not claimed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asrcore.driver import Capability
from asrcore.testing.conformance import (
    ConformanceRig,
    CycleConformance,
    DriverConformance,
    FailoverConformance,
    InventoryConformance,
    PointConformance,
    ReplicationConformance,
    SiteConformance,
    SourceConformance,
    TrackingConformance,
)
from asrcore.testing.conformance.memory_rig import MemoryRig

from .mutants import MUTANTS, Mutant

# The parts of the kit that test a role. The others use it as well, but running all of them takes twice as long.
_AT_TARGET = (CycleConformance, PointConformance, ReplicationConformance)
PARTS: dict[str, tuple[type, ...]] = {
    "site": (SiteConformance,),
    "inventory": (InventoryConformance,),
    "source": (SourceConformance, TrackingConformance, ReplicationConformance),
    "target": _AT_TARGET,
    "replica": _AT_TARGET,
    "writer": _AT_TARGET,
    "failover": (FailoverConformance,),
}


def _suite(mutant: Mutant) -> type:
    def rig(self: object) -> Iterator[ConformanceRig]:
        with MemoryRig(mutant.name, mutant.driver, holds_still=mutant.holds_still) as rig:
            yield rig

    return type(mutant.name, PARTS[mutant.role], {"rig": pytest.fixture(rig)})


for _mutant in MUTANTS:
    globals()[f"Test{_mutant.name}"] = _suite(_mutant)


class TestLittleIsClaimed(DriverConformance):
    """No tracking, groups, power, seeds: a source that only reads, a target that only stores."""

    @pytest.fixture
    def rig(self) -> Iterator[ConformanceRig]:
        with MemoryRig("little") as rig:
            rig.home.configure(capabilities=frozenset({Capability.SOURCE}))
            rig.away.configure(capabilities=frozenset({Capability.TARGET}))
            yield rig


class TestRigIsMissing(SiteConformance):
    """The message for an author who forgot the rig."""
