"""What only the engine does: who runs a job, which machine is meant, what is recorded of sites, and following jobs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

import asrcore.testing.memory
from asrcore.engine import Engine
from asrcore.errors import (
    AccessDenied,
    AlreadyExists,
    AlreadyProtected,
    AmbiguousName,
    AsrError,
    Cancelled,
    DriverNotFound,
    EngineStopped,
    InvalidSetting,
    MachineNotFound,
    NotFound,
    NotReady,
    SiteUnreachable,
    TimedOut,
    VaultInUse,
    WrongState,
)
from asrcore.jobs import _record
from asrcore.model.finding import Finding, Severity
from asrcore.model.policy import ALWAYS, Policy
from asrcore.model.protection import Protection, Site
from asrcore.model.state import Event, State
from asrcore.plugins import Plugins
from asrcore.procedures.procedure import Arguments
from asrcore.testing.memory import MemoryWorld
from asrcore.units import MiB
from asrcore.vault import Job, JobState, Vault

PATIENCE = 60.0  # seconds for a job, on a busy machine
GOLD = Policy("gold", interval=5.0, point_interval=5.0, resync_window=ALWAYS)


@pytest.fixture
def home() -> MemoryWorld:
    world = MemoryWorld("home")
    machine = world.add_machine("web", {"vda": 1 * MiB})
    machine.write("vda", 0, b"x" * 10_000)
    MemoryWorld("away")
    return world


@pytest.fixture
def opened(home: MemoryWorld, tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    """Opens another engine on the same vault, as another process would."""
    loaded = Plugins()
    assert loaded.register("memory", asrcore.testing.memory), loaded.broken
    url = str(tmp_path / "vault.db")
    with Engine.create(url, loaded) as first:
        first.add_site("a", "memory", {"world": "home"})
        first.add_site("b", "memory", {"world": "away"})
        first.vault.add_policy(GOLD)
    engines: list[Engine] = []

    def make() -> Engine:
        engines.append(Engine.open(url, loaded))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(opened: Callable[[], Engine]) -> Engine:
    return opened()


def protect(engine: Engine, machine: str = "web") -> Job:
    return engine.protect(machine, source="a", target="b", policy="gold")


@contextmanager
def run_by_another(engine: Engine) -> Iterator[None]:
    """Another process holds the vault's engine lock, and takes no job yet."""
    with Vault.open(engine.vault.url) as other, other.engine_lock("the other one"):
        yield


# -- who runs a job ----------------------------------------------------------------------------------------------------


def test_a_job_runs_here_where_no_engine_works_on_the_vault(engine: Engine) -> None:
    assert engine.vault.engine_holder() is None
    job = engine.wait(protect(engine), timeout=PATIENCE)
    assert job.state is JobState.DONE
    assert engine.vault.protection("web").state is State.PROTECTED
    assert engine.vault.engine_holder() is not None, "it stays this vault's engine"
    engine.close()
    with Vault.open(engine.vault.url) as vault:
        assert vault.engine_holder() is None


def test_a_job_is_handed_to_the_engine_that_works_on_the_vault(opened: Callable[[], Engine]) -> None:
    working, asking = opened(), opened()
    working.start()
    seen: list[Job] = []
    job = asking.wait(protect(asking), seen.append, timeout=PATIENCE)
    assert job.state is JobState.DONE
    assert seen[-1] == job
    assert json.loads(job.result or "{}")["bytes_sent"] > 0
    with pytest.raises(VaultInUse):
        asking.start()


def test_a_job_whose_engine_was_started_meanwhile_is_handed_to_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_by_another(engine):
        monkeypatch.setattr(engine.vault, "engine_holder", lambda: None)  # the look before the other one started
        job = protect(engine)
        assert engine.vault.job(job.id).state is JobState.QUEUED


def test_a_job_is_kept_for_the_next_engine(opened: Callable[[], Engine]) -> None:
    asking = opened()
    with run_by_another(asking):
        job = protect(asking)
    later = opened()
    later.start()
    assert later.wait(job, timeout=PATIENCE).state is JobState.DONE


