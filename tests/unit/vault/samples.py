"""Sample values for a vault, and running Python code in another process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from asrcore.model.extent import Extent
from asrcore.model.point import Consistency, Mark, RecoveryPoint
from asrcore.model.policy import Policy
from asrcore.model.protection import CycleMode, PendingCycle, Protection, Site
from asrcore.vault import CycleStats, Vault

NORTH = Site("north", "memory", {"uri": "memory://north", "password": "hunter2"})
SOUTH = Site("south", "memory", {})
GOLD = Policy("gold", interval=5.0)


def machine(number: int = 1) -> Protection:
    return Protection(
        id=f"id-{number}",
        name=f"web-{number}",
        policy="gold",
        home_site="north",
        source_site="north",
        source_machine=f"uuid-{number}",
        target_site="south",
        replica_id=f"replica-{number}",
        created_at=100.0,
    )


def cycle(number: int, base: str | None = None, mode: CycleMode = CycleMode.COMPARE) -> PendingCycle:
    return PendingCycle(
        id=f"c{number}",
        point_id=f"p{number}",
        mode=mode,
        base_point=base,
        taken_at=1000.0 + number,
        view_mark=Mark(f"mark-{number}"),
        plan={"vda": (Extent(0, 65536), Extent(131072, 65536, zero=True)), "vdb": ()},
    )


def point(number: int, *, kept: bool = False) -> RecoveryPoint:
    return RecoveryPoint(f"p{number}", 1000.0 + number, 1000.5 + number, Consistency.CRASH, kept, held=4096 * number)


def stats(number: int) -> CycleStats:
    return CycleStats(f"c{number}", CycleMode.COMPARE, 1000.0 + number, 1000.1 + number, 1000.5 + number, 7, 6, 5, 4, 3)


def record(vault: Vault, number: int, *, kept: bool = False, protection_id: str = "id-1") -> Protection:
    """Record a whole cycle, as the engine does."""
    base = vault.protection(protection_id).head_point
    vault.begin_cycle(protection_id, cycle(number, base))
    return vault.record_point(protection_id, f"c{number}", point(number, kept=kept), stats=stats(number))


def child(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start another Python that runs the code; `sys.argv[1:]` are the arguments."""
    head = "import sys\nfrom asrcore.vault import Vault\nfrom tests.unit.vault import samples\n"
    root = Path(__file__).parents[3]
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, **environment},
    )


def run(code: str, *arguments: object, **environment: str) -> tuple[int, str]:
    """Run to its end; returns the exit code and the output, including errors."""
    with child(code, *arguments, **environment) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out + err
