"""Parts of the mobility service, tested with unittest, so that the tests also run on an old Python."""

from __future__ import annotations

import mmap
import os
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from typing import Any

from asr_mobility import bpf, btf, channel, disks, freeze, service, tracker

MIB = 1 << 20
FORMAT = """\
name: block_rq_complete
ID: 1234
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:dev_t dev;\toffset:8;\tsize:4;\tsigned:0;
\tfield:sector_t sector;\toffset:16;\tsize:8;\tsigned:0;
\tfield:unsigned int nr_sector;\toffset:24;\tsize:4;\tsigned:0;
\tfield:char rwbs[8];\toffset:36;\tsize:8;\tsigned:0;
"""
MOUNTS = """\
25 1 259:2 / / rw,noatime shared:1 - ext4 /dev/root rw
26 25 0:5 / /dev rw shared:2 - devtmpfs udev rw
40 25 7:999 / /srv/with\\040space rw - ext4 /dev/loop999 rw
41 25 7:998 / /srv/with\\040space/deeper ro - xfs /dev/loop998 ro
"""


class TracePoints(unittest.TestCase):
    def test_offsets_are_those_of_the_kernel(self) -> None:
        point = bpf.TracePoint(FORMAT)
        self.assertEqual((point.id, point.offsets["sector"], point.offsets["rwbs"]), (1234, 16, 36))

    def test_a_trace_point_without_a_field_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "nr_sector"):
            bpf.TracePoint(FORMAT.replace("nr_sector", "something"))


class KernelTypes(unittest.TestCase):
    """A structure `pair` of two members behind an integer, and a type definition `other` of it."""

    STRINGS = b"\0pair\0first\0second\0other\0"
    TYPES = struct.pack("<IIII", 0, 1 << 24, 4, 32)
    TYPES += struct.pack("<III", 1, 4 << 24 | 2, 8) + struct.pack("<IIIIII", 6, 1, 0, 12, 1, 32)
    TYPES += struct.pack("<III", 19, 8 << 24, 2)
    CONTENT = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(TYPES), len(TYPES), len(STRINGS)) + TYPES + STRINGS

    def test_members_and_numbers_are_found(self) -> None:
        types = btf.Types(self.CONTENT, {"pair", "other", "absent"})
        self.assertEqual((types.structs, types.typedefs), ({"pair": {"first": 0, "second": 4}}, {"other": 3}))

    def test_anything_else_is_refused(self) -> None:
        for content in (b"", b"\0" * 64, self.CONTENT[:60], self.CONTENT[:20]):
            with self.assertRaises(ValueError):
                btf.Types(content, {"pair", "other"})

    def test_a_kernel_without_these_fields_is_not_used(self) -> None:
        with self.assertRaises(KeyError):
            bpf.Request(btf.Types(self.CONTENT, {"pair"}))


class Mounts(unittest.TestCase):
    def test_deepest_first_and_only_those_on_the_disks(self) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".mounts") as table:
            table.write(MOUNTS)
            table.flush()
            found = freeze.mounts_on(["loop999", "loop998"], table.name)
        self.assertEqual([mount.path for mount in found], ["/srv/with space/deeper", "/srv/with space"])
        self.assertEqual([mount.read_only for mount in found], [True, False])


class Ranges(unittest.TestCase):
    def test_too_many_are_joined_and_cover_all(self) -> None:
        runs = [(number * 3, 1) for number in range(120_000)]
        reported = tracker.joined(iter(runs))
        self.assertLessEqual(len(reported), 50_000)
        covered = [False] * 400_000
        for first, count in reported:
            for granule in range(first, first + count):
                self.assertFalse(covered[granule], "twice")
                covered[granule] = True
        self.assertTrue(all(covered[first] for first, _ in runs))

    def test_few_are_told_as_they_are(self) -> None:
        self.assertEqual(tracker.joined([(1, 2), (3, 4), (9, 1)]), [(1, 6), (9, 1)])

    def test_no_disk_takes_more_memory_than_128_mib(self) -> None:
        for terabytes in (0.01, 0.06, 0.5, 1, 2, 4, 5, 16, 64, 1000):
            size = int(terabytes * (1 << 40))
            self.assertLess(tracker.map_bytes(size), 129 * MIB, terabytes)
        self.assertEqual(
            [tracker.granule_shift(size << 30) for size in (64, 65, 1024, 1025, 4096, 4097)], [12, 14, 14, 16, 16, 18]
        )


