"""`asr status`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.cli._output import Json
from asrcore.service.status import MachineStatus, document, machines
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

    Reads the vault only: works while a site is down.
    """
    while True:
        machines = _machines(context)
        if watch and not as_json:
            typer.echo("\x1b[2J\x1b[H", nl=False)  # clear the terminal, cursor to its top
        _show_status(machines, as_json=as_json)
        if not watch:
            return
        time.sleep(2)


def _show_status(machines: Sequence[MachineStatus], *, as_json: bool) -> None:
    if as_json:
        _output.show([document(item) for item in machines], "", as_json=True)
        return
    _output.table(_COLUMNS, [_status_row(item) for item in machines], empty="no machine is protected (`asr protect`)")
    for item in machines:
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
        "running" if protection.test else "-",
        item.working_on or "-",
    )


def _machines(context: typer.Context) -> list[MachineStatus]:
    """All protected machines, by name."""
    from asrcore.vault import NeedsEngine, StatusReader  # noqa: PLC0415 - `asr status --help` needs no database

    try:
        with StatusReader.open(_session.vault_url(context)) as vault:
            return machines(vault, time.time())
    except NeedsEngine:
        with _session.engine(context) as opened:
            return opened.status()
