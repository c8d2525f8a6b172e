"""The story that `asr demo` runs: a machine is protected, its site is lost, it runs at the other site and returns.

Only the two sites are in memory (`asrcore.testing.memory`). The engine, its vault, the jobs and the replication service
are those of an installation. A step that has ended says what happened and what was checked; it raises DemoFailed if the
check does not hold. All figures were measured in this run.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from asrcore.engine import Engine
from asrcore.errors import DemoFailed
from asrcore.model.machine import PowerState
from asrcore.model.policy import Policy
from asrcore.model.protection import Direction, Protection
from asrcore.model.state import State
from asrcore.plugins import Plugins
from asrcore.testing import memory
from asrcore.testing.memory import MemoryMachine, MemoryWorld
from asrcore.units import KiB, MiB, format_size
from asrcore.vault import Job

__all__ = ["Step", "run"]

MACHINE = "web1"
DISK = "vda"
DISK_SIZE = 32 * MiB
SYSTEM = 12 * MiB
"""What the disk holds at the beginning: everything that never changes."""

POINTS = 5
ORDERS_AFTER_LAST_POINT = 100
PATIENCE = 20.0
"""Seconds until something that takes milliseconds counts as failed; a busy host may be slow."""
QUARANTINE_PATIENCE = PATIENCE
"""The same, for the quarantine of the machine that returns."""


@attrs.frozen
class Step:
    """One entry of the timeline. `at`: seconds since the start, when it ended. `command`: what an operator types for
    it, "" if it happens to a site. `checked`: what was proved, "" if nothing was claimed."""

    at: float
    step: str
    command: str
    text: str
    checked: str
    figures: dict[str, Any]


def run(on_step: Callable[[Step], object]) -> list[Step]:
    """Run the story in a temporary directory, which is removed; `on_step` gets each step as it ends.

    Raises DemoFailed, and what the engine raises.
    """
    with tempfile.TemporaryDirectory(prefix="asr-demo-") as folder, _engine(Path(folder)) as engine:
        story = Story(engine, on_step)
        with story.orders_end_with_the_story():
            story.sites()
            story.protect()
            story.recovery_points()
            story.verify()
            story.test_failover()
            story.cleanup()
            story.site_lost()
            story.unplanned_failover()
            story.commit()
            with _service(engine):  # now: one that has found a site lost asks it again only after 5 s
                story.site_returns()
                story.reprotect()
                story.planned_failback()
                story.protect_as_before()
        return story.timeline


@contextmanager
def _engine(folder: Path) -> Iterator[Engine]:
    """An engine with a new vault and no driver but the one for sites in memory."""
    plugins = Plugins()
    plugins.register("memory", memory)
    with Engine.create(str(folder / "vault.db"), plugins) as engine:
        engine.start()
        yield engine


@contextmanager
def _service(engine: Engine) -> Iterator[None]:
    """The replication service, as `asr run` runs it."""
    stop = threading.Event()
    thread = threading.Thread(target=engine.run, args=(stop,), name="asr-run")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def claim(holds: bool, what: str) -> None:
    """Raise DemoFailed unless it holds."""
    if not holds:
        raise DemoFailed(claim=what)


def wait(true: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait for something. Raises DemoFailed after `seconds`."""
    ends = time.monotonic() + seconds
    while not true():
        claim(time.monotonic() < ends, what)
        time.sleep(0.002)


# -- the application on the machine ------------------------------------------------------------------------------------

ORDER = 512
PAUSE = 0.002  # seconds between two orders
_HEADER = struct.Struct(">Qd")


