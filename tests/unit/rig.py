"""Two memory sites and an engine, for tests of the engine's own logic."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import asrcore.crashpoint
import asrcore.testing.memory
from asrcore.engine import Engine
from asrcore.model.machine import PowerState
from asrcore.model.policy import ALWAYS, Policy
from asrcore.model.protection import Protection
from asrcore.model.watch import Watch
from asrcore.plugins import Plugins
from asrcore.procedures.catalogue import PROCEDURES
from asrcore.procedures.procedure import Arguments, Work
from asrcore.testing.memory import MemoryMachine, MemoryWorld
from asrcore.units import MiB
from asrcore.vault import Job
from tests.put_back import put_back, take_copy


class Clock:
    """A clock that a test advances; each reading takes a millisecond."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


class Killed(BaseException):
    """Simulates SIGKILL inside this process."""


class DirectEngine(Engine):
    """Runs a job's steps directly in the caller's thread, so that a test sees each error where it is raised."""

    def _submit(self, kind: str, protection: Protection, arguments: Arguments) -> Job:
        work = Work(self.context, f"j{os.urandom(4).hex()}", protection.id, arguments, Watch())
        for step in PROCEDURES[kind].steps:
            step.run(work)
        return Job(id=work.job_id, kind=kind, machine=protection.name, result=json.dumps(work.facts))


def facts(job: Job | None) -> dict[str, Any]:
    """The facts of a job."""
    assert job is not None
    return dict(json.loads(job.result or "{}"))


class Rig:
    """Sites `a` and `b`; a machine `web` at `a`. `restart` simulates a crash of the engine."""

    def __init__(self, folder: Path, *, interval: float = 5.0, point_interval: float = 5.0) -> None:
        self.clock = Clock()
        self.home = MemoryWorld("home", clock=self.clock)
        self.away = MemoryWorld("away", clock=self.clock)
        self.machine = self.home.add_machine("web", {"vda": 2 * MiB, "vdb": 1 * MiB}, networks=("lan",))
        self.machine.start()
        self.plugins = Plugins()
        assert self.plugins.register("memory", asrcore.testing.memory), self.plugins.broken
        self.vault = str(folder / "vault.db")
        Engine.create(self.vault, self.plugins).close()
        self.engine = self._engine()
        self.engine.add_site("a", "memory", {"world": "home"})
        self.engine.add_site("b", "memory", {"world": "away"})
        policy = Policy("gold", interval=interval, point_interval=point_interval, resync_window=ALWAYS)
        self.engine.vault.add_policy(policy)

    def _engine(self) -> DirectEngine:
        opened = DirectEngine.open(self.vault, self.plugins)
        opened.context.clock = opened.context.elapsed = self.clock
        return opened

    def protect(self) -> None:
        self.engine.protect("web", source="a", target="b", policy="gold")

    def restart(self) -> None:
        """The engine's process dies and another starts."""
        self.home.crash()
        self.away.crash()
        self.engine.close()
        self.engine = self._engine()

    def backup(self, name: str = "backup") -> Path:
        """A copy of the vault as it is now, for `put_back`."""
        return take_copy(Path(self.vault), Path(self.vault).with_name(f"{name}.db"))

    def put_back(self, copy: Path, *, directory: bool = False) -> None:
        """The engine's process ends, an earlier copy of the vault takes the vault's place, and another engine starts.
        `directory`: the files beside the vault are put back as well."""
        self.home.crash()
        self.away.crash()
        self.engine.close()
        put_back(copy, Path(self.vault), directory=directory)
        self.engine = self._engine()

    @property
    def protection(self) -> Protection:
        return self.engine.vault.protection("web")

    def source_machine(self) -> MemoryMachine:
        protection = self.protection
        world = self.home if protection.source_site == "a" else self.away
        return world.machine(protection.source_machine)

    def content(self, point: str | None = None) -> dict[str, str]:
        """SHA-256 of each disk of a point (default: the head), read through the driver."""
        protection = self.protection
        replica = self.engine.context.site(protection.target_site).target.replica(protection.replica_id)
        info = replica.info()
        stored = next(item for item in info.points if item.id == (point or info.head))
        result = {}
        for disk_id, size in stored.disks.items():
            data = bytearray(size)
            with replica.reader(disk_id, stored.id) as reader:
                reader.read_into(0, memoryview(data))
            result[disk_id] = hashlib.sha256(data).hexdigest()
        return result

    def power(self, site: str, machine: str = "web") -> PowerState:
        """Of a machine at `a` or `b`."""
        world = self.home if site == "a" else self.away
        return world.machine(machine).value.power

    def truth(self) -> dict[str, str]:
        """SHA-256 of each disk of the source machine now."""
        machine = self.source_machine()
        return {disk.id: machine.sha256(disk.id) for disk in machine.value.disks}

    @contextmanager
    def killed_at(self, place: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
        """Run the block until the crash point is reached, then restart. The list contains the place if it was
        reached."""
        reached: list[str] = []

        def die(*_: object) -> None:
            reached.append(place)
            raise Killed(place)

        with monkeypatch.context() as patch:
            patch.setattr("asrcore.crashpoint.os.kill", die)
            patch.setattr("asrcore.crashpoint._seen", type(asrcore.crashpoint._seen)())
            patch.setenv("ASRCORE_CRASH_AT", place)
            with suppress(Killed):
                yield reached
        if reached:
            self.restart()
