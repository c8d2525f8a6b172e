"""Failovers of many machines while something happens to the database: what a person would type."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import attrs

from asrcore.errors import AsrError, NotFound, VaultUnavailable
from asrcore.jobs import enqueue
from asrcore.model.health import Level
from asrcore.model.machine import PowerState
from asrcore.model.state import State
from asrcore.procedures.procedure import Arguments
from asrcore.vault import Job, JobState
from tests.servers._cluster import Cluster

__all__ = ["Failovers", "Watcher"]

# Of five machines: one each for a planned failover, an unplanned one and a test, all of them taken back; two have none.
_STORIES = (
    ("failover-planned", "failover-undo"),
    ("failover-unplanned", "failover-undo"),
    ("failover-test", "failover-cleanup"),
    (),
    (),
)


_COMMANDS = re.compile(r"`asr ((?:failover |machine )?[a-z]+)")
_KINDS = {
    "machine adopt": "adopt",
    "failover undo": "failover-undo",
    "failover unplanned": "failover-unplanned",
    "resync": "resync",
    "replicate": "replicate",
}


@attrs.define
class _Story:
    machine: str
    verbs: list[str]
    job: str = ""


class Failovers:
    """The stories of all machines; `run` until all have ended. Each verb follows when the former job has ended."""

    def __init__(self, field: Cluster) -> None:
        self._field = field
        self.stories = [
            _Story(name, list(_STORIES[number % len(_STORIES)])) for number, name in enumerate(sorted(field.machines))
        ]
        self.undisturbed = {story.machine for story in self.stories if not story.verbs}
        self.ended: list[Job] = []
        self.lost: list[str] = []  # machines whose job the database does not know any more

    @contextmanager
    def under_way(self, seconds: float) -> Iterator[None]:
        """Begin. The block is entered when the first have ended, and left when all have; if a job hangs it fails."""
        problems: list[Exception] = []

        def run() -> None:
            try:
                self._run(seconds)
            except Exception as problem:  # noqa: BLE001 - raised again below
                problems.append(problem)

        thread = threading.Thread(target=run)
        thread.start()
        while len(self.ended) < len(self.stories) // 20 and thread.is_alive():
            thread.join(0.05)
        try:
            assert thread.is_alive(), "some are under way"
            yield
        finally:
            thread.join()
        for problem in problems:
            raise problem

    def _run(self, seconds: float) -> None:
        ends, pause = time.monotonic() + seconds, threading.Event()
        while left := [story for story in self.stories if story.verbs or story.job]:
            assert time.monotonic() < ends, f"jobs that hang: {self._hanging(left)}"
            for story in left:
                try:
                    self._go_on(story)
                except VaultUnavailable:
                    break
            pause.wait(0.3)

    def _go_on(self, story: _Story) -> None:
        vault = self._field.vault
        if story.job:
            try:
                job = vault.job(story.job)
            except NotFound:
                self.lost.append(story.machine)
                story.job, story.verbs = "", []
                return
            if not job.state.ended:
                return
            self.ended.append(job)
            story.job = ""
        if story.verbs:
            protection = vault.protection(story.machine)
            kind = story.verbs[0]
            story.job = enqueue(vault, kind, protection, Arguments(), now=time.time(), who="a person").id
            story.verbs.pop(0)

    def _hanging(self, left: list[_Story]) -> list[str]:
        jobs = [self._field.vault.job(story.job) for story in left if story.job]
        return [f"{job.machine} {job.kind} {job.state.value} at {job.step}" for job in jobs]

    def ask_health(self) -> dict[str, list[str]]:
        """Run the first command that each critical machine's health names; machines for which none is recorded that
        works on it, and their reasons. Machines that are failed over are given back, tests cleaned up."""
        needy, vault = {}, self._field.vault
        working = {job.machine for job in vault.jobs(active=True)}
        for status in self._field.engine.status():
            protection, health = status.protection, status.health
            kind = "failover-cleanup" if protection.test is not None else None
            named = [command for reason in health.reasons for command in _COMMANDS.findall(reason.action)]
            if protection.state is State.FAILED_OVER and "machine adopt" not in named:
                kind = "failover-undo"
            elif health.level is Level.CRITICAL:
                kind = next((_KINDS[verb] for verb in _KINDS if verb in named), kind)
            if kind is None and health.level is not Level.CRITICAL and protection.name not in working:
                continue
            needy[protection.name] = [reason.code for reason in health.reasons]
            if kind is not None and protection.name not in working:
                enqueue(vault, kind, protection, Arguments(), now=time.time(), who="a person")
        return needy

    def failed(self) -> list[str]:
        """Jobs that did not succeed, with their errors."""
        return [
            f"{job.machine} {job.kind}: {json.dumps(job.error)}" for job in self.ended if job.state is not JobState.DONE
        ]


class Watcher:
    """Looks all the time whether a machine runs at both of its sites."""

    def __init__(self, field: Cluster) -> None:
        self._field = field
        self.both: list[str] = []
        self.looks = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block runs."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.2):
                for home, away in self._field.worlds:
                    self.both += [name for name in self._suspects(home, away) if self._is_both(home, away, name)]
                self.looks += 1

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @staticmethod
    def _running(world: object) -> set[str]:
        with world.look() as state:  # type: ignore[attr-defined]
            return {name for name, machine in state.machines.items() if machine.power is PowerState.RUNNING}

    def _suspects(self, home: object, away: object) -> set[str]:
        return self._running(home) & self._running(away)

    def _is_both(self, home: object, away: object, name: str) -> bool:
        """At one instant: both worlds are held still. A source whose quarantine is owed may run: health says so."""
        with home.change() as here, away.change() as there:  # type: ignore[attr-defined]
            if not all(
                name in state.machines and state.machines[name].power is PowerState.RUNNING for state in (here, there)
            ):
                return False
        try:
            return not self._field.vault.protection(name).fence_due
        except AsrError:
            return True
