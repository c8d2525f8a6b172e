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
