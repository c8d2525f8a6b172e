"""The gate of every listener: it accepts connections and bounds how many there are, whose, and for how long.

A connection passes three rooms. In the first it costs one descriptor and nothing else: no thread, no TLS. It leaves it
when the first record of TLS has arrived whole, so whoever sends nothing, or a byte a second, never takes a place from
those in the second room, whose handshakes are under way. The third is for components that have shown a certificate.
Places in the first two are counted by address, in the third by component. When there is none left, the connection
that was idle longest is dropped for the new one; but no handshake is dropped in its first half second.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

import attrs

from asrcore.errors import CannotListen
from asrcore.wire.carrier import Address
from asrcore.wire.rooms import Full, Room
from asrcore.wire.tally import Tally

__all__ = ["Full", "Gate", "Place", "Places", "listen"]

TLS_SECONDS = 5.0
"""From the arrival of a connection until it has shown its certificate."""
SHAKING_SECONDS = 0.5
"""No handshake is dropped for another before it has had this time. An honest one takes some milliseconds and a few
round trips."""
HELLO_SECONDS = 10.0
"""From then until its hello, or the head of its request."""
_BACKLOG = 4096  # the kernel takes no more than net.core.somaxconn
_BATCH = 256  # connections accepted before those that are waiting are looked at
_TURN = 0.02  # seconds between two looks for a place in the second room, while any connection waits for one
_LOOK = 0.25  # seconds between two looks at the time limits
_PAUSE = 1.0  # seconds without accepting when no descriptor can be had
_HANDSHAKE = 22  # type of the first TLS record
_RECORD = 5 + 16 * 1024 + 256  # bytes of the largest
_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


@attrs.frozen
class Places:
    """How many connections there may be in each room, and how many of them from one address or of one component."""

    arrivals: int = 512
    arrivals_each: int = 256
    handshakes: int = 128
    handshakes_each: int = 64
    most: int = 64
    each: int = 16

    def within(self, descriptors: int) -> Places:
        """So many that a process with this limit of open files has descriptors left for its work."""
        return attrs.evolve(
            self,
            arrivals=min(self.arrivals, max(8, descriptors // 4)),
            handshakes=min(self.handshakes, max(8, descriptors // 16)),
            most=min(self.most, max(8, descriptors // 2)),
        )


class Place:
    """A connection at a gate, from its arrival until `leave`. Whoever takes it over sets `cut` and `idle_since`."""

    def __init__(self, gate: Gate, plain: socket.socket, peer: str, address: Hashable) -> None:
        self.peer = peer
        self.socket = plain
        self.cut: Callable[[], None] = self._shut
        """Ends the connection at once, called from any thread; whoever uses it then leaves the place."""
        arrived = time.monotonic()
        self.idle_since: Callable[[], float | None] = lambda: arrived
        self.refused = False
        """The gate has ended the connection, and has logged why."""
        self._gate = gate
        self._address = address
        self._wanted, self._due = "", float("inf")
        self.expect("show a certificate", TLS_SECONDS)

    def expect(self, what: str, seconds: float) -> None:
        """What the other side has to do within this time; else its connection is ended."""
        self._wanted, self._due = what, time.monotonic() + seconds

    def relax(self) -> None:
        """Expect nothing more: the other side has done it."""
        self._due = float("inf")

    def identify(self, component: Hashable) -> None:
        """It has shown a certificate, whose role may come in. Raises Full."""
        self._gate._identify(self, component)

    def leave(self) -> None:
        """Give the place back; may be called twice."""
        self._gate._leave(self)

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class Gate:
    """Accepts on a listening socket from `start` to `close`. Its thread runs `take` for each connection whose handshake
    can begin; `take` must not block."""

    def __init__(
        self,
        listening: socket.socket,
        take: Callable[[Place], None],
        log: logging.Logger,
        places: Places | None = None,
    ) -> None:
        """The socket is handed over."""
        self.log = Tally(log)
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        places = places or Places()
        self.places = places if descriptors == resource.RLIM_INFINITY else places.within(descriptors)
        self._listening = listening
        self._take = take
        self._lock = threading.Lock()
        self._arrivals: Room[Place] = Room(self.places.arrivals, self.places.arrivals_each)
        self._handshakes: Room[Place] = Room(self.places.handshakes, self.places.handshakes_each)
        self._components: Room[Place] = Room(self.places.most, self.places.each)
        self._all: set[Place] = set()
        self._waiting: dict[int, Place] = {}  # those in the first room, by descriptor; the gate's thread only
        self._ready: dict[Place, None] = {}  # of them, those whose handshakes could begin; oldest first
        self._closed = False
        self._paused_until = 0.0
        listening.setblocking(False)
        # The kernel keeps who has sent nothing, for about as long. Measured with 2,000 silent connections that were
        # opened again when they were dropped: 250 instead of 10,000 a second had to be accepted, and a client from
        # the same address got in 39 times of 39, without this 29 of 31.
        with contextlib.suppress(OSError):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, int(TLS_SECONDS))
        self._poll = select.epoll()
        self._poll.register(listening, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    def close(self) -> None:
        """Accept no more, and end the connections that have shown no certificate. May be called twice."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if self._thread.is_alive():
            self._thread.join()
        self._listening.close()
        self._poll.close()
        for place in list(self._waiting.values()):
            self._discard(place)
        with self._lock:
            unknown = [place for place in self._all if place not in self._components]
        for place in unknown:
            place.cut()
        self.log.flush()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        looked = 0.0
        while not self._closed:
            try:
                for descriptor, _ in self._poll.poll(_TURN if self._ready else _LOOK):
                    place = self._waiting.get(descriptor)
                    if place is not None:
                        self._hear(place)
                    elif descriptor == self._listening.fileno():
                        self._accept()
                self._begin_those_that_wait()
                if time.monotonic() - looked >= _LOOK:
                    looked = time.monotonic()
                    self._look(looked)
            except Exception:
                self.log.exception("accepting connections failed")
                time.sleep(_LOOK)

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                plain, peer = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as problem:
                if self._closed or problem.errno not in _NO_DESCRIPTOR:
                    return  # such as a connection that was reset before it was accepted
                self.log.error("cannot accept a connection: %s", problem.strerror)
                if not self._make_room():
                    self._paused_until = time.monotonic() + _PAUSE
                    self._poll.modify(self._listening, 0)
                    return
                continue
            self._arrive(plain, peer)

    def _make_room(self) -> bool:
        """Drop a connection without a certificate, so that there is a descriptor for the next one."""
        with self._lock:
            place = self._arrivals.next_to_drop()
        if place is None:
            return False
        self._discard(place)
        return True

    def _arrive(self, plain: socket.socket, peer: tuple[Any, ...]) -> None:
        plain.setblocking(False)
        name, group = _names(peer)
        place = Place(self, plain, name, group)
        with self._lock:
            self._all.add(place)
        # Looked at at once: among hundreds that arrive together it would be dropped before its turn.
        whole = self._whole(place)
        if place.refused or (whole and self._begin(place)):
            return
        with self._lock:
            dropped = self._arrivals.enter(place, group)  # they all are idle, so it is never Full
        if dropped is not None:
            self.log.warning("connection from %s dropped for a newer one: it has not begun TLS", dropped.peer)
            self._discard(dropped)
        self._waiting[plain.fileno()] = place
        # Edge-triggered: what has arrived stays unread until the record is whole.
        self._poll.register(plain, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        if whole:
            self._wait(place)

    def _hear(self, place: Place) -> None:
        """More has arrived in the first room."""
        if self._whole(place) and not self._begin(place):
            self._wait(place)

    def _wait(self, place: Place) -> None:
        """It waits for a place in the second room, and is dropped later than those that have not begun."""
        since = time.monotonic() + TLS_SECONDS
        place.idle_since = lambda: since
        self._ready[place] = None

    def _begin_those_that_wait(self) -> None:
        """In the order in which they came."""
        for place in list(self._ready):
            self._begin(place)

    def _whole(self, place: Place) -> bool:
        """Whether its first record of TLS has arrived. Ends it if that cannot be."""
        try:
            start = place.socket.recv(_RECORD, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            start = b""
        if start and start[0] == _HANDSHAKE:
            return len(start) >= 5 and len(start) >= min(5 + int.from_bytes(start[3:5]), _RECORD)
        if start:
            self.log.warning("connection from %s refused: it does not begin with TLS", place.peer)
        self._discard(place)
        return False

    def _begin(self, place: Place) -> bool:
        """Into the second room, and over to whoever serves it. False if there is no place."""
        began = time.monotonic()
        try:
            with self._lock:
                dropped = self._handshakes.enter(place, place._address, began - SHAKING_SECONDS)
                self._arrivals.leave(place)
        except Full:
            return False
        self._ready.pop(place, None)
        if self._waiting.pop(place.socket.fileno(), None) is not None:
            self._poll.unregister(place.socket)
        place.idle_since = lambda: began
        if dropped is not None:
            self.log.warning("connection from %s dropped for a newer one: it showed no certificate", dropped.peer)
            self._refuse(dropped)
        try:
            place.socket.setblocking(True)
            self._take(place)
        except Exception:
            self.log.exception("a connection could not be taken")
            place.socket.close()
            self._leave(place)
        return True

    def _look(self, now: float) -> None:
        self.log.flush()
        if self._paused_until and now >= self._paused_until:
            self._paused_until = 0.0
            self._poll.modify(self._listening, select.EPOLLIN)
        with self._lock:
            late = [place for place in self._all if place._due <= now]
        for place in late:
            self.log.warning("connection from %s ended: it did not %s in time", place.peer, place._wanted)
            place.relax()
            if place in self._arrivals:
                self._discard(place)
            else:
                self._refuse(place)

    def _discard(self, place: Place) -> None:
        """End a connection of the first room."""
        place.refused = True
        self._ready.pop(place, None)
        self._waiting.pop(place.socket.fileno(), None)
        place.socket.close()  # which takes it out of the poll as well
        self._leave(place)

    # -- any thread --------------------------------------------------------------------------------------------------

    def _refuse(self, place: Place) -> None:
        place.refused = True
        place.cut()

    def _identify(self, place: Place, component: Hashable) -> None:
        with self._lock:
            dropped = self._components.enter(place, component)
            self._handshakes.leave(place)
            place.relax()
        if dropped is not None:
            self.log.warning("%s: connection from %s, idle, dropped for a newer one", component, dropped.peer)
            self._refuse(dropped)

    def _leave(self, place: Place) -> None:
        with self._lock:
            self._all.discard(place)
            for room in (self._arrivals, self._handshakes, self._components):
                room.leave(place)


def listen(address: Address) -> tuple[socket.socket, Address]:
    """A listening socket, and where it listens: with the port that was chosen for port 0. Raises CannotListen."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        made = socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except OSError as problem:
        raise CannotListen(address=str(address), detail=problem.strerror or str(problem)) from problem
    return made, Address(address.host, made.getsockname()[1])


def _names(peer: tuple[Any, ...]) -> tuple[str, Hashable]:
    """A connection's peer for messages, and the group that its address belongs to: one host has a whole /64 of IPv6."""
    host, port = str(peer[0]), int(peer[1])
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        group: Hashable = mapped or int(address) >> 64
    else:
        group = address
    return str(Address(host, port)), group