def _descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def _children() -> set[str]:
    """Including those that have ended without being reaped."""
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@unittest.skipUnless(os.geteuid() == 0, "needs root: it locks memory")
class Freezes(unittest.TestCase):
    """A freeze without any file system."""

    def setUp(self) -> None:
        self.place = tempfile.TemporaryDirectory()
        self.addCleanup(self.place.cleanup)
        self.mounts = [freeze.Mount(self.place.name, "ext4", "none", True)]
        self.before, self.children = _descriptors(), _children()

    def nothing_stays(self) -> None:
        self.assertEqual(_descriptors(), self.before, "descriptors")
        locked = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmLck")]
        self.assertEqual(locked[0].split()[1], "0", "memory is locked")
        self.assertEqual(_children(), self.children, "children")

    def change(self, name: str, value: object) -> None:
        self.addCleanup(setattr, freeze, name, getattr(freeze, name))
        setattr(freeze, name, value)

    def test_one_that_holds(self) -> None:
        with freeze.Freeze(self.mounts, 10) as held:
            self.assertGreater(held.left(), 5)
        self.nothing_stays()

    def test_a_dead_man_that_does_not_start(self) -> None:
        self.change("_leave_control_group", lambda: os._exit(3))
        with self.assertRaisesRegex(freeze.FreezeError, "did not start"), freeze.Freeze(self.mounts, 10):
            pass
        self.nothing_stays()

    def test_a_dead_man_that_hangs_at_its_start(self) -> None:
        self.change("_leave_control_group", lambda: time.sleep(60))
        self.change("_START_SECONDS", 0.5)
        begun = time.monotonic()
        with self.assertRaisesRegex(freeze.FreezeError, "did not start"), freeze.Freeze(self.mounts, 10):
            pass
        self.assertLess(time.monotonic() - begun, 10)
        self.nothing_stays()

    def test_a_mark_that_cannot_be_made(self) -> None:
        self.change("_MARK", self.place.name + "/none/mark")
        with self.assertRaisesRegex(freeze.FreezeError, "could not start"), freeze.Freeze(self.mounts, 10):
            pass
        self.nothing_stays()

    def test_a_file_system_that_is_gone(self) -> None:
        gone = freeze.Mount(self.place.name + "/gone", "ext4", "none", True)
        with self.assertRaises(freeze.FreezeError), freeze.Freeze([*self.mounts, gone], 10):
            pass
        self.nothing_stays()

    def test_what_is_held_is_limited_for_all_disks_together(self) -> None:
        served = service.Service(Path(self.place.name), capture_memory=4 * MIB)
        image = Path(self.place.name, "disk.img")
        image.write_bytes(bytes(3 * MIB))
        item: Any = _Item(3 * MIB)
        held = service._Held()
        reader = disks.Reader(str(image), 3 * MIB)
        self.addCleanup(reader.close)
        with freeze.Freeze([], 60) as now:
            served._read_runs(held, "one", item, [(0, 768)], reader, now)
            with self.assertRaisesRegex(freeze.FreezeError, "4 MiB"):
                served._read_runs(held, "two", item, [(0, 768)], reader, now)
        self.assertLessEqual(sum(len(data) for pieces in held.pieces.values() for _, data in pieces), 4 * MIB)


class _Item:
    def __init__(self, size: int) -> None:
        self.disk = self
        self.size = size
        self.tracker = self
        self.shift = 12


class Budgets(unittest.TestCase):
    def test_what_is_taken_takes_its_time(self) -> None:
        budget = service.Budget(10 * MIB)
        begun = time.monotonic()
        for _ in range(10):
            budget.take(MIB)
        self.assertGreaterEqual(time.monotonic() - begun, 0.4)


