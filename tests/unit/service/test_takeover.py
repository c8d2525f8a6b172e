"""A server is paused in the middle of a cycle, another one takes over its machine, then the first one resumes.

Both are engines of this process on one vault and the same worlds. At a crash point of the first one's cycle the second
one takes over and runs a whole cycle; everything the first one does after that is refused, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

import asrcore.procedures.failover
import asrcore.procedures.give_back
import asrcore.replication.cycle
import asrcore.testing.memory._target
from asrcore import crashpoint
from asrcore.driver import Site
from asrcore.errors import AsrError, NotAssigned, StaleEpoch
from asrcore.model.watch import Watch
from asrcore.procedures.failure import recorded_failure
from asrcore.replication.agreement import ask_target
from asrcore.replication.cycle import CycleResult, run_cycle
from asrcore.service.assign import assign
from asrcore.testing.memory._state import WorldState
from asrcore.vault import _schema
from tests.unit.rig import DirectEngine, Rig
from tests.unit.vault import samples

PLACES = [
    "cycle.view-opened",
    "cycle.begun",
    "target.cycle.opened",
    "cycle.opened",
    "target.flush",
    "target.flushed",
    "cycle.disk-copied",
    "cycle.confirmed",
    "target.seal.begin",
    "target.seal.commit",
    "target.seal.applied",
    "cycle.sealed",
]


class Pair:
    """Two servers, and a machine that is assigned to the first one."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.rig = rig
        rig.protect()
        self.one, self.two = self.server("one"), self.server("two")
        self.one.vault.assign(assign)

    def server(self, name: str) -> DirectEngine:
        engine = DirectEngine.open(self.rig.vault, self.rig.plugins)
        engine.context.clock = engine.context.elapsed = self.rig.clock
        engine.vault.join(name, f"s-{name}", host="here", sites=None, lease=60.0)
        return engine

    def take_over(self) -> None:
        table = _schema.servers
        with self.two.vault._write("test") as connection:
            connection.execute(update(table).where(table.c.name == "one").values(beat_at=0.0))
        assert [change.server for change in self.two.vault.assign(assign)] == ["two"]

    def cycle(self, engine: DirectEngine) -> CycleResult:
        protection = engine.vault.protection("web")
        with recorded_failure(engine.context, protection.id, of_a_job=False):
            return run_cycle(engine.context, protection.id, Watch())

    def at_target(self) -> WorldState:
        with self.rig.away.look() as state:
            return state


@pytest.fixture
def pair(rig: Rig, tmp_path: Path) -> Iterator[Pair]:
    made = Pair(rig, tmp_path)
    yield made
    made.one.close()
    made.two.close()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], None]], list[str]]:
    """Runs a function once when a place is first reached; returns the list that then contains the place."""

    def prepare(place: str, then: Callable[[], None]) -> list[str]:
        reached: list[str] = []
        reach = crashpoint.reach

        def look(name: str) -> None:
            if name == place and not reached:
                reached.append(name)
                then()
            reach(name)

        for module in (asrcore.replication.cycle, asrcore.testing.memory._target):
            monkeypatch.setattr(module, "reach", look)
        return reached

    return prepare


@pytest.mark.parametrize("place", PLACES)
def test_whoever_was_paused_changes_nothing(
    place: str, pair: Pair, at: Callable[[str, Callable[[], None]], list[str]]
) -> None:
    machine = pair.rig.machine
    machine.write("vda", 0, b"before the pause" * 4096)
    seen: dict[str, Any] = {}

    def pause() -> None:
        pair.take_over()
        machine.write("vda", 4096, b"after the take-over" * 4096)
        pair.cycle(pair.two)  # resumes the interrupted one, if there is one
        pair.cycle(pair.two)
        seen["truth"] = pair.rig.truth()
        seen["vault"] = pair.two.vault.protection("web"), pair.two.points("web")
        seen["points"] = [item.point.id for item in pair.at_target().replica(seen["vault"][0].replica_id).points]

    reached = at(place, pause)
    with pytest.raises(AsrError):  # refused by the vault or the replica, or its view is lost: the second one swept it
        pair.cycle(pair.one)
    assert reached == [place]
    protection, points = seen["vault"]
    assert (pair.two.vault.protection("web"), pair.two.points("web")) == seen["vault"], (
        "the first one recorded something"
    )
    assert protection.epoch == 2
    assert [item.point.id for item in pair.at_target().replica(protection.replica_id).points] == seen["points"]
    assert points[-1].id == seen["points"][-1] == protection.head_point
    assert pair.rig.content() == seen["truth"], "the first one wrote to the replica"
    # Nothing left by the first one blocks the second one's next cycles.
    machine.write("vdb", 0, b"later" * 1000)
    result = pair.cycle(pair.two)
    assert not result.resumed
    assert pair.rig.content() == pair.rig.truth()


