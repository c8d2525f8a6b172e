"""Writes the pages of docs/reference that follow from the code: python -m tests.docs.generate."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from asrcore.errors import AsrError, Category, catalogue
from asrcore.model import state

__all__ = ["PAGES", "REFERENCE"]

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
NOTE = "<!-- Written by `python -m tests.docs.generate`; change the code, not this page. -->\n"

CATEGORIES = {
    Category.USAGE: "The command or a value in it is not acceptable",
    Category.NOT_FOUND: "Something that was named does not exist",
    Category.CONFLICT: "Not possible in the current state",
    Category.REFUSED: "Refused: it would fail or do damage, or is not offered",
    Category.UNREACHABLE: "A site or machine does not answer",
    Category.ACCESS: "Permission or credentials",
    Category.CAPACITY: "No space",
    Category.INTEGRITY: "Content or records are wrong",
    Category.VAULT: "The vault cannot be used",
    Category.DRIVER: "A driver or its platform failed",
    Category.CANCELLED: "Cancelled on request",
}


def _filled(template: str) -> str:
    """A template as people read it: `{site!r}` is written as *site*."""
    # Code spans stay code: placeholders are in capitals there, as in the help of `asr`.
    parts = re.split(r"(`[^`]*`)", template)
    for index, part in enumerate(parts):
        if part.startswith("`"):
            parts[index] = re.sub(r"\{(\w+)[^}]*\}", lambda match: match[1].upper(), part)
        else:
            parts[index] = re.sub(r"'?\{(\w+)[^}]*\}'?", r"*\1*", part)
    return "".join(parts)


def _errors() -> str:
    # Drivers document their own errors; this page must not depend on which drivers are imported.
    ours = [kind for kind in catalogue().values() if kind.__module__.startswith("asrcore.")]
    lines = [
        "# Errors",
        "",
        NOTE,
        "Every expected failure has a stable code. `asr` prints what happened, the cause and what to do next, and ends "
        "with the exit code of the error's category; with `--json` the error is an object with the fields `code`, "
        "`category`, `happened`, `cause`, `action` and `retry`. In Python each is a class of `asrcore.errors`. "
        "Anything else is a defect: `asr` exits with status 1 and prints a traceback.",
        "",
        "*Retried* errors are tried again by the replication service after 1, 2, 4, 8 and 10 minutes, then every 30; "
        "the others every minute, since something has to be repaired first, except for refused credentials.",
        "",
        "| exit code | category | meaning |",
        "|---|---|---|",
        *(f"| {item.value} | {_slug(item)} | {CATEGORIES[item]} |" for item in Category),
    ]
    for category in Category:
        lines += ["", f"## {_slug(category)} (exit code {category.value})"]
        for kind in ours:
            if kind.category is category:
                lines += _entry(kind)
    return "\n".join(lines) + "\n"


def _slug(category: Category) -> str:
    return category.name.lower()


def _entry(kind: type[AsrError]) -> list[str]:
    return [
        "",
        f"### {kind.code}",
        "",
        f"*{kind.__name__}*{', retried' if kind.retry else ''}: {_filled(kind.happened)}.",
        "",
        f"- Cause: {_filled(kind.cause)}",
        f"- Next: {_filled(kind.action)}",
    ]


def _what_is_true(item: state.State) -> str:
    """The text below the state in the source: enum members have no docstrings."""
    source = Path(state.__file__).read_text(encoding="utf-8")
    found = re.search(rf'^    {item.name} = "[^"]*"\n    """([^"]*)"""$', source, re.MULTILINE)
    if found is None:
        raise ValueError(f"state {item.name} is not documented")
    return " ".join(found[1].split())


def _states() -> str:
    lines = [
        "# States of a protected machine",
        "",
        NOTE,
        "A state describes what is true between durable steps. The progress of a copy and the health of replication "
        "are reported separately.",
        "",
        "| state | what is true | possible events |",
        "|---|---|---|",
    ]
    for item in state.State:
        events = ", ".join(_event(event) for event in state.possible_events(item))
        lines.append(f"| `{item.value}` | {_what_is_true(item)} | {events} |")
    lines += ["", "## Transitions", "", "| from | event | to | reason |", "|---|---|---|---|"]
    lines += [
        f"| `{row.source.value}` | {_event(row.event)} | `{row.target.value}` | {row.reason} |"
        for row in state.TRANSITIONS
    ]
    lines += ["", "## Diagram", "", "Transitions that change the state:", "", "```mermaid", "stateDiagram-v2"]
    lines += [f"    [*] --> {_node(state.State.ENABLING)}"]
    moves: dict[tuple[str, str], list[str]] = {}
    for row in state.TRANSITIONS:
        if row.source is not row.target and row.event is not state.Event.DISABLE:
            moves.setdefault((_node(row.source), _node(row.target)), []).append(_event(row.event))
    lines += [f"    {source} --> {target}: {', '.join(events)}" for (source, target), events in moves.items()]
    lines += ["```", "", f"Not shown: *{_event(state.Event.DISABLE)}*, which leads to `disabling`."]
    return "\n".join(lines) + "\n"


def _event(event: state.Event) -> str:
    return event.name.lower().replace("_", " ")


def _node(item: state.State) -> str:
    return item.value.replace("-", "_")


PAGES: dict[str, Callable[[], str]] = {"errors.md": _errors, "states.md": _states}


def main() -> None:
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
        print(f"docs/reference/{name}")


if __name__ == "__main__":
    main()
