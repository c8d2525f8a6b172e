"""`asr demo`: it succeeds, each of its checks can fail, and it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from asrcore.cli import _demo_story
from asrcore.cli._demo_story import DISK, ORDER, SYSTEM, Ledger, Step, order
from asrcore.driver import Capability
from asrcore.errors import DemoFailed
from asrcore.model.machine import PowerState
from asrcore.testing.memory import MemoryMachine, MemorySite, MemoryWorld
from asrcore.testing.memory._failover import MemoryFailover
from asrcore.testing.memory._inventory import MemoryInventory
from asrcore.testing.memory._source import _DiskView
from asrcore.units import MiB

ROOT = Path(__file__).parents[3]
STEPS = [
    "sites",
    "protect",
    "recovery-points",
    "verify",
    "test-failover",
    "cleanup",
    "site-lost",
    "unplanned-failover",
    "commit",
    "site-returns",
    "reprotect",
    "planned-failback",
    "protect-as-before",
]
ASR = "from asrcore.cli import main\nmain()"
NO_PYTEST = "import sys\nsys.modules['pytest'] = None\n"


# -- the story ---------------------------------------------------------------------------------------------------------


def test_the_story_ends_well() -> None:
    reported: list[Step] = []
    steps = _demo_story.run(reported.append)
    assert [step.step for step in steps] == STEPS
    assert reported == steps
    assert [step.at for step in steps] == sorted(step.at for step in steps)
    figures = {step.step: step.figures for step in steps}
    lost = figures["unplanned-failover"]
    assert lost["orders"] + lost["orders_lost"] == figures["site-lost"]["orders"]
    assert lost["orders_lost"] >= _demo_story.ORDERS_AFTER_LAST_POINT
    assert lost["rpo_seconds"] > _demo_story.ORDERS_AFTER_LAST_POINT * _demo_story.PAUSE
    assert figures["planned-failback"]["orders"] > lost["orders"]
    assert figures["planned-failback"]["orders_lost"] == 0
    assert figures["reprotect"]["bytes_sent"] < figures["protect"]["bytes_sent"] / 10


# -- each check can fail -----------------------------------------------------------------------------------------------


def promoted(change: Callable[[MemoryMachine], None], world: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A failover to that world whose machine is wrong."""

    def sabotage(patch: pytest.MonkeyPatch) -> None:
        sound = MemoryFailover.promote

        def promote(self: Any, spec: Any, watch: Any) -> Any:
            instance = sound(self, spec, watch)
            if self._session.world.name == world:
                change(self._session.world.machine(instance.machine_id))
            return instance

        patch.setattr(MemoryFailover, "promote", promote)

    return sabotage