@pytest.mark.parametrize("place", PLACES[2:])
def test_who_takes_over_goes_on_with_the_interrupted_cycle(
    place: str, pair: Pair, at: Callable[[str, Callable[[], None]], list[str]]
) -> None:
    """The first server dies: its cycle is resumed, or its sealed point recorded, under the new epoch."""
    pair.rig.machine.write("vda", 0, b"x" * 200_000)

    class Died(BaseException):
        pass

    def die() -> None:
        raise Died

    at(place, die)
    with pytest.raises(Died):
        pair.cycle(pair.one)
    pending = pair.two.vault.protection("web").pending
    assert pending is not None
    pair.take_over()
    pair.cycle(pair.two)
    after = pair.two.vault.protection("web")
    assert (after.pending, after.epoch) == (None, 2)
    assert pending.id in [item.id for item in pair.two.vault.cycles(after.id)]
    assert pair.rig.content() == pair.rig.truth()


def test_the_replica_gets_the_epoch_before_it_is_asked_what_it_has(pair: Pair) -> None:
    """Otherwise the former server could still seal between the answer and the next cycle."""
    pair.one.vault.begin_cycle(pair.rig.protection.id, samples.cycle(1, pair.rig.protection.head_point))
    pair.take_over()
    assert ask_target(pair.two.context, pair.rig.protection.id).recorded is None
    assert pair.at_target().replica(pair.rig.protection.replica_id).epoch == 2


def noted(name: str, method: Callable[..., None], sent: list[str]) -> Callable[..., None]:
    def call(*given: object, **named: object) -> None:
        sent.append(name)
        method(*given, **named)

    return call


@pytest.mark.parametrize(
    ("verb", "place", "before"),
    [
        ("planned", "failover.epoch-raised", []),
        ("planned", "failover.source-stopped", ["power_off"]),
        ("planned", "failover.promoted", ["power_off"]),
        ("undo", "undo.released", []),
    ],
    ids=["stop the source", "start it again", "start the target", "start the source after an undo"],
)
def test_whoever_was_paused_switches_nothing_on_or_off(
    verb: str, place: str, before: list[str], pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command to a hypervisor has no epoch. Here connecting takes longer than the lease."""
    if verb == "undo":
        pair.one.failover_planned("web")
    armed: list[str] = []
    sent: list[str] = []
    inventory = type(pair.one.context.site("a").inventory)
    for name in ("power_on", "power_off"):
        monkeypatch.setattr(inventory, name, noted(name, getattr(inventory, name), sent))
    site = pair.one.context.site

    def slowly(name: str) -> Site:
        found = site(name)
        if armed and armed.pop():
            pair.take_over()
        return found

    monkeypatch.setattr(pair.one.context, "site", slowly)

    def look(name: str) -> None:
        if name == place:
            armed.append(name)
        crashpoint.reach(name)

    for module in (asrcore.procedures.failover, asrcore.procedures.give_back):
        monkeypatch.setattr(module, "reach", look)
    with pytest.raises(NotAssigned):
        pair.one.failover_undo("web") if verb == "undo" else pair.one.failover_planned("web")
    assert not armed
    assert sent == before


def test_a_refused_cycle_is_no_failure_of_the_machine(pair: Pair) -> None:
    """Otherwise it would wait for an operator, because retrying a refused epoch cannot succeed."""
    protection = pair.one.vault.protection("web")
    error = StaleEpoch(replica="web", epoch=protection.epoch, owner=protection.epoch + 1)
    pair.one.vault.update(protection.id, epoch=protection.epoch + 1)
    with pytest.raises(AsrError), recorded_failure(pair.one.context, protection.id):
        raise error
    after = pair.one.vault.protection("web")
    assert (after.attempt, after.error) == (0, None)
