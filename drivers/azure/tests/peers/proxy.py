"""What Azure storage has and Azurite lacks: limits, busy answers, and true page-range diffs.

It runs between the SDK and Azurite, passes requests on unchanged, and refuses what Azure would refuse. It keeps a
journal of every page written or cleared, from which it answers diffs: Azurite itself returns the list of all pages.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import attrs

from asr_driver_azure.blobs.ranges import RangeSet
from asrcore.model.extent import Extent

MIB = 1 << 20
MOST_PUT = 4 * MIB
MOST_BLOB = 8 << 40
REQUESTS_PER_SECOND = 500
_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection"}


class Refused(Exception):
    """An error answered by the proxy itself."""

    def __init__(self, status: int, code: str, detail: str = "", after: float | None = None) -> None:
        super().__init__(code)
        self.status, self.code, self.detail, self.after = status, code, detail, after


@attrs.frozen
class Event:
    """A change of a blob: pages written or cleared, or a snapshot of that name."""

    start: int
    end: int
    kind: str


class Journal:
    """The events of each blob since it was made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: dict[str, list[Event]] = {}

    def born(self, path: str) -> None:
        """A new blob."""
        with self._lock:
            self._events[path] = []

    def note(self, path: str, event: Event) -> None:
        """Record an event of a blob."""
        with self._lock:
            self._events[path].append(event)

    def diff(self, path: str, since: str, until: str) -> tuple[list[Extent], list[Extent]]:
        """(written, cleared) between two snapshots, `until` empty for now. Raises KeyError for an unknown one."""
        with self._lock:
            events = list(self._events[path])
        names = [event.kind for event in events]
        begin = names.index(f"snapshot {since}") if f"snapshot {since}" in names else -1
        if begin < 0:
            raise KeyError(since)
        end = names.index(f"snapshot {until}") if until else len(events)
        written, cleared = RangeSet(), RangeSet()
        for event in events[begin:end]:
            gain, loss = (written, cleared) if event.kind == "update" else (cleared, written)
            if event.kind in ("update", "clear"):
                gain.add(event.start, event.end)
                loss.remove(event.start, event.end)
        return written.extents(), cleared.extents()


@attrs.define
class Request:
    """One request that was passed on. `comp`: the part of the blob; `action`: update, clear, acquire, ..."""

    method: str
    path: str
    comp: str
    action: str
    length: int
    start: int = -1
    status: int = 0
    at: float = attrs.field(factory=time.monotonic)


