"""`asr master-target`: serve a site to engines elsewhere."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from asrcore import plugins
from asrcore.cli import _session
from asrcore.cli._options import Settings, parsed
from asrcore.remote.master_target import MasterTarget
from asrcore.units import parse_duration
from asrcore.wire.carrier import Address, Limits
from asrcore.wire.tls import Identity

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verb to the application."""
    app.command("master-target")(master_target)


def master_target(
    driver: Annotated[str, typer.Option(help="Driver of the site to serve (see `asr driver list`).")],
    identity: Annotated[
        Path, typer.Option(help="Directory with certificate.pem, key.pem, ca.pem and, optionally, crl.pem.")
    ],
    settings: Settings = None,
    listen: Annotated[str, typer.Option(help="ADDRESS:PORT to listen on.")] = "0.0.0.0:9444",
    silence: Annotated[str, typer.Option(help="Drop a connection after this long without traffic.")] = "30s",
) -> None:
    """Run a master target: serve this host's site to engines elsewhere.

    Runs in the foreground until Ctrl-C or SIGTERM. Engines connect over mutual TLS with the driver `remote`. Needs no
    vault.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    address, limits = Address.parse(listen, "--listen"), Limits(silence=parse_duration(silence, "--silence"))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(_session.INTERRUPTED) if stop.is_set() else stop.set())
    with plugins.load().connect(driver, "here", parsed(settings)) as site:
        status = site.status()
        with MasterTarget(site, address, Identity(identity), limits=limits) as target:
            typer.echo(f"{target.component} serves {driver} ({status.version}) at {target.address}; stop with Ctrl-C")
            stop.wait()
            typer.echo("stopping; received data is being made durable")
