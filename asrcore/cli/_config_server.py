"""The configuration server, alone or with other roles: `config-server`, `serve`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asrcore.cli import _certificates, _output, _services, _session
from asrcore.cli._options import Settings, parsed
from asrcore.cli._services import Lease, LogFormat, Name, Sites, Verbose
from asrcore.config_server.api import make_app
from asrcore.config_server.web import WebServer
from asrcore.errors import AsrError, InvalidValue
from asrcore.pki.authority import Authority, keep_own
from asrcore.remote.master_target import MasterTarget
from asrcore.wire.carrier import Address
from asrcore.wire.tls import Identity

if TYPE_CHECKING:
    from asrcore.engine import Engine

__all__ = ["register"]

_log = logging.getLogger(__name__)

_RENEW_EVERY = 3600.0  # seconds

_CONFIG, _PROCESS, _TARGET = "config-server", "process-server", "master-target"

Listen = Annotated[str, typer.Option(help="ADDRESS:PORT of the configuration server.")]
Directory = Annotated[Path, typer.Option("--identity", help="Directory of the certificate and key (see `asr join`).")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.command(_CONFIG)(config_server)
    app.command("serve")(serve)


def config_server(
    context: typer.Context,
    identity: Directory,
    listen: Listen = "0.0.0.0:443",
    ca: _certificates.Ca = None,
    verbose: Verbose = False,
    log_format: LogFormat = "text",
) -> None:
    """Run the configuration server in the foreground.

    It serves the API of the vault, enrolment and metrics over HTTPS.
    """
    stop = _services.stop_on_signal(verbose, log_format)
    with _session.engine(context) as opened, _web(opened, listen, identity, ca) as web:
        _output.note(f"configuration server of {opened.vault.url} at https://{web.address}; stop with Ctrl-C")
        stop.wait()


def serve(
    context: typer.Context,
    identity: Directory,
    roles: Annotated[str, typer.Option(help="Comma-separated: config-server, process-server, master-target.")] = (
        "config-server,process-server"
    ),
    listen: Listen = "0.0.0.0:443",
    ca: _certificates.Ca = None,
    name: Name = "",
    site: Sites = None,
    lease: Lease = "15s",
    target_listen: Annotated[str, typer.Option(help="ADDRESS:PORT of the master target.")] = "0.0.0.0:9444",
    target_identity: Annotated[
        Path | None, typer.Option(help="Directory of the master target's certificate and key.")
    ] = None,
    driver: Annotated[str, typer.Option(help="Driver of the site that the master target serves.")] = "",
    settings: Settings = None,
    verbose: Verbose = False,
    log_format: LogFormat = "text",
) -> None:
    """Run several roles in one process, as a single management server.

    With a vault on PostgreSQL the process server may be one of several; with a vault in a file it is the only engine.
    """
    wanted = [role.strip() for role in roles.split(",")]
    if unknown := set(wanted) - {_CONFIG, _PROCESS, _TARGET}:
        raise InvalidValue(what="roles", value=", ".join(sorted(unknown)), wanted=f"{_CONFIG}, {_PROCESS}, {_TARGET}")
    if _TARGET in wanted and (not driver or target_identity is None):
        raise InvalidValue(what="roles", value=_TARGET, wanted="given with --driver and --target-identity")
    stop = _services.stop_on_signal(verbose, log_format)
    server = _services.server_identity(name, site, lease)
    with ExitStack() as stack:
        opened = stack.enter_context(_session.engine(context))
        if _CONFIG in wanted:
            web = stack.enter_context(_web(opened, listen, identity, ca))
            _output.note(f"configuration server at https://{web.address}")
        if _TARGET in wanted and target_identity is not None:
            target = stack.enter_context(_target(opened, target_listen, target_identity, driver, settings))
            _output.note(f"{target.component} serves {driver} at {target.address}")
        if _PROCESS not in wanted:
            stop.wait()
        elif opened.vault.shareable:
            _output.note(f"process server {server.name} with {opened.vault.url}")
            threading.Thread(target=_services.exit_for_certain, args=[stop], daemon=True).start()
            opened.serve(server, stop)
        else:
            opened.start()
            _output.note(f"replicating with {opened.vault.url}")
            opened.run(stop)
    _output.note("stopped")


@contextmanager
def _web(opened: Engine, listen: str, identity: Path, ca: Path | None) -> Iterator[WebServer]:
    vault = opened.vault.for_others()  # the engine's own, as a process server's, writes records of its machines only
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
    address = Address.parse(listen, "--target-listen")
    with (
        opened.plugins.connect(driver, "here", parsed(settings)) as site,
        MasterTarget(site, address, Identity(identity)) as target,
    ):
        yield target
