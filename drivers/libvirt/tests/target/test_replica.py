"""Replicas on XFS (reflink) and ext4 (chain): content, points, epochs, resumption, names."""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asr_driver_libvirt.failover import promotion
from asr_driver_libvirt.failover.instances import hold, make_images, of_point
from asr_driver_libvirt.target import seed
from asr_driver_libvirt.xml.domain import DiskKind, DomainDisk
from asr_storage.replica.store import ReplicaKind, Shared
from asrcore import codec
from asrcore.driver import DIGEST_BLOCK, CycleSpec, DiskReader, Promoted, ReplicaSpec, digests_of
from asrcore.errors import (
    AsrError,
    Cancelled,
    InvalidSetting,
    InvalidValue,
    MachineBusy,
    PointNotFound,
    ReplicaDamaged,
    ReplicaNotFound,
    StaleBase,
    StaleEpoch,
)
from asrcore.model.extent import Extent, total
from asrcore.model.watch import Watch

KIB, MIB = 1024, 1024 * 1024
Make = Callable[..., Any]


def data(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


# -- random histories ----------------------------------------------------------------------------------------------


def history(make: Make, replica_dir: Path, kind: ReplicaKind) -> type[RuleBasedStateMachine]:
    """Random cycles, points and disks against a byte model."""

    class History(RuleBasedStateMachine):
        count = 0

        @initialize()
        def begin(self) -> None:
            History.count += 1
            self.bench = make(replica_dir, {"vda": 1 * MIB, "sdb": 192 * KIB}, f"r{History.count}")
            self.disks_made = 2
            self.bench.cycle([("vda", 0, data(1, 70 * KIB)), ("sdb", 64 * KIB, data(2, 512))])

        ranges = st.tuples(st.integers(0, 2000), st.sampled_from([1, 8, 16, 127, 128, 300]))
        writes = st.lists(
            st.tuples(st.integers(0, 9), ranges, st.sampled_from(["data", "data", "zero", "same"])), max_size=6
        )

        def fill(self, writer: Any, writes: list[Any], flush: bool = False) -> None:
            """Sectors of 512 bytes, on and off the boundaries of blocks and clusters."""
            before = {disk_id: bytes(content) for disk_id, content in self.base.items()}
            for which, (start, sectors), what in writes:
                disk_id = sorted(self.bench.disks)[which % len(self.bench.disks)]
                size = self.bench.disks[disk_id]
                offset = start * 512 % size
                length = min(sectors * 512, size - offset)
                if what == "data":
                    piece = data(start * 1000 + sectors + self.bench.number, length)
                    writer.write(disk_id, offset, memoryview(piece))
                elif what == "zero":
                    piece = bytes(length)
                    writer.zero(disk_id, offset, length)
                else:  # return to the base
                    piece = before[disk_id][offset : offset + length]
                    writer.same(disk_id, offset, length)
                self.bench.head[disk_id][offset : offset + length] = piece
                if flush:
                    writer.flush()

        @property
        def base(self) -> dict[str, bytes]:
            last = list(self.bench.points.values())[-1]
            return {disk_id: last.get(disk_id, b"").ljust(size, b"\0") for disk_id, size in self.bench.disks.items()}

        @rule(writes=writes, keep=st.booleans(), flush=st.booleans())
        def cycle(self, writes: list[Any], keep: bool, flush: bool) -> None:
            with self.bench.replica.open_cycle(self.bench.spec()) as writer:
                self.fill(writer, writes, flush)
                point = writer.seal(self.bench.seal_spec(keep=keep))
            self.bench.sealed(point)

        @rule(first=writes, second=writes, keep=st.booleans())
        def interrupted_cycle(self, first: list[Any], second: list[Any], keep: bool) -> None:
            spec = self.bench.spec()
            with self.bench.replica.open_cycle(spec) as writer:
                self.fill(writer, first)
                writer.flush()
                done = {disk_id: total(writer.done(disk_id)) for disk_id in spec.disks}
            assert self.bench.replica.info().pending == spec.cycle_id
            with self.bench.replica.open_cycle(spec) as writer:
                assert {disk_id: total(writer.done(disk_id)) for disk_id in spec.disks} == done
                self.fill(writer, second)
                point = writer.seal(self.bench.seal_spec(keep=keep))
            self.bench.sealed(point)

        @rule(writes=writes)
        def discarded_cycle(self, writes: list[Any]) -> None:
            before = {disk_id: bytearray(content) for disk_id, content in self.bench.head.items()}
            with self.bench.replica.open_cycle(self.bench.spec()) as writer:
                self.fill(writer, writes)
                writer.flush()
                writer.discard()
            self.bench.head = before
            assert self.bench.replica.info().pending is None

        @rule(chosen=st.sets(st.integers(0, 6), max_size=4))
        def drop(self, chosen: set[int]) -> None:
            names = list(self.bench.points)
            wanted = [names[number] for number in chosen if number < len(names)] + ["never-was"]
            self.bench.replica.drop_points(wanted, 1)
            pinned = {point.id for point in self.bench.replica.info().points if point.pinned}
            for name in wanted:
                if name != names[-1] and name not in pinned:
                    self.bench.points.pop(name, None)

        @rule(chosen=st.integers(0, 6), pinned=st.booleans())
        def pin(self, chosen: int, pinned: bool) -> None:
            names = list(self.bench.points)
            self.bench.replica.pin(names[chosen % len(names)], pinned)

        @rule(sectors=st.integers(1, 300))
        def grow(self, sectors: int) -> None:
            disk_id = sorted(self.bench.disks)[0]
            if self.bench.disks[disk_id] > 2 * MIB:
                return
            self.bench.disks[disk_id] += sectors * 512
            self.bench.head[disk_id] += bytes(sectors * 512)
            self.bench.cycle([])

        @precondition(lambda self: "vdz" not in self.bench.disks)
        @rule()
        def add_disk(self) -> None:
            self.disks_made += 1
            # the same name after a removal is a new, empty disk
            self.bench.disks["vdz"] = 64 * KIB
            self.bench.head["vdz"] = bytearray(64 * KIB)
            self.bench.cycle([("vdz", 4096, data(self.disks_made, 8192))])

        @precondition(lambda self: len(self.bench.disks) > 1)
        @rule()
        def remove_disk(self) -> None:
            disk_id = sorted(self.bench.disks)[-1]
            del self.bench.disks[disk_id]
            del self.bench.head[disk_id]
            self.bench.cycle([])

        @invariant()
        def all_points_are_what_they_were(self) -> None:
            if hasattr(self, "bench"):
                self.bench.check()

        def teardown(self) -> None:
            if hasattr(self, "bench"):
                allocated_and_digests(self.bench)
                files = list((replica_dir / "replicas" / f"r{History.count}" / "images").iterdir())
                most = len(self.bench.disks) if kind is ReplicaKind.REFLINK else 30
                assert len(files) <= most, files
                self.bench.target.delete_replica(f"r{History.count}", 1)

    return History


def allocated_and_digests(bench: Any) -> None:
    """Check the head: extents reported as zero are zero, and digests match the bytes."""
    for disk_id, size in bench.replica.info().disks.items():
        content = bytes(bench.head[disk_id])
        extents = bench.replica.allocated(disk_id)
        assert [extent.offset for extent in extents] == [0, *(extent.end for extent in extents)][:-1]
        assert extents[-1].end == size
        for extent in extents:
            if extent.zero:
                assert not any(content[extent.offset : extent.end])
        for start in range(0, size, 5 * DIGEST_BLOCK):
            extent = Extent(start, min(5 * DIGEST_BLOCK, size - start))
            assert bench.replica.digests(disk_id, extent) == digests_of(Bytes(content), extent)


class Bytes(DiskReader):
    """Reads from memory."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]


def test_random_histories(bench: Make, replica_dir: Path, kind: ReplicaKind) -> None:
    examples, steps = (12, 12) if kind is ReplicaKind.REFLINK else (6, 8)
    run_state_machine_as_test(
        history(bench, replica_dir, kind),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        ),
    )
    assert not list((replica_dir / "replicas").iterdir())


# -- the first copy --------------------------------------------------------------------------------------------------


def test_first_copy_resumes_where_it_was(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"vda": 4 * MIB})
    spec = one.spec()
    with one.replica.open_cycle(spec) as writer:
        writer.write("vda", 0, memoryview(data(1, MIB)))
        writer.flush()
        writer.write("vda", 2 * MIB, memoryview(data(2, MIB)))
    assert one.replica.info().points == ()
    with one.replica.open_cycle(spec) as writer:
        assert writer.done("vda") == [Extent(0, MIB)]
        writer.write("vda", 2 * MIB, memoryview(data(3, MIB)))
        point = writer.seal(one.seal_spec(keep=True))
        assert writer.seal(one.seal_spec(keep=True)) == point
    one.head["vda"][:MIB] = data(1, MIB)
    one.head["vda"][2 * MIB : 3 * MIB] = data(3, MIB)
    one.sealed(point)
    one.check()
    assert one.replica.info().pending is None


def test_first_copy_stays_thin(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"vda": 64 * MIB})
    one.cycle([("vda", 8 * MIB, data(1, MIB)), ("vda", 16 * MIB, bytes(32 * MIB))])
    one.cycle([("vda", 8 * MIB, bytes(MIB)), ("vda", 40 * MIB, data(2, 64 * KIB))], keep=False)
    one.cycle([("vda", 40 * MIB, bytes(64 * KIB))], keep=False)
    images = (replica_dir / "replicas" / "r1").rglob("*")
    used = sum(path.stat().st_blocks * 512 for path in images if path.is_file())
    assert used < 3 * MIB, "thin became thick"
    assert all(extent.zero for extent in one.replica.allocated("vda"))


# -- who may write ---------------------------------------------------------------------------------------------------


def test_older_epoch_is_refused_everywhere(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"vda": MIB})
    one.cycle([("vda", 0, data(1, 512))])
    writer = one.replica.open_cycle(one.spec())
    writer.write("vda", 0, memoryview(data(2, 512)))
    one.replica.raise_epoch(3)
    operations: list[Callable[[], object]] = [
        writer.flush,
        lambda: writer.seal(one.seal_spec(keep=True)),
        writer.discard,
        lambda: one.replica.raise_epoch(2),
        lambda: one.replica.drop_points([], 2),
        lambda: one.replica.open_cycle(CycleSpec("c9", 2, "p1", one.disks)),
        lambda: one.target.delete_replica("r1", 2),
    ]
    for stale in operations:
        with pytest.raises(StaleEpoch):
            stale()
    writer.close()
    assert one.replica.info().epoch == 3
    one.check()


def test_higher_epoch_takes_ownership(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"vda": MIB})
    one.replica.open_cycle(CycleSpec("c1", 5, None, one.disks)).close()
    assert one.replica.info().epoch == 5


def test_the_promotion_that_the_driver_recorded_is_reported(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"vda": MIB})
    one.cycle([("vda", 0, data(1, 512))])
    assert one.replica.info().promoted is None
    made = promotion.Promotion(promotion.Phase.MAKING, "p1", "uuid-1", "web", "/nowhere", {})
    one.replica.home.promotion.write_bytes(codec.dump(made))
    assert one.replica.info().promoted == Promoted("p1", "uuid-1")
    one.replica.home.promotion.write_bytes(b"{")
    with pytest.raises(ReplicaDamaged, match="promotion"):
        one.replica.info()


def test_wrong_base_is_refused(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"vda": MIB})
    one.cycle([("vda", 0, data(1, 512))])
    for base in (None, "p0"):
        with pytest.raises(StaleBase):
            one.replica.open_cycle(CycleSpec("c2", 1, base, one.disks))
    assert one.replica.info().pending is None
    one.check()


def test_another_pending_cycle_stays_whole(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"vda": MIB})
    one.cycle([("vda", 0, data(1, 512))])
    spec = one.spec("c-first")
    with one.replica.open_cycle(spec) as writer:
        writer.write("vda", 512, memoryview(data(2, 512)))
        writer.flush()
        with pytest.raises(MachineBusy):
            one.replica.open_cycle(spec)
    with pytest.raises(MachineBusy):
        one.replica.open_cycle(one.spec("c-second"))
    with one.replica.open_cycle(spec) as writer:
        assert writer.done("vda") == [Extent(512, 512)]
        writer.discard()
    one.replica.open_cycle(one.spec("c-second")).close()
    one.check()


def test_second_process_is_told(bench: Make, replica_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench(replica_dir, {"vda": MIB})
    monkeypatch.setattr("asr_storage.replica.store._BUSY_SECONDS", 0.1)
    other = Shared(one.replica.home)  # as in another process
    other.hold()
    with pytest.raises(MachineBusy):
        one.replica.open_cycle(one.spec())
    assert one.replica.info().points == ()  # reading is always allowed
    other.release()
    one.cycle([("vda", 0, data(1, 512))])


def test_several_threads_write_one_cycle(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"vda": 8 * MIB, "vdb": 8 * MIB})
    one.cycle([("vda", 0, data(1, 512))])
    failed: list[BaseException] = []
    with one.replica.open_cycle(one.spec()) as writer:

        def work(number: int) -> None:
            try:
                for step in range(16):
                    disk_id = ("vda", "vdb")[step % 2]
                    offset = (step * 4 + number) * 128 * KIB
                    piece = data(offset + number, 128 * KIB)
                    writer.write(disk_id, offset, memoryview(piece))
                    one.head[disk_id][offset : offset + 128 * KIB] = piece
                    if step % 5 == 0:
                        writer.flush()
            except BaseException as error:  # noqa: BLE001
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        point = writer.seal(one.seal_spec(keep=True))
    one.sealed(point)
    one.check()


def test_open_reader_sees_the_point_after_layers_were_merged(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"vda": MIB})
    for number in range(4):
        one.cycle([("vda", number * 4096, data(number, 4096))])
    with one.replica.reader("vda", "p3") as reader, one.replica.reader("vda") as head:
        one.replica.drop_points(["p1", "p2"], 1)
        one.cycle([("vda", 0, data(99, 4096))], keep=False)
        buffer = bytearray(MIB)
        reader.read_into(0, memoryview(buffer))
        assert buffer == one.points["p3"]["vda"]
        head.read_into(0, memoryview(buffer))
        assert buffer == one.head["vda"]


@pytest.mark.parametrize("point_id", ["p1", "p2"], ids=["an older point", "the newest point"])
def test_what_stands_on_a_point_never_changes(bench: Make, replica_dir: Path, tmp_path: Path, point_id: str) -> None:
    """The disk of a test machine, while cycles continue and its point is deleted."""
    one = bench(replica_dir, {"vda": MIB})
    for number in (1, 2):
        one.cycle([("vda", 0, data(number, 65536))])
    expected = one.points[point_id]["vda"]
    with one.replica.working("a test") as found:
        point = of_point(found, point_id)
        record = hold(one.replica, found, "test one", point)
        disk = make_images(one.replica, record, "test one", point, replica_dir, own=False)["vda"]
    for number in (3, 4):
        one.cycle([("vda", 0, data(number, 65536))], keep=False)
    one.replica.drop_points([point_id], 1)
    one.cycle([("vda", 0, data(5, 65536))], keep=False)
    copy = tmp_path / "copy.raw"
    subprocess.run(["qemu-img", "convert", "-f", disk.format, "-O", "raw", disk.path, copy], check=True, timeout=60)
    assert copy.read_bytes() == expected


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a b", "x" * 200, "\0", "ü", ".hidden"])
def test_odd_ids_are_refused(bench: Make, replica_dir: Path, name: str, tools: Any) -> None:
    one = bench(replica_dir, {"vda": MIB})
    target = one.target
    operations: list[Callable[[], object]] = [
        lambda: target.create_replica(ReplicaSpec(name, "web", 1, tools.machine({"vda": MIB})), Watch()),
        lambda: target.replica(name),
        lambda: target.delete_replica(name, 1),
        lambda: one.replica.open_cycle(CycleSpec(name, 1, None, one.disks)),
        lambda: one.replica.open_cycle(CycleSpec("c1", 1, None, {"": MIB})),
        lambda: one.replica.open_cycle(CycleSpec("c1", 1, None, {"vda": -1})),
    ]
    for refused in operations:
        with pytest.raises(InvalidValue):
            refused()
    with one.replica.open_cycle(one.spec()) as writer, pytest.raises(InvalidValue):
        writer.seal(one.seal_spec(keep=True, point_id=name))
    assert target.replicas() == ["r1"]


def test_odd_disk_ids_are_only_names(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"../../../x": MIB, "scsi0:1": MIB, "nbd:unix:/x": 64 * KIB})
    for number in range(3):
        one.cycle([(disk_id, 0, data(number, 512)) for disk_id in one.disks])
    one.check()
    one.replica.drop_points(["p1", "p2"], 1)
    del one.points["p1"], one.points["p2"]
    one.check()
    outside = [path for path in replica_dir.rglob("*") if path.is_file() and path.suffix in (".raw", ".qcow2")]
    assert all("images" in path.parts or "points" in path.parts for path in outside)


def test_ranges_outside_of_the_disk_are_refused(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"vda": MIB})
    with one.replica.open_cycle(one.spec()) as writer:
        for offset, length in ((MIB - 1, 2), (-1, 1), (2 * MIB, 1)):
            with pytest.raises(InvalidValue):
                writer.zero("vda", offset, length)
        with pytest.raises(InvalidValue):
            writer.write("vdb", 0, memoryview(b"x"))
        with pytest.raises(InvalidValue):
            writer.write("vda", MIB, memoryview(b"x"))


def test_missing_things_are_named(bench: Make, replica_dir: Path, tmp_path: Path, tools: Any) -> None:
    one = bench(replica_dir, {"vda": MIB})
    one.cycle([("vda", 0, data(1, 512))])
    with pytest.raises(ReplicaNotFound):
        one.target.replica("r2")
    with pytest.raises(PointNotFound):
        one.replica.pin("p9", True)
    with pytest.raises(PointNotFound):
        one.replica.description("p9")
    with pytest.raises(PointNotFound):
        one.replica.reader("vda", "p9")
    one.target.delete_replica("r2", 1)  # already deleted
    elsewhere = tools.target_at(tmp_path / "not-mounted")
    assert elsewhere.replicas() == []
    with pytest.raises(InvalidSetting):
        elsewhere.create_replica(ReplicaSpec("r1", "web", 1, tools.machine({})), Watch())


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"format": 99}', b'{"format": 1}', b"\xff\xfe", b"null"])
def test_damaged_record_is_an_error_not_a_traceback(bench: Make, replica_dir: Path, text: bytes) -> None:
    one = bench(replica_dir, {"vda": MIB})
    (replica_dir / "replicas" / "r1" / "replica.json").write_bytes(text)
    for operation in (one.replica.info, lambda: one.target.replica("r1"), lambda: one.replica.raise_epoch(2)):
        with pytest.raises(ReplicaDamaged):
            operation()


def test_missing_image_is_an_error_not_zeroes(bench: Make, replica_dir: Path) -> None:
    one = bench(replica_dir, {"vda": MIB})
    for number in range(2):
        one.cycle([("vda", 0, data(number, 512))])
    for path in (replica_dir / "replicas" / "r1" / "images").iterdir():
        path.unlink()
    with pytest.raises(AsrError) as caught, one.replica.reader("vda") as reader:
        reader.read_into(0, memoryview(bytearray(512)))
    assert isinstance(caught.value, ReplicaDamaged)
    with pytest.raises(ReplicaDamaged):
        one.cycle([("vda", 0, b"x" * 512)])


def test_creating_again_returns_it_as_it_is(bench: Make, replica_dir: Path, tools: Any) -> None:
    one = bench(replica_dir, {"vda": MIB})
    one.cycle([("vda", 0, data(1, 512))])
    again = one.target.create_replica(ReplicaSpec("r1", "web", 1, tools.machine({"vda": 2 * MIB})), Watch())
    assert again.info() == one.replica.info()
    one.replica.raise_epoch(2)
    with pytest.raises(StaleEpoch):
        one.target.create_replica(ReplicaSpec("r1", "web", 1, tools.machine({})), Watch())
    one.check()


# -- seeding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [512 * KIB, 2 * MIB], ids=["larger-seed", "smaller-seed"])
def test_seeded_disk_has_the_seeds_content_and_its_own_size(
    replica_dir: Path, kind: ReplicaKind, fmt: str, size: int, tools: Any
) -> None:
    content = data(5, 300 * KIB) + bytes(MIB - 300 * KIB)
    source, head = replica_dir / f"disk.{fmt}", replica_dir / "head.raw"
    raw = replica_dir / "source.raw"
    raw.write_bytes(content)
    tools.run("qemu-img", "convert", "-f", "raw", "-O", fmt, raw, source)
    head.touch()
    disk = DomainDisk("vda", "disk", DiskKind.FILE, "file", str(source), fmt, "virtio")
    watch = Watch()
    seed.seed_disk("b", disk, head, size, kind, watch)
    assert head.read_bytes() == content.ljust(size, b"\0")[:size]
    assert source.exists()
    assert raw.read_bytes() == content
    if fmt == "qcow2" or kind is ReplicaKind.CHAIN:
        assert watch.done == watch.total > 0


def test_cancelled_seed_leaves_the_head(replica_dir: Path, kind: ReplicaKind, tools: Any) -> None:
    raw, source, head = replica_dir / "source.raw", replica_dir / "disk.qcow2", replica_dir / "head.raw"
    raw.write_bytes(data(5, MIB))
    tools.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, source)
    head.write_bytes(b"empty")
    watch = Watch()
    watch.cancel()
    disk = DomainDisk("vda", "disk", DiskKind.FILE, "file", str(source), "qcow2", "virtio")
    with pytest.raises(Cancelled):
        seed.seed_disk("b", disk, head, MIB, kind, watch)
    assert head.read_bytes() == b"empty"
