"""A resync: tracking is lost, 1 % of the disk differs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from tests.bench._cluster import PLACE, Cluster, evict, synced
from tests.bench._disk import DISK_SIZE
from tests.bench._stats import OURS, Measured, Result, median, ratio, sealed
from tests.bench._two_sites import APART, NOT_APART, two_sites

TITLE = "Resync of a replica that differs by 1 %, until it is consistent again"
COPY, MIRROR, COLD = "/srv/copy.raw", "mirror.raw", "cold.raw"
SCATTERED = DISK_SIZE // 100


def measure(field: Cluster) -> Result:
    """Against rsync of a raw file with the same changes. Bytes on the wire are measured with an engine at the site of
    another such guest and a master target at the other site: each hashes its own side.

    asrcore's replica is read from disk. rsync reads its mirror from the page cache, where it left it, and a second
    mirror from disk.
    """
    with ExitStack() as stack:
        guests = [guest := stack.enter_context(field.guest("resync"))]
        field.rig.protect(guest)
        files = [COPY, f"{PLACE}/{MIRROR}"]
        different = 0

        def change() -> None:
            nonlocal different
            different = field.change(guests, [field.lab.host_path("b", COPY)], scattered=SCATTERED)

        def rsync(mirror: str) -> Measured:
            return field.peer(synced(f"rsync --inplace --no-whole-file --ignore-times {COPY} {PLACE}/{mirror}"))

        def cold() -> Measured:
            evict(field.path(COLD))
            return rsync(COLD)

        contenders: dict[str, Callable[[], Measured]] = {
            OURS: lambda: field.ours("resync", guest, now=True),
            "rsync": lambda: rsync(MIRROR),
        }
        if not field.quick:
            guests.append(stack.enter_context(field.guest("resync-apart")))
            apart = stack.enter_context(two_sites(field, guests[-1]))
            files.append(f"{PLACE}/{COLD}")
            contenders |= {APART: lambda: apart("resync", now=True), "rsync, from disk": cold}
        for path in files:
            field.lab.run_in("b", ["cp", "--sparse=always", field.disk.raw, path], timeout=600)
        rounds = sealed(field.interleave(contenders, before=change), APART)
        for path in files:
            field.remove(path)
    figures = {"resync_vs_rsync": ratio(rounds, "rsync")}
    if APART not in rounds:
        return Result("resync", TITLE, rounds, figures, [NOT_APART])
    figures["resync_bytes_ratio"] = median(rounds[APART], "link_bytes") / different
    return Result("resync", TITLE, rounds, figures)
