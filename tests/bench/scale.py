"""The replication service with many machines of the memory driver: RPO, cycles, CPU and memory.

    python -m tests.bench.scale --machines 500 --seconds 180 [--noisy 5] [--hanging 5] [--latency 0.25]

The service runs in a separate process, so that its CPU time and memory can be measured. The memory driver's share is
included: it stands for the work that a real driver does in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from asrcore.driver import Driver, FrozenView, ViewRequest
from asrcore.engine import Engine
from asrcore.hookspecs import hookimpl
from asrcore.model.point import Consistency
from asrcore.model.policy import ALWAYS, Policy
from asrcore.model.protection import Protection
from asrcore.model.watch import Watch
from asrcore.plugins import Plugins
from asrcore.procedures.catalogue import PROCEDURES
from asrcore.procedures.procedure import Arguments, Work
from asrcore.testing.memory import MemoryDriver, MemoryMachine, MemorySite, MemoryWorld
from asrcore.testing.memory._session import Session
from asrcore.testing.memory._source import MemorySource
from asrcore.units import KiB, MiB

__all__ = ["measure"]

INTERVAL = 30.0
DISK = 4 * MiB
CONTENT = 64 * KiB  # of a quiet machine's disk
HANG = 20.0  # seconds
WRITE_EVERY = 10.0  # seconds between two writes of 4 KiB by a machine


def measure(
    machines: int, seconds: float, *, noisy: int = 0, hanging: int = 0, latency: float = 0.0
) -> dict[str, float]:
    """Let the service protect this many machines at an interval of 30 s, for `seconds` after two rounds of warm-up.

    `noisy` of them change 40 % of their disk every 10 s, `hanging` of them have a source that does not answer for 20 s.
    `latency`: seconds until a source has frozen a view; an idle cycle of a libvirt guest takes 0.25.
    Figures: `rpo_p50_seconds`, `rpo_p95_seconds`, `rpo_max_seconds` of the age that the newest point of a quiet machine
    had when the next one was sealed (or at the end); `cycles_per_second`; `cpu_seconds_per_machine_hour`;
    `rss_bytes`, `rss_bytes_per_machine` (what machines add to an empty engine); `rss_growth_ratio` during the
    measurement; `saturated` (0 or 1): whether health reports that the service cannot keep up.
    """
    options = {"machines": machines, "seconds": seconds, "noisy": noisy, "hanging": hanging, "latency": latency}
    command = [sys.executable, "-m", "tests.bench.scale", "--child"]
    command += [f"--{name}={value}" for name, value in options.items()]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


class _SlowSource(MemorySource):
    """Takes `latency` seconds to freeze a view, and hangs on the machines in `hanging`."""

    latency = 0.0
    hanging: frozenset[str] = frozenset()

    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        stuck = any(request.machine_id in self.hanging for request in requests)
        time.sleep(HANG if stuck else self.latency)
        return super().open_view(requests, consistency=consistency, freeze_limit=freeze_limit)


class _SlowSite(MemorySite):
    source_type = _SlowSource


class _SlowDriver(MemoryDriver):
    def site(self, session: Session) -> MemorySite:
        return _SlowSite(session)


class _Plugin:
    @hookimpl
    def asr_register_drivers(self) -> list[Driver]:
        return [_SlowDriver()]


@contextmanager
def _engine(folder: Path) -> Iterator[Engine]:
    plugins = Plugins()
    plugins.register("memory", _Plugin())
    with Engine.create(str(folder / "vault.db"), plugins) as engine:
        MemoryWorld("away")
        engine.add_site("b", "memory", {"world": "away"})
        # From the fourth minute on, points are made and deleted at the same rate.
        engine.vault.add_policy(Policy("gold", INTERVAL, 2 * INTERVAL, keep=4 * INTERVAL, resync_window=ALWAYS))
        yield engine


def _protected(engine: Engine, world: MemoryWorld, site: str, names: list[str]) -> list[MemoryMachine]:
    """New machines of a world, protected without the job engine: 2,000 jobs are not what is measured here."""
    steps = PROCEDURES["protect"].steps
    made = []
    for name in names:
        machine = world.add_machine(name, {"vda": DISK})
        machine.start()
        machine.write("vda", 0, os.urandom(CONTENT))
        protection = Protection(
            id=f"m-{name}",
            name=name,
            policy="gold",
            home_site=site,
            source_site=site,
            source_machine=name,
            target_site="b",
            replica_id=f"r-{name}",
            created_at=time.time(),
        )
        engine.vault.add_protection(protection)
        for step in steps:
            step.run(Work(engine.context, "", protection.id, Arguments(), Watch()))
        made.append(machine)
    return made


def _write(machines: list[MemoryMachine], noisy: list[MemoryMachine], stop: threading.Event) -> None:
    """The guests' writes during the measurement."""
    dice = random.Random(7)
    pause = WRITE_EVERY / max(1, len(machines))
    while True:
        for loud in noisy:
            loud.write("vda", 0, dice.randbytes(1) * (DISK * 2 // 5))
        for machine in dice.sample(machines, len(machines)):
            if stop.wait(pause):
                return
            machine.write("vda", dice.randrange(0, CONTENT, 4 * KiB), dice.randbytes(4 * KiB))


def _rss() -> int:
    """Resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _child(machines: int, seconds: float, *, noisy: int, hanging: int, latency: float) -> dict[str, float]:
    build = Path(__file__).parents[2] / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder, _engine(Path(folder)) as engine:
        engine.start()
        empty = _rss()
        home = MemoryWorld("home")
        engine.add_site("a", "memory", {"world": "home"})
        names = [f"vm{number:05}" for number in range(machines)]
        loud = _protected(engine, home, "a", names[:noisy])
        stuck = names[noisy : noisy + hanging]
        _protected(engine, home, "a", stuck)
        quiet = _protected(engine, home, "a", names[noisy + hanging :])
        _SlowSource.latency, _SlowSource.hanging = latency, frozenset(stuck)
        stop = threading.Event()
        threads = [
            threading.Thread(target=_write, args=(quiet, loud, stop)),
            threading.Thread(target=engine.run, args=(stop,)),
        ]
        for thread in threads:
            thread.start()
        try:
            time.sleep(2 * INTERVAL)
            begun, cpu, rss = time.time(), _cpu(), _rss()
            time.sleep(seconds)
            ended, cpu, full = time.time(), _cpu() - cpu, _rss()
            saturated = any(
                reason.code == "service-saturated" for status in engine.status() for reason in status.health.reasons
            )
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        ages, cycles = _ages(engine, [machine.id for machine in quiet], begun, ended)
    ranks = statistics.quantiles(ages, n=100, method="inclusive")
    return {
        "machines": machines,
        "seconds": ended - begun,
        "rpo_p50_seconds": ranks[49],
        "rpo_p95_seconds": ranks[94],
        "rpo_max_seconds": max(ages),
        "cycles_per_second": cycles / (ended - begun),
        "cpu_seconds_per_machine_hour": cpu / machines / (ended - begun) * 3600,
        "cpu_share_of_a_core": cpu / (ended - begun),
        "rss_bytes": full,
        "rss_bytes_per_machine": (full - empty) / machines,
        "rss_growth_ratio": full / rss,
        "saturated": float(saturated),
    }


def _ages(engine: Engine, machines: list[str], begun: float, ended: float) -> tuple[list[float], int]:
    """The greatest age that each newest point reached, and the number of sealed cycles."""
    ages: list[float] = []
    cycles = 0
    for machine in machines:
        known = [item for item in engine.vault.cycles(f"m-{machine}") if item.sealed_at < ended]
        sealed = sum(item.sealed_at >= begun for item in known)
        cycles += sealed
        ages += [after.sealed_at - before.taken_at for before, after in pairwise(known[-sealed - 1 :])]
        ages.append(ended - known[-1].taken_at)
    return ages, cycles


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--noisy", type=int, default=0)
    parser.add_argument("--hanging", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    run = _child if given.child else measure
    figures = run(given.machines, given.seconds, noisy=given.noisy, hanging=given.hanging, latency=given.latency)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
