"""A delta: 5 % of the disk in random blocks of 64 KiB and 100 MiB in a row, from the command to the durable point."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from asrcore.units import MiB
from tests.bench._cluster import BORG, BORG_CHUNKS, PLACE, SOURCE, Cluster, synced
from tests.bench._disk import DISK_SIZE
from tests.bench._stats import OURS, Measured, Result, median, ratio, sealed
from tests.bench._two_sites import APART, NOT_APART, two_sites

TITLE = "Delta of 5 % in random blocks and 100 MiB in a row"
SCATTERED = DISK_SIZE // 20
SEQUENTIAL = 100 * MiB
BACKUP = f"{PLACE}/virtnbdbackup"
REPOSITORY = f"{PLACE}/borg"
COPY, MIRROR = "/srv/copy.raw", f"{PLACE}/mirror.raw"


def measure(field: Cluster) -> Result:
    """Against virtnbdbackup of an equal guest, and borg and rsync of a raw file with the same changes. Bytes on the
    wire are measured with an engine at the site of a third such guest and a master target at the other site."""
    with ExitStack() as stack:
        guests = [stack.enter_context(field.guest(name)) for name in ("delta", "delta-peer")]
        guest, other = guests
        field.rig.protect(guest)
        _virtnbdbackup(field, other, "full")
        copy = field.lab.host_path("b", COPY)
        dirty = 0
        archives = iter(range(1000))
        contenders: dict[str, Any] = {
            OURS: lambda: field.ours("replicate", guest, keep=True),
            "virtnbdbackup": lambda: _virtnbdbackup(field, other, "inc"),
        }
        files = []
        if not field.quick:
            guests.append(stack.enter_context(field.guest("delta-apart")))
            apart = stack.enter_context(two_sites(field, guests[-1]))
            contenders[APART] = lambda: apart("replicate", keep=True)
            files = [copy]
            field.lab.run_in("b", ["cp", "--sparse=always", field.disk.raw, COPY], timeout=600)
            field.lab.run_in("b", ["cp", "--sparse=always", field.disk.raw, MIRROR], timeout=600)
            field.peer(f"{BORG} init -e none {REPOSITORY} && {BORG} create {BORG_CHUNKS} {REPOSITORY}::first {COPY}")
            contenders["rsync"] = lambda: field.peer(
                synced(f"rsync --inplace --no-whole-file --ignore-times {COPY} {MIRROR}")
            )
            contenders["borg"] = lambda: field.peer(
                synced(f"{BORG} create {BORG_CHUNKS} {REPOSITORY}::{next(archives)} {COPY}")
            )

        def change() -> None:
            nonlocal dirty
            dirty = field.change(guests, files, scattered=SCATTERED, sequential=SEQUENTIAL)

        rounds = sealed(field.interleave(contenders, before=change, rounds=field.few), APART)
        for site, path in (("b", COPY), ("b", MIRROR), ("b", REPOSITORY), ("a", BACKUP)):
            field.remove(path, site)
    figures = {
        "delta_vs_virtnbdbackup": ratio(rounds, "virtnbdbackup"),
        "delta_bytes_read_ratio": median(rounds[OURS], "bytes_read") / dirty,
    }
    if APART not in rounds:
        return Result("delta", TITLE, rounds, figures, [NOT_APART])
    figures["delta_bytes_wire_ratio"] = median(rounds[APART], "link_bytes") / dirty
    return Result("delta", TITLE, rounds, figures)


def _virtnbdbackup(field: Cluster, guest: str, level: str) -> Measured:
    """It runs at the guest's site, since its remote mode needs SSH: it uses a unix socket instead of the link, which is
    to its advantage. It writes to a file system made like the replicas'."""
    options = f"-S /srv/images -f /run/virtnbdbackup.sock -n -o {BACKUP}"
    return field.peer(synced(f"virtnbdbackup -d {guest} -l {level} {options}"), SOURCE)
