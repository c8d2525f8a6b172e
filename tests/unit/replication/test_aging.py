"""Nothing is deleted by age on a clock that cannot be trusted, and ages are counted by the monotonic clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from asrcore.model.policy import Policy
from asrcore.replication import aging
from asrcore.replication.aging import Aging
from asrcore.service import status
from asrcore.units import DAY, HOUR, MINUTE
from asrcore.vault import Vault
from tests.unit.rig import Rig


class Host:
    """The engine's host: `ahead` moves its clock, `pass_time` lets time pass, `restart` loses what is in memory."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.true = rig.clock
        self.ahead = 0.0
        self.begin()

    def begin(self) -> None:
        context = self.rig.engine.context
        context.elapsed = self.true
        context.clock = lambda: self.true() + self.ahead

    def restart(self, run: str = "") -> None:
        self.rig.restart()
        self.begin()
        if run:
            self.rig.engine.context.aging._run = run

    def pass_time(self, seconds: float) -> None:
        self.true.now += seconds

    def cycle(self, seconds: float = 0.0) -> None:
        self.pass_time(seconds)
        self.rig.machine.write("vda", 0, bytes(str(self.true.now), "ascii"))
        self.rig.engine.replicate("web", keep=True)

    def held(self, seconds: float = HOUR + 1, every: float = 1200.0) -> None:
        """The service runs for an hour."""
        for _ in range(int(seconds / every) + 1):
            self.cycle(every)

    @property
    def points(self) -> list[str]:
        return [point.id for point in self.rig.engine.points("web")]

    @property
    def status(self) -> status.MachineStatus:
        """As it is shown while the service runs."""
        at_work = status.EngineStatus("process 1 on here: asr run")
        (item,) = status.machines(self.rig.engine.vault, self.rig.engine.context.clock(), at_work)
        return item

    @property
    def reasons(self) -> list[str]:
        return [reason.code for reason in self.status.health.reasons if reason.code != "test-due"]


@pytest.fixture
def host(rig: Rig) -> Host:
    rig.engine.vault.update_policy(Policy("gold", interval=5.0, point_interval=5.0, keep=DAY, ladder=()))
    made = Host(rig)
    rig.protect()
    for _ in range(8):
        made.cycle(5.0)
    return made


@pytest.mark.parametrize("step", [60.0, DAY, 2 * DAY, 40 * DAY, -HOUR, -2 * DAY])
def test_a_clock_that_is_set_deletes_nothing(host: Host, step: float) -> None:
    before = host.points
    host.ahead += step
    host.cycle()
    assert host.reasons == ["retention-held"]
    for _ in range(10):
        host.cycle(5.0)
    host.ahead -= step
    host.cycle()
    host.cycle()
    assert set(before) < set(host.points)
    assert [event.text.partition(" by ")[0] for event in host.rig.engine.vault.events(kinds=["clock"])] == [
        f"the clock was set {'forward' if step > 0 else 'back'}",
        f"the clock was set {'back' if step > 0 else 'forward'}",
    ]


def test_a_clock_that_stays_ahead_is_trusted_after_an_hour_and_ages_nothing(host: Host) -> None:
    before = host.points
    host.ahead += 2 * DAY
    host.held()
    assert host.reasons == []
    assert set(before) < set(host.points), "no time but an hour has passed"
    assert host.rig.engine.vault.events(kinds=["clock-accepted"])


def test_points_age_by_the_time_that_passes_whatever_the_clock_says(host: Host) -> None:
    before = host.points
    host.ahead -= 30 * DAY
    host.held(DAY + HOUR, every=1800.0)
    assert not set(before) & set(host.points)


def test_a_restart_does_not_hide_a_step(host: Host) -> None:
    before = host.points
    host.ahead += 2 * DAY
    host.restart()
    host.cycle()
    assert host.reasons == ["retention-held"]
    host.restart()
    host.cycle(10 * MINUTE)
    assert host.reasons == ["retention-held"]
    host.ahead -= 2 * DAY
    host.held()
    assert set(before) < set(host.points)
    assert host.reasons == []


def test_the_hour_goes_on_over_a_restart_of_the_service_but_not_of_the_host(host: Host) -> None:
    host.ahead += 2 * DAY
    host.cycle()
    host.pass_time(HOUR + 1)
    host.restart()
    assert host.rig.engine.context.aging.watch()
    host.ahead += 2 * DAY
    assert not host.rig.engine.context.aging.watch()
    host.pass_time(HOUR + 1)
    host.restart(run="another")
    assert not host.rig.engine.context.aging.watch()


