"""A memory world served by a separate process: `python -m tests.unit.remote.serving WORLD PATH IDENTITY PORT`.

The first line of its output is the port.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import attrs

from asrcore.remote.master_target import MasterTarget
from asrcore.testing.memory import MemoryDriver
from asrcore.wire.carrier import Address, Limits
from asrcore.wire.tls import Identity

ROOT = Path(__file__).parents[3]


@attrs.define
class Served:
    """The process, from the tests' side."""

    world: str
    path: Path
    identity: Path
    port: int = 0
    silence: float = 30.0
    process: subprocess.Popen[str] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start it; when this returns it listens, at its former port."""
        words = [self.world, str(self.path), str(self.identity), str(self.port), str(self.silence)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.remote.serving", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the serving process exited immediately"
        self.port = int(line)

    def kill(self) -> None:
        """Kill it, like a power cut."""
        self.process.kill()
        self.stop()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop it cleanly; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    @property
    def address(self) -> str:
        """The address where it listens."""
        return f"127.0.0.1:{self.port}"


def main(world: str, path: str, identity: str, port: str, silence: str) -> None:
    """Serve until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    limits = Limits(silence=float(silence))
    with (
        MemoryDriver().connect(world, {"world": world, "path": path}) as site,
        MasterTarget(site, Address("127.0.0.1", int(port)), Identity(identity), limits=limits) as target,
    ):
        print(target.address.port, flush=True)
        stop.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
