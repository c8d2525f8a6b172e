"""A vault on PostgreSQL, many machines in worlds that are stored in files, and process servers as processes.

A memory world in a directory is one world to all processes (`MemoryWorld`): each change rewrites it under a file lock.
So there are many small ones, each a separate site. The servers run the real engine; only the platform is the memory
driver's, and each seal at a replica is recorded with its server and epoch.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import asrcore.testing.memory
from asrcore.engine import Engine
from asrcore.model.point import RecoveryPoint
from asrcore.model.policy import ALWAYS, Policy
from asrcore.model.protection import Protection
from asrcore.model.watch import Watch
from asrcore.plugins import Plugins
from asrcore.procedures.catalogue import PROCEDURES
from asrcore.procedures.procedure import Arguments, Work
from asrcore.testing.memory import MemoryMachine, MemoryWorld
from asrcore.units import HOUR, KiB

__all__ = ["INTERVAL", "LEASE", "Cluster"]

ROOT = Path(__file__).parents[2]
INTERVAL = 20.0
LEASE = 6.0
DISK = 64 * KiB
WORLDS = 20


class Cluster:
    """`folder` contains worlds and traces; `truth` is the test's own record."""

    def __init__(self, url: str, folder: Path, machines: int, interval: float = INTERVAL) -> None:
        self.url, self.folder = url, folder
        plugins = Plugins()
        assert plugins.register("memory", asrcore.testing.memory)
        self.engine = Engine.create(url, plugins)
        self.vault = self.engine.vault
        self.vault.add_policy(Policy("gold", interval, HOUR, keep=2 * HOUR, resync_window=ALWAYS))
        self.machines: dict[str, MemoryMachine] = {}
        self.worlds: list[tuple[MemoryWorld, MemoryWorld]] = []
        for number in range(WORLDS):
            self._world(number, machines // WORLDS)

    def _world(self, number: int, machines: int) -> None:
        home, away = (
            MemoryWorld(f"{side}-{number}", path=self.folder / f"{side}-{number}") for side in ("home", "away")
        )
        self.worlds.append((home, away))
        for world in (home, away):
            settings = {"world": world.name, "path": str(self.folder / world.name)}
            self.engine.add_site(world.name, "memory", settings)
        steps = PROCEDURES["protect"].steps
        for index in range(machines):
            name = f"web-{number}-{index}"
            machine = self.machines[name] = home.add_machine(name, {"vda": DISK})
            machine.write("vda", 0, os.urandom(4 * KiB))
            protection = Protection(
                id=f"m-{number}-{index}",
                name=name,
                policy="gold",
                home_site=home.name,
                source_site=home.name,
                source_machine=name,
                target_site=away.name,
                replica_id=f"r-{number}-{index}",
                created_at=time.time(),
            )
            self.vault.add_protection(protection)
            for step in steps:  # without the job engine: this test is not about 200 jobs
                step.run(Work(self.engine.context, "", protection.id, Arguments(), Watch()))

    def close(self) -> None:
        self.engine.close()

    # -- servers -----------------------------------------------------------------------------------------------------

    @contextmanager
    def server(self, name: str, url: str = "") -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "tests.servers.worker", url or self.url, str(self.folder), name, str(LEASE)]
        log = (self.folder / f"{name}.log").open("a")
        with log, subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stderr=log) as child:
            try:
                yield child
            finally:
                child.kill()

    @contextmanager
    def supervised(self, name: str, url: str) -> Iterator[None]:
        """A server that is started again when it ends, as systemd does, until the block ends."""
        stop, children = threading.Event(), list[subprocess.Popen[str]]()

        def supervise() -> None:
            while not stop.is_set():
                with self.server(name, url) as child:
                    children[:] = [child]
                    child.wait()
                stop.wait(1.0)

        thread = threading.Thread(target=supervise)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            for child in children:
                child.terminate()
                try:
                    child.wait(60)
                except subprocess.TimeoutExpired:
                    child.kill()
            thread.join()

    def held_by(self, name: str) -> set[str]:
        """Ids of the machines that a living server has."""
        sessions = {server.session: server.name for server in self.vault.servers()}
        return {machine for machine, session in self.vault.assigned().items() if sessions.get(session) == name}

    def seals(self) -> list[dict[str, Any]]:
        """Every point that was sealed at a replica, in order: `server`, `replica`, `epoch`, `point`."""
        file = self.folder / "seals"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    # -- machines ----------------------------------------------------------------------------------------------------

    @contextmanager
    def written_to(self) -> Iterator[None]:
        """All machines write, one after the other."""
        stop = threading.Event()
        dice = random.Random(7)

        def write() -> None:
            while not stop.is_set():
                for machine in self.machines.values():
                    if stop.wait(0.02):
                        return
                    with suppress(RuntimeError):  # it is off, in a failover
                        machine.write("vda", dice.randrange(0, DISK, 4 * KiB), dice.randbytes(4 * KiB))

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def newest(self) -> dict[str, RecoveryPoint]:
        """The newest point of each machine, by its id."""
        return self.vault.heads()

    def wait(self, true: Callable[[], bool], seconds: float) -> None:
        ends, pause = time.monotonic() + seconds, threading.Event()
        while not true():
            assert time.monotonic() < ends, "it never happened"
            pause.wait(0.2)

    def check_equal(self, protection: Protection) -> None:
        """The vault's head is the replica's, and its content equals the machine's disk: a cycle in progress has nothing
        new to copy once the writes have ended."""
        replica = self.engine.context.site(protection.target_site).target.replica(protection.replica_id)
        info = replica.info()
        assert info.head == protection.head_point, protection.name
        kept = [item.id for item in self.vault.points(protection.id)]
        if protection.last_test_at is None:
            going = set(self.vault.dropping(protection.id))  # a server was stopped while it deleted them
            held = [item.id for item in info.points if item.id not in going]
            assert held == kept, (protection.name, info.points, kept)
        # Else the memory driver has kept the point of the test, which was the newest then.
        assert set(kept) <= {item.id for item in info.points}, protection.name
        data = bytearray(DISK)
        with replica.reader("vda", info.head) as reader:
            reader.read_into(0, memoryview(data))
        assert bytes(data) == self.machines[protection.name].read("vda"), protection.name
