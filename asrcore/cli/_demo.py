"""`asr demo`: the whole story on sites in memory, printed as it happens."""

from __future__ import annotations

import logging
import signal
import sys
from typing import TYPE_CHECKING

import typer

from asrcore.cli import _output
from asrcore.cli._output import Json

if TYPE_CHECKING:
    from rich.console import Console

    from asrcore.cli._demo_story import Step

__all__ = ["register"]

_INTRODUCTION = (
    "Disaster recovery of one machine between two sites. The sites are in memory; the engine is the real one. Nothing "
    "is written but to a temporary directory.\n"
)
_CONCLUSION = (
    "\nEvery check passed. The times are those of machines in memory, which start at once; at real sites RPO and RTO "
    "are longer. Next: docs/tutorial/two-hosts.md."
)


def register(app: typer.Typer) -> None:
    """Add the verb to the application."""
    app.command("demo")(demo)


def demo(as_json: Json = False) -> None:
    """Try everything in seconds, without root: protect, test, lose a site, fail over, fail back. Touches no vault."""
    from asrcore.cli import _demo_story  # noqa: PLC0415 - `asr --help` needs no database

    logging.getLogger("asrcore").addHandler(logging.NullHandler())  # what it warns of is part of the story
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the directory is removed
    if as_json:
        steps = _demo_story.run(lambda _: None)
        _output.show({"seconds": steps[-1].at, "timeline": steps}, "", as_json=True)
        return
    from rich.console import Console  # noqa: PLC0415 - 60 ms that only people pay

    console = Console(highlight=False)
    console.print(_INTRODUCTION)
    _demo_story.run(lambda step: _print(console, step))
    console.print(_CONCLUSION)


def _print(console: Console, step: Step) -> None:
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    text = Text(step.text)
    if step.checked:
        text.append(f"\nChecked: {step.checked}.", style="green")
    row = Table.grid(padding=(0, 2))
    row.add_column(width=5, justify="right")
    row.add_column(width=len("asr failover unplanned"))
    row.add_column()
    command = Text(step.command, style="cyan") if step.command else Text(step.step.replace("-", " "), style="yellow")
    row.add_row(Text(f"{step.at:.2f}", style="dim"), command, text)
    console.print(row)
