"""Making a machine's disks independent: what they take from the replica's layers is copied into their top layers."""

from __future__ import annotations

import threading
from pathlib import Path

import libvirt

from asr_driver_libvirt.failover.instances import Platform, disks_of
from asr_storage.files.durable import fsync_file
from asr_storage.qemu import img
from asr_storage.qemu.process import run
from asr_storage.replica.chain import qemu_errors
from asrcore.crashpoint import reach
from asrcore.model.watch import Watch

__all__ = ["flatten"]

_LOOK_SECONDS = 0.2  # between two looks at a block job
_SLOWEST = 5 * 1024 * 1024  # bytes a second
_LEAST_SECONDS = 120.0


def flatten(
    platform: Platform, domain: libvirt.virDomain, directory: Path, watch: Watch, pause: threading.Event
) -> None:
    """Cut each disk of the machine in `directory` off from what it stands on. The machine may run all the while.

    `pause` is waited on between looks at the progress. Raises DriverFailed, OSError, Cancelled; may be repeated.
    """
    for disk_id, name in disks_of(platform.definition(domain)).items():
        path = Path(name)
        if path.parent != directory:
            continue
        while _backing(path) is not None:
            if platform.running(domain):
                _pull(platform, domain, disk_id, watch, pause)
            else:
                _rebase(path, watch)
        reach("failover.commit.disk-flattened")


def _backing(path: Path) -> str | None:
    with qemu_errors(path):
        return img.info(path, "qcow2", in_use=True).backing_file


def _pull(platform: Platform, domain: libvirt.virDomain, disk_id: str, watch: Watch, pause: threading.Event) -> None:
    if platform.pull(domain, disk_id) is None:
        platform.begin_pull(domain, disk_id)
    started = False
    at = 0
    try:
        while (progress := platform.pull(domain, disk_id)) is not None:
            done, total = progress
            if not started:
                watch.start(f"making disk {disk_id} independent of the replica", total)
                started = True
            watch.advance(max(0, done - at))
            at = max(at, done)
            pause.wait(_LOOK_SECONDS)
    except BaseException:
        platform.abort_pull(domain, disk_id)
        raise


def _rebase(path: Path, watch: Watch) -> None:
    """The same for a machine that is off."""
    with qemu_errors(path):
        size = img.info(path, "qcow2").virtual_size
        watch.start(f"making {path.name} independent of the replica", size)
        watch.check()
        command = ["qemu-img", "rebase", "-q", "-t", "writeback", "-f", "qcow2", "-b", "", str(path)]
        run(command, what=f"make {path} independent of its layers", timeout=_LEAST_SECONDS + size / _SLOWEST)
    fsync_file(path)
    watch.advance(size)