class Proxy:
    """`with Proxy(port):` listens on its own `port`. Faults are switched by attributes."""

    def __init__(self, upstream: int, log: Path | None = None) -> None:
        self.cut = False
        """Whether connections are dropped."""
        self.read_only = False
        """Whether the caller may only read."""
        self.busy_for = 0
        """How many of the next requests are answered with "server busy"."""
        self.busy_seconds = 1.0
        """The seconds to wait in these answers."""
        self.corrupt = 0
        """How many of the next puts of pages arrive with a flipped bit."""
        self.no_diff = False
        """Whether a diff is answered as Azurite does: all pages, and nothing cleared."""
        self.hold: Callable[[Request], None] | None = None
        """Called with each request before it is passed on."""
        self.requests: list[Request] = []
        self.journal = Journal()
        self._upstream = upstream
        self._log = log
        self._lock = threading.Lock()
        self._recent: dict[str, deque[float]] = {}
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._connections: set[socket.socket] = set()
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="proxy", daemon=True).start()

    def url(self, account: str) -> str:
        """The account's blob endpoint."""
        return f"http://127.0.0.1:{self.port}/{account}"

    def count(self, action: str) -> int:
        """How many requests of that action succeeded."""
        return sum(item.action == action and item.status < 300 for item in self.requests)

    def sent(self) -> int:
        """Bytes of pages written so far."""
        return sum(item.length for item in self.requests if item.action == "update" and item.status < 300)

    def check(self, request: Request, headers: Any) -> None:
        """Raises Refused for what Azure would refuse."""
        with self._lock:
            self.requests.append(request)
            if self.busy_for > 0:
                self.busy_for -= 1
                raise Refused(503, "ServerBusy", "asked to be", after=self.busy_seconds)
            recent = self._recent.setdefault(request.path, deque())
            now = time.monotonic()
            while recent and recent[0] < now - 1:
                recent.popleft()
            if len(recent) >= REQUESTS_PER_SECOND:
                raise Refused(503, "ServerBusy", "more than 500 requests a second to one blob", after=1)
            recent.append(now)
        if self.read_only and request.method in ("PUT", "DELETE", "POST"):
            raise Refused(403, "AuthorizationPermissionMismatch", "the caller may read only")
        if request.action == "update" and request.length > MOST_PUT:
            raise Refused(413, "RequestBodyTooLarge", f"{request.length} bytes of pages")
        if int(headers.get("x-ms-blob-content-length", 0)) > MOST_BLOB:
            raise Refused(400, "InvalidHeaderValue", "a page blob holds 8 TiB at most")
        if "x-ms-copy-source" in headers:
            # Azurite shares the pages of a copy with its source, so tests on a copy would be wrong.
            raise Refused(501, "NotImplemented", "this server makes no copies")

    def turned(self, request: Request, body: bytes) -> bytes:
        """Damage the body if a fault is set."""
        with self._lock:
            if request.action != "update" or self.corrupt <= 0:
                return body
            self.corrupt -= 1
        return bytes([body[0] ^ 1]) + body[1:]

    def passed(self, request: Request, query: dict[str, list[str]], answer: http.client.HTTPResponse) -> None:
        """Record the request in the journal."""
        if answer.status >= 300 or request.method != "PUT":
            return
        if request.action in ("update", "clear"):
            self.journal.note(request.path, Event(request.start, request.start + request.length, request.action))
        elif request.comp == "snapshot":
            self.journal.note(request.path, Event(0, 0, f"snapshot {answer.headers['x-ms-snapshot']}"))
        elif request.action == "PageBlob":
            self.journal.born(request.path)

    def close(self) -> None:
        """Stop listening; the log is complete."""
        self._server.shutdown()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()  # waits for the threads
        if self._log is not None:
            self._log.write_text("".join(json.dumps(attrs.asdict(item)) + "\n" for item in self.requests))

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Aside:
    """A proxy in a separate process, so that it does not share the Python of the measured code."""

    def __init__(self, upstream: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "drivers.azure.tests.peers.proxy", str(upstream)],
            cwd=Path(__file__).parents[4],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = self._line()

    def url(self, account: str) -> str:
        """The account's blob endpoint."""
        return f"http://127.0.0.1:{self.port}/{account}"

    def sent(self) -> int:
        """Bytes of pages written so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """Stop it."""
        self._process.communicate(timeout=60)

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    def finish_request(self, request: Any, client_address: Any) -> None:
        """Ignore errors of a killed client."""
        with contextlib.suppress(OSError):
            super().finish_request(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    owner: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    _upstream: http.client.HTTPConnection | None = None

    def setup(self) -> None:
        """A connection was opened."""
        super().setup()
        self.owner._connections.add(self.connection)

    def finish(self) -> None:
        """A connection was closed."""
        self.owner._connections.discard(self.connection)
        if self._upstream is not None:
            self._upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        if self.owner.cut:
            self.close_connection = True
            return
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        request = self._request(url.path, query, len(body))
        try:
            self.owner.check(request, self.headers)
            if self.owner.hold is not None:
                self.owner.hold(request)
            since = query.get("prevsnapshot", [""])[0]
            if request.comp == "pagelist" and since and not self.owner.no_diff:
                self._exists(url.path, url.query)
                self._diff(request, since, query.get("snapshot", [""])[0])
                return
            self._pass(request, query, self.owner.turned(request, body))
        except Refused as refusal:
            request.status = refusal.status
            self._refuse(refusal)

    def _request(self, path: str, query: dict[str, list[str]], length: int) -> Request:
        headers, comp = self.headers, query.get("comp", [""])[0]
        action = headers.get("x-ms-page-write") or headers.get("x-ms-lease-action") or headers.get("x-ms-blob-type")
        request = Request(self.command, path, comp, action or "", length)
        span = headers.get("x-ms-range") or headers.get("Range")
        if span and "x-ms-page-write" in headers:
            start, _, end = span.removeprefix("bytes=").partition("-")
            request.start, request.length = int(start), int(end) - int(start) + 1
        return request

    def _exists(self, path: str, query: str) -> None:
        """Azurite decides whether the caller is authorised: it gets the same request."""
        answer, _ = self._ask(b"")
        if answer.status >= 300:
            raise Refused(answer.status, answer.headers.get("x-ms-error-code", "Unknown"), f"{path}?{query}")

    def _diff(self, request: Request, since: str, until: str) -> None:
        try:
            written, cleared = self.owner.journal.diff(request.path, since, until)
        except KeyError as problem:
            raise Refused(400, "PreviousSnapshotNotFound", since) from problem
        rows = sorted([(item.offset, item.end, "PageRange") for item in written]
                      + [(item.offset, item.end, "ClearRange") for item in cleared])  # fmt: skip
        ranges = "".join(f"<{kind}><Start>{a}</Start><End>{b - 1}</End></{kind}>" for a, b, kind in rows)
        request.status = 200
        self._answer(200, {"Content-Type": "application/xml"},
                     f'<?xml version="1.0" encoding="utf-8"?><PageList>{ranges}</PageList>'.encode())  # fmt: skip

    def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        for attempt in (1, 2):
            if self._upstream is None:
                self._upstream = http.client.HTTPConnection("127.0.0.1", self.owner._upstream, timeout=120)
            try:
                self._upstream.request(self.command, self.path, body or None, headers)
                answer = self._upstream.getresponse()
                return answer, answer.read()
            except (http.client.HTTPException, ConnectionError):
                self._upstream.close()  # Azurite closes idle connections
                self._upstream = None
                if attempt == 2:
                    raise
        raise AssertionError

    def _pass(self, request: Request, query: dict[str, list[str]], body: bytes) -> None:
        answer, content = self._ask(body)
        request.status = answer.status
        self.owner.passed(request, query, answer)
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        self._answer(answer.status, headers, content)

    def _refuse(self, refusal: Refused) -> None:
        text = (
            f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{refusal.code}</Code>'
            f"<Message>{refusal.detail or refusal.code}</Message></Error>"
        )
        headers = {"x-ms-error-code": refusal.code, "Content-Type": "application/xml"}
        if refusal.after is not None:
            headers["Retry-After"] = f"{refusal.after:g}"
        self._answer(refusal.status, headers, b"" if self.command == "HEAD" else text.encode())

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve  # noqa: N815 - the base class wants these names

    def log_message(self, *_: object) -> None:
        """Print nothing: the proxy keeps its own log."""


def main() -> None:
    """Serve until the input ends; each line of it is answered with the bytes sent so far."""
    with Proxy(int(sys.argv[1])) as proxy:
        print(proxy.port, flush=True)
        for _ in sys.stdin:
            print(proxy.sent(), flush=True)


if __name__ == "__main__":
    main()
