"""A log that stays small, whatever others do: of many equal lines the first, and once a minute how many more came."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import attrs

__all__ = ["Tally"]

_SECONDS = 60.0
_KINDS = 1000
"""Beyond so many kinds of lines a minute, lines are of one kind when their text is."""


@attrs.define
class _Kind:
    """`last`: the newest of the lines that were not logged."""

    since: float
    more: int = 0
    last: logging.LogRecord | None = None


class Tally(logging.Logger):
    """Logs as the given logger does, but of each kind of line one a minute. Lines are of one kind if they have the same
    text before its values are put in, the same types of errors, and the same `extra={"kind": ...}`."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        """Not registered with `logging`: each listener has one."""
        super().__init__(logger.name)
        self.parent: logging.Logger = logger
        self._clock = clock
        self._kinds: dict[object, _Kind] = {}
        self._guard = threading.Lock()

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - a name of logging's
        """As the logger's: its level may change at any time."""
        return self.parent.isEnabledFor(level)

    def handle(self, record: logging.LogRecord) -> None:
        """Log the line, or count it."""
        self.flush()
        with self._guard:
            key = _key(record)
            if key not in self._kinds and len(self._kinds) >= _KINDS:
                key = (record.levelno, record.msg)
            known = self._kinds.get(key)
            if known is not None:
                known.more += 1
                known.last = record
                return
            self._kinds[key] = _Kind(self._clock())
        super().handle(record)

    def flush(self) -> None:
        """Log how many more lines there were of each kind whose minute is over. To be called now and then."""
        now, due = self._clock(), []
        with self._guard:
            for key, kind in list(self._kinds.items()):
                if now - kind.since < _SECONDS:
                    continue
                del self._kinds[key]
                if kind.last is not None:
                    due.append((kind.last, kind.more))
                    self._kinds[key] = _Kind(now)
        for record, more in due:
            record.msg = f"{record.getMessage()} (the last of {more} more such lines in {_SECONDS:.0f} seconds)"
            record.args = None
            super().handle(record)


def _key(record: logging.LogRecord) -> object:
    args = record.args if isinstance(record.args, tuple) else ()
    errors = [type(item) for item in args if isinstance(item, BaseException)]
    raised = record.exc_info[0] if record.exc_info else None
    return (record.levelno, record.msg, *errors, raised, record.__dict__.get("kind"))
