"""A cycle of a running guest in which nothing has changed."""

from __future__ import annotations

from statistics import median

from tests.bench._cluster import Cluster
from tests.bench._stats import OURS, Result

TITLE = "Idle cycle of a running guest"
CYCLES = 20
QUICK_CYCLES = 8


def measure(field: Cluster) -> Result:
    """Cycles one after the other, as the replication service runs them; the first is not counted."""
    with field.guest("idle") as guest:
        field.rig.protect(guest)
        field.worker("cycle", guest)
        cycles = {OURS: lambda: field.measured("cycle", guest)}
        rounds = field.interleave(cycles, rounds=QUICK_CYCLES if field.quick else CYCLES)
    figures = {
        "idle_cycle_seconds": median(item.seconds for item in rounds[OURS]),
        "idle_cycle_cpu_seconds": median(item.cpu_seconds for item in rounds[OURS]),
    }
    return Result("idle", TITLE, rounds, figures)
