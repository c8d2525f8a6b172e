"""Digests of recovery points: what is recorded is what was written, and what is not so any more is found."""

from __future__ import annotations

import errno
import json
import os
import random
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from asr_storage.qemu import img
from asr_storage.qemu.process import QemuError, QemuTimeout
from asr_storage.replica import digests, examine, writer
from asr_storage.replica import recorded as recorded_digests
from asr_storage.replica.blocks import Blocks
from asr_storage.replica.digests import UNKNOWN_DIGEST
from asr_storage.replica.replica import FileReplica
from asr_storage.replica.store import ReplicaKind, Shared
from asrcore.driver import DIGEST_SIZE, Examination, Replica, digest_of
from asrcore.errors import AsrError, DriverFailed, PointNotFound, ReplicaDamaged, StaleEpoch, TargetReadOnly
from asrcore.model.extent import Extent

from .conftest import KIB, MIB, Bench

BLOCK = 64 * KIB


def recorded(bench: Bench, disk_id: str, point_id: str) -> list[bytes]:
    """The digests that are recorded of a point's disk, block by block."""
    replica = bench.replica
    assert isinstance(replica, FileReplica)
    size = len(bench.points[point_id][disk_id])
    record = replica.home.load()
    point = record.point(point_id)
    assert point is not None
    found = bytes(replica._digests.of(record, point)[disk_id].look_up(Extent(0, size)))
    return [found[at : at + DIGEST_SIZE] for at in range(0, len(found), DIGEST_SIZE)]


def check_recorded(bench: Bench) -> int:
    """Check all digests that are recorded against the expected content; returns how many blocks have none."""
    unknown = 0
    for point_id, disks in bench.points.items():
        for disk_id, content in disks.items():
            blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
            for number, (block, digest) in enumerate(zip(blocks, recorded(bench, disk_id, point_id), strict=True)):
                unknown += digest == UNKNOWN_DIGEST
                assert digest in (UNKNOWN_DIGEST, digest_of(block)), (point_id, disk_id, number)
    return unknown


def whole(replica: Replica, point_id: str, limit: int | None = None) -> Examination:
    """Examine all of a point."""
    found = replica.examine(point_id, start=0, limit=limit)
    damage, read, proved = list(found.damage), found.read, found.proved
    while found.end is not None:
        found = replica.examine(point_id, start=found.end, limit=limit)
        damage, read, proved = damage + list(found.damage), read + found.read, proved + found.proved
    return Examination(tuple(damage), read, proved)


def full(disks: dict[str, int], seed: int) -> list[tuple[str, int, bytes]]:
    """Writes that cover the disks."""
    return [(disk_id, 0, random.Random(f"{seed}{disk_id}").randbytes(size)) for disk_id, size in disks.items()]


@pytest.fixture
def three(bench: Callable[..., Bench], replica_dir: Path) -> Bench:
    """Points p1, p2, p3; the disk's last block is short."""
    made = bench(replica_dir, {"vda": 4 * MIB + 4096})
    made.cycle(full(made.disks, 1))
    made.cycle([("vda", BLOCK, b"two" * BLOCK)])
    made.cycle([("vda", MIB, bytes(MIB)), ("vda", 3 * MIB, b"three" * 1000)])
    made.check()
    return made


def test_what_a_cycle_writes_is_recorded(three: Bench) -> None:
    assert check_recorded(three) == 1  # b"three" fills a part of a block
    for point_id in three.points:
        found = whole(three.replica, point_id, MIB)
        assert found.damage == ()
    assert check_recorded(three) == 0  # what was not known was read, and is now
    assert three.replica.examine("p2").damage == ()
    three.check()


