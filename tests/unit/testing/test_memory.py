"""The memory world beyond the contract: what tests can do to it, and what survives a killed engine."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asrcore.testing.memory
from asrcore.driver import (
    Capability,
    CycleSpec,
    Fence,
    FrozenView,
    PromoteSpec,
    Replica,
    ReplicaSpec,
    SealSpec,
    Site,
    Tracking,
    ViewRequest,
)
from asrcore.errors import AccessDenied, AlreadyExists, InvalidSetting, SiteUnreachable, TargetFull, WrongState
from asrcore.model.extent import Extent, total
from asrcore.model.machine import Machine, PowerState
from asrcore.model.point import Consistency, Mark
from asrcore.model.protection import NetworkMap
from asrcore.model.watch import Watch
from asrcore.plugins import Plugins
from asrcore.testing.conformance import full_copy
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.testing.memory._content import BLOCK, Content
from asrcore.units import GiB, KiB, MiB


def connect(world: MemoryWorld) -> Site:
    return MemoryDriver().connect(world.name, {"world": world.name})


def view_of(site: Site, machine_id: str, since: Mark | None = None) -> FrozenView:
    request = ViewRequest(machine_id, f"view-{random.random()}", since)
    return site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=1.0)


def copied(home: MemoryWorld, away: MemoryWorld, machine_id: str = "web") -> Replica:
    """A replica with one point."""
    with view_of(connect(home), machine_id) as view:
        description = view.machines[machine_id].description
        spec = ReplicaSpec(f"r-{machine_id}", machine_id, 1, description)
        replica = connect(away).target.create_replica(spec, Watch())
        full_copy(view, machine_id, replica, "p1")
    return replica


@pytest.fixture
def home() -> MemoryWorld:
    world = MemoryWorld("home")
    world.add_machine("web", {"vda": 512 * KiB}).write("vda", 64 * KiB, b"content" * 100)
    return world


@pytest.fixture
def away() -> MemoryWorld:
    return MemoryWorld("away")


# -- content ---------------------------------------------------------------------------------------------------------

SIZE = 3 * BLOCK + 1000
RANGES = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda ends: (min(ends), max(ends)))


@given(st.lists(st.tuples(st.sampled_from(["write", "zero", "snapshot"]), RANGES, st.integers(1, 255))))
def test_content_is_what_bytes_would_be(steps: list[tuple[str, tuple[int, int], int]]) -> None:
    content, plain = Content(SIZE), bytearray(SIZE)
    snapshots: list[tuple[Content, bytes]] = []
    for what, (start, end), byte in steps:
        if what == "write":
            content.write(start, bytes([byte]) * (end - start))
            plain[start:end] = bytes([byte]) * (end - start)
        elif what == "zero":
            content.zero(start, end - start)
            plain[start:end] = bytes(end - start)
        else:
            snapshots.append((content.snapshot(), bytes(plain)))
        assert content.read(start, end - start) == plain[start:end]
    for snapshot, then in [*snapshots, (content, bytes(plain))]:
        assert snapshot.read(0, SIZE) == then
        assert total(snapshot.extents()) == SIZE
        assert all(not any(then[item.offset : item.end]) for item in snapshot.extents() if item.zero)


def test_content_ends_where_it_ends() -> None:
    for offset, length in ((SIZE, 1), (-1, 1), (SIZE - 10, 11)):
        with pytest.raises(ValueError, match="not within"):
            Content(SIZE).read(offset, length)


def test_a_big_disk_costs_what_it_holds() -> None:
    content = Content(1024 * GiB)
    content.write(500 * GiB, b"x")
    assert len(list(content.blocks)) == 1


# -- connecting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"world": ""}, {"world": "nowhere"}], ids=repr)
def test_wrong_settings_are_reported(home: MemoryWorld, settings: dict[str, str]) -> None:
    with pytest.raises(InvalidSetting):
        MemoryDriver().connect("s", settings)


def test_a_world_may_want_a_key(home: MemoryWorld) -> None:
    home.configure(key="sesame")
    with pytest.raises(AccessDenied):
        connect(home)
    MemoryDriver().connect("home", {"world": "home", "key": "sesame"}).close()


def test_a_cut_site_is_unreachable(home: MemoryWorld) -> None:
    site = connect(home)
    view = view_of(site, "web")
    home.cut()
    with pytest.raises(SiteUnreachable):
        connect(home)
    with pytest.raises(SiteUnreachable), view.machines["web"].disks["vda"].reader() as reader:
        reader.read_into(0, memoryview(bytearray(4)))
    view.close()  # never raises; the source keeps the view until its marks are swept
    home.restore()
    assert home.machine("web").views != []
    home.crash()
    connect(home).source.keep_marks("web", [])
    assert home.machine("web").views == home.machine("web").marks == []


def test_it_is_a_plug_in() -> None:
    plugins = Plugins()
    assert plugins.register("memory", asrcore.testing.memory)
    assert isinstance(plugins.driver("memory"), MemoryDriver)


# -- what happens to a site -------------------------------------------------------------------------------------------


def test_a_stopped_machine_does_not_write(home: MemoryWorld) -> None:
    machine = home.machine("web")
    machine.stop()
    with pytest.raises(RuntimeError, match="is off"):
        machine.write("vda", 0, b"x")
    machine.write("vda", 0, b"x", offline=True)
    assert machine.read("vda", 0, 1) == b"x"


def test_after_a_reboot_fenced_machines_stay_off(home: MemoryWorld) -> None:
    home.add_machine("auto", {}, autostart=True)
    home.add_machine("fenced", {}, autostart=True)
    connect(home).inventory.fence("fenced", Fence(2, "failed over"))
    home.reboot()
    power = {machine.id: machine.power for machine in connect(home).inventory.machines()}
    assert power == {"web": PowerState.OFF, "auto": PowerState.RUNNING, "fenced": PowerState.OFF}


def test_tracking_may_be_lost_of_one_disk(home: MemoryWorld) -> None:
    machine = home.machine("web")
    machine.add_disk("vdb", 64 * KiB)
    machine.add_disk("raw", 64 * KiB, tracked=False)
    with view_of(connect(home), "web") as view:
        mark = view.machines["web"].mark
    machine.lose_tracking("vdb")
    with view_of(connect(home), "web", mark) as view:
        tracking = {disk_id: disk.tracking for disk_id, disk in view.machines["web"].disks.items()}
    assert tracking == {"vda": Tracking.CHANGED, "vdb": Tracking.LOST, "raw": Tracking.NONE}


def test_a_handle_dies_with_its_engine(home: MemoryWorld, away: MemoryWorld) -> None:
    replica = copied(home, away)
    writer = replica.open_cycle(CycleSpec("c2", 1, "p1", {"vda": 512 * KiB}))
    writer.write("vda", 0, memoryview(b"unflushed"))
    away.crash()
    with pytest.raises(SiteUnreachable):
        writer.flush()
    with connect(away).target.replica("r-web").open_cycle(CycleSpec("c2", 1, "p1", {"vda": 512 * KiB})) as writer:
        assert writer.done("vda") == []


def test_a_full_target_takes_what_fits(home: MemoryWorld, away: MemoryWorld) -> None:
    replica = copied(home, away)
    away.fill(100)
    assert connect(away).target.capacity().free == 100
    with replica.open_cycle(CycleSpec("c2", 1, "p1", {"vda": 512 * KiB})) as writer:
        writer.write("vda", 0, memoryview(bytes(60)))
        with pytest.raises(TargetFull):
            writer.write("vda", 512, memoryview(bytes(60)))
        writer.flush()
        assert writer.done("vda") == [Extent(0, 60)]
        writer.zero("vda", 4096, 8192)  # needs no space


def test_points_share_what_they_have_in_common(home: MemoryWorld, away: MemoryWorld) -> None:
    away.configure(capacity=1 * MiB)
    replica = copied(home, away)
    free = connect(away).target.capacity().free
    assert free == 1 * MiB - BLOCK
    description = replica.description("p1")
    for number in range(2, 12):
        with replica.open_cycle(CycleSpec(f"c{number}", 1, f"p{number - 1}", {"vda": 512 * KiB})) as writer:
            writer.seal(SealSpec(f"p{number}", number, Consistency.CRASH, True, description))
    assert connect(away).target.capacity().free == free


def fail_over(source: MemoryWorld, target: MemoryWorld, epoch: int) -> None:
    """All of a planned failover of machine `web`, to the commit."""
    copied(source, target)
    connect(source).inventory.fence("web", Fence(epoch, "failed over"))
    there = connect(target)
    there.failover.promote(PromoteSpec("r-web", "p1", epoch, NetworkMap()), Watch())
    there.failover.commit("r-web", epoch, Watch())
    there.inventory.power_on("web")


def test_disks_of_the_user_outlive_a_failback(home: MemoryWorld, away: MemoryWorld) -> None:
    """The first machine's own disks are kept when it is replaced; disks that were made by a failover are deleted."""
    content = home.machine("web").read("vda")
    fail_over(home, away, 2)
    fail_over(away, home, 3)
    assert home.left_disks == ["web/vda"]
    fail_over(home, away, 4)
    assert away.left_disks == []
    assert away.machine("web").read("vda") == content
    assert away.machine("web").value.power is PowerState.RUNNING


