"""`asr` with the memory driver in addition to the installed ones, as verbs and as services, and all its output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from asrcore.testing.memory import MemoryMachine, MemoryWorld
from asrcore.units import MiB
from tests.unit.service.waiting import wait_until

__all__ = ["CliRunner", "Service"]

ROOT = Path(__file__).parents[3]
CODE = """
import asrcore.testing.memory
from asrcore import plugins
installed = plugins.load
def load():
    loaded = installed()
    loaded.register("memory", asrcore.testing.memory)
    return loaded
plugins.load = load
from asrcore.cli import main
main()
"""


@attrs.define
class Service:
    """A running service. `log`: its output so far."""

    process: subprocess.Popen[str]
    log: list[str] = attrs.field(factory=list)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until it has printed that."""
        found: list[re.Match[str]] = []

        def said() -> bool:
            found[:] = [match for line in list(self.log) if (match := re.search(pattern, line))]
            assert found or self.process.poll() is None, "".join(self.log)
            return bool(found)

        wait_until(said, pattern)
        return found[0]


class CliRunner:
    """A directory with a vault and two memory worlds, `home` with a machine `web` and `away`."""

    def __init__(self, folder: Path, vault: str) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.environment = {
            **os.environ,
            "ASR_VAULT": vault,
            "ASR_KEY": str(folder / "vault.key"),
            "ASR_CA": str(folder / "ca"),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "HOME": str(folder),
        }
        self.home, self.away = (MemoryWorld(name, path=folder / name) for name in ("home", "away"))
        self.machine: MemoryMachine = self.home.add_machine("web", {"vda": MiB})

    def site(self, world: MemoryWorld, *more: str) -> list[str]:
        """Options that name a world."""
        words = ["--driver", "memory", "--set", f"world={world.name}", "--set", f"path={self.folder / world.name}"]
        return [*words, *more]

    def asr(self, *words: str, given: str = "", code: int = 0, **environment: str) -> str:
        """Run a verb; returns its output."""
        done = subprocess.run(
            [sys.executable, "-c", CODE, *words],
            env={**self.environment, **environment},
            input=given,
            text=True,
            capture_output=True,
            timeout=90,
            check=False,
        )
        self.said.append(done.stdout + done.stderr)
        assert done.returncode == code, self.said[-1]
        return done.stdout + done.stderr

    def asked(self, *words: str) -> Any:
        """Run a verb with `--json`; returns its document."""
        return json.loads(self.asr(*words, "--json"))

    def authority(self) -> Path:
        """Make the authority; returns the identity of the configuration server."""
        own = self.folder / "own"
        self.asr("ca", "init", "--url", "https://127.0.0.1:1", "--identity", str(own))
        return own

    @contextmanager
    def service(self, *words: str, says: str) -> Iterator[tuple[Service, re.Match[str]]]:
        """Start a service and wait until it prints that it is ready; SIGTERM ends it."""
        command = [sys.executable, "-c", CODE, *words]
        pipe, errors = subprocess.PIPE, subprocess.STDOUT
        with subprocess.Popen(command, env=self.environment, text=True, stdout=pipe, stderr=errors) as process:
            service = Service(process)

            def read() -> None:
                assert process.stdout is not None
                for line in process.stdout:
                    service.log.append(line)

            reader = threading.Thread(target=read)
            reader.start()
            try:
                yield service, service.wait_for(says)
                process.send_signal(signal.SIGTERM)
                code = process.wait(60)
                assert code == 0, "".join(service.log)
            finally:
                process.kill()
                reader.join()
                self.said += service.log
