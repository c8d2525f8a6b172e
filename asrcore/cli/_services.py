"""What runs for long: `run`, `process-server`."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from typing import Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.errors import InvalidValue
from asrcore.units import parse_duration

__all__ = ["register"]

_SHORTEST_LEASE, _LONGEST_LEASE = 3.0, 3600.0

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every cycle.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.command("run")(run)
    app.command("process-server")(process_server)


def run(
    context: typer.Context,
    verbose: Verbose = False,
) -> None:
    """Run the replication service in the foreground until Ctrl-C or SIGTERM."""
    stop = _until_told(verbose)
    with _session.engine(context) as opened:
        opened.start()
        _output.tell(f"replicating with {opened.vault.url}; Ctrl-C stops, nothing is lost")
        opened.run(stop)
        _output.tell("stopping; cycles under way go on at the next start")


def process_server(
    context: typer.Context,
    name: Annotated[
        str, typer.Option(help="Name of this server, one of its own.", show_default="the host's name")
    ] = "",
    site: Annotated[
        list[str] | None, typer.Option(help="A site that this server can reach, if not all; repeatable.")
    ] = None,
    lease: Annotated[str, typer.Option(help="Silence after which its machines go to other servers.")] = "15s",
    verbose: Verbose = False,
) -> None:
    """Run a process server in the foreground: one of several that share a vault on PostgreSQL.

    Each works on the machines that are assigned to it; those of a server that dies go to the others.
    """
    from asrcore.replication.ids import new_id  # noqa: PLC0415
    from asrcore.service.member import Identity  # noqa: PLC0415

    stop = _until_told(verbose)
    host = socket.gethostname()
    seconds = parse_duration(lease, "lease")
    if not _SHORTEST_LEASE <= seconds <= _LONGEST_LEASE:
        raise InvalidValue(what="lease", value=lease, wanted="3s to 1h")
    identity = Identity(name or host, new_id("s"), f"{host}, pid {os.getpid()}", site or None, seconds)
    with _session.engine(context) as opened:
        _output.tell(f"process server {identity.name} with {opened.vault.url}; Ctrl-C stops, nothing is lost")
        opened.serve(identity, stop)
        _output.tell("stopped; other servers go on with its machines")


def _until_told(verbose: bool) -> threading.Event:
    """Log for a service; the event is set by Ctrl-C or SIGTERM, and a second one ends the process at once."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("sqlalchemy", "alembic", "dbos"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(_session.INTERRUPTED) if stop.is_set() else stop.set())
    return stop
