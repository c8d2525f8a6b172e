"""A job that no process works on says what it waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asrcore.errors import TimedOut, VaultUnavailable
from asrcore.jobs import _record, follow
from asrcore.service.assign import assign
from asrcore.service.waiting import waits_for
from asrcore.vault import Job, JobState, Vault
from tests.postgres import Cluster
from tests.unit.service.test_member import silence
from tests.unit.vault import samples

Joined = Callable[..., Vault]


def filled(place: str) -> None:
    with Vault.create(place) as vault:
        vault.add_site(samples.NORTH)
        vault.add_site(samples.SOUTH)
        vault.add_policy(samples.GOLD)
        vault.add_protection(samples.machine())


@pytest.fixture
def url(postgres: Cluster) -> Iterator[str]:
    url = postgres.create()
    filled(url)
    yield url
    postgres.drop(url)


@pytest.fixture
def vault(url: str) -> Iterator[Vault]:
    with Vault.open(url) as opened:
        yield opened


def ordered(vault: Vault, kind: str = "failover-unplanned") -> Job:
    return vault.add_job(Job("j1", kind, "web-1"))


def join(vault: Vault, name: str, *sites: str) -> None:
    vault.for_others().join(name, f"s-{name}", host=f"host-{name}", sites=sites or None, lease=60.0)


def test_no_server_at_all(vault: Vault) -> None:
    job = ordered(vault)
    assert waits_for(vault, job) == "no engine works on the vault; start `asr run` or `asr process-server`"
    with vault.engine_lock("an older version"):
        assert waits_for(vault, job).startswith("waiting for an older version (pid ")
    assert waits_for(vault, vault.update_job("j1", state=JobState.DONE)) == ""


def test_the_server_that_has_not_begun_it(vault: Vault) -> None:
    job = ordered(vault)
    join(vault, "one")
    assert waits_for(vault, job) == "waiting to be assigned to a server"
    vault.assign(assign)
    assert waits_for(vault, job) == "waiting for process server one on host-one, last seen 0 s ago"
    assert waits_for(vault, vault.update_job("j1", step="waiting for replicate")) == ""
    assert waits_for(vault, vault.update_job("j1", state=JobState.RUNNING)) == ""


def test_the_engine_is_not_heard_of(vault: Vault) -> None:
    job = ordered(vault)
    vault.for_others().join("engine", "s1", host="host-1, pid 7", sites=None, lease=60.0, alone=True)
    vault.assign(assign)
    assert waits_for(vault, job) == "waiting for the engine on host-1, pid 7, last seen 0 s ago"
    silence(vault, 100)
    for state in (JobState.QUEUED, JobState.RUNNING):
        job = vault.update_job("j1", state=state)
        assert waits_for(vault, job) == "no server is alive: the engine on host-1, pid 7, last seen 100 s ago"


def test_the_server_of_the_machine_is_not_heard_of_and_another_is(vault: Vault) -> None:
    job = ordered(vault)
    join(vault, "one")
    vault.assign(assign)
    silence(vault, 100)
    join(vault, "two")
    expected = "process server one on host-one, last seen 100 s ago; another server takes over"
    assert waits_for(vault, job) == expected


@pytest.mark.parametrize(
    ("kind", "sites", "text"),
    [
        ("failover-planned", ["south"], "no living server reaches north and south"),
        ("failover-unplanned", ["north"], "no living server reaches south"),
        ("failover-unplanned", ["south"], "waiting to be assigned to a server"),
    ],
)
def test_no_living_server_reaches_the_sites(kind: str, sites: list[str], text: str, vault: Vault) -> None:
    job = ordered(vault, kind)
    join(vault, "one", *sites)
    assert waits_for(vault, job) == text


def test_a_vault_in_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "vault.db")
    filled(path)
    with Vault.open(path) as vault:
        job = ordered(vault)
        assert waits_for(vault, job) == "no engine works on the vault; start `asr run`"
        with vault.engine_lock("asr run"):
            assert waits_for(vault, job).startswith("waiting for asr run (pid ")


def test_who_follows_a_job_hears_of_it_and_bears_a_vault_that_blinks(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_record, "IDLE", 0.0)
    ordered(vault)
    job, left, heard = Vault.job, [1, 2, 3], list[str]()

    def answer(mine: Vault, job_id: str) -> Job:
        if left:
            raise VaultUnavailable(url=mine.url, detail=f"try {left.pop()}")
        return job(mine, job_id)

    monkeypatch.setattr(Vault, "job", answer)
    asked: list[bool] = []

    def alive() -> bool:
        asked.append(True)
        if len(asked) == 3:
            raise VaultUnavailable(url=vault.url, detail="again")
        return True

    with pytest.raises(TimedOut):
        follow(vault, "j1", timeout=2.0, on_idle=lambda now: heard.append(now.id), alive=alive)
    assert len(asked) > 3
    assert set(heard) == {"j1"}
    monkeypatch.setattr(_record, "AWAY", 0.2)
    left.extend(range(1000))
    with pytest.raises(VaultUnavailable):
        follow(vault, "j1", timeout=20)
