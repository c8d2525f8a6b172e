"""A machine's power as libvirt reports it."""

from __future__ import annotations

import libvirt

from asr_driver_libvirt.host import paused
from asrcore.model.machine import PowerState

__all__ = ["power_of"]

_POWER = {
    libvirt.VIR_DOMAIN_RUNNING: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: PowerState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: PowerState.RUNNING,  # shutting down, not down
    libvirt.VIR_DOMAIN_SHUTOFF: PowerState.OFF,
    libvirt.VIR_DOMAIN_CRASHED: PowerState.OFF,
    libvirt.VIR_DOMAIN_PMSUSPENDED: PowerState.PAUSED,
}


def power_of(domain: libvirt.virDomain) -> PowerState:
    """A machine that is held only for reading counts as off. Raises libvirtError."""
    if domain.isActive() and paused.is_held(domain):
        return PowerState.OFF
    return _POWER.get(domain.state()[0], PowerState.UNKNOWN)
