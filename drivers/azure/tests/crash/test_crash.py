"""The driver is killed at its crash points, in all its operations, and resumes when the operation is repeated.

One scenario: each operation is run once for each of its crash points, killed there, and repeated. Then the result is
checked without the driver.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import asr_driver_azure
from asr_driver_azure.driver import AzureDriver
from asr_driver_azure.site import AzureSite
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
PUT_BACK = "azure.put-back"
DROP = ["azure.points.unrecorded", "azure.points.dropped"]
EPOCH = ["azure.epoch.recorded", "azure.epoch.leased", "azure.epoch.raised"]
DELETE = ["azure.replica.leaving", "azure.replica.deleted"]
TEST = [
    "azure.test.recorded",
    "azure.disk.created",
    "azure.disk.opened",
    "azure.disk.put",
    "azure.disk.closed",
    "azure.disk.made",
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
HOME = ["azure.view.snapshotted", "azure.view.read:2"]
DELTA = ["azure.view.snapshotted", "azure.view.compared", "azure.view.read", "azure.mark.released"]
LAST = ["azure.view.compared", "azure.view.read"]
FENCE = ["azure.fence.recorded", "azure.machine.stopped"]


class Story:
    """`killed` runs an operation, kills it at a place, and then repeats it to its end."""

    def __init__(self, storage: Storage, cloud: Cloud, errors: Path) -> None:
        self.storage, self.cloud = storage, cloud
        self.settings = storage.settings() | cloud.settings()
        self.places: set[str] = set()
        self._errors = errors
        self.directory = errors.parent
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
        """Run an operation without a kill."""
        assert self._do(piece, "", given) == 0, self._errors.read_text()[-3000:]

    def lost(self, place: str, piece: str, **given: Any) -> None:
        """Run an operation and kill it, without repeating it."""
        reported = self._do(piece, place, given)
        assert reported == -9, f"{piece} was not killed at {place}: {reported}\n{self._errors.read_text()[-3000:]}"
        self.places.add(f"{piece} {place}")

    def killed(self, place: str, piece: str, **given: Any) -> None:
        """Run an operation, kill it, and repeat it."""
        self.lost(place, piece, **given)
        self.done(piece, **given)

    def connect(self) -> AzureSite:
        """Connect a site for checks."""
        return AzureDriver().connect("azure", self.settings)

    def blobs(self, part: str) -> list[tuple[str, str]]:
        """Names of blobs and snapshots with this in their name, listed without the driver."""
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
    """The content of the disk after the cycle of a point."""
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
        if place == "azure.cleared":  # there must be something to clear
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
    story.killed(PUT_BACK, "cycle", replica="r0", point="after", base=head)
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
    _left_over(story, site)
    site.close()
    killed = {place.partition(" ")[2].partition(":")[0] for place in story.places}
    assert killed == places_of_the_driver(), "crash points at which nothing was killed, or that no longer exist"


def _fill(story: Story) -> None:
    """Data where the next cycle clears, in a separate point."""
    site = story.connect()
    replica = site.target.replica("r0")
    info = replica.info()
    with replica.open_cycle(CycleSpec("c-fill", info.epoch, info.head, {"vda": SIZE})) as writer:
        writer.write("vda", 2 * MIB, memoryview(content("fill", MIB)))
        description = replica.description("full")
        writer.seal(SealSpec("fill", 1000.0, Consistency.CRASH, False, description))
    site.close()


def places_of_the_driver() -> set[str]:
    """Every crash point in the driver's source."""
    source = Path(asr_driver_azure.__file__).parent
    return {
        name for path in source.rglob("*.py") for name in re.findall(r'reach\("(azure\.[^"]+)"\)', path.read_text())
    }


def _content(story: Story, site: AzureSite, machine: str) -> bytes:
    """The content of the machine's disk, read without the driver."""
    ((name, size),) = site.machines.disks(machine).values()
    with story.cloud.content.path(f"disks/{name}").open("rb") as file:
        return file.read(size)


def _change(story: Story, site: AzureSite, at: int, data: bytes) -> None:
    """The machine writes to its disk."""
    ((name, _),) = site.machines.disks("r0").values()
    with story.cloud.content.path(f"disks/{name}").open("r+b") as file:
        file.seek(at)
        file.write(data)


def _home(story: Story, site: AzureSite) -> None:
    """The failback, killed in the first copy, in a delta, and in the last one, of the stopped machine."""
    directory = story.directory / "home"
    directory.mkdir()
    with (directory / "disk").open("wb") as file:
        file.truncate(SIZE)
    story.killed(HOME[0], "home", machine="r0", view_id="first", directory=str(directory))
    assert (directory / "disk").read_bytes() == _content(story, site, "r0")
    (directory / "mark").unlink()
    story.killed(HOME[1], "home", machine="r0", view_id="again", directory=str(directory))
    rounds = [(place, False) for place in DELTA] + [(place, True) for place in LAST]
    for number, (place, last) in enumerate(rounds):
        _change(story, site, number * 64 * 1024, content(f"home{number}", 4096))
        _change(story, site, 4 * MIB + number * 64 * 1024, bytes(64 * 1024))
        if last:
            story.done("power_off", machine="r0")
        story.killed(place, "home", machine="r0", view_id=f"round{number}", directory=str(directory))
        assert (directory / "disk").read_bytes() == _content(story, site, "r0"), f"killed at {place}"
        assert len(story.cloud.all("snapshots")) == 1, "marks are left over"


def _left_over(story: Story, site: AzureSite) -> None:
    """An unfinished test of a replica whose deletion was not finished either, and neither is ever resumed."""
    before = story.cloud.names()
    story.done("create", replica="gone")
    story.done("cycle", replica="gone", point="p", base=None)
    story.lost("azure.disk.put", "start_test", replica="gone", test="lost", point="p")
    assert any(item["properties"]["diskState"] == "ActiveUpload" for item in story.cloud.all("disks"))
    assert site.sweep() == [], "the test is recorded: it may still be ended"
    story.lost("azure.replica.leaving", "delete", replica="gone")
    assert story.cloud.names() != before
    removed = site.sweep()
    assert "replica gone" in removed
    assert any(item.startswith("disks/") for item in removed)
    assert story.cloud.names() == before
    assert story.blobs("/gone/") == []


def _machines(story: Story, site: AzureSite) -> None:
    before = story.cloud.names()
    owned = _read(site, "r0", SIZE, "owned")
    for number, place in enumerate(TEST):
        test = f"t{number}"
        story.killed(place, "start_test", replica="r0", test=test, point="owned")
        machine = site.inventory.machine(f"test-{test}")
        assert machine.power is PowerState.RUNNING
        assert _content(story, site, f"test-{test}") == owned, f"killed at {place}"
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
        assert _content(story, site, "r0") == owned, f"killed at {place}"
        if place != PROMOTE[-1]:
            story.killed(UNDO[number % len(UNDO)], "undo", replica="r0")
            assert story.cloud.names() == before, "something is left after an undo"
    story.killed("azure.machine.started", "power_on", machine="r0")
    for place in VIEW:
        story.killed(place, "view", machine="r0", view_id=f"view-{place}")
        snapshots = [name for name in story.cloud.names() if name.startswith("snapshots/")]
        assert len(snapshots) == 1, "marks are left over"
    _home(story, site)
    story.done("power_on", machine="r0")
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
