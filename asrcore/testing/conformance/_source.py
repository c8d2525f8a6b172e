"""The kit: frozen views and change tracking (invariants 2, 5 and 6 in docs/explanation/architecture.md)."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from asrcore.driver import DIGEST_BLOCK, Capability, DiskView, FrozenView, MachineView, Tracking, digests_of
from asrcore.errors import MachineNotFound, ViewLost
from asrcore.model.extent import Extent, total
from asrcore.model.finding import Severity
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy
from asrcore.testing.conformance._base import Base, SourceBench, needs, new_id, source_of, wait_for_power
from asrcore.testing.conformance.copying import Scratch, differences, fingerprint, is_gapless, reads_zero
from asrcore.testing.conformance.rig import ConformanceRig
from asrcore.units import KiB, MiB

__all__ = ["SourceConformance", "TrackingConformance"]

SOURCE, TRACKING, POWER, GROUPS = Capability.SOURCE, Capability.TRACKING, Capability.POWER, Capability.GROUPS
READERS = 4
_RANK = (Consistency.CRASH, Consistency.FILESYSTEM, Consistency.APPLICATION)


def _fingerprints(machine: MachineView) -> dict[str, bytes]:
    return {disk_id: fingerprint(disk) for disk_id, disk in machine.disks.items()}


def _tracked(machine: MachineView) -> dict[str, DiskView]:
    """Disks whose changes are tracked; there must be at least one."""
    disks = {disk_id: disk for disk_id, disk in machine.disks.items() if disk.tracking is not Tracking.NONE}
    assert disks, "the source claims TRACKING but tracks no disk of the machine"
    return disks


class SourceConformance(Base):
    """A frozen view shows one instant, all of it, and reports its consistency correctly."""

    @needs(source=[SOURCE])
    def test_the_machine_is_fit(self, rig: ConformanceRig, bench: SourceBench) -> None:
        findings = bench.source.findings(rig.machine_id, Policy("conformance"))
        assert [item for item in findings if item.severity is Severity.ERROR] == []

    @needs(source=[SOURCE])
    def test_a_view_has_all_disks(self, rig: ConformanceRig, bench: SourceBench) -> None:
        machine = source_of(rig).inventory.machine(rig.machine_id)
        with bench.open() as view:
            frozen = bench.of(view)
            assert {disk_id: disk.disk.size for disk_id, disk in frozen.disks.items()} == {
                disk.id: disk.size for disk in machine.disks
            }
            assert frozen.description.machine.id == rig.machine_id
            assert frozen.description.machine.disks == machine.disks

    @needs(source=[SOURCE])
    def test_allocated_covers_the_disk(self, bench: SourceBench) -> None:
        with bench.open() as view:
            for disk in bench.of(view).disks.values():
                assert is_gapless(disk.allocated(), disk.disk.size)

    @needs(source=[SOURCE])
    def test_allocated_tells_zeroes_truly(self, bench: SourceBench) -> None:
        with bench.open() as view, bench.unmoved(view):
            for disk in bench.of(view).disks.values():
                with disk.reader() as reader:
                    assert reads_zero(reader, [item for item in disk.allocated() if item.zero])

    @needs(source=[SOURCE])
    def test_a_machine_that_runs_is_not_halted(self, bench: SourceBench) -> None:
        with bench.open() as view:
            assert bench.of(view).halted == "", "for what its platform stopped only: it is reported as an error"

    @needs(source=[SOURCE])
    def test_a_view_equals_the_machine(self, rig: ConformanceRig, bench: SourceBench) -> None:
        with rig.still(rig.machine_id), bench.open() as view:
            for disk_id, disk in bench.of(view).disks.items():
                seen = hashlib.sha256()
                buffer = bytearray(MiB)
                with disk.reader() as reader:
                    for offset in range(0, disk.disk.size, MiB):
                        data = memoryview(buffer)[: min(MiB, disk.disk.size - offset)]
                        reader.read_into(offset, data)
                        seen.update(data)
                assert seen.hexdigest() == rig.sha256(rig.machine_id, disk_id)

    @needs(source=[SOURCE])
    def test_a_view_is_frozen_while_the_machine_writes(self, rig: ConformanceRig, bench: SourceBench) -> None:
        with bench.open() as view:
            if not bench.is_whole(view):
                pytest.skip("the source cannot hold whole disks still")
            before = _fingerprints(bench.of(view))
            rig.change(rig.machine_id)
            after = _fingerprints(bench.of(view))
            view.confirm()
        with bench.open() as later:
            assert _fingerprints(bench.of(later)) != before, "rig.change must change what a later view reads"
        for disk_id, seen in before.items():
            assert differences(seen, after[disk_id]) == [], f"disk {disk_id} changed within the view"

    @needs(source=[SOURCE])
    def test_digests_are_of_the_content(self, bench: SourceBench) -> None:
        with bench.open() as view, bench.unmoved(view):
            for disk in bench.of(view).disks.values():
                assert differences(disk.digests(Extent(0, disk.disk.size)), fingerprint(disk, disk.digest)) == []

    @needs(source=[SOURCE])
    def test_several_readers_at_once(self, bench: SourceBench) -> None:
        """Each from another place: if readers of one place mixed up their data, the test would not see it."""
        together = threading.Barrier(READERS)

        def read(disk: DiskView, quarter: int) -> bytes:
            size = disk.disk.size
            start = size // READERS // DIGEST_BLOCK * DIGEST_BLOCK * quarter
            together.wait()
            with disk.reader() as reader:
                later, sooner = (digests_of(reader, part) for part in (Extent(start, size - start), Extent(0, start)))
            return sooner + later

        with bench.open() as view, bench.unmoved(view), ThreadPoolExecutor(READERS) as pool:
            for disk in bench.of(view).disks.values():
                seen = list(pool.map(read, [disk] * READERS, range(READERS)))
                assert seen == [fingerprint(disk)] * READERS

    @needs(source=[SOURCE])
    def test_consistency_is_what_was_obtained(self, rig: ConformanceRig, bench: SourceBench) -> None:
        for asked in _RANK:
            with bench.open(consistency=asked) as view:
                obtained = bench.of(view).consistency
            assert obtained in _RANK, "a running machine is not offline"
            assert _RANK.index(obtained) <= _RANK.index(rig.consistency), "more than the guest can"

    @needs(source=[SOURCE, POWER])
    def test_a_stopped_machine_is_offline(self, rig: ConformanceRig, bench: SourceBench) -> None:
        inventory = source_of(rig).inventory
        inventory.power_off(rig.machine_id, graceful=True, timeout=rig.boot_timeout)
        try:
            with bench.open() as view:
                assert bench.of(view).consistency is Consistency.OFFLINE
                first = _fingerprints(bench.of(view))
            with bench.open() as view:
                assert _fingerprints(bench.of(view)) == first
        finally:
            inventory.power_on(rig.machine_id)
            wait_for_power(source_of(rig), rig.machine_id, PowerState.RUNNING, rig.boot_timeout)

    @needs(source=[SOURCE])
    def test_a_view_of_a_missing_machine(self, bench: SourceBench) -> None:
        with pytest.raises(MachineNotFound):
            bench.open(machines=["no-such-machine"])
        bench._machines.discard("no-such-machine")

    @needs(source=[SOURCE])
    def test_a_view_that_ended_early_is_told(self, rig: ConformanceRig, bench: SourceBench) -> None:
        with bench.open() as view:
            rig.lose_view(rig.machine_id)
            with pytest.raises(ViewLost):
                self._read_and_confirm(bench, view)

    def _read_and_confirm(self, bench: SourceBench, view: FrozenView) -> None:
        _fingerprints(bench.of(view))
        view.confirm()

    @needs(source=[SOURCE])
    def test_a_view_may_be_closed_twice(self, bench: SourceBench) -> None:
        view = bench.open()
        view.close()
        view.close()

    @needs(source=[SOURCE])
    def test_a_view_is_found_again_by_its_id(self, rig: ConformanceRig, bench: SourceBench) -> None:
        view_id = new_id("view")
        view = bench.open(view_id=view_id)
        taken_at, before = view.taken_at, _fingerprints(bench.of(view))
        bench.forget(view)
        rig.restart()
        rig.change(rig.machine_id)
        with bench.open(view_id=view_id) as again:
            if rig.views_survive:
                assert again.taken_at == taken_at
            if again.taken_at == taken_at and bench.is_whole(again):
                assert _fingerprints(bench.of(again)) == before

    @needs(source=[SOURCE, GROUPS])
    def test_a_group_is_frozen_at_one_barrier(self, rig: ConformanceRig, bench: SourceBench) -> None:
        pair = (rig.machine_id, rig.second_machine())
        written, stop = threading.Semaphore(0), threading.Event()
        number = 0

        def write() -> None:
            nonlocal number
            while not stop.is_set():
                number += 1
                for machine_id in pair:  # the second never knows a number that the first does not
                    rig.stamp(machine_id, number)
                written.release()

        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(write)
            try:
                assert written.acquire(timeout=rig.boot_timeout)
                with bench.open(machines=pair) as view:
                    view.settle()
                    first, second = (rig.stamp_in(view.machines[machine_id]) for machine_id in pair)
            finally:
                stop.set()
            writer.result()
        assert first - 1 <= second <= first, "the second machine was frozen before or after the first"


class TrackingConformance(Base):
    """What changed since a mark: complete, not everything, and never guessed."""

    def _follow(self, bench: SourceBench, disks: dict[str, Scratch], since: Mark) -> dict[str, int]:
        """Bring copies up to a view since a mark, by its changes alone; assert that they are equal then."""
        sent = {}
        with bench.open(since) as view, bench.unmoved(view):
            tracked = _tracked(bench.of(view))
            for disk_id, disk in tracked.items():
                assert disk.tracking is Tracking.CHANGED, disk.reason
                changed = disk.changed()
                assert changed == sorted(changed, key=lambda item: item.offset)
                disks[disk_id].resize(disk.disk.size)
                disks[disk_id].update(disk, changed)
                sent[disk_id] = total(changed)
            bench.settle(view, disks)
            for disk_id, disk in tracked.items():
                missed = differences(disks[disk_id].fingerprint(), fingerprint(disk))
                assert missed == [], f"disk {disk_id}: unreported changes (or false zeroes) at these offsets"
        return sent

    def _start(self, bench: SourceBench) -> tuple[dict[str, Scratch], Mark]:
        with bench.open() as view:
            copies = {disk_id: bench.copy(disk) for disk_id, disk in bench.of(view).disks.items()}
            bench.settle(view, copies)
            mark = bench.of(view).mark
            assert mark is not None, "the source claims TRACKING but the view has no mark"
            return copies, mark

    @needs(source=[SOURCE, TRACKING])
    def test_without_a_mark_nothing_is_known(self, bench: SourceBench) -> None:
        with bench.open() as view:
            assert {disk.tracking for disk in bench.of(view).disks.values()} == {Tracking.NONE}

    @needs(source=[SOURCE, TRACKING])
    def test_changes_are_complete(self, rig: ConformanceRig, bench: SourceBench) -> None:
        disks, mark = self._start(bench)
        for _ in range(3):
            rig.change(rig.machine_id)
        assert sum(self._follow(bench, disks, mark).values()) > 0

    @needs(source=[SOURCE, TRACKING])
    def test_changes_are_not_everything(self, rig: ConformanceRig, bench: SourceBench) -> None:
        mark = bench.mark()
        rig.change(rig.machine_id)
        with bench.open(mark) as view:
            disks = _tracked(bench.of(view)).values()
            reported = sum(total(disk.changed()) for disk in disks)
            assert 0 < reported < sum(disk.disk.size for disk in disks) / 2

    @needs(source=[SOURCE, TRACKING])
    def test_changes_while_a_view_is_open_belong_to_the_next(self, rig: ConformanceRig, bench: SourceBench) -> None:
        with bench.open() as view:
            disks = {disk_id: bench.copy(disk) for disk_id, disk in bench.of(view).disks.items()}
            bench.settle(view, disks)
            mark = bench.of(view).mark
            rig.change(rig.machine_id)
        assert mark is not None
        assert sum(self._follow(bench, disks, mark).values()) > 0

    @needs(source=[SOURCE, TRACKING])
    def test_what_changed_while_it_was_read_is_read_again(self, rig: ConformanceRig, bench: SourceBench) -> None:
        with bench.open() as view:
            disks = {disk_id: bench.copy(disk) for disk_id, disk in bench.of(view).disks.items()}
            rig.change(rig.machine_id)
            with bench.unmoved(view):
                bench.settle(view, disks)
                for disk_id, disk in bench.of(view).disks.items():
                    assert differences(disks[disk_id].fingerprint(), fingerprint(disk)) == [], f"disk {disk_id}"
                view.confirm()
            mark = bench.of(view).mark
        assert mark is not None
        rig.change(rig.machine_id)
        self._follow(bench, disks, mark)

    @needs(source=[SOURCE, TRACKING])
    def test_a_mark_outlives_a_view_that_led_to_nothing(self, rig: ConformanceRig, bench: SourceBench) -> None:
        """A cycle that failed after its view leaves the mark of the point before: no change may be missed."""
        disks, mark = self._start(bench)
        rig.change(rig.machine_id)
        bench.open(mark).close()
        rig.change(rig.machine_id)
        self._follow(bench, disks, mark)

    @needs(source=[SOURCE, TRACKING])
    def test_a_mark_outlives_the_engine(self, rig: ConformanceRig, bench: SourceBench) -> None:
        disks, mark = self._start(bench)
        rig.change(rig.machine_id)
        rig.restart()
        self._follow(bench, disks, mark)

    @needs(source=[SOURCE, TRACKING])
    def test_a_view_found_again_tells_the_same_changes(self, rig: ConformanceRig, bench: SourceBench) -> None:
        disks, mark = self._start(bench)
        rig.change(rig.machine_id)
        view_id = new_id("view")
        view = bench.open(mark, view_id=view_id)
        taken_at = view.taken_at
        bench.forget(view)
        rig.restart()
        rig.change(rig.machine_id)
        with bench.open(mark, view_id=view_id) as again, bench.unmoved(again):
            if again.taken_at != taken_at:
                pytest.skip("the view did not survive the engine")
            tracked = _tracked(bench.of(again))
            for disk_id, disk in tracked.items():
                disks[disk_id].update(disk, disk.changed())
            bench.settle(again, disks)
            for disk_id, disk in tracked.items():
                assert differences(disks[disk_id].fingerprint(), fingerprint(disk)) == []
            next_mark = bench.of(again).mark
        assert next_mark is not None
        self._follow(bench, disks, next_mark)

    @needs(source=[SOURCE, TRACKING])
    def test_discarded_data_is_told_as_zeroes(self, rig: ConformanceRig, bench: SourceBench) -> None:
        disks, mark = self._start(bench)
        rig.discard(rig.machine_id)
        with bench.open(mark) as view:
            reported = [item for disk in _tracked(bench.of(view)).values() for item in disk.changed() if item.zero]
            assert total(reported) >= 64 * KiB
        self._follow(bench, disks, mark)

    @needs(source=[SOURCE, TRACKING])
    def test_a_lost_mark_is_told(self, rig: ConformanceRig, bench: SourceBench) -> None:
        mark = bench.mark()
        rig.change(rig.machine_id)
        rig.lose_tracking(rig.machine_id)
        with bench.open(mark) as view:
            for disk in _tracked(bench.of(view)).values():
                assert disk.tracking is Tracking.LOST
                assert disk.reason, "the view gives no reason"

    @needs(source=[SOURCE, TRACKING])
    def test_an_unknown_mark_is_lost(self, bench: SourceBench) -> None:
        bench.mark()
        with bench.open(Mark("conformance-unknown-mark")) as view:
            assert {disk.tracking for disk in _tracked(bench.of(view)).values()} == {Tracking.LOST}

    @needs(source=[SOURCE, TRACKING])
    def test_tracking_starts_again_after_a_loss(self, rig: ConformanceRig, bench: SourceBench) -> None:
        bench.mark()
        rig.lose_tracking(rig.machine_id)
        disks, mark = self._start(bench)
        rig.change(rig.machine_id)
        self._follow(bench, disks, mark)

    @needs(source=[SOURCE, TRACKING])
    def test_a_kept_mark_is_kept(self, rig: ConformanceRig, bench: SourceBench) -> None:
        bench.mark()
        disks, mark = self._start(bench)
        rig.change(rig.machine_id)
        for _ in range(2):
            bench.source.keep_marks(rig.machine_id, [mark])
        self._follow(bench, disks, mark)

    @needs(source=[SOURCE, TRACKING])
    def test_a_released_mark_is_never_guessed(self, rig: ConformanceRig, bench: SourceBench) -> None:
        disks, old = self._start(bench)
        rig.change(rig.machine_id)
        new = bench.mark()
        bench.source.keep_marks(rig.machine_id, [new])
        rig.change(rig.machine_id)
        with bench.open(old) as view:
            lost = {disk.tracking for disk in _tracked(bench.of(view)).values()} == {Tracking.LOST}
        if not lost:  # a platform that numbers all changes still knows them
            self._follow(bench, disks, old)

    @needs(source=[SOURCE, TRACKING])
    def test_a_left_over_view_does_not_disturb_the_next(self, rig: ConformanceRig, bench: SourceBench) -> None:
        view = bench.open()
        disks = {disk_id: bench.copy(disk) for disk_id, disk in bench.of(view).disks.items()}
        bench.settle(view, disks)
        mark = bench.of(view).mark
        assert mark is not None
        bench.forget(view)
        rig.restart()
        bench.source.keep_marks(rig.machine_id, [mark])
        rig.change(rig.machine_id)
        self._follow(bench, disks, mark)

    @needs(source=[SOURCE, TRACKING])
    def test_with_nothing_to_keep_nothing_is_left(self, rig: ConformanceRig, bench: SourceBench) -> None:
        before = rig.leftovers(rig.machine_id)
        view = bench.open(bench.mark())
        assert rig.leftovers(rig.machine_id) != before, "rig.leftovers must list marks and views"
        bench.forget(view)
        rig.restart()
        bench.source.keep_marks(rig.machine_id, [])
        assert rig.leftovers(rig.machine_id) == []

    # -- disks that come and go

    @needs(source=[SOURCE, TRACKING])
    def test_an_added_disk_is_new(self, rig: ConformanceRig, bench: SourceBench) -> None:
        mark = bench.mark()
        disk_id = rig.add_disk(rig.machine_id)
        try:
            with bench.open(mark) as view:
                machine = bench.of(view)
                assert machine.disks[disk_id].tracking in (Tracking.NEW, Tracking.NONE)
                others = {other: disk for other, disk in _tracked(machine).items() if other != disk_id}
                assert {disk.tracking for disk in others.values()} == {Tracking.CHANGED}
        finally:
            rig.remove_disk(rig.machine_id, disk_id)

    @needs(source=[SOURCE, TRACKING])
    def test_a_replaced_disk_is_new(self, rig: ConformanceRig, bench: SourceBench) -> None:
        disk_id = rig.add_disk(rig.machine_id)
        try:
            mark = bench.mark()
            rig.replace_disk(rig.machine_id, disk_id)
            with bench.open(mark) as view:
                assert bench.of(view).disks[disk_id].tracking in (Tracking.NEW, Tracking.LOST, Tracking.NONE)
        finally:
            rig.remove_disk(rig.machine_id, disk_id)

    @needs(source=[SOURCE, TRACKING])
    def test_a_grown_disk_has_its_new_size(self, rig: ConformanceRig, bench: SourceBench) -> None:
        disk_id = rig.add_disk(rig.machine_id)
        try:
            disks, mark = self._start(bench)
            old = disks[disk_id].size
            rig.grow_disk(rig.machine_id, disk_id)
            rig.change(rig.machine_id)
            with bench.open(mark) as view, bench.unmoved(view):
                disk = bench.of(view).disks[disk_id]
                assert disk.disk.size > old
                assert is_gapless(disk.allocated(), disk.disk.size)
                if disk.tracking is Tracking.CHANGED:  # else it is compared, which is right as well
                    disks[disk_id].resize(disk.disk.size)
                    disks[disk_id].update(disk, disk.changed())
                    bench.settle(view, disks)
                    assert differences(disks[disk_id].fingerprint(), fingerprint(disk)) == []
        finally:
            rig.remove_disk(rig.machine_id, disk_id)

    @needs(source=[SOURCE, TRACKING])
    def test_a_removed_disk_is_gone(self, rig: ConformanceRig, bench: SourceBench) -> None:
        disk_id = rig.add_disk(rig.machine_id)
        mark = bench.mark()
        rig.remove_disk(rig.machine_id, disk_id)
        with bench.open(mark) as view:
            assert disk_id not in bench.of(view).disks
            assert disk_id not in {disk.id for disk in bench.of(view).description.machine.disks}
            assert {disk.tracking for disk in _tracked(bench.of(view)).values()} == {Tracking.CHANGED}
