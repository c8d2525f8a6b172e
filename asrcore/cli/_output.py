"""Output: tables for people, one JSON document for scripts, errors with cause and next action."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from asrcore.errors import AsrError
from asrcore.model.plain import plain

__all__ = ["Json", "fail", "note", "plain", "show", "show_findings", "table"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def show(document: object, text: str, *, as_json: bool) -> None:
    """Print the document as JSON, or the text."""
    if as_json:
        typer.echo(json.dumps(plain(document), indent=2))
    elif text:
        typer.echo(text)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """Print a table that fits the terminal; cut off nothing when the output is no terminal."""
    rows = list(rows)
    if not rows:
        typer.echo(empty)
        return
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())
        return
    from rich.console import Console  # noqa: PLC0415 - 60 ms that only people pay
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*map(escape, row))
    Console().print(grid)


def note(text: str) -> None:
    """Print a line of progress, on standard error: standard output is for the result."""
    typer.echo(text, err=True)


def show_findings(findings: Iterable[Any]) -> str:
    """Findings as text: what, cause, next action."""
    lines = []
    for item in findings:
        lines.append(f"{item.severity.value:8} [{item.code}] {item.what}")
        lines.append(f"         cause: {item.cause}")
        lines.append(f"         next:  {item.action}")
    return "\n".join(lines)


def fail(error: AsrError, *, as_json: bool) -> int:
    """Print an error of the catalogue; returns the exit code of its class."""
    if as_json:
        sys.stdout.write(json.dumps({"error": error.as_dict()}, indent=2) + "\n")
    sys.stderr.write(f"error [{error.code}]: {error}\n  cause: {error.cause_text}\n  next:  {error.action_text}\n")
    return error.category.value
