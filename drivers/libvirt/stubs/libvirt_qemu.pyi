"""The part of libvirt-python's QEMU module that the bench calls, see `libvirt.pyi`."""

from typing import Final

from libvirt import virDomain

VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP: Final = 1

def qemuMonitorCommand(domain: virDomain, cmd: str, flags: int) -> str: ...