def test_days_without_a_service_count_when_the_clock_has_held(host: Host) -> None:
    before = host.points
    host.pass_time(3 * DAY)
    host.restart()
    host.cycle()
    assert host.reasons == ["retention-held"]
    assert set(before) < set(host.points)
    host.held()
    assert host.reasons == []
    for _ in range(20):
        host.cycle(5.0)
    assert not set(before) & set(host.points)


def test_days_without_a_service_count_when_a_person_says_so_and_once(host: Host) -> None:
    before = host.points
    host.rig.engine.vault.update_policy(Policy("gold", interval=5.0, point_interval=5.0, keep=5 * DAY, ladder=()))
    for _ in range(2):  # the source is down: there is no cycle between the two
        host.pass_time(2 * DAY)
        host.restart()
        host.rig.engine.context.aging.meet([(host.rig.protection.id, 5.0)])
        assert host.rig.engine.vault.accept_clock(host.rig.engine.context.clock(), "a person")
        assert not host.rig.engine.vault.accept_clock(host.rig.engine.context.clock(), "a person")
    host.restart()
    host.cycle()
    assert set(before) < set(host.points), "four days have passed, not six"
    host.held(DAY, every=3600.0)
    assert not set(before) & set(host.points)


def test_nothing_is_deleted_while_the_clock_is_in_doubt(host: Host) -> None:
    before = host.points
    host.cycle(DAY - 10 * MINUTE)
    host.ahead += 60
    host.cycle()
    for _ in range(5):
        host.cycle(5 * MINUTE)
    assert set(before) < set(host.points), "they are older than the policy keeps, but the clock is in doubt"
    assert host.rig.engine.vault.accept_clock(host.rig.engine.context.clock(), "a person")
    for _ in range(10):
        host.cycle(5.0)
    assert not set(before) & set(host.points)


def test_a_step_without_a_cycle_is_remembered_over_a_restart(host: Host) -> None:
    before, watch = host.points, host.rig.engine.context.aging.watch
    host.ahead += 2 * DAY
    assert not watch()
    host.pass_time(HOUR + 1)
    assert watch()
    host.restart()
    host.cycle()
    assert host.reasons == []
    host.held()
    assert set(before) < set(host.points)


def test_a_quarter_of_the_points_is_deleted_at_once(host: Host) -> None:
    for _ in range(11):
        host.cycle(5.0)
    counts = [len(host.points)]
    host.rig.engine.vault.update_policy(Policy("gold", interval=5.0, point_interval=5.0, keep=5.0, ladder=()))
    for _ in range(12):
        host.cycle(5.0)
        counts.append(len(host.points))
    assert counts == [20, 15, 12, 9, 7, 6, 5, 4, 3, 3, 3, 3, 3]


def test_rpo_is_unknown_after_the_clock_went_back_until_the_next_point(host: Host) -> None:
    host.pass_time(100)
    host.ahead -= 60  # then the newest point would be 40 s old
    host.rig.engine.context.aging.watch()
    assert host.status.rpo_seconds is None
    assert host.reasons == ["clock-went-back", "retention-held"]
    host.cycle()
    assert host.status.rpo_seconds == pytest.approx(0, abs=1)
    assert host.reasons == ["retention-held"]


