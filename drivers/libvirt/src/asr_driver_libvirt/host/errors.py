"""libvirt's error codes translated into the catalogue's errors."""

from __future__ import annotations

import libvirt

from asrcore.errors import AccessDenied, AsrError, DriverFailed, MachineNotFound, SiteUnreachable, TimedOut

__all__ = ["translated"]

_ACCESS = {
    libvirt.VIR_ERR_AUTH_FAILED,
    libvirt.VIR_ERR_AUTH_CANCELLED,
    libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    libvirt.VIR_ERR_ACCESS_DENIED,
    libvirt.VIR_ERR_OPERATION_DENIED,
}
_LINK = {libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_ERR_LIBSSH}
# Errors without a specific code, with a message of the socket, ssh or GnuTLS; English in every locale since libvirt
# passes them on from the C library (of *this* process, whose locale is C unless it chose another) and ssh.
_ACCESS_WORDS = ("permission denied", "authentication", "certificate", "host key verification")


def translated(
    error: libvirt.libvirtError, *, site: str, operation: str, machine: str = "", dead: bool = False
) -> AsrError:
    """The catalogue's error for libvirt's. `dead`: the connection is not alive (any more)."""
    code, text = error.get_error_code(), error.get_error_message() or str(error)
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return MachineNotFound(site=site, machine=machine or "?")
    if code in _ACCESS:
        return AccessDenied(site=site, detail=text)
    if dead or code in _LINK:
        if any(word in text.lower() for word in _ACCESS_WORDS):
            return AccessDenied(site=site, detail=text)
        return SiteUnreachable(site=site, detail=text)
    if code in (libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_AGENT_UNRESPONSIVE):
        # 30 s is libvirt's own limit for getting hold of a domain.
        return TimedOut(operation=operation, seconds=30.0, detail=text)
    return DriverFailed(operation=operation, site=site, detail=text)
