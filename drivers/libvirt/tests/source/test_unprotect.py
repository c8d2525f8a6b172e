"""What the end of protection leaves at a machine that is off: nothing, or a reason with the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab import BareMachine, Lab

pytestmark = pytest.mark.system

LOCAL = {"where": "a", "uri": "qemu:///system", "owner": "aaaa1111"}
REMOTE = {"where": "b", "uri": "qemu+tcp://10.77.0.1/system", "owner": "aaaa1111"}
BOTH = pytest.mark.parametrize("how", [LOCAL, REMOTE], ids=["local", "remote"])
Engines = Callable[..., Any]


@pytest.fixture
def machine(lab: Lab) -> Iterator[BareMachine]:
    made = BareMachine(lab, "a", "ended")
    yield made
    made.remove()


def cycle(engine: Any, machine: BareMachine, view: str) -> None:
    found = engine.open(machine=machine.id, view=view)
    engine.close(view=view)
    engine.keep(machine=machine.id, marks=[found["mark"]])


@BOTH
def test_a_machine_that_is_off_keeps_nothing(machine: BareMachine, engines: Engines, how: dict[str, str]) -> None:
    engine = engines(**how)
    cycle(engine, machine, "v1")
    machine.virsh("destroy", machine.name)
    assert machine.checkpoints()
    assert "asr-" in machine.bitmaps()
    engine.keep(machine=machine.id, marks=[])
    assert machine.checkpoints() == set()
    assert "asr-" not in machine.bitmaps()
    assert machine.lab.state("a", machine.name) == "shut off"
    machine.virsh("snapshot-create-as", machine.name, "s1")
    machine.virsh("snapshot-delete", machine.name, "s1")
    machine.virsh("undefine", machine.name)


@BOTH
def test_what_another_vault_left_in_it_stays(machine: BareMachine, engines: Engines, how: dict[str, str]) -> None:
    engine, other = engines(**how), engines(**{**how, "owner": "bbbb2222"})
    cycle(engine, machine, "v1")
    cycle(other, machine, "v2")
    machine.virsh("destroy", machine.name)
    engine.keep(machine=machine.id, marks=[])
    (left,) = machine.checkpoints()
    assert left.endswith(".bbbb2222")
    assert machine.bitmaps().count("name: asr-") == 1
    assert left in machine.bitmaps()


@BOTH
def test_while_it_is_protected_it_keeps_its_marks_also_when_off(
    machine: BareMachine, engines: Engines, how: dict[str, str]
) -> None:
    engine = engines(**how)
    found = engine.open(machine=machine.id, view="v1")
    engine.close(view="v1")
    machine.virsh("destroy", machine.name)
    engine.keep(machine=machine.id, marks=[found["mark"]])
    assert len(machine.checkpoints()) == 1
    assert machine.bitmaps().count("name: asr-") == 1


def test_a_bitmap_that_libvirt_forgot_is_deleted_too(machine: BareMachine, engines: Engines) -> None:
    engine = engines(**LOCAL)
    cycle(engine, machine, "v1")
    machine.virsh("destroy", machine.name)
    for name in machine.checkpoints():
        machine.virsh("checkpoint-delete", machine.name, name, "--metadata")
    assert "asr-" in machine.bitmaps()
    engine.keep(machine=machine.id, marks=[])
    assert "asr-" not in machine.bitmaps()


@BOTH
def test_what_cannot_be_deleted_is_an_error_with_the_commands(
    machine: BareMachine, engines: Engines, how: dict[str, str]
) -> None:
    """Its image is away: neither qemu-img nor QEMU opens it."""
    engine = engines(**how)
    cycle(engine, machine, "v1")
    machine.virsh("destroy", machine.name)
    (name,) = machine.checkpoints()
    machine.lab.run_in("a", ["mv", machine.image, f"{machine.image}.away"])
    with pytest.raises(Exception, match="marks-left") as raised:
        engine.keep(machine=machine.id, marks=[])
    assert f"virsh checkpoint-delete ended {name} --metadata" in str(raised.value)
    assert f"qemu-img bitmap --remove {machine.image} {name}" in str(raised.value)
    assert machine.checkpoints() == {name}
    machine.lab.run_in("a", ["mv", f"{machine.image}.away", machine.image])
    engine.keep(machine=machine.id, marks=[])
    assert machine.checkpoints() == set()
