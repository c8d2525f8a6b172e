"""The vault's database fails under a running service: nothing ends, and nothing is the machines' failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

import asrcore.testing.memory
from asrcore.driver import Fence
from asrcore.engine import Engine
from asrcore.errors import AsrError, VaultUnavailable
from asrcore.jobs import Jobs, _durable
from asrcore.model.machine import PowerState
from asrcore.model.policy import Policy
from asrcore.model.state import State
from asrcore.plugins import Plugins
from asrcore.replication.context import Context
from asrcore.service import scheduler
from asrcore.service.member import ServerIdentity
from asrcore.testing.memory import MemoryWorld
from asrcore.testing.memory._inventory import MemoryInventory
from asrcore.units import KiB
from asrcore.vault import JobState, Vault
from tests.postgres import Cluster, cluster
from tests.unit.service.test_scheduler import Service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    made.engine.wait(made.engine.protect("web", source="a", target="b", policy="gold"), timeout=30)
    yield made
    made.close()


def test_a_blip_of_the_vault_is_not_the_machine_s_failure(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, left = Vault.begin_cycle, [True] * 3

    def answer(vault: Vault, *arguments: Any, **named: Any) -> Any:
        if left:
            left.pop()
            raise VaultUnavailable(url=vault.url, detail="the server closed the connection unexpectedly")
        return begin(vault, *arguments, **named)

    monkeypatch.setattr(Vault, "begin_cycle", answer)
    service.replicate_soon()
    before = service.engine.vault.protection("web")
    service.until(lambda: service.engine.vault.protection("web").last_cycle_at != before.last_cycle_at)
    after = service.engine.vault.protection("web")
    assert not left
    assert (after.state, after.attempt, after.retry_at, after.error) == (State.PROTECTED, 0, None, None)


def test_an_error_that_is_no_error_of_the_catalogue_does_not_end_the_service(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, policies = [], Vault.policies

    def answer(vault: Vault) -> Any:
        asked.append(1)
        if len(asked) <= 3:
            raise sqlalchemy.exc.InternalError("SELECT", {}, Exception("of a kind that is not known yet"))
        return policies(vault)

    service.replicate_soon()
    before = service.engine.vault.protection("web").last_cycle_at
    monkeypatch.setattr(Vault, "policies", answer)
    service.until(lambda: service.engine.vault.protection("web").last_cycle_at != before)
    assert service.thread.is_alive()
    assert len(asked) > 3


# -- a database server that is stopped ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


def test_a_failover_continues_when_postgresql_is_back(server: Cluster) -> None:
    """It is stopped when the source has just been switched off; the server's lease ends meanwhile."""
    home, away = MemoryWorld("home"), MemoryWorld("away")
    home.add_machine("web", {"vda": 64 * KiB}).start()
    plugins, stop, problems = Plugins(), threading.Event(), list[Exception]()
    assert plugins.register("memory", asrcore.testing.memory)
    fenced, fence = threading.Event(), MemoryInventory.fence

    def fence_and_wait(inventory: MemoryInventory, machine: str, mark: Fence) -> None:
        fence(inventory, machine, mark)
        if not fenced.is_set():
            server.stop()
            fenced.set()

    with Engine.create(server.create(), plugins) as asking, Engine.open(asking.vault.url, plugins) as working:
        asking.add_site("a", "memory", {"world": "home"})
        asking.add_site("b", "memory", {"world": "away"})
        asking.vault.add_policy(Policy("gold", interval=3600.0, point_interval=3600.0))

        def serve() -> None:
            try:
                working.serve(ServerIdentity("one", "s1", "here", lease=1.0), stop)
            except AsrError as problem:
                problems.append(problem)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            asking.wait(asking.protect("web", source="a", target="b", policy="gold"), timeout=60)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(MemoryInventory, "fence", fence_and_wait)
                job = asking.failover_unplanned("web")
                assert fenced.wait(60)
                assert home.machine("web").value.power is PowerState.OFF
                threading.Event().wait(1.5)  # longer than the lease
                server.start()
                assert asking.wait(job, timeout=60).state is JobState.DONE
            after = asking.vault.protection("web")
            assert (after.state, after.attempt) == (State.FAILED_OVER, 0)
            assert away.machine(str(after.target_machine)).value.power is PowerState.RUNNING
            assert [item.session for item in asking.vault.servers()] == ["s1"]
            assert str(asking.vault.engine_holder())
            assert working._jobs is not None
            assert working._jobs._durable is not None
            assert working._jobs._durable._awaits.waiting
        finally:
            stop.set()
            thread.join(60)
        assert not problems


