"""Engines on a vault that is shared on PostgreSQL: who works on it, and what a verb does there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import pytest

import asrcore.testing.memory
from asrcore.engine import Engine
from asrcore.errors import AsrError, InvalidValue, NotFound, ServerReplaced, VaultInUse
from asrcore.model.policy import Policy
from asrcore.model.server import ENGINE
from asrcore.model.state import State
from asrcore.plugins import Plugins
from asrcore.service.member import ServerIdentity
from asrcore.testing.memory import MemoryWorld
from asrcore.vault import JobState, _schema
from tests.unit.service.test_member import LONG, cut_off, until


@pytest.fixture
def served(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Engine]]:
    """Opens engines on a vault that has a machine to protect, and closes them."""
    monkeypatch.setattr("asrcore.engine.ServerIdentity", partial(ServerIdentity, lease=LONG))
    MemoryWorld("home").add_machine("web", {"vda": 1 << 16}).start()
    MemoryWorld("away")
    plugins = Plugins()
    assert plugins.register("memory", asrcore.testing.memory)
    with Engine.open(url, plugins) as engine:
        engine.add_site("a", "memory", {"world": "home"})
        engine.add_site("b", "memory", {"world": "away"})
        engine.vault.add_policy(Policy("gold", interval=3600.0, point_interval=3600.0))
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Engine.open(url, plugins))


def protect(engine: Engine) -> str:
    return engine.protect("web", source="a", target="b", policy="gold").id


class Running:
    """`asr run` or a process server in a thread; `problem` is what it ended with."""

    def __init__(self, work: Callable[[threading.Event], None]) -> None:
        self.stop = threading.Event()
        self.problem: Exception | None = None
        self.thread = threading.Thread(target=self._run, args=[work], daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[threading.Event], None]) -> None:
        try:
            work(self.stop)
        except AsrError as problem:
            self.problem = problem

    def end(self) -> Exception | None:
        self.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.problem


def test_a_verb_is_no_engine_of_a_vault_on_a_server(served: Callable[[], Engine]) -> None:
    """Otherwise it would end the servers that are just restarting, or keep them out until its job has ended."""
    asking = served()
    job = protect(asking)
    assert asking.vault.engine_holder() is None
    assert asking.vault.job(job).state is JobState.QUEUED
    working = served()
    running = Running(lambda stop: working.serve(ServerIdentity("one", "s1", "here", lease=LONG), stop))
    assert asking.wait(asking.vault.job(job), timeout=30).state is JobState.DONE
    assert running.end() is None


def test_a_verb_leaves_servers_alone_whose_lock_is_lost(served: Callable[[], Engine], url: str) -> None:
    asking, working = served(), served()
    running = Running(lambda stop: working.serve(ServerIdentity("one", "s1", "here", lease=LONG), stop))
    until(lambda: working._jobs is not None)
    cut_off(url)
    job = protect(asking)
    assert asking.wait(asking.vault.job(job), timeout=30).state is JobState.DONE
    assert asking.vault.protection("web").state is State.PROTECTED
    assert running.end() is None


def test_an_engine_survives_the_end_of_all_sessions_and_is_still_the_only_one(
    served: Callable[[], Engine], url: str
) -> None:
    asking, working, second = served(), served(), served()
    running = Running(working.run)
    until(lambda: working._jobs is not None)
    asking.wait(asking.vault.job(protect(asking)), timeout=30)
    cut_off(url)
    with pytest.raises(VaultInUse, match="engine on"):
        second.run(threading.Event())
    job = asking.replicate("web")
    assert asking.wait(job, timeout=30).state is JobState.DONE
    (shown,) = asking.servers()
    assert (shown.role, shown.name, shown.up, shown.machines) == ("engine", "", True, 1)
    assert running.end() is None
    working.close()
    assert asking.servers() == []


def test_an_engine_that_was_replaced_ends_and_records_nothing(served: Callable[[], Engine]) -> None:
    asking, working = served(), served()
    running = Running(working.run)
    until(lambda: bool(asking.vault.servers()))
    asking.wait(asking.vault.job(protect(asking)), timeout=30)
    epoch = asking.vault.protection("web").epoch
    with asking.vault._write("test") as connection:
        connection.execute(_schema.servers.delete())
    running.thread.join(20)
    assert isinstance(running.problem, ServerReplaced)
    working.close()
    second = served()
    second.start()
    assert asking.vault.protection("web").epoch == epoch + 1
    second.wait(second.replicate("web"), timeout=30)


def test_a_server_names_sites_that_exist_and_not_the_engine(served: Callable[[], Engine]) -> None:
    with pytest.raises(NotFound, match="site 'bb' is not in the vault"):
        served().serve(ServerIdentity("one", "s1", "here", ["a", "bb"]), threading.Event())
    with pytest.raises(InvalidValue, match="'engine' is not accepted"):
        served().serve(ServerIdentity(ENGINE, "s1", "here"), threading.Event())