@pytest.mark.parametrize("seed", range(2))
def test_recorded_digests_are_those_of_the_content(bench: Callable[..., Bench], replica_dir: Path, seed: int) -> None:
    chance = random.Random(seed)
    made = bench(replica_dir, {"vda": MIB + 512, "vdb": 3 * BLOCK})
    made.cycle(full(made.disks, seed))
    for _ in range(10):
        if chance.random() < 0.2:  # a disk grows
            size = made.disks["vda"] + chance.choice([512, BLOCK, BLOCK + 4096])
            made.disks["vda"] = size
            made.head["vda"] += bytes(size - len(made.head["vda"]))
        writes = []
        for _ in range(chance.randrange(1, 5)):
            disk_id = chance.choice(["vda", "vdb"])
            unit = chance.choice([512, BLOCK])
            start = chance.randrange(made.disks[disk_id] // unit) * unit
            length = min(chance.randrange(1, 4) * unit, made.disks[disk_id] - start)
            writes.append((disk_id, start, bytes(length) if chance.random() < 0.3 else chance.randbytes(length)))
        made.cycle(writes, keep=chance.random() < 0.6)
        check_recorded(made)
        if chance.random() < 0.4:
            dropped = [point_id for point_id in made.points if chance.random() < 0.4]
            made.replica.drop_points(dropped, 1)
            left = {point.id for point in made.replica.info().points}
            made.points = {point_id: disks for point_id, disks in made.points.items() if point_id in left}
            check_recorded(made)
        if chance.random() < 0.2:
            assert whole(made.replica, chance.choice(list(made.points)), 128 * KIB).damage == ()
            check_recorded(made)
    for point_id in made.points:
        assert whole(made.replica, point_id).damage == ()
    made.check()
    head = list(made.points)[-1]
    for point_id in list(made.points)[:-1]:
        made.replica.drop_points([point_id], 1)
    made.points = {head: made.points[head]}
    check_recorded(made)
    assert made.replica.home.load().digests[-1] == head  # type: ignore[attr-defined]


def test_files_of_dropped_points_are_merged(bench: Callable[..., Bench], replica_dir: Path) -> None:
    made = bench(replica_dir, {"vda": MIB})
    made.cycle(full(made.disks, 1))
    for number in range(12):
        made.cycle([("vda", number * BLOCK, bytes([number + 1]) * BLOCK)], keep=number == 5)
    made.replica.drop_points([], 1)
    assert list(made.points) == ["p1", "p7", "p13"]
    assert made.replica.home.load().digests == ("p1", "p7", "p13")  # type: ignore[attr-defined]
    assert {path.name for path in (replica_dir / "replicas/r1/digests").iterdir()} == {"p1", "p7", "p13"}
    made.replica.drop_points(["p1", "p7"], 1)
    made.points = {"p13": made.points["p13"]}
    assert check_recorded(made) == 0


def test_digests_of_an_interrupted_cycle_are_not_lost(bench: Callable[..., Bench], replica_dir: Path) -> None:
    made = bench(replica_dir, {"vda": MIB})
    for number in (1, 2):
        data = random.Random(number).randbytes(MIB)
        with made.replica.open_cycle(made.spec(f"c{number}")) as writer:
            writer.write("vda", 0, memoryview(data)[: MIB // 2])
            writer.write("vda", BLOCK, memoryview(data)[BLOCK : 2 * BLOCK])
            writer.flush()
        Shared._all.clear()
        with made.replica.open_cycle(made.spec(f"c{number}")) as writer:
            writer.write("vda", MIB // 2, memoryview(data)[MIB // 2 :])
            made.head["vda"][:] = data
            point = writer.seal(made.seal_spec(keep=True, point_id=f"p{number}"))
        made.sealed(point)
    assert check_recorded(made) == 0


def test_what_is_written_again_in_a_cycle_counts(bench: Callable[..., Bench], replica_dir: Path) -> None:
    made = bench(replica_dir, {"vda": MIB})
    made.cycle(full(made.disks, 1))
    before = bytes(made.head["vda"])
    new = random.Random(2).randbytes(4 * BLOCK)
    with made.replica.open_cycle(made.spec()) as writer:
        writer.write("vda", 0, memoryview(new))
        writer.write("vda", BLOCK, memoryview(b"x" * 512))  # a part of a block whose digest was known
        writer.same("vda", 2 * BLOCK, BLOCK)
        writer.flush()
        writer.zero("vda", 3 * BLOCK, 4096)
        writer.same("vda", 8 * BLOCK + 512, 512)  # of a block that nothing else is said of
        writer.same("vda", 0, 512)  # of one that was written
        made.head["vda"][: 4 * BLOCK] = new
        made.head["vda"][BLOCK : BLOCK + 512] = b"x" * 512
        made.head["vda"][2 * BLOCK : 3 * BLOCK] = before[2 * BLOCK : 3 * BLOCK]
        made.head["vda"][3 * BLOCK : 3 * BLOCK + 4096] = bytes(4096)
        made.head["vda"][:512] = before[:512]
        point = writer.seal(made.seal_spec(keep=True))
    made.sealed(point)
    made.check()
    assert check_recorded(made) == 3
    assert [number for number, item in enumerate(recorded(made, "vda", "p2")) if item == UNKNOWN_DIGEST] == [0, 1, 3]


def test_a_replica_without_digests_gets_them_when_its_head_is_examined(three: Bench) -> None:
    home = three.replica.home  # type: ignore[attr-defined]
    record = json.loads((home.path / "replica.json").read_text())
    del record["digests"]
    (home.path / "replica.json").write_text(json.dumps(record))
    for path in (home.path / "digests").iterdir():
        path.unlink()
    assert three.replica.from_records() is three.replica
    assert whole(three.replica, "p2").proved == 0
    assert whole(three.replica, "p3", MIB) == Examination((), 3 * MIB + 4096, 0)
    assert whole(three.replica, "p3", MIB).proved == 4 * MIB + 4096
    three.cycle([("vda", 0, b"4" * BLOCK)])
    assert whole(three.replica, "p4").proved == 4 * MIB + 4096


@pytest.mark.parametrize("harm", ["removed", "cut", "flipped"])
def test_damaged_digests_are_no_damage(three: Bench, harm: str) -> None:
    path = three.replica.home.digests("p2")  # type: ignore[attr-defined]
    if harm == "removed":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if harm == "cut" else content)
    assert check_recorded(three) > 0
    for point_id in three.points:
        assert whole(three.replica, point_id).damage == ()
    three.cycle([("vda", 0, b"4" * BLOCK)])
    three.replica.drop_points(["p1", "p2"], 1)
    three.points = {point_id: three.points[point_id] for point_id in ("p3", "p4")}
    check_recorded(three)
    three.check()


def test_a_fast_first_copy_is_not_hashed_as_a_whole(
    bench: Callable[..., Bench], replica_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FIRST_COPY_HASHED", 3 * BLOCK)
    monkeypatch.setattr(writer, "FIRST_COPY_RATE", 0)
    made = bench(replica_dir, {"vda": MIB})
    data = random.Random(1).randbytes(MIB)
    made.cycle([("vda", at, data[at : at + BLOCK]) for at in range(0, MIB, BLOCK)])
    assert check_recorded(made) == 13
    made.cycle([("vda", 0, data[:BLOCK]), ("vda", 8 * BLOCK, data[: 8 * BLOCK])])  # later cycles are
    assert [number for number, item in enumerate(recorded(made, "vda", "p2")) if item == UNKNOWN_DIGEST] == [
        3,
        4,
        5,
        6,
        7,
    ]
    assert whole(made.replica, "p1").damage == ()
    assert check_recorded(made) == 0


def test_a_resync_teaches_what_it_had_to_read(bench: Callable[..., Bench], replica_dir: Path) -> None:
    made = bench(replica_dir, {"vda": MIB})
    made.cycle(full(made.disks, 1))
    made.cycle([("vda", at + 512, b"x" * 512) for at in range(0, MIB, BLOCK)])
    assert check_recorded(made) == MIB // BLOCK
    with made.replica.open_cycle(made.spec()) as open_cycle:
        asked = made.replica.from_records().digests("vda", Extent(0, MIB))
        assert asked == made.replica.digests("vda", Extent(0, MIB))
        open_cycle.same("vda", 0, MIB)
        made.sealed(open_cycle.seal(made.seal_spec(keep=True)))
    assert check_recorded(made) == 0


def test_a_resync_teaches_nothing_that_is_known(
    bench: Callable[..., Bench], replica_dir: Path, kind: ReplicaKind
) -> None:
    made = bench(replica_dir, {"vda": MIB})
    made.cycle(full(made.disks, 1))
    made.cycle([("vda", number * BLOCK + 512, b"x" * 512) for number in (1, 5)])
    home = made.replica.home  # type: ignore[attr-defined]
    path = image_of(made, "p1") if kind is ReplicaKind.CHAIN else home.path / home.load().heads["vda"]
    flip(path, 3 * BLOCK + 7)
    with made.replica.open_cycle(made.spec()) as open_cycle:
        made.replica.from_records().digests("vda", Extent(0, MIB))
        open_cycle.same("vda", 0, MIB)
        made.sealed(open_cycle.seal(made.seal_spec(keep=True)))
    found = whole(made.replica, "p3")
    assert found.damage == (f"disk vda: {BLOCK} bytes at {3 * BLOCK} are not as they were written",)
    assert found.proved == MIB - BLOCK


def test_what_a_resync_read_is_not_recorded_with_a_later_head(
    bench: Callable[..., Bench], replica_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FIRST_COPY_HASHED", 0)
    monkeypatch.setattr(writer, "FIRST_COPY_RATE", 0)
    made = bench(replica_dir, {"vda": 4 * MIB})
    made.cycle(full(made.disks, 1))
    assert isinstance(made.replica, FileReplica)
    shared, here = made.replica.shared, made.replica
    here.from_records().digests("vda", Extent(0, 4 * MIB))  # a resync that was cancelled
    Shared._all.clear()
    made.replica = FileReplica(here.site, here.home)  # as another process that takes over
    made.cycle([("vda", 0, b"b" * BLOCK)])
    assert made.replica.shared is not shared
    made.replica = here
    made.cycle([("vda", MIB, b"c" * BLOCK)])
    assert check_recorded(made) == 64 + 63 + 62  # what the cycles wrote is known
    for point_id in made.points:
        assert whole(made.replica, point_id).damage == ()


def test_what_is_known_stays_as_it_was_recorded(three: Bench) -> None:
    replica = three.replica
    assert isinstance(replica, FileReplica)
    learned = Blocks(4 * MIB + 4096)
    learned.known(0, memoryview(b"wrong digests..." * 65))
    before = recorded(three, "vda", "p3")
    replica._digests.learn(replica.home.load(), "p3", {"vda": learned})
    after = recorded(three, "vda", "p3")
    assert [number for number, item in enumerate(before) if item != after[number]] == [before.index(UNKNOWN_DIGEST)]


def test_what_is_learned_in_parts_is_recorded_at_the_end(
    bench: Callable[..., Bench], replica_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FIRST_COPY_HASHED", 0)
    monkeypatch.setattr(writer, "FIRST_COPY_RATE", 0)
    made = bench(replica_dir, {"vda": 4 * MIB, "vdb": MIB})
    made.cycle(full(made.disks, 1))
    made.cycle(full(made.disks, 2))
    written: list[str] = []
    write = digests.write

    def noted(path: Path, disks: Mapping[str, Blocks]) -> None:
        written.append(path.name)
        write(path, disks)

    monkeypatch.setattr(digests, "write", noted)
    assert whole(made.replica, "p1", 256 * KIB).damage == ()
    assert written == ["p1"]
    assert check_recorded(made) == 0
    made.replica.home.digests("p2").unlink()  # type: ignore[attr-defined]
    made.cycle([("vda", 0, b"3" * BLOCK)])
    assert whole(made.replica, "p3", 256 * KIB).damage == ()
    written.clear()
    monkeypatch.setattr(recorded_digests, "LEARN_EVERY", MIB)
    home = made.replica.home  # type: ignore[attr-defined]
    (home.path / "replica.json").write_text(
        json.dumps({**json.loads((home.path / "replica.json").read_text()), "digests": []})
    )
    found = made.replica.examine("p3", start=0, limit=3 * MIB // 4)
    assert (found.end, written) == (3 * MIB // 4, [])
    assert made.replica.examine("p3", start=found.end, limit=MIB // 2).damage == ()
    assert written == ["p3"]
    assert recorded(made, "vda", "p3").count(UNKNOWN_DIGEST) == 64 - 20


def test_a_file_of_digests_is_checked_once_for_many_parts(three: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    whole(three.replica, "p3")

    def noted(content: bytes, before: int = 0) -> int:
        checked.append(len(content))
        return zlib.crc32(content, before)

    digests._checked.clear()
    monkeypatch.setattr(digests, "zlib", SimpleNamespace(crc32=noted))
    assert whole(three.replica, "p3", BLOCK).damage == ()
    assert len(checked) == 3  # one of each point


def test_only_the_part_that_is_read_is_dropped_from_the_cache(three: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[tuple[str, int, int]] = []

    def noted(fd: int, offset: int, length: int, _: int) -> None:
        dropped.append((Path(f"/proc/self/fd/{fd}").readlink().suffix, offset, length))

    monkeypatch.setattr(os, "posix_fadvise", noted)
    assert three.replica.examine("p3", start=0, limit=MIB).end == MIB
    assert (".raw", 0, MIB) in dropped
    dropped.clear()
    assert three.replica.examine("p3", start=MIB, limit=MIB).end == 2 * MIB
    assert dropped == [(".raw", MIB, MIB)]


# -- damage ----------------------------------------------------------------------------------------------------------


def image_of(bench: Bench, point_id: str) -> Path:
    """The image of a point's disk."""
    home = bench.replica.home  # type: ignore[attr-defined]
    return Path(home.path / home.load().point(point_id).images["vda"])


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x20]))


def test_a_byte_that_changed_is_found(three: Bench) -> None:
    path = image_of(three, "p1")
    offset = 2 * MIB + 1234  # of raw images, and the base of a chain is one
    flip(path, offset)
    found = whole(three.replica, "p1", MIB)
    assert found.damage == (f"disk vda: {BLOCK} bytes at {2 * MIB} are not as they were written",)
    assert found.proved == 4 * MIB + 4096 - BLOCK
    others = whole(three.replica, "p3").damage
    assert bool(others) is (three.replica.info().kind == "chain")  # the base is a part of all points


def test_a_changed_block_of_a_layer_is_found(three: Bench, kind: ReplicaKind) -> None:
    path = image_of(three, "p2")
    if kind is ReplicaKind.CHAIN:
        content = path.read_bytes()
        flip(path, content.index(b"twotwotwo" * 100) + 7)
    else:
        flip(path, BLOCK + 7)
    assert "disk vda" in whole(three.replica, "p2").damage[0]
    assert whole(three.replica, "p1").damage == ()


@pytest.mark.parametrize("point_id", ["p1", "p2", "p3"])
@pytest.mark.parametrize("harm", ["removed", "cut", "replaced", "grown hole"])
def test_a_quick_look_finds_damaged_files(three: Bench, point_id: str, harm: str) -> None:
    path = image_of(three, point_id)
    if harm == "removed":
        path.unlink()
    elif harm == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif harm == "grown hole":
        size = path.stat().st_size
        os.truncate(path, 0)
        os.truncate(path, size)
    else:
        path.unlink()
        path.symlink_to("/etc/hostname")
    found = three.replica.examine(point_id)
    assert found.damage, point_id
    assert whole(three.replica, point_id).damage


@pytest.mark.parametrize("call", ["info", "check"])
@pytest.mark.parametrize(
    ("problem", "exit_code", "output"),
    [
        (QemuTimeout, None, ""),
        (QemuError, None, "Cannot allocate memory"),
        (QemuError, -9, ""),
        (QemuError, 1, "Could not open 'x': Too many open files"),
    ],
)
def test_a_host_that_cannot_check_an_image_is_no_damage(
    three: Bench,
    monkeypatch: pytest.MonkeyPatch,
    kind: ReplicaKind,
    call: str,
    problem: type[QemuError],
    exit_code: int | None,
    output: str,
) -> None:
    asked = []

    def fails(*_: object, **__: object) -> None:
        asked.append(1)
        raise problem("check", command=[], exit_code=exit_code, output=output)

    monkeypatch.setattr(img, call, fails)
    assert three.replica.examine("p3").damage == ()
    assert bool(asked) is (kind is ReplicaKind.CHAIN)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ESTALE, errno.ENOMEM])
def test_a_host_that_cannot_open_a_file_is_no_damage(
    three: Bench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path, opened = image_of(three, "p2"), os.open

    def refused(name: object, *arguments: object, **named: object) -> int:
        if name == path:
            raise OSError(number, os.strerror(number), str(path))
        return opened(name, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises((DriverFailed, TargetReadOnly)):
        three.replica.examine("p2")
    monkeypatch.undo()
    assert three.replica.examine("p2").damage == ()


def test_an_image_that_cannot_be_read_is_damaged(three: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = image_of(three, "p2"), os.open

    def refused(name: object, *arguments: object, **named: object) -> int:
        if name == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(name, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refused)
    assert "Input/output error" in three.replica.examine("p2").damage[0]


def test_a_quick_look_has_an_end(three: Bench, monkeypatch: pytest.MonkeyPatch, kind: ReplicaKind) -> None:
    checked: list[tuple[str, float]] = []
    check = img.check

    def noted(path: Path, fmt: str, *, in_use: bool, timeout: float) -> object:
        checked.append((path.name, timeout))
        return check(path, fmt, in_use=in_use, timeout=timeout)

    monkeypatch.setattr(img, "check", noted)
    assert three.replica.examine("p3").damage == ()
    if kind is ReplicaKind.CHAIN:
        assert [name for name, _ in checked] == [image_of(three, "p3").name, image_of(three, "p2").name]
        assert all(seconds <= examine.CHECK_SECONDS for _, seconds in checked)
    monkeypatch.setattr(examine, "CHECKED_LAYERS", 1)
    checked.clear()
    assert three.replica.examine("p3").damage == ()
    assert [name for name, _ in checked] == [image_of(three, "p3").name][: kind is ReplicaKind.CHAIN]
    monkeypatch.setattr(examine, "CHECK_SECONDS", 0.0)
    checked.clear()
    assert three.replica.examine("p3", start=0).damage == ()
    assert checked == []


def test_a_missing_description_is_found(three: Bench) -> None:
    (three.replica.home.point("p2") / "description.json").unlink()  # type: ignore[attr-defined]
    assert three.replica.examine("p2").damage == ("its description is missing",)
    assert three.replica.examine("p1").damage == ()


def test_an_unknown_point_is_not_found(three: Bench) -> None:
    with pytest.raises(PointNotFound):
        three.replica.examine("p9")
    with pytest.raises(PointNotFound):
        three.replica.mark_damaged("p9", "lost")


def test_what_was_found_is_kept_with_the_point(three: Bench) -> None:
    three.replica.mark_damaged("p2", "a byte")
    three.cycle([("vda", 0, b"4" * BLOCK)])
    assert [point.damaged for point in three.replica.info().points] == ["", "a byte", "", ""]
    three.replica.mark_damaged("p2", "")
    assert not any(point.damaged for point in three.replica.info().points)


def test_a_former_owner_marks_nothing(three: Bench) -> None:
    three.replica.raise_epoch(5)
    with pytest.raises(StaleEpoch):
        three.replica.mark_damaged("p2", "a byte", 4)
    assert not any(point.damaged for point in three.replica.info().points)
    three.replica.mark_damaged("p2", "a byte", 5)
    assert [point.damaged for point in three.replica.info().points] == ["", "a byte", ""]


@pytest.mark.parametrize(
    "harm",
    [
        lambda record: record["heads"].update(vda="../../../victim"),
        lambda record: record["heads"].update(vda="/etc/hostname"),
        lambda record: record["points"][0]["images"].update(vda="images/../../../victim"),
        lambda record: record.update(replica_id="other"),
        lambda record: record.update(digests=["../replica.json"]),
        lambda record: record["holds"].update(x={"vda": "../x"}),
    ],
)
def test_a_record_that_cannot_be_true_is_refused(three: Bench, harm: Callable[[dict[str, object]], None]) -> None:
    path = three.replica.home.path / "replica.json"  # type: ignore[attr-defined]
    record = json.loads(path.read_text())
    harm(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ReplicaDamaged, match=r"replica\.json"):
        three.replica.info()
    with pytest.raises(AsrError):
        three.replica.open_cycle(three.spec("c9")).close()


def test_layers_in_a_circle_are_refused(three: Bench, kind: ReplicaKind) -> None:
    if kind is not ReplicaKind.CHAIN:
        pytest.skip("it has no layers")
    path = three.replica.home.path / "replica.json"  # type: ignore[attr-defined]
    record = json.loads(path.read_text())
    for name, layer in record["layers"].items():
        layer["parent"] = layer["parent"] or record["heads"]["vda"]
        assert name != layer["parent"]
    path.write_text(json.dumps(record))
    with pytest.raises(ReplicaDamaged, match="its own backing file"):
        three.replica.info()


# -- a resync --------------------------------------------------------------------------------------------------------


def test_digests_are_answered_without_reading(three: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for point_id in three.points:
        whole(three.replica, point_id)
    expected = three.replica.digests("vda", Extent(0, 4 * MIB + 4096))
    trusting = three.replica.from_records()
    assert trusting.hashes_at_target
    assert not three.replica.hashes_at_target
    monkeypatch.setattr(FileReplica, "reader", None)  # whatever reads fails
    assert trusting.digests("vda", Extent(0, 4 * MIB + 4096)) == expected
    assert trusting.digests("vda", Extent(3 * MIB, MIB)) == expected[48 * DIGEST_SIZE : 64 * DIGEST_SIZE]


def test_what_is_not_recorded_is_read(three: Bench) -> None:
    expected = three.replica.digests("vda", Extent(0, 4 * MIB + 4096))
    assert check_recorded(three)
    assert three.replica.from_records().digests("vda", Extent(0, 4 * MIB + 4096)) == expected


def test_a_damaged_head_is_read(three: Bench) -> None:
    three.replica.mark_damaged("p3", "a byte")
    assert three.replica.from_records() is three.replica
