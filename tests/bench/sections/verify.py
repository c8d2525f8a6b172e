"""Verification of a replica that is equal."""

from __future__ import annotations

from pathlib import Path

from tests.bench._cluster import TARGET, Cluster, evict
from tests.bench._stats import OURS, Measured, Result, ratio
from tests.system.rig import TARGETS

TITLE = "Verification of an equal replica"
PEER = "qemu-img compare"


def measure(field: Cluster) -> Result:
    """Against qemu-img compare of the same export and the same replica, both read from disk. Data in the page cache
    proves nothing about the disk, but the peer is also shown reading from there."""
    with field.guest("verify") as guest:
        field.rig.protect(guest)

        def image() -> Path:
            return field.rig.point_images(guest)[field.rig.points(guest)[-1]]["vda"]

        def compare() -> Measured:
            known = field.rig.protection(guest)
            inside = image().relative_to(field.rig.home(guest))
            replica = f"{TARGETS[TARGET]}/replicas/{known['replica_id']}/{inside}"
            return field.reader(guest, f'qemu-img compare -f raw -F raw "$URI" {replica}')

        def from_disk() -> Measured:
            evict(image())
            return compare()

        def from_memory() -> Measured:
            compare()
            return compare()

        contenders = {OURS: lambda: field.ours("verify", guest), PEER: from_disk}
        if not field.quick:
            contenders[f"{PEER}, from memory"] = from_memory
        rounds = field.interleave(contenders)
    return Result("verify", TITLE, rounds, {"verify_vs_qemu_img_compare": ratio(rounds, PEER)})