class Channels(unittest.TestCase):
    def pair(self, serve: Any) -> tuple[channel.Channel, channel.Channel]:
        left, right = socket.socketpair()
        made: list[channel.Channel] = []
        thread = threading.Thread(
            target=lambda: made.append(channel.Channel(left, dialled=True, me={"name": "box"}, serve=serve))
        )
        thread.start()
        asks = channel.Channel(right, dialled=False, me={})
        thread.join()
        for end in (asks, made[0]):
            self.addCleanup(end._threads[0].join, 10)  # it closes the socket; other tests count descriptors
            self.addCleanup(end.close)
        return asks, made[0]

    def test_who_was_dialled_asks(self) -> None:
        content = os.urandom(2 * MIB)
        asks, _ = self.pair(lambda call, arguments: ({"call": call, **arguments}, content))
        self.assertEqual(asks.peer["name"], "box")
        head, body = asks.call("read", {"offset": 7}, timeout=30)
        self.assertEqual((head, bytes(body)), ({"call": "read", "offset": 7}, content))

    def test_a_process_may_have_many_descriptors(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            self.addCleanup(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        content = os.urandom(2 * MIB)  # more than a socket holds: both ends have to wait
        asks, serves = self.pair(lambda call, arguments: ({}, content))
        self.assertGreater(min(asks._socket.fileno(), serves._socket.fileno()), 1023)
        self.assertEqual(bytes(asks.call("read", {}, timeout=30)[1]), content)

    def test_an_error_is_told_and_the_connection_goes_on(self) -> None:
        def serve(call: str, arguments: Any) -> Any:
            if call == "bad":
                raise channel.CallFailed("view-lost", {"machine": "box", "detail": "why"})
            if call == "defect":
                raise ZeroDivisionError("oops")
            return {}, b""

        asks, _ = self.pair(serve)
        with self.assertRaises(channel.CallFailed) as reported:
            asks.call("bad", {}, timeout=30)
        self.assertEqual(reported.exception.code, "view-lost")
        with self.assertRaises(channel.CallFailed) as reported:
            asks.call("defect", {}, timeout=30)
        self.assertEqual(reported.exception.code, "driver-failed")
        self.assertEqual(asks.call("good", {}, timeout=30)[0], {})

    def test_several_ask_at_once(self) -> None:
        asks, _ = self.pair(lambda call, arguments: ({}, bytes(arguments["length"])))
        seen: list[int] = []

        def ask(length: int) -> None:
            seen.append(len(asks.call("read", {"length": length}, timeout=60)[1]))

        threads = [threading.Thread(target=ask, args=(1000 * number,)) for number in range(1, 30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(seen), [1000 * number for number in range(1, 30)])

    def test_who_waits_learns_of_the_end(self) -> None:
        go = threading.Event()
        self.addCleanup(go.set)
        asks, serves = self.pair(lambda call, arguments: (go.wait(30), ({}, b""))[1])
        threading.Timer(0.2, lambda: serves.end("killed")).start()
        with self.assertRaises(channel.ChannelClosed):
            asks.call("wait", {}, timeout=30)

    def test_a_peer_that_does_not_answer_is_given_up(self) -> None:
        go = threading.Event()
        self.addCleanup(go.set)
        asks, _ = self.pair(lambda call, arguments: (go.wait(30), ({}, b""))[1])
        with self.assertRaises(TimeoutError):
            asks.call("wait", {}, timeout=0.3)


@unittest.skipUnless(os.geteuid() == 0, "needs root: loop devices, bpf")
class Tracking(unittest.TestCase):
    """On a loop device, with the kernel's own trace point."""

    def setUp(self) -> None:
        work = tempfile.TemporaryDirectory()
        self.addCleanup(work.cleanup)
        self.image = Path(work.name, "disk.img")
        self.image.write_bytes(b"")
        os.truncate(self.image, 32 * MIB)
        made = subprocess.run(
            ["losetup", "--find", "--show", str(self.image)], capture_output=True, text=True, check=True
        )
        self.loop = made.stdout.strip()
        self.addCleanup(subprocess.run, ["losetup", "-d", self.loop], check=False)
        self.pins = f"/sys/fs/bpf/asr-unit-{os.getpid()}"
        former, tracker.PIN_ROOT = tracker.PIN_ROOT, self.pins
        self.addCleanup(setattr, tracker, "PIN_ROOT", former)
        self.addCleanup(tracker.remove_pins)

    def open(self, identity: bytes = b"0123456789abcdef") -> tracker.Tracker:
        made = tracker.Tracker(self.loop, self.image.stat().st_size, identity)
        self.addCleanup(made.close)
        return made

    def write(self, granule: int, count: int = 1) -> None:
        fd = os.open(self.loop, os.O_WRONLY)
        os.pwrite(fd, os.urandom(count << 12), granule << 12)
        os.fsync(fd)
        os.close(fd)

    def test_what_is_written_is_noted_once(self) -> None:
        tracked = self.open()
        self.assertTrue(tracked.fresh)
        self.write(5, 3)
        self.write(100)
        tracked.begin_turn()
        self.assertEqual(tracked.take(), [(5, 3), (100, 1)])
        self.assertEqual(tracked.take(), [])

    def test_a_kernel_that_does_not_describe_its_types_notes_by_records(self) -> None:
        known = bpf._requests[:]
        bpf._requests[:] = [None]
        self.addCleanup(bpf._requests.__setitem__, slice(None), known)
        tracked = self.open()
        self.write(5, 3)
        subprocess.run(["blkdiscard", "-o", str(MIB), "-l", str(MIB), self.loop], check=True)
        tracked.begin_turn()
        self.assertEqual(tracked.take(), [(5, 3), (256, 256)])
        self.assertTrue(tracked.check())

    def test_what_the_program_did_not_see_is_found(self) -> None:
        """The program is detached for one write, and attached again."""
        tracked = self.open()
        self.write(1)
        tracked.begin_turn()
        tracked.take()
        generation, mark = tracked.generation, tracked.last
        self.assertTrue(tracked.knows(generation, mark))
        Path(tracked._pins[0]).unlink()
        time.sleep(2)  # the kernel detaches it a moment later
        self.write(2)
        array = bpf.get_pinned(tracked._pins[1])
        self.addCleanup(os.close, tracked._attach(array)[0])
        os.close(array)
        self.write(3)
        self.assertFalse(tracked.knows(generation, mark))
        self.assertEqual(tracked.reset, "8 sectors were written and not noted")
        self.assertTrue(tracked.knows(tracked.generation, tracked.last), "it begins again from there")

    def test_a_disk_without_statistics_is_tracked_and_not_checked(self) -> None:
        path = Path("/sys/class/block", Path(self.loop).name, "queue/iostats")
        former = path.read_text()
        self.addCleanup(path.write_text, former)
        path.write_text("0")
        tracked = self.open()
        self.write(4)
        self.assertTrue(tracked.check())
        path.write_text(former)
        self.write(5)
        self.assertTrue(tracked.check(), "from here on it is checked")
        generation = tracked.generation
        Path(tracked._pins[0]).unlink()
        for _ in range(100):  # the kernel detaches it a moment later
            self.write(6)
            if not tracked.knows(generation, tracked.last):
                return
        self.fail("writes that are not noted are not noticed")

    def test_reads_are_not_noted(self) -> None:
        tracked = self.open()
        reader = disks.Reader(self.loop, 32 * MIB)
        reader.read(0, MIB)
        reader.close()
        self.assertEqual(tracked.pending(), 0)

    def test_it_goes_on_without_the_service(self) -> None:
        first = self.open()
        generation = first.generation
        first.close()
        self.write(7)
        again = self.open()
        self.assertFalse(again.fresh)
        self.assertTrue(again.knows(generation, 0))
        again.begin_turn()
        self.assertEqual(again.take(), [(7, 1)])

    def test_changes_are_told_again_until_they_are_not_needed(self) -> None:
        tracked = self.open()
        marks = []
        for granule in (1, 2, 3):
            self.write(granule)
            marks.append(tracked.begin_turn())
            tracked.take()
        self.assertEqual(tracked.changed_since(0), [(1, 3)])
        self.assertEqual(tracked.changed_since(marks[0]), [(2, 2)])
        self.assertEqual(tracked.changed_since(marks[2]), [])
        tracked.keep(marks[1])
        self.assertTrue(tracked.knows(tracked.generation, marks[1]))
        self.assertFalse(tracked.knows(tracked.generation, marks[0]))
        self.assertEqual(tracked.changed_since(marks[1]), [(3, 1)])

    def test_many_turns_without_a_point_lose_nothing(self) -> None:
        tracked = self.open()
        self.write(1)
        tracked.begin_turn()
        tracked.take()
        for _ in range(600):  # more than fit in a byte
            tracked.begin_turn()
            tracked.take()
        self.write(2)
        tracked.begin_turn()
        tracked.take()
        self.assertEqual(tracked.changed_since(0), [(1, 2)])
        self.assertEqual(tracked.changed_since(tracked.last - 1), [(2, 1)])

    def test_killed_at_any_moment_of_a_turn_loses_nothing(self) -> None:
        """The writes of a turn to the array are done up to one write and then stop, as with SIGKILL."""
        stop = 0
        while True:
            tracked = self.open()
            mark = tracked.last
            # More than 512 granules in one request: recorded in coarse ones only.
            subprocess.run(["blkdiscard", "-o", str(4 * MIB), "-l", str(12 * MIB), self.loop], check=True)
            self.write(7)
            tracked.begin_turn()
            array = bpf.get_pinned(tracked._pins[1])
            tracked._map.close()
            tracked._map = stopping = _Stopping(array, tracked._layout.pages * bpf.PAGE)
            os.close(array)
            stopping.left = stop
            try:
                tracked.take()
                ended = True
            except _Stopped:
                ended = False
            tracked.close()
            again = self.open()
            self.assertTrue(again.knows(again.generation, mark))
            again.begin_turn()
            again.take()
            reported = again.changed_since(mark)
            missed = {7, *range(1024, 4096)} - {first + at for first, count in reported for at in range(count)}
            self.assertFalse(missed, f"stopped at write {stop}: {len(missed)} granules are lost")
            again.close()
            if ended:
                break
            stop += 1
        self.assertGreaterEqual(stop, 6)

    def test_a_large_disk_fits_into_the_memory_that_is_allowed(self) -> None:
        """A disk of 1 TiB, all of it tracked by the kernel; the service uses little memory beyond the map."""
        os.truncate(self.image, 1 << 40)
        subprocess.run(["losetup", "-c", self.loop], check=True)
        script = _LARGE.format(pins=self.pins, loop=self.loop)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False, env=environment
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        before, after, mapped = map(int, done.stdout.split())
        self.assertEqual(mapped, tracker.map_bytes(1 << 40))
        self.assertGreater(after - before, 100 * MIB, "the map is not counted, so this proves nothing")
        self.assertLess(after - before, mapped + 24 * MIB)

    def test_another_disk_in_its_place_is_not_taken_for_it(self) -> None:
        before = self.open()
        generation = before.generation
        before.close()
        after = self.open(b"another disk....")
        self.assertTrue(after.fresh)
        self.assertFalse(after.knows(generation, 0))

    def test_large_discards_are_noted_in_full(self) -> None:
        tracked = self.open()
        self.write(0, 2048)
        tracked.begin_turn()
        tracked.take()
        subprocess.run(["blkdiscard", "-o", "0", "-l", str(20 * MIB), self.loop], check=True)
        tracked.begin_turn()
        taken = sum(count for _, count in tracked.take())
        self.assertGreaterEqual(taken, 20 * MIB >> 12)


class _Stopped(Exception):
    pass


class _Stopping(mmap.mmap):
    """An array that accepts this many writes."""

    left = 0

    def __setitem__(self, place: Any, value: Any) -> None:
        if not self.left:
            raise _Stopped
        self.left -= 1
        super().__setitem__(place, value)


# Peak memory before and after 20 000 changed places, a turn, reading the changes, and clearing them.
_LARGE = """
import os, random, re
from asr_mobility import tracker
tracker.PIN_ROOT = {pins!r}
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
tracked = tracker.Tracker({loop!r}, 1 << 40, b"0123456789abcdef")
chosen = random.Random(1)
fd = os.open({loop!r}, os.O_WRONLY)
for _ in range(20_000):
    os.pwrite(fd, b"x" * 4096, chosen.randrange(1 << 28) << 12)
os.fsync(fd)
turn = tracked.begin_turn()
taken = tracked.take()
assert 15_000 < len(taken) <= 20_000, len(taken)
assert tracked.changed_since(0) == taken
assert tracked.pending() == 0
tracked.keep(turn)
assert tracked.changed_since(0) == []
print(before, peak(), tracked._layout.pages * 4096)
"""


if __name__ == "__main__":
    unittest.main()
