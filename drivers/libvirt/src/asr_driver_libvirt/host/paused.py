"""A machine that is off, held: started with its processors stopped, so that QEMU serves its disks.

libvirt reads disks (and makes bitmaps) only of running domains. Where the images are not this host's files there is no
other way to the delta of a machine that was shut down -- and a planned failover must not lose it. Not one guest
instruction runs. Measured on a TCG host: start 0.25-0.4 s, the backup as usual, stop 1.6-2.0 s (QEMU is asked to shut
down cleanly, which saves the bitmaps). During that time the user's own start fails with "already running", so a machine
is held only while it is read, and not at all while it stays off unchanged.

A mark in the running definition (only there: it is dropped when the machine stops) distinguishes a held machine from
one that its user paused, so that a later call releases what a killed engine left. It is set after the start: set
before, it would outlive a killed engine in the stored definition, and a machine that its user then starts and pauses
would look held. A kill between the two leaves a paused machine that is not taken for held; only the guard
(`source.guard`) knows of it, and stops it. A held machine that its user resumed belongs to the user: it is left
running. A machine that is suspended to disk is not held: starting it would use up its saved memory.
"""

from __future__ import annotations

import contextlib
import logging

import libvirt

from asr_driver_libvirt.xml.domain import METADATA_URI, parse_xml

__all__ = ["hold", "holder", "is_held", "mark", "release"]

_log = logging.getLogger(__name__)
_URI = METADATA_URI + "/held"
_ELEMENT = libvirt.VIR_DOMAIN_METADATA_ELEMENT
_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE


def hold(domain: libvirt.virDomain, owner: str = "") -> None:
    """Start it with its processors stopped. `owner`: tag of the vault. Raises libvirtError, ValueError when it is
    suspended to disk."""
    if domain.hasManagedSaveImage(0):
        raise ValueError("it is suspended to disk")
    domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    try:
        mark(domain, owner)
    except libvirt.libvirtError:
        with contextlib.suppress(libvirt.libvirtError):
            domain.destroy()
        raise


def mark(domain: libvirt.virDomain, owner: str) -> None:
    """That the vault with that tag holds it. Raises libvirtError."""
    domain.setMetadata(_ELEMENT, f'<held owner="{owner}"/>', "asr", _URI, _LIVE)


def is_held(domain: libvirt.virDomain) -> bool:
    """Whether it was started by `hold` and still has its processors stopped. Raises libvirtError."""
    return holder(domain) is not None


def holder(domain: libvirt.virDomain) -> str | None:
    """Tag of the vault that holds it, "" if that had none; None if it is not held. Raises libvirtError."""
    if domain.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
        return None
    try:
        return parse_xml(domain.metadata(_ELEMENT, _URI, _LIVE)).get("owner", "")
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            return None
        raise


def release(domain: libvirt.virDomain, owner: str | None = None) -> None:
    """Stop a held machine; anything else only loses the mark. `owner`: only if the vault with that tag holds it.
    Raises libvirtError."""
    if not domain.isActive():
        return
    if (held_by := holder(domain)) is not None:
        if owner not in (None, held_by):
            return
        with contextlib.suppress(libvirt.libvirtError):
            domain.abortJob()
        domain.destroy()
    else:
        _log.warning("machine %s was resumed while it was held for reading: it is left running", domain.name())
        with contextlib.suppress(libvirt.libvirtError):
            domain.setMetadata(_ELEMENT, None, None, _URI, _LIVE)
