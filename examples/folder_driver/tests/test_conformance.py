"""The conformance kit, all of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rig import FolderRig

from asrcore.testing.conformance import DriverConformance


class TestFolder(DriverConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls) -> Iterator[FolderRig]:
        with FolderRig() as rig:
            yield rig
