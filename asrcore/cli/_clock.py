"""`asr clock`: whether the clock of the engine's host is trusted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

from asrcore.cli import _output, _session
from asrcore.cli._confirm import DryRun, Yes, agreed
from asrcore.cli._output import Json
from asrcore.procedures.impact import of_clock
from asrcore.units import format_time

if TYPE_CHECKING:
    from asrcore.vault import ClockState

__all__ = ["register"]

_clock = typer.Typer(help="The clock of the engine's host: show whether it is trusted, or accept it.")


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.add_typer(_clock, name="clock", no_args_is_help=True)


@_clock.command("show")
def show(context: typer.Context, as_json: Json = False) -> None:
    """Show the time of this host, and why no recovery point is deleted if the engine's clock is in doubt."""
    with _session.engine(context) as opened:
        state = opened.vault.clock_state()
        _output.show(_document(state), _text(state), as_json=as_json)


@_clock.command("accept")
def accept(context: typer.Context, yes: Yes = False, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Accept the present time as right: recovery points are deleted by age again.

    Check the time of the engine's host first (`timedatectl`). The time during which no engine ran counts from now on.
    """
    with _session.engine(context) as opened:
        now, state = time.time(), opened.vault.clock_state()
        plan = of_clock(now, state.text, held=state.held)
        if not agreed(plan, yes=yes, dry_run=dry_run, as_json=as_json):
            return
        accepted = opened.vault.accept_clock(now, f"the time {format_time(now)} was accepted as right")
        text = "accepted; recovery points are deleted by age again" if accepted else "the clock is not in doubt"
        _output.show({"accepted": accepted}, text, as_json=as_json)


def _document(state: ClockState) -> dict[str, object]:
    doubted = {"since": format_time(state.at), "reason": state.text} if state.held else None
    return {"time": format_time(time.time()), "in_doubt": doubted}


def _text(state: ClockState) -> str:
    lines = [f"time of this host: {format_time(time.time())}"]
    if state.held:
        lines.append(f"in doubt since {format_time(state.at)}: {state.text}")
        lines.append("no recovery point is deleted until the clock has held for an hour; `asr clock accept` ends this")
    else:
        lines.append("the clock of the engine's host is trusted")
    return "\n".join(lines)
