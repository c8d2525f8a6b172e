"""What arrives is what was frozen, byte for byte: of a server of loop devices under load, with its real agent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asrcore.driver import CycleSpec, Replica, ReplicaSpec, SealSpec, Tracking, ViewRequest
from asrcore.errors import SiteUnreachable, ViewLost
from asrcore.model.extent import total
from asrcore.model.point import Consistency, Mark
from asrcore.model.watch import Watch
from asrcore.testing.conformance import delta_copy, full_copy
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.units import MiB
from drivers.physical.tests.rig import LoopServer, wait_until

pytestmark = pytest.mark.system


class Copier:
    """Replicates the server into a world of the memory driver, as the engine does."""

    def __init__(self, server: LoopServer, world: str) -> None:
        self.server = server
        self.target = MemoryDriver().connect("away", {"world": MemoryWorld(world).name}).target
        inventory = server.site.inventory
        spec = ReplicaSpec("r1", server.name, 1, inventory.description(server.machine_id))
        self.replica: Replica = self.target.create_replica(spec, Watch())
        self.mark: Mark | None = None
        self.points = 0

    def point(self, *, compare: bool = False, limit: float = 30.0) -> dict[str, Tracking]:
        """One cycle; proves that the point equals the frozen disks. Returns what was known of the changes."""
        (self.server.home / "frozen.json").unlink(missing_ok=True)
        source, machine_id = self.server.site.source, self.server.machine_id
        self.points += 1
        request = ViewRequest(machine_id, f"v{self.points}", self.mark)
        with source.open_view([request], consistency=Consistency.CRASH, freeze_limit=limit) as view:
            known = {key: disk.tracking for key, disk in view.machines[machine_id].disks.items()}
            copy = full_copy if self.mark is None and not compare else delta_copy
            copy(view, machine_id, self.replica, f"p{self.points}")
            self.mark = view.machines[machine_id].mark
        assert self.mark is not None
        source.keep_marks(machine_id, [self.mark])
        self.equal()
        return known

    def equal(self) -> None:
        """The newest point is what was frozen."""
        frozen = json.loads((self.server.home / "frozen.json").read_text())
        assert self.content() == frozen

    def content(self) -> dict[str, str]:
        """SHA-256 of the replica's disks."""
        found = {}
        for disk_id, size in self.replica.info().points[-1].disks.items():
            buffer = bytearray(size)
            with self.replica.reader(disk_id) as reader:
                reader.read_into(0, memoryview(buffer))
            found[disk_id] = hashlib.sha256(buffer).hexdigest()
        return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LoopServer]:
    with contextlib.closing(LoopServer(tmp_path)) as made:
        made.start()
        yield made


@pytest.fixture
def copier(server: LoopServer, request: pytest.FixtureRequest) -> Copier:
    return Copier(server, f"copies-{request.node.name}-{os.getpid()}")


def test_under_load_each_point_is_what_was_frozen(server: LoopServer, copier: Copier) -> None:
    with server.writing():
        copier.point()
        for _ in range(4):
            time.sleep(0.5)
            assert set(copier.point().values()) == {Tracking.CHANGED}


def test_agent_killed_between_and_nothing_is_missed(server: LoopServer, copier: Copier) -> None:
    copier.point()
    with server.writing():
        server.kill(signal.SIGKILL)
        time.sleep(0.5)  # written while there is no agent: the kernel notes it
        server.start()
        assert set(copier.point().values()) == {Tracking.CHANGED}


def test_agent_killed_while_it_is_read(server: LoopServer, copier: Copier) -> None:
    copier.point()
    with server.writing():
        time.sleep(0.3)
        request = ViewRequest(server.machine_id, "v", copier.mark)
        with server.site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=10):
            server.kill(signal.SIGKILL)
            server.start()
        assert set(copier.point().values()) == {Tracking.CHANGED}, "what was taken by the killed view is told again"


def test_restart_of_the_server_is_told_and_compared(server: LoopServer, copier: Copier) -> None:
    copier.point()
    server.write("vda", "one", 300_000)
    server.lose_tracking()
    with server.writing():
        assert set(copier.point(compare=True).values()) == {Tracking.LOST}
        assert set(copier.point().values()) == {Tracking.CHANGED}


def test_disk_grown(server: LoopServer, copier: Copier) -> None:
    copier.point()
    server.grow_disk("vda", 32 * MiB)
    known = copier.point(compare=True)
    assert known == {"vda": Tracking.LOST, "vdb": Tracking.CHANGED}
    assert copier.replica.info().disks["vda"] == 32 * MiB


def test_file_system_trimmed(server: LoopServer, copier: Copier) -> None:
    server.write("vda", "gone", 6 * MiB)
    copier.point()
    (server.mount("vda") / "gone").unlink()
    server.sync()
    server.trim("vda")
    assert set(copier.point().values()) == {Tracking.CHANGED}