def test_a_server_whose_clock_is_not_the_databases_is_not_trusted(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    skew = 90.0
    monkeypatch.setattr(type(host.rig.engine.vault), "clock_skew", lambda vault, clock: skew)
    host.ahead += 90
    host.held()
    assert host.reasons == ["retention-held"]
    skew = 0.5
    host.cycle()
    assert host.reasons == []


class Other:
    """Process server `a` on a host with the right clock. The engine of the rig is server `b` of the same vault."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.vault = Vault.open(host.rig.vault)
        self.aging = Aging(self.vault, lambda: (host.true(), host.true()), "run-of-a")
        self.vault.join("a", "a1", host="a", sites=None, lease=1e9)
        self.join("b1")

    def join(self, session: str) -> None:
        """Server `b` starts and is given the machine."""
        self.host.rig.engine.vault.join("b", session, host="b", sites=None, lease=1e9)
        self.give(session)

    def give(self, session: str) -> None:
        self.vault.assign(lambda servers, machines: {item.machine: session for item in machines})

    def restart(self, session: str, run: str) -> None:
        self.host.rig.engine.vault.leave()
        self.host.restart(run)
        self.join(session)

    def look(self) -> bool:
        """As its scheduler does; returns whether this server would delete points."""
        trusted = self.aging.watch()
        mine = [item.id for item in self.vault.my_protections()]
        self.aging.keep_only(mine)
        self.aging.meet((item, 5.0) for item in mine)
        return trusted

    def held(self) -> bool:
        """Both servers run for an hour."""
        for _ in range(4):
            self.host.pass_time(1200)
            self.host.rig.engine.context.aging.watch()
            self.look()
        return self.look()


@pytest.fixture
def other(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Other]:
    def skew(vault: Vault, clock: Callable[[], float]) -> float:
        return clock() - host.true()

    monkeypatch.setattr(Vault, "clock_skew", skew)
    made = Other(host)
    yield made
    made.vault.close()


def test_a_server_does_not_accept_the_clock_of_another(host: Host, other: Other) -> None:
    before = host.points
    host.ahead += 2 * DAY
    other.restart("b2", "run-of-b")
    host.cycle()
    assert not other.held()
    assert not other.held(), "server b is at work, and its clock is still wrong"
    for _ in range(10):
        host.cycle(5.0)
    assert host.reasons == ["retention-held"]
    assert "process server b: " in host.rig.engine.vault.clock_state().text
    host.ahead -= 2 * DAY
    host.held()
    for _ in range(10):
        host.cycle(5.0)
    assert set(before) < set(host.points)
    assert host.reasons == []
    assert other.look()


def test_the_clock_of_a_server_without_a_registration_is_not_accepted_for_its_machines(host: Host) -> None:
    before = host.points
    host.ahead += 2 * DAY
    host.restart("run-of-b")
    host.cycle()
    with Vault.open(host.rig.vault) as vault:
        right = Aging(vault, lambda: (host.true(), host.true()), "run-of-a")
        for _ in range(5):
            right.watch()
            host.pass_time(1200)
    for _ in range(10):
        host.cycle(5.0)
    assert set(before) < set(host.points)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_machine_that_a_server_with_a_wrong_clock_had_is_measured_again(
    host: Host, other: Other, *, leaves: bool
) -> None:
    before = host.points
    host.ahead += 2 * DAY
    other.restart("b2", "run-of-b")
    host.cycle(5.0)
    if leaves:
        host.rig.engine.vault.leave()
    other.give("a1")
    assert other.held() == leaves
    host.rig.engine.vault.leave()
    assert other.held()
    counts = host.rig.engine.vault.aging_points(host.rig.protection.id, host.true() + 9 * DAY)
    assert {item.id for item in counts} >= set(before)
    assert min(item.taken_at for item in counts) > host.true() - DAY / 2


def test_a_server_that_has_not_noticed_that_a_machine_was_given_to_another_does_not_age_it(
    host: Host, other: Other
) -> None:
    before = host.points
    other.aging.meet([(host.rig.protection.id, 5.0)])
    host.ahead += 2 * DAY
    other.restart("b2", "run-of-b")
    host.cycle(5.0)
    host.rig.engine.vault.leave()
    other.aging.watch()
    host.pass_time(HOUR + 1)
    assert other.aging.watch()
    counts = other.vault.aging_points(host.rig.protection.id, host.true() + 1)
    assert {item.id for item in counts} >= set(before)
    assert min(item.taken_at for item in counts) > host.true() - DAY / 2


def test_days_without_servers_count_for_a_machine_that_was_given_to_another(host: Host, other: Other) -> None:
    protection = host.rig.protection.id
    (oldest, *_) = host.rig.engine.vault.aging_points(protection, host.true() + 1)
    host.pass_time(3 * DAY)
    other.give("a1")
    other.look()
    other.restart("b2", "run-of-b")
    host.cycle()
    assert {doubt.server for doubt in other.vault.clock_state().doubts} == {"a", "b"}
    assert other.held()
    host.rig.engine.context.aging.watch()
    (now, *_) = host.rig.engine.vault.aging_points(protection, host.true() + 1)
    assert now.id == oldest.id
    assert now.taken_at == pytest.approx(oldest.taken_at - 3 * DAY, abs=HOUR)


def test_the_hosts_monotonic_clock_and_its_run_are_the_same_in_each_process() -> None:
    assert aging.host_run() == aging.host_run()
    assert len(aging.host_run()) > 8
