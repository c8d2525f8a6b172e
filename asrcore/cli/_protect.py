"""Protection and replication: `protect`, `unprotect`, `replicate`, `resync`, `verify`, `reprotect`."""

from __future__ import annotations

from typing import Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.cli._confirm import DryRun, Yes, agreed
from asrcore.cli._options import MachineName, networks_of
from asrcore.cli._output import Json
from asrcore.service import status

__all__ = ["register"]

NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait for the job (needs a running service).")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    for verb in (protect, unprotect, replicate, resync, verify, reprotect):
        app.command(verb.__name__)(verb)


def protect(
    context: typer.Context,
    machine: Annotated[str, typer.Argument(help="Name or id of the machine at the site where it runs.")],
    source: Annotated[str, typer.Option("--from", help="Site where the machine runs.")],
    target: Annotated[str, typer.Option("--to", help="Site that keeps the replica.")],
    policy: Annotated[str, typer.Option(help="Replication policy.")],
    network: Annotated[
        list[str] | None,
        typer.Option(help="SOURCE=TARGET: network at the target for a network of the source; repeatable."),
    ] = None,
    test_network: Annotated[str, typer.Option(help="Network for test failovers (default: an isolated network).")] = "",
    check: Annotated[bool, typer.Option("--check", help="Only show the readiness findings.")] = False,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Protect a machine: readiness checks, replica, initial copy.

    `asr run` then replicates its changes.
    """
    with _session.engine(context) as opened:
        if check:
            mapped = networks_of(network)
            found = opened.readiness(machine, source=source, target=target, policy=policy, networks=mapped)
            _output.show({"findings": found}, _output.show_findings(found) or "ready", as_json=as_json)
            return
        job = opened.protect(
            machine,
            source=source,
            target=target,
            policy=policy,
            networks=networks_of(network),
            test_network=test_network,
        )
        _session.finish(opened, job, as_json=as_json, wait=not no_wait)


def unprotect(
    context: typer.Context, machine: MachineName, yes: Yes = False, dry_run: DryRun = False, as_json: Json = False
) -> None:
    """End protection: deletes the replica and all its recovery points.

    Change tracking at the source is removed. The machine itself is not changed.
    """
    with _session.engine(context) as opened:
        if agreed(opened.impact("unprotect", machine), yes=yes, dry_run=dry_run, as_json=as_json):
            _session.finish(opened, opened.unprotect(machine), as_json=as_json)


def replicate(
    context: typer.Context,
    machine: MachineName,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep this recovery point for as long as the policy says.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run one replication cycle now, or resume an interrupted copy."""
    with _session.engine(context) as opened:
        _session.finish(opened, opened.replicate(machine, keep=keep), as_json=as_json)


def resync(
    context: typer.Context,
    machine: MachineName,
    now: Annotated[bool, typer.Option("--now", help="Start now instead of in the policy's resync window.")] = False,
    as_json: Json = False,
) -> None:
    """Compare source and replica, and send what differs.

    Without --now the comparison starts in the policy's resync window, and no recovery points are created until then.
    """
    with _session.engine(context) as opened:
        job = opened.resync(machine, now=now)
        if job is None:
            window = opened.vault.policy(opened.vault.protection(machine).policy).resync_window
            document = {"machine": machine, "window": str(window)}
            _output.show(document, f"{machine} will be compared in the resync window {window}", as_json=as_json)
            if not as_json and not (at_work := status.engine(opened.vault)).up:
                _output.note(str(at_work))
            return
        _session.finish(opened, job, as_json=as_json)


def verify(
    context: typer.Context,
    machine: MachineName,
    repair: Annotated[bool, typer.Option("--repair", help="Send what differs again.")] = False,
    sha256: Annotated[
        bool, typer.Option("--sha256", help="Also print a SHA-256 per disk of both sides (reads every disk; slow).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove, byte by byte, that the replica equals the frozen source."""
    with _session.engine(context) as opened:
        _session.finish(opened, opened.verify(machine, repair=repair, sha256=sha256), as_json=as_json)


def reprotect(context: typer.Context, machine: MachineName, as_json: Json = False) -> None:
    """After a committed failover: replicate in the opposite direction.

    Sends only what differs.
    """
    with _session.engine(context) as opened:
        _session.finish(opened, opened.reprotect(machine), as_json=as_json)
