"""Directories of the machine that a site's host changes as if it were alone on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

__all__ = ["PRIVATE", "keep_apart"]

PRIVATE = "/srv/private"
"""A directory of the host's own, in memory."""

_LIBVIRT = ("/etc/libvirt", "/var/lib/libvirt")


def keep_apart(run: Callable[[str], object], directories: Iterable[str]) -> None:
    """What the host changes in the directories nobody else sees, and it is gone with the lab.

    `run` gives a line to the host's shell. What the lab mounted there for libvirt stays. Nothing is made or removed on
    the machine for it: removing a directory takes away, in every namespace, what is mounted there.
    """
    directories = list(dict.fromkeys(directories))
    run(f"mkdir {PRIVATE} && mount -t tmpfs -o mode=755 tmpfs {PRIVATE}")
    libvirt = [path for path in _LIBVIRT if any(path.startswith(f"{above}/") for above in directories)]
    for number, path in enumerate(libvirt):
        run(f"mkdir {PRIVATE}/libvirt{number} && mount --bind {path} {PRIVATE}/libvirt{number}")
    for number, path in enumerate(directories):
        upper, work = (f"{PRIVATE}/{part}{number}" for part in ("upper", "work"))
        run(
            f"mkdir {upper} {work} && "
            f"mount -t overlay -o lowerdir={path},upperdir={upper},workdir={work} overlay {path}"
        )
    for number, path in enumerate(libvirt):
        run(f"mount --bind {PRIVATE}/libvirt{number} {path}")
