"""Failover: `failover test|planned|unplanned|cleanup|undo|commit`."""

from __future__ import annotations

from typing import Annotated

import typer

from asrcore.cli import _session
from asrcore.cli._confirm import DryRun, Yes, agreed
from asrcore.cli._options import MachineName
from asrcore.cli._output import Json
from asrcore.units import parse_duration

__all__ = ["register"]

_failover = typer.Typer(help="Run a machine from its recovery points at the target site.", no_args_is_help=True)

Point = Annotated[
    str,
    typer.Option(help="`latest`, the id of a recovery point, or an ISO time (the newest point not after it)."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Fail over although the target finds that it cannot run the machine.")
]


Prove = Annotated[
    bool,
    typer.Option("--prove", help="Read all of the recovery point first, and compare it with what was recorded of it."),
]
AllowDamaged = Annotated[
    bool, typer.Option("--allow-damaged", help="Use the recovery point although it is found or known to be damaged.")
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.add_typer(_failover, name="failover")


@_failover.command("test")
def run_test(
    context: typer.Context,
    machine: MachineName,
    point: Point = "latest",
    network: Annotated[
        str | None,
        typer.Option(
            help="Network for the test machine (default: that of --test-network at protect, or an isolated one)."
        ),
    ] = None,
    prove: Prove = False,
    allow_damaged: AllowDamaged = False,
    as_json: Json = False,
) -> None:
    """Start an isolated test machine from a recovery point. Replication continues.

    `asr failover cleanup` deletes it.
    """
    with _session.engine(context) as opened:
        job = opened.failover_test(machine, point=point, network=network, prove=prove, allow_damaged=allow_damaged)
        _session.finish(opened, job, as_json=as_json)


@_failover.command()
def cleanup(context: typer.Context, machine: MachineName, as_json: Json = False) -> None:
    """Delete the test machine and everything it wrote."""
    with _session.engine(context) as opened:
        _session.finish(opened, opened.failover_cleanup(machine), as_json=as_json)


@_failover.command()
def planned(
    context: typer.Context,
    machine: MachineName,
    force_off: Annotated[
        bool, typer.Option("--force-off", help="Power the machine off instead of asking the guest to shut down.")
    ] = False,
    timeout: Annotated[str, typer.Option(help="How long to wait for the guest's shutdown.")] = "2min",
    force: Force = False,
    prove: Prove = False,
    allow_damaged: AllowDamaged = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Shut down the source, send the last changes, and start the machine at the target, without data loss."""
    seconds = parse_duration(timeout, "timeout")
    with _session.engine(context) as opened:
        if agreed(opened.impact("failover-planned", machine), yes=yes, dry_run=dry_run, as_json=as_json):
            job = opened.failover_planned(
                machine,
                force_off=force_off,
                timeout=seconds,
                force=force,
                prove=prove,
                allow_damaged=allow_damaged,
            )
            _session.finish(opened, job, as_json=as_json)


@_failover.command()
def unplanned(
    context: typer.Context,
    machine: MachineName,
    point: Point = "latest",
    force: Force = False,
    prove: Prove = False,
    allow_damaged: AllowDamaged = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Start the machine at the target from a recovery point: the source has failed or is given up.

    Changes after that recovery point are not in the started machine.
    """
    with _session.engine(context) as opened:
        plan = opened.impact("failover-unplanned", machine, point=point)
        if agreed(plan, yes=yes, dry_run=dry_run, as_json=as_json):
            job = opened.failover_unplanned(machine, point=point, force=force, prove=prove, allow_damaged=allow_damaged)
            _session.finish(opened, job, as_json=as_json)


@_failover.command()
def undo(
    context: typer.Context, machine: MachineName, yes: Yes = False, dry_run: DryRun = False, as_json: Json = False
) -> None:
    """Before commit: delete the machine at the target, with everything it wrote since the failover.

    Then fail over to another recovery point, or replicate from the source as before.
    """
    with _session.engine(context) as opened:
        if agreed(opened.impact("failover-undo", machine), yes=yes, dry_run=dry_run, as_json=as_json):
            _session.finish(opened, opened.failover_undo(machine), as_json=as_json)


@_failover.command()
def commit(
    context: typer.Context, machine: MachineName, yes: Yes = False, dry_run: DryRun = False, as_json: Json = False
) -> None:
    """Accept the machine at the target. The replica and all its recovery points are deleted.

    The machine keeps its own disks. After this the failover cannot be undone, and the machine is not protected until
    `asr reprotect`.
    """
    with _session.engine(context) as opened:
        if agreed(opened.impact("failover-commit", machine), yes=yes, dry_run=dry_run, as_json=as_json):
            _session.finish(opened, opened.failover_commit(machine), as_json=as_json)
