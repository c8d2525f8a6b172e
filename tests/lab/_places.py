"""The paths of the lab: all are derived from its name, so any process that knows the name can remove a lab."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab._run import LabError

PROJECT = Path(__file__).resolve().parents[2]
CACHE = PROJECT / "build" / "lab"
"""Git-ignored; images, packages, locks and the KVM probe's result stay, `sites/NAME` is deleted with the lab."""

RUN = Path("/run/asr-lab")
"""Sockets: short paths (a unix socket's is limited to 107 bytes), deleted at a restart of the machine."""


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold one of the cache's locks; released when the process ends."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_name(name: str) -> str:
    """Return the name of a lab if it is valid. Raises LabError."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,23}", name):
        raise LabError(f"not a name for a lab: {name!r}; use up to 24 characters of a-z, 0-9 and '-'")
    return name


def disk_dir(lab: str) -> Path:
    """The large files of a lab: disks, replica directories, libvirt's own files."""
    return CACHE / "sites" / lab


def run_dir(lab: str) -> Path:
    """The files that may be lost at a restart of the machine."""
    return RUN / lab


def namespace(lab: str, site: str) -> str:
    """Name of the site's network namespace."""
    return f"asr-lab-{lab}-{site}"
