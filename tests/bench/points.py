"""Thousands of recovery points: the cost of a cycle, of deleting points and of a boot as a replica grows.

python -m tests.bench.points growth|shapes|boot [KIND...]    needs root; prints JSON, times in seconds

`growth`: one replica from 1 to 1000 points. `shapes`: sizes and fragmentation of the disk at few points.
`boot`: tests of the oldest, middle and newest of 500 points against `virsh start` of the same guest, in the lab.
All work goes through the driver's target role; the first two need no guest.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs

from asr_driver_libvirt.settings import SiteSettings
from asr_driver_libvirt.site import LibvirtSite
from asr_driver_libvirt.xml.description import DOMAIN_XML, PLATFORM
from asr_driver_libvirt.xml.domain import machine_of, parse_domain
from asrcore.driver import CycleSpec, Replica, ReplicaSpec, SealSpec, TestSpec
from asrcore.model.extent import Extent
from asrcore.model.machine import Artifact, Description, Disk, Firmware, Machine, PowerState
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.units import GiB, KiB, MiB
from tests.lab import Kind, Lab, mounted

__all__ = ["KINDS", "boot", "growth", "shapes"]

KINDS = {"reflink": "xfs", "chain": "ext4"}
"""Replica kinds and the file system of each."""
COUNTS = (1, 10, 100, 500, 1000)
SIZES = (1 * GiB, 4 * GiB, 16 * GiB)
EXTENTS = (0, 2_000, 20_000)
ROUNDS = 5
_WRITE = 4 * KiB
_DELTA = 8  # writes of _WRITE bytes in a cycle
_LAB_DIRS = {"reflink": "/srv/xfs", "chain": "/srv/ext4"}
_GUEST = "bench"

Times = dict[str, list[float]]


# -- a replica without a guest -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _mounted(file_system: str, size: int = 24 * GiB) -> Iterator[Path]:
    """A separate file system on a sparse file."""
    with tempfile.TemporaryDirectory(prefix="asr-bench-") as name, mounted(Path(name), file_system, size) as mount:
        yield mount


@attrs.define
class _Made:
    """A replica under measurement. Seconds of each operation are recorded in `times`."""

    replica: Replica
    disks: dict[str, int]
    description: Description
    cycles: int = 0
    times: Times = attrs.field(factory=lambda: defaultdict(list))

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[what].append(time.perf_counter() - start)

    def cycle(self, writes: Sequence[tuple[str, int, bytes]], *, keep: bool) -> None:
        """One cycle, timed in its parts."""
        self.cycles += 1
        with self.timed("info"):
            info = self.replica.info()
        spec = CycleSpec(f"c{self.cycles}", 1, info.head, self.disks)
        with self.timed("open"):
            writer = self.replica.open_cycle(spec)
        with writer:
            with self.timed("write_flush"):
                for disk_id, offset, data in writes:
                    writer.write(disk_id, offset, memoryview(data))
                writer.flush()
            seal = SealSpec(f"p{self.cycles}", float(self.cycles), Consistency.CRASH, keep, self.description)
            with self.timed("seal_kept" if keep else "seal"):
                writer.seal(seal)
            with self.timed("apply"):  # the only work left at a close
                writer.close()
        if keep:  # as the engine does: see Replica.drop_points
            with self.timed("tidy"):
                self.replica.drop_points([], 1)

    def small(self, *, keep: bool) -> None:
        """A cycle of a few small writes at random places."""
        choice = random.Random(self.cycles)
        disk_id, size = next(iter(self.disks.items()))
        places = [choice.randrange(size // _WRITE) * _WRITE for _ in range(_DELTA)]
        self.cycle([(disk_id, place, choice.randbytes(_WRITE)) for place in places], keep=keep)

    def drop(self, ids: Sequence[str]) -> None:
        with self.timed(f"drop_{len(ids)}"):
            self.replica.drop_points(ids, 1)

    @property
    def kept(self) -> list[str]:
        return [point.id for point in self.replica.info().points if point.kept]

    def medians(self) -> dict[str, float]:
        """Medians of what was recorded since the last call."""
        result = {what: round(statistics.median(values), 4) for what, values in sorted(self.times.items())}
        self.times.clear()
        return result


def _make(directory: Path, size: int, extents: int, replica_id: str = "r1") -> _Made:
    """A replica with one point, of a disk with that many separate extents of data."""
    site = LibvirtSite("bench", SiteSettings.parse({"uri": "qemu:///system", "replica_dir": str(directory)}))
    described = Description(Machine("5f1c", "web", 1, 64 * MiB, Firmware.BIOS, (Disk("vda", size),)), PLATFORM)
    replica = site.target.create_replica(ReplicaSpec(replica_id, "web", 1, described), Watch())
    made = _Made(replica, {"vda": size}, described)
    step = size // max(extents, 1) // _WRITE * _WRITE
    data = random.Random(1).randbytes(_WRITE)
    made.cycle([("vda", number * step, data) for number in range(extents)], keep=True)
    made.times.clear()
    return made


def _rounds(made: _Made) -> dict[str, float]:
    """Medians of the operations on a replica in its present state; it has a few more points afterwards."""
    for _ in range(ROUNDS):
        made.small(keep=False)
        made.small(keep=True)
    with made.timed("allocated"):
        made.replica.allocated("vda")
    with made.timed("digests_64MiB"):
        made.replica.digests("vda", Extent(0, 64 * MiB))
    for place in (0.0, 0.3, 0.5, 0.7, 0.99):
        kept = made.kept
        made.drop([kept[min(int(place * len(kept)), len(kept) - 2)]])
    times = {what: (min(values), max(values)) for what, values in made.times.items() if what in ("drop_1", "seal_kept")}
    _say({what: [round(value, 4) for value in pair] for what, pair in times.items()})
    return made.medians()


def growth(kind: str, counts: Sequence[int] = COUNTS, size: int = 4 * GiB, extents: int = 2_000) -> dict[str, object]:
    """Medians of each operation at each number of points, and of dropping 100 at the end."""
    result: dict[str, object] = {"kind": kind, "size": size, "extents": extents}
    with _mounted(KINDS[kind]) as directory:
        made = _make(directory, size, extents)
        for count in counts:
            before = -1
            while len(made.kept) < count and len(made.kept) > before:  # not growing: this kind's limit is reached
                before = len(made.kept)
                made.small(keep=True)
            tidying = made.times["tidy"] or [0.0]
            tidied = {"tidy_mean": round(statistics.mean(tidying), 4), "tidy_max": round(max(tidying), 4)}
            made.times.clear()
            have = len(made.kept)
            result[str(have)] = {**_rounds(made), **tidied}
            _say(kind, have, result[str(have)])
            if have < count:
                break
        for _ in range(2):
            if len(made.kept) > 102:
                made.drop(made.kept[:100])
            if len(made.kept) > 202:
                made.drop(made.kept[20:-20:2][:100])
        result["drops"] = dict(made.times)
        result["left"] = len(made.kept)
        used = sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
        result["bytes_used"] = used
        _say(kind, result["drops"], used)
    return result


def shapes(kind: str, sizes: Sequence[int] = SIZES, extents: Sequence[int] = EXTENTS) -> dict[str, object]:
    """Medians of each operation by size of the disk and by its fragmentation, at ten points."""
    result: dict[str, object] = {"kind": kind}
    for size in sizes:
        for count in extents:
            with _mounted(KINDS[kind]) as directory:
                made = _make(directory, size, count)
                for _ in range(9):
                    made.small(keep=True)
                made.times.clear()
                name = f"{size // GiB} GiB, {count} extents"
                result[name] = _rounds(made)
                _say(kind, name, result[name])
    return result


# -- boots -------------------------------------------------------------------------------------------------------


def _boot_description(work: Path) -> Description:
    xml = (work / "domain.xml").read_bytes()
    model = parse_domain(xml)
    sizes = {disk.id: (work / f"{disk.id}.raw").stat().st_size for disk in model.hard_disks}
    return Description(machine_of(model, sizes, PowerState.OFF), PLATFORM, (Artifact(DOMAIN_XML, xml),))


def _inside_build(site: LibvirtSite, work: Path, points: int, extents: int) -> None:
    """A replica of the guest in `work` with this many points, all with the guest's content."""
    description = _boot_description(work)
    disks = {disk.id: disk.size for disk in description.machine.disks}
    replica = site.target.create_replica(ReplicaSpec("r1", _GUEST, 1, description), Watch())
    made = _Made(replica, disks, description)
    content = {disk_id: (work / f"{disk_id}.raw").read_bytes() for disk_id in disks}
    first = []
    for disk_id, data in content.items():
        for offset in range(0, len(data), MiB):
            piece = data[offset : offset + MiB]
            if any(piece):
                first.append((disk_id, offset, piece))
    made.cycle(first, keep=True)
    choice = random.Random(3)

    def again(number: int, disk_id: str) -> list[tuple[str, int, bytes]]:
        """The same content again in small pieces: the structure changes, the content does not."""
        blocks = disks[disk_id] // _WRITE
        places = [choice.randrange(blocks) * _WRITE for _ in range(number)]
        return [(disk_id, place, content[disk_id][place : place + _WRITE]) for place in places]

    while len(made.kept) < points:
        made.cycle([write for disk_id in disks for write in again(4, disk_id)], keep=True)
    if extents:
        made.cycle(again(extents, max(disks, key=lambda disk_id: disks[disk_id])), keep=True)
    made.cycle(again(1, next(iter(disks))), keep=False)


