"""What an engine that has ended left at the host: its backup job, or a machine that it held."""

from __future__ import annotations

import libvirt

from asr_driver_libvirt.host import paused, stalled
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.source import backup_jobs

__all__ = ["end"]


def end(host: LibvirtHost, domain: libvirt.virDomain, view: str, *, held: bool, starting: bool = False) -> str:
    """End the job of the view of that name ("": there was none yet), and stop or resume its machine. `starting`: the
    machine may have been started to be held, and not be marked yet. What was done, for people; "" for nothing. Raises
    libvirtError, DriverFailed."""
    if not domain.isActive():
        return ""
    backup = backup_jobs.current_backup(domain)
    if backup is not None and (backup.name is None or str(backup.name) != view):
        return ""  # another engine or application works on it
    if starting and domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED and not paused.is_held(domain):
        domain.destroy()  # it has not run at all
        return "stopped the machine"
    owner = host.settings.owner
    if held and paused.holder(domain) == owner:
        paused.release(domain, owner)
        return "stopped the machine"
    if backup is not None:
        backup_jobs.end_backup(host, domain)
        return f"ended backup {view}"
    return "resumed the machine" if stalled.resume(domain, owner) else ""
