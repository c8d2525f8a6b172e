"""Whether the bandwidth limit holds: simultaneous initial copies of machines of one policy, timed.

python -m tests.bench.throttle --rate 20Mbit --seconds 20 --machines 2
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import asrcore.testing.memory
from asrcore.engine import Engine
from asrcore.model.policy import Bandwidth, Policy
from asrcore.model.watch import Watch
from asrcore.plugins import Plugins
from asrcore.testing.memory import MemoryWorld
from asrcore.units import KiB, parse_rate

__all__ = ["measure"]


def measure(rate: str = "20Mbit", seconds: float = 20.0, machines: int = 2) -> dict[str, float]:
    """Copy what the rate allows in this many seconds, shared by several machines, with the real transfer.

    Figures: `throttle_ratio` (bytes per second from the first to the last piece, by the rate; 1 is exact),
    `sent_bytes`, `took_seconds`.
    """
    limit = parse_rate(rate)
    size = int(limit * seconds / machines) // (4 * KiB) * 4 * KiB
    plugins = Plugins()
    plugins.register("memory", asrcore.testing.memory)
    home = MemoryWorld("home")
    MemoryWorld("away")
    names = [f"vm{number}" for number in range(machines)]
    for name in names:
        home.add_machine(name, {"vda": size}).write("vda", 0, os.urandom(size))
    sent: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder, Engine.create(str(Path(folder) / "vault.db"), plugins) as engine:
        engine.add_site("a", "memory", {"world": "home"})
        engine.add_site("b", "memory", {"world": "away"})
        policy = Policy("slow", bandwidth=(Bandwidth(limit),))
        engine.vault.add_policy(policy)
        engine.start()
        throttle = engine.context.throttle(policy)
        take = throttle.take

        def counted(size: int, watch: Watch) -> None:
            take(size, watch)
            sent.append((time.monotonic(), size))

        throttle.take = counted  # type: ignore[method-assign]
        jobs = [engine.protect(name, source="a", target="b", policy="slow") for name in names]
        for job in jobs:
            engine.wait(job)
    sent.sort()
    took = sent[-1][0] - sent[0][0]
    total = sum(length for _, length in sent[:-1])
    return {"throttle_ratio": total / took / limit, "sent_bytes": total, "took_seconds": took}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="20Mbit")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--machines", type=int, default=2)
    given = parser.parse_args()
    print(json.dumps(measure(given.rate, given.seconds, given.machines), indent=2))


if __name__ == "__main__":
    main()
