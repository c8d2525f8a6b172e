"""What `asr status` reads directly: the same as through the vault, or nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrcore.engine import Engine
from asrcore.errors import AsrError
from asrcore.model.protection import TestRun
from asrcore.model.state import Event
from asrcore.service import status
from asrcore.vault import ClockAnchor, Job, JobState, NeedsEngine, StatusReader, Vault, _lock, _status_reader
from asrcore.vault._versions import REVISIONS, VERSION_TABLE
from tests.unit.vault.samples import cycle, machine, record

NOW = 5000.0


def assert_same(path: Path, vault: Vault) -> None:
    """Everything that the status reader returns equals the vault's content."""
    with StatusReader.open(path) as seen:
        assert seen.protections() == vault.protections()
        assert [item.pending for item in seen.protections()] == [item.pending for item in vault.protections()]
        assert seen.policies() == vault.policies()
        assert seen.heads() == vault.heads()
        assert seen.point_counts() == vault.point_counts()
        assert seen.damaged_counts() == vault.damaged_counts()
        assert seen.clock_state() == vault.clock_state()
        for number in (0, 1, 1000):
            assert seen.heads_until(number) == vault.heads_until(number)
        assert seen.last_cycles() == vault.last_cycles()
        assert seen.servers() == vault.servers() == []
        assert seen.engine_holder() == vault.engine_holder()
        for kind in ("verify", "failover-test"):
            assert seen.last_ended(kind) == vault.last_ended(kind)
        for active in (True, False):
            assert seen.jobs(1000, active=active) == vault.jobs(1000, active=active)
        assert seen.jobs(1, active=False) == vault.jobs(1)
        found, wanted = status.machines(seen, NOW), status.machines(vault, NOW)
    assert found == wanted
    # 0 and False are equal but differ in JSON
    assert str([status.document(item) for item in found]) == str([status.document(item) for item in wanted])


def job(number: int, kind: str = "verify", state: JobState = JobState.DONE, name: str = "web-1") -> Job:
    ended = 4000.0 + number if state.ended else None
    error = {"code": "x"} if state is JobState.FAILED else None
    return Job(f"j-{number}", kind, name, state, "{}", created_at=3000.0 + number, ended_at=ended, error=error)


def test_a_vault_as_work_leaves_it(path: Path) -> None:
    with Vault.open(path) as vault:
        assert_same(path, vault)
        for number in (2, 3, 4):
            vault.add_protection(machine(number))
        vault.transition("id-1", Event.REPLICA_CREATED)
        for number in range(1, 6):
            record(vault, number, kept=number % 2 == 1)
        for point in ("p1", "p3", "p5"):
            assert vault.note_examined("id-1", point, damaged="a byte", proved_at=7.5) == ""
        vault.mark_dropping("id-1", ["p1"])
        vault.begin_cycle("id-2", cycle(9))
        vault.update("id-1", last_test_at=3000.5, test_network="lab")
        vault.update("id-3", error={"code": "asr-1", "text": "it's \N{SNOWMAN}"}, retry_at=6000.0)
        vault.update("id-4", test=TestRun("t1", "p1", "instance", 10.0), fence_due=True)
        for number, state in enumerate(JobState):
            vault.add_job(job(number, state=state))
            vault.add_job(job(number + 100, "failover-test", state, "web-2"))
        assert_same(path, vault)
        anchors = {"id-1": ClockAnchor("p5", 1005.0, 1005.0)}
        doubt = vault.doubt_clock(
            NOW, "set back", boot="b", elapsed=5.0, anchors=anchors, gaps={"id-1": 3.0}, went_back=4.0
        )
        assert (doubt.held, doubt.anchors, doubt.before > 0) == (True, anchors, True)
        assert_same(path, vault)
        assert vault.accept_clock(NOW, "right")
        assert_same(path, vault)
        with vault.engine_lock("a test"):
            assert_same(path, vault)


STEPS: dict[str, Callable[[Vault, int], object]] = {
    "machine": lambda vault, number: vault.add_protection(machine(number + 10)),
    "record": lambda vault, number: record(vault, number, kept=number % 3 == 0),
    "begin": lambda vault, number: vault.begin_cycle("id-2", cycle(number)),
    "drop": lambda vault, number: vault.mark_dropping("id-1", [f"p{number - 1}", f"p{number - 2}"]),
    "job": lambda vault, number: vault.add_job(job(number, state=list(JobState)[number % len(JobState)])),
    "error": lambda vault, number: vault.update("id-1", error={"n": number}, fence_due=bool(number % 2)),
}


@settings(max_examples=25)
@given(steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=15))
def test_whatever_was_recorded(made_once: Path, tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    path = tmp_path_factory.mktemp("glance") / "vault.db"
    path.write_bytes(made_once.read_bytes())
    with Vault.open(path) as vault:
        vault.add_protection(machine(2))
        for number, step in enumerate(steps):
            with suppress(AsrError):  # for example, a second cycle during the first
                STEPS[step](vault, number)
        assert_same(path, vault)


def test_it_sees_one_state_and_keeps_nobody_from_working(path: Path) -> None:
    with Vault.open(path) as vault, StatusReader.open(path) as seen:
        before = seen.protections()
        vault.add_protection(machine(2))
        assert seen.protections() == before != vault.protections()


def sql(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


def refuses(place: str | Path) -> str:
    with pytest.raises(NeedsEngine) as caught, StatusReader.open(place) as seen:
        status.machines(seen, NOW)
    return str(caught.value)


def test_what_is_not_plain_is_left_to_the_vault(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refuses(f"sqlite:///{path}") == "a URL"
    assert refuses(tmp_path / "none.db") == "no file"
    assert refuses(tmp_path) == "no file"
    (tmp_path / "text.db").write_text("no database" * 100)
    sql(tmp_path / "other.db", "CREATE TABLE asr_version (version_num)")
    there = sorted(tmp_path.iterdir())
    assert refuses(tmp_path / "text.db") == refuses(tmp_path / "other.db") == "no vault"
    assert sorted(tmp_path.iterdir()) == there
    with monkeypatch.context() as patch:
        patch.setattr(_status_reader, "REVISIONS", ("0001", "next"))
        assert "another version" in refuses(path)
    use = _lock.UseLock(path.with_name(path.name + ".users"))
    use.alone()
    assert "asr vault move" in refuses(path)
    use.close()
    with StatusReader.open(path) as seen:
        assert len(status.machines(seen, NOW)) == 1


def test_a_file_that_is_replaced_while_it_is_opened_is_no_vault(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.db"
    sql(other, f"CREATE TABLE {VERSION_TABLE} AS SELECT '{REVISIONS[-1]}' AS version_num")

    def lock(at: Path) -> _lock.UseLock:
        other.replace(path)
        return _lock.UseLock(at)

    monkeypatch.setattr(_status_reader, "UseLock", lock)
    assert refuses(path) == "no vault"


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE protections SET state = 'dancing'",
        "UPDATE protections SET networks = '[]'",
        "UPDATE policies SET body = '{'",
        "DELETE FROM policies",
        "DROP TABLE cycles",
        "INSERT INTO servers (name, session, host, lease, beat_at) VALUES ('a', 's', 'h', 15, 0)",
    ],
)
def test_nothing_is_said_of_what_cannot_be_read(path: Path, damage: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA foreign_keys=OFF")
        connection.execute(damage)
    assert refuses(path)


def test_status_is_the_same_whoever_reads(path: Path) -> None:
    with Engine.open(str(path)) as engine, StatusReader.open(path) as seen:
        now = engine.context.clock()
        assert status.machines(seen, now) == status.machines(engine.vault, now)
