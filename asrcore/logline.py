"""Lines of the log that say what happened to whom: an event, and facts as NAME=VALUE.

The names are those of the metrics and of the JSON of `asr`: `machine`, `job`, `kind`, `state`, `point`, `sent_bytes`.
"""

from __future__ import annotations

import json
import logging

__all__ = ["report"]


def report(log: logging.Logger, level: int, event: str, /, **facts: object) -> None:
    """Log an event. Facts that are None or "" are left out. In a log of JSON each fact is a key of its own."""
    if not log.isEnabledFor(level):
        return
    given = {name: _plain(value) for name, value in facts.items() if value is not None and value != ""}
    shown = "".join(f" {name}={_shown(value)}" for name, value in given.items())
    log.log(level, "%s%s", event, shown, extra={"event": event, "facts": given}, stacklevel=2)


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if text.isprintable() and not {" ", '"', "="} & set(text) else json.dumps(text, ensure_ascii=False)
