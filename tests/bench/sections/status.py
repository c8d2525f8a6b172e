"""`asr status` of 50 machines: the command as an operator types it, start-up included."""

from __future__ import annotations

import compileall
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import asrcore
from asrcore.model.extent import Extent
from asrcore.model.point import Consistency, Mark, RecoveryPoint
from asrcore.model.policy import Policy
from asrcore.model.protection import CycleMode, PendingCycle, Protection, Site
from asrcore.model.state import Event
from asrcore.units import MiB
from asrcore.vault import CycleStats, Vault
from tests.bench._cluster import Cluster
from tests.bench._stats import OURS, Measured, Result

TITLE = "`asr status` with 50 machines"
MACHINES = 50
POINTS = 48
"""The points that the usual policy keeps of a day: all of the last hours, then fewer."""
QUICK_POINTS = 12
RUNS = 10


def measure(field: Cluster) -> Result:
    """On a vault with as many records as a day leaves; in memory, because making it takes thousands of transactions."""
    asr = Path(sys.executable).with_name("asr")
    # Byte code, which pip writes for an installed package; a checkout may have none and write none
    # (PYTHONDONTWRITEBYTECODE).
    compileall.compile_dir(Path(asrcore.__file__).parent, quiet=1)
    with tempfile.TemporaryDirectory(prefix="asr-bench-", dir="/dev/shm") as directory:
        vault = Path(directory) / "vault.db"
        fill(str(vault), MACHINES, QUICK_POINTS if field.quick else POINTS)

        def ours() -> Measured:
            command = [str(asr), "--vault", str(vault), "status"]
            begun = time.monotonic()
            with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - a device, not a file
                pid = os.posix_spawn(
                    command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, nothing.fileno(), 1)]
                )
                _, status, usage = os.wait4(pid, 0)
            seconds = time.monotonic() - begun
            if status:
                raise RuntimeError(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
            return Measured(seconds, usage.ru_utime + usage.ru_stime)

        rounds = field.interleave({OURS: ours}, rounds=RUNS)
    return Result("status", TITLE, rounds, {"status_seconds_50_machines": median(i.seconds for i in rounds[OURS])})


def fill(url: str, machines: int, points: int) -> None:
    """Make a vault with this many protected machines and points of each."""
    now = time.time()
    with Vault.create(url) as vault:
        vault.add_site(Site("north", "libvirt", {"uri": "qemu+ssh://north/system"}))
        vault.add_site(Site("south", "libvirt", {"uri": "qemu:///system", "replica_dir": "/srv/asr"}))
        vault.add_policy(Policy("gold", interval=300.0))
        for number in range(machines):
            protection = Protection(
                id=f"m-{number}",
                name=f"web{number}",
                policy="gold",
                home_site="north",
                source_site="north",
                source_machine=f"uuid-{number}",
                target_site="south",
                replica_id=f"r-{number}",
                created_at=now - points * 300,
            )
            vault.add_protection(protection)
            vault.transition(protection.id, Event.REPLICA_CREATED)
            for cycle in range(points):
                _record(vault, protection.id, number, cycle, now - (points - cycle) * 300)
            vault.transition(protection.id, Event.FINALIZED)


def _record(vault: Vault, protection_id: str, number: int, cycle: int, at: float) -> None:
    """A whole cycle, as the engine records it."""
    mode = CycleMode.DELTA if cycle else CycleMode.FULL
    pending = PendingCycle(
        id=f"c{number}-{cycle}",
        point_id=f"p{number}-{cycle}",
        mode=mode,
        base_point=f"p{number}-{cycle - 1}" if cycle else None,
        taken_at=at,
        view_mark=Mark(f"mark-{number}-{cycle}"),
        plan={"vda": (Extent(0, MiB),)},
    )
    vault.begin_cycle(protection_id, pending)
    point = RecoveryPoint(pending.point_id, at, at + 0.5, Consistency.CRASH, kept=True)
    stats = CycleStats(pending.id, mode, at, at, at + 0.5, MiB, MiB)
    event = None if cycle else Event.COPIED
    vault.record_point(protection_id, pending.id, point, event=event, stats=stats)
