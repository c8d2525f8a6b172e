"""A resync: tracking is lost, 1 % of the disk differs."""

from __future__ import annotations

import os
from statistics import median

from tests.bench._apart import APART, two_sites
from tests.bench._disk import DISK_SIZE
from tests.bench._field import PLACE, Field, synced
from tests.bench._stats import OURS, Measured, Result, ratio, sealed

TITLE = "Resync of a replica that differs by 1 %, until it is whole again"
COPY, MIRROR, COLD = "/srv/copy.raw", "mirror.raw", "cold.raw"
SCATTERED = DISK_SIZE // 100


def measure(field: Field) -> Result:
    """Against rsync of a raw file with the same changes. What goes over the wire is told of an engine beside another
    such guest and a master target at the other site: each hashes its own side.

    Our replica is read from its disk. rsync reads its mirror from memory, where it left it, and a second one from disk.
    """
    with field.guest("resync") as guest, field.guest("resync-apart") as far, two_sites(field, far) as apart:
        field.rig.protect(guest)
        files = [COPY, f"{PLACE}/{MIRROR}", f"{PLACE}/{COLD}"]
        for path in files:
            field.lab.run_in("b", ["cp", "--sparse=always", field.disk.raw, path], timeout=600)
        different = 0

        def change() -> None:
            nonlocal different
            different = field.change([guest, far], [field.lab.host_path("b", COPY)], scattered=SCATTERED)

        def rsync(mirror: str) -> Measured:
            return field.peer(synced(f"rsync --inplace --no-whole-file --ignore-times {COPY} {PLACE}/{mirror}"))

        def cold() -> Measured:
            with field.path(COLD).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return rsync(COLD)

        contenders = {
            OURS: lambda: field.ours("resync", guest, now=True),
            APART: lambda: apart("resync", now=True),
            "rsync": lambda: rsync(MIRROR),
            "rsync, from disk": cold,
        }
        if field.quick:
            del contenders["rsync, from disk"]
        rounds = sealed(field.interleave(contenders, before=change), APART)
        for path in files:
            field.remove(path)
    bytes_moved = median(item.more["link_bytes"] for item in rounds[APART])
    figures = {"resync_vs_rsync": ratio(rounds, "rsync"), "resync_bytes_ratio": bytes_moved / different}
    return Result("resync", TITLE, rounds, figures)
