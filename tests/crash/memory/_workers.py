"""Folders of the chapters, made on first use, and the processes that work on them."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

from tests.crash.memory._scenario import CHAPTERS

__all__ = ["Outcome", "Story", "Workers"]

ROOT = Path(__file__).parents[3]


class Workers:
    """`count` workers; a request uses the next free one. A context manager."""

    def __init__(self, count: int) -> None:
        self._workers = [self._start() for _ in range(count)]
        self._free: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        for worker in self._workers:
            self._free.put(worker)

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("ASRCORE_CRASH_AT", None)
        command = [sys.executable, "-W", "error", "-m", "tests.crash.memory.worker"]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            with worker:
                worker.kill()

    def run(self, verb: str, folder: Path, chapter: str, place: str = "") -> int:
        """The child's exit status."""
        worker = self._free.get()
        try:
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(json.dumps([verb, str(folder), chapter, place]) + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline().strip()
            while answer == "ready":
                answer = worker.stdout.readline().strip()
            assert answer, f"the worker exited: {worker.poll()}"
            return int(answer)
        finally:
            self._free.put(worker)


@attrs.frozen
class Outcome:
    """The result of a case: exit statuses of its processes (None: not run), their output, and the notes."""

    killed: int
    went_on: int | None
    log: str
    notes: dict[str, object]


class Story:
    """Chapters under `base`. Thread-safe."""

    def __init__(self, base: Path, lanes: Workers) -> None:
        self._base = base
        self._lanes = lanes
        self._lock = threading.RLock()
        self._made: dict[Path, Path] = {}

    def before(self, name: str) -> Path:
        """The folder from which a chapter starts."""
        folder = self._base / name / "before"
        with self._lock:
            if folder in self._made:
                return folder
            chapter = CHAPTERS[name]
            if chapter.killed:
                self._copy(self.before(chapter.after), folder)
                status = self._lanes.run("live", folder, chapter.after, chapter.killed)
                assert status == -signal.SIGKILL, _log(folder)
            elif chapter.after:
                self._copy(self.end(chapter.after), folder)
            else:
                folder.parent.mkdir()
            status = self._lanes.run("prepare", folder, name)
            assert status == 0, _log(folder)
            self._made[folder] = folder
            return folder

    def end(self, name: str) -> Path:
        """The folder that the undisturbed chapter left; its file `reached` names all places."""
        folder = self._base / name / "end"
        with self._lock:
            if folder not in self._made:
                self._copy(self.before(name), folder)
                status = self._lanes.run("live", folder, name)
                assert status == 0, _log(folder)
                self._made[folder] = folder
            return folder

    def places(self, name: str) -> list[str]:
        """Names that the undisturbed chapter reaches, in order, with repetitions."""
        return (self.end(name) / "reached").read_text().splitlines()

    def disturbed(self, name: str, place: str) -> Outcome:
        """The chapter, killed at that place (not at all if it is ""), and its result."""
        folder = self._base / name / (place.replace(":", "-") or "undisturbed")
        if place:
            self._copy(self.before(name), folder)
            killed = self._lanes.run("live", folder, name, place)
        else:
            self._copy(self.end(name), folder)
            killed = -signal.SIGKILL
        went_on = self._lanes.run("go_on", folder, name, place) if killed == -signal.SIGKILL else None
        notes = folder / "notes.json"
        outcome = Outcome(killed, went_on, _log(folder), json.loads(notes.read_text()) if notes.exists() else {})
        if went_on == 0:
            shutil.rmtree(folder)
        return outcome

    def _copy(self, there: Path, folder: Path) -> None:
        folder.parent.mkdir(exist_ok=True)
        shutil.copytree(there, folder, ignore=shutil.ignore_patterns("reached"))


def _log(folder: Path) -> str:
    log = folder.with_name(folder.name + ".log")
    return f"{folder}\n{log.read_text() if log.exists() else 'no output'}"
