"""SIGKILL at every crash point of the target role: afterwards each point is intact, and repeating succeeds."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asr_storage.replica.chain import SPAN
from asr_storage.replica.store import ReplicaKind
from asrcore.units import KiB, MiB
from drivers.libvirt.tests.target.driven import COMMAND, Driven

pytestmark = pytest.mark.crash

DOMAIN = """<domain type='qemu'><name>web</name><uuid>7d0c7a6c-5f0c-4c6e-9f57-0d3a53cbd9a1</uuid>
<memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os><devices>
<disk type='file' device='disk'><source file='/x/vda'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><source file='/x/vdb'/><target dev='vdb' bus='virtio'/></disk>
</devices></domain>"""

CREATE = ["target.created", "target.seeded"]
FIRST = [
    "target.cycle.opened",
    "target.flush",
    "target.seal.begin",
    "target.seal.commit",
    "target.seal.disk-applied",
    "target.seal.applied",
    "target.seal.digests",
    "target.seal.done",
    "target.seal.swept",
]
CYCLE = {
    ReplicaKind.REFLINK: ["target.keep.cloned", *FIRST],  # the clones of the point before
    ReplicaKind.CHAIN: [*FIRST, "target.chain.overlay"],
}
DROP_STEPS = ["target.drop.begin", "target.drop.recorded", "target.drop.done"]
DROP = {
    ReplicaKind.REFLINK: DROP_STEPS,
    ReplicaKind.CHAIN: [
        *DROP_STEPS,
        "target.drop.merged",
        "target.drop.merged:2",
        "target.drop.merged:3",
        "target.drop.rebased",
        "target.drop.rebased:2",
        "target.drop.merge-recorded",
        "target.drop.merge-recorded:2",
    ],
}
GATHER = ["target.chain.gathered", "target.chain.gathered:2", "target.drop.tidied", "target.drop.done"]
DELETE = ["target.delete.begin", "target.delete.done"]


class Crashing:
    """A replica directory and machines' states m1, m2, ..., as `drive.py` uses them."""

    def __init__(self, replica_dir: Path, work: Path, drive: Any, site: Any, driven: Driven) -> None:
        self.replica_dir, self.work, self.drive, self.site, self.driven = replica_dir, work, drive, site, driven

    def state(self, number: int) -> str:
        """A state of the machine: half of its blocks change from one to the next, some become zeroes."""
        directory = self.work / f"m{number}"
        if not directory.exists():
            directory.mkdir()
            (directory / "domain.xml").write_text(DOMAIN)
            for disk_id, size in (("vda", 2 * MiB), ("vdb", 512 * KiB)):
                content = bytearray(random.Random(7).randbytes(size))
                choice = random.Random(f"{number}{disk_id}")
                for start in range(0, size, 64 * KiB):
                    what = choice.choice(["same", "data", "zero"])
                    if what != "same":
                        content[start : start + 64 * KiB] = (
                            bytes(64 * KiB) if what == "zero" else choice.randbytes(64 * KiB)
                        )
                (directory / f"{disk_id}.raw").write_bytes(content)
        return str(directory)

    def run(self, *arguments: str, crash_at: str = "", log: Path | None = None) -> int:
        """Run a command in a separate process; returns its exit code."""
        replica_dir = str(self.replica_dir)
        status, _, errors = self.driven("qemu:///system", replica_dir, *arguments, crash_at=crash_at, log=log)
        assert status in (0, -signal.SIGKILL), errors
        return status

    def here(self, command: str, *arguments: str) -> Any:
        """Run a command in this process."""
        return self.drive.COMMANDS[command](self.site, *arguments)

    def equal(self, points: dict[str, int]) -> None:
        """Check that the replica has exactly these points, each with the state of that number."""
        assert self.here("info", "r1")["points"] == list(points)
        for point_id, number in points.items():
            assert self.here("read", "r1", point_id, self.state(number)) == "equal", point_id
            # A first copy that is compared with what it had put there knows no digests; all other digests are there.
            assert self.here("examine", "r1", point_id)[0] == []
            assert self.here("examine", "r1", point_id) == [[], 2 * MiB + 512 * KiB]

    def reset(self) -> None:
        """An empty directory."""
        for path in list(self.replica_dir.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def driven() -> Iterator[Driven]:
    with Driven(subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)) as made:
        yield made


@pytest.fixture
def crashing(replica_dir: Path, tmp_path: Path, drive: Any, tools: Any, driven: Driven) -> Crashing:
    return Crashing(replica_dir, tmp_path, drive, tools.site_at(replica_dir), driven)


def names(log: Path) -> set[str]:
    return set(log.read_text().split())


def plain(steps: list[str]) -> set[str]:
    return {step.partition(":")[0] for step in steps}


def test_create(crashing: Crashing, tmp_path: Path) -> None:
    for step in CREATE:
        crashing.reset()
        assert crashing.run("create", "r1", crashing.state(1), crash_at=step) == -signal.SIGKILL, step
        assert crashing.run("create", "r1", crashing.state(1), log=tmp_path / "log") == 0
        assert crashing.here("info", "r1") == {"points": [], "pending": None, "epoch": 1}
    assert names(tmp_path / "log") == set(CREATE)


def test_first_cycle(crashing: Crashing, tmp_path: Path) -> None:
    for step in FIRST:
        crashing.reset()
        crashing.here("create", "r1", crashing.state(1))
        cycle = ("cycle", "r1", crashing.state(1), "c1", "p1", "keep")
        assert crashing.run(*cycle, crash_at=step) == -signal.SIGKILL, step
        found = crashing.here("info", "r1")["points"]
        committed = FIRST.index(step) >= FIRST.index("target.seal.commit")
        assert found == (["p1"] if committed else []), step
        crashing.run(*cycle, log=tmp_path / "log")
        crashing.equal({"p1": 1})
    crashing.reset()
    crashing.here("create", "r1", crashing.state(1))
    crashing.run("cycle", "r1", crashing.state(1), "c1", "p1", "keep", log=tmp_path / "log")
    assert names(tmp_path / "log") - {"target.created"} == plain(FIRST)


