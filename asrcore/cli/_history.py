"""What the vault has recorded: `points`, `jobs`, `events`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.cli._output import Json
from asrcore.units import format_duration, format_size, format_time

if TYPE_CHECKING:
    from asrcore.vault import Job

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    for verb in (points, jobs, events):
        app.command(verb.__name__)(verb)


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