def test_changes_are_told_finely(server: LoopServer, copier: Copier) -> None:
    copier.point()
    server.write("vda", "small", 4096)
    server.write("vdb", "small", 4096)
    request = ViewRequest(server.machine_id, "fine", copier.mark)
    with server.site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=10) as view:
        disks = view.machines[server.machine_id].disks
        assert all(0 < total(disk.changed()) < 400_000 for disk in disks.values())


def test_link_cut_in_the_copy(server: LoopServer, copier: Copier) -> None:
    """The connection breaks; the copy goes on from what has arrived, with the view that the spool has kept."""
    source, machine_id = server.site.source, server.machine_id
    view = source.open_view([ViewRequest(machine_id, "v", None)], consistency=Consistency.CRASH, freeze_limit=10)
    sizes = {key: disk.disk.size for key, disk in view.machines[machine_id].disks.items()}
    opened = view.taken_at
    spec = CycleSpec("c1", 1, None, sizes)
    with copier.replica.open_cycle(spec) as writer, server.writing():
        disks = view.machines[machine_id].disks
        for number, (disk_id, size) in enumerate(sizes.items()):
            buffer = bytearray(size)
            if number == 1:
                server.kill(signal.SIGKILL)
                threading.Timer(0.5, server.start).start()
            with disks[disk_id].reader() as reader:
                reader.read_into(0, memoryview(buffer))
            writer.write(disk_id, 0, memoryview(buffer))
        writer.flush()
        server.site.gateway.close()  # the process server is killed, too
        server.site = server.connect()
        view = server.site.source.open_view(
            [ViewRequest(machine_id, "v", None)], consistency=Consistency.CRASH, freeze_limit=10
        )
        assert view.taken_at == opened, "the view outlives the process"
        machine = view.machines[machine_id]
        while again := {key: item for key, item in view.settle().get(machine_id, {}).items() if item}:
            for disk_id, extents in again.items():
                with machine.disks[disk_id].reader() as reader:
                    for extent in extents:
                        data = bytearray(extent.length)
                        reader.read_into(extent.offset, memoryview(data))
                        writer.write(disk_id, extent.offset, memoryview(data))
        writer.flush()
        view.confirm()
        writer.seal(SealSpec("p1", view.taken_at, machine.consistency, True, machine.description))
    copier.equal()


# -- freezes -----------------------------------------------------------------------------------------------------------


def _writes(server: LoopServer) -> bool:
    """Whether a write to the server's first file system goes through."""
    command = ["timeout", "2", "sh", "-c", f"echo x > {server.mount('vda')}/probe && sync {server.mount('vda')}/probe"]
    return subprocess.run(command, check=False).returncode == 0


def _settle_in_background(server: LoopServer, limit: float) -> tuple[threading.Thread, list[BaseException]]:
    problems: list[BaseException] = []

    def settle() -> None:
        try:
            request = ViewRequest(server.machine_id, "hanging", None)
            with server.site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=limit) as view:
                view.settle()
        except (ViewLost, SiteUnreachable) as problem:
            problems.append(problem)

    thread = threading.Thread(target=settle)
    thread.start()
    wait_until((server.home / "hanging").exists, "the freeze")
    return thread, problems


def test_freeze_ends_at_its_limit(server: LoopServer) -> None:
    (server.home / "hang").write_text("30")
    thread, problems = _settle_in_background(server, limit=1.0)
    wait_until(lambda: _writes(server), "thawed by the dead man", 10)
    server.kill()
    thread.join(60)
    assert problems, "no point comes of a freeze that was cut short"


def test_passed_limit_voids_the_point(server: LoopServer, copier: Copier) -> None:
    (server.home / "hang").write_text("2.5")
    with pytest.raises(ViewLost, match="limit of 1 s"):
        copier.point(limit=1.0)
    (server.home / "hang").unlink()
    assert _writes(server)
    copier.points = 0
    copier.point(compare=True)


def test_agent_killed_in_the_freeze_thaws_at_once(server: LoopServer) -> None:
    (server.home / "hang").write_text("50")
    thread, problems = _settle_in_background(server, limit=40.0)
    begun = time.monotonic()
    server.kill(signal.SIGKILL)
    wait_until(lambda: _writes(server), "thawed by the dead man", 20)
    assert time.monotonic() - begun < 30, "long before the limit"
    thread.join(60)
    assert problems


def test_point_of_a_frozen_server_needs_no_repair(server: LoopServer, copier: Copier, tmp_path: Path) -> None:
    with server.writing():
        copier.point()
    for disk_id in server.loops:
        copy = tmp_path / f"{disk_id}.copy"
        buffer = bytearray(copier.replica.info().disks[disk_id])
        with copier.replica.reader(disk_id) as reader:
            reader.read_into(0, memoryview(buffer))
        copy.write_bytes(buffer)
        done = subprocess.run(["e2fsck", "-fn", str(copy)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    assert copier.replica.info().points[-1].consistency is Consistency.FILESYSTEM
