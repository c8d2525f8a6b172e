"""Socket options for a TCP connection to QEMU, by its file descriptor; hints, whose failure changes nothing."""

import socket
from contextlib import suppress

__all__ = ["acknowledge_at_once", "gather"]


def acknowledge_at_once(fd: int) -> None:
    """QEMU 7.2 sends small answers (its side of the negotiation, holes) in pieces and each only once the one before is
    acknowledged, for which Linux takes 40 ms unless the option is set before each wait. Measured: connecting 0.4
    instead of 88 ms, reading 1 MiB of holes 0.1 instead of 44 ms; data is read at the same speed."""
    _set(fd, socket.TCP_QUICKACK, 1)


def gather(fd: int, on: bool) -> None:
    """Send the requests that follow together when this is turned off. Sent one by one, each wakes the server (measured,
    16 reads of 64 KiB at a time: sending takes 0.10 s for 305 MiB instead of 0.25 s)."""
    _set(fd, socket.TCP_CORK, int(on))


def _set(fd: int, option: int, value: int) -> None:
    if fd < 0:
        return
    link = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)
    try:
        with suppress(OSError):
            link.setsockopt(socket.IPPROTO_TCP, option, value)
    finally:
        link.detach()  # libnbd's
