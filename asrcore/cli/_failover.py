"""Failing over: `failover test|planned|unplanned|cleanup|undo|commit`."""

from __future__ import annotations

from typing import Annotated

import typer

from asrcore.cli import _session
from asrcore.cli._output import Json
from asrcore.units import parse_duration

__all__ = ["register"]

_failover = typer.Typer(help="Run a machine from its recovery points at the target site.", no_args_is_help=True)

Point = Annotated[str, typer.Option(help="`latest`, the id of a point, or an ISO time (the newest point before it).")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.add_typer(_failover, name="failover")


@_failover.command("test")
def run_test(
    context: typer.Context,
    machine: str,
    point: Point = "latest",
    network: Annotated[
        str | None, typer.Option(help="Plug the test into this network of the target (default: an isolated one).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a point in isolation, on a disposable copy, while replication goes on."""
    with _session.engine(context) as opened:
        _session.finish(opened, opened.failover_test(machine, point=point, network=network), as_json=as_json)


@_failover.command()
def cleanup(context: typer.Context, machine: str, as_json: Json = False) -> None:
    """Remove the test machine and everything it wrote."""
    with _session.engine(context) as opened:
        _session.finish(opened, opened.failover_cleanup(machine), as_json=as_json)


@_failover.command()
def planned(
    context: typer.Context,
    machine: str,
    force_off: Annotated[bool, typer.Option("--force-off", help="Cut the power instead of asking the guest.")] = False,
    timeout: Annotated[str, typer.Option(help="How long the guest may take to shut down.")] = "2min",
    as_json: Json = False,
) -> None:
    """Shut the source down, send the last delta, run the machine at the target: nothing is lost."""
    seconds = parse_duration(timeout, "timeout")
    with _session.engine(context) as opened:
        job = opened.failover_planned(machine, force_off=force_off, timeout=seconds)
        _session.finish(opened, job, as_json=as_json)


@_failover.command()
def unplanned(context: typer.Context, machine: str, point: Point = "latest", as_json: Json = False) -> None:
    """Run a point at the target: the source is lost, or given up."""
    with _session.engine(context) as opened:
        _session.finish(opened, opened.failover_unplanned(machine, point=point), as_json=as_json)


@_failover.command()
def undo(context: typer.Context, machine: str, as_json: Json = False) -> None:
    """Before commit: remove the machine at the target again. Then fail over to another point, or go on as before."""
    with _session.engine(context) as opened:
        _session.finish(opened, opened.failover_undo(machine), as_json=as_json)


@_failover.command()
def commit(context: typer.Context, machine: str, as_json: Json = False) -> None:
    """Accept the machine at the target; its older points go."""
    with _session.engine(context) as opened:
        _session.finish(opened, opened.failover_commit(machine), as_json=as_json)
