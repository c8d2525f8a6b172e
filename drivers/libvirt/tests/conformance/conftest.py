"""The tests of this folder are run by a second pytest inside the lab."""

from __future__ import annotations

import pytest

from drivers.libvirt.tests.conformance.inside import NAME, Inside, Outside
from tests.lab import Lab


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin(NAME):
        config.pluginmanager.register(Outside(config))


@pytest.fixture(scope="session")
def lab(pytestconfig: pytest.Config) -> Lab:
    """The lab's methods, which run outside."""
    inside = pytestconfig.pluginmanager.get_plugin(NAME)
    assert isinstance(inside, Inside)
    return inside.lab
