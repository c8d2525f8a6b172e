"""Opening the vault for a verb, and following a job with a progress bar."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from asrcore.cli import _output
from asrcore.units import format_duration, format_size

if TYPE_CHECKING:
    from asrcore.engine import Engine
    from asrcore.vault import Job

_REPLICATED_AFTER = ("protect", "resync", "reprotect", "failover-undo")
_LAST_SEEN = ", last seen"  # what follows changes all the time
INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C

__all__ = ["INTERRUPTED", "default_vault", "engine", "finish", "result_of", "vault_url"]


def default_vault() -> str:
    """The default vault: /var/lib/asrcore for root, else the user's data directory."""
    if os.geteuid() == 0:
        return "/var/lib/asrcore/vault.db"
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(base) / "asrcore" / "vault.db")


def vault_url(context: typer.Context) -> str:
    """The vault that --vault or ASR_VAULT names."""
    return str(context.obj or default_vault())


@contextmanager
def engine(context: typer.Context) -> Iterator[Engine]:
    """The opened engine of a verb."""
    from asrcore.engine import Engine  # noqa: PLC0415 - `asr --help` needs no database

    with Engine.open(vault_url(context)) as opened:
        yield opened


def finish(opened: Engine, job: Job, *, as_json: bool, wait: bool = True) -> Job:
    """Follow a job to its end and show its result; raises the job's error."""
    if not wait:
        until = "; it waits until the service runs (`asr run`)" if opened.working else ""
        text = f"job {job.id} ({job.kind}) is queued{until}; see it with `asr job show {job.id}`"
        _output.show(job, text, as_json=as_json)
        return job
    try:
        done = _followed(opened, job, quiet=as_json)
    except KeyboardInterrupt:
        resumes = "job {} waits until the service runs (`asr run`) or another verb resumes it"
        resumes = resumes if opened.working else "the service continues job {}"
        _output.note(f"\ninterrupted; {resumes.format(job.id)} (`asr job list`)")
        signal.signal(signal.SIGINT, _leave_at_once)
        raise
    if as_json:
        _output.show({"job": done, "result": result_of(done)}, "", as_json=True)
    else:
        took = (done.ended_at or 0) - (done.started_at or 0)
        typer.echo(f"{done.kind} of {done.machine}: done in {format_duration(took)}")
        for name, value in result_of(done).items():
            typer.echo(f"  {name}: {_figure(name, value)}")
    if opened.working and done.kind in _REPLICATED_AFTER:
        _output.note(f"no service runs, so {done.machine} is not replicated: start asr-run.service or `asr run`")
    return done


def _leave_at_once(*_: object) -> None:
    """A second Ctrl-C does not wait for the running step, which is resumed as after a kill."""
    os._exit(INTERRUPTED)


def result_of(job: Job) -> dict[str, object]:
    """The facts of a job's result."""
    return dict(json.loads(job.result)) if job.result else {}


def _figure(name: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and "bytes" in name:
        return f"{format_size(value)} ({value})"
    if isinstance(value, float) and "seconds" in name:
        return format_duration(value)
    return str(_output.plain(value))


def _followed(opened: Engine, job: Job, *, quiet: bool) -> Job:
    said = ""

    def on_wait(text: str) -> None:
        nonlocal said
        if text.partition(_LAST_SEEN)[0] != said:
            said = text.partition(_LAST_SEEN)[0]
            _output.note(f"{job.kind} of {job.machine}: {text}")

    if quiet:
        return opened.wait(job, on_wait=on_wait)
    if not sys.stderr.isatty():
        return _followed_in_lines(opened, job, on_wait)
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(job.kind, total=None)

        def on_change(now: Job) -> None:
            work = f"{now.kind}: {now.step or 'waiting'}" + (f", {now.progress_work}" if now.progress_work else "")
            bar.update(task, description=work, completed=now.progress_done, total=now.progress_total or None)

        return opened.wait(job, on_change, on_wait=lambda text: bar.update(task, description=f"{job.kind}: {text}"))


def _followed_in_lines(opened: Engine, job: Job, on_wait: Callable[[str], None]) -> Job:
    shown = ""

    def on_change(now: Job) -> None:
        nonlocal shown
        line = f"{now.kind} of {now.machine}: {now.step or 'waiting'}"
        if line != shown:
            shown = line
            _output.note(line)

    return opened.wait(job, on_change, on_wait=on_wait)
