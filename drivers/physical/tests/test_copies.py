"""The replica equals the frozen disks, byte for byte: a server of loop devices under load, with its real agent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asr_driver_physical.errors import SpoolFull
from asrcore.driver import CycleSpec, Replica, ReplicaSpec, SealSpec, Tracking, ViewRequest
from asrcore.errors import SiteUnreachable, ViewLost
from asrcore.model.extent import total
from asrcore.model.point import Consistency, Mark
from asrcore.model.watch import Watch
from asrcore.testing.conformance import delta_copy, full_copy
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.units import MiB
from drivers.physical.tests.rig import HOST, LoopServer, old_python, wait_until

pytestmark = pytest.mark.system

_ATTEMPTS = 6

MISSED = "were written and not noted"
"""Said where the kernel did not call the tracking program. Seen on Linux 6.18 under load: some writes a minute, all of
them completed in interrupts of one process of the virtual machine's host."""


class Copier:
    """Replicates the server into a world of the memory driver, as the engine does.

    A write that the kernel did not report is not a fault of the agent, which finds it: the cycle is repeated.
    """

    def __init__(self, server: LoopServer, world: str) -> None:
        self.server = server
        self.target = MemoryDriver().connect("away", {"world": MemoryWorld(world).name}).target
        inventory = server.site.inventory
        spec = ReplicaSpec("r1", server.name, 1, inventory.description(server.machine_id))
        self.replica: Replica = self.target.create_replica(spec, Watch())
        self.mark: Mark | None = None
        self.reasons: list[str] = []
        self.points = 0

    def point(self, *, compare: bool = False, limit: float = 30.0) -> dict[str, Tracking]:
        """One cycle; proves that the point equals the frozen disks. Returns the tracking of each disk."""
        for attempt in range(_ATTEMPTS):
            try:
                return self._cycle(compare or attempt > 0, limit)
            except ViewLost as problem:
                if MISSED not in str(problem):
                    raise
                self.discard()
        raise AssertionError(f"{_ATTEMPTS} times writes were not noted")

    def discard(self) -> None:
        """Give up the cycle that is open at the replica."""
        info = self.replica.info()
        assert info.pending is not None
        description = self.server.site.inventory.description(self.server.machine_id)
        sizes = {disk.id: disk.size for disk in description.machine.disks}
        with self.replica.open_cycle(CycleSpec(info.pending, info.epoch, info.head, sizes)) as writer:
            writer.discard()

    def delta(self) -> None:
        """A cycle of what has changed."""
        for _ in range(_ATTEMPTS):
            if set(self.point().values()) == {Tracking.CHANGED}:
                return
            assert all(not reason or MISSED in reason for reason in self.reasons), self.reasons
        raise AssertionError(f"{_ATTEMPTS} times writes were not noted")

    def _cycle(self, compare: bool, limit: float) -> dict[str, Tracking]:
        (self.server.home / "frozen.json").unlink(missing_ok=True)
        source, machine_id = self.server.site.source, self.server.machine_id
        self.points += 1
        request = ViewRequest(machine_id, f"v{self.points}", self.mark)
        with source.open_view([request], consistency=Consistency.CRASH, freeze_limit=limit) as view:
            known = {key: disk.tracking for key, disk in view.machines[machine_id].disks.items()}
            self.reasons = [getattr(disk, "reason", "") for disk in view.machines[machine_id].disks.values()]
            copy = full_copy if self.mark is None and not compare else delta_copy
            copy(view, machine_id, self.replica, f"p{self.points}")
            self.mark = view.machines[machine_id].mark
        assert self.mark is not None
        source.keep_marks(machine_id, [self.mark])
        self.equal()
        return known

    def equal(self) -> None:
        """Check that the newest point equals the frozen disks."""
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
            copier.delta()


def test_agent_killed_between_and_nothing_is_missed(server: LoopServer, copier: Copier) -> None:
    copier.point()
    with server.writing():
        server.kill(signal.SIGKILL)
        time.sleep(0.5)  # written while no agent runs: the kernel records it
        server.start()
        copier.delta()


def test_agent_killed_while_it_is_read(server: LoopServer, copier: Copier) -> None:
    copier.point()
    with server.writing():
        time.sleep(0.3)
        request = ViewRequest(server.machine_id, "v", copier.mark)
        with server.site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=10):
            server.kill(signal.SIGKILL)
            server.start()
        copier.delta()  # with the changes that the killed view had read


