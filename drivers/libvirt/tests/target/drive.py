"""Runs one operation on a replica in a separate process: inside a site of the lab, and killed at crash points.

The words of a command are SITE_URI REPLICA_DIR COMMAND [ARGUMENT...]; `driven.py` sends them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from asr_driver_libvirt.settings import SiteSettings
from asr_driver_libvirt.site import LibvirtSite
from asr_driver_libvirt.xml.description import DOMAIN_XML, NVRAM, PLATFORM
from asr_driver_libvirt.xml.domain import machine_of, parse_domain
from asrcore.driver import CycleSpec, Fence, PromoteSpec, ReplicaSpec, SealSpec, TestSpec
from asrcore.errors import AsrError
from asrcore.model.extent import Extent, split
from asrcore.model.machine import Artifact, Description, PowerState
from asrcore.model.point import Consistency
from asrcore.model.policy import Policy
from asrcore.model.protection import NetworkMap
from asrcore.model.watch import Watch

MIB = 1024 * 1024


def described(directory: Path) -> Description:
    """The machine in a directory: domain.xml, nvram, and a raw image per disk."""
    xml = (directory / "domain.xml").read_bytes()
    model = parse_domain(xml)
    sizes = {disk.id: (directory / f"{disk.id}.raw").stat().st_size for disk in model.hard_disks}
    artifacts = [Artifact(DOMAIN_XML, xml)]
    if (directory / "nvram").exists():
        artifacts.append(Artifact(NVRAM, (directory / "nvram").read_bytes()))
    return Description(machine_of(model, sizes, PowerState.OFF), PLATFORM, tuple(artifacts))


def create(site: LibvirtSite, replica_id: str, directory: str, seed: str = "") -> object:
    description = described(Path(directory))
    spec = ReplicaSpec(replica_id, description.machine.name, 1, description, seed or None)
    site.target.create_replica(spec, Watch())
    return site.target.replica(replica_id).info().disks


def cycle(site: LibvirtSite, replica_id: str, directory: str, cycle_id: str, point_id: str, keep: str) -> object:
    """A cycle that compares: it sends the differences from the head."""
    description = described(Path(directory))
    replica = site.target.replica(replica_id)
    info = replica.info()
    if info.head == point_id:
        return "sealed before"
    disks = {disk.id: disk.size for disk in description.machine.disks}
    sent = 0
    with replica.open_cycle(CycleSpec(cycle_id, info.epoch, info.head, disks)) as writer:
        for disk_id, size in disks.items():
            with (Path(directory) / f"{disk_id}.raw").open("rb") as file, replica.reader(disk_id) as reader:
                buffer = memoryview(bytearray(MIB))
                for piece in split([Extent(0, size)], MIB):
                    file.seek(piece.offset)
                    data = file.read(piece.length)
                    if piece.end <= info.disks.get(disk_id, 0):
                        reader.read_into(piece.offset, buffer[: piece.length])
                        if data == buffer[: piece.length].tobytes():
                            writer.same(disk_id, piece.offset, piece.length)
                            continue
                    sent += piece.length
                    if any(data):
                        writer.write(disk_id, piece.offset, memoryview(data))
                    else:
                        writer.zero(disk_id, piece.offset, piece.length)
        writer.flush()
        writer.seal(SealSpec(point_id, 1.0, Consistency.CRASH, keep == "keep", description))
    return sent


def read(site: LibvirtSite, replica_id: str, point_id: str, directory: str) -> object:
    """Whether a point's disks equal those in the directory."""
    replica = site.target.replica(replica_id)
    point = next(point for point in replica.info().points if point.id == point_id)
    for disk_id, size in point.disks.items():
        with (Path(directory) / f"{disk_id}.raw").open("rb") as file, replica.reader(disk_id, point_id) as reader:
            for piece in split([Extent(0, size)], MIB):
                buffer = bytearray(piece.length)
                reader.read_into(piece.offset, memoryview(buffer))
                file.seek(piece.offset)
                if file.read(piece.length) != buffer:
                    return f"{disk_id} differs at {piece.offset}"
    return "equal"