def test_promotion_never_doubles_a_machine(home: MemoryWorld, away: MemoryWorld) -> None:
    copied(home, away)
    away.add_machine("web", {"vda": 512 * KiB})
    with pytest.raises(AlreadyExists):
        connect(away).failover.promote(PromoteSpec("r-web", "p1", 2, NetworkMap()), Watch())


def test_a_replica_under_a_machine_is_not_deleted(home: MemoryWorld, away: MemoryWorld) -> None:
    copied(home, away)
    site = connect(away)
    site.failover.promote(PromoteSpec("r-web", "p1", 2, NetworkMap()), Watch())
    with pytest.raises(WrongState):
        site.target.delete_replica("r-web", 2)


def test_hundreds_of_machines_are_cheap() -> None:
    home, away = MemoryWorld("many-home"), MemoryWorld("many-away")
    began = time.process_time()
    for number in range(300):
        machine = home.add_machine(f"m{number}", {"vda": 64 * MiB})
        machine.write("vda", 0, b"x" * 4096)
        copied(home, away, machine.id)
    assert time.process_time() - began < 5
    assert len(connect(away).target.replicas()) == 300


# -- kept in a directory -----------------------------------------------------------------------------------------------

ENGINE = """
import sys
from asrcore.driver import CycleSpec, ReplicaSpec, SealSpec, ViewRequest
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.testing.memory import MemoryDriver

home = MemoryDriver().connect("home", {"world": "home", "path": sys.argv[1] + "/home"})
away = MemoryDriver().connect("away", {"world": "away", "path": sys.argv[1] + "/away"})
request = ViewRequest("web", "v1", None)
view = home.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=1)
machine = view.machines["web"]
replica = away.target.create_replica(ReplicaSpec("r", "web", 1, machine.description), Watch())
info = replica.info()
if info.head is None:
    disk = machine.disks["vda"]
    data = bytearray(disk.disk.size)
    with disk.reader() as reader:
        reader.read_into(0, memoryview(data))
    with replica.open_cycle(CycleSpec("c1", 1, None, {"vda": len(data)})) as writer:
        print("done", sum(extent.length for extent in writer.done("vda")))
        writer.write("vda", 0, memoryview(data)[: len(data) // 2])
        writer.flush()
        writer.write("vda", len(data) // 2, memoryview(data)[len(data) // 2 :])
        writer.seal(SealSpec("p1", view.taken_at, machine.consistency, True, machine.description))
print("sealed", view.taken_at)
"""