def test_the_durable_log_is_there_when_the_server_is_back(server: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a long outage DBOS would only look again after up to 90 seconds. It is not asked to: its one attempt to
    connect ends when the server is back, or when the engine ends."""
    monkeypatch.setattr(_durable, "_AWAY", 0.1)
    url = server.create()
    with Vault.create(url) as vault:
        awaits = _durable._Awaits(vault.jobs_unavailable)
        log = _durable._on_a_server(vault.jobs_url, awaits)
    connected, refused = threading.Event(), threading.Event()

    def connect() -> None:
        try:
            with log.connect():
                connected.set()
        except sqlalchemy.exc.OperationalError:
            refused.set()

    def away() -> threading.Thread:
        log.dispose()
        server.stop()
        thread = threading.Thread(target=connect)
        thread.start()
        return thread

    away().join(10)
    assert refused.is_set(), "before the launch it is an error"
    server.start()
    awaits.begin()
    for ends, seen in ((server.start, connected), (awaits.end, refused)):
        seen.clear()
        waiting = away()
        waiting.join(0.5)
        assert waiting.is_alive()
        ends()
        waiting.join(10)
        assert seen.is_set()
    server.start()
    log.dispose()


@pytest.fixture
def jobs(server: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """Of a process server. The server of the database is stopped, and the account has a password."""
    monkeypatch.setattr(_durable, "_AWAY", 0.1)
    url = server.create().replace("postgres@", "postgres:S3cr3t@")
    with Vault.create(url) as vault:
        made = Jobs(Context(vault, Plugins()), {}, "s1")
        try:
            made.start()
            server.stop()
            yield made
        finally:
            server.start()
            made.close()


def log_of(jobs: Jobs) -> _durable.Durable:
    assert jobs._durable is not None
    return jobs._durable


@pytest.mark.parametrize("call", ["begin", "elsewhere", "sort_out"])
def test_the_service_is_not_held_up_by_a_database_that_is_away(call: str, jobs: Jobs) -> None:
    """It is one thread that starts jobs, stops those of machines that moved, and reports why jobs wait."""
    problems: list[BaseException] = []

    def ask() -> None:
        try:
            getattr(log_of(jobs), call)(*([] if call == "sort_out" else ["j1"]))
        except AsrError as problem:
            problems.append(problem)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(10)
    assert [type(problem) for problem in problems] == [VaultUnavailable]
    assert "S3cr3t" not in str(problems[0])


def test_a_wait_for_the_database_is_logged_once(jobs: Jobs, server: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    def connect() -> None:
        with log_of(jobs)._engine.connect():
            pass

    log_of(jobs)._engine.dispose()
    threads = [threading.Thread(target=connect) for _ in range(2)]
    for thread in threads:
        thread.start()
    threads[0].join(0.5)
    server.start()
    for thread in threads:
        thread.join(10)
    said = [entry.getMessage() for entry in caplog.records if entry.name == _durable.__name__]
    server.stop()
    assert len(said) == 2, said
    assert "jobs wait" in said[0]
    assert jobs._vault.url in said[0]
    assert "answers again" in said[1]
    assert "S3cr3t" not in caplog.text


def test_a_database_that_refuses_is_not_waited_for(jobs: Jobs, server: Cluster) -> None:
    """It was deleted meanwhile; the same holds for a wrong password. DBOS tries again, and logs it."""
    refused: list[Exception] = []

    def connect() -> None:
        try:
            log_of(jobs)._engine.connect().close()
        except sqlalchemy.exc.OperationalError as problem:
            refused.append(problem)

    server.start()
    log_of(jobs)._engine.dispose()
    server.drop(jobs._vault.jobs_url.set(query={}).render_as_string())
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(10)
    server.stop()
    assert "does not exist" in str(refused[0])


def test_a_poll_that_was_held_up_does_not_put_off_the_next_ones(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link to the database was cut for half a minute: the service would not have looked again for ten."""
    looks, policies = list[float](), Vault.policies

    def answer(vault: Vault) -> Any:
        looks.append(time.monotonic())
        if len(looks) == 1:
            time.sleep(1.0)
        return policies(vault)

    monkeypatch.setattr(scheduler, "LOOK_PAUSE", 0.5)
    monkeypatch.setattr(Vault, "policies", answer)
    service.until(lambda: len(looks) > 1)
    assert looks[1] - looks[0] < 10.0, "twenty times as long as it took"
