"""A failover and its undo in steps, as a process that may be killed: `python worker.py FOLDER`.

A step that has ended is noted in `FOLDER/done`. Started again, it repeats the step that was killed, with the same ids,
as the engine does.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from asr_driver_folder.site import FolderDriver

from asrcore.driver import CycleSpec, Fence, PromoteSpec, ReplicaSpec, SealSpec, TestSpec, ViewRequest
from asrcore.model.extent import split
from asrcore.model.point import Consistency
from asrcore.model.protection import NetworkMap
from asrcore.model.watch import Watch
from asrcore.units import KiB


def content(folder: Path) -> dict[str, str]:
    """Digests of a machine's disks."""
    return {image.name: hashlib.sha256(image.read_bytes()).hexdigest() for image in sorted(folder.glob("*.raw"))}


class Story:
    """The steps, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = FolderDriver().connect("home", {"path": str(folder / "home")})
        self.away = FolderDriver().connect("away", {"path": str(folder / "away")})

    def create(self) -> None:
        description = self.home.inventory.description("web1")
        self.away.target.create_replica(ReplicaSpec("r1", "web1", 1, description), Watch())

    def first_point(self) -> None:
        self._cycle("c1", "p1", None)

    def second_point(self) -> None:
        self._cycle("c2", "p2", "p1")

    def _cycle(self, cycle: str, point: str, base: str | None) -> None:
        replica = self.away.target.replica("r1")
        if replica.info().head == point:
            return  # the engine finds a point that was sealed before it was killed
        request = ViewRequest("web1", cycle, None)
        with self.home.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=1.0) as view:
            machine = view.machines["web1"]
            sizes = {disk_id: disk.disk.size for disk_id, disk in machine.disks.items()}
            with replica.open_cycle(CycleSpec(cycle, 1, base, sizes)) as writer:
                for disk_id, disk in machine.disks.items():
                    with disk.reader() as reader:
                        for piece in split(disk.allocated(), 64 * KiB):
                            data = memoryview(bytearray(piece.length))
                            reader.read_into(piece.offset, data)
                            writer.write(disk_id, piece.offset, data)
                writer.flush()
                view.confirm()
                writer.seal(SealSpec(point, view.taken_at, machine.consistency, True, machine.description))
            assert machine.mark is not None
        self.home.source.keep_marks("web1", [machine.mark])

    def test(self) -> None:
        self.away.failover.start_test(TestSpec("t1", "r1", "p1", "web1-test"), Watch())

    def clean_up(self) -> None:
        self.away.failover.stop_test("r1", "t1")

    def fence(self) -> None:
        """A machine of the user's at the target has the identity, and makes room."""
        self.away.inventory.fence("web1", Fence(1, "lost"))

    def fail_over(self) -> None:
        self.away.failover.promote(PromoteSpec("r1", "p2", 2, NetworkMap()), Watch())

    def undo(self) -> None:
        self.away.failover.undo("r1", 3)

    def fail_over_again(self) -> None:
        self.away.failover.promote(PromoteSpec("r1", "p2", 4, NetworkMap()), Watch())

    def commit(self) -> None:
        self.away.failover.commit("r1", 4, Watch())

    def run(self) -> None:
        done = self.folder / "done"
        ended = done.read_text().split() if done.exists() else []
        twin = self.folder / "away" / "web1"
        for step in (
            self.create,
            self.first_point,
            self.second_point,
            self.test,
            self.clean_up,
            self.fence,
            self.fail_over,
            self.undo,
            self.fail_over_again,
            self.commit,
        ):
            if step.__name__ in ended:
                continue
            step()
            if step == self.undo:
                assert content(twin) == content(self.folder / "twin"), (
                    "the machine that was put aside is back as it was"
                )
            with done.open("a") as file:
                file.write(step.__name__ + "\n")


if __name__ == "__main__":
    Story(Path(sys.argv[1])).run()
