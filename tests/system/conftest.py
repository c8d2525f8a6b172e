"""One lab for all system tests: each makes its own guests and deletes them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab import Lab
from tests.system.rig import EngineProcess, Rig


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Two sites."""
    with Lab(f"system-{os.getpid()}") as lab:  # one per process: several run at once
        yield lab


@pytest.fixture(scope="session")
def rig(lab: Lab) -> Iterator[Rig]:
    """The lab with an engine at site b that knows both sites."""
    engine = EngineProcess(lab)
    try:
        rig = Rig(lab, engine)
        rig.set_up()
        yield rig
    finally:
        engine.close()
