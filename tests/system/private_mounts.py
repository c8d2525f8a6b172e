"""Directories of the machine that a site's host can change privately."""

from __future__ import annotations

from collections.abc import Callable, Iterable

__all__ = ["PRIVATE", "keep_apart"]

PRIVATE = "/srv/private"
"""A private directory of the host, in memory."""

_LIBVIRT = ("/etc/libvirt", "/var/lib/libvirt")


def keep_apart(run: Callable[[str], object], directories: Iterable[str]) -> None:
    """Changes that the host makes in the directories are not visible elsewhere, and are discarded with the lab.

    `run` passes a line to the host's shell. The lab's own mounts for libvirt stay. Nothing is created or deleted on the
    machine for it: deleting a directory removes, in every namespace, what is mounted there.
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
