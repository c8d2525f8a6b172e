"""`asr server`: the servers that work on a vault."""

from __future__ import annotations

import typer

from asrcore.cli import _output, _session
from asrcore.cli._output import Json
from asrcore.service.servers import ServerStatus
from asrcore.units import format_time

__all__ = ["register"]

_server = typer.Typer(help="Servers: process servers and master targets.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.add_typer(_server, name="server")


@_server.command("list")
def server_list(context: typer.Context, as_json: Json = False) -> None:
    """List process servers and master targets: health, version, last seen, machines carried.

    Connects to the master targets.
    """
    with _session.engine(context) as opened:
        found = opened.servers()
        if as_json:
            _output.show([item.document() for item in found], "", as_json=True)
            return
        columns = ("ROLE", "SERVER", "HEALTH", "VERSION", "LAST SEEN", "MACHINES", "SITES", "WHERE")
        _output.table(columns, [_server_row(item) for item in found], empty="no server uses this vault")
        for item in found:
            if item.error is not None:
                typer.echo(f"\n{item.name}: [{item.error.code}] {item.error}\n  next: {item.error.action_text}")


def _server_row(item: ServerStatus) -> tuple[str, ...]:
    return (
        item.role,
        item.name or "-",
        "up" if item.up else "down",
        item.version or "-",
        "-" if item.seen_at is None else format_time(item.seen_at),
        str(item.machines),
        "all" if item.sites is None else ", ".join(item.sites),
        item.where,
    )