def examine(site: LibvirtSite, replica_id: str, point_id: str) -> object:
    """Damage of a point, and how much of it has recorded digests."""
    found = site.target.replica(replica_id).examine(point_id, start=0)
    return [list(found.damage), found.proved]


def info(site: LibvirtSite, replica_id: str) -> object:
    found = site.target.replica(replica_id).info()
    return {"points": [point.id for point in found.points], "pending": found.pending, "epoch": found.epoch}


def drop(site: LibvirtSite, replica_id: str, epoch: str, *points: str) -> object:
    site.target.replica(replica_id).drop_points(points, int(epoch))
    return None


def start_test(site: LibvirtSite, replica_id: str, test_id: str, point_id: str, name: str) -> object:
    instance = site.failover.start_test(TestSpec(test_id, replica_id, point_id, name), Watch())
    return [instance.machine_id, instance.name]


def stop_test(site: LibvirtSite, replica_id: str, test_id: str) -> object:
    site.failover.stop_test(replica_id, test_id)
    return site.failover.tests(replica_id)


def promote(site: LibvirtSite, replica_id: str, point_id: str, epoch: str) -> object:
    spec = PromoteSpec(replica_id, point_id, int(epoch), NetworkMap())
    instance = site.failover.promote(spec, Watch())
    return [instance.machine_id, instance.name]


def undo(site: LibvirtSite, replica_id: str, epoch: str) -> object:
    site.failover.undo(replica_id, int(epoch))
    return None


def commit(site: LibvirtSite, replica_id: str, epoch: str) -> object:
    site.failover.commit(replica_id, int(epoch), Watch())
    return site.target.replicas()


def fence(site: LibvirtSite, machine_id: str, epoch: str) -> object:
    site.inventory.fence(machine_id, Fence(int(epoch), "a test"))
    return None


def fenced(site: LibvirtSite, machine_id: str) -> object:
    found = site.inventory.fenced(machine_id)
    return None if found is None else found.epoch


def findings(site: LibvirtSite, directory: str, policy: str) -> object:
    found = site.target.findings(described(Path(directory)), Policy(policy))
    return {finding.code: finding.severity.value for finding in found}


def details(site: LibvirtSite) -> object:
    return dict(site.status().details)


def delete(site: LibvirtSite, replica_id: str, epoch: str) -> object:
    site.target.delete_replica(replica_id, int(epoch))
    return site.target.replicas()


COMMANDS = {
    work.__name__.replace("_", "-"): work
    for work in (
        create,
        cycle,
        read,
        examine,
        info,
        drop,
        start_test,
        stop_test,
        promote,
        undo,
        commit,
        fence,
        fenced,
        findings,
        details,
        delete,
    )
}


def main(words: Sequence[str]) -> int:
    """Run one command and print its result. Returns the exit code."""
    uri, replica_dir, command, *arguments = words
    site = LibvirtSite("site", SiteSettings.parse({"uri": uri, "replica_dir": replica_dir}))
    try:
        with site:
            print(json.dumps(COMMANDS[command](site, *arguments)))
    except AsrError as problem:
        print(json.dumps({"error": problem.code, "text": str(problem)}))
        return 3
    return 0


def serve() -> None:
    """Run each line of the input, `[environment, words]`, in a fork; the answer is `[status, output, errors]`.

    This process has one thread and no connection, so a fork is equivalent to a new process. Starting Python and
    importing the driver takes longer than most commands.
    """
    gc.freeze()
    for line in sys.stdin:
        environment, words = json.loads(line)
        assert threading.active_count() == 1, "a fork copies only one thread"
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            pid = os.fork()
            if pid == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                os.environ.update(environment)
                _child(words)
            _, status = os.waitpid(pid, 0)
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        print(json.dumps([os.waitstatus_to_exitcode(status), *texts]), flush=True)


def _child(words: Sequence[str]) -> NoReturn:
    status = 1
    try:
        status = main(words)
    except BaseException:  # noqa: BLE001 - printed, as the interpreter would; the fork ends either way
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
