"""A guest at site a, its replica at site b, and an engine at site b that the tests kill."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from asrcore.engine import Engine
from asrcore.model.protection import Protection
from asrcore.plugins import Plugins
from tests.lab import Audit, Kind, Lab
from tests.lab._console import parse_console
from tests.system.engine_process import content_of
from tests.system.rig import wait_for

__all__ = ["Asr", "Cluster"]

VAULT = "/srv/asr-crash.db"
TARGETS = {"xfs": "/srv/xfs", "ext4": "/srv/ext4"}
PATIENCE = 60.0


class Asr:
    """The command `asr` at site b (see `asr_worker`). A context manager."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._log = lab.host_path("b", "/srv/asr-crash.out")
        self.temporary = lab.host_path("b", "/srv/asr-tmp")
        self.temporary.mkdir()
        errors = lab.host_path("b", "/srv/asr-worker.err").open("wb")
        with errors:
            command = [sys.executable, "-W", "error", "-m", "tests.crash.asr_worker"]
            self._worker = lab.popen_in("b", command, stdin=subprocess.PIPE, stderr=errors.fileno())
        self._received = b""
        assert self._answer(30) == "ready", lab.host_path("b", "/srv/asr-worker.err").read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._worker:
            self._worker.kill()

    def _ask(self, *request: object, timeout: float = PATIENCE) -> Any:
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps(request).encode() + b"\n")
        self._worker.stdin.flush()
        return json.loads(self._answer(timeout))

    def _answer(self, timeout: float) -> str:
        assert self._worker.stdout is not None
        end = time.monotonic() + timeout
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._worker.stdout], [], [], max(0.0, end - time.monotonic()))
            more = os.read(self._worker.stdout.fileno(), 65536) if ready else b""
            assert more, f"no answer of the worker within {timeout:g} s"
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()

    def start(self, *words: str, crash: str = "") -> int:
        """Start a verb; returns its pid."""
        environment = {"ASRCORE_CRASH_AT": crash, "PYTHONWARNINGS": "error", "TMPDIR": "/srv/asr-tmp"}
        return int(self._ask("start", ["--vault", VAULT, *words], environment, "/srv/asr-crash.out"))

    def wait(self, pid: int, seconds: float = PATIENCE) -> int | None:
        """Its exit status; None if it still runs after this many seconds."""
        status = self._ask("wait", pid, seconds, timeout=seconds + PATIENCE)
        return None if status is None else int(status)

    def said(self) -> str:
        """The output of the last verb."""
        return f"{self._log.read_text()}\n{Path(f'{self._log}.err').read_text()}"

    def __call__(self, *words: str) -> Any:
        """Run a verb with --json; returns its document."""
        status = self.wait(self.start(*words, "--json"), 90)
        assert status == 0, f"asr {' '.join(words)}: {status}\n{self.said()}"
        return json.loads(self._log.read_text())

    def stop(self, pid: int) -> None:
        """SIGTERM, and wait."""
        os.kill(pid, signal.SIGTERM)
        assert self.wait(pid, 30) == 0, self.said()


