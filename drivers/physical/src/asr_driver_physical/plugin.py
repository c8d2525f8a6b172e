"""What pluggy finds by the entry point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asr_driver_physical.driver import PhysicalDriver
from asrcore.driver import Driver
from asrcore.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer

__all__ = ["asr_register_commands", "asr_register_drivers"]


@hookimpl
def asr_register_drivers() -> list[Driver]:
    """One driver, `physical`."""
    return [PhysicalDriver()]


@hookimpl
def asr_register_commands() -> typer.Typer:
    """`asr physical`."""
    from asr_driver_physical.commands import app  # noqa: PLC0415 - only these commands need it

    return app