def order(number: int, at: float) -> bytes:
    """A numbered order of that time, filled up with its own digest: a damaged one is seen."""
    header = _HEADER.pack(number, at)
    return (header + hashlib.sha256(header).digest() * (ORDER // 32))[:ORDER]


@attrs.frozen
class Ledger:
    """The orders of a disk, without a gap from the first one: how many, and the time of the last."""

    orders: int
    last_at: float

    @classmethod
    def of(cls, machine: MemoryMachine) -> Ledger:
        """Read it from the machine's disk. Raises DemoFailed if an order is damaged or missing before the last."""
        stored = machine.read(DISK, SYSTEM)
        count, at = 0, 0.0
        while any(record := stored[count * ORDER : (count + 1) * ORDER]):
            at = _HEADER.unpack_from(record)[1]
            count += 1
            claim(record == order(count, at), f"order {count} on {machine.id} is intact")
        claim(not stored[count * ORDER :].strip(b"\0"), f"no order on {machine.id} is missing before the last one")
        return cls(count, at)


class Orders:
    """The application: writes an order every `PAUSE` seconds until the machine is off. `first`: its number."""

    def __init__(self, machine: MemoryMachine, first: int) -> None:
        self._machine = machine
        self._first = first
        self._end = threading.Event()
        self.written: list[tuple[float, float]] = []
        """When each was written, and when the disk had acknowledged it."""
        self._thread = threading.Thread(target=self._write, name="orders")
        self._thread.start()

    def _write(self) -> None:
        while not self._end.wait(PAUSE):
            at = time.time()
            place = SYSTEM + self.last * ORDER
            try:
                self._machine.write(DISK, place, order(self.last + 1, at))
            except RuntimeError:  # the machine is off
                return
            self.written.append((at, time.time()))

    @property
    def last(self) -> int:
        """Number of the last order."""
        return self._first - 1 + len(self.written)

    def until(self, instant: float) -> int:
        """Number of the last order that the disk had acknowledged at that instant."""
        return self._first - 1 + sum(acknowledged <= instant for _, acknowledged in self.written)

    def wait_for(self, more: int) -> None:
        """Wait until so many more have been written."""
        wanted = self.last + more
        wait(lambda: self.last >= wanted, f"{self._machine.id} writes orders")

    def wait_for_end(self) -> None:
        """Wait until the machine is off, and so the application has ended."""
        self._thread.join(PATIENCE)
        claim(not self._thread.is_alive(), f"{self._machine.id} is off")

    def stop(self) -> None:
        """End it, whatever the machine does."""
        self._end.set()
        self._thread.join()


# -- the story ---------------------------------------------------------------------------------------------------------


class Story:
    """The steps, to be run in the order in which they stand here."""

    def __init__(self, engine: Engine, on_step: Callable[[Step], object]) -> None:
        self.engine = engine
        self.timeline: list[Step] = []
        self._on_step = on_step
        self._begun = time.monotonic()
        self.alpha = MemoryWorld("demo-alpha")
        self.beta = MemoryWorld("demo-beta")
        self.beta.configure(networks={"lan"})
        # As many servers are set up: it starts with its host. That is what makes the return of a lost site dangerous.
        self.at_alpha = self.alpha.add_machine(MACHINE, {DISK: DISK_SIZE}, networks=("lan",), autostart=True)
        self.at_alpha.write(DISK, 0, random.Random(MACHINE).randbytes(SYSTEM))
        self.orders = Orders(self.at_alpha, first=1)
        self.initial_copy = 0
        self.tested = "", ""

    @contextmanager
    def orders_end_with_the_story(self) -> Iterator[None]:
        """However the story ends, the application does not outlive it."""
        try:
            yield
        finally:
            self.orders.stop()

    def say(self, step: str, command: str, text: str, checked: str = "", **figures: Any) -> None:
        """Add a step to the timeline."""
        at = round(time.monotonic() - self._begun, 3)
        self.timeline.append(Step(at, step, command, text, checked, figures))
        self._on_step(self.timeline[-1])

    def facts(self, job: Job) -> dict[str, Any]:
        """Wait for a job; its result."""
        return dict(json.loads(self.engine.wait(job, timeout=PATIENCE).result or "{}"))

    @property
    def protection(self) -> Protection:
        return self.engine.vault.protection(MACHINE)

    @property
    def at_beta(self) -> MemoryMachine:
        """The machine at the second site, once it is there."""
        return self.beta.machine(MACHINE)

    def sites(self) -> None:
        self.engine.add_site("alpha", "memory", {"world": self.alpha.name})
        self.engine.add_site("beta", "memory", {"world": self.beta.name})
        self.engine.vault.add_policy(Policy("gold", interval=5.0, point_interval=5.0))
        self.orders.wait_for(10)
        self.say(
            "sites",
            "asr site add",
            f"{MACHINE} runs at site alpha and writes an order every {PAUSE * 1000:g} ms. Site beta is empty.",
            disk_bytes=DISK_SIZE,
        )

    def protect(self) -> None:
        began = time.monotonic()
        facts = self.facts(self.engine.protect(MACHINE, source="alpha", target="beta", policy="gold"))
        seconds = time.monotonic() - began
        self.initial_copy = facts["bytes_sent"]
        claim(SYSTEM <= self.initial_copy < DISK_SIZE, "the initial copy sends what the disk holds, and not its size")
        claim(self.protection.state is State.PROTECTED, "the machine is protected")
        self.say(
            "protect",
            "asr protect",
            f"Initial copy while it runs: {format_size(self.initial_copy)} sent in {seconds:.2f} s.",
            bytes_sent=self.initial_copy,
            seconds=round(seconds, 3),
        )

    def recovery_points(self) -> None:
        before = len(self.engine.points(MACHINE))
        sent: list[int] = []
        for _ in range(POINTS):
            self.orders.wait_for(5)
            sent.append(self.facts(self.engine.replicate(MACHINE, keep=True))["bytes_sent"])
        claim(len(self.engine.points(MACHINE)) == before + POINTS, "each cycle leaves a recovery point")
        claim(0 < max(sent) < self.initial_copy // 10, "a cycle sends only what changed")
        self.say(
            "recovery-points",
            "asr run",
            f"{POINTS} recovery points, one right after the other; the service makes one every 5 s. Each sent "
            f"only changed blocks, {format_size(statistics.median(sent))} (median).",
            points=POINTS,
            bytes_sent_median=int(statistics.median(sent)),
        )

    def verify(self) -> None:
        facts = self.facts(self.engine.verify(MACHINE, sha256=True))
        disk = facts["disks"][DISK]
        equal = facts["equal"] and disk["source_sha256"] == disk["replica_sha256"]
        claim(equal, "the replica equals the frozen source")
        self.say(
            "verify",
            "asr verify",
            "The replica was compared with the source, frozen at one instant.",
            f"both are equal byte for byte, SHA-256 {disk['replica_sha256'][:12]}...",
            sha256=disk["replica_sha256"],
        )

    def test_failover(self) -> None:
        point = [item for item in self.engine.points(MACHINE) if item.kept][-1]
        self.tested = point.id, self.sha256_of_point(point.id)
        facts = self.facts(self.engine.failover_test(MACHINE, point=point.id))
        copy = self.beta.machine(facts["machine_id"])
        networks = {nic.network for nic in copy.value.nics}
        claim(copy.value.power is PowerState.RUNNING, "the test machine runs")
        claim(networks == {""}, "the test machine is on no network")
        ledger = Ledger.of(copy)
        claim(ledger.orders >= self.orders.until(point.taken_at), "the test machine has all orders of its point")
        copy.write(DISK, 0, bytes(64 * KiB))  # whatever a test does, it does to its copy
        head = self.protection.head_point
        self.facts(self.engine.replicate(MACHINE))
        claim(self.protection.head_point != head, "replication continues during the test")
        claim(self.protection.test is not None, "the test runs until it is cleaned up")
        self.say(
            "test-failover",
            "asr failover test",
            f"{facts['machine']} runs a recovery point at beta: a disposable copy, on no network. {MACHINE} and its "
            f"replication continue.",
            f"orders 1 to {ledger.orders} are on its disk",
            orders=ledger.orders,
        )

    def cleanup(self) -> None:
        self.facts(self.engine.failover_cleanup(MACHINE))
        claim(self.engine.machines("beta") == [], "the clean-up deletes the test machine")
        point, before = self.tested
        claim(self.sha256_of_point(point) == before, "the recovery point is as it was before the test")
        self.say(
            "cleanup",
            "asr failover cleanup",
            "The test machine and all that it wrote are deleted.",
            "beta has no machine, and the recovery point is as it was",
        )

    def sha256_of_point(self, point: str) -> str:
        """Of the disk as the recovery point at beta holds it."""
        content = bytearray(DISK_SIZE)
        replica = self.engine.context.site("beta").target.replica(self.protection.replica_id)
        with replica.reader(DISK, point) as reader:
            reader.read_into(0, memoryview(content))
        return hashlib.sha256(content).hexdigest()

    def site_lost(self) -> None:
        self.orders.wait_for(ORDERS_AFTER_LAST_POINT)
        self.alpha.cut()
        self.at_alpha.stop()
        self.orders.wait_for_end()
        self.say(
            "site-lost",
            "",
            f"Site alpha is lost: no power, no link. {MACHINE} had written order {self.orders.last}.",
            orders=self.orders.last,
        )

    def unplanned_failover(self) -> None:
        before, point = self.orders, self.engine.points(MACHINE)[-1]
        began = time.time()
        self.facts(self.engine.failover_unplanned(MACHINE))
        ledger = Ledger.of(self.at_beta)
        claim(before.until(point.taken_at) <= ledger.orders <= before.last, "no order of the recovery point is lost")
        claim(self.protection.fence_due, "the quarantine of the old machine is owed")
        self.orders = Orders(self.at_beta, first=ledger.orders + 1)
        self.orders.wait_for(1)
        rto = self.orders.written[0][1] - began
        rpo = before.written[-1][0] - ledger.last_at
        lost = before.last - ledger.orders
        self.say(
            "unplanned-failover",
            "asr failover unplanned",
            f"RTO {rto:.3f} s: from the command to the first order that {MACHINE} wrote at beta. RPO {rpo:.3f} s: "
            f"{lost} of {before.last} orders are lost, those after the newest recovery point.",
            f"orders 1 to {ledger.orders} are intact",
            rto_seconds=round(rto, 3),
            rpo_seconds=round(rpo, 3),
            orders=ledger.orders,
            orders_lost=lost,
        )

    def commit(self) -> None:
        self.facts(self.engine.failover_commit(MACHINE))
        claim(self.protection.state is State.COMMITTED, "the failover is committed")
        self.orders.wait_for(10)
        self.say("commit", "asr failover commit", f"The failover is final. {MACHINE} works at beta.")

    def site_returns(self) -> None:
        self.alpha.reboot()
        claim(self.at_alpha.value.power is PowerState.RUNNING, "the old machine started with its host")
        self.alpha.restore()
        wait(lambda: self.at_alpha.value.power is PowerState.OFF, "the old machine is stopped", QUARANTINE_PATIENCE)
        fence = self.engine.context.site("alpha").inventory.fenced(MACHINE)
        claim(fence is not None, "the old machine is quarantined")
        wait(lambda: not self.protection.fence_due, "the quarantine is on record")
        claim(self.at_beta.value.power is PowerState.RUNNING, "the machine at beta is left alone")
        self.say(
            "site-returns",
            "",
            f"Site alpha is back, and its old {MACHINE} started with the host. The service quarantined it at once.",
            "it is off and cannot be started; only the machine at beta runs",
        )

    def reprotect(self) -> None:
        facts = self.facts(self.engine.reprotect(MACHINE))
        sent = facts["bytes_sent"]
        claim(0 < sent < self.initial_copy // 4, "re-protect sends only differences")
        claim(self.protection.direction is Direction.REVERSE, "replication runs from beta to alpha")
        self.say(
            "reprotect",
            "asr reprotect",
            f"Replication runs from beta to alpha. Of the old disk {format_size(facts['bytes_same'])} were equal: "
            f"{format_size(sent)} sent.",
            bytes_sent=sent,
            bytes_same=facts["bytes_same"],
        )

    def planned_failback(self) -> None:
        before, left = self.orders, self.at_beta
        began = time.time()
        self.facts(self.engine.failover_planned(MACHINE))
        before.wait_for_end()
        ledger = Ledger.of(self.at_alpha)
        claim(ledger.orders == before.last, "a planned failover loses no order")
        there, here = left.sha256(DISK), self.at_alpha.sha256(DISK)
        claim(there == here, "the disk at alpha equals the disk that was shut down at beta")
        self.orders = Orders(self.at_alpha, first=ledger.orders + 1)
        self.orders.wait_for(1)
        rto = self.orders.written[0][1] - began
        self.say(
            "planned-failback",
            "asr failover planned",
            f"{MACHINE} was shut down at beta, sent its last changes and runs at alpha after {rto:.3f} s. "
            f"All {ledger.orders} orders are there; none is lost.",
            f"both disks are equal byte for byte, SHA-256 {here[:12]}...",
            rto_seconds=round(rto, 3),
            orders=ledger.orders,
            orders_lost=before.last - ledger.orders,
            sha256=here,
        )

    def protect_as_before(self) -> None:
        self.facts(self.engine.failover_commit(MACHINE))
        sent = self.facts(self.engine.reprotect(MACHINE))["bytes_sent"]
        claim(sent < self.initial_copy // 4, "re-protect sends only differences")
        protection = self.protection
        claim(protection.state is State.PROTECTED, "the machine is protected again")
        claim(protection.direction is Direction.FORWARD, "replication runs from alpha to beta")
        self.say(
            "protect-as-before",
            "asr reprotect",
            f"Committed and re-protected, with {format_size(sent)} sent: replication runs from alpha to beta, as at "
            f"the beginning.",
            bytes_sent=sent,
            epoch=protection.epoch,
        )