def test_restart_of_the_server_is_told_and_compared(server: LoopServer, copier: Copier) -> None:
    copier.point()
    server.write("vda", "one", 300_000)
    server.lose_tracking()
    with server.writing():
        assert set(copier.point(compare=True).values()) == {Tracking.LOST}
        copier.delta()


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
    """The connection breaks; the copy resumes from what has arrived, with the view that the spool has kept."""
    for attempt in range(_ATTEMPTS):
        try:
            _copy_across_a_cut(server, copier, f"v{attempt}")
            break
        except ViewLost as problem:
            if MISSED not in str(problem):
                raise
            copier.discard()
    copier.equal()


def _copy_across_a_cut(server: LoopServer, copier: Copier, view_id: str) -> None:
    source, machine_id = server.site.source, server.machine_id
    view = source.open_view([ViewRequest(machine_id, view_id, None)], consistency=Consistency.CRASH, freeze_limit=10)
    sizes = {key: disk.disk.size for key, disk in view.machines[machine_id].disks.items()}
    opened = view.taken_at
    spec = CycleSpec(view_id, 1, None, sizes)
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
        server.site.servers.gateway.close()  # the process server is also killed
        server.site = server.connect()
        view = server.site.source.open_view(
            [ViewRequest(machine_id, view_id, None)], consistency=Consistency.CRASH, freeze_limit=10
        )
        assert view.taken_at == opened, "the view survives the process"
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


# -- freezes -----------------------------------------------------------------------------------------------------------


def _writes(server: LoopServer) -> bool:
    """Whether a write to the server's first file system succeeds."""
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
    wait_until(lambda: _writes(server), "thawed by the watchdog", 10)
    server.kill()
    thread.join(60)
    assert problems, "a freeze that was cut short makes no point"


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
    wait_until(lambda: _writes(server), "thawed by the watchdog", 20)
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


# -- application-consistent points -------------------------------------------------------------------------------------


def _scripts(server: LoopServer, **texts: str) -> Path:
    """Scripts of the administrator; each may write to the returned file."""
    said = server.home / "said"
    said.unlink(missing_ok=True)
    for name, text in texts.items():
        path = server.home / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{text.format(said=said)}\n")
        path.chmod(0o700)
    return said


def test_both_scripts_succeed(server: LoopServer, copier: Copier) -> None:
    """They run before and after the freeze: what the first writes is in the point, what the second writes is not."""
    mount = server.mount("vda")
    before, after = f"echo pre >> {{said}}; echo quiet > {mount}/quiet", f"echo post >> {{said}}; rm {mount}/quiet"
    said = _scripts(server, pre_freeze=before, post_thaw=after)
    copier.point()
    assert said.read_text() == "pre\npost\n"
    assert copier.replica.info().points[-1].consistency is Consistency.APPLICATION
    assert not (mount / "quiet").exists()
    with copier.replica.reader("vda") as reader:
        content = bytearray(copier.replica.info().disks["vda"])
        reader.read_into(0, memoryview(content))
    assert b"quiet\n" in content


@pytest.mark.parametrize(
    ("before", "after"), [("echo pre >> {said}; exit 3", "echo post >> {said}"), ("echo pre >> {said}", "exit 1")]
)
def test_a_script_fails(server: LoopServer, copier: Copier, before: str, after: str) -> None:
    """The point is file-system-consistent only; in each case the second script ends what the first one started."""
    said = _scripts(server, pre_freeze=before, post_thaw=after)
    copier.point()
    assert copier.replica.info().points[-1].consistency is Consistency.FILESYSTEM
    assert said.read_text().startswith("pre\n")
    assert ("post" in said.read_text()) == ("post" in after)


@pytest.mark.parametrize("which", ["pre_freeze", "post_thaw"])
def test_a_script_hangs(server: LoopServer, copier: Copier, which: str) -> None:
    """It is killed at its limit (2 s here), with its children; nothing stays frozen, and the point is made."""
    quiet = {"pre_freeze": "exit 0", "post_thaw": "exit 0"}
    said = _scripts(server, **{**quiet, which: "sleep 300 & echo $! >> {said}; wait"})
    begun = time.monotonic()
    copier.point()
    assert 2 < time.monotonic() - begun < 30
    assert copier.replica.info().points[-1].consistency is Consistency.FILESYSTEM
    assert _writes(server)
    child = int(said.read_text())
    wait_until(lambda: not _runs(child), "its child is killed", 10)


