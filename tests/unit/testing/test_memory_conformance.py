"""The memory driver passes the conformance kit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asrcore.testing.conformance import DriverConformance
from asrcore.testing.conformance.memory_rig import MemoryRig


class TestMemoryDriver(DriverConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls) -> Iterator[MemoryRig]:
        with MemoryRig() as rig:
            yield rig


class TestMemoryDriverWithoutSnapshots(DriverConformance):
    """Disks are read while the machine writes, and changes are read again at the end."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls) -> Iterator[MemoryRig]:
        with MemoryRig("live", holds_still=False) as rig:
            yield rig