class Cluster:
    """One guest with its replica of one kind; `points` records the content of each point when it was first seen."""

    def __init__(self, lab: Lab, asr: Asr, target: str) -> None:
        self.lab = lab
        self.asr = asr
        self.target = target
        self.name = f"crash-{target}"
        self.killed_at: list[str] = []
        self._points: dict[str, dict[str, str]] = {}
        self._networks = self._listed("b", "net-list")
        lab.define_guest("a", Kind.BIOS_DIRECT, self.name, rate=20)
        lab.start("a", self.name)
        lab.wait_row("a", self.name, 10)

    # -- observing -------------------------------------------------------------------------------------------------

    @contextmanager
    def library(self) -> Iterator[Engine]:
        """The vault, for reading."""
        path = str(self.lab.sites["b"].disk_dir / VAULT.lstrip("/"))
        with Engine.open(path, Plugins()) as engine:
            yield engine

    def protection(self) -> Protection:
        """The vault's record."""
        with self.library() as engine:
            return engine.vault.protection(self.name)

    def _listed(self, site: str, *words: str) -> set[str]:
        return set(self.lab.sites[site].virsh(*words, "--all", "--name").stdout.split())

    def _record(self, home: Path) -> dict[str, Any]:
        return dict(json.loads((home / "replica.json").read_text()))

    def _home(self, protection: Protection) -> Path:
        return self.lab.host_path("b", f"{TARGETS[self.target]}/replicas/{protection.replica_id}")

    def _content(self, home: Path, images: dict[str, str]) -> dict[str, str]:
        return {
            disk: content_of(str(home / image), "qcow2" if image.endswith("qcow2") else "raw")
            for disk, image in images.items()
        }

    # -- killing ---------------------------------------------------------------------------------------------------

    def chain(self, verb: Sequence[str], places: Sequence[str]) -> None:
        """Kill the verb at the first place, the service that resumes it at the next one, and so on; then let it end.

        The invariants are checked after each kill.
        """
        first = True
        with self.library() as engine:
            before = {job.id for job in engine.vault.jobs()}
        for place in places:
            pid = self.asr.start(*(verb if first else ["run"]), crash=place)
            first = False
            status = self._ended(pid, before)
            assert status == -signal.SIGKILL, f"{place} was not reached: {status}\n{self.asr.said()}"
            self.killed_at.append(f"{self.target}: {' '.join(verb)}: {place}")
            self._check_killed(place)
        service = self.asr.start("run")
        with self.library() as engine:
            wait_for(lambda: not engine.vault.jobs(active=True), f"the end of {verb}", timeout=90, poll=0.2)
            job = engine.vault.jobs(limit=1)[0]
            assert job.state.value == "done", job
        self.asr.stop(service)
        self._check_at_rest()

    def _ended(self, pid: int, before: set[str]) -> int | None:
        """Its exit status; None if it still runs after the new job has ended, which has then passed the place."""
        with self.library() as engine:
            for _ in range(60):
                status = self.asr.wait(pid, 1.0)
                if status is not None:
                    return status
                jobs = [job for job in engine.vault.jobs() if job.id not in before]
                if jobs and all(job.state.ended for job in jobs):
                    break
        os.kill(pid, signal.SIGKILL)
        self.asr.wait(pid)
        return None

    # -- invariants ------------------------------------------------------------------------------------------------

    def _check_killed(self, place: str) -> None:
        """Right after the kill: one copy runs, no deleted point is listed, and the oldest point is unchanged."""
        protection = self.protection()
        self._one_copy(protection)
        home = self._home(protection)
        with self.library() as engine:
            listed = [point.id for point in engine.points(self.name)]
        if protection.state.value in ("committing", "committed", "enabling") or not listed:
            return
        record = self._record(home)
        there = {point["stored"]["id"]: point["images"] for point in record["points"]}
        assert set(listed[:-1]) <= set(there)
        committed = home / "journal" / "commit.json"  # sealed, and applied at the next opening
        sealed = json.loads(committed.read_text())["point"]["id"] if committed.exists() else None
        assert listed[-1] in there or protection.pending is not None or listed[-1] == sealed
        assert record["epoch"] <= protection.epoch
        oldest = listed[0]
        if oldest not in there:  # the first point of a replica: its cycle is pending or sealed
            assert oldest == listed[-1]
            return
        assert self._content(home, there[oldest]) == self._points.setdefault(
            oldest, self._content(home, there[oldest])
        ), f"point {oldest} has changed at {place}"

    def _one_copy(self, protection: Protection) -> None:
        running = [site for site in ("a", "b") if self.name in self._running(site)]
        assert len(running) <= 1 or protection.fence_due, running

    def _running(self, site: str) -> set[str]:
        return set(self.lab.sites[site].virsh("list", "--name").stdout.split())

    def _check_at_rest(self) -> None:
        """Every point is complete and unchanged; nothing is left behind at either site."""
        protection = self.protection()
        self._one_copy(protection)
        self._nothing_left(protection)
        if protection.state.value == "committed":
            assert not self._home(protection).exists()
            return
        home = self._home(protection)
        record = self._record(home)
        with self.library() as engine:
            listed = [point.id for point in engine.points(self.name)]
        assert [point["stored"]["id"] for point in record["points"]] == listed
        for point in record["points"]:
            content = self._content(home, point["images"])
            known = self._points.setdefault(point["stored"]["id"], content)
            assert content == known, f"point {point['stored']['id']} has changed"
        self._no_litter(home, record)

    def _no_litter(self, home: Path, record: dict[str, Any]) -> None:
        text = json.dumps(record)
        files = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
        known = {"replica.json", "replica.json.lock", "reserve", "promotion.json"}
        points = {point["stored"]["id"] for point in record["points"]}
        strange = [
            str(path)
            for path in files
            if str(path) not in known
            and str(path) not in text
            and not (path.parts[0] == "points" and path.parts[1] in points and path.name == "description.json")
            and path.parts[0] != "tests"
        ]
        assert strange == [], "files that no record names"

    def _nothing_left(self, protection: Protection) -> None:
        assert self._servers() == [], "qemu-nbd still runs"
        expected = {f"{self.name}-test"} if protection.test else set()
        if protection.target_machine is not None:
            expected.add(self.name)
        assert {name for name in self._listed("b", "list") if name.startswith(self.name)} == expected
        assert protection.test is not None or self._listed("b", "net-list") == self._networks

    def _servers(self) -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if command.startswith("qemu-nbd") and f"{TARGETS[self.target]}/" in command:
                found.append(command)
        return found

    # -- the guest -------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Replica equals source, byte for byte; a cycle has deleted what the kills had left at the source."""
        facts = self.asr("verify", self.name)["result"]
        assert facts["equal"], facts
        site = self.lab.sites["a"]
        marks = site.virsh("checkpoint-list", self.name, "--name").stdout.split()
        assert len(marks) == 1, f"checkpoints pile up: {marks}"
        assert site.virsh("backup-dumpxml", self.name, check=False).returncode != 0, "a backup job is left"
        scratch = [path.name for path in (site.disk_dir / "srv/images").glob(f"{self.name}-*.asr*")]
        assert scratch == [], "scratch files of backups are left"
        assert list(self.asr.temporary.iterdir()) == []

    def audited(self, site: str, *, boots: int, test: bool = False) -> Audit:
        """The audit that the guest made of its disks when it booted there."""
        place = self.lab.host_path(site, "/srv/console")

        def booted() -> Audit | None:
            for path in place.glob(f"{self.name}*"):
                if test == (path.name == f"{self.name}.log"):
                    continue
                console = parse_console(path.read_bytes().decode(errors="replace"))
                if len(console.ready) >= boots:
                    return console.audits[-1]
            return None

        audit = wait_for(booted, f"{self.name} has booted at {site}", timeout=90)
        assert isinstance(audit, Audit)
        assert audit.intact, audit
        assert audit.rows > 0
        return audit

    def live(self, rows: int = 5) -> None:
        """The guest writes this many rows at site a."""
        last = self.lab.console("a", self.name).last_ack
        self.lab.wait_row("a", self.name, (last.row if last else 0) + rows)