def _runs(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_freeze_that_fails_ends_what_the_script_has_begun(server: LoopServer, copier: Copier) -> None:
    said = _scripts(server, pre_freeze="echo pre >> {said}", post_thaw="echo post >> {said}")
    (server.home / "hang").write_text("2.5")
    with pytest.raises(ViewLost, match="limit of 1 s"):
        copier.point(limit=1.0)
    assert said.read_text() == "pre\npost\n"
    assert _writes(server)


# -- the process server ------------------------------------------------------------------------------------------------


def test_a_full_spool_is_told_and_it_goes_on_with_room(server: LoopServer, copier: Copier) -> None:
    copier.point()
    server.site.close()
    server.settings["spool_limit"] = "1MiB"
    server.site = server.connect()
    request = ViewRequest(server.machine_id, "full", copier.mark)
    with server.site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=10) as view:
        server.write("vda", "much", 3 * MiB)
        with pytest.raises(SpoolFull, match="limit is 1048576"):
            view.settle()
    assert _writes(server)
    assert list(server.site.settings.spool.glob("*/*")) == [], "data that did not fit stay in the spool"
    server.site.close()
    server.settings["spool_limit"] = "64MiB"
    server.site = server.connect()
    assert set(copier.point().values()) == {Tracking.CHANGED}


OTHER = """
import json, sys
from asr_driver_physical.driver import PhysicalDriver
site = PhysicalDriver().connect("dc", json.loads(sys.argv[1]))
print("ready", flush=True)
while not site.servers.gateway.connected():
    pass
print("connected", flush=True)
sys.stdin.read()
"""


def test_a_server_goes_to_another_process_server(server: LoopServer, copier: Copier) -> None:
    """Of the same site: both have the identity. The first is killed; tracking continues, so a delta is sufficient."""
    copier.point()
    server.kill()
    server.site.close()
    with socket.create_server((HOST, 0)) as probe:
        second = probe.getsockname()[1]
    server.set_process_servers(server.port, second)
    first = subprocess.Popen(
        [sys.executable, "-c", OTHER, json.dumps(server.settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"ready\n"
        shutil.copytree(server.root / "identity", server.root / "identity2")
        settings = {"identity": str(server.root / "identity2"), "spool": str(server.root / "spool2")}
        server.settings = {**settings, "listen": f"{HOST}:{second}"}
        server.site = server.connect()
        server.start(wait=False)
        assert first.stdout.readline() == b"connected\n"
        assert server.site.servers.gateway.connected() == {}, "it connects to the first of its list"
        with server.writing():
            time.sleep(0.3)
            first.kill()
            wait_until(lambda: server.name in server.site.servers.gateway.connected(), "it connects to the second", 20)
            copier.delta()
    finally:
        first.kill()
        first.communicate(timeout=10)


def test_installed_by_hand(server: LoopServer, copier: Copier, tmp_path: Path) -> None:
    """As described in README.md: probe on the server, `enrol` on the process server, copy the tree."""
    server.kill()
    server.site.servers.identity.forget(server.name)
    for name in ("agent.pem", "ca.pem", "config.json"):
        (server.home / name).unlink()
    facts = tmp_path / "facts.json"
    facts.write_text(server.probe())
    out, address = tmp_path / "carry", f"{HOST}:{server.port}"
    asr = [sys.executable, "-c", "from asrcore.cli import main; main()", "physical"]
    command = [*asr, "enrol", server.name, "--facts", str(facts), "--out"]
    command += [str(out), "--identity", server.settings["identity"], "--server", address, "--memory", "300MiB"]
    subprocess.run(command, check=True, timeout=60)
    again = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert (again.returncode, "empty directory" in again.stderr) == (2, True), "it would overwrite a key"
    home = out / "opt/asr-mobility"
    assert {path.name for path in home.iterdir()} == {"asr-mobility.pyz", "config.json", "ca.pem", "agent.pem"}
    assert home.stat().st_mode & 0o077 == (home / "agent.pem").stat().st_mode & 0o077 == 0
    assert f"MemoryMax={300 * MiB}" in (out / "etc/systemd/system/asr-mobility.service").read_text()
    done = subprocess.run([old_python(), home / "asr-mobility.pyz", "version"], check=True, capture_output=True)
    assert done.stdout
    for name in ("agent.pem", "ca.pem", "config.json"):
        shutil.copy(home / name, server.home)
    server.start()
    copier.point()
