"""The hooks a plug-in may implement, as typed functions. Implementations are marked with `hookimpl`.

    from asrcore.hookspecs import hookimpl

    @hookimpl
    def asr_register_drivers() -> list[Driver]:
        return [MyDriver()]

Rules for every implementation:
- It takes the parameters it needs, by the names given here and without defaults; a misspelt hook or parameter
  makes the plug-in refused.
- Events are notifications: nothing is returned. What an implementation raises is logged and affects neither the
  engine nor another plug-in. It runs on the thread of the work that it is notified of, which waits for it: return
  quickly, or hand over to another thread.
- An event may be sent twice (a job that was killed resumes at its last step) and, when a host dies, not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from asrcore.driver import Driver
from asrcore.model.event import FailoverKind, FinishedJob
from asrcore.model.health import Health
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import Protection

if TYPE_CHECKING:
    import typer

__all__ = [
    "PROJECT",
    "asr_after_failover",
    "asr_before_failover",
    "asr_health_changed",
    "asr_job_finished",
    "asr_recovery_point_created",
    "asr_register_commands",
    "asr_register_drivers",
    "hookimpl",
]

PROJECT = "asrcore"
"""Name of the hooks' project in pluggy, and of the entry point group."""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks an implementation in a plug-in."""

_hookspec = pluggy.HookspecMarker(PROJECT)


@_hookspec
def asr_register_drivers() -> list[Driver]:  # type: ignore[empty-body]
    """Offer drivers; called once, when plug-ins are loaded. Connecting to anything belongs in `Driver.connect`."""


@_hookspec
def asr_register_commands() -> typer.Typer:  # type: ignore[empty-body]
    """Offer commands; `asr NAME ...` runs them, NAME being the plug-in's entry point.

    Called when NAME is typed and when `asr --help` lists the commands, never for other verbs: import what the commands
    need in here. They raise errors of `asrcore.errors`, print one JSON document with `--json`, and get the vault that
    `--vault` names as `context.obj` ("" for the default one).
    """


@_hookspec
def asr_recovery_point_created(machine: Protection, point: RecoveryPoint) -> None:
    """A point is sealed at the target and recorded in the vault; `machine` is as recorded with it."""


@_hookspec
def asr_health_changed(machine: Protection, old: Health, new: Health) -> None:
    """The level or the reasons of a machine's health have changed."""


@_hookspec
def asr_before_failover(machine: Protection, kind: FailoverKind) -> None:
    """A failover was requested and is possible; nothing has been done yet. An implementation cannot prevent it."""


@_hookspec
def asr_after_failover(machine: Protection, kind: FailoverKind) -> None:
    """The machine has been started at the target, and this is recorded in the vault."""


@_hookspec
def asr_job_finished(job: FinishedJob) -> None:
    """A job ended: it succeeded, failed or was cancelled."""
