"""The memory driver: the whole contract of `asrcore.driver` in memory, to test engines with and to learn from.

A site is a `MemoryWorld`, found by its name:

    world = MemoryWorld("home")
    machine = world.add_machine("web", {"vda": 1 * MiB})
    site = MemoryDriver().connect("home", {"world": "home"})
    machine.write("vda", 0, b"hello")

Read `world` (what a platform is and what happens to it), then `_source`, `_target` and `_failover` (how a driver
serves the engine). With a `path` the world is kept in a directory, so that a killed engine finds it again.
"""

from __future__ import annotations

from asrcore.driver import Driver
from asrcore.hookspecs import hookimpl
from asrcore.testing.memory._driver import MemoryDriver, MemorySite
from asrcore.testing.memory.world import MemoryMachine, MemoryWorld

__all__ = ["MemoryDriver", "MemoryMachine", "MemorySite", "MemoryWorld", "asr_register_drivers"]


@hookimpl
def asr_register_drivers() -> list[Driver]:
    """One driver, `memory`."""
    return [MemoryDriver()]
