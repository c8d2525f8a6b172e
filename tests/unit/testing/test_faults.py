"""Fault injection: the right call fails, in the right way, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asrcore.driver import CycleSpec, CycleWriter, FrozenView, ReplicaSpec, Site, ViewRequest
from asrcore.errors import SiteUnreachable, TargetFull
from asrcore.model.extent import Extent
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.testing.faults import Faults, FaultyDriver, When
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.units import KiB, MiB

LOST = SiteUnreachable(site="faulty", detail="injected")
FULL = TargetFull(where="faulty", detail="injected")


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def site(faults: Faults) -> Iterator[Site]:
    MemoryWorld("faulty").add_machine("web", {"vda": MiB}).write("vda", 0, b"x" * 4096)
    with FaultyDriver(MemoryDriver(), faults).connect("faulty", {"world": "faulty"}) as site:
        yield site


def open_view(site: Site, view_id: str = "v") -> FrozenView:
    request = ViewRequest("web", view_id, None)
    return site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=1.0)


def open_writer(site: Site) -> CycleWriter:
    with open_view(site) as view:
        description = view.machines["web"].description
    replica = site.target.create_replica(ReplicaSpec("r", "web", 1, description), Watch())
    return replica.open_cycle(CycleSpec("c", 1, None, {"vda": MiB}))


def test_without_faults_nothing_changes(site: Site, faults: Faults) -> None:
    data = bytearray(4096)
    with open_view(site) as view, view.machines["web"].disks["vda"].reader() as reader:
        reader.read_into(0, memoryview(data))
    assert data == b"x" * 4096
    assert faults.calls["reader.read_into"] == faults.calls["source.open_view"] == faults.calls["view.close"] == 1
    assert isinstance(view, FrozenView)


def test_the_nth_call_fails(site: Site, faults: Faults) -> None:
    faults.add("inventory.machines", LOST, at=2, times=2)
    assert len(site.inventory.machines()) == 1
    for _ in range(2):
        with pytest.raises(SiteUnreachable):
            site.inventory.machines()
    assert len(site.inventory.machines()) == 1


def test_calls_are_counted_from_the_fault_on(site: Site, faults: Faults) -> None:
    site.status()
    faults.add("site.status", LOST)
    with pytest.raises(SiteUnreachable):
        site.status()


def test_before_does_nothing(site: Site, faults: Faults) -> None:
    faults.add("source.open_view", LOST)
    with pytest.raises(SiteUnreachable):
        open_view(site)
    world = MemoryWorld.find("faulty")
    assert world is not None
    assert world.machine("web").views == []


def test_after_does_all(site: Site, faults: Faults) -> None:
    faults.add("source.open_view", LOST, when=When.AFTER)
    with pytest.raises(SiteUnreachable):
        open_view(site)
    world = MemoryWorld.find("faulty")
    assert world is not None
    assert world.machine("web").views == ["v"]


def test_half_writes_half(site: Site, faults: Faults) -> None:
    faults.add("writer.write", FULL, when=When.HALF)
    with open_writer(site) as writer:
        with pytest.raises(TargetFull):
            writer.write("vda", 0, memoryview(b"y" * 64 * KiB))
        writer.flush()
        assert writer.done("vda") == [Extent(0, 32 * KiB)]


def test_half_reads_half(site: Site, faults: Faults) -> None:
    faults.add("reader.read_into", LOST, when=When.HALF)
    data = bytearray(8192)
    view = open_view(site)
    with view.machines["web"].disks["vda"].reader() as reader, pytest.raises(SiteUnreachable):
        reader.read_into(0, memoryview(data))
    assert data == b"x" * 4096 + bytes(4096)


def test_only_data_goes_by_half(faults: Faults) -> None:
    with pytest.raises(ValueError, match=r"writer\.write"):
        faults.add("writer.seal", FULL, when=When.HALF)


def test_connecting_fails_too(faults: Faults) -> None:
    faults.add("driver.connect", LOST)
    with pytest.raises(SiteUnreachable):
        FaultyDriver(MemoryDriver(), faults).connect("faulty", {"world": "faulty"})


def test_the_first_error_is_kept(site: Site, faults: Faults) -> None:
    faults.add("view.close", LOST)
    with pytest.raises(ZeroDivisionError), open_view(site):
        raise ZeroDivisionError


def test_cleared_faults_are_gone(site: Site, faults: Faults) -> None:
    faults.add("site.status", LOST)
    faults.clear()
    site.status()
