"""The kit: cycles at the target (invariants 1, 3, 4 and 6 in docs/explanation/architecture.md)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from asrcore.driver import DIGEST_BLOCK, DIGEST_SIZE, Capability, CycleSpec, CycleWriter
from asrcore.errors import MachineBusy, StaleBase, StaleEpoch, TargetFull, TargetReadOnly
from asrcore.model.extent import Extent, subtract, total
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.testing.conformance._base import Base, needs
from asrcore.testing.conformance._target_bench import Call, Data, Same, TargetBench, Zero, noise
from asrcore.testing.conformance.copying import is_gapless, reads_zero
from asrcore.testing.conformance.rig import ConformanceRig
from asrcore.units import KiB, MiB

__all__ = ["CycleConformance", "TargetBase"]

TARGET = Capability.TARGET


class TargetBase(Base):
    """A separate replica for each test."""

    @pytest.fixture
    def target(self, rig: ConformanceRig) -> Iterator[TargetBench]:
        """A new, empty replica."""
        bench = TargetBench(rig)
        yield bench
        bench.close()


def _covers(done: list[Extent], *wanted: Extent) -> bool:
    return not subtract(wanted, done)


def _kill(target: TargetBench, writer: CycleWriter) -> None:
    target.rig.abandon(writer)
    target.rig.restart()


class CycleConformance(TargetBase):
    """A cycle becomes a point as a whole or not at all, and an interrupted one resumes."""

    @needs(target=[TARGET])
    def test_a_new_replica_is_empty(self, target: TargetBench) -> None:
        info = target.replica.info()
        assert (info.replica_id, info.epoch, info.points, info.head, info.pending) == (target.id, 1, (), None, None)
        assert dict(info.disks) == target.sizes
        assert target.id in target.target.replicas()
        for disk_id, size in target.sizes.items():
            with target.replica.reader(disk_id) as reader:
                assert reads_zero(reader, [Extent(0, size)])

    @needs(target=[TARGET])
    def test_creating_again_changes_nothing(self, target: TargetBench) -> None:
        target.first_points("p1")
        target.target.create_replica(target.spec, Watch())
        assert target.points == ["p1"]
        target.check()

    @needs(target=[TARGET])
    def test_a_point_holds_what_was_sent(self, target: TargetBench) -> None:
        end = target.sizes[target.second]
        target.cycle(
            "p1",
            Data(target.first, 0, noise(MiB + 4 * KiB)),
            Data(target.first, target.sizes[target.first] - 64 * KiB, noise(64 * KiB)),
            Data(target.second, end - 512, noise(512)),
            Zero(target.second, 0, 128 * KiB),
        )
        target.cycle(
            "p2",
            Data(target.first, 12 * KiB, noise(4 * KiB)),
            Data(target.first, 2 * MiB - 4 * KiB, noise(8 * KiB)),
            Data(target.second, end - 4 * KiB - 512, noise(4 * KiB)),
        )
        target.check("p1", "p2")
        target.check_head()

    @needs(target=[TARGET])
    def test_several_threads_write(self, target: TargetBench) -> None:
        calls = [Data(target.first, index * 64 * KiB, noise(64 * KiB)) for index in range(32)]
        together = threading.Barrier(4)

        def send(mine: list[Data]) -> None:
            together.wait()
            target.send(writer, mine)

        with target.open("c1") as writer:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(send, [calls[first::4] for first in range(4)]))
            target.seal(writer, "p1", calls)
        target.check()

    @needs(target=[TARGET])
    def test_seal_tells_the_point(self, target: TargetBench) -> None:
        with target.open("c1") as writer:
            spec = target.seal_spec("p1")
            point = writer.seal(spec)
        assert (point.id, point.taken_at, point.consistency) == ("p1", spec.taken_at, Consistency.FILESYSTEM)
        assert (point.kept, point.pinned) == (True, False)
        assert dict(point.disks) == target.sizes
        info = target.replica.info()
        assert info.points == (point,)
        assert (info.head, info.pending) == ("p1", None)

    @needs(target=[TARGET])
    def test_sealing_again_returns_the_point(self, target: TargetBench) -> None:
        with target.open("c1") as writer:
            spec = target.seal_spec("p1")
            point = writer.seal(spec)
            assert writer.seal(spec) == point
        assert target.points == ["p1"]

    @needs(target=[TARGET])
    def test_a_sealed_point_survives_the_engine(self, target: TargetBench) -> None:
        calls = [Data(target.first, 0, noise(64 * KiB))]
        writer = target.open("c1")
        target.send(writer, calls)
        point = target.seal(writer, "p1", calls)  # without a flush before it
        _kill(target, writer)
        assert target.replica.info().points == (point,)
        target.check()

    @needs(target=[TARGET])
    def test_a_cycle_is_invisible_until_it_is_sealed(self, target: TargetBench) -> None:
        target.first_points("p1")
        calls = [Data(target.first, 0, noise(MiB)), Zero(target.second, 512 * KiB, 64 * KiB)]
        with target.open("c2") as writer:
            target.send(writer, calls)
            for _ in range(2):
                assert target.points == ["p1"]
                target.check("p1")
                target.check_head()
                writer.flush()
            target.seal(writer, "p2", calls)
        assert target.points == ["p1", "p2"]
        target.check()

    @needs(target=[TARGET])
    def test_a_killed_cycle_leaves_the_point_whole(self, target: TargetBench) -> None:
        target.first_points("p1")
        writer = target.open("c2")
        target.send(writer, [Data(target.first, 0, noise(MiB))])
        writer.flush()
        target.send(writer, [Data(target.first, MiB, noise(MiB))])
        _kill(target, writer)
        assert target.points == ["p1"]
        target.check("p1")
        target.check_head()

    # -- resuming an interrupted cycle

    @needs(target=[TARGET])
    def test_closing_keeps_what_was_flushed(self, target: TargetBench) -> None:
        target.first_points("p1")
        calls = [Data(target.first, 0, noise(MiB)), Zero(target.first, MiB, 64 * KiB)]
        with target.open("c2") as writer:
            target.send(writer, calls)
            writer.flush()
        assert target.replica.info().pending == "c2"
        assert target.points == ["p1"]
        with target.open("c2") as writer:
            assert _covers(writer.done(target.first), Extent(0, MiB + 64 * KiB))
            target.seal(writer, "p2", calls)
        target.check()

    @needs(target=[TARGET])
    def test_flushed_data_is_done_after_a_kill(self, target: TargetBench) -> None:
        calls = [Data(target.first, 0, noise(MiB)), Zero(target.second, 0, 64 * KiB), Same(target.second, MiB, 512)]
        writer = target.open("c1")
        target.send(writer, calls)
        writer.flush()
        _kill(target, writer)
        assert target.replica.info().pending == "c1"
        rest = [Data(target.first, 2 * MiB, noise(64 * KiB))]
        with target.open("c1") as writer:
            assert _covers(writer.done(target.first), Extent(0, MiB))
            assert _covers(writer.done(target.second), Extent(0, 64 * KiB), Extent(MiB, 512))
            target.send(writer, rest)
            target.seal(writer, "p1", [*calls, *rest])
        target.check()

    @needs(target=[TARGET])
    def test_done_tells_only_what_is_durable(self, target: TargetBench) -> None:
        first, second = Data(target.first, 0, noise(256 * KiB)), Data(target.first, MiB, noise(256 * KiB))
        writer = target.open("c1")
        assert writer.done(target.first) == []
        target.send(writer, [first])
        writer.flush()
        target.send(writer, [second])
        reported = writer.done(target.first)
        _kill(target, writer)
        with target.open("c1") as writer:
            after = writer.done(target.first)
            assert _covers(after, *reported), "what was reported as durable is missing after a kill"
            missing = [call for call in (first, second) if not _covers(after, Extent(call.offset, len(call.data)))]
            target.send(writer, missing)
            target.seal(writer, "p1", [first, second])
        target.check()

    @needs(target=[TARGET])
    def test_disks_may_grow_while_a_cycle_is_interrupted(self, target: TargetBench) -> None:
        target.first_points("p1")
        calls = [Data(target.first, 0, noise(64 * KiB))]
        with target.open("c2") as writer:
            target.send(writer, calls)
            writer.flush()
        sizes = target.sizes | {target.first: target.sizes[target.first] + MiB}
        more = [Data(target.first, target.sizes[target.first], noise(64 * KiB))]
        with target.open("c2", sizes) as writer:
            target.send(writer, more)
            target.seal(writer, "p2", [*calls, *more], sizes=sizes)
        assert dict(target.replica.info().points[-1].disks) == sizes
        target.check()

    @needs(target=[TARGET])
    def test_a_full_target_leaves_all_as_it_was(self, target: TargetBench) -> None:
        target.first_points("p1")
        calls = [Data(target.first, 0, noise(64 * KiB))]
        with target.rig.full_target(), target.open("c2") as writer:
            target.send(writer, calls)
            writer.flush()
            with pytest.raises(TargetFull):
                self._send_flushing(target, writer, 32)
            assert target.points == ["p1"]
            target.check("p1")
        assert target.replica.info().pending == "c2", "an error never drops a cycle"
        with target.open("c2") as writer:
            done = writer.done(target.first)
            assert _covers(done, Extent(0, 64 * KiB))
            again = [Data(target.first, 64 * KiB, noise(40 * 64 * KiB))]
            target.send(writer, again)
            target.seal(writer, "p2", [*calls, *again])
        target.check()

    @needs(target=[TARGET])
    def test_a_read_only_target_leaves_all_as_it_was(self, target: TargetBench) -> None:
        target.first_points("p1")
        with target.rig.read_only_target(), pytest.raises(TargetReadOnly):
            self._open_and_send(target)
        assert target.points == ["p1"]
        target.check()
        if target.replica.info().pending:
            with target.open("c2") as writer:
                writer.discard()

    def _send_flushing(self, target: TargetBench, writer: CycleWriter, pieces: int) -> None:
        for index in range(1, pieces):
            target.send(writer, [Data(target.first, index * 64 * KiB, noise(64 * KiB))])
            writer.flush()

    def _open_and_send(self, target: TargetBench) -> None:
        with target.open("c2") as writer:
            target.send(writer, [Data(target.first, 0, noise(64 * KiB))])
            writer.flush()

    @needs(target=[TARGET])
    def test_another_cycle_does_not_drop_the_pending_one(self, target: TargetBench) -> None:
        with target.open("c1") as writer:
            target.send(writer, [Data(target.first, 0, noise(64 * KiB))])
            writer.flush()
        with pytest.raises(MachineBusy):
            target.open("c2").close()
        assert target.replica.info().pending == "c1"
        with target.open("c1") as writer:
            assert _covers(writer.done(target.first), Extent(0, 64 * KiB))

    @needs(target=[TARGET])
    def test_discard_drops_the_cycle(self, target: TargetBench) -> None:
        target.first_points("p1")
        with target.open("c2") as writer:
            target.send(writer, [Data(target.first, 0, noise(64 * KiB))])
            writer.flush()
            writer.discard()
        assert target.replica.info().pending is None
        assert target.points == ["p1"]
        target.cycle("p3", Data(target.first, MiB, noise(64 * KiB)))
        target.check()

    # -- zeroes and sameness

    @needs(target=[TARGET])
    def test_zeroes_read_as_zeroes(self, target: TargetBench) -> None:
        target.cycle("p1", Data(target.first, 0, noise(3 * MiB)), Data(target.second, 0, noise(MiB)))
        target.cycle("p2", Zero(target.first, 64 * KiB, 2 * MiB), Zero(target.second, 4 * KiB, 4 * KiB))
        target.check()
        target.check_head()

    @needs(target=[TARGET])
    def test_zeroes_stay_thin(self, target: TargetBench) -> None:
        if not target.rig.thin:
            pytest.skip("the target stores zeroes")
        assert total(item for item in target.replica.allocated(target.first) if not item.zero) == 0
        target.cycle("p1", Data(target.first, 0, noise(3 * MiB)))
        target.cycle("p2", Zero(target.first, MiB, MiB))
        zero = [item for item in target.replica.allocated(target.first) if item.zero]
        assert _covers(zero, Extent(MiB, MiB))

    @needs(target=[TARGET])
    def test_allocated_covers_the_head(self, target: TargetBench) -> None:
        target.first_points("p1", "p2")
        for disk_id, size in target.sizes.items():
            extents = target.replica.allocated(disk_id)
            assert is_gapless(extents, size)
            with target.replica.reader(disk_id) as reader:
                assert reads_zero(reader, [item for item in extents if item.zero])

    @needs(target=[TARGET])
    def test_same_leaves_the_content_and_counts_as_done(self, target: TargetBench) -> None:
        target.first_points("p1")
        calls = [Same(target.first, 0, 2 * MiB), Data(target.first, 2 * MiB, noise(64 * KiB))]
        with target.open("c2") as writer:
            target.send(writer, calls)
            writer.flush()
            assert _covers(writer.done(target.first), Extent(0, 2 * MiB + 64 * KiB))
            target.seal(writer, "p2", calls)
        target.check()

    @needs(target=[TARGET])
    def test_the_last_call_counts(self, target: TargetBench) -> None:
        """A resumed cycle sends again what changed meanwhile, which may have changed back."""
        target.first_points("p1")
        first = [Data(target.first, index * 64 * KiB, noise(64 * KiB)) for index in range(3)]
        first.append(Data(target.second, 512 * KiB, noise(64 * KiB)))
        again: list[Call] = [
            Same(target.first, 0, 64 * KiB),
            Zero(target.first, 64 * KiB, 64 * KiB),
            Data(target.first, 128 * KiB, noise(4 * KiB)),
            Same(target.second, 512 * KiB, 4 * KiB),
        ]
        with target.open("c2") as writer:
            target.send(writer, first)
            writer.flush()
        with target.open("c2") as writer:
            target.send(writer, again)
            target.seal(writer, "p2", [*first, *again])
        target.check()

    @needs(target=[TARGET])
    def test_digests_are_of_the_head(self, target: TargetBench) -> None:
        target.first_points("p1", "p2")
        for disk_id, size in target.sizes.items():
            for extent in (Extent(0, size), Extent(64 * KiB, 128 * KiB), Extent(MiB, size - MiB)):
                assert target.replica.digests(disk_id, extent) == target.digests(disk_id, extent), (disk_id, extent)

    @needs(target=[TARGET])
    def test_compare_names_the_blocks_that_differ(self, target: TargetBench) -> None:
        target.first_points("p1", "p2")
        block = DIGEST_BLOCK
        for disk_id, size in target.sizes.items():
            last = (size - 1) // block * block  # the last block may be a short one
            for extent in (Extent(0, size), Extent(2 * block, size - 2 * block)):
                ours = target.digests(disk_id, extent)
                assert target.replica.compare(disk_id, extent, ours) == []
                wrong = bytearray(ours)
                for start in (2 * block, 3 * block, 9 * block, last):
                    wrong[(start - extent.offset) // block * DIGEST_SIZE] ^= 1
                expected = [Extent(2 * block, 2 * block), Extent(9 * block, block), Extent(last, size - last)]
                assert target.replica.compare(disk_id, extent, bytes(wrong)) == expected, (disk_id, extent)

    # -- who may write

    @needs(target=[TARGET])
    def test_a_stale_base_is_refused(self, target: TargetBench) -> None:
        target.first_points("p1", "p2")
        for base in ("p1", None, "no-such-point"):
            with pytest.raises(StaleBase):
                target.replica.open_cycle(CycleSpec("c9", 1, base, target.sizes)).close()
        assert target.replica.info().pending is None
        target.check()

    @needs(target=[TARGET])
    def test_a_stale_epoch_is_refused(self, target: TargetBench) -> None:
        target.first_points("p1", "p2")
        for _ in range(2):
            target.replica.raise_epoch(3)
        with pytest.raises(StaleEpoch):
            target.replica.raise_epoch(2)
        with pytest.raises(StaleEpoch):
            target.replica.open_cycle(CycleSpec("c9", 2, "p2", target.sizes)).close()
        with pytest.raises(StaleEpoch):
            target.replica.drop_points(["p1"], 2)
        with pytest.raises(StaleEpoch):
            target.target.delete_replica(target.id, 2)
        info = target.replica.info()
        assert (info.epoch, info.pending, target.points) == (3, None, ["p1", "p2"])
        target.check()

    @needs(target=[TARGET])
    def test_the_epoch_survives_the_engine(self, target: TargetBench) -> None:
        target.replica.raise_epoch(7)
        target.rig.restart()
        assert target.replica.info().epoch == 7

    @needs(target=[TARGET])
    def test_a_writer_of_the_time_before_cannot_seal(self, target: TargetBench) -> None:
        target.first_points("p1")
        with target.open("c2") as writer:
            target.send(writer, [Data(target.first, 0, noise(64 * KiB))])
            writer.flush()
            target.replica.raise_epoch(2)
            with pytest.raises(StaleEpoch):
                writer.seal(target.seal_spec("p2"))
        assert target.points == ["p1"]
        target.check()
