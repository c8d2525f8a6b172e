"""The initial copy of a running guest, with zero detection, until durable."""

from __future__ import annotations

import attrs

from tests.bench._cluster import BORG, BORG_CHUNKS, PLACE, SOURCE, TARGET, Cluster, synced
from tests.bench._stats import OURS, Measured, Result, ratio

TITLE = "Initial copy of a running guest"
OUTPUT = f"{PLACE}/peer"


def measure(field: Cluster) -> Result:
    """Against nbdcopy and qemu-img from an export of the same guest, and borg, cp and dd from the same file."""
    raw = field.disk.raw
    with field.guest("initial") as guest:

        def ours() -> Measured:
            done = field.ours("protect", guest, source=SOURCE, target=TARGET, policy="still")
            field.rig.job("unprotect", guest)
            # The peers are given an export, so asrcore is timed from the frozen view to the point in the vault.
            return attrs.evolve(
                done, seconds=done.more["from_view_seconds"], more={**done.more, "job_seconds": done.seconds}
            )

        def cleared(done: Measured) -> Measured:
            field.remove(OUTPUT)
            return done

        def exported(script: str) -> Measured:
            return cleared(field.reader(guest, synced(script)))

        def from_file(script: str) -> Measured:
            return cleared(field.peer(synced(script)))

        contenders = {
            OURS: ours,
            "nbdcopy": lambda: exported(f'nbdcopy "$URI" {OUTPUT}'),
            "qemu-img convert": lambda: exported(f'qemu-img convert -f raw -O raw -W -m 16 "$URI" {OUTPUT}'),
            "cp": lambda: from_file(f"cp --sparse=always {raw} {OUTPUT}"),
            "dd": lambda: from_file(f"dd if={raw} of={OUTPUT} bs=1M conv=sparse"),
            "borg": lambda: from_file(
                f"{BORG} init -e none {OUTPUT} && {BORG} create {BORG_CHUNKS} {OUTPUT}::one {raw}"
            ),
        }
        if field.quick:
            contenders = {name: contenders[name] for name in (OURS, "nbdcopy")}
        rounds = field.interleave(contenders)
    return Result("initial", TITLE, rounds, {"initial_copy_vs_nbdcopy": ratio(rounds, "nbdcopy")})