def test_cycle(crashing: Crashing, tmp_path: Path, kind: ReplicaKind) -> None:
    """p1 is kept, p2 only the latest state; the killed cycle keeps p3 (or p4 instead)."""
    steps = CYCLE[kind]
    crashing.here("create", "r1", crashing.state(1))
    crashing.here("cycle", "r1", crashing.state(1), "c1", "p1", "keep")
    crashing.here("cycle", "r1", crashing.state(2), "c2", "p2", "no")
    kept, last, number = {"p1": 1}, "p2", 2
    log = tmp_path / "log"
    for step in steps:
        for keep in ("keep", "no"):
            before, new = last, f"p{number + 1}"
            command = ("cycle", "r1", crashing.state(number + 1), f"c{number + 1}", new, keep)
            code = crashing.run(*command, crash_at=step)
            expected = {**kept, before: number}
            if code == 0:
                assert step in ("target.keep.cloned", "target.chain.overlay"), step
            elif steps.index(step) < steps.index("target.seal.commit"):
                crashing.equal(expected)  # unchanged, for a process that opens it again
            else:
                crashing.equal({**kept, new: number + 1})
            crashing.run(*command, log=log)
            number, last = number + 1, new
            crashing.equal({**kept, new: number})
            assert crashing.here("info", "r1")["pending"] is None
            if keep == "keep":
                kept[new] = number
    crashing.run("cycle", "r1", crashing.state(1), "c-last", "p-last", "keep", log=log)
    crashing.run("cycle", "r1", crashing.state(2), "c-more", "p-more", "keep", log=log)
    assert names(log) == plain(steps)


def test_drop(crashing: Crashing, tmp_path: Path, kind: ReplicaKind) -> None:
    log = tmp_path / "log"
    for step in DROP[kind]:
        crashing.reset()
        crashing.here("create", "r1", crashing.state(1))
        for number in range(1, 5):
            crashing.here("cycle", "r1", crashing.state(number), f"c{number}", f"p{number}", "keep")
        assert crashing.run("drop", "r1", "1", "p2", "p3", crash_at=step) == -signal.SIGKILL, step
        if step == "target.drop.begin":
            crashing.equal({"p1": 1, "p2": 2, "p3": 3, "p4": 4})
        else:
            crashing.equal({"p1": 1, "p4": 4})
        # the head changes before the merge is resumed
        crashing.here("cycle", "r1", crashing.state(5), "c5", "p5", "no")
        crashing.run("drop", "r1", "1", "p2", "p3", log=log)
        crashing.equal({"p1": 1, "p4": 4, "p5": 5})
        images = list((crashing.replica_dir / "replicas" / "r1" / "images").iterdir())
        assert len(images) == (2 if kind is ReplicaKind.REFLINK else 6), step
    assert names(log) >= plain(DROP_STEPS)


@pytest.mark.parametrize("kind", [ReplicaKind.CHAIN], ids=["chain"])
def test_gather(crashing: Crashing, tmp_path: Path) -> None:
    """The eleventh point is the tenth layer on the base: that run is gathered, for two disks one after the other."""
    crashing.here("create", "r1", crashing.state(1))
    for number in range(1, SPAN + 2):
        crashing.here("cycle", "r1", crashing.state(number), f"c{number}", f"p{number}", "keep")
    whole = crashing.work / "whole"
    shutil.copytree(crashing.replica_dir, whole)
    points = {f"p{number}": number for number in range(1, SPAN + 2)}
    log = tmp_path / "log"
    for step in GATHER:
        crashing.reset()
        shutil.copytree(whole, crashing.replica_dir, dirs_exist_ok=True)
        assert crashing.run("drop", "r1", "1", crash_at=step) == -signal.SIGKILL, step
        crashing.equal(points)
        # the head changes before it is resumed
        crashing.here("cycle", "r1", crashing.state(SPAN + 2), "c-new", "p-new", "no")
        crashing.equal({**points, "p-new": SPAN + 2})
        crashing.run("drop", "r1", "1", "p2", "p3", log=log)
        left = {name: number for name, number in points.items() if name not in ("p2", "p3")}
        crashing.equal({**left, "p-new": SPAN + 2})
        names_there = {path.name for path in (crashing.replica_dir / "replicas" / "r1" / "images").iterdir()}
        record = json.loads((crashing.replica_dir / "replicas" / "r1" / "replica.json").read_bytes())
        assert names_there == {Path(name).name for name in record["layers"]}, step
    crashing.reset()
    shutil.copytree(whole, crashing.replica_dir, dirs_exist_ok=True)
    crashing.run("drop", "r1", "1", log=log)
    assert names(log) >= plain(GATHER)


def test_delete(crashing: Crashing, tmp_path: Path) -> None:
    for step in DELETE:
        crashing.here("create", "r1", crashing.state(1))
        crashing.here("cycle", "r1", crashing.state(1), "c1", "p1", "keep")
        assert crashing.run("delete", "r1", "1", crash_at=step) == -signal.SIGKILL, step
        crashing.run("delete", "r1", "1", log=tmp_path / "log")
        assert crashing.here("delete", "r1", "1") == []
        assert not [path for path in (crashing.replica_dir / "replicas").iterdir() if path.name == "r1"]
