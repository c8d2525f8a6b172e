"""The connections to one peer, and asking through them."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any, Protocol

from asrcore.errors import SiteUnreachable
from asrcore.model.extent import Extent
from asrcore.model.watch import Watch
from asrcore.remote import calls
from asrcore.wire.carrier import Address, Carrier, Limits
from asrcore.wire.channel import Answer, Channel
from asrcore.wire.frames import Bytes
from asrcore.wire.tls import Identity, Role

__all__ = ["DialledLinks", "Links", "Peer"]


class Links(Protocol):
    """A number of connections to one peer, whoever made them."""

    count: int

    def channel(self, index: int = 0) -> Channel:
        """An open one. Raises what making one raises."""

    def living(self) -> Channel | None:
        """An open one, if there is any."""


class DialledLinks:
    """Connections made when they are needed, and again when they have ended. Thread-safe."""

    def __init__(
        self, address: Address, identity: Identity, *, roles: Collection[Role], name: str, limits: Limits, count: int
    ) -> None:
        """Connects to nothing yet."""
        self.count = count
        self._address, self._identity, self._roles, self._name, self._limits = address, identity, roles, name, limits
        self._about = {"session": secrets.token_hex(16), "version": version("asrcore")}
        self._channels: dict[int, Channel] = {}
        self._locks = [threading.Lock() for _ in range(count)]
        self._closed = False

    def channel(self, index: int = 0) -> Channel:
        """See `Links`."""
        index %= self.count
        with self._locks[index]:
            known = self._channels.get(index)
            if known is not None and known.error is None:
                return known
            if self._closed:
                raise SiteUnreachable(site=str(self._address), detail="the connection was closed")
            carrier = Carrier.dial(self._address, self._identity, self._roles, name=self._name, limits=self._limits)
            made = Channel(carrier, dialled=True, about=self._about)
            made.start()
            self._channels[index] = made
            return made

    def living(self) -> Channel | None:
        """See `Links`."""
        return next((channel for channel in list(self._channels.values()) if channel.error is None), None)

    def close(self) -> None:
        """End all of them. May be called twice."""
        self._closed = True
        for lock in self._locks:
            with lock:
                pass  # the thread that connects has ended
        for channel in self._channels.values():
            channel.close()


class Peer:
    """Sends requests to the other side; used by all roles. `site` is for messages."""

    def __init__(self, site: str, links: Links) -> None:
        """The caller still owns the links."""
        self.site = site
        self.links = links
        self._turn = itertools.count()

    def ask(
        self, call: str, head: Mapping[str, Any] | None = None, body: Bytes = b"", watch: Watch | None = None
    ) -> Answer:
        """One request on the first connection; see `Channel.ask`."""
        return self.links.channel().ask(call, head, body, watch)

    def ask_held(self, call: str, head: Mapping[str, Any]) -> Answer:
        """A request about something that is open at the other side: it ends with the last connection, so no connection
        is made for it."""
        channel = self.links.living()
        if channel is None:
            raise SiteUnreachable(site=self.site, detail="the connection was lost")
        return channel.ask(call, head)

    def plain(self, call: str, watch: Watch | None = None, **given: object) -> Any:
        """A call of `calls.PLAIN`: its result."""
        answer = self.ask(call, calls.plain(given), watch=watch)
        return calls.value(answer.head.get("result"), calls.result_type(call), call)

    def extents(self, call: str, head: Mapping[str, Any], *, held: bool = False) -> list[Extent]:
        """A list that may come in several replies."""
        answer = self.ask_held(call, head) if held else self.ask(call, head)
        result = calls.extents_of(answer.body)
        while "more" in answer.head:
            answer = self.ask_held("extents.next", {"more": answer.head["more"]})
            result += calls.extents_of(answer.body)
        return result

    def next_index(self) -> int:
        """Index of the connection for the next view, reader or cycle: round robin."""
        return next(self._turn) % self.links.count
