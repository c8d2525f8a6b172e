"""What runs for long: `run`, `process-server`, `config-server`, `serve`."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asrcore.cli import _certificates, _output, _session
from asrcore.cli._options import Settings, parsed
from asrcore.errors import AsrError, Category, InvalidValue
from asrcore.units import parse_duration

if TYPE_CHECKING:
    from asrcore.config_server.web import WebServer
    from asrcore.engine import Engine
    from asrcore.remote.master_target import MasterTarget
    from asrcore.service.member import Identity as ServerIdentity

__all__ = ["register"]

_log = logging.getLogger(__name__)

_SHORTEST_LEASE, _LONGEST_LEASE = 3.0, 3600.0
_LONGEST_END = 120.0  # seconds
_RENEW_EVERY = 3600.0  # seconds

_CONFIG, _PROCESS, _TARGET = "config-server", "process-server", "master-target"

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every cycle.")]
LogFormat = Annotated[str, typer.Option(help="text, or json: one object a line.")]
Name = Annotated[str, typer.Option(help="Name of this process server, one of its own.", show_default="the host's name")]
Sites = Annotated[
    list[str] | None, typer.Option("--site", help="A site that this process server can reach, if not all; repeatable.")
]
Lease = Annotated[str, typer.Option(help="Silence after which a process server's machines go to others.")]
Listen = Annotated[str, typer.Option(help="ADDRESS:PORT of the configuration server.")]
Directory = Annotated[Path, typer.Option("--identity", help="Directory of the identity (see `asr join`).")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.command("run")(run)
    app.command(_PROCESS)(process_server)
    app.command(_CONFIG)(config_server)
    app.command("serve")(serve)


def run(context: typer.Context, verbose: Verbose = False, log_format: LogFormat = "text") -> None:
    """Run the replication service in the foreground until Ctrl-C or SIGTERM."""
    stop = _until_told(verbose, log_format)
    with _session.engine(context) as opened:
        opened.start()
        _output.tell(f"replicating with {opened.vault.url}; Ctrl-C stops, nothing is lost")
        opened.run(stop)
        _output.tell("stopping; cycles under way go on at the next start")


def process_server(
    context: typer.Context,
    name: Name = "",
    site: Sites = None,
    lease: Lease = "15s",
    verbose: Verbose = False,
    log_format: LogFormat = "text",
) -> None:
    """Run a process server in the foreground: one of several that share a vault on PostgreSQL.

    Each works on the machines that are assigned to it; those of a server that dies go to the others.
    """
    stop = _until_told(verbose, log_format)
    identity = _server_identity(name, site, lease)
    with _session.engine(context) as opened:
        _output.tell(f"process server {identity.name} with {opened.vault.url}; Ctrl-C stops, nothing is lost")
        threading.Thread(target=_end_for_certain, args=[stop], daemon=True).start()
        opened.serve(identity, stop)
        _output.tell("stopped; other servers go on with its machines")


def config_server(
    context: typer.Context,
    identity: Directory,
    listen: Listen = "0.0.0.0:443",
    ca: _certificates.Ca = None,
    verbose: Verbose = False,
    log_format: LogFormat = "text",
) -> None:
    """Run the configuration server in the foreground: the vault's API, enrolment and metrics, over HTTPS."""
    stop = _until_told(verbose, log_format)
    with _session.engine(context) as opened, _web(opened, listen, identity, ca) as web:
        _output.tell(f"configuration server of {opened.vault.url} at https://{web.address}; Ctrl-C stops")
        stop.wait()


