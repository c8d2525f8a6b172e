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

from asrcore.errors import AsrError, ServerNameTaken, ServerReplaced, VaultInUse
from asrcore.model.epoch import shown
from asrcore.model.health import CLOCK_TOLERANCE
from asrcore.service.assign import assign
from asrcore.units import format_duration
from asrcore.vault import SessionLock, Vault

__all__ = ["BEATS", "LEASE", "LINGER", "Member", "ServerIdentity"]

_log = logging.getLogger(__name__)

LEASE = 15.0
"""Seconds of silence after which a server's machines are given to others: three cycles at the shortest interval."""
BEATS = 5
"""Heartbeats in a lease: one or two may be late on a busy host."""
LINGER = 30.0
"""Seconds until the database has noticed that the host of a session is gone, and releases its lock."""


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
    """Membership of one server; `alone`: no other one may work on the vault.

    `lost` is called once, in another thread, when this server must end: others have taken over its machines, or another
    engine has the vault's lock. `lock`: the vault's, which this takes, watches, and takes again when its session was
    lost; the caller releases it.
    """

    def __init__(
        self,
        vault: Vault,
        identity: ServerIdentity,
        lost: Callable[[AsrError], None],
        *,
        lock: SessionLock | None = None,
        alone: bool = False,
    ) -> None:
        self._vault = vault
        self._identity = identity
        self._lost = lost
        self._lock = lock
        self._alone = alone
        self._ended = threading.Event()
        self._skewed = False
        self._thread: threading.Thread | None = None
        self._beat_at = 0.0
        self._judges_at = 0.0
        self._refused_at: float | None = None  # the first refusal of the lock since it was last held

    def join(self, stop: threading.Event) -> None:
        """Register until `leave`. A server that died keeps its name, or the vault, for its lease, and the lock until
        the database has noticed its end, so this waits that long; not for one that shows that it lives.

        Raises ServerNameTaken, VaultInUse.
        """
        lease = self._identity.lease
        ends = time.monotonic() + max(1.5 * lease, LINGER)
        others = self._others()  # seconds of silence
        while True:
            try:
                self._enter()
                break
            except (ServerNameTaken, VaultInUse):
                now = self._others()
                lives = any(silent < others.get(session, 0.0) for session, silent in now.items())
                others |= now
                if lives or not others or time.monotonic() > ends or stop.wait(lease / BEATS):
                    self._leave()
                    raise
        # One that starts with the database may find the others silent because that was away.
        self._beat_at = time.monotonic()
        self._judges_at = self._beat_at + lease
        self.plan()
        self._thread = threading.Thread(target=self._live, name="asr-member", daemon=True)
        self._thread.start()

    def _others(self) -> dict[str, float]:
        servers = self._vault.servers()
        return {item.session: item.silent for item in servers if item.session != self._identity.session}

    def _enter(self) -> None:
        identity = self._identity
        self._vault.join(
            identity.name,
            identity.session,
            host=identity.host,
            sites=identity.sites,
            lease=identity.lease,
            version=version("asrcore"),
            alone=self._alone,
        )
        if self._lock is not None:
            self._lock.keep()

    def leave(self) -> None:
        """Release all machines; no work on them may be under way here any more."""
        self._ended.set()
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._leave()

    def _leave(self) -> None:
        try:
            self._vault.leave()
        except AsrError as problem:  # then its machines are given to others when the lease has expired
            _log.warning("%s", problem)

    def _live(self) -> None:
        while not self._ended.wait(self._identity.lease / BEATS):
            try:
                self._beat()
                self.plan()
                self._compare_clocks()
            except (ServerReplaced, VaultInUse) as problem:
                _log.error("%s; %s", problem, problem.action_text)
                self._lost(problem)
                return
            except AsrError as problem:  # for example the vault does not answer: if that lasts, others notice
                _log.error("%s; %s", problem, problem.action_text)
            except Exception:  # noqa: BLE001 - a defect in planning must not silence the server
                _log.exception("assigning machines failed unexpectedly")

    def _compare_clocks(self) -> None:
        """Report once when this host's clock differs from the database's, and once when it no longer does."""
        skew = self._vault.clock_skew(time.time)
        if skew is None or (abs(skew) > CLOCK_TOLERANCE) is self._skewed:
            return
        self._skewed = not self._skewed
        way = "ahead of" if skew > 0 else "behind"
        text = f"the clock of {self._identity.host} agrees with the database's again"
        if self._skewed:
            text = f"the clock of {self._identity.host} is {format_duration(abs(skew))} {way} the database's"
        _log.warning("%s", text)
        self._vault.add_event(at=time.time(), machine="", kind="server", text=text)

    def _beat(self) -> None:
        """Renew the lease, and look after the lock."""
        lease = self._identity.lease
        self._vault.beat()
        now = time.monotonic()
        if now - self._beat_at > lease / 2:
            # The vault or this server was away. The others may just not have been able to beat either, and the
            # database has yet to notice that this server's former session ended.
            self._judges_at = now + lease
            self._refused_at = None
        self._beat_at = now
        if self._lock is None:
            return
        try:
            self._lock.keep()
        except VaultInUse:
            # Its own former session may hold it for LINGER; one that is refused because of this server has it for a
            # moment; and an upgrade, before it refuses. Another engine that works here has replaced this one's record.
            if self._refused_at is None:
                self._refused_at = now
            if now - self._refused_at > LINGER:
                raise
        else:
            self._refused_at = None

    def plan(self) -> None:
        """Assign machines that need a server, for example one that was just added."""
        vault = self._vault.for_others()  # what is logged is about machines of other servers, too
        for change in self._vault.assign(assign, spare_silent=time.monotonic() < self._judges_at):
            if not change.before:
                _log.info("%s is assigned to %s", change.name, change.server)
                continue
            text = f"{change.server} took over from {change.before}, epoch {shown(change.epoch)}"
            _log.warning("%s: %s", change.name, text)
            vault.add_event(at=time.time(), machine=change.name, kind="server", text=text)
