"""Verification of a replica that is equal."""

from __future__ import annotations

from tests.bench._field import TARGET, Field
from tests.bench._stats import OURS, Measured, Result, ratio
from tests.system.rig import TARGETS

TITLE = "Verification of an equal replica"


def measure(field: Field) -> Result:
    """Against qemu-img compare and cmp of the same export and the same replica."""
    with field.guest("verify") as guest:
        field.rig.protect(guest)

        def replica() -> str:
            known = field.rig.protection(guest)
            images = field.rig.point_images(guest)[field.rig.points(guest)[-1]]
            inside = images["vda"].relative_to(field.rig.home(guest))
            return f"{TARGETS[TARGET]}/replicas/{known['replica_id']}/{inside}"

        def compare() -> Measured:
            return field.reader(guest, f'qemu-img compare -f raw -F raw "$URI" {replica()}')

        rounds = field.interleave({OURS: lambda: field.ours("verify", guest), "qemu-img compare": compare})
    return Result("verify", TITLE, rounds, {"verify_vs_qemu_img_compare": ratio(rounds, "qemu-img compare")})
