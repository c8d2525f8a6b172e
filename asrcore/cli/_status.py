"""`asr status`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.cli._output import Json
from asrcore.model.protection import TestRun
from asrcore.service.status import EngineStatus, MachineStatus, document, engine, machines
from asrcore.units import format_duration, format_size, format_time

__all__ = ["register"]

_COLUMNS = (
    "MACHINE",
    "STATE",
    "HEALTH",
    "RPO",
    "LAST POINT",
    "POINTS",
    "STORED",
    "DIRECTION",
    "REPLICA",
    "EPOCH",
    "TEST",
    "NOW",
)


def register(app: typer.Typer) -> None:
    """Add the verb to the application."""
    app.command("status")(status)


def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat every two seconds until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Show every protected machine: state, health with reasons, RPO, recovery points.

    The first line says whether an engine works on the vault. Reads the vault only: works while a site is down.
    """
    while True:
        at_work, found = _read(context)
        if watch and not as_json:
            typer.echo("\x1b[2J\x1b[H", nl=False)  # clear the terminal, cursor to its top
        _show_status(at_work, found, as_json=as_json)
        if not watch:
            return
        time.sleep(2)


def _show_status(at_work: EngineStatus, found: Sequence[MachineStatus], *, as_json: bool) -> None:
    if as_json:
        _output.show([document(item) for item in found], "", as_json=True)
        return
    typer.echo(at_work)
    _output.table(_COLUMNS, [_status_row(item) for item in found], empty="no machine is protected (`asr protect`)")
    for item in found:
        if item.health.reasons:
            typer.echo(f"\n{item.protection.name}:")
            typer.echo(_output.show_findings(item.health.reasons))


def _status_row(item: MachineStatus) -> tuple[str, ...]:
    protection = item.protection
    return (
        protection.name,
        protection.state.value,
        item.health.level.value,
        "-" if item.rpo_seconds is None else format_duration(item.rpo_seconds),
        "-" if item.last_point is None else format_time(item.last_point.taken_at),
        str(item.points),
        "-" if item.last_point is None or item.last_point.held is None else format_size(item.last_point.held),
        f"{protection.source_site} > {protection.target_site}",
        protection.replica_kind or "-",
        str(protection.epoch),
        _test(protection.test),
        "-" if not item.working_on else item.working_on if item.engine.up else f"{item.working_on} (waiting)",
    )


def _test(run: TestRun | None) -> str:
    if run is None:
        return "-"
    return "running" if run.machine_id else "starting"


def _read(context: typer.Context) -> tuple[EngineStatus, list[MachineStatus]]:
    """What works on the vault, and all protected machines, by name."""
    from asrcore.vault import NeedsEngine, StatusReader  # noqa: PLC0415 - `asr status --help` needs no database

    try:
        with StatusReader.open(_session.vault_url(context)) as vault:
            return (at_work := engine(vault)), machines(vault, time.time(), at_work)
    except NeedsEngine:
        with _session.engine(context) as opened:
            return (at_work := engine(opened.vault)), machines(opened.vault, opened.context.clock(), at_work)