def engine(folder: Path, crash_at: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ASRCORE_CRASH_AT": crash_at}
    command = [sys.executable, "-c", ENGINE, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("place", "sealed"),
    [
        ("source.view.opened", False),
        ("target.created", False),
        ("target.cycle.opened", False),
        ("target.flush:1", False),
        ("target.flushed:1", False),
        ("target.seal.begin", False),
        ("target.flushed:2", False),
        ("target.seal.commit", True),
        ("target.seal.applied", True),
    ],
)
def test_a_killed_engine_finds_what_was_durable(tmp_path: Path, place: str, sealed: bool) -> None:
    home = MemoryWorld("home", path=tmp_path / "home")
    machine = home.add_machine("web", {"vda": 128 * KiB})
    machine.write("vda", 0, bytes(range(256)) * 512)
    content = machine.read("vda")
    killed = engine(tmp_path, place)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    away = MemoryWorld("away", path=tmp_path / "away")
    if "r" in connect(away).target.replicas():
        assert [point.id for point in connect(away).target.replica("r").info().points] == ["p1"] * sealed
    machine.write("vda", 0, b"written after the view was frozen")

    again = engine(tmp_path)
    assert again.returncode == 0, again.stderr
    with connect(away).target.replica("r").reader("vda", "p1") as reader:
        seen = bytearray(128 * KiB)
        reader.read_into(0, memoryview(seen))
    assert seen == content, "the view was the same, before and after the kill"
    if place == "target.flushed:1":
        assert "done 65536" in again.stdout


def test_two_processes_see_one_world(tmp_path: Path) -> None:
    world = MemoryWorld("shared", path=tmp_path)
    world.add_machine("web", {"vda": MiB})
    code = (
        "import json, sys; from asrcore.testing.memory import MemoryWorld;"
        "world = MemoryWorld('shared', path=sys.argv[1]); machine = world.machine('web');"
        "machine.write('vda', 0, b'from the other'); print(json.dumps(machine.value.name))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(other.stdout) == "web"
    assert world.machine("web").read("vda", 0, 14) == b"from the other"
    assert isinstance(world.machine("web").value, Machine)


def test_only_claimed_roles_are_offered() -> None:
    world = MemoryWorld("bare", capabilities=frozenset({Capability.SOURCE}))
    assert connect(world).status().capabilities == {Capability.SOURCE}
