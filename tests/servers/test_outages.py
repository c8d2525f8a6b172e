"""The database restarts, is cut off, or is failed over to a copy that misses the last ten seconds, under two process
servers and many machines with failovers under way.

No job hangs, no machine stops getting cycles, each replica equals its source, and no machine runs twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from asrcore.model.machine import PowerState
from asrcore.model.state import State
from tests.postgres import cluster
from tests.servers._cluster import INTERVAL, LEASE, Cluster
from tests.servers._failovers import Failovers, Watcher
from tests.servers._proxy import Proxy
from tests.servers.test_servers import all_have_points_since, check_one_at_a_time

PATIENCE = 240.0
RECOVERS = 90.0
"""Seconds after an outage in which each machine has a newer point; the interval is 20."""
FEW, MANY = 20, 200


class Bar:
    """Two process servers behind a proxy each, which are started again when they end, as systemd does."""

    def __init__(self, folder: Path, machines: int) -> None:
        self._made = cluster(tcp=True)
        self.server = self._made.__enter__()
        url = self.server.create()
        self.field = Cluster(url, folder, machines, interval=5.0 if machines == FEW else INTERVAL)
        self.proxies = {name: Proxy(self.server.port) for name in ("one", "two")}
        database = self.server.name(url)
        self.urls = {
            name: f"postgresql://postgres@127.0.0.1:{proxy.port}/{database}" for name, proxy in self.proxies.items()
        }
        self.failovers = Failovers(self.field)
        self.watcher = Watcher(self.field)

    def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()
        self.field.close()
        self._made.__exit__(None, None, None)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Both servers work, and share the machines."""
        with self.field.supervised("one", self.urls["one"]), self.field.supervised("two", self.urls["two"]):
            share = len(self.field.machines) * 2 // 5
            self.field.wait(lambda: all(len(self.field.held_by(name)) >= share for name in self.proxies), PATIENCE)
            yield

    def ends_well(self) -> None:
        """Everything that was asked for is done, and replication continues."""
        field, since = self.field, time.time()
        assert not self.failovers.failed()
        assert not self.watcher.both
        assert self.watcher.looks > 5
        field.wait(lambda: {item.state for item in field.vault.protections()} == {State.PROTECTED}, PATIENCE)
        field.wait(lambda: all_have_points_since(field, since, set(field.newest())), PATIENCE)

    def recovers(self, since: float) -> None:
        """Machines that no failover takes have newer points soon after the outage, as the others have at its end."""
        field, names = self.field, self.failovers.undisturbed
        alone = {item.id for item in field.vault.protections() if item.name in names}
        field.wait(lambda: all_have_points_since(field, since, alone), RECOVERS)
        print(f"all machines without a failover had a newer point {time.time() - since:.1f} s after the outage")

    def way_out(self) -> None:
        """What health says of each machine is done, until none is left that needs a person."""
        ends = time.monotonic() + PATIENCE
        while needy := self.failovers.ask_health():
            assert time.monotonic() < ends, "\n".join(f"{name}: {codes}" for name, codes in needy.items())
            time.sleep(1)

    def equal(self) -> None:
        """When the servers have ended."""
        check_one_at_a_time(self.field)
        for protection in self.field.vault.protections():
            assert self.field.machines[protection.name].value.power is PowerState.RUNNING, protection.name
            assert not protection.undo_due, protection.name
            self.field.check_equal(protection)


def restart(mode: str) -> Callable[[Bar], None]:
    def happens(bar: Bar) -> None:
        bar.server.stop(mode)
        time.sleep(3)
        bar.server.start()

    return happens


def cut_one(bar: Bar) -> None:
    """One server is cut off for longer than its lease; the other one takes over."""
    bar.proxies["two"].cut()
    bar.field.wait(lambda: not bar.field.held_by("two"), 6 * LEASE)
    bar.proxies["two"].heal()


def cut_both(bar: Bar) -> None:
    for proxy in bar.proxies.values():
        proxy.cut()
    time.sleep(2 * LEASE)
    for proxy in bar.proxies.values():
        proxy.heal()


def behind(bar: Bar) -> None:
    """The database is failed over to a copy that misses the last ten seconds."""
    copy = bar.server.copy()
    time.sleep(10)
    bar.server.fail_over(copy)


HAPPENS: dict[str, Callable[[Bar], None]] = {
    "fast": restart("fast"),
    "immediate": restart("immediate"),
    "one-is-cut-off": cut_one,
    "both-are-cut-off": cut_both,
}


@pytest.fixture
def made(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bar]:
    bar = Bar(tmp_path, request.param)
    yield bar
    bar.close()


def outage(bar: Bar, happens: Callable[[Bar], None]) -> None:
    began = time.monotonic()
    with bar.at_work(), bar.watcher.watching():
        with bar.field.written_to(), bar.failovers.under_way(PATIENCE):
            happens(bar)
            since = time.time()
            bar.recovers(since)
        bar.ends_well()
    bar.equal()
    print(f"{len(bar.failovers.ended)} jobs, {len(bar.field.machines)} machines, {time.monotonic() - began:.0f} s")


def crash_and_cut(bar: Bar) -> None:
    HAPPENS["immediate"](bar)
    cut_one(bar)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("made", [FEW], indirect=True)
def test_failovers_through_a_crash_and_a_cut(made: Bar) -> None:
    outage(made, crash_and_cut)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("made", [MANY], indirect=True)
@pytest.mark.parametrize("happens", HAPPENS)
def test_failovers_of_many_machines_through_an_outage(happens: str, made: Bar) -> None:
    outage(made, HAPPENS[happens])


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("made", [MANY], indirect=True)
def test_failovers_of_many_machines_through_a_database_that_is_behind(made: Bar) -> None:
    """Jobs that it does not know any more are lost; what health then names for each machine ends them."""
    with made.at_work(), made.watcher.watching():
        with made.field.written_to():
            with made.failovers.under_way(PATIENCE):
                behind(made)
            made.way_out()
            since = time.time()
            made.field.wait(lambda: all_have_points_since(made.field, since, set(made.field.newest())), PATIENCE)
        made.ends_well()
    made.equal()
