"""`asr status` and `asr job` say whether an engine works on the vault."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from asrcore import engine as engine_module
from asrcore.engine import Engine
from asrcore.jobs import enqueue
from asrcore.model.protection import Protection
from asrcore.model.server import ENGINE
from asrcore.model.state import Event
from asrcore.procedures.procedure import Arguments
from asrcore.service.status import EngineStatus
from asrcore.testing.memory import MemoryWorld
from asrcore.vault import JobState, Vault
from tests.unit.cli.conftest import Asr


@pytest.fixture
def interrupted(asr: Asr, sites: MemoryWorld, tmp_path: Path) -> Vault:
    """`asr protect` was ended by Ctrl-C in its initial copy, and no service runs."""
    vault = Vault.open(tmp_path / "vault.db")
    protection = vault.add_protection(
        Protection("m1", "web", "gold", "a", "a", sites.machine("web").value.id, "b", "r1")
    )
    vault.transition(protection.id, Event.REPLICA_CREATED)
    job = enqueue(vault, "protect", protection, Arguments(), now=1.0)
    vault.update_job(job.id, state=JobState.RUNNING, step="copy", started_at=1.0)
    return vault


def test_without_an_engine_the_first_line_says_how_to_start_one(asr: Asr, interrupted: Vault) -> None:
    code, said = asr("status", as_json=False)
    assert code == 0
    assert said.splitlines()[0] == "engine: NOT RUNNING - start asr-run.service or `asr run`"
    assert "protect (waiting)" in said
    assert "critical" in said
    assert "[no-engine]" in said
    assert "automatically" not in said, "nothing happens automatically"


def test_programs_see_it_too(asr: Asr, interrupted: Vault) -> None:
    (found,) = asr("status")[1]
    down = {"up": False, "host": None, "pid": None, "command": None, "servers_up": 0, "servers": 0}
    assert found["engine"] == down
    assert found["health"]["level"] == "critical"
    assert found["health"]["reasons"][0]["code"] == "no-engine"


def test_a_job_without_an_engine_waits(asr: Asr, interrupted: Vault) -> None:
    (job,) = asr("job", "list")[1]
    assert (job["state"], job["waiting"]) == ("running", True)
    assert asr("job", "show", job["id"])[1]["waiting"]
    _, said = asr("job", "list", as_json=False)
    assert " waiting " in said
    assert " running " not in said
    _, said = asr("job", "show", job["id"], as_json=False)
    assert "protect of web, waiting" in said
    assert "NOT RUNNING" in said


def test_with_an_engine_nothing_waits(asr: Asr, interrupted: Vault) -> None:
    with interrupted.engine_lock(engine_module._holder()):
        _, said = asr("status", as_json=False)
        first = said.splitlines()[0]
        assert first.startswith(f"engine: up on {socket.gethostname()}, pid {os.getpid()} (")
        assert "waiting" not in said
        assert "no-engine" not in said
        (found,) = asr("status")[1]
        assert found["engine"]["up"]
        assert (found["engine"]["host"], found["engine"]["pid"]) == (socket.gethostname(), os.getpid())
        assert asr("job", "list")[1][0]["waiting"] is False
        assert " running " in asr("job", "list", as_json=False)[1]


def test_an_empty_vault_has_the_line_and_nothing_critical(asr: Asr, sites: MemoryWorld) -> None:
    _, said = asr("status", as_json=False)
    assert said.splitlines() == [
        "engine: NOT RUNNING - start asr-run.service or `asr run`",
        "no machine is protected (`asr protect`)",
    ]
    assert asr("status")[1] == []


def test_a_job_that_is_not_awaited_says_that_it_needs_a_service(asr: Asr, sites: MemoryWorld) -> None:
    words = ("protect", "web", "--from", "a", "--to", "b", "--policy", "gold", "--no-wait")
    assert "waits until the service runs" in asr(*words, as_json=False)[1]


def test_a_verb_that_leaves_a_machine_to_the_service_says_that_none_runs(asr: Asr, sites: MemoryWorld) -> None:
    said = asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold", as_json=False)[1]
    assert "no service runs, so web is not replicated: start asr-run.service or `asr run`" in said
    assert "no service" not in asr("verify", "web", as_json=False)[1]
    assert "engine: NOT RUNNING" in asr("resync", "web", as_json=False)[1]


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (EngineStatus("process 17 on beta: asr run (pid 17 on beta)"), "engine: up on beta, pid 17 (asr run)"),
        (EngineStatus("process 17 on beta: asr failover pl"), "engine: up on beta, pid 17 (asr failover pl)"),
        (
            EngineStatus(f"process 17 on beta: asr serve {'--site a ' * 20}"),
            "engine: up on beta, pid 17 (asr serve --site a --site a --site a --site a --site a --sit...)",
        ),
        (EngineStatus("an engine that is just starting"), "engine: up, an engine that is just starting"),
        (EngineStatus("process 17 on ps1: asr", 2, 3), "engine: 2 of 3 process servers are up"),
        (
            EngineStatus("process 17 on ps1: asr", 0, 3),
            "engine: NOT RUNNING - start asr-process-server.service or `asr process-server`; "
            "0 of 3 process servers are up",
        ),
    ],
    ids=str,
)
def test_the_line_names_who_works(found: EngineStatus, line: str) -> None:
    assert str(found) == line
    assert found.up == ("NOT RUNNING" not in line)


def test_the_engine_of_a_shared_vault_is_no_process_server(asr: Asr, interrupted: Vault) -> None:
    where = f"{socket.gethostname()}, pid {os.getpid()}"
    interrupted.join(ENGINE, "s1", host=where, sites=None, lease=60, alone=True)
    assert asr("status", as_json=False)[1].splitlines()[0] == f"engine: up on {where}"
    (found,) = asr("status")[1]
    at_work = found["engine"]
    assert (at_work["up"], at_work["servers"], at_work["pid"]) == (True, 0, os.getpid())
    assert not any(reason["code"] == "no-engine" for reason in found["health"]["reasons"])
    interrupted.join(ENGINE, "s1", host=where, sites=None, lease=-1, alone=True)
    first = asr("status", as_json=False)[1].splitlines()[0]
    assert first.startswith("engine: NOT RUNNING - start asr-run.service or `asr run`; last seen ")
    assert first.endswith(f" ago on {where}")
    assert asr("status")[1][0]["health"]["reasons"][0]["code"] == "no-engine"


def test_jobs_of_a_shared_vault_wait_for_its_one_engine(asr: Asr, interrupted: Vault) -> None:
    for lease, waiting in ((60, False), (-1, True)):
        interrupted.join(ENGINE, "s1", host="beta, pid 17", sites=None, lease=lease, alone=True)
        (job,) = asr("job", "list")[1]
        assert (job["waiting"], asr("job", "show", job["id"])[1]["waiting"]) == (waiting, waiting)
        for words in (("job", "list"), ("job", "show", job["id"])):
            said = asr(*words, as_json=False)[1]
            assert "process server" not in said
            assert ("waiting" in said, "running" in said) == (waiting, not waiting)
    assert "NOT RUNNING - start asr-run.service or `asr run`; last seen " in said
    assert "on beta, pid 17\n  the job resumes when an engine is up\n" in said


def test_an_engine_that_is_gone_does_not_count_beside_process_servers(asr: Asr, interrupted: Vault) -> None:
    interrupted.join(ENGINE, "s1", host="beta, pid 17", sites=None, lease=-1, alone=True)
    for name in ("one", "two"):
        interrupted.join(name, name, host="gamma, pid 18", sites=None, lease=60)
    said = asr("status", as_json=False)[1]
    assert said.splitlines()[0] == "engine: 2 of 2 process servers are up"
    assert "no-engine" not in said


def test_the_library_says_the_same(interrupted: Vault, tmp_path: Path) -> None:
    with Engine.open(str(tmp_path / "vault.db")) as engine:
        found: Any = engine.status()[0]
        assert not found.engine.up
        assert found.health.reasons[0].code == "no-engine"
