"""Process servers in the vault: leases, assignments, and that a server considered dead can no longer record
anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update

from asrcore.errors import InvalidValue, NotAssigned, ServerNameTaken, ServerReplaced, StaleEpoch, VaultInUse
from asrcore.model.protection import NetworkMap
from asrcore.model.server import ENGINE, Placement, Server
from asrcore.model.state import Event
from asrcore.service.assign import assign
from asrcore.vault import Job, JobState, Vault, _schema
from tests.unit.vault import samples

LEASE = 60.0


def silence(vault: Vault, name: str, seconds: float = 2 * LEASE) -> None:
    """As if the server had been silent for this long."""
    table = _schema.servers
    with vault._write("test") as connection:
        connection.execute(update(table).where(table.c.name == name).values(beat_at=table.c.beat_at - seconds))


@pytest.fixture
def one(place: str) -> Iterator[Vault]:
    """The server that has the machine `web-1`."""
    with Vault.open(place) as vault:
        vault.join("one", "s1", host="host-1", sites=None, lease=LEASE)
        assert [(item.name, item.server, item.before, item.epoch) for item in vault.assign(assign)] == [
            ("web-1", "one", "", 1)
        ]
        yield vault


@pytest.fixture
def two(place: str, one: Vault) -> Iterator[Vault]:
    with Vault.open(place) as vault:
        vault.join("two", "s2", host="host-2", sites=["north", "south"], lease=LEASE)
        yield vault


def take_over(one: Vault, two: Vault) -> None:
    silence(two, "one")
    (change,) = two.assign(assign)
    assert (change.name, change.server, change.before) == ("web-1", "two", "one")


# -- leases ------------------------------------------------------------------------------------------------------------


def test_a_server_lives_as_long_as_it_beats(one: Vault, two: Vault, vault: Vault) -> None:
    silence(two, "one", LEASE - 30)
    one.beat()
    assert [(item.name, item.host, item.sites, item.alive) for item in vault.servers()] == [
        ("one", "host-1", None, True),
        ("two", "host-2", frozenset({"north", "south"}), True),
    ]
    silence(two, "one")
    assert [item.alive for item in vault.servers()] == [False, True]
    one.beat()  # not noticed by other servers: it still has its machines
    assert [item.alive for item in vault.servers()] == [True, True]


def test_a_server_that_was_given_up_is_reported(one: Vault, two: Vault) -> None:
    take_over(one, two)
    with pytest.raises(ServerReplaced, match="'one'"):
        one.beat()
    assert [item.name for item in two.servers()] == ["two"]


def test_a_name_is_one_session_s(one: Vault, place: str) -> None:
    with Vault.open(place) as other:
        with pytest.raises(ServerNameTaken, match="host-1"):
            other.join("one", "s9", host="host-9", sites=None, lease=LEASE)
        silence(one, "one")
        other.join("one", "s9", host="host-9", sites=None, lease=LEASE)
        with pytest.raises(ServerReplaced):
            one.beat()
        (change,) = other.assign(assign)  # the same name is no longer the same process
        assert (change.server, change.before, change.epoch) == ("one", "", 2)


def test_who_leaves_gives_its_machines_up_at_once(one: Vault, two: Vault) -> None:
    one.leave()
    (change,) = two.assign(assign)
    assert (change.server, change.epoch) == ("two", 2)


def alone(vault: Vault, session: str = "s9") -> None:
    vault.join(ENGINE, session, host="host-9", sites=None, lease=LEASE, alone=True)


def test_one_engine_takes_all_from_servers_that_are_silent(one: Vault, two: Vault, vault: Vault) -> None:
    silence(vault, "one")
    with pytest.raises(VaultInUse, match="two on host-2, last seen"):
        alone(vault)
    silence(vault, "two")
    alone(vault)
    (change,) = vault.assign(assign)
    assert (change.name, change.server, change.epoch) == ("web-1", ENGINE, 2)
    for server in (one, two):
        with pytest.raises(ServerReplaced):
            server.beat()
    with pytest.raises(NotAssigned):
        one.update("id-1", attempt=1)
    vault.update("id-1", attempt=1)


def test_beside_one_engine_there_is_no_other(place: str, vault: Vault) -> None:
    alone(vault)
    with Vault.open(place) as other:
        with pytest.raises(VaultInUse, match="engine on host-9"):
            other.join("one", "s1", host="host-1", sites=None, lease=LEASE)
        with pytest.raises(VaultInUse, match="engine on host-9"):
            alone(other, "s8")
        alone(vault)  # the same session again
        silence(vault, ENGINE)
        alone(other, "s8")
        with pytest.raises(ServerReplaced):
            vault.beat()


def test_an_engine_is_fenced_as_a_server_is(place: str, vault: Vault) -> None:
    alone(vault)
    vault.assign(assign)
    vault.update("id-1", attempt=1)
    silence(vault, ENGINE)
    with Vault.open(place) as other:
        alone(other, "s8")
        (change,) = other.assign(assign)
        assert change.epoch == 2
    with pytest.raises(NotAssigned):
        vault.update("id-1", attempt=2)


def test_of_two_servers_that_join_at_once_one_is_refused(place: str, vault: Vault) -> None:
    if not vault.shareable:
        pytest.skip("servers share a vault on a database server only")
    together = threading.Barrier(4)

    def join(number: int) -> str:
        with Vault.open(place) as mine:
            together.wait(20)
            try:
                alone(mine, f"s{number}") if number % 2 else mine.join(
                    "one", f"s{number}", host="here", sites=None, lease=LEASE
                )
            except (VaultInUse, ServerNameTaken):
                return "refused"
            return "joined"

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(join, range(4))) == ["joined", "refused", "refused", "refused"]


def test_who_was_cut_off_itself_does_not_judge_the_others(one: Vault, two: Vault) -> None:
    """After an outage of the database, the first server that is back would end all others."""
    two.add_protection(samples.machine(2))
    silence(two, "one")
    assert [(change.name, change.server) for change in two.assign(assign, spare_silent=True)] == [("web-2", "two")]
    one.beat()
    assert [item.name for item in two.servers()] == ["one", "two"]
    assert two.assigned()["id-1"] == "s1"


# -- fencing -----------------------------------------------------------------------------------------------------------

WRITES: Mapping[str, Callable[[Vault], object]] = {
    "begin": lambda vault: vault.begin_cycle("id-1", samples.cycle(2, "p1")),
    "replan": lambda vault: vault.replan_cycle("id-1", samples.cycle(2, "p1")),
    "abandon": lambda vault: vault.abandon_cycle("id-1", "c2"),
    "record": lambda vault: vault.record_point("id-1", "c2", samples.point(2), stats=samples.stats(2)),
    "drop": lambda vault: vault.mark_dropping("id-1", ["p1"]),
    "forget": lambda vault: vault.forget_points("id-1", ["p1"]),
    "pin": lambda vault: vault.pin_point("id-1", "p1", True),
    "update": lambda vault: vault.update("id-1", attempt=3),
    "transition": lambda vault: vault.transition("id-1", Event.COPIED),
    "mark": lambda vault: vault.forget_mark("id-1", "why not"),
    "reverse": lambda vault: vault.start_reverse(
        "id-1", replica_id="x", source_machine="y", seed_machine=None, networks=NetworkMap()
    ),
    "remove": lambda vault: vault.remove_protection("id-1"),
    "job": lambda vault: vault.update_job("j1", state=JobState.RUNNING),
    "log": lambda vault: vault.add_event(at=1.0, machine="web-1", kind="failover", text="began"),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_server_that_was_given_up_records_nothing(what: str, one: Vault, two: Vault) -> None:
    samples.record(one, 1)
    one.begin_cycle("id-1", samples.cycle(2, "p1"))
    one.add_job(Job("j1", "replicate", "web-1"))
    take_over(one, two)
    before = two.protection("id-1"), two.points("id-1"), two.job("j1"), two.events()
    with pytest.raises(NotAssigned, match="'web-1' is no longer assigned to process server 'one'"):
        WRITES[what](one)
    assert before == (two.protection("id-1"), two.points("id-1"), two.job("j1"), two.events())
    assert one.protection("id-1").epoch == 2, "it may read"


def test_who_took_over_goes_on_with_the_cycle(one: Vault, two: Vault) -> None:
    one.begin_cycle("id-1", samples.cycle(1))
    take_over(one, two)
    pending = two.protection("id-1").pending
    assert pending is not None
    assert pending.id == "c1"
    two.record_point("id-1", "c1", samples.point(1), stats=samples.stats(1), epoch=2)
    assert two.protection("id-1").head_point == "p1"


@pytest.mark.parametrize("what", ["begin", "replan", "abandon", "record"])
def test_a_cycle_of_an_older_epoch_records_nothing(what: str, one: Vault) -> None:
    """Also where it is the same server: the machine was reassigned and returned meanwhile."""
    samples.record(one, 1)
    one.begin_cycle("id-1", samples.cycle(2, "p1"), epoch=1)
    before = one.update("id-1", epoch=2)
    calls: Mapping[str, Callable[[], object]] = {
        "begin": lambda: one.begin_cycle("id-1", samples.cycle(2, "p1"), epoch=1),
        "replan": lambda: one.replan_cycle("id-1", samples.cycle(2, "p1"), epoch=1),
        "abandon": lambda: one.abandon_cycle("id-1", "c2", epoch=1),
        "record": lambda: one.record_point("id-1", "c2", samples.point(2), stats=samples.stats(2), epoch=1),
    }
    with pytest.raises(StaleEpoch):
        calls[what]()
    assert one.protection("id-1") == before


def test_people_and_other_programs_record_as_before(one: Vault, vault: Vault) -> None:
    vault.update("id-1", test_network="lab")
    vault.add_job(Job("j1", "replicate", "web-1"))
    assert vault.request_cancel("j1")


# -- whose is what -----------------------------------------------------------------------------------------------------


def test_each_has_its_own_machines_and_jobs(one: Vault, two: Vault, vault: Vault) -> None:
    for number in range(2, 7):
        vault.add_protection(samples.machine(number))
        vault.add_job(Job(f"j{number}", "replicate", f"web-{number}"))
    one.assign(assign)
    mine, others = ({item.name for item in server.my_protections()} for server in (one, two))
    assert (len(mine), len(others)) == (3, 3)
    assert mine | others == {item.name for item in vault.my_protections()} == {f"web-{n}" for n in range(1, 7)}
    for server, names in ((one, mine), (two, others)):
        assert {job.machine for job in server.my_jobs()} == names - {"web-1"}


def test_a_job_of_a_machine_that_is_gone_is_one_server_s(one: Vault, two: Vault, vault: Vault) -> None:
    vault.add_job(Job("j1", "unprotect", "gone"))
    assert ([item.id for item in one.my_jobs()], two.my_jobs()) == (["j1"], [])
    one.update_job("j1", state=JobState.RUNNING)
    take_over(one, two)
    assert [item.id for item in two.my_jobs()] == ["j1"]
    with pytest.raises(NotAssigned):
        one.update_job("j1", state=JobState.DONE)
    two.update_job("j1", state=JobState.DONE)


def test_the_planner_sees_what_is_under_way(one: Vault, vault: Vault) -> None:
    for number in (2, 3):
        vault.add_protection(samples.machine(number))
    vault.begin_cycle("id-1", samples.cycle(1))
    vault.add_job(Job("j1", "replicate", "web-2"))
    seen: list[Placement] = []

    def look(servers: Sequence[Server], machines: Sequence[Placement]) -> Mapping[str, str]:
        seen.extend(machines)
        return {}

    assert vault.assign(look) == []
    assert sorted((item.machine, item.session, item.busy) for item in seen) == [
        ("id-1", "s1", True),
        ("id-2", None, True),
        ("id-3", None, False),
    ]


@pytest.mark.parametrize(
    ("kind", "suffices"),
    [("failover-unplanned", True), ("failover-commit", True), ("failover-planned", False), ("failover-undo", False)],
)
def test_the_planner_sees_which_jobs_need_the_target_only(kind: str, suffices: bool, vault: Vault) -> None:
    seen: list[Placement] = []

    def look(servers: Sequence[Server], machines: Sequence[Placement]) -> Mapping[str, str]:
        seen.extend(machines)
        return {}

    vault.assign(look)
    vault.add_job(Job("j1", kind, "web-1"))
    vault.assign(look)
    vault.update_job("j1", state=JobState.DONE)
    vault.assign(look)
    assert [item.target_suffices for item in seen] == [False, suffices, False]


def test_an_assignment_goes_with_its_machine(one: Vault, vault: Vault) -> None:
    one.remove_protection("id-1")
    assert vault.assigned() == {}


# -- on a database server ----------------------------------------------------------------------------------------------


def test_a_paused_transaction_holds_up_its_own_machine_only(
    place: str, one: Vault, two: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may be paused in the middle of recording: the database ends its session, and it records nothing."""
    if not one.shareable:
        pytest.skip("a SQLite file has one writer at a time, whoever it is")
    monkeypatch.setattr("asrcore.vault._place.IDLE_SECONDS", 2)
    for number in (2, 3):
        two.add_protection(samples.machine(number))
    one.assign(lambda servers, machines: {item.machine: "s1" for item in machines})
    paused, go_on = threading.Event(), threading.Event()
    problems: list[Exception] = []

    def record() -> None:
        try:
            with Vault.open(place) as same:
                same._member = one._member
                with same._write("test") as connection:
                    same._protection(connection, "id-2")
                    paused.set()
                    assert go_on.wait(60)
                    connection.exec_driver_sql("UPDATE protections SET attempt=7")
        except Exception as problem:  # noqa: BLE001 - looked at below
            problems.append(problem)

    thread = threading.Thread(target=record)
    thread.start()
    assert paused.wait(60)
    silence(two, "one")
    assert {change.name for change in two.assign(assign)} == {"web-1", "web-3"}
    ends = time.monotonic() + 60
    while not (changes := two.assign(assign)):
        assert time.monotonic() < ends
        threading.Event().wait(0.1)
    assert [change.name for change in changes] == ["web-2"]
    go_on.set()
    thread.join(60)
    assert len(problems) == 1
    assert {item.attempt for item in two.protections()} == {0}


def test_servers_share_the_lock_and_an_engine_does_not(place: str, one: Vault, two: Vault) -> None:
    if not one.shareable:
        with pytest.raises(InvalidValue) as caught:
            one.engine_lock("x", shared=True).__enter__()
        assert "postgresql://" in caught.value.cause_text
        return
    with one.engine_lock("server one", shared=True):
        assert str(two.engine_holder()).startswith("server one")
        with two.engine_lock("server two", shared=True), pytest.raises(VaultInUse), Vault.open(place) as engine:
            engine.engine_lock("asr run").__enter__()
    with Vault.open(place) as engine, engine.engine_lock("asr run"), pytest.raises(VaultInUse, match="asr run"):
        one.engine_lock("server one", shared=True).__enter__()
    assert one.engine_holder() is None
