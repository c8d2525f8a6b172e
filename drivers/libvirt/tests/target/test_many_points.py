"""Many points: layers of a chain are gathered, points keep their content, and each has few layers below it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asr_driver_libvirt.failover.instances import hold, released
from asr_storage.replica import chain, layers, reflink
from asr_storage.replica.store import Layer, Record, ReplicaKind
from asrcore.errors import Cancelled
from asrcore.model.watch import Watch

KIB, MIB = 1024, 1024 * 1024
Make = Callable[..., Any]
DISKS = {"vda": 2 * MIB, "sdb": 192 * KIB}


def small(bench: Any, number: int) -> None:
    """Make a kept point, and call what the engine calls after each."""
    choice = random.Random(number)
    writes = []
    for disk_id, size in bench.disks.items():
        for _ in range(2):
            length = choice.choice([512, 4096, 64 * KIB])
            offset = choice.randrange((size - length) // 512) * 512
            data = bytes(length) if choice.random() < 0.3 else choice.randbytes(length)
            writes.append((disk_id, offset, data))
    bench.cycle(writes, keep=True)
    bench.replica.drop_points([], 1)


def deepest(record: Record) -> int:
    return max(len(layers.path(record, image)) for point in record.points for image in point.images.values())


@pytest.fixture
def kind() -> ReplicaKind:
    """These tests concern the chain."""
    return ReplicaKind.CHAIN


def test_many_points_stand_on_few_layers(bench: Make, replica_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "SPAN", 3)
    one = bench(replica_dir, DISKS)
    for number in range(30):
        small(one, number)
        if number == 15:  # growth in the middle of a run
            one.disks["vda"] += 100 * 512
            one.head["vda"] += bytes(100 * 512)
    one.check()
    record = one.replica.home.load()
    assert deepest(record) <= 3 * 3 + 2
    assert max(layer.level for layer in record.layers.values()) >= 3
    # points in between first, then the oldest ones, as retention does
    ids = list(one.points)
    for dropped in (ids[1:20:2], ids[0:8:2], ids[8:-1]):
        one.replica.drop_points(dropped, 1)
        for point_id in dropped:
            one.points.pop(point_id, None)
        one.check()
    small(one, 31)
    one.check()
    record = one.replica.home.load()
    files = sorted(f"images/{path.name}" for path in (replica_dir / "replicas" / "r1" / "images").iterdir())
    assert files == sorted(record.layers)
    assert len(files) <= 2 * (len(one.points) + 1)


def test_what_a_test_stands_on_outlives_gathering(
    bench: Make, replica_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "SPAN", 4)
    one = bench(replica_dir, DISKS)
    for number in range(4):
        small(one, number)
    one.cycle([("vda", 0, b"x" * 512)], keep=True)  # the next call gathers: the run ends in this point
    replica = one.replica
    with replica.working("holding") as record:
        hold(replica, record, "test:t1", record.points[-1])
    held = set(replica.home.load().held)
    content = {path: (replica.home.path / path).read_bytes() for path in held}
    replica.drop_points([], 1)
    record = replica.home.load()
    assert not held & set(record.heads.values()), "it was gathered"
    one.check()
    for number in range(5, 9):
        small(one, number)
    one.replica.drop_points(list(one.points)[1:-1], 1)
    for point_id in list(one.points)[1:-1]:
        del one.points[point_id]
    one.check()
    assert {path: (replica.home.path / path).read_bytes() for path in held} == content
    with replica.working("releasing") as record:
        released(replica, record, "test:t1")
    assert not [path for path in held if (replica.home.path / path).exists()]
    one.check()


@pytest.mark.parametrize("kind", [ReplicaKind.REFLINK], ids=["reflink"])
def test_a_clone_that_a_test_stands_on_outlives_its_point(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, DISKS)
    for number in range(3):
        small(one, number)
    replica = one.replica
    with replica.working("holding") as record:
        hold(replica, record, "test:t1", record.points[1])
    held = [replica.home.path / path for path in replica.home.load().held]
    content = [path.read_bytes() for path in held]
    replica.drop_points(["p1", "p2"], 1)
    del one.points["p1"], one.points["p2"]
    small(one, 4)
    assert len(held) == len(DISKS)
    assert [path.read_bytes() for path in held] == content
    one.check()
    with replica.working("releasing") as record:
        released(replica, record, "test:t1")
    assert sorted(path.name for path in (replica.home.path / "points").iterdir()) == sorted(one.points)
    one.check()


@pytest.mark.parametrize("kind", [ReplicaKind.REFLINK], ids=["reflink"])
def test_a_head_in_many_pieces_ends_cloning(bench: Make, replica_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "SPAN", 3)
    one = bench(replica_dir, DISKS)
    for number in range(3):
        small(one, number)
    assert one.replica.info().kind == "reflink"
    monkeypatch.setattr(reflink, "MOST_EXTENTS", 3)
    one.cycle([("vda", number * 8192, bytes([number + 1]) * 4096) for number in range(40)], keep=False)
    replica = one.replica
    with replica.working("holding") as record:
        hold(replica, record, "test:t1", record.points[1])
    replica.drop_points([], 1)
    assert replica.info().kind == "chain"
    one.check()
    one.cycle([("vda", 4096, b"n" * 512)], keep=False)
    for number in range(4, 12):
        small(one, number)
    one.check()
    clones = {path.parent.name for path in (replica.home.path / "points").rglob("*.raw")}
    assert clones == {"p1", "p2", "p3"}
    dropped = list(one.points)[:7]
    replica.drop_points(dropped, 1)
    for point_id in dropped:
        del one.points[point_id]
    one.check()
    clones = {path.parent.name for path in (replica.home.path / "points").rglob("*.raw")}
    assert clones == {"p2"}, "only the clone that the test uses is left"
    with replica.working("releasing") as record:
        released(replica, record, "test:t1")
    assert not list((replica.home.path / "points").rglob("*.raw"))
    one.disks["vda"] += 4096
    one.head["vda"] += bytes(4096)
    small(one, 13)
    one.check()


def test_cancelled_gathering_changes_nothing(bench: Make, replica_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "SPAN", 3)
    one = bench(replica_dir, DISKS)
    for _ in range(4):
        one.cycle([("vda", 0, b"y" * 4096), ("sdb", 0, b"z" * 512)])
    before = one.replica.home.load()
    watch = Watch()
    watch.cancel()
    with pytest.raises(Cancelled):
        one.replica.drop_points([], 1, watch)
    assert one.replica.home.load() == before
    one.check()
    one.replica.drop_points([], 1)
    assert max(layer.level for layer in one.replica.home.load().layers.values()) == 1
    one.check()


def test_without_space_the_chain_only_grows_longer(
    bench: Make, replica_dir: Path, monkeypatch: pytest.MonkeyPatch, tools: Any
) -> None:
    monkeypatch.setattr(chain, "SPAN", 3)
    monkeypatch.setattr(chain.ChainImages, "_has_space_for", lambda *_: False)
    one = bench(replica_dir, DISKS)
    for number in range(6):
        small(one, number)
    assert deepest(one.replica.home.load()) == 6
    one.check()


def test_gathering_plans_runs_of_whole_levels() -> None:
    def record(levels: list[int]) -> Record:
        """The layers from the base up."""
        made = {"base": Layer("vda", None, 0)}
        below = "base"
        for number, level in enumerate(levels):
            made[f"l{number}"] = Layer("vda", below, 0, level)
            below = f"l{number}"
        return Record(2, "r", "m", 1, ReplicaKind.CHAIN, {}, {"vda": below}, layers=made)

    def run(levels: list[int]) -> tuple[int, str, int] | None:
        made = record(levels)
        found = layers.to_gather(made, made.heads["vda"], 3)
        return None if found is None else (len(found.layers), found.below, found.level)

    assert run([]) is None
    assert run([0, 0]) is None
    assert run([0, 0, 0]) == (3, "base", 1)
    assert run([1, 0, 0, 0]) == (3, "l0", 1)
    assert run([1, 1, 0, 0]) is None
    assert run([1, 1, 0, 0, 0]) == (5, "base", 2)
    assert run([2, 2, 1, 1, 0, 0, 0]) == (7, "base", 3)
    assert run([2, 1, 1, 0, 0, 0]) == (5, "l0", 2)
