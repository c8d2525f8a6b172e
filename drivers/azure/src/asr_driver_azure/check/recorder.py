"""Azure's answers, recorded in a file on request; it holds no secrets.

One line of JSON for each answer: when, what was asked, status, the headers that matter, and the body where it is JSON
or XML. Sign-in is not recorded.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

__all__ = ["Recorder", "without_secrets"]

_HEADERS = re.compile(
    r"content-(type|length|range)|retry-after(-ms)?|location|azure-asyncoperation|etag|date|"
    r"x-ms-(?!correlation|routing|client).*",
    re.IGNORECASE,
)
_PLAIN = {"api-version", "comp", "restype", "snapshot", "prevsnapshot", "prefix", "include", "delimiter", "$filter"}
_SECRET = re.compile(r'("(?:accessSAS|access_token|securityDataAccessSAS)"\s*:\s*)"[^"]*"', re.IGNORECASE)
_URL = re.compile(r"https?://[^\s\"'<>]+")
_MOST = 20_000
"""Characters of a body; the list of machine sizes has millions."""


class Recorder:
    """Appends to a file that only its owner can read. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8")

    def __call__(self, answer: Any) -> None:
        """As the SDK's `raw_response_hook`."""
        asked, given = answer.http_request, answer.http_response
        kind = given.headers.get("Content-Type", "")
        text = "json" in kind or "xml" in kind
        if text and hasattr(given, "read"):
            given.read()  # long operations return a stream; it may be read first here
        reported = {
            "at": round(time.time(), 3),
            "method": asked.method,
            "url": without_secrets(asked.url),
            "status": given.status_code,
            "headers": {
                name: without_secrets(value) for name, value in given.headers.items() if _HEADERS.fullmatch(name)
            },
            "body": without_secrets(given.text())[:_MOST] if text else None,
        }
        with self._lock:
            if not self._file.closed:
                self._file.write(json.dumps(reported) + "\n")
                self._file.flush()

    def close(self) -> None:
        """Later answers are not recorded."""
        with self._lock:
            self._file.close()


def without_secrets(text: str) -> str:
    """Removes the values of queries except those that name the operation, and keys to content."""
    return _URL.sub(lambda found: _bare(found[0]), _SECRET.sub(r'\1"..."', text))


def _bare(url: str) -> str:
    parts = urlsplit(url.replace("&amp;", "&"))
    query = [(name, value if name.lower() in _PLAIN else "...") for name, value in parse_qsl(parts.query, True)]
    return parts._replace(query=urlencode(query, safe=".")).geturl()
