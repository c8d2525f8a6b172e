"""What pluggy finds by the entry point."""

from __future__ import annotations

from asr_driver_libvirt.driver import LibvirtDriver
from asrcore.driver import Driver
from asrcore.hookspecs import hookimpl

__all__ = ["asr_register_drivers"]


@hookimpl
def asr_register_drivers() -> list[Driver]:
    """One driver, `libvirt`."""
    return [LibvirtDriver()]
