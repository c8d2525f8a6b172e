"""Logs of services: lines for people, or one JSON object per line for log collectors."""

from __future__ import annotations

import json
import logging

from asrcore.errors import AsrError
from asrcore.units import format_time

__all__ = ["FORMATS", "set_up"]

FORMATS = ("text", "json")
_QUIET = ("alembic", "asyncio", "azure", "dbos", "paramiko", "sqlalchemy", "urllib3", "uvicorn")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": format_time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": getattr(record, "event", None) or record.getMessage(),
        }
        line.update({name: value for name, value in getattr(record, "facts", {}).items() if name not in line})
        if record.exc_info and record.exc_info[1] is not None:
            problem = record.exc_info[1]
            if isinstance(problem, AsrError):
                line["error"] = problem.as_dict()
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _wanted(record: logging.LogRecord) -> bool:
    """With --verbose only asrcore and its drivers log details: those of libraries would bury them."""
    return record.levelno >= logging.INFO or record.name.startswith("asr")


def set_up(form: str, *, verbose: bool) -> None:
    """Log to standard error from now on."""
    handler = logging.StreamHandler()
    handler.addFilter(_wanted)
    handler.setFormatter(
        _Json() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
