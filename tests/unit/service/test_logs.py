"""The log of a service says what was done to which machine, by whom, how long it took, and why it failed."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import asrcore.testing.memory
from asrcore.engine import Engine
from asrcore.errors import AsrError
from asrcore.logline import report
from asrcore.model.policy import ALWAYS, Policy
from asrcore.model.watch import Watch
from asrcore.plugins import Plugins
from asrcore.service import logs
from asrcore.service.scheduler import Scheduler
from asrcore.testing.memory import MemoryWorld
from asrcore.units import MiB


class Log:
    """What a service writes, set up as `asr run` does."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self._root = logging.getLogger()
        self._before = (self._root.level, self._root.handlers[:])
        self.written = io.StringIO()

    def set_up(self, form: str, *, verbose: bool) -> None:
        self._root.handlers[:] = []
        self._patch.setattr("sys.stderr", self.written)
        logs.set_up(form, verbose=verbose)

    def close(self) -> None:
        level, self._root.handlers[:] = self._before
        self._root.setLevel(level)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.written.getvalue().splitlines()]

    def of(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["message"] == message]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    made = Log(monkeypatch)
    levels = {name: logging.getLogger(name).level for name in logs._QUIET}
    yield made
    made.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A machine `web` that can be protected from `a` to `b`."""
    plugins = Plugins()
    plugins.register("memory", asrcore.testing.memory)
    home, _ = MemoryWorld("home"), MemoryWorld("away")
    home.add_machine("web", {"vda": MiB}).start()
    with Engine.create(str(tmp_path / "vault.db"), plugins) as made:
        for name, world in (("a", "home"), ("b", "away")):
            made.add_site(name, "memory", {"world": world})
        made.vault.add_policy(Policy("gold", interval=5, point_interval=5, resync_window=ALWAYS))
        made.start()
        yield made


def test_jobs_and_states_are_logged(engine: Engine, log: Log) -> None:
    log.set_up("json", verbose=False)
    engine.wait(engine.protect("web", source="a", target="b", policy="gold"))
    tested = engine.wait(engine.failover_test("web"))
    failed_over = engine.wait(engine.failover_unplanned("web"))
    engine.close()
    for job in (tested, failed_over):
        (start,) = [line for line in log.of("job started") if line["job"] == job.id]
        (end,) = [line for line in log.of("job ended") if line["job"] == job.id]
        assert start["machine"] == end["machine"] == "web"
        assert start["kind"] == end["kind"] == job.kind
        assert "@" in start["who"]
        assert start["level"] == end["level"] == "info"
        assert (end["state"], end["seconds"] >= 0) == ("done", True)
        assert "error" not in end
    states = [(line["before"], line["state"]) for line in log.of("state changed")]
    assert states == [
        ("enabling", "initial-copy"),
        ("initial-copy", "finalizing"),
        ("finalizing", "protected"),
        ("protected", "failing-over"),
        ("failing-over", "failed-over"),
    ]
    assert {line["machine"] for line in log.of("state changed")} == {"web"}
    assert log.of("cycle ended") == [], "those are details"


def test_a_failed_job_names_its_error(engine: Engine, log: Log) -> None:
    engine.wait(engine.protect("web", source="a", target="b", policy="gold"))
    log.set_up("json", verbose=False)
    found = MemoryWorld.find("home")
    assert found is not None
    found.cut()
    with pytest.raises(AsrError):
        engine.wait(engine.replicate("web"))
    engine.close()
    (end,) = log.of("job ended")
    assert (end["state"], end["error"], end["step"]) == ("failed", "site-unreachable", "cycle")
    assert "'a'" in end["happened"]


def test_verbose_logs_each_cycle(engine: Engine, log: Log) -> None:
    log.set_up("json", verbose=True)
    job = engine.wait(engine.protect("web", source="a", target="b", policy="gold"))
    engine.close()
    (line,) = log.of("cycle ended")
    result = json.loads(job.result or "")
    assert (line["level"], line["machine"], line["mode"]) == ("debug", "web", "full")
    assert (line["point"], line["sent_bytes"], line["read_bytes"]) == (
        result["point"],
        result["bytes_sent"],
        result["bytes_read"],
    )
    assert line["seconds"] >= 0


def test_a_failed_cycle_of_the_service_names_the_machine(engine: Engine, log: Log) -> None:
    engine.wait(engine.protect("web", source="a", target="b", policy="gold"))
    protection = engine.vault.protection("web")
    service = Scheduler(engine.context, lambda *_: None)
    service._look()
    engine.vault.update(protection.id, retry_at=0.0)
    found = MemoryWorld.find("home")
    assert found is not None
    found.cut()
    log.set_up("json", verbose=False)
    service._cycle(protection.id, Watch())
    (line,) = log.of("cycle failed")
    assert (line["machine"], line["error"], line["failures"]) == ("web", "site-unreachable", 1)
    assert line["level"] == "warning"
    assert protection.id not in json.dumps(line)


def test_libraries_do_not_bury_it(log: Log) -> None:
    log.set_up("json", verbose=True)
    asyncio.run(asyncio.sleep(0))
    asyncio.new_event_loop().close()
    logging.getLogger("asyncio").info("x")
    logging.getLogger("some.library").debug("x")
    logging.getLogger("asr_driver_other").debug("details of a driver")
    assert [line["message"] for line in log.lines()] == ["details of a driver"]


def test_a_line_for_people_has_the_same_facts(log: Log) -> None:
    log.set_up("text", verbose=False)
    facts = {"machine": "web 1", "seconds": 1.5, "error": None, "state": "done", "sent_bytes": 0, "who": ""}
    report(logging.getLogger("asrcore.x"), logging.INFO, "job ended", **facts)
    assert log.written.getvalue().endswith(
        'INFO asrcore.x: job ended machine="web 1" seconds=1.500 state=done sent_bytes=0\n'
    )


def test_no_fact_takes_the_place_of_what_each_line_has(log: Log) -> None:
    log.set_up("json", verbose=False)
    report(logging.getLogger("asrcore.x"), logging.INFO, "it ended", time="then", level="high", machine="web")
    (line,) = log.lines()
    assert (line["message"], line["level"], line["machine"]) == ("it ended", "info", "web")
    assert line["time"] != "then"
