"""The library inside a site, controlled over its standard input: one engine for many tests, without a start for each
verb.

    python -m tests.system.engine_process VAULT

A request is a line of JSON: {"verb": ..., "arguments": [...], "options": {...}}. A verb is a method of `Engine`, or of
`EngineProcess` below. The answer is a line, {"answer": ...} or {"error": ..., "exit_code": ...}; a job's is its record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from blake3 import blake3

from asrcore import driver
from asrcore.cli._output import plain
from asrcore.engine import Engine
from asrcore.errors import AsrError
from asrcore.model.point import Consistency
from asrcore.model.policy import ALWAYS, Policy, Rung
from asrcore.model.watch import Watch
from asrcore.replication.cycle import run_cycle
from asrcore.vault import Vault

COPY_SECONDS = 60.0
BLOCK = 64 << 10


class EngineProcess:
    """Verbs in addition to those of `Engine`."""

    def __init__(self, url: str) -> None:
        self._ahead = 0.0
        Vault.create(url).close()
        self.engine = Engine(Vault.open(url), clock=lambda: time.time() + self._ahead)
        self.engine.context.elapsed = self.engine.context.clock  # what is ahead counts as time that has passed
        self.engine.start()

    def clock_ahead(self, seconds: float) -> None:
        """Set the engine's clock this many seconds ahead of the real one."""
        self._ahead = seconds

    def add_policy(self, name: str, **fields: Any) -> Policy:
        """A policy that by default keeps points only where a verb requests it, and allows comparisons at any time."""
        asked = Consistency(fields.pop("consistency", "crash"))
        values = {"interval": 3600.0, "point_interval": 86400.0, "keep": 604800.0, "resync_window": ALWAYS, **fields}
        if "ladder" in values:
            values["ladder"] = tuple(Rung(*rung) for rung in values["ladder"])
        policy = Policy(name, consistency=asked, **values)
        self.engine.vault.add_policy(policy)
        return policy

    def job(self, job_id: str) -> Any:
        """A job's current record."""
        return self.engine.vault.job(job_id)

    def wait(self, job_id: str, timeout: float) -> Any:
        """Follow a job to its end; its facts. Raises its error."""
        done = self.engine.wait(self.engine.vault.job(job_id), timeout=timeout)
        return json.loads(done.result) if done.result else {}

    def protection(self, machine: str) -> Any:
        """The vault's record."""
        return self.engine.vault.protection(machine)

    def cycles(self, machine: str) -> Any:
        """Statistics of the machine's cycles, oldest first."""
        return self.engine.vault.cycles(self.engine.vault.protection(machine).id)

    def machine(self, site: str, machine_id: str) -> Any:
        """A machine as its site currently reports it."""
        return self.engine.context.site(site).inventory.machine(machine_id)

    def frozen_cycle(self, machine: str) -> dict[str, Any]:
        """A kept point, and the content of each disk as frozen for it, read by qemu-img from QEMU's NBD server."""
        protection = self.engine.vault.protection(machine)
        uri = self.engine.vault.site(protection.source_site).settings["uri"]
        contents: dict[str, str] = {}

        def read(view: driver.MachineView, *_: object) -> None:
            job = ["virsh", "-c", uri, "backup-dumpxml", view.description.machine.id]
            backup = ElementTree.fromstring(subprocess.run(job, check=True, capture_output=True, timeout=20).stdout)
            server = backup.find("server")
            assert server is not None
            for disk_id in view.disks:
                contents[disk_id] = content_of(f"nbd://{server.get('name')}:{server.get('port')}/{disk_id}", "raw")

        watch = Watch()
        with self.engine.context.locks.hold(protection, "a test's cycle", watch, wait=10):
            result = run_cycle(self.engine.context, protection.id, watch, keep=True, after_seal=read)
        return {"point": result.point.id, "mode": result.mode, "sent": result.counts.sent, "content": contents}


def content_of(image: str, fmt: str) -> str:
    """SHA-256 of an image's size and its non-zero blocks as qemu-img reads them: thin disks are quick. Equal for equal
    content, however it is stored."""
    digest = hashlib.sha256()
    with _as_raw(image, fmt) as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(f"{size}\n".encode())
        at = 0
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            for offset in range(start // BLOCK * BLOCK, at, BLOCK):
                data = os.pread(file.fileno(), min(BLOCK, size - offset), offset)
                if data.strip(b"\0"):
                    digest.update(f"{offset}\n".encode() + data)
            at = -(-at // BLOCK) * BLOCK
    return digest.hexdigest()


def disk_digest_of(image: str, fmt: str) -> str:
    """The digest that `asr verify` prints, computed from what qemu-img reads, as described in docs/reference/cli.md."""
    regions = b""
    with _as_raw(image, fmt) as file:
        while region := file.read(64 << 20):
            blocks = (region[at : at + BLOCK] for at in range(0, len(region), BLOCK))
            regions += blake3(b"".join(blake3(block).digest(16) for block in blocks)).digest(16)
    return blake3(regions).hexdigest()


@contextmanager
def _as_raw(image: str, fmt: str) -> Iterator[BufferedReader]:
    with tempfile.TemporaryDirectory(prefix="asr-system-") as work:
        raw = Path(work) / "content"
        command = ["qemu-img", "convert", "-q", "-U", "-f", fmt, "-O", "raw", image, str(raw)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=COPY_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        with raw.open("rb") as file:
            yield file


def _answer(process: EngineProcess, line: str) -> dict[str, Any]:
    request = json.loads(line)
    verb = request["verb"]
    called = getattr(process, verb) if hasattr(type(process), verb) else getattr(process.engine, verb)
    try:
        return {"answer": plain(called(*request["arguments"], **request["options"]))}
    except AsrError as error:
        return {"error": error.as_dict(), "exit_code": error.category.value}


def main(kind: type[EngineProcess] = EngineProcess) -> None:
    """Answer until the input ends; `kind` may add verbs."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("sqlalchemy", "alembic", "dbos"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    process = kind(sys.argv[1])
    answers = sys.stdout
    sys.stdout = sys.stderr
    print(json.dumps({"answer": "ready"}), file=answers, flush=True)
    with process.engine:
        for line in sys.stdin:
            print(json.dumps(_answer(process, line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
