"""Keep-alives: one thread of the process sends them on all its channels."""

from __future__ import annotations

import threading
import time
import weakref
from typing import ClassVar, Protocol

from asrcore.errors import AsrError

__all__ = ["Keeper"]


class _Kept(Protocol):
    """A channel; it has ended when `error` is set."""

    error: AsrError | None

    def keep_alive(self) -> None:
        """Send a keep-alive if nothing else was sent for a while."""


class Keeper:
    """The thread; it ends with the last channel."""

    _channels: ClassVar[weakref.WeakSet[_Kept]] = weakref.WeakSet()
    _lock = threading.Lock()
    _thread: threading.Thread | None = None

    @classmethod
    def take(cls, channel: _Kept) -> None:
        """Keep it alive from now on."""
        with cls._lock:
            cls._channels.add(channel)
            if cls._thread is None or not cls._thread.is_alive():
                cls._thread = threading.Thread(target=cls._keep, name="keep-alive", daemon=True)
                cls._thread.start()

    @classmethod
    def _keep(cls) -> None:
        while True:
            time.sleep(0.25)
            with cls._lock:
                channels = [channel for channel in cls._channels if channel.error is None]
                if not channels:
                    cls._thread = None
                    return
            for channel in channels:
                channel.keep_alive()
