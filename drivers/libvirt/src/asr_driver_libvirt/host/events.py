"""libvirt's event loop: one daemon thread per process. Keep-alive needs it, or a cut link hangs callers for ever."""

from __future__ import annotations

import os
import threading

import libvirt

__all__ = ["start"]

_lock = threading.Lock()
_started_in = 0


def start() -> None:
    """Run the loop; once per process, from any thread, before the first connection is opened."""
    global _started_in  # noqa: PLW0603 - libvirt allows one event implementation per process, so it is one here too
    with _lock:
        if _started_in == os.getpid():
            return
        if _started_in:
            # After fork() the loop's thread is gone and its state is not to be used (libvirt's own rule).
            raise RuntimeError("a process that has used libvirt cannot use it after a fork")
        # libvirt prints every error to stderr by default; this driver raises them as exceptions.
        libvirt.registerErrorHandler(lambda *_: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run, name="libvirt-events", daemon=True).start()
        _started_in = os.getpid()


def _run() -> None:
    # A timer keeps the loop turning even when it has nothing to watch: without one, a file descriptor that another
    # thread adds is noticed only at the next event.
    libvirt.virEventAddTimeout(1000, lambda *_: None, None)
    while True:
        libvirt.virEventRunDefaultImpl()
