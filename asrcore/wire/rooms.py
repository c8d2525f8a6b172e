"""Rooms with a bounded number of places: who takes a place, and whose connection is dropped for it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from math import inf
from typing import Generic, Protocol, TypeVar

__all__ = ["Full", "Room"]


class Full(Exception):
    """Every place is taken by a connection that is not to be dropped."""


class _Guest(Protocol):
    def idle_since(self) -> float | None:
        """When it was last at work; None while it is."""


G = TypeVar("G", bound=_Guest)


class Room(Generic[G]):
    """Places for `most` connections, `each` of them for one group, such as an address. Not thread-safe."""

    def __init__(self, most: int, each: int) -> None:
        self.most, self.each = most, each
        self._groups: dict[Hashable, dict[G, None]] = {}
        self._where: dict[G, Hashable] = {}

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, guest: G) -> bool:
        return guest in self._where

    def enter(self, guest: G, group: Hashable, before: float = inf) -> G | None:
        """Take a place. If none is left, the connection that was idle longest loses its own and is returned: one of the
        same group if that has all its places, else one of the group with the most, so that no group displaces others.

        Raises Full if there is no such connection that has been idle since `before`.
        """
        own = self._groups.get(group, {})
        if len(own) >= self.each:
            dropped = _longest_idle(own)
        elif len(self) >= self.most:
            dropped = self.next_to_drop()
        else:
            dropped = None
        if dropped is not None:
            since = dropped.idle_since()
            if since is None or since >= before:
                raise Full
            self.leave(dropped)
        elif len(own) >= self.each or len(self) >= self.most:
            raise Full
        self._groups.setdefault(group, {})[guest] = None
        self._where[guest] = group
        return dropped

    def next_to_drop(self) -> G | None:
        """The connection that was idle longest, of the largest group that has an idle one."""
        for group in sorted(self._groups.values(), key=len, reverse=True):
            found = _longest_idle(group)
            if found is not None:
                return found
        return None

    def leave(self, guest: G) -> bool:
        """Give its place back; False if it has none here."""
        if guest not in self._where:
            return False
        name = self._where.pop(guest)
        group = self._groups[name]
        del group[guest]
        if not group:
            del self._groups[name]
        return True


def _longest_idle(group: Iterable[G]) -> G | None:
    best: tuple[float, G] | None = None
    for guest in group:
        since = guest.idle_since()
        if since is not None and (best is None or since < best[0]):
            best = (since, guest)
    return best[1] if best else None
