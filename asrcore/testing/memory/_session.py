"""An engine's connection to a world: it ends with the engine, and fails while the link is cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from asrcore.driver import Capability
from asrcore.errors import SiteUnreachable, UnsupportedOperation
from asrcore.testing.memory._state import WorldState
from asrcore.testing.memory.world import MemoryWorld

__all__ = ["Session"]


class Session:
    """All roles of a site reach the world through its session. Raises SiteUnreachable wherever it is used."""

    def __init__(self, world: MemoryWorld, site: str) -> None:
        self.world = world
        self.site = site
        self.closed = False
        self._generation = world.generation

    @property
    def alive(self) -> bool:
        """Whether the engine that connected is still alive."""
        return not self.closed and self._generation == self.world.generation

    @contextmanager
    def look(self) -> Iterator[WorldState]:
        """The world's state, to be read."""
        with self.world.look() as state:
            self._check(state)
            yield state

    @contextmanager
    def change(self) -> Iterator[WorldState]:
        """The world's state, to be changed; durable when the block is left."""
        with self.world.change() as state:
            self._check(state)
            yield state

    def need(self, capability: Capability, operation: str) -> None:
        """Raises UnsupportedOperation where the site does not offer it."""
        with self.look() as state:
            if capability not in state.capabilities:
                raise UnsupportedOperation(driver="memory", operation=operation)

    def _check(self, state: WorldState) -> None:
        if not self.alive:
            detail = "the connection was closed" if self.closed else "the connection died with its engine"
            raise SiteUnreachable(site=self.site, detail=detail)
        if state.cut:
            raise SiteUnreachable(site=self.site, detail="the link is cut")
