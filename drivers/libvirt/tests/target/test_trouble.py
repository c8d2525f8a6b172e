"""Full and read-only file systems: a clear error, no damage to sealed points, and the same cycle can be resumed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asr_storage.replica.store import ReplicaKind
from asrcore.driver import ReplicaSpec
from asrcore.errors import TargetFull, TargetReadOnly
from asrcore.model.extent import Extent
from asrcore.model.watch import Watch

MIB = 1024 * 1024
Make = Callable[..., Any]


def test_full_while_writing(bench: Make, small: Path, tools: Any) -> None:
    one = bench(small, {"vda": 32 * MIB})
    one.cycle([("vda", 0, random.Random(1).randbytes(4 * MIB))])
    ballast = tools.fill(small, 2 * MIB)
    spec = one.spec()
    writer = one.replica.open_cycle(spec)
    sent: list[bytes] = []

    def send() -> None:
        for number in range(32):
            piece = random.Random(number).randbytes(MIB)
            writer.write("vda", number * MIB, memoryview(piece))
            writer.flush()
            sent.append(piece)

    with pytest.raises(TargetFull) as caught:
        send()
    assert str(small) in str(caught.value)
    assert "missing" in caught.value.cause_text or "free" in caught.value.cause_text
    writer.close()
    one.check()
    assert one.replica.info().pending == spec.cycle_id
    ballast.unlink()
    with one.replica.open_cycle(spec) as writer:
        done = writer.done("vda")
        assert done == ([Extent(0, len(sent) * MIB)] if sent else [])
        for number in range(len(sent), 12):
            sent.append(random.Random(number).randbytes(MIB))
            writer.write("vda", number * MIB, memoryview(sent[-1]))
        point = writer.seal(one.seal_spec(keep=False))
    one.head["vda"][: len(sent) * MIB] = b"".join(sent)
    one.sealed(point)
    one.check()


def test_full_at_the_seal_commits_nothing(bench: Make, small: Path, tools: Any) -> None:
    one = bench(small, {"vda": 32 * MIB})
    one.cycle([("vda", 0, random.Random(1).randbytes(4 * MIB))])
    with one.replica.open_cycle(one.spec()) as writer:
        piece = random.Random(2).randbytes(2 * MIB)
        writer.write("vda", MIB, memoryview(piece))
        writer.flush()
        ballast = tools.fill(small, MIB)
        with pytest.raises(TargetFull) as caught:
            writer.seal(one.seal_spec(keep=True))
        assert "bytes" in caught.value.cause_text
        one.check()
        ballast.unlink()
        point = writer.seal(one.seal_spec(keep=True))
    one.head["vda"][MIB : 3 * MIB] = piece
    one.sealed(point)
    one.check()


def test_full_while_a_replica_is_made(small: Path, tools: Any) -> None:
    target = tools.target_at(small)
    ballast = tools.fill(small, 0)
    spec = ReplicaSpec("r1", "web", 1, tools.machine({"vda": 32 * MIB}))
    with pytest.raises(TargetFull):
        target.create_replica(spec, Watch())
    ballast.unlink()
    assert target.create_replica(spec, Watch()).info().disks == {"vda": 32 * MIB}


def test_dropping_on_a_full_file_system_keeps_content(bench: Make, small: Path, tools: Any) -> None:
    one = bench(small, {"vda": 32 * MIB})
    for number in range(4):
        one.cycle([("vda", number * 2 * MIB, random.Random(number).randbytes(2 * MIB))])
    ballast = tools.fill(small, 0)
    with contextlib.suppress(TargetFull):  # merging layers may need space; the points are deleted either way
        one.replica.drop_points(["p1", "p2", "p3"], 1)
    for name in ("p1", "p2", "p3"):
        del one.points[name]
    one.check()
    ballast.unlink()
    one.replica.drop_points([], 1)
    one.check()
    one.cycle([("vda", 0, b"x" * 512)])
    one.check()


def test_read_only(bench: Make, small: Path, tools: Any, kind: ReplicaKind) -> None:
    one = bench(small, {"vda": 4 * MIB})
    one.cycle([("vda", 0, random.Random(1).randbytes(MIB))])
    one.cycle([("vda", MIB, random.Random(2).randbytes(MIB))])
    spec = one.spec()
    writer = one.replica.open_cycle(spec)
    writer.write("vda", 0, memoryview(b"y" * 512))
    writer.flush()
    writer.close()
    tools.run("mount", "-o", "remount,ro", small)
    try:
        one.check()
        operations: list[Callable[[], object]] = [
            lambda: one.replica.open_cycle(spec).write("vda", 0, memoryview(b"z" * 512)),
            lambda: one.replica.open_cycle(spec).seal(one.seal_spec(keep=True)),
            lambda: one.replica.drop_points(["p1"], 1),
            lambda: one.replica.raise_epoch(2),
            lambda: one.replica.pin("p1", True),
            lambda: one.target.delete_replica("r1", 1),
            lambda: one.target.create_replica(ReplicaSpec("r2", "web", 1, tools.machine({"vda": MIB})), Watch()),
        ]
        for refused in operations:
            with pytest.raises(TargetReadOnly) as caught:
                refused()
            assert str(small) in str(caught.value)
        with pytest.raises(TargetReadOnly):
            one.target.details()
        one.check()
    finally:
        tools.run("mount", "-o", "remount,rw", small)
    with one.replica.open_cycle(spec) as writer:
        assert writer.done("vda") == [Extent(0, 512)]
        point = writer.seal(one.seal_spec(keep=True))
    one.head["vda"][:512] = b"y" * 512
    one.sealed(point)
    one.check()
