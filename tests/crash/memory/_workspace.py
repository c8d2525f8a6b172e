"""A folder with everything that survives an engine: vault, two memory worlds, the clock, and the test's own record.

The record is written by the test, never by the engine: the content of each disk of the machine over time.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

import asrcore.testing.memory
from asrcore.engine import Engine
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency
from asrcore.model.policy import ALWAYS, Policy
from asrcore.model.protection import Protection
from asrcore.plugins import Plugins
from asrcore.testing.memory import MemoryMachine, MemoryWorld
from asrcore.units import KiB, MiB
from asrcore.vault import Vault

__all__ = ["MACHINE", "POLICY", "Clock", "Truth", "Workspace"]

MACHINE = "web"
POLICY = Policy(
    "gold", interval=60.0, point_interval=120.0, consistency=Consistency.FILESYSTEM, resync_window=ALWAYS
)  # with 60 s no cycle is due automatically while a test runs; the scenario advances the clock


class Clock:
    """Real time plus the time that the scenario has added; the same in every process that works on the folder."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._ahead = float(file.read_text()) if file.exists() else 0.0

    def __call__(self) -> float:
        return time.time() + self._ahead

    def forward(self, seconds: float) -> None:
        """Let time pass."""
        self._ahead += seconds
        fresh = self._file.with_suffix(".new")
        fresh.write_text(str(self._ahead))
        fresh.replace(self._file)  # the writer may be killed


@attrs.frozen
class Truth:
    """The content of the machine at `site` from the time `at` on: SHA-256 by disk, and what a frozen view of it
    offers."""

    at: float
    site: str
    disks: Mapping[str, str]
    consistency: Consistency


class Workspace:
    """Opens a folder, or makes it. The test reads and writes the worlds without the engine, as guest and storage do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock(folder / "clock")
        self.home = MemoryWorld("home", path=folder / "home", clock=self.clock)
        self.away = MemoryWorld("away", path=folder / "away", clock=self.clock)
        self.worlds = {"a": self.home, "b": self.away}
        self.notes: dict[str, Any] = self._read_notes()

    @classmethod
    def make(cls, folder: Path) -> Workspace:
        """A vault, sites `a` and `b`, and the machine at `a`, running."""
        folder.mkdir()
        stage = cls(folder)
        with Engine.create(str(stage.vault_path), _plugins()) as engine:
            engine.context.clock = engine.context.elapsed = stage.clock
            for name, world in stage.worlds.items():
                engine.add_site(name, "memory", {"world": world.name, "path": str(folder / world.name)})
            engine.vault.add_policy(POLICY)
        machine = stage.home.add_machine(MACHINE, {"vda": 2 * MiB, "vdb": 1 * MiB}, networks=("lan",))
        machine.write("vda", 0, _noise("vda", 448 * KiB))
        machine.write("vdb", 64 * KiB, _noise("vdb", 160 * KiB))
        stage.learn("a")
        return stage

    @property
    def vault_path(self) -> Path:
        """The vault's file."""
        return self.folder / "vault.db"

    def vault(self) -> Vault:
        """The vault, for reading without an engine."""
        return Vault.open(self.vault_path)

    def engine(self) -> Engine:
        """An engine that is not started."""
        # The sites' settings name the folder where the scenario was first run; worlds are found by name first.
        engine = Engine(self.vault(), _plugins(), self.clock)
        engine.context.elapsed = self.clock
        return engine

    # -- notes of the test -------------------------------------------------------------------------------------------

    def _read_notes(self) -> dict[str, Any]:
        file = self.folder / "notes.json"
        notes: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return notes

    def note(self, **notes: object) -> None:
        """Record a note for later processes; atomically, because this process may be killed meanwhile."""
        self.notes.update(notes)
        draft = self.folder / "notes.draft"
        draft.write_text(json.dumps(self.notes))
        draft.replace(self.folder / "notes.json")

    # -- the machine -------------------------------------------------------------------------------------------------

    def machine(self, site: str) -> MemoryMachine:
        """The machine at a site."""
        return self.worlds[site].machine(MACHINE)

    def power(self, site: str) -> PowerState | None:
        """Of the machine at a site; None if there is none."""
        with self.worlds[site].look() as state:
            found = state.machines.get(MACHINE)
            return found.power if found else None

    def sha256(self, site: str) -> dict[str, str]:
        """Content of the machine's disks at a site."""
        machine = self.machine(site)
        return {disk.id: machine.sha256(disk.id) for disk in machine.value.disks}

    def write(self, site: str, seed: int, length: int = 160 * KiB) -> None:
        """The guest overwrites ranges of both disks and discards one."""
        machine = self.machine(site)
        some = random.Random(seed)
        for disk in machine.value.disks:
            for part in (length // 2, length // 4):
                machine.write(disk.id, some.randrange(0, disk.size - part), some.randbytes(part))
            machine.discard(disk.id, some.randrange(0, disk.size - 16 * KiB), 16 * KiB)
        self.learn(site)

    def learn(self, site: str) -> None:
        """Record the machine's content from now on."""
        with self.worlds[site].look() as state:
            offers = state.machine(MACHINE).consistency
        known = Consistency.CRASH if offers is Consistency.CRASH else POLICY.consistency
        line = {"at": self.clock(), "site": site, "disks": self.sha256(site), "consistency": known.value}
        with (self.folder / "truth").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def truth(self, site: str, at: float) -> Truth:
        """The content of the machine at a site at that time."""
        found = None
        for text in (self.folder / "truth").read_text().splitlines():
            line = json.loads(text)
            if line["site"] == site and line["at"] <= at:
                found = Truth(line["at"], site, line["disks"], Consistency(line["consistency"]))
        assert found is not None, f"no record of site {site} at {at}"
        return found

    def running_at(self) -> list[str]:
        """Sites where a copy of the machine runs; test machines do not count, they are isolated."""
        return [site for site in self.worlds if self.power(site) is PowerState.RUNNING]

    def lives_at(self, protection: Protection | None) -> str | None:
        """The site of the machine whose writes count: its source as long as that runs; None while no copy runs."""
        site = protection.source_site if protection else "a"
        return site if site in self.running_at() else None


def _plugins() -> Plugins:
    plugins = Plugins()
    assert plugins.register("memory", asrcore.testing.memory), plugins.broken
    return plugins


def _noise(seed: str, length: int) -> bytes:
    return random.Random(hashlib.sha256(seed.encode()).digest()).randbytes(length)
