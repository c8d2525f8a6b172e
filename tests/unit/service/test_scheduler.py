"""The replication service on memory sites, with real jobs and real threads."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest

import asrcore.testing.memory
from asrcore.driver import FrozenView, ViewRequest
from asrcore.engine import Engine
from asrcore.model.health import Level, Load
from asrcore.model.machine import PowerState
from asrcore.model.point import Mark
from asrcore.model.policy import ALWAYS, Policy
from asrcore.model.state import State
from asrcore.model.watch import Watch
from asrcore.plugins import Plugins
from asrcore.replication.context import Context
from asrcore.service import scheduler
from asrcore.service.scheduler import _Queue
from asrcore.testing.memory import MemoryWorld
from asrcore.testing.memory._source import MemorySource
from asrcore.units import KiB, MiB
from asrcore.vault import JobState, _schema


class Service:
    """An engine that serves in a thread, and two worlds in which faults are injected."""

    def __init__(self, folder: Path) -> None:
        self.home, self.away = MemoryWorld("home"), MemoryWorld("away")
        self.machine = self.home.add_machine("web", {"vda": 1 * MiB})
        self.machine.start()
        plugins = Plugins()
        plugins.register("memory", asrcore.testing.memory)
        self.engine = Engine.create(str(folder / "vault.db"), plugins)
        self.engine.add_site("a", "memory", {"world": "home"})
        self.engine.add_site("b", "memory", {"world": "away"})
        self.engine.vault.add_policy(Policy("gold", interval=5, point_interval=5, resync_window=ALWAYS))
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.engine.run, args=(self.stop,))
        self.engine.start()
        self.thread.start()

    def close(self) -> None:
        self.stop.set()
        self.thread.join(60)
        self.engine.close()

    def until(self, true: Callable[[], bool], seconds: float = 30) -> None:
        ends = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < ends, self.engine.status()
            time.sleep(0.05)

    def replicate_soon(self) -> None:
        """As if the interval had passed."""
        protection = self.engine.vault.protection("web")
        self.engine.vault.update(protection.id, retry_at=time.time() - 1)

    @property
    def state(self) -> State:
        return self.engine.vault.protection("web").state


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(scheduler, "TICK", 0.05)
    monkeypatch.setattr(scheduler, "FENCE_EVERY", 0.2)
    monkeypatch.setattr(scheduler, "VERIFY_LOOK", 0.2)
    made = Service(tmp_path)
    made.engine.wait(made.engine.protect("web", source="a", target="b", policy="gold"), timeout=60)
    yield made
    made.close()


def test_deltas_follow_by_themselves(service: Service) -> None:
    first = service.engine.vault.protection("web").head_point
    service.replicate_soon()
    service.until(lambda: service.engine.vault.protection("web").head_point != first)
    assert service.state is State.PROTECTED


def test_lost_tracking_is_resynchronised_in_the_window(service: Service) -> None:
    service.machine.lose_tracking()
    service.replicate_soon()
    service.until(lambda: any(job.kind == "resync" for job in service.engine.vault.jobs()))
    service.until(lambda: service.state is State.PROTECTED)


def test_a_cut_link_is_recorded_with_its_next_try_and_heals(service: Service) -> None:
    service.home.cut()
    service.replicate_soon()
    service.until(lambda: service.engine.vault.protection("web").attempt == 1)
    protection = service.engine.vault.protection("web")
    assert protection.error is not None
    assert protection.error["code"] == "site-unreachable"
    assert protection.retry_at is not None
    assert 50 < protection.retry_at - time.time() <= 60  # W6: the first retry comes after a minute
    service.home.restore()
    service.replicate_soon()
    service.until(lambda: service.engine.vault.protection("web").attempt == 0)
    assert service.engine.vault.protection("web").error is None


def test_what_a_killed_engine_left_at_a_source_is_released_though_the_machine_is_not_due(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.stop.set()
    service.thread.join(60)
    protection = service.engine.vault.protection("web")
    service.engine.vault.update(protection.id, attempt=6, retry_at=time.time() + 1700)
    monkeypatch.setattr(scheduler, "LEFT_EVERY", 0.2)
    released: list[list[Mark]] = []
    keep_marks = MemorySource.keep_marks

    def recorded(source: MemorySource, machine_id: str, keep: Sequence[Mark]) -> None:
        keep_marks(source, machine_id, keep)
        released.append(list(keep))

    monkeypatch.setattr(MemorySource, "keep_marks", recorded)
    service.home.cut()
    service.stop = threading.Event()
    service.thread = threading.Thread(target=service.engine.run, args=(service.stop,))
    service.thread.start()
    time.sleep(1)
    assert not released
    service.home.restore()
    service.until(lambda: len(released) == 1)
    assert released == [[protection.mark]]
    time.sleep(0.6)
    assert len(released) == 1, "once"


def test_a_source_that_its_platform_paused_is_critical_until_it_runs_again(service: Service) -> None:
    service.machine.halt("a disk has no space")
    first = service.engine.vault.protection("web").head_point
    service.replicate_soon()
    service.until(lambda: service.engine.vault.protection("web").attempt == 1)
    protection = service.engine.vault.protection("web")
    assert protection.head_point != first, "it is replicated all the same"
    assert protection.error is not None
    assert protection.error["code"] == "source-paused"
    assert "a disk has no space" in str(protection.error["happened"])
    health = service.engine.status()[0].health
    assert health.level is Level.CRITICAL
    assert "source-paused" in {finding.code for finding in health.reasons}
    service.replicate_soon()
    service.until(lambda: service.engine.vault.protection("web").attempt == 1 and paused_events(service) == 1)
    service.machine.start()
    service.replicate_soon()
    service.until(lambda: service.engine.vault.protection("web").error is None)
    service.until(lambda: paused_events(service) == 2)
    last = service.engine.vault.events(machine="web", kinds=["source-paused"])[-1]
    assert last.text == "web runs again at a"
    assert service.engine.status()[0].health.level is Level.OK


def paused_events(service: Service) -> int:
    return len(service.engine.vault.events(machine="web", kinds=["source-paused"]))


def test_a_source_that_returns_is_put_down_and_kept_down(service: Service) -> None:
    service.home.cut()
    service.engine.wait(service.engine.failover_unplanned("web"), timeout=60)
    assert service.engine.vault.protection("web").fence_due
    service.home.restore()
    service.until(lambda: service.machine.value.power is PowerState.OFF)
    service.until(lambda: not service.engine.vault.protection("web").fence_due)
    service.machine.start()  # started by hand at the host
    service.until(lambda: service.machine.value.power is PowerState.OFF)


@pytest.mark.parametrize("step", [-86400.0, 86400.0])
def test_replication_and_fences_do_not_wait_for_a_clock_that_was_set(service: Service, step: float) -> None:
    context, offset = service.engine.context, max(0.0, -step)
    context.elapsed, context.clock = time.monotonic, lambda: time.time() + offset
    service.engine.wait(service.engine.replicate("web"), timeout=60)
    head = service.engine.vault.protection("web").head_point
    offset += step
    # A clock that went back: without waiting for the interval. One that went forward: the interval is over.
    service.until(lambda: service.engine.vault.protection("web").head_point != head, seconds=4)

    service.home.cut()
    service.engine.wait(service.engine.failover_unplanned("web"), timeout=60)
    service.home.restore()
    service.until(lambda: service.machine.value.power is PowerState.OFF)
    service.until(lambda: not service.engine.vault.protection("web").fence_due)
    offset -= step
    service.machine.start()
    service.until(lambda: service.machine.value.power is PowerState.OFF, seconds=4)


def test_a_failing_initial_copy_is_not_tried_in_a_tight_loop(service: Service) -> None:
    other = service.home.add_machine("db", {"vda": 1 * MiB})
    other.start()
    other.write("vda", 0, b"x" * 500_000)
    service.away.fill(room=1000)
    job = service.engine.protect("db", source="a", target="b", policy="gold")
    service.until(lambda: service.engine.vault.protection("db").attempt == 1)
    time.sleep(1)
    assert len([item for item in service.engine.vault.jobs() if item.machine == "db"]) == 1
    assert service.engine.vault.job(job.id).error is not None
    service.away.make_room()
    service.engine.wait(service.engine.replicate("db"), timeout=60)
    assert service.engine.vault.protection("db").state is State.PROTECTED


def test_the_queue_gives_what_waited_longest_of_the_sites_with_room() -> None:
    queue = _Queue()
    queue.fill({"a": [(3.0, "late"), (1.0, "first"), (9.0, "not-yet")], "b": [(2.0, "second")]})
    assert queue.pop(5.0, lambda site: site != "a") == ("b", "second")
    assert queue.pop(5.0, lambda site: True) == ("a", "first")
    assert queue.pop(5.0, lambda site: False) is None
    assert queue.pop(5.0, lambda site: True) == ("a", "late")
    assert queue.pop(5.0, lambda site: True) is None
    queue.fill({"a": [(4.0, "other")]})
    assert queue.pop(9.0, lambda site: True) == ("a", "other")
    assert queue.pop(9.0, lambda site: True) is None


def test_a_cycle_that_ends_starts_the_next_one(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    vault, names = service.engine.vault, [f"vm{number}" for number in range(20)]
    for name in names:
        service.home.add_machine(name, {"vda": 64 * KiB}).start()
    for job in [service.engine.protect(name, source="a", target="b", policy="gold") for name in names]:
        service.engine.wait(job, timeout=60)
    vault.update_policy(Policy("gold", interval=3600, point_interval=3600, resync_window=ALWAYS))
    looks: list[int] = []
    look = scheduler.Scheduler._look

    def counted(self: scheduler.Scheduler) -> None:
        looks.append(sum(vault.protection(name).retry_at is not None for name in names))
        look(self)

    monkeypatch.setattr(scheduler.Scheduler, "_look", counted)
    monkeypatch.setattr(scheduler, "TICK", 1.0)
    with vault._write("test") as connection:  # all at the same instant
        connection.execute(_schema.protections.update().values(retry_at=time.time() - 1))
    service.until(lambda: all(vault.protection(name).retry_at is None for name in names))
    assert sum(waiting > 0 for waiting in looks) <= 2, (
        "eight at a time, and three rounds, if each had waited for the next round"
    )


def test_a_machine_that_hangs_holds_up_no_other(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    open_view = MemorySource.open_view

    def hang(self: MemorySource, requests: Sequence[ViewRequest], **asked: Any) -> FrozenView:
        if requests[0].machine_id == "stuck":
            free.wait(60)
        return open_view(self, requests, **asked)

    service.home.add_machine("stuck", {"vda": 64 * KiB}).start()
    service.engine.wait(service.engine.protect("stuck", source="a", target="b", policy="gold"), timeout=60)
    monkeypatch.setattr(MemorySource, "open_view", hang)
    try:
        stuck = service.engine.vault.protection("stuck")
        service.engine.vault.update(stuck.id, retry_at=time.time() - 1)
        for _ in range(3):
            head = service.engine.vault.protection("web").head_point
            service.replicate_soon()
            service.until(lambda head=head: service.engine.vault.protection("web").head_point != head)  # type: ignore[misc]
        assert service.engine.vault.protection("stuck").head_point == stuck.head_point
    finally:
        free.set()


def test_a_replica_is_verified_and_repaired_automatically(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "VERIFY_LOOK", 0.05)
    vault = service.engine.vault
    protection = vault.protection("web")
    with service.away.change() as state:
        state.replicas[protection.replica_id].head["vda"].write(300 * KiB, b"a bad sector")
    assert service.engine.status()[0].verified_at is None
    policy = vault.policy("gold")
    vault.update_policy(attrs.evolve(policy, verify_every=3600.0))
    service.engine.context.clock = lambda: time.time() + 3700
    service.until(lambda: any(job.kind == "verify" and job.state.ended for job in vault.jobs()))
    job = next(job for job in vault.jobs() if job.kind == "verify")
    assert (job.state, json.loads(job.result or "{}")["different_bytes"]) == (JobState.DONE, 64 * KiB)
    replica = service.engine.context.site("b").target.replica(protection.replica_id)
    with replica.reader("vda") as reader:
        content = bytearray(1 * MiB)
        reader.read_into(0, memoryview(content))
    assert content == service.machine.read("vda")
    assert service.engine.status()[0].verified_at == job.ended_at
    service.replicate_soon()
    assert [job.kind for job in vault.jobs()].count("verify") == 1  # the next one is due in an hour


def test_damage_of_a_kept_point_is_found_in_the_background(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "VERIFY_LOOK", 0.05)
    vault = service.engine.vault
    protection = vault.protection("web")
    bad = next(point.id for point in reversed(vault.points(protection.id)) if point.kept)
    service.away.damage_point(protection.replica_id, bad, "vda", 300 * KiB)
    vault.update_policy(attrs.evolve(vault.policy("gold"), verify_every=0.0, scrub_every=3600.0))
    service.engine.context.clock = lambda: time.time() + 3700
    service.until(lambda: vault.protection("web").last_scrub_at is not None)
    assert [point.id for point in vault.points(protection.id) if point.damaged] == [bad]


def test_a_scrub_that_could_not_end_lets_others_go_first(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = service.engine.vault
    web = attrs.evolve(vault.protection("web"), last_scrub_at=1.0)
    other = attrs.evolve(web, id="other", name="other", last_scrub_at=2.0)
    at = 1000.0
    own = scheduler.Scheduler(Context(vault, service.engine.plugins, elapsed=lambda: at), lambda *_: None)
    own._policies = {"gold": vault.policy("gold")}
    started: list[str] = []
    monkeypatch.setattr(own._scrubs, "start", lambda protection_id, *_: started.append(protection_id))
    monkeypatch.setattr(scheduler, "scrub", lambda *_: False)
    own._start_scrub([web, other], at, time.time())
    own._scrub(web, Watch())
    own._start_scrub([web, other], at, time.time())
    own._start_scrub([web, other], at + scheduler.SCRUB_AGAIN, time.time())
    assert started == [web.id, "other", web.id]


def test_saturation_is_reported_once_and_so_is_its_end(service: Service) -> None:
    at = 1000.0
    context = Context(service.engine.vault, service.engine.plugins, elapsed=lambda: at)
    reported = scheduler.Scheduler(context, lambda kind, protection, arguments: None)

    def tell(load: Load, now: float) -> None:
        nonlocal at
        at = now
        reported._tell_load(load, time.time())

    def events() -> list[str]:
        return [entry.text.partition(":")[0] for entry in service.engine.vault.events(kinds=["service"])]

    too_many, some, few = (Load(late, 500, at_a_time=16) for late in (17, 9, 8))
    for now in (0.0, 10.0, 29.0):
        tell(too_many, 1000.0 + now)
    tell(few, 1029.5)
    for now in (30.0, 59.0):
        tell(too_many, 1000.0 + now)
    assert events() == []
    for now in (61.0, 70.0):
        tell(too_many, 1000.0 + now)
    assert events() == ["the service cannot keep up"]
    tell(some, 1080.0)
    tell(few, 1090.0)
    tell(few, 1200.0)
    assert events() == ["the service cannot keep up", "the service keeps up again"]


def test_an_undo_that_the_target_owes_is_completed_when_it_is_back(service: Service) -> None:
    """The source is given back at once; nobody has to run a command again."""
    service.engine.wait(service.engine.failover_unplanned("web"), timeout=60)
    service.away.cut()
    service.engine.wait(service.engine.failover_undo("web"), timeout=60)
    assert service.machine.value.power is PowerState.RUNNING
    assert service.engine.vault.protection("web").undo_due
    service.away.restore()
    service.until(lambda: not service.engine.vault.protection("web").undo_due)
    assert service.engine.machines("b") == []


def test_a_stuck_machine_is_reported_by_the_second_look_only(service: Service) -> None:
    """A job that ends between reading machines and jobs must not raise an alarm."""
    own = scheduler.Scheduler(service.engine.context, lambda kind, protection, arguments: None)
    own._policies = {policy.name: policy for policy in service.engine.vault.policies()}
    stuck = attrs.evolve(service.engine.vault.protection("web"), state=State.FAILING_OVER)
    load, now = Load(0, 1, 1), service.engine.context.clock()
    levels = []
    for active in (set[str](), {"web"}, set[str](), set[str]()):
        own._tell_health([stuck], active, load, now)
        levels.append(own._health[stuck.id].level)
    assert levels == [Level.OK, Level.OK, Level.OK, Level.CRITICAL]


def test_a_fence_that_lands_after_the_undo_is_withdrawn(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call was sent while the fence was due, and the site does it when the machine runs there again."""
    inventory = type(service.engine.context.site("a").inventory)
    fence, sent, arrives = inventory.fence, threading.Event(), threading.Event()

    def late(*given: Any) -> None:
        sent.set()
        assert arrives.wait(30)
        fence(*given)

    service.home.cut()
    service.engine.wait(service.engine.failover_unplanned("web"), timeout=60)
    monkeypatch.setattr(inventory, "fence", late)
    service.home.restore()
    assert sent.wait(30)
    service.engine.wait(service.engine.failover_undo("web"), timeout=60)
    assert service.machine.value.power is PowerState.RUNNING
    stopped = threading.Event()
    unfence = inventory.unfence

    def seen(*given: Any) -> None:
        if service.machine.value.power is PowerState.OFF:
            stopped.set()
        unfence(*given)

    monkeypatch.setattr(inventory, "unfence", seen)
    arrives.set()
    assert stopped.wait(30)
    service.until(lambda: service.machine.value.power is PowerState.RUNNING)
    with service.home.look() as state:
        assert state.machines["web"].fence is None
    service.engine.wait(service.engine.replicate("web"), timeout=60)
