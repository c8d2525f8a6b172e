"""The machine that these tests fail over."""

from __future__ import annotations

import pytest

from tests.unit.rig import Rig


@pytest.fixture
def protected(rig: Rig) -> Rig:
    """With `web` protected from `a` to `b`."""
    rig.protect()
    return rig
