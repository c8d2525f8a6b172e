"""What an engine that has ended left at the host: its backup job, or a machine that it held."""

from __future__ import annotations

import libvirt

from asr_driver_libvirt.host import paused, stalled
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.source import backup_jobs

__all__ = ["end"]

# Of a machine's virtual processors, in nanoseconds: their threads take some to be started, in ticks of 10 ms. A
# machine that starts to run takes all it can get, for its firmware.
_START_TIME = 50_000_000


def end(host: LibvirtHost, domain: libvirt.virDomain, view: str, *, held: bool, starting: bool = False) -> str:
    """End the job of the view of that name ("": there was none yet), and stop or resume its machine. `starting`: the
    machine may have been started to be held, and not be marked yet. What was done, for people; "" for nothing. Raises
    libvirtError, DriverFailed."""
    if not domain.isActive():
        return ""
    backup = backup_jobs.current_backup(domain)
    if backup is not None and (backup.name is None or str(backup.name) != view):
        return ""  # another engine or application works on it
    if starting and not paused.is_held(domain) and _never_ran(domain):
        domain.destroy()
        return "stopped the machine"
    owner = host.settings.owner
    if held and paused.holder(domain) == owner:
        paused.release(domain, owner)
        return "stopped the machine"
    if backup is not None:
        backup_jobs.end_backup(host, domain)
        return f"ended backup {view}"
    return "resumed the machine" if stalled.resume(domain, owner) else ""


def _never_ran(domain: libvirt.virDomain) -> bool:
    """Whether it was started paused, and not resumed since: its user may have started it meanwhile, and then paused
    it. libvirt calls both "paused by the user"."""
    state, reason = domain.state()
    if state != libvirt.VIR_DOMAIN_PAUSED:
        return False
    if reason == libvirt.VIR_DOMAIN_PAUSED_STARTING_UP:
        return True
    if reason != libvirt.VIR_DOMAIN_PAUSED_USER:
        return False
    return sum(time for _, _, time, _ in domain.vcpus()[0]) <= _START_TIME
