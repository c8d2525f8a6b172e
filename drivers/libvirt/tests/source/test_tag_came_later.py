"""What a site without a tag left at a machine, once the site has one: recognised where it is certain, else reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab import BareMachine, Lab

pytestmark = pytest.mark.system

LOCAL = {"where": "a", "uri": "qemu:///system"}
REMOTE = {"where": "b", "uri": "qemu+tcp://10.77.0.1/system"}
BOTH = pytest.mark.parametrize("how", [LOCAL, REMOTE], ids=["local", "remote"])
TAG = {"owner": "aaaa1111"}
Engines = Callable[..., Any]


@pytest.fixture
def machine(lab: Lab) -> Iterator[BareMachine]:
    made = BareMachine(lab, "a", "later")
    yield made
    made.remove()


def cycle(engine: Any, machine: BareMachine, view: str, since: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = engine.open(machine=machine.id, view=view, since=since)
    engine.close(view=view)
    engine.keep(machine=machine.id, marks=[found["mark"]])
    return found


def codes(engine: Any, machine: BareMachine) -> set[str]:
    return {code for _, code, *_ in engine.findings(machine=machine.id)}


@BOTH
def test_a_machine_that_is_off_gets_a_checkpoint_with_the_tag(
    machine: BareMachine, engines: Engines, how: dict[str, str]
) -> None:
    mark = cycle(engines(**how), machine, "v1")["mark"]
    machine.virsh("destroy", machine.name)
    after = engines(**how, **TAG)
    found = cycle(after, machine, "v2", mark)
    assert found["disks"]["vda"]["changed"] == []
    assert found["notices"] == []
    found = cycle(after, machine, "v3", found["mark"])
    assert found["disks"]["vda"]["changed"] == []
    assert sum(name.endswith(".aaaa1111") for name in machine.checkpoints()) == 1, "made once"
    assert "protected-by-another-vault" not in codes(engines(**how, **TAG), machine)
    engines(**how, **TAG).keep(machine=machine.id, marks=[])
    assert machine.checkpoints() == set()
    assert "asr-" not in machine.bitmaps()


@BOTH
@pytest.mark.parametrize("off", [False, True], ids=["running", "off"])
def test_protection_that_ends_before_the_next_cycle_leaves_nothing(
    machine: BareMachine, engines: Engines, how: dict[str, str], off: bool
) -> None:
    mark = cycle(engines(**how), machine, "v1")["mark"]
    if off:
        machine.virsh("destroy", machine.name)
    after = engines(**how, **TAG)
    after.keep(machine=machine.id, marks=[mark])
    after.keep(machine=machine.id, marks=[])
    assert machine.checkpoints() == set()
    if off:
        assert "asr-" not in machine.bitmaps()


def test_a_backup_that_was_opened_from_the_vaults_mark_is_ended(machine: BareMachine, engines: Engines) -> None:
    before = engines(**LOCAL)
    mark = cycle(before, machine, "v1")["mark"]
    before.open(machine=machine.id, view="v2", since=mark)
    before.kill()
    after = engines(**LOCAL, **TAG)
    found = cycle(after, machine, "v3", mark)
    assert found["disks"]["vda"]["changed"] == []
    assert len(machine.checkpoints()) == 1


def test_a_backup_that_may_be_anothers_is_left_and_the_error_names_the_command(
    machine: BareMachine, engines: Engines
) -> None:
    before = engines(**LOCAL)
    before.open(machine=machine.id, view="v1")
    after = engines(**LOCAL, **TAG)
    with pytest.raises(Exception, match="machine-busy") as raised:
        after.open(machine=machine.id, view="v2")
    assert f"virsh domjobabort {machine.name}" in str(raised.value)
    before.confirm(view="v1")
    before.kill()
    after.open(machine=machine.id, view="v1")  # the vault asks for it by its id


def test_scratch_files_without_a_tag_are_deleted_if_they_are_certainly_ours_else_reported(
    lab: Lab, machine: BareMachine, engines: Engines
) -> None:
    mark = cycle(engines(**LOCAL), machine, "v1")["mark"]
    (name,) = machine.checkpoints()
    ours, unknown = f"{machine.image}.{name}", f"{machine.image}.asr-other.1c"
    lab.run_in("a", ["touch", ours, unknown])
    after = engines(**LOCAL, **TAG)
    mark = cycle(after, machine, "v2", mark)["mark"]
    left = lab.run_in("a", ["sh", "-c", f"ls {machine.image}.asr-*"]).stdout.split()
    assert left == [unknown]
    found = cycle(after, machine, "v3", mark)
    assert found["notices"] == ["scratch-left"]
    lab.run_in("a", ["rm", unknown])
    found = cycle(after, machine, "v4", found["mark"])
    assert cycle(after, machine, "v5", found["mark"])["notices"] == []