def test_waiting_ends_when_the_engine_that_had_the_job_is_gone(
    opened: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_record, "PATIENCE", 0.3)
    asking = opened()
    with run_by_another(asking):
        job = protect(asking)
        with pytest.raises(TimedOut):
            asking.wait(job, timeout=1)
    with pytest.raises(EngineStopped, match=job.id):
        asking.wait(job, timeout=PATIENCE)


def test_starting_twice_is_starting_once(engine: Engine) -> None:
    engine.start()
    engine.start()
    assert engine.wait(protect(engine), timeout=PATIENCE).state is JobState.DONE


def test_an_engine_may_be_closed_twice(opened: Callable[[], Engine]) -> None:
    engine = opened()
    engine.start()
    engine.close()
    engine.close()
    opened().start()


def test_the_error_of_a_block_is_not_replaced_by_one_of_closing(
    opened: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("while closing")

    engine = opened()
    monkeypatch.setattr(engine.context, "close", fail)
    with pytest.raises(KeyError, match="first"), engine:
        raise KeyError("first")
    with pytest.raises(OSError, match="while closing"), engine:
        pass


# -- following jobs ----------------------------------------------------------------------------------------------------


def test_waiting_ends_after_the_time_limit_and_the_job_stays(engine: Engine) -> None:
    with run_by_another(engine):
        job = protect(engine)
        with pytest.raises(TimedOut):
            engine.wait(job, timeout=0.05)
        assert engine.vault.job(job.id).state is JobState.QUEUED


@pytest.mark.parametrize("here", [True, False], ids=["run here", "run by another"])
def test_waiting_raises_the_error_of_a_job(opened: Callable[[], Engine], home: MemoryWorld, here: bool) -> None:
    working, asking = opened(), opened()
    working.wait(protect(working), timeout=PATIENCE)
    home.machine("web").configure(ignores_shutdown=True)
    job = (working if here else asking).failover_planned("web", timeout=0.1)
    with pytest.raises(AsrError) as caught:
        (working if here else asking).wait(job, timeout=PATIENCE)
    assert caught.value.code == "shutdown-failed"


def test_a_job_that_was_cancelled_never_begins(opened: Callable[[], Engine]) -> None:
    asking = opened()
    with run_by_another(asking):
        job = protect(asking)
        asking.cancel(job)
    later = opened()
    later.start()
    with pytest.raises(Cancelled):
        later.wait(job, timeout=PATIENCE)
    assert later.vault.protection("web").state is State.ENABLING


class Recording(Engine):
    """Records the kinds of jobs that it is asked for; runs none."""

    asked: list[tuple[str, Arguments]]

    def _submit(self, kind: str, protection: Protection, arguments: Arguments) -> Job:
        self.asked = [*getattr(self, "asked", []), (kind, arguments)]
        return Job(id="j", kind=kind, machine=protection.name)


@pytest.fixture
def recording(engine: Engine) -> Iterator[Recording]:
    with Recording.open(engine.vault.url, engine.plugins) as made:
        yield made


RESUMED: list[tuple[list[Event], str]] = [
    ([], "protect"),
    ([Event.REPLICA_CREATED], "protect"),
    ([Event.REPLICA_CREATED, Event.COPIED], "protect"),
    ([Event.REPLICA_CREATED, Event.COPIED, Event.FINALIZED], "replicate"),
    ([Event.REPLICA_CREATED, Event.COPIED, Event.FINALIZED, Event.LOSE_TRACKING, Event.START_RESYNC], "resync"),
]


@pytest.mark.parametrize(("events", "kind"), RESUMED, ids=[str(len(events)) for events, _ in RESUMED])
def test_replicate_resumes_what_the_machine_is_in(recording: Recording, events: list[Event], kind: str) -> None:
    protect(recording)
    for event in events:
        recording.vault.transition(recording.vault.protection("web").id, event)
    assert recording.replicate("web", keep=True).kind == kind
    assert [asked for asked, _ in recording.asked] == ["protect", kind]


def test_a_verb_that_the_state_forbids_submits_no_job(recording: Recording) -> None:
    protect(recording)
    for verb in (recording.failover_commit, recording.failover_undo, recording.reprotect):
        with pytest.raises(WrongState):
            verb("web")
    assert [asked for asked, _ in recording.asked] == ["protect"]


def test_a_test_uses_the_network_of_the_machine_unless_another_is_named(recording: Recording) -> None:
    recording.protect("web", source="a", target="b", policy="gold", test_network="lab")
    for event in (Event.REPLICA_CREATED, Event.COPIED, Event.FINALIZED):
        recording.vault.transition(recording.vault.protection("web").id, event)
    recording.failover_test("web")
    recording.failover_test("web", network="")
    assert [arguments.network for _, arguments in recording.asked[1:]] == ["lab", ""]


def test_a_resync_that_is_not_for_now_waits_for_the_window(recording: Recording) -> None:
    protect(recording)
    for event in (Event.REPLICA_CREATED, Event.COPIED, Event.FINALIZED):
        recording.vault.transition(recording.vault.protection("web").id, event)
    for _ in range(2):  # again is no error
        assert recording.resync("web") is None
        assert recording.vault.protection("web").state is State.RESYNC_PENDING
    assert [asked for asked, _ in recording.asked] == ["protect"]
    now = recording.resync("web", now=True)
    assert now is not None
    assert now.kind == "resync"


# -- which machine is meant --------------------------------------------------------------------------------------------


def test_a_name_of_two_machines_is_ambiguous_and_an_id_is_not(engine: Engine, home: MemoryWorld) -> None:
    home.add_machine("m1", {"vda": 1 * MiB}, name="shop")
    home.add_machine("m2", {"vda": 1 * MiB}, name="shop")
    with pytest.raises(AmbiguousName) as caught:
        protect(engine, "shop")
    assert caught.value.attributes["matches"] == "m1, m2"
    assert engine.vault.protections() == []
    engine.wait(protect(engine, "m2"), timeout=PATIENCE)
    assert engine.vault.protection("shop").source_machine == "m2"


def test_a_machine_that_is_not_there_is_refused(engine: Engine) -> None:
    with pytest.raises(MachineNotFound):
        protect(engine, "nope")
    assert engine.vault.jobs() == []


@pytest.mark.parametrize("wrong", [{"policy": "none"}, {"source": "none"}, {"target": "none"}], ids=str)
def test_protecting_by_a_name_that_is_unknown_records_nothing(engine: Engine, wrong: dict[str, str]) -> None:
    names = {"source": "a", "target": "b", "policy": "gold", **wrong}
    with pytest.raises(NotFound):
        engine.protect("web", source=names["source"], target=names["target"], policy=names["policy"])
    assert engine.vault.protections() == []
    assert engine.vault.jobs() == []


def test_a_machine_is_protected_once(recording: Recording) -> None:
    protect(recording)
    with pytest.raises(AlreadyProtected, match="a machine named 'web' is already protected"):
        protect(recording)
    assert len(recording.asked) == 1


# -- readiness ---------------------------------------------------------------------------------------------------------


def finding(severity: Severity) -> Finding:
    return Finding(f"test-{severity.value}", severity, f"it is {severity.value}", "why", "what to do")


def test_readiness_has_the_worst_first_and_errors_prevent_protection(engine: Engine, home: MemoryWorld) -> None:
    all_kinds = tuple(finding(severity) for severity in (Severity.INFO, Severity.ERROR, Severity.WARNING))
    home.machine("web").configure(findings=all_kinds)
    found = engine.readiness("web", source="a", target="b", policy="gold")
    assert [item.severity for item in found if item in all_kinds] == [Severity.ERROR, Severity.WARNING, Severity.INFO]
    with pytest.raises(NotReady, match="test-error") as caught:
        protect(engine)
    assert "test-warning" not in str(caught.value)
    assert engine.vault.protections() == []
    home.machine("web").configure(findings=(finding(Severity.WARNING),))
    assert engine.wait(protect(engine), timeout=PATIENCE).state is JobState.DONE


def test_status_asks_no_site(engine: Engine, home: MemoryWorld) -> None:
    engine.wait(protect(engine), timeout=PATIENCE)
    home.cut()
    (shown,) = engine.status()
    assert (shown.protection.name, shown.protection.state) == ("web", State.PROTECTED)
    assert len(engine.points("web")) == 1
    with pytest.raises(SiteUnreachable):
        engine.site_status("a")


# -- sites -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "driver", "settings", "error"),
    [
        ("a", "memory", {"world": "home"}, AlreadyExists),
        ("c", "nope", {"world": "home"}, DriverNotFound),
        ("c", "memory", {}, InvalidSetting),
        ("c", "memory", {"world": "home", "colour": "red"}, InvalidSetting),
        ("c", "memory", {"world": "nowhere"}, InvalidSetting),
        ("c", "memory", {"world": "locked"}, AccessDenied),
        ("c", "memory", {"world": "cut"}, SiteUnreachable),
    ],
)
def test_a_site_that_cannot_be_used_is_not_recorded(
    engine: Engine, name: str, driver: str, settings: dict[str, str], error: type[AsrError]
) -> None:
    worlds = [MemoryWorld("locked"), MemoryWorld("cut")]
    worlds[0].configure(key="sesame")
    worlds[1].cut()
    before = engine.vault.sites()
    with pytest.raises(error):
        engine.add_site(name, driver, settings)
    assert engine.vault.sites() == before


