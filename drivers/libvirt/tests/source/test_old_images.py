"""Images of qcow2 version 2, libvirt's default for volumes without `<compat>`: they cannot hold bitmaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab import BareMachine, Lab

pytestmark = pytest.mark.system

LOCAL = {"where": "a", "uri": "qemu:///system"}
REMOTE = {"where": "b", "uri": "qemu+tcp://10.77.0.1/system"}
Engines = Callable[..., Any]


@pytest.fixture
def machine(lab: Lab) -> Iterator[BareMachine]:
    made = BareMachine(lab, "a", "old", compat="0.10")
    yield made
    made.remove()


@pytest.mark.parametrize("how", [LOCAL, REMOTE], ids=["local", "remote"])
def test_such_a_disk_is_compared_until_its_image_is_amended(
    machine: BareMachine, engines: Engines, how: dict[str, str]
) -> None:
    engine = engines(**how)
    assert ["warning", "disk-qcow2-v2"] in [item[:2] for item in engine.findings(machine=machine.id)]
    first = engine.open(machine=machine.id, view="v1")
    engine.close(view="v1")
    assert first["mark"] is None
    assert (first["disks"]["vda"]["tracking"], first["notices"]) == ("none", ["disk-qcow2-v2"])
    machine.virsh("destroy", machine.name)
    off = engine.open(machine=machine.id, view="v2")
    assert engine.hash(view="v2", disk="vda")
    engine.close(view="v2")
    assert off["disks"]["vda"]["tracking"] == "none"
    (command,) = (item[3] for item in engine.findings(machine=machine.id) if item[1] == "disk-qcow2-v2")
    machine.lab.run_in("a", command.partition("`")[2].partition("`")[0].split())
    assert "disk-qcow2-v2" not in [item[1] for item in engine.findings(machine=machine.id)]
    machine.virsh("start", machine.name)
    third = engine.open(machine=machine.id, view="v3")
    engine.close(view="v3")
    machine.write("1M")
    fourth = engine.open(machine=machine.id, view="v4", since=third["mark"])
    engine.close(view="v4")
    assert fourth["disks"]["vda"]["changed"] == [[1 << 20, 65536, False]]
    engine.keep(machine=machine.id, marks=[])
