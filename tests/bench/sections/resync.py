"""A resync: tracking is lost, 1 % of the disk differs."""

from __future__ import annotations

from statistics import median

from tests.bench._apart import APART, two_sites
from tests.bench._disk import DISK_SIZE
from tests.bench._field import PLACE, Field, synced
from tests.bench._stats import OURS, Result, ratio, sealed

TITLE = "Resync of a replica that differs by 1 %, until it is whole again"
COPY, MIRROR = "/srv/copy.raw", f"{PLACE}/mirror.raw"
SCATTERED = DISK_SIZE // 100


def measure(field: Field) -> Result:
    """Against rsync of a raw file with the same changes. What goes over the wire is told of an engine beside another
    such guest and a master target at the other site: each hashes its own side."""
    with field.guest("resync") as guest, field.guest("resync-apart") as far, two_sites(field, far) as apart:
        field.rig.protect(guest)
        for path in (COPY, MIRROR):
            field.lab.run_in("b", ["cp", "--sparse=always", field.disk.raw, path], timeout=600)
        different = 0

        def change() -> None:
            nonlocal different
            different = field.change([guest, far], [field.lab.host_path("b", COPY)], scattered=SCATTERED)

        rsync = f"rsync --inplace --no-whole-file --ignore-times {COPY} {MIRROR}"
        contenders = {
            OURS: lambda: field.ours("resync", guest, now=True),
            APART: lambda: apart("resync", now=True),
            "rsync": lambda: field.peer(synced(rsync)),
        }
        rounds = sealed(field.interleave(contenders, before=change), APART)
        field.remove(COPY)
        field.remove(MIRROR)
    bytes_moved = median(item.more["link_bytes"] for item in rounds[APART])
    figures = {"resync_vs_rsync": ratio(rounds, "rsync"), "resync_bytes_ratio": bytes_moved / different}
    return Result("resync", TITLE, rounds, figures)
