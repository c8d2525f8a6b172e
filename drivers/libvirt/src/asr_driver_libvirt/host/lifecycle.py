"""Starts and stops of a host's machines, from the events of its connection."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable

import libvirt

__all__ = ["Lifecycle"]

# Events may be lost with a connection; a waiting caller also checks this often (seconds).
LOOK_SECONDS = 0.5


class Lifecycle:
    """Of one connection: each connection gets a new one, so missed events are not mistaken for none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._starts: Counter[str] = Counter()
        self._heard = 0
        self._registered: list[int] = []
        self._id = uuid.uuid4().hex[:12]

    def register(self, conn: libvirt.virConnect) -> None:
        """Listen to a connection."""
        listen = conn.domainEventRegisterAny
        self._registered.append(listen(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._event, None))
        # Reports the end of a backup at once; abortJob returns before that.
        self._registered.append(listen(None, libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, self._job_ended, None))

    def unregister(self, conn: libvirt.virConnect) -> None:
        """Stop listening: while a listener is registered, closing a connection does not close it."""
        registered, self._registered = self._registered, []
        for callback in registered:
            with contextlib.suppress(libvirt.libvirtError):  # of a dead connection
                conn.domainEventDeregisterAny(callback)

    def _event(self, _conn: libvirt.virConnect, domain: libvirt.virDomain, event: int, *_: object) -> None:
        with self._changed:
            if event == libvirt.VIR_DOMAIN_EVENT_STARTED:
                self._starts[domain.UUIDString()] += 1
            self._heard += 1
            self._changed.notify_all()

    def _job_ended(self, *_: object) -> None:
        with self._changed:
            self._heard += 1
            self._changed.notify_all()

    def stamp(self, machine_id: str) -> str:
        """Equal stamps of a machine that is off both times: it was not started in between."""
        with self._changed:
            return f"starts:{self._id}.{self._starts[machine_id]}"

    def wait(self, true: Callable[[], bool], timeout: float) -> bool:
        """Wait until `true()`, asked at every event and at least every half second; False after `timeout` seconds."""
        end = time.monotonic() + timeout
        while True:
            heard = self._heard
            if true():
                return True
            left = end - time.monotonic()
            if left <= 0:
                return False
            with self._changed:
                # An event that came while `true` was asked must not be waited for.
                self._changed.wait_for(lambda: self._heard != heard, min(left, LOOK_SECONDS))  # noqa: B023
