"""Procedures that leave a trace in files, an engine around them, and the same as a process that can be killed.

`python -m tests.unit.jobs.job_procedures VAULT run` is an engine that runs until its input ends;
`... VAULT submit KIND MACHINE` only records a job, as `asr` does while a service runs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from asrcore.errors import VerifyFailed
from asrcore.jobs import Jobs, enqueue
from asrcore.model.event import FinishedJob
from asrcore.model.policy import Policy
from asrcore.model.protection import Protection, Site
from asrcore.plugins import Plugins
from asrcore.procedures.procedure import Arguments, Holds, Procedure, Step, Work
from asrcore.replication.context import Context
from asrcore.vault import Job, Vault

MACHINES = ("web1", "web2")


def make_vault(path: Path | str) -> None:
    with Vault.create(path) as vault:
        vault.add_site(Site("north", "memory", {}))
        vault.add_site(Site("south", "memory", {}))
        vault.add_policy(Policy("gold"))
        for name in MACHINES:
            protection = Protection(
                id=f"m-{name}",
                name=name,
                policy="gold",
                home_site="north",
                source_site="north",
                source_machine=name,
                target_site="south",
                replica_id=f"r-{name}",
            )
            vault.add_protection(protection)


class Trace:
    """Lines in a file next to the vault: the steps that ran, in order. Files named `go-...` release waiting steps."""

    def __init__(self, vault: Path) -> None:
        self._directory = vault.parent
        self._file = vault.parent / "trace"

    def add(self, line: str) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def lines(self) -> list[str]:
        return self._file.read_text("utf-8").splitlines() if self._file.exists() else []

    def let_go(self, name: str) -> None:
        (self._directory / f"go-{name}").touch()

    def may_go(self, name: str) -> bool:
        return (self._directory / f"go-{name}").exists()


def procedures(trace: Trace) -> dict[str, Procedure]:
    """Each step writes `MACHINE KIND.STEP`."""
    pause = threading.Event()

    def says(name: str, then: Callable[[Work], None] = lambda work: None) -> Step:
        def run(work: Work) -> None:
            trace.add(f"{work.protection.name} {name}")
            then(work)

        return Step(name.partition(".")[2], run)

    def count(work: Work) -> None:
        work.facts["steps"] = int(str(work.facts.get("steps", 0))) + 1

    def wait(work: Work) -> None:
        while not trace.may_go(work.protection.name):
            work.watch.check()
            pause.wait(0.005)

    def deaf(work: Work) -> None:
        while not trace.may_go(work.protection.name):
            pause.wait(0.005)

    def copy(work: Work) -> None:
        work.watch.start("copying", 1000)
        while work.watch.done < 1000:
            pause.wait(0.001)
            work.watch.advance(2)

    def differ(work: Work) -> None:
        work.facts["different_bytes"] = 512
        raise VerifyFailed(machine=work.protection.name, different=512)

    def break_down(work: Work) -> None:
        raise ZeroDivisionError("a defect")

    def remove(work: Work) -> None:
        work.context.vault.remove_protection(work.protection_id)

    end = says("last.end")
    made = (
        Procedure("count", tuple(says(f"count.{name}", count) for name in ("one", "two", "three", "four"))),
        Procedure("wait", (says("wait.begin"), says("wait.wait", wait), says("wait.end"))),
        Procedure("deaf", (says("deaf.wait", deaf), end)),
        Procedure("copy", (says("copy.copy", copy),)),
        Procedure("verify", (says("verify.compare", differ), end)),
        Procedure("defect", (says("defect.divide", break_down), end)),
        Procedure("unprotect", (says("unprotect.begin"), says("unprotect.remove", remove)), preempts=True),
        Procedure("urgent", (says("urgent.wait", wait), says("urgent.end")), preempts=True),
        Procedure("test", (says("test.wait", wait), says("test.end")), holds=Holds.TEST),
        Procedure("resync", (says("resync.wait", wait), says("resync.end")), holds=Holds.REPLICATION),
        Procedure("unwritable", (says("unwritable.facts", lambda work: work.facts.update({"path": Path("/x")})),)),
    )
    return {procedure.kind: procedure for procedure in made}


class Reported:
    """Records the events that plug-ins receive."""

    def __init__(self) -> None:
        self.finished: list[FinishedJob] = []

    def plugin(self) -> Plugins:
        from asrcore.hookspecs import hookimpl

        reported = self

        class Listener:
            @hookimpl
            def asr_job_finished(self, job: FinishedJob) -> None:
                reported.finished.append(job)

        plugins = Plugins()
        assert plugins.register("listener", Listener())
        return plugins


@contextmanager
def engine(path: Path, plugins: Plugins | None = None) -> Iterator[Jobs]:
    """An engine in this process."""
    with Vault.open(path) as vault, vault.engine_lock("a test"):
        context = Context(vault, plugins or Plugins())
        jobs = Jobs(context, procedures(Trace(path)))
        try:
            jobs.start()
            yield jobs
        finally:
            jobs.close()


def submit(path: Path, kind: str, machine: str = "web1", now: float = 1000.0) -> Job:
    """Submit a job as another process does."""
    with Vault.open(path) as vault:
        return enqueue(vault, kind, vault.protection(machine), Arguments(), now=now)


def main(vault: str, verb: str, *rest: str) -> None:
    path = Path(vault)
    if verb == "submit":
        kind, machine = rest
        print(submit(path, kind, machine).id, flush=True)
        return
    with engine(path):
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
