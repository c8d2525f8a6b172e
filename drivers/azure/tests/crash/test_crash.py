"""The driver is killed at its named places, in all that it does, and carries on when it is asked again.

One story: each piece of work is done once for each of its places, killed there, and done again. Then what must be true
is looked at past the driver.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asr_driver_azure._driver import AzureDriver
from asr_driver_azure._site import AzureSite
from asrcore.driver import CycleSpec, Fence, SealSpec
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency
from drivers.azure.tests.crash.worker import MIB, SIZE, content
from drivers.azure.tests.peers.arm.server import Cloud
from drivers.azure.tests.peers.storage import Storage

ROOT = Path(__file__).parents[4]
pytestmark = pytest.mark.timeout(280)

CREATE = ["azure.replica.recorded", "azure.blob.created", "azure.replica.created"]
CYCLE = [
    "azure.cycle.recorded",
    "azure.cycle.opened",
    "azure.put",
    "azure.drained",
    "azure.flushed",
    "azure.cleared",
    "azure.closed",
    "azure.snapshotted",
    "azure.described",
    "azure.sealed",
]
TORN = ["azure.cleared", "azure.put", "azure.flushed", "azure.discarded"]
DROP = ["azure.points.unrecorded", "azure.points.dropped"]
EPOCH = ["azure.epoch.recorded", "azure.epoch.leased", "azure.epoch.raised"]
DELETE = ["azure.replica.leaving", "azure.replica.deleted"]
TEST = [
    "azure.test.recorded",
    "azure.disk.created",
    "azure.disk.opened",
    "azure.disk.put",
    "azure.disk.closed",
    "azure.cards.made",
    "azure.machine.defined",
    "azure.machine.started",
]
STOP = ["azure.resource.removed", "azure.resource.removed:3", "azure.machine.removed", "azure.test.ended"]
PROMOTE = [
    "azure.promotion.recorded",
    "azure.disk.put",
    "azure.repairs.recorded",
    "azure.base.snapshotted",
    "azure.machine.defined",
]
UNDO = ["azure.resource.removed", "azure.machine.removed", "azure.undone"]
COMMIT = ["azure.commit.begun", "azure.commit.leaving", "azure.committed"]
VIEW = ["azure.view.snapshotted", "azure.mark.released"]
FENCE = ["azure.fence.recorded", "azure.machine.stopped"]


class Story:
    """`killed` does a piece, killed at a place, and then again to its end."""

    def __init__(self, storage: Storage, cloud: Cloud, errors: Path) -> None:
        self.storage, self.cloud = storage, cloud
        self.settings = storage.settings() | cloud.settings()
        self.places: set[str] = set()
        self._errors = errors
        with errors.open("wb") as log:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "drivers.azure.tests.crash.worker"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._say(self.settings)

    def _say(self, what: Any) -> None:
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps(what).encode() + b"\n")
        self._worker.stdin.flush()

    def _do(self, piece: str, at: str, given: dict[str, Any]) -> int:
        assert self._worker.stdout is not None
        self._say({"piece": piece, "at": at, "given": given})
        answer: int = json.loads(self._worker.stdout.readline())
        return answer

    def done(self, piece: str, **given: Any) -> None:
        """Not killed."""
        assert self._do(piece, "", given) == 0, self._errors.read_text()[-3000:]

    def killed(self, place: str, piece: str, **given: Any) -> None:
        """Killed, then done again."""
        told = self._do(piece, place, given)
        assert told == -9, f"{piece} was not killed at {place}: {told}\n{self._errors.read_text()[-3000:]}"
        self.places.add(f"{piece} {place}")
        self.done(piece, **given)

    def connect(self) -> AzureSite:
        """To look."""
        return AzureDriver().connect("azure", self.settings)

    def blobs(self, part: str) -> list[tuple[str, str]]:
        """Names of blobs and snapshots that have this in their name, past the driver."""
        return sorted(key for key in self.storage.blobs(self.settings["container"]) if part in key[0])

    def close(self) -> None:
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self._worker.stdin.close()
        self._worker.wait(60)
        self._worker.stdout.close()


@pytest.fixture(scope="module")
def story(storage: Storage, cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    made = Story(storage, cloud, tmp_path_factory.mktemp("crash") / "worker.log")
    yield made
    made.close()


def expected(before: bytes, point: str) -> bytes:
    """Content of the disk after the cycle of a point."""
    disk = bytearray(before)
    disk[:MIB] = content(point, MIB)
    disk[2 * MIB : 2 * MIB + 512 * 1024] = bytes(512 * 1024)
    disk[5 * MIB : 5 * MIB + 64 * 1024] = content(point + "b", 64 * 1024)
    return bytes(disk)


def test_the_story(story: Story) -> None:
    site = story.connect()
    for number, place in enumerate(CREATE):
        story.killed(place, "create", replica=f"r{number}")
        assert len(story.blobs(f"/r{number}/disks/")) == 1
    for number, place in enumerate(DELETE):
        story.killed(place, "delete", replica=f"r{number + 1}")
        assert story.blobs(f"/r{number + 1}/") == []

    disk, head, contents = bytes(SIZE), None, {}
    for number, place in enumerate(CYCLE):
        point = f"p{number}"
        if place == "azure.cleared":  # something must be there to be cleared
            story.done("cycle", replica="r0", point="full", base=head)
            _fill(story)
            head, disk = "fill", _read(site, "r0", SIZE)
        story.killed(place, "cycle", replica="r0", point=point, base=head)
        head, disk = point, expected(disk, point)
        contents[point] = disk
        assert _read(site, "r0", SIZE) == disk, f"killed at {place}"
    for place in TORN:
        story.killed(place, "torn", replica="r0", base=head)
        assert _read(site, "r0", SIZE) == disk
    story.done("cycle", replica="r0", point="after", base=head)
    assert _read(site, "r0", SIZE) == expected(disk, "after")
    head, contents["after"] = "after", expected(disk, "after")
    for point, wanted in contents.items():
        assert _read(site, "r0", SIZE, point) == wanted, f"point {point} changed"

    story.killed(DROP[0], "drop", replica="r0", points=["p0", "p1"])
    story.killed(DROP[1], "drop", replica="r0", points=["p2"])
    points = site.target.replica("r0").info().points
    assert len([key for key in story.blobs("/r0/disks/") if key[1]]) == len(points), "a snapshot is left over"
    assert story.blobs("/r0/cycles/") == []
    for number, place in enumerate(EPOCH):
        story.killed(place, "raise_epoch", replica="r0", epoch=number + 2)
    story.done("cycle", replica="r0", point="owned", base=head)

    _machines(story, site)
    site.close()
    assert len(story.places) >= 20
    assert len({place.partition(" ")[2] for place in story.places}) >= 20


def _fill(story: Story) -> None:
    """Data where the next cycle clears, in a point of its own."""
    site = story.connect()
    replica = site.target.replica("r0")
    info = replica.info()
    with replica.open_cycle(CycleSpec("c-fill", info.epoch, info.head, {"vda": SIZE})) as writer:
        writer.write("vda", 2 * MIB, memoryview(content("fill", MIB)))
        description = replica.description("full")
        writer.seal(SealSpec("fill", 1000.0, Consistency.CRASH, False, description))
    site.close()


def _machines(story: Story, site: AzureSite) -> None:
    before = story.cloud.names()
    for number, place in enumerate(TEST):
        test = f"t{number}"
        story.killed(place, "start_test", replica="r0", test=test, point="owned")
        machine = site.inventory.machine(f"test-{test}")
        assert machine.power is PowerState.RUNNING
        assert site.failover.tests("r0") == [test]
        if number < len(STOP):
            story.killed(STOP[number], "stop_test", replica="r0", test=test)
        else:
            story.done("stop_test", replica="r0", test=test)
        assert story.cloud.names() == before, f"something is left of {test}"
        assert story.blobs("machines/") == []
    for number, place in enumerate(PROMOTE):
        story.killed(place, "promote", replica="r0", point="owned")
        assert [item.id for item in site.inventory.machines()] == ["r0"]
        if place != PROMOTE[-1]:
            story.killed(UNDO[number % len(UNDO)], "undo", replica="r0")
            assert story.cloud.names() == before, "something is left after an undo"
    story.killed("azure.machine.started", "power_on", machine="r0")
    for place in VIEW:
        story.killed(place, "view", machine="r0", view_id=f"view-{place}")
        snapshots = [name for name in story.cloud.names() if name.startswith("snapshots/")]
        assert len(snapshots) == 1, "marks are left over"
    for place in FENCE:
        story.killed(place, "fence", machine="r0")
        assert site.inventory.machine("r0").power is PowerState.OFF
        assert site.inventory.fenced("r0") == Fence(9, "test")
    story.done("undo", replica="r0")
    site.machines.unfence("r0", 9)
    assert story.cloud.names() == before
    for number, place in enumerate(COMMIT):
        replica = f"own{number}"
        story.done("create", replica=replica)
        story.done("cycle", replica=replica, point="p", base=None)
        story.done("promote", replica=replica, point="p")
        story.killed(place, "commit", replica=replica)
        assert story.blobs(f"replicas/{replica}/") == []
        assert replica in {item.id for item in site.inventory.machines()}, "a commit keeps the machine"


def _read(site: AzureSite, replica: str, size: int, point: str | None = None) -> bytes:
    buffer = bytearray(size)
    with site.target.replica(replica).reader("vda", point) as reader:
        reader.read_into(0, memoryview(buffer))
    return bytes(buffer)
