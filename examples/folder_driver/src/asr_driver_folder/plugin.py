"""What asrcore loads: the entry point of this package."""

from __future__ import annotations

from asr_driver_folder.site import FolderDriver
from asrcore.driver import Driver
from asrcore.hookspecs import hookimpl

__all__ = ["asr_register_drivers"]


@hookimpl
def asr_register_drivers() -> list[Driver]:
    """One driver, `folder`."""
    return [FolderDriver()]
