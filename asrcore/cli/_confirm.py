"""Before something is lost: show what would happen, and ask.

A verb that may lose data or service has the options `Yes` and `DryRun`, and calls `agreed` with what it would do.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from asrcore.cli import _output
from asrcore.errors import ConfirmationNeeded

if TYPE_CHECKING:
    from asrcore.procedures.impact import Impact

__all__ = ["DryRun", "Yes", "agreed"]

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking; needed where no terminal is attached.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would happen; nothing is changed.")]


def agreed(plan: Impact, *, yes: bool, dry_run: bool, as_json: bool) -> bool:
    """Whether to do it: False after --dry-run, which shows the plan. Asks at a terminal; raises ConfirmationNeeded
    where there is none, or the answer is another one."""
    if dry_run:
        _output.show({"plan": plan.document()}, f"{plan}\nNothing was changed: --dry-run.", as_json=as_json)
        return False
    if yes or not plan.harmful:
        return True
    verb = f"asr {plan.verb} {plan.subject}"
    if not _at_terminal():
        raise ConfirmationNeeded(verb=verb, reason="No terminal is attached, so it cannot be asked for")
    _output.note(str(plan))
    wanted = plan.subject if plan.severe else "yes"
    if typer.prompt(f"Type {wanted} to do it", default="", show_default=False, err=True).strip() != wanted:
        raise ConfirmationNeeded(verb=verb, reason=f"The answer was not {wanted!r}")
    return True


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()
