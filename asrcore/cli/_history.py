"""What the vault has recorded: `point`, `job`, `event`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.cli._options import MachineName
from asrcore.cli._output import Json
from asrcore.jobs import requested_by
from asrcore.service.status import EngineStatus, engine
from asrcore.units import format_duration, format_size, format_time

if TYPE_CHECKING:
    from asrcore.vault import Job

__all__ = ["register"]

_point = typer.Typer(help="Recovery points of a machine.", no_args_is_help=True)
_job = typer.Typer(help="Jobs: list them, show one, or cancel one.", no_args_is_help=True)
_event = typer.Typer(help="Events: failovers, quarantines, verifications, repairs.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(help="Id of the job, or its first characters.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.add_typer(_point, name="point")
    app.add_typer(_job, name="job")
    app.add_typer(_event, name="event")


@_point.command("list")
def point_list(context: typer.Context, machine: MachineName, as_json: Json = False) -> None:
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
                f"DAMAGED: {item.damaged}" if item.damaged else _proved(item.proved_at),
            )
            for item in found
        ]
        columns = ("POINT", "TIME", "CONSISTENCY", "KEPT", "SENT", "READ")
        _output.table(columns, rows, empty=f"{machine} has no recovery points yet")


def _proved(at: float | None) -> str:
    return "-" if at is None else f"whole at {format_time(at)}"


@_job.command("list")
def job_list(
    context: typer.Context,
    limit: Annotated[int, typer.Option(help="Show at most this many jobs.")] = 20,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    with _session.engine(context) as opened:
        found, at_work = opened.vault.jobs(limit=limit), engine(opened.vault)
        if as_json:
            _output.show([_job_document(item, at_work) for item in found], "", as_json=True)
            return
        if not at_work.up:
            _output.note(str(at_work))
        columns = ("JOB", "KIND", "MACHINE", "STATE", "STEP", "STARTED", "TOOK")
        _output.table(columns, [_job_row(item, at_work) for item in found], empty="no jobs yet")


@_job.command("show")
def job_show(context: typer.Context, job: JobId, as_json: Json = False) -> None:
    """Show a job: its step, progress, result or error."""
    with _session.engine(context) as opened:
        found, at_work = opened.vault.job(job), engine(opened.vault)
        _output.show(_job_document(found, at_work), _job_text(found, at_work), as_json=as_json)


@_job.command("cancel")
def job_cancel(context: typer.Context, job: JobId, as_json: Json = False) -> None:
    """Cancel a job at its next step. What it copied is kept for the next run."""
    with _session.engine(context) as opened:
        found = opened.vault.job(job)
        opened.cancel(found)
        at_work = engine(opened.vault)
        _output.show(_job_document(found, at_work), _job_text(found, at_work), as_json=as_json)


def _state(job: Job, at_work: EngineStatus) -> str:
    """A job that has not ended does not run where no engine does."""
    return job.state.value if job.state.ended or at_work.up else "waiting"


def _job_document(job: Job, at_work: EngineStatus) -> dict[str, object]:
    return {**_output.plain(job), "waiting": _state(job, at_work) == "waiting", "who": requested_by(job)}


def _job_row(job: Job, at_work: EngineStatus) -> tuple[str, ...]:
    started = format_time(job.started_at) if job.started_at else "-"
    took = format_duration(job.ended_at - job.started_at) if job.ended_at and job.started_at else "-"
    return (job.id, job.kind, job.machine, _state(job, at_work), job.step or "-", started, took)


def _job_text(job: Job, at_work: EngineStatus) -> str:
    state = _state(job, at_work)
    lines = [f"{job.id}: {job.kind} of {job.machine}, {state}", f"  step: {job.step or '-'}"]
    if who := requested_by(job):
        lines.append(f"  requested by: {who}")
    if state == "waiting":
        lines += [f"  {at_work}", "  the job resumes when an engine is up"]
    if job.progress_total:
        done, total = format_size(job.progress_done), format_size(job.progress_total)
        lines.append(f"  {job.progress_work}: {done} of {total}")
    lines += [f"  {name}: {value}" for name, value in _session.result_of(job).items()]
    if job.error:
        lines += [f"  {name}: {value}" for name, value in job.error.items()]
    return "\n".join(lines)


@_event.command("list")
def event_list(
    context: typer.Context,
    machine: Annotated[str | None, typer.Argument(help="Show events of this machine only.")] = None,
    limit: Annotated[int, typer.Option(help="Show at most this many events, newest last.")] = 50,
    as_json: Json = False,
) -> None:
    """List failovers, quarantines, verifications and other events."""
    with _session.engine(context) as opened:
        found = opened.vault.events(machine=machine, limit=limit)
        if as_json:
            _output.show(found, "", as_json=True)
            return
        rows = [(format_time(item.at), item.machine, item.kind, item.text) for item in found]
        _output.table(("TIME", "MACHINE", "KIND", "WHAT"), rows, empty="no events yet")