def serve(
    context: typer.Context,
    identity: Directory,
    roles: Annotated[str, typer.Option(help="Which of config-server, process-server and master-target.")] = (
        "config-server,process-server"
    ),
    listen: Listen = "0.0.0.0:443",
    ca: _certificates.Ca = None,
    name: Name = "",
    site: Sites = None,
    lease: Lease = "15s",
    target_listen: Annotated[str, typer.Option(help="ADDRESS:PORT of the master target.")] = "0.0.0.0:9444",
    target_identity: Annotated[
        Path | None, typer.Option(help="Identity of the master target, which has a role of its own.")
    ] = None,
    driver: Annotated[str, typer.Option(help="Driver of the site that the master target serves.")] = "",
    settings: Settings = None,
    verbose: Verbose = False,
    log_format: LogFormat = "text",
) -> None:
    """Run several roles in one process: the single management server.

    The process server shares a vault on PostgreSQL with others; with a vault in a file it is the one engine.
    """
    wanted = [role.strip() for role in roles.split(",")]
    if unknown := set(wanted) - {_CONFIG, _PROCESS, _TARGET}:
        raise InvalidValue(what="roles", value=", ".join(sorted(unknown)), wanted=f"{_CONFIG}, {_PROCESS}, {_TARGET}")
    if _TARGET in wanted and (not driver or target_identity is None):
        raise InvalidValue(what="roles", value=_TARGET, wanted="given with --driver and --target-identity")
    stop = _until_told(verbose, log_format)
    server = _server_identity(name, site, lease)
    with ExitStack() as stack:
        opened = stack.enter_context(_session.engine(context))
        if _CONFIG in wanted:
            web = stack.enter_context(_web(opened, listen, identity, ca))
            _output.tell(f"configuration server at https://{web.address}")
        if _TARGET in wanted and target_identity is not None:
            target = stack.enter_context(_target(opened, target_listen, target_identity, driver, settings))
            _output.tell(f"{target.component} serves {driver} at {target.address}")
        if _PROCESS not in wanted:
            stop.wait()
        elif opened.vault.shareable:
            _output.tell(f"process server {server.name} with {opened.vault.url}")
            threading.Thread(target=_end_for_certain, args=[stop], daemon=True).start()
            opened.serve(server, stop)
        else:
            opened.start()
            _output.tell(f"replicating with {opened.vault.url}")
            opened.run(stop)
    _output.tell("stopped; nothing is lost")


def _end_for_certain(stop: threading.Event) -> None:
    """A step that hangs must not keep a server alive that others have replaced; what it was in is resumed there."""
    stop.wait()
    threading.Event().wait(_LONGEST_END)
    os._exit(Category.CONFLICT.value)


def _server_identity(name: str, sites: list[str] | None, lease: str) -> ServerIdentity:
    from asrcore.replication.ids import new_id  # noqa: PLC0415
    from asrcore.service.member import Identity  # noqa: PLC0415

    host = socket.gethostname()
    seconds = parse_duration(lease, "lease")
    if not _SHORTEST_LEASE <= seconds <= _LONGEST_LEASE:
        raise InvalidValue(what="lease", value=lease, wanted="3s to 1h")
    return Identity(name or host, new_id("s"), f"{host}, pid {os.getpid()}", sites or None, seconds)


@contextmanager
def _web(opened: Engine, listen: str, identity: Path, ca: Path | None) -> Iterator[WebServer]:
    from asrcore.config_server.api import make_app  # noqa: PLC0415 - the web stack takes long to import
    from asrcore.config_server.web import WebServer  # noqa: PLC0415
    from asrcore.pki.authority import Authority, keep_own  # noqa: PLC0415
    from asrcore.wire.carrier import Address  # noqa: PLC0415
    from asrcore.wire.tls import Identity  # noqa: PLC0415

    vault = opened.vault.for_others()  # the engine's own, as a process server's, records of its machines only
    authority, address = Authority(_certificates.default_ca(ca), vault), Address.parse(listen, "--listen")
    keep_own(identity, authority)
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(_RENEW_EVERY):
            try:
                keep_own(identity, authority)
            except AsrError as problem:
                _log.error("%s; %s", problem, problem.action_text)

    with WebServer(make_app(vault, authority), address, Identity(identity)) as web:
        threading.Thread(target=keep, name="own-certificate", daemon=True).start()
        try:
            yield web
        finally:
            ended.set()


@contextmanager
def _target(
    opened: Engine, listen: str, identity: Path, driver: str, settings: list[str] | None
) -> Iterator[MasterTarget]:
    from asrcore.remote.master_target import MasterTarget  # noqa: PLC0415
    from asrcore.wire.carrier import Address  # noqa: PLC0415
    from asrcore.wire.tls import Identity  # noqa: PLC0415

    address = Address.parse(listen, "--target-listen")
    with (
        opened.plugins.connect(driver, "here", parsed(settings)) as site,
        MasterTarget(site, address, Identity(identity)) as target,
    ):
        yield target


def _until_told(verbose: bool, log_format: str) -> threading.Event:
    """Log for a service; the event is set by Ctrl-C or SIGTERM, and a second one ends the process at once."""
    from asrcore.service import logs  # noqa: PLC0415

    if log_format not in logs.FORMATS:
        raise InvalidValue(what="log format", value=log_format, wanted=" or ".join(logs.FORMATS))
    logs.set_up(log_format, verbose=verbose)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(_session.INTERRUPTED) if stop.is_set() else stop.set())
    return stop