def from_first_point(world: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A failover to that world which takes the oldest recovery point instead of the newest."""

    def sabotage(patch: pytest.MonkeyPatch) -> None:
        sound = MemoryFailover.promote

        def promote(self: Any, spec: Any, watch: Any) -> Any:
            if self._session.world.name == world:
                with self._session.look() as state:
                    spec = attrs.evolve(spec, point_id=state.replica(spec.replica_id).points[0].point.id)
            return sound(self, spec, watch)

        patch.setattr(MemoryFailover, "promote", promote)

    return sabotage


def damage(place: int) -> Callable[[MemoryMachine], None]:
    return lambda machine: machine.write(DISK, place, b"\xff", offline=True)


def everything_changed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_DiskView, "changed", _DiskView.allocated)


def a_test_on_the_network(patch: pytest.MonkeyPatch) -> None:
    sound = MemoryFailover.start_test
    patch.setattr(
        MemoryFailover, "start_test", lambda self, spec, watch: sound(self, attrs.evolve(spec, network="lan"), watch)
    )


def a_test_without_a_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryFailover, "_test_disks", lambda _, point: point.disks)


def a_test_that_stays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryFailover, "stop_test", lambda *_: None)


def no_quarantine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_demo_story, "QUARANTINE_PATIENCE", 1.0)
    patch.setattr(MemoryInventory, "fence", lambda self, *_: self._session.need(Capability.FENCE, "fence machines"))


def stopped_only(patch: pytest.MonkeyPatch) -> None:
    def fence(self: Any, machine_id: str, _fence: object) -> None:
        with self._session.change() as state:
            state.machine(machine_id).power = PowerState.OFF

    patch.setattr(MemoryInventory, "fence", fence)


def whole_disk_sent_back(patch: pytest.MonkeyPatch) -> None:
    sound = MemorySite.status

    def status(self: Any) -> Any:
        found = sound(self)
        return attrs.evolve(found, capabilities=found.capabilities - {Capability.SEED})

    patch.setattr(MemorySite, "status", status)


SABOTAGES: Mapping[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "a cycle that sends all": (everything_changed, "a cycle sends only what changed"),
    "a test on a network": (a_test_on_the_network, "on no network"),
    "a test that writes to its point": (a_test_without_a_copy, "the recovery point is as it was"),
    "a test that stays": (a_test_that_stays, "the clean-up deletes the test machine"),
    "a failover to an old point": (from_first_point("demo-beta"), "no order of the recovery point is lost"),
    "a failover with a damaged disk": (promoted(damage(SYSTEM + 5 * ORDER), "demo-beta"), "order 6 on web1 is intact"),
    "no quarantine": (no_quarantine, "the old machine is stopped"),
    "a machine that is only stopped": (stopped_only, "the old machine is quarantined"),
    "a whole disk sent back": (whole_disk_sent_back, "re-protect sends only differences"),
    "a failback to an old point": (from_first_point("demo-alpha"), "a planned failover loses no order"),
    "a failback with a damaged disk": (promoted(damage(MiB), "demo-alpha"), "the disk at alpha equals"),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_the_story_fails_where_a_site_does_not_do_its_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage, check = SABOTAGES[name]
    sabotage(monkeypatch)
    with pytest.raises(DemoFailed, match=check):
        _demo_story.run(lambda _: None)


@pytest.fixture
def machine() -> MemoryMachine:
    return MemoryWorld("ledger").add_machine("web", {DISK: SYSTEM + MiB})


def test_a_ledger_counts_the_orders(machine: MemoryMachine) -> None:
    assert Ledger.of(machine) == Ledger(0, 0.0)
    for number in (1, 2, 3):
        machine.write(DISK, SYSTEM + (number - 1) * ORDER, order(number, number / 2))
    assert Ledger.of(machine) == Ledger(3, 1.5)


@pytest.mark.parametrize(
    ("number", "record", "check"),
    [
        (2, bytes(ORDER), "missing"),
        (2, order(2, 7.0)[:-1] + b"x", "intact"),
        (2, order(9, 7.0), "intact"),
        (2, order(2, 7.0)[: ORDER // 2] + bytes(ORDER // 2), "intact"),
    ],
    ids=["hole", "damaged", "misplaced", "torn"],
)
def test_a_ledger_sees_what_is_wrong(machine: MemoryMachine, number: int, record: bytes, check: str) -> None:
    for at in (1, 2, 3):
        machine.write(DISK, SYSTEM + (at - 1) * ORDER, order(at, 1.0))
    machine.write(DISK, SYSTEM + (number - 1) * ORDER, record)
    with pytest.raises(DemoFailed, match=check):
        Ledger.of(machine)


# -- the command -------------------------------------------------------------------------------------------------------


class User:
    """A user without a home directory or a vault, with a directory for temporary files."""

    def __init__(self, folder: Path) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.home, self.vault = folder / "home", folder / "vault.db"
        self.environment = {
            **os.environ,
            "HOME": str(self.home),
            "ASR_VAULT": str(self.vault),
            "ASR_KEY": str(folder / "vault.key"),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, code: str, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, "demo", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=self.environment, cwd=self.temporary.parent, text=True, stdout=pipe, stderr=pipe
        )

    def asr(self, code: str, *words: str) -> tuple[int, str, str]:
        """Its exit code and output."""
        with self.start(code, *words) as process:
            out, err = process.communicate(timeout=90)
        return process.returncode, out, err

    def left(self) -> list[str]:
        """All files except the empty directory for temporary files."""
        folder = self.temporary.parent
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path != self.temporary]


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


def test_json_is_the_timeline_and_nothing_is_left(user: User) -> None:
    code, out, err = user.asr(NO_PYTEST + ASR, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert list(document) == ["seconds", "timeline"]
    assert [step["step"] for step in document["timeline"]] == STEPS
    assert {tuple(step) for step in document["timeline"]} == {("at", "step", "command", "text", "checked", "figures")}
    assert document["seconds"] == document["timeline"][-1]["at"]
    assert user.left() == []


def test_text_is_a_timeline_and_a_vault_is_left_alone(user: User) -> None:
    user.vault.write_bytes(b"a vault")
    code, out, err = user.asr(ASR)
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    for part in ("asr failover unplanned", "RTO", "RPO", "site lost", "Checked: both disks are equal byte for byte"):
        assert part in words
    assert user.left() == ["vault.db"]
    assert user.vault.read_bytes() == b"a vault"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_early_it_leaves_nothing(user: User, number: int, code: int) -> None:
    with user.start(ASR) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "asr protect" in line:
                break
        assert any(path.startswith("tmp/asr-demo-") for path in user.left())
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == code
    assert user.left() == []


def test_a_failed_check_ends_with_the_code_of_its_class(user: User) -> None:
    broken = (
        "from asrcore.testing.memory._failover import MemoryFailover\nMemoryFailover.stop_test = lambda *_: None\n"
        + ASR
    )
    code, out, err = user.asr(broken, "--json")
    assert code == DemoFailed.category.value
    assert json.loads(out)["error"]["code"] == "demo-failed"
    assert "the clean-up deletes the test machine" in err
    assert user.left() == []
