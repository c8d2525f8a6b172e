"""Against a real HTTP server on loopback, with real failovers of the memory driver."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from asr_webhook.plugin import Webhook
from asr_webhook.sender import Sender

import asrcore
from asrcore.errors import AsrError
from asrcore.model.finding import Finding, Severity
from asrcore.model.health import Health
from asrcore.model.protection import Protection
from asrcore.testing import memory
from asrcore.units import MiB

MACHINE = Protection("p1", "web1", "gold", "alpha", "alpha", "m1", "beta", "r1")


class Server(ThreadingHTTPServer):
    """Keeps what is posted. `status` is the answer; `drip`: seconds between the bytes of one that never ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: list[dict[str, Any]] = []
        self.status, self.drip = 200, 0.0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook?token=x"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append({"path": self.path, **json.loads(body)})
        while self.server.drip:
            time.sleep(self.server.drip)
            self.wfile.write(b"H")
        self.send_response(self.server.status)
        self.send_header("Location", self.server.url)
        self.end_headers()

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # of a client that has waited long enough
            super().handle()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.drip = 0.0
        server.shutdown()
        thread.join()


def drain(webhook: Webhook) -> None:
    assert webhook.sender is not None
    assert webhook.sender.drain(20.0)


def protected(tmp_path: Path, webhook: Webhook) -> asrcore.Engine:
    """An engine with a protected machine and the plug-in."""
    home = memory.MemoryWorld("home")
    memory.MemoryWorld("away")
    home.add_machine("web1", {"vda": MiB})
    plugins = asrcore.load_plugins()
    assert plugins.register("memory", memory)
    assert plugins.register("webhook", webhook)
    engine = asrcore.Engine.create(str(tmp_path / "vault.db"), plugins)
    engine.add_site("alpha", "memory", {"world": "home"})
    engine.add_site("beta", "memory", {"world": "away"})
    engine.vault.add_policy(asrcore.Policy("gold"))
    engine.wait(engine.protect("web1", source="alpha", target="beta", policy="gold"))
    return engine


def test_a_failover_is_posted(tmp_path: Path, server: Server) -> None:
    webhook = Webhook(server.url)
    with protected(tmp_path, webhook) as engine:
        engine.wait(engine.failover_unplanned("web1"))
        point = engine.status()[0].protection.failover_point
    drain(webhook)
    begun, done, job = server.got[-3:]
    assert begun["event"] == "failover-begun"
    assert (begun["machine"], begun["kind"], begun["source"], begun["target"]) == ("web1", "unplanned", "alpha", "beta")
    assert (done["event"], done["kind"], done["point"]) == ("failover-done", "unplanned", point)
    assert (job["event"], job["job"]["work"], job["job"]["outcome"]) == (
        "job-finished",
        "failover-unplanned",
        "succeeded",
    )
    assert {event["path"] for event in server.got} == {"/hook?token=x"}
    assert abs(done["at"] - time.time()) < 60


def test_a_job_that_failed_is_posted_with_its_error(tmp_path: Path, server: Server) -> None:
    webhook = Webhook(server.url)
    with protected(tmp_path, webhook) as engine:
        memory.MemoryWorld.find("home").cut()  # type: ignore[union-attr]
        with pytest.raises(AsrError):
            engine.wait(engine.failover_planned("web1"))
    drain(webhook)
    assert (server.got[-1]["event"], server.got[-1]["job"]["error"]["code"]) == ("job-finished", "site-unreachable")


def test_health_is_posted_with_its_reasons(server: Server) -> None:
    webhook = Webhook(server.url)
    reason = Finding("rpo-exceeded", Severity.ERROR, "late", "slow", "look")
    webhook.asr_health_changed(MACHINE, Health(), Health((reason,)))
    drain(webhook)
    assert server.got[0]["old"] == "ok"
    assert server.got[0]["new"] == "critical"
    assert server.got[0]["reasons"][0]["code"] == "rpo-exceeded"


@pytest.mark.parametrize("status", [302, 404, 500])
def test_a_refusal_is_logged(status: int, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.status = status
    sender = Sender(server.url)
    sender.post({"event": "x"})
    assert sender.drain(20.0)
    assert len(server.got) == 1
    assert f"the server answered {status}" in caplog.text
    assert "token" not in caplog.text


def test_a_server_that_is_down_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Server() as server:
        url = server.url
    webhook = Webhook(url)
    with protected(tmp_path, webhook) as engine:
        engine.wait(engine.failover_test("web1"))
    drain(webhook)
    assert "an event was not delivered" in caplog.text


def test_the_engine_does_not_wait_for_a_slow_server(server: Server) -> None:
    server.drip = 0.2
    webhook = Webhook(server.url, timeout=1.0)
    began = time.monotonic()
    for _ in range(3):
        webhook.asr_health_changed(MACHINE, Health(), Health())
    assert time.monotonic() - began < 0.5
    drain(webhook)
    assert 2.5 < time.monotonic() - began < 10, "each is given up after its second, though bytes came all the time"
    assert len(server.got) == 3


def test_events_beyond_the_limit_are_dropped(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.drip = 0.2
    sender = Sender(server.url, timeout=1.0, most=2)
    for number in range(6):
        sender.post({"event": str(number)})
    assert "an event was dropped" in caplog.text
    server.drip = 0.0
    assert sender.drain(20.0)
    assert 2 <= len(server.got) <= 3


def test_without_a_url_nothing_is_posted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    Webhook("").asr_health_changed(MACHINE, Health(), Health())
    assert caplog.text == ""


@pytest.mark.parametrize("url", ["hooks.example.org", "ftp://example.org/x", "http://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not a URL"):
        Webhook(url)


def test_a_process_that_ends_posts_what_waits(server: Server) -> None:
    code = "from asr_webhook.plugin import plugin; plugin.sender.post({'event': 'last'})"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ASR_WEBHOOK_URL": server.url}
    subprocess.run([sys.executable, "-c", code], env=variables, timeout=60, check=True)
    assert [event["event"] for event in server.got] == ["last"]