def _first_bytes(console: Path, since: int, limit: float = 60.0) -> float:
    """When the guest's kernel first wrote to its console."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        with contextlib.suppress(FileNotFoundError):
            if console.stat().st_size > since:
                return time.perf_counter()
        time.sleep(0.002)
    raise TimeoutError(str(console))


def _inside_boot(site: LibvirtSite, rounds: int) -> dict[str, object]:
    """Interleaved: `virsh start` of the guest, then tests of points."""
    replica = site.target.replica("r1")
    ids = [point.id for point in replica.info().points]
    chosen = {"oldest": ids[0], "middle": ids[len(ids) // 2], "newest_kept": ids[-2], "newest": ids[-1]}
    times: Times = defaultdict(list)
    own = Path(f"/srv/console/{_GUEST}.log")
    for number in range(rounds):
        own.unlink(missing_ok=True)
        start = time.perf_counter()
        subprocess.run(["virsh", "start", _GUEST], check=True, capture_output=True, timeout=60)
        times["virsh_start_returns"].append(time.perf_counter() - start)
        times["virsh_start"].append(_first_bytes(own, 0) - start)
        subprocess.run(["virsh", "destroy", _GUEST], check=True, capture_output=True, timeout=60)
        for name, point_id in chosen.items():
            test_id = f"t{number}-{name.replace('_', '-')}"
            console = Path(f"{own}.asr-test-{test_id}")
            start = time.perf_counter()
            site.failover.start_test(TestSpec(test_id, "r1", point_id, f"bench-{name}"), Watch())
            times[f"{name}_returns"].append(time.perf_counter() - start)
            times[name].append(_first_bytes(console, 0) - start)
            start = time.perf_counter()
            site.failover.stop_test("r1", test_id)
            times[f"{name}_stop"].append(time.perf_counter() - start)
    plain = times["virsh_start"]
    result: dict[str, object] = {"points": len(ids)}
    for name in chosen:
        extra = [test - start for test, start in zip(times[name], plain, strict=True)]
        result[f"{name}_extra"] = round(statistics.median(extra), 3)
    for name, values in times.items():
        result[name] = round(statistics.median(values), 3)
    return result


def _inside(replica_dir: str, work: str, points: str, extents: str, rounds: str) -> None:
    settings = SiteSettings.parse({"uri": "qemu:///system", "replica_dir": replica_dir})
    with LibvirtSite("bench", settings) as site:
        _inside_build(site, Path(work), int(points), int(extents))
        print(json.dumps(_inside_boot(site, int(rounds))))


def boot(
    kind: str, points: int = 500, extents: int = 0, rounds: int = ROUNDS, replica_dir: str = ""
) -> dict[str, object]:
    """Seconds from the command to the first output of the guest's kernel, for tests of points and `virsh start`.

    `..._extra` is the median of the differences. `extents`: random 4 KiB rewrites of the largest disk.
    """
    with Lab(f"bench-{kind}") as lab, tempfile.TemporaryDirectory(prefix="asr-bench-") as name:
        work = Path(name)
        lab.define_guest("b", Kind.BIOS_DIRECT, _GUEST, rate=20)
        xml = lab.run_in("b", ["virsh", "dumpxml", "--inactive", _GUEST]).stdout
        # The kernel prints immediately, so that its start can be seen.
        xml = xml.replace("quiet loglevel=3", "earlyprintk=serial,ttyS0,115200")
        lab.run_in("b", ["virsh", "define", "/dev/stdin"], text=xml)
        (work / "domain.xml").write_text(xml)
        for disk in parse_domain(xml).hard_disks:
            source, copy = lab.host_path("b", disk.path), work / f"{disk.id}.raw"
            command = ["qemu-img", "convert", "-f", disk.format, "-O", "raw", str(source), str(copy)]
            subprocess.run(command, check=True, timeout=60)
        inside: list[str | Path] = [
            sys.executable,
            "-m",
            "tests.bench.points",
            "inside",
            replica_dir or _LAB_DIRS[kind],
            work,
        ]
        done = lab.run_in("b", [*inside, str(points), str(extents), str(rounds)], check=False, timeout=1800)
        if done.returncode:
            raise RuntimeError(done.stderr)
    result: dict[str, object] = {"kind": kind, **json.loads(done.stdout)}
    return result


def _say(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def main() -> None:
    """See the module."""
    what, *arguments = sys.argv[1:]
    if what == "inside":
        _inside(*arguments)
        return
    work: dict[str, Callable[[str], dict[str, object]]] = {"growth": growth, "shapes": shapes, "boot": boot}
    options: dict[str, int] = {}
    for word in [word for word in arguments if "=" in word]:
        name, _, value = word.partition("=")
        options[name] = int(value)
    kinds = [word for word in arguments if "=" not in word]
    if os.geteuid() != 0:
        sys.exit("must be run as root: it mounts file systems and starts guests")
    print(json.dumps([work[what](kind, **options) for kind in kinds or KINDS], indent=1))


if __name__ == "__main__":
    main()
