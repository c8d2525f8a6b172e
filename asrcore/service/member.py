"""A process server's membership: it renews its lease, and assigns every machine to a server that is alive.

All servers do the same, so no server is a single point of failure. The vault lets one of them plan at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from importlib.metadata import version

import attrs

from asrcore.errors import AsrError, ServerNameTaken, ServerReplaced
from asrcore.service.assign import assign
from asrcore.vault import Vault

__all__ = ["BEATS", "LEASE", "Member", "ServerIdentity"]

_log = logging.getLogger(__name__)

LEASE = 15.0
"""Seconds of silence after which a server's machines are given to others: three cycles at the shortest interval."""
BEATS = 5
"""Heartbeats in a lease: one or two may be late on a busy host."""


@attrs.frozen
class ServerIdentity:
    """Who a process server is: its name, the session of this process, its host, and the sites it reaches (None: all).
    `lease` in seconds."""

    name: str
    session: str
    host: str
    sites: Collection[str] | None = None
    lease: float = LEASE


class Member:
    """`lost` is called once, in another thread, when others have taken over this server's machines: it must end."""

    def __init__(self, vault: Vault, identity: ServerIdentity, lost: Callable[[ServerReplaced], None]) -> None:
        self._vault = vault
        self._identity = identity
        self._lost = lost
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def join(self, stop: threading.Event) -> None:
        """Register until `leave`. A server that died keeps its name for its lease, so this waits that long.

        Raises ServerNameTaken.
        """
        identity = self._identity
        ends = time.monotonic() + 1.5 * identity.lease
        while True:
            try:
                self._vault.join(
                    identity.name,
                    identity.session,
                    host=identity.host,
                    sites=identity.sites,
                    lease=identity.lease,
                    version=version("asrcore"),
                )
                break
            except ServerNameTaken:
                if time.monotonic() > ends or stop.wait(identity.lease / BEATS):
                    raise
        self._plan()
        self._thread = threading.Thread(target=self._live, name="asr-member", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Release all machines; no work on them may be under way here any more."""
        self._ended.set()
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        try:
            self._vault.leave()
        except AsrError as problem:  # then its machines are given to others when the lease has expired
            _log.warning("%s", problem)

    def _live(self) -> None:
        while not self._ended.wait(self._identity.lease / BEATS):
            try:
                self._vault.beat()
                self._plan()
            except ServerReplaced as problem:
                _log.error("%s; %s", problem, problem.action_text)
                self._lost(problem)
                return
            except AsrError as problem:  # for example the vault does not answer: if that lasts, others notice
                _log.error("%s; %s", problem, problem.action_text)
            except Exception:  # noqa: BLE001 - a defect in planning must not silence the server
                _log.exception("assigning machines failed unexpectedly")

    def _plan(self) -> None:
        for change in self._vault.assign(assign):
            if not change.before:
                _log.info("%s is assigned to %s", change.name, change.server)
                continue
            text = f"{change.server} took over from {change.before}, epoch {change.epoch}"
            _log.warning("%s: %s", change.name, text)
            self._vault.add_event(at=time.time(), machine=change.name, kind="server", text=text)
