"""Hundreds of recovery points: boot of any of them, and retention."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import attrs

from asrcore.units import MiB
from tests.bench._cluster import BORG, BORG_CHUNKS, ENGINE, PLACE, SOURCE, Cluster, synced
from tests.bench._stats import OURS, Measured, Result
from tests.lab._site import wait_until

TITLE = "Boot of any recovery point, and retention"
POINTS = 500
QUICK_POINTS = 12
CHANGED = 1 * MiB
"""Bytes that differ from point to point, in 16 blocks."""
DROPPED = 50
QUICK_DROPPED = 5
BOOT_SECONDS = 90.0
POLL_SECONDS = 0.005
KERNEL_RUNS = b"LAB-"
"""The guest's first output: its kernel has started and runs the first process."""
REPOSITORY, COPY = f"{PLACE}/borg", "/srv/copy.raw"


def measure(field: Cluster) -> Result:
    """Boots of random points, in turn with plain starts of the same guest; then points are deleted."""
    count = QUICK_POINTS if field.quick else POINTS
    dropped = QUICK_DROPPED if field.quick else DROPPED
    with field.guest("points") as guest:
        field.rig.protect(guest)
        field.say(f"  {count} points")
        cycles = []
        while len(field.rig.points(guest)) < count:
            field.change([guest], [], scattered=CHANGED)
            cycles.append(field.measured("cycle", guest, keep=True))
        field.lab.sites[SOURCE].virsh("destroy", guest)
        dice = random.Random(count)
        points = field.rig.points(guest)
        chosen = iter([points[0], points[-1], *dice.sample(points, min(20, count))])
        rounds = field.interleave(
            {OURS: lambda: _test(field, guest, next(chosen)), "virsh start": lambda: _start(field, guest)},
            rounds=field.few,
        )
        some = min(10, len(cycles) // 2)
        rounds["cycle with few points"] = cycles[:some]
        rounds["cycle with all points"] = cycles[-some:]
        victims = dice.sample(points[:-1], min(dropped * field.rounds, count // 2))

        def drop() -> Measured:
            now = [victims.pop() for _ in range(min(dropped, len(victims)))]
            done = field.measured("drop", guest, now)
            return attrs.evolve(done, more={"points": len(now)})

        retention: dict[str, Callable[[], Measured]] = {"drop of points": drop}
        times = max(1, len(victims) // dropped)
        if not field.quick:
            retention["borg delete"] = _borg_archives(field, times)
        rounds.update(field.interleave(retention, rounds=times))
        field.remove(REPOSITORY)
        field.remove(COPY)
    extra = median(item.seconds for item in rounds[OURS]) - median(item.seconds for item in rounds["virsh start"])
    return Result("points", f"{TITLE} ({count} points)", rounds, {"boot_any_point_extra_seconds": extra})


def _until_kernel(find: Callable[[], Path | None]) -> None:
    """Wait until the console shows that the kernel has started."""

    def runs() -> bool:
        path = find()
        return path is not None and KERNEL_RUNS in path.read_bytes()

    wait_until(runs, "the guest's kernel has started", BOOT_SECONDS, POLL_SECONDS)


def _test(field: Cluster, guest: str, point: str) -> Measured:
    """From the command to the kernel of the replica's machine: the command as an operator types it, start-up
    included."""
    place = field.lab.host_path(ENGINE, "/srv/console")
    before = set(place.glob("*"))
    begun = time.monotonic()
    command = field.asr("failover", "test", guest, "--point", point)
    _until_kernel(lambda: next(iter(set(place.glob(f"{guest}*")) - before), None))
    seconds = time.monotonic() - begun
    _, trouble = command.communicate(timeout=BOOT_SECONDS)
    if command.returncode:
        raise RuntimeError(f"asr failover test: exit status {command.returncode}: {trouble.decode()}")
    field.rig.job("failover_cleanup", guest)
    return Measured(seconds)


def _start(field: Cluster, guest: str) -> Measured:
    """From `virsh start` at the guest's own site to its kernel."""
    console = field.lab.host_path(SOURCE, f"/srv/console/{guest}.log")
    console.write_bytes(b"")
    begun = time.monotonic()
    field.lab.sites[SOURCE].virsh("start", guest)
    _until_kernel(lambda: console)
    seconds = time.monotonic() - begun
    field.lab.sites[SOURCE].virsh("destroy", guest)
    return Measured(seconds)


def _borg_archives(field: Cluster, count: int) -> Callable[[], Measured]:
    """This many archives with the same change from one to the next; deletes one and frees its space."""
    copy = field.lab.host_path(ENGINE, COPY)
    field.lab.run_in(ENGINE, ["cp", "--sparse=always", field.disk.raw, COPY], timeout=600)
    field.peer(f"{BORG} init -e none {REPOSITORY}")
    for number in range(count + 1):
        field.peer(f"{BORG} create {BORG_CHUNKS} {REPOSITORY}::{number} {COPY}")
        field.change([], [copy], scattered=CHANGED)
    left = iter(range(count))

    def delete() -> Measured:
        script = f"{BORG} delete {REPOSITORY}::{next(left)} && {BORG} compact {REPOSITORY}"
        return attrs.evolve(field.peer(synced(script)), more={"points": 1})

    return delete
