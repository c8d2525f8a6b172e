"""Replication as a service: `run`, `process-server`."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.errors import Category, InvalidValue
from asrcore.replication.ids import new_id
from asrcore.service import logs
from asrcore.service.member import ServerIdentity
from asrcore.units import parse_duration

__all__ = [
    "Lease",
    "LogFormat",
    "Name",
    "Sites",
    "Verbose",
    "exit_for_certain",
    "register",
    "server_identity",
    "stop_on_signal",
]

_SHORTEST_LEASE, _LONGEST_LEASE = 3.0, 3600.0
_LONGEST_END = 120.0  # seconds

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every cycle.")]
LogFormat = Annotated[str, typer.Option(help="text, or json: one object per line.")]
Name = Annotated[str, typer.Option(help="Unique name of this process server.", show_default="the host's name")]
Sites = Annotated[
    list[str] | None, typer.Option("--site", help="Site that this process server can reach (default: all); repeatable.")
]
Lease = Annotated[
    str, typer.Option(help="Time without a sign of life after which other process servers take over the machines.")
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.command("run")(run)
    app.command("process-server")(process_server)


def run(context: typer.Context, verbose: Verbose = False, log_format: LogFormat = "text") -> None:
    """Run the replication service in the foreground until Ctrl-C or SIGTERM."""
    stop = stop_on_signal(verbose, log_format)
    with _session.engine(context) as opened:
        opened.start()
        _output.note(f"replicating with {opened.vault.url}; stop with Ctrl-C")
        if opened.vault.shareable:
            threading.Thread(target=exit_for_certain, args=[stop], daemon=True).start()
        opened.run(stop)
        _output.note("stopping; interrupted cycles resume at the next start")


def process_server(
    context: typer.Context,
    name: Name = "",
    site: Sites = None,
    lease: Lease = "15s",
    verbose: Verbose = False,
    log_format: LogFormat = "text",
) -> None:
    """Run a process server: one of several that share a vault.

    The vault is on PostgreSQL. Each server works on the machines that are assigned to it; when a server fails, the
    others take over its machines.
    """
    stop = stop_on_signal(verbose, log_format)
    identity = server_identity(name, site, lease)
    with _session.engine(context) as opened:
        _output.note(f"process server {identity.name} with {opened.vault.url}; stop with Ctrl-C")
        threading.Thread(target=exit_for_certain, args=[stop], daemon=True).start()
        opened.serve(identity, stop)
        _output.note("stopped; other process servers take over its machines")


def exit_for_certain(stop: threading.Event) -> None:
    """A step that hangs must not keep a server running that others have replaced; they resume the step."""
    stop.wait()
    threading.Event().wait(_LONGEST_END)
    os._exit(Category.CONFLICT.value)


def server_identity(name: str, sites: list[str] | None, lease: str) -> ServerIdentity:
    host = socket.gethostname()
    seconds = parse_duration(lease, "lease")
    if not _SHORTEST_LEASE <= seconds <= _LONGEST_LEASE:
        raise InvalidValue(what="lease", value=lease, wanted="3s to 1h")
    return ServerIdentity(name or host, new_id("s"), f"{host}, pid {os.getpid()}", sites or None, seconds)


def stop_on_signal(verbose: bool, log_format: str) -> threading.Event:
    """Set up the log of a service. Ctrl-C or SIGTERM sets the event; a second signal ends the process at once."""
    if log_format not in logs.FORMATS:
        raise InvalidValue(what="log format", value=log_format, wanted=" or ".join(logs.FORMATS))
    logs.set_up(log_format, verbose=verbose)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(_session.INTERRUPTED) if stop.is_set() else stop.set())
    return stop
