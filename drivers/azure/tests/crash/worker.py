"""A process that runs one operation of the driver at a time, and is killed in it at the given crash point.

It reads requests as lines of JSON, forks a child for each (the SDK takes seconds to load), and answers with the child's
exit status. Every operation can be repeated: that is what is tested.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asr_driver_azure.driver import AzureDriver
from asr_driver_azure.site import AzureSite
from asrcore.driver import CycleSpec, Fence, PromoteSpec, ReplicaSpec, SealSpec, TestSpec, ViewRequest
from asrcore.model.extent import split
from asrcore.model.machine import Description, Disk, Firmware, Machine, Nic
from asrcore.model.point import Consistency, Mark
from asrcore.model.protection import NetworkMap
from asrcore.model.watch import Watch

MIB = 1 << 20
SIZE = 6 * MIB


def description(machine_id: str) -> Description:
    """The description of the machine."""
    disks = (Disk("vda", SIZE),)
    nics = (Nic("52:54:00:00:00:01", "dmz"),)
    return Description(Machine(machine_id, machine_id, 1, 64 * MIB, Firmware.BIOS, disks, nics), "test")


def content(seed: str, length: int) -> bytes:
    """Noise, always the same for a seed."""
    return random.Random(seed).randbytes(length)


def create(site: AzureSite, replica: str) -> None:
    site.target.create_replica(ReplicaSpec(replica, replica, 1, description(replica)), Watch())


def cycle(site: AzureSite, replica: str, point: str, base: str | None, keep: bool = True) -> None:
    """A cycle that writes, zeroes and skips blocks, and seals."""
    at = site.target.replica(replica)
    info = at.info()
    if info.head == point:
        return
    with at.open_cycle(CycleSpec(f"c-{point}", info.epoch, base, {"vda": SIZE})) as writer:
        writer.write("vda", 0, memoryview(content(point, MIB)))
        writer.flush()
        writer.zero("vda", 2 * MIB, 512 * 1024)
        writer.write("vda", 5 * MIB, memoryview(content(point + "b", 64 * 1024)))
        writer.same("vda", 3 * MIB, MIB)
        writer.flush()
        writer.seal(SealSpec(point, 1000.0, Consistency.CRASH, keep, description(replica)))


def torn(site: AzureSite, replica: str, base: str) -> None:
    """Part of a cycle, then abandoned: its writes do not count."""
    at = site.target.replica(replica)
    with at.open_cycle(CycleSpec("c-torn", at.info().epoch, base, {"vda": SIZE})) as writer:
        writer.write("vda", 3 * MIB, memoryview(content("torn", MIB)))
        writer.zero("vda", 0, MIB)
        writer.flush()
        writer.discard()


def drop(site: AzureSite, replica: str, points: list[str]) -> None:
    at = site.target.replica(replica)
    at.drop_points(points, at.info().epoch)


def raise_epoch(site: AzureSite, replica: str, epoch: int) -> None:
    site.target.replica(replica).raise_epoch(epoch)


def delete(site: AzureSite, replica: str) -> None:
    site.target.delete_replica(replica, 1)


def start_test(site: AzureSite, replica: str, test: str, point: str) -> None:
    site.failover.start_test(TestSpec(test, replica, point, f"asr-{test}"), Watch())


def stop_test(site: AzureSite, replica: str, test: str) -> None:
    site.failover.stop_test(replica, test)


def promote(site: AzureSite, replica: str, point: str) -> None:
    epoch = site.target.replica(replica).info().epoch
    site.failover.promote(PromoteSpec(replica, point, epoch, NetworkMap()), Watch())


def power_on(site: AzureSite, machine: str) -> None:
    site.inventory.power_on(machine)


def undo(site: AzureSite, replica: str) -> None:
    site.failover.undo(replica, site.target.replica(replica).info().epoch)


def commit(site: AzureSite, replica: str) -> None:
    site.failover.commit(replica, 1, Watch())


def view(site: AzureSite, machine: str, view_id: str) -> None:
    """Open, read and close a view; release the older marks."""
    request = ViewRequest(machine, view_id, None)
    with site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0) as frozen:
        found = frozen.machines[machine]
        buffer = bytearray(64 * 1024)
        with found.disks["vda"].reader() as reader:
            reader.read_into(0, memoryview(buffer))
        frozen.confirm()
    marks: list[Mark] = [found.mark] if found.mark else []
    site.source.keep_marks(machine, marks)


def home(site: AzureSite, machine: str, view_id: str, directory: str) -> None:
    """A round of the failback: the changes since the last round's mark are copied into a file; then the mark is
    kept."""
    mark = Path(directory) / "mark"
    since = Mark(mark.read_text()) if mark.exists() else None
    request = ViewRequest(machine, view_id, since)
    with site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0) as frozen:
        found = frozen.machines[machine]
        disk = found.disks["vda"]
        extents = disk.changed() if since else disk.allocated()
        with disk.reader() as reader, (Path(directory) / "disk").open("r+b") as file:
            for piece in split(extents, MIB // 2):
                data = bytearray(piece.length)
                if not piece.zero:
                    reader.read_into(piece.offset, memoryview(data))
                file.seek(piece.offset)
                file.write(data)
        frozen.confirm()
    assert found.mark is not None
    mark.write_text(found.mark.token)
    site.source.keep_marks(machine, [found.mark])


def power_off(site: AzureSite, machine: str) -> None:
    site.inventory.power_off(machine, graceful=True, timeout=30.0)


def fence(site: AzureSite, machine: str) -> None:
    site.inventory.fence(machine, Fence(9, "test"))


def sweep(site: AzureSite) -> None:
    site.sweep()


_PIECES: dict[str, Callable[..., None]] = {
    piece.__name__: piece
    for piece in (
        create, cycle, torn, drop, raise_epoch, delete, start_test, stop_test, promote, power_on, undo, commit, view,
        fence, sweep, home, power_off,
    )
}  # fmt: skip


def main() -> None:
    """Serve requests until the input ends."""
    settings: dict[str, str] = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(settings, request)
        end, status = time.monotonic() + 120, 0
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.01)
        else:
            os.kill(child, 9)
            os.waitpid(child, 0)
            status = -1
        answer = -os.WTERMSIG(status) if status > 0 and os.WIFSIGNALED(status) else status
        print(json.dumps(answer), flush=True)


def _run(settings: dict[str, str], request: dict[str, Any]) -> None:
    if request["at"]:
        os.environ["ASRCORE_CRASH_AT"] = request["at"]
    code = 1
    try:
        site = AzureDriver().connect("azure", settings)
        _PIECES[request["piece"]](site, **request["given"])
        code = 0
    except BaseException as problem:  # noqa: BLE001 - reported by the exit code and on stderr
        print(f"{request}: {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    main()
