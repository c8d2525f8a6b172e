"""A site without servers, on this host."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from asr_driver_physical.servers.hub import Gateway
from asr_driver_physical.servers.identity import Identity
from asr_driver_physical.settings import SiteSettings
from asrcore.errors import AsrError


@pytest.fixture
def place(tmp_path: Path) -> SiteSettings:
    """Settings with a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "spool").mkdir()
    return SiteSettings("127.0.0.1", port, tmp_path / "identity", tmp_path / "spool")


@pytest.fixture
def identity(place: SiteSettings) -> Identity:
    """A new one."""
    return Identity(place.identity)


@pytest.fixture
def gateway(place: SiteSettings, identity: Identity) -> Iterator[Gateway]:
    """This process listens for the servers."""
    with closing(Gateway("dc", place, identity)) as made:
        yield made


# This machine's kernel leaves out some completions of requests, and the agent then reports its tracking as lost (see
# decision 66): a test of the kit that expects a delta is repeated then. It fails if each attempt meets it.
_MISSED = "were written and not noted"
_ATTEMPTS = 6


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Repeat a test of the conformance kit whose writes the kernel did not report."""
    if pyfuncitem.path.name != "test_conformance.py":
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    for attempt in range(_ATTEMPTS):
        try:
            pyfuncitem.obj(**arguments)
        except (AssertionError, AsrError) as problem:
            if _MISSED not in str(problem) or attempt == _ATTEMPTS - 1:
                raise
        else:
            break
    return True
