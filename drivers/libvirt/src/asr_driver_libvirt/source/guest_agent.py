"""Freezing a guest's file systems through its agent, with hard limits: a guest is never left frozen."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Self

import libvirt

from asrcore.model.point import Consistency

__all__ = ["GuestFreeze"]

_log = logging.getLogger(__name__)

# How long and how often a guest that did not thaw is asked again (seconds).
RESCUE_SECONDS = 120.0
RESCUE_PAUSE = 2.0
_TIMEOUT_CODES = (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_AGENT_UNSYNCED)


class GuestFreeze:
    """`with GuestFreeze(...) as freeze:` take the view, then `freeze.obtained()`.

    Leaving the block thaws. A timer thaws when the limit is over, whatever the block does; then what was obtained is
    only crash consistency. The agent's own answers are limited too, and the limit taken back afterwards, since
    libvirt keeps it per machine for all its users.
    """

    def __init__(self, domain: libvirt.virDomain, wanted: Consistency, limit: float, *, agent: bool) -> None:
        """`limit`: seconds from the first file system frozen to all thawed. `agent`: its channel is connected."""
        self._domain = domain
        self._wanted = wanted if agent else Consistency.CRASH
        self._limit = limit
        self._lock = threading.Lock()
        self._frozen = False
        self._timer: threading.Timer | None = None
        self.problem = ""
        if not agent and wanted is not Consistency.CRASH:
            self.problem = "the guest agent is not connected"

    def __enter__(self) -> Self:
        if self._wanted in (Consistency.FILESYSTEM, Consistency.APPLICATION):
            self._freeze()
        return self

    def _freeze(self) -> None:
        if self._wanted is Consistency.APPLICATION and not self._has_vss():
            # On other guests the agent may or may not run hook scripts and does not report it: only the lesser
            # consistency is certain.
            self._wanted = Consistency.FILESYSTEM
        begun = time.monotonic()
        try:
            self._domain.agentSetResponseTimeout(max(1, int(self._limit)), 0)
            count = self._domain.fsFreeze()
        except libvirt.libvirtError as error:
            self.problem = error.get_error_message() or str(error)
            _log.warning("guest not frozen: %s", self.problem)
            if error.get_error_code() in _TIMEOUT_CODES:
                # It may still freeze, after the caller stopped waiting.
                self._thaw()
            else:
                self._reset_limit()
            return
        self._frozen = True
        if count == 0:  # a guest with ZFS only, or whose agent may freeze none of its file systems
            self._wanted = Consistency.CRASH
            self.problem = "the guest agent froze no file system"
        left = max(0.1, self._limit - (time.monotonic() - begun))
        self._timer = threading.Timer(left, self._too_long)
        self._timer.daemon = True
        self._timer.start()

    def _has_vss(self) -> bool:
        with contextlib.suppress(libvirt.libvirtError):
            reported = self._domain.guestInfo(libvirt.VIR_DOMAIN_GUEST_INFO_OS, 0)
            return reported.get("os.id") == "mswindows"
        return False

    def expected(self) -> Consistency:
        """What the view will have if it is taken now."""
        with self._lock:
            return self._wanted if self._frozen else Consistency.CRASH

    def _too_long(self) -> None:
        with self._lock:
            held, self._frozen = self._frozen, False
        if held:
            self.problem = f"the view was not taken within {self._limit:g} s"
            self._thaw()

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            held, self._frozen = self._frozen, False
        if held:
            self._thaw()

    def _thaw(self) -> None:
        if not self._try_thaw():
            threading.Thread(target=self._rescue, name="guest-thaw", daemon=True).start()

    def _try_thaw(self) -> bool:
        try:
            self._domain.fsThaw()
        except libvirt.libvirtError as error:
            if error.get_error_code() in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                return True  # it does not run any more
            _log.warning("guest not thawed yet: %s", error)
            return False
        self._reset_limit()
        return True

    def _rescue(self) -> None:
        pause = threading.Event()
        end = time.monotonic() + RESCUE_SECONDS
        while time.monotonic() < end:
            pause.wait(RESCUE_PAUSE)
            if self._try_thaw():
                return
        self._reset_limit()
        _log.error("guest may still be frozen after %g s of trying; run `virsh domfsthaw`", RESCUE_SECONDS)

    def _reset_limit(self) -> None:
        with contextlib.suppress(libvirt.libvirtError):
            self._domain.agentSetResponseTimeout(libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_DEFAULT, 0)