def test_settings_of_a_site_are_merged_and_an_empty_one_is_removed(engine: Engine, home: MemoryWorld) -> None:
    home.configure(key="sesame")
    engine.update_site("a", {"key": "sesame"})
    assert engine.vault.site("a").settings == {"world": "home", "key": "sesame"}
    assert engine.context.site("a").status().version
    home.configure(key="")
    assert engine.update_site("a", {"key": ""}).settings == {"world": "home"}
    assert engine.vault.site("a").settings == {"world": "home"}


def test_what_a_driver_recognises_a_site_by_is_recorded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept when other settings change, and made again when an operator clears it."""
    made = iter(["first", "second"])

    def adopt(name: str, settings: dict[str, str]) -> dict[str, str]:
        assert name == "a"
        return {} if settings.get("key") else {"key": next(made)}

    MemoryWorld("home").configure(key="")
    monkeypatch.setattr(engine.plugins.driver("memory"), "adopt", adopt)
    monkeypatch.setattr(Engine, "_prove", lambda *_: None)  # the memory driver has no setting that may be of any value
    assert engine.update_site("a", {}).settings == {"world": "home", "key": "first"}
    assert engine.update_site("a", {"world": "home"}).settings["key"] == "first"
    assert engine.update_site("a", {"key": ""}).settings["key"] == "second"
    assert engine.vault.site("a").settings["key"] == "second"


@pytest.mark.parametrize("wrong", [{"world": ""}, {"world": "nowhere"}, {"colour": "red"}], ids=str)
def test_a_site_keeps_its_settings_when_new_ones_are_wrong(engine: Engine, wrong: dict[str, str]) -> None:
    before, connected = engine.vault.site("a"), engine.context.site("a")
    with pytest.raises(InvalidSetting):
        engine.update_site("a", wrong)
    assert engine.vault.site("a") == before
    assert engine.context.site("a") is connected


def test_new_settings_of_a_site_are_used_at_once(engine: Engine) -> None:
    MemoryWorld("new").add_machine("db", {"vda": 1 * MiB})
    assert [machine.id for machine in engine.machines("a")] == ["web"]
    engine.update_site("a", {"world": "new"})
    assert [machine.id for machine in engine.machines("a")] == ["db"]


def test_a_recorded_setting_that_the_driver_does_not_have_is_refused(engine: Engine) -> None:
    engine.vault.update_site(attrs.evolve(engine.vault.site("a"), settings={"world": "home", "colour": "red"}))
    with pytest.raises(InvalidSetting, match="'colour' of driver memory: unknown; there are: "):
        engine.site_status("a")


def test_a_change_of_a_site_that_is_unknown_is_refused(engine: Engine) -> None:
    with pytest.raises(NotFound):
        engine.update_site("none", {"world": "home"})
    assert [site.name for site in engine.vault.sites()] == ["a", "b"]
    assert engine.vault.site("a") == Site("a", "memory", {"world": "home"})
