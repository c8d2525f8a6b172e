"""The small values: machines, descriptions, protections."""

from __future__ import annotations

import attrs
import pytest

from asrcore.model.machine import Artifact, Description, Disk, Firmware, Machine
from asrcore.model.point import Consistency
from asrcore.model.protection import Direction, NetworkMap, Protection
from asrcore.model.state import State
from asrcore.units import GiB

MACHINE = Machine("m1", "web", 2, GiB, Firmware.UEFI, (Disk("vda", GiB), Disk("vdb", 2 * GiB)))
PROTECTION = Protection("p1", "web", "gold", "paris", "paris", "m1", "lyon", "r1")


def test_disk_by_id() -> None:
    assert MACHINE.disk("vdb").size == 2 * GiB
    with pytest.raises(KeyError, match="vdc"):
        MACHINE.disk("vdc")


def test_artifact_by_name_and_without_its_bytes_in_the_log() -> None:
    description = Description(MACHINE, "libvirt", (Artifact("nvram", b"secret" * 100),))
    assert description.artifact("nvram") == b"secret" * 100
    assert description.artifact("domain") is None
    assert "secret" not in repr(description)
    assert "<600 bytes>" in repr(description)


def test_networks_that_are_not_mapped_keep_their_name() -> None:
    networks = NetworkMap({"lan": "dr-lan"})
    assert (networks.target("lan"), networks.target("dmz")) == ("dr-lan", "dmz")


def test_direction_is_seen_from_home() -> None:
    assert PROTECTION.direction is Direction.FORWARD
    turned = attrs.evolve(PROTECTION, source_site="lyon", target_site="paris")
    assert turned.direction is Direction.REVERSE


def test_new_protection_starts_at_the_start() -> None:
    assert PROTECTION.state is State.ENABLING
    assert PROTECTION.epoch == 1
    assert (PROTECTION.mark, PROTECTION.head_point, PROTECTION.pending) == (None, None, None)


def test_values_do_not_change() -> None:
    for value in (MACHINE, PROTECTION, NetworkMap()):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            value.id = "other"  # type: ignore[union-attr,misc]


def test_consistency_is_ordered_by_what_it_promises() -> None:
    assert [item.value for item in Consistency] == ["crash", "filesystem", "application", "offline"]
