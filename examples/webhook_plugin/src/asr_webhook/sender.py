"""Posts JSON from a thread of its own, so that the thread that has an event never waits for the network."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import logging
import queue
import socket
import threading
import time
from urllib.parse import urlsplit

__all__ = ["Sender"]

_log = logging.getLogger(__name__)


class Sender:
    """`post` returns at once. Events are sent in their order, each is tried once, and `timeout` limits each try.

    At most `most` events wait; further ones are dropped. What is dropped or not delivered is logged. Before the
    process ends it waits for up to `timeout` seconds, so that a command such as `asr failover` posts its last event.
    """

    def __init__(self, url: str, *, timeout: float = 5.0, most: int = 1000) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a URL of http or https")
        self._place, self._host, self._port = f"{parts.scheme}://{parts.netloc}", parts.hostname, parts.port
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._timeout = timeout
        self._waiting: queue.Queue[bytes] = queue.Queue(most)
        threading.Thread(target=self._run, name="webhook", daemon=True).start()
        atexit.register(self.drain, timeout)

    def post(self, event: object) -> None:
        """Hand an event over."""
        try:
            self._waiting.put_nowait(json.dumps(event).encode())
        except queue.Full:
            _log.warning("%s: an event was dropped: %d are waiting", self._place, self._waiting.maxsize)

    def drain(self, seconds: float) -> bool:
        """Wait until all events are sent or have failed, for at most `seconds`. Whether they are."""
        end = time.monotonic() + seconds
        with self._waiting.all_tasks_done:
            while self._waiting.unfinished_tasks and (left := end - time.monotonic()) > 0:
                self._waiting.all_tasks_done.wait(left)
            return not self._waiting.unfinished_tasks

    def _run(self) -> None:
        while True:
            body = self._waiting.get()
            try:
                self._send(body)
            except Exception as problem:  # noqa: BLE001 - whatever it is, the next event is sent
                _log.warning("%s: an event was not delivered: %s", self._place, problem)
            finally:
                self._waiting.task_done()

    def _send(self, body: bytes) -> None:
        connection = self._kind(self._host, self._port, timeout=self._timeout)
        connection.connect()
        # The timeout of a socket is one of each read: a server that sends a byte now and then would never exceed it.
        watchdog = threading.Timer(self._timeout, _hang_up, [connection.sock])
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.request("POST", self._path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if not 200 <= answer.status < 300:
                raise OSError(f"the server answered {answer.status} {answer.reason}")
        finally:
            watchdog.cancel()
            connection.close()


def _hang_up(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended in this moment
        connected.shutdown(socket.SHUT_RDWR)
