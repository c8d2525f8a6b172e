"""A running machine that QEMU paused after an I/O error of its disks.

While a backup runs, QEMU keeps what the guest overwrites in scratch files. Where these have no space left, the guest's
own write fails and its processors stop (QEMU 7.2; `on-cbw-error=break-snapshot` would end the backup instead, but
libvirt's backups cannot ask for it). So this driver may be the cause, and then it resumes the machine: QEMU repeats
the write that failed.

Two facts show the cause. The machine paused while a backup job of this driver existed, and its disks report "no
space" (`virsh domblkerror`) and nothing else. A machine that was paused before the view was opened gets a mark in its
running definition, and is left alone; one that the view stopped gets one too, before the job is ended, so that whoever
comes after a killed engine still knows it. That mark is deleted as soon as the machine is seen running, or paused by
another error. Every other pause is reported only: also one that another vault's view caused, which that vault undoes.
A view without a tag counts as this vault's here, since a machine must not stay paused because of a view.
"""

from __future__ import annotations

import contextlib
import logging
import time

import libvirt

from asr_driver_libvirt.xml.domain import METADATA_URI, parse_xml
from asr_driver_libvirt.xml.mark import CheckpointName

__all__ = ["claim", "is_stalled", "note", "resume", "why"]

_log = logging.getLogger(__name__)
_URI = METADATA_URI + "/stalled"
_ELEMENT = libvirt.VIR_DOMAIN_METADATA_ELEMENT
_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE
_VIEW, _OTHER = "view", "other"
_ERRORS = {
    libvirt.VIR_DOMAIN_DISK_ERROR_UNSPEC: "input/output error",
    libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE: "no space",
}
# QEMU repeats the failed write at once; without space it pauses again within milliseconds.
_HOLDS_SECONDS = 0.5


def is_stalled(domain: libvirt.virDomain) -> bool:
    """Whether an I/O error paused it. Raises libvirtError."""
    return domain.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]


def why(domain: libvirt.virDomain) -> str:
    """For people: which disks failed, and how; "" if no I/O error paused it. Raises libvirtError."""
    if not is_stalled(domain):
        return ""
    failed = ", ".join(f"{disk}: {_ERRORS.get(code, 'error')}" for disk, code in sorted(_disk_errors(domain).items()))
    return f"an I/O error of its disks paused it ({failed})" if failed else "an I/O error of its disks paused it"


def _disk_errors(domain: libvirt.virDomain) -> dict[str, int]:
    return domain.diskErrors(0) or {}


def note(domain: libvirt.virDomain, view: str) -> None:
    """Before the view of that name: its machine is paused already, and is not to be resumed because of it. Raises
    libvirtError."""
    if _mark(domain)[0] != _VIEW:
        _set(domain, _OTHER, view)


def claim(domain: libvirt.virDomain, view: str) -> bool:
    """Before the backup job of that view is ended: whether the job stopped the machine, which is marked then. Raises
    libvirtError."""
    if not is_stalled(domain):
        return False
    by, former = _mark(domain)
    if (by, former) == (_OTHER, view) or (by == _VIEW and not _of(former, _owner(view))):
        return False
    if not _without_space(domain):
        return False
    _set(domain, _VIEW, view)
    return True


def resume(domain: libvirt.virDomain, owner: str) -> bool:
    """Resume a machine that a view of the vault with the tag `owner` stopped, when its job has ended. False if it
    stopped again, or was stopped by something else. Raises libvirtError."""
    stalled = is_stalled(domain)
    if not stalled and domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
        return False
    by, view = _mark(domain)
    if by != _VIEW:
        return False
    if not stalled or not _without_space(domain):
        # It was resumed meanwhile, by its user or by a process that was killed then. The mark must not be taken for the
        # cause of a later pause.
        _unmark(domain)
        return False
    if not _of(view, owner):
        return False
    domain.resume()
    end = time.monotonic() + _HOLDS_SECONDS
    while time.monotonic() < end:
        if is_stalled(domain):
            _log.warning("machine %s has no space to continue yet", domain.name())
            return False
        time.sleep(0.05)
    with contextlib.suppress(libvirt.libvirtError):
        _unmark(domain)
    _log.warning("machine %s was paused for lack of space for scratch files, and was resumed", domain.name())
    return True


def _without_space(domain: libvirt.virDomain) -> bool:
    return set(_disk_errors(domain).values()) == {libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE}


def _mark(domain: libvirt.virDomain) -> tuple[str, str]:
    try:
        element = parse_xml(domain.metadata(_ELEMENT, _URI, _LIVE))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            return "", ""
        raise
    return element.get("by", ""), element.get("view", "")


def _owner(view: str) -> str:
    parsed = CheckpointName.parse(view)
    return "" if parsed is None else parsed.owner


def _of(view: str, owner: str) -> bool:
    return _owner(view) in ("", owner)


def _set(domain: libvirt.virDomain, by: str, view: str) -> None:
    domain.setMetadata(_ELEMENT, f"<stalled by='{by}' view='{view}'/>", "asr-stalled", _URI, _LIVE)


def _unmark(domain: libvirt.virDomain) -> None:
    domain.setMetadata(_ELEMENT, None, None, _URI, _LIVE)
