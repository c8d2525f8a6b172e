"""Looking: `status`, `points`, `jobs`, `events`, `server list`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.cli._output import Json
from asrcore.units import format_duration, format_size, format_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asrcore.engine import MachineStatus
    from asrcore.service.servers import ServerStatus
    from asrcore.vault import Job

__all__ = ["register"]

_server = typer.Typer(help="Servers: process servers and master targets.", no_args_is_help=True)

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
    """Add the verbs to the application."""
    for verb in (status, points, jobs, events):
        app.command(verb.__name__)(verb)
    app.add_typer(_server, name="server")


def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Show every protected machine: state, health with reasons, true RPO, points. Asks no site."""
    while True:
        machines = _session.machines(context)
        if watch and not as_json:
            typer.echo("\x1b[2J\x1b[H", nl=False)  # clear the terminal, cursor to its top
        _show_status(machines, as_json=as_json)
        if not watch:
            return
        time.sleep(2)


def _show_status(machines: Sequence[MachineStatus], *, as_json: bool) -> None:
    from asrcore.service.status import document  # noqa: PLC0415 - `asr --help` needs no database

    if as_json:
        _output.show([document(item) for item in machines], "", as_json=True)
        return
    _output.table(_COLUMNS, [_status_row(item) for item in machines], empty="nothing is protected (`asr protect`)")
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


def points(context: typer.Context, machine: str, as_json: Json = False) -> None:
    """List the recovery points of a machine, oldest first."""
    with _session.engine(context) as opened:
        found = opened.points(machine)
        if as_json:
            _output.show(
                [{**_output.plain(item), "time": format_time(item.taken_at)} for item in found], "", as_json=True
            )
            return
        rows = [
            (
                item.id,
                format_time(item.taken_at),
                item.consistency.value,
                "pinned" if item.pinned else "kept" if item.kept else "latest only",
                format_size(item.bytes_sent),
            )
            for item in found
        ]
        _output.table(("POINT", "TIME", "CONSISTENCY", "KEPT", "SENT"), rows, empty=f"{machine} has no points yet")


def jobs(
    context: typer.Context,
    job: Annotated[str | None, typer.Argument(help="Id of a job (its start is enough).")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Ask for this job's end.")] = False,
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """List jobs, or show one."""
    with _session.engine(context) as opened:
        if job is None:
            found = opened.vault.jobs(limit=limit)
            if as_json:
                _output.show(found, "", as_json=True)
                return
            columns = ("JOB", "KIND", "MACHINE", "STATE", "STEP", "STARTED", "TOOK")
            _output.table(columns, [_job_row(item) for item in found], empty="no jobs yet")
            return
        one = opened.vault.job(job)
        if cancel:
            opened.cancel(one)
        _output.show(one, _job_text(one), as_json=as_json)


def _job_row(job: Job) -> tuple[str, ...]:
    started = format_time(job.started_at) if job.started_at else "-"
    took = format_duration(job.ended_at - job.started_at) if job.ended_at and job.started_at else "-"
    return (job.id, job.kind, job.machine, job.state.value, job.step or "-", started, took)


def _job_text(job: Job) -> str:
    lines = [f"{job.id}: {job.kind} of {job.machine}, {job.state.value}", f"  step: {job.step or '-'}"]
    if job.progress_total:
        done, total = format_size(job.progress_done), format_size(job.progress_total)
        lines.append(f"  {job.progress_work}: {done} of {total}")
    lines += [f"  {name}: {value}" for name, value in _session.result_of(job).items()]
    if job.error:
        lines += [f"  {name}: {value}" for name, value in job.error.items()]
    return "\n".join(lines)


def events(
    context: typer.Context,
    machine: Annotated[str | None, typer.Argument(help="Only this machine's.")] = None,
    limit: Annotated[int, typer.Option(help="How many, newest last.")] = 50,
    as_json: Json = False,
) -> None:
    """Show what happened: failovers, quarantines, verifications."""
    with _session.engine(context) as opened:
        found = opened.vault.events(machine=machine, limit=limit)
        if as_json:
            _output.show(found, "", as_json=True)
            return
        rows = [(format_time(item.at), item.machine, item.kind, item.text) for item in found]
        _output.table(("TIME", "MACHINE", "KIND", "WHAT"), rows, empty="nothing happened yet")


@_server.command("list")
def server_list(context: typer.Context, as_json: Json = False) -> None:
    """List process servers and master targets (these are asked): health, version, last seen, machines carried."""
    with _session.engine(context) as opened:
        found = opened.servers()
        if as_json:
            _output.show([item.document() for item in found], "", as_json=True)
            return
        columns = ("ROLE", "SERVER", "HEALTH", "VERSION", "LAST SEEN", "MACHINES", "SITES", "WHERE")
        _output.table(columns, [_server_row(item) for item in found], empty="no server works on this vault")
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
