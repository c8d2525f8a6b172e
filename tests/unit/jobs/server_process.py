"""A process server that runs the kit's jobs: `python -m tests.unit.jobs.server_process URL FOLDER NAME`.

It prints `ready`, and ends when its input ends, or with `given up` when other servers have taken over.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from asrcore.errors import AsrError
from asrcore.jobs import Jobs
from asrcore.plugins import Plugins
from asrcore.replication.context import Context
from asrcore.service.member import Member, ServerIdentity
from asrcore.vault import Vault
from tests.unit.jobs import job_procedures

LEASE = 3.0


def main(url: str, folder: str, name: str) -> None:
    stop = threading.Event()

    def lost(problem: AsrError) -> None:
        print("given up", flush=True)
        stop.set()

    with Vault.open(url) as vault, vault.engine_lock(name, shared=True):
        member = Member(vault, ServerIdentity(name, f"s-{name}", "here", lease=LEASE), lost)
        member.join(stop)
        jobs = Jobs(
            Context(vault, Plugins()),
            job_procedures.procedures(job_procedures.Trace(Path(folder) / "vault")),
            f"s-{name}",
        )
        try:
            jobs.start()
            print("ready", flush=True)
            threading.Thread(target=_until_input_ends, args=[stop], daemon=True).start()
            stop.wait()
        finally:
            jobs.close()
            member.leave()


def _until_input_ends(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    main(*sys.argv[1:])
