"""What keeps a machine's disks frozen: a backup job, or only the fact that the machine is off."""

from __future__ import annotations

import contextlib
import errno
import logging
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from asr_driver_libvirt.host import paused, stalled
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.source import backup_jobs
from asr_driver_libvirt.source.view import READ_SECONDS, Frozen, contexts
from asr_driver_libvirt.source.watch import ViewWatch, Watched
from asr_driver_libvirt.xml.backup import NbdServer
from asr_driver_libvirt.xml.domain import DomainDisk
from asr_driver_libvirt.xml.mark import CheckpointName
from asr_storage.nbd.client import NbdClient, NbdError, TlsFiles
from asr_storage.qemu.nbd_server import QemuNbd
from asr_storage.qemu.process import QemuError
from asrcore.errors import (
    AccessDenied,
    AsrError,
    DriverFailed,
    MachineNotFound,
    SiteUnreachable,
    SourcePaused,
    SourceWasPaused,
    ViewLost,
)

__all__ = ["FilesFrozen", "JobFrozen", "LateFrozen", "image_stamp"]

_log = logging.getLogger(__name__)
# The watch has other views to look after: what takes longer is looked at again.
_WATCH_SECONDS = 0.5


class JobFrozen(Frozen, Watched):
    """A pull-mode backup job of QEMU. `held`: the machine is off and was started for this, processors stopped.

    The job must not end while a client connects: a QEMU 7.2 whose NBD server is stopped with a client in negotiation
    waits for that client for ever, and its guest hangs (seen with 7.2.22 of Debian 12, which drops a silent client
    after 10 s; a client that connected 15 s before does no harm).
    """

    def __init__(
        self,
        host: LibvirtHost,
        machine_id: str,
        name: CheckpointName,
        server: NbdServer,
        *,
        held: bool,
        places: Sequence[str] = (),
        watch: ViewWatch | None = None,
    ) -> None:
        """`places`: directories of its scratch files, which `watch` looks after."""
        self.places = places
        self._watch = watch
        self._error: AsrError | None = None
        self._host = host
        self._machine_id = machine_id
        self._name = name
        self._server = server
        self._held = held
        self._closed = False
        self._changed = threading.Condition()
        self._connecting = 0
        self._connected_by = 0.0
        """When the last connection is made or has failed, by the monotonic clock, once the view is closed."""
        host.reading.add(str(name))
        if watch is not None:
            watch.begin(self)

    def connect(self, disk_id: str, bitmap: str) -> NbdClient:
        """To QEMU's server; libvirt calls each export as its disk."""
        with self._changed:
            if self._closed:
                raise self._lost("it was closed")
            self._connecting += 1
        try:
            return self._connect(disk_id, bitmap)
        finally:
            with self._changed:
                self._connecting -= 1
                self._changed.notify_all()

    def _connect(self, disk_id: str, bitmap: str) -> NbdClient:
        asked = contexts(self.bitmap_name(disk_id, bitmap) if bitmap else "")
        server = self._server
        if server.socket:
            return NbdClient.connect_unix(server.socket, disk_id, contexts=asked, timeout=READ_SECONDS)
        tls = None
        if server.tls and self._host.settings.nbd_tls is not None:
            tls = TlsFiles(self._host.settings.nbd_tls)
        return NbdClient.connect_tcp(server.host, server.port, disk_id, contexts=asked, timeout=READ_SECONDS, tls=tls)

    def bitmap_name(self, disk_id: str, base: str) -> str:
        """libvirt merges the checkpoint's bitmap into a frozen one of this name."""
        return f"backup-{disk_id}"

    def _running(self) -> bool:
        backup = backup_jobs.current_backup(self._host.domain(self._machine_id))
        return backup is not None and backup.name == self._name

    def explain(self, problem: NbdError) -> AsrError:
        """Asks libvirt whether the job still exists; answered within the keep-alive's 20 s."""
        if self._closed:
            return self._lost(f"it was closed while it was read ({problem})")
        if not self._host.connected:
            return SiteUnreachable(site=self._host.name, detail=str(problem))
        try:
            with self._host.guard("reading a frozen disk", self._machine_id):
                if not self._running():
                    return self._lost(f"the backup job has ended ({problem})")
        except AsrError as error:
            return error
        if problem.errno in (errno.EIO, errno.ENOSPC, errno.EINVAL):
            return DriverFailed(operation="reading a frozen disk", site=self._host.name, detail=str(problem))
        if "certificate" in str(problem).lower():  # GnuTLS has no number for it
            return AccessDenied(site=self._host.name, detail=str(problem))
        return SiteUnreachable(site=self._host.name, detail=f"disks cannot be read: {problem}")

    def _lost(self, detail: str) -> AsrError:
        return self._error or ViewLost(machine=self._machine_id, detail=detail)

    def confirm(self) -> None:
        """The job is still there: libvirt ends it when QEMU stops, and when a scratch file could not be written."""
        if self._closed:
            raise self._lost("it was closed")
        with self._host.guard("confirming a frozen view", self._machine_id):
            if not self._running():
                raise self._lost("the backup job has ended")

    def end_early(self, reason: str) -> None:
        """End the job, and explain the view's end by it. The watch looks again at one that takes long."""
        self._end(_WATCH_SECONDS, _WATCH_SECONDS, ViewLost(machine=self._machine_id, detail=reason))

    def end_if_stalled(self) -> None:
        """End the job if the machine was paused for lack of space since. Raises libvirtError, AsrError."""
        domain = self._host.domain(self._machine_id)
        if stalled.is_stalled(domain) and self._running() and backup_jobs.has_stopped(domain):
            detail = f"scratch files are at {', '.join(self.places) or 'unknown places'}"
            error = SourceWasPaused(machine=self._machine_id, detail=detail)
            if self._end(_WATCH_SECONDS, backup_jobs.TIDY_SECONDS, error) and (why := stalled.why(domain)):
                self._error = SourcePaused(machine=self._machine_id, site=self._host.name, detail=why)

    def close(self) -> None:
        """End the job if it is still this driver's. Over a cut link nothing is tried: the watch ends it when the host
        answers again, or a later view or keep_marks."""
        self._end(READ_SECONDS, backup_jobs.TIDY_SECONDS)

    def _end(self, connecting: float, wait: float, error: AsrError | None = None) -> bool:
        """Waits `connecting` seconds for connections that are being made, then `wait` seconds for the job's end.
        Whether it has ended; if not, the watch tries again."""
        with self._changed:
            if self._closed:
                return False
            self._error = error
            self._closed = True
            self._connected_by = time.monotonic() + READ_SECONDS
            self._changed.wait_for(lambda: not self._connecting, connecting)
        self._host.reading.discard(str(self._name))
        if self._watch is not None:
            self._watch.end(self)
        problem: object = "its site cannot be reached"
        if self._is_connecting():
            problem = "a connection to it is being made"
        elif self._host.connected:
            try:
                with self._host.guard("closing a frozen view", self._machine_id):
                    self._end_job(wait)
                self._ended()
                return True
            except AsrError as failed:
                problem = failed
        _log.warning("view of %s was not closed, it is tried again: %s", self._machine_id, problem)
        if self._watch is not None:
            self._watch.owe(self)
        return False

    def _is_connecting(self) -> bool:
        """Whether the job must not end yet."""
        with self._changed:
            return self._connecting > 0 and time.monotonic() < self._connected_by

    def _end_job(self, wait: float) -> None:
        domain = self._host.domain(self._machine_id)
        backup = backup_jobs.current_backup(domain)
        ours = backup is not None and backup.name == self._name
        if self._held and (ours or backup is None):
            paused.release(domain, self._host.settings.owner)
            if ours and domain.isActive():  # its user resumed it
                backup_jobs.end_backup(self._host, domain, wait)
        elif ours:
            backup_jobs.end_backup(self._host, domain, wait)
        elif backup is None:
            stalled.resume(domain, self._host.settings.owner)

    def _ended(self) -> None:
        if self._watch is not None:
            self._watch.guard.ended(str(self._name))
            if self._held:
                self._watch.guard.ended(self._machine_id)

    def end_late(self) -> bool:
        """Again, unless the view was opened again meanwhile. Raises libvirtError, AsrError."""
        if self._is_connecting():
            return False
        try:
            if str(self._name) not in self._host.reading:
                self._end_job(_WATCH_SECONDS)
                self._ended()
        except MachineNotFound:
            self._ended()
        return True


class FilesFrozen(Frozen):
    """The image files of a machine that is off, on this host: read beside whoever else may open them.

    Nothing is locked, so the user can start the machine at any moment; `confirm` then reports it.
    """

    def __init__(
        self,
        host: LibvirtHost,
        machine_id: str,
        disks: Mapping[str, DomainDisk],
        stamps: Mapping[str, str],
        bases: Mapping[str, str],
    ) -> None:
        self._host = host
        self._machine_id = machine_id
        self._disks = disks
        self._stamps = stamps
        self._bases = bases
        self._lock = threading.Lock()
        self._servers: dict[str, QemuNbd] = {}
        self._closed = False

    def connect(self, disk_id: str, bitmap: str) -> NbdClient:
        """To a qemu-nbd that is started when the disk is first read."""
        try:
            with self._lock:
                if self._closed:
                    raise ViewLost(machine=self._machine_id, detail="it was closed")
                if disk_id not in self._servers:
                    self._servers[disk_id] = self._serve(disk_id)
                socket = self._servers[disk_id].socket
        except QemuError as problem:
            raise DriverFailed(operation=f"opening {disk_id}", site=self._host.name, detail=str(problem)) from problem
        return NbdClient.connect_unix(socket, disk_id, contexts=contexts(bitmap), timeout=READ_SECONDS)

    def _serve(self, disk_id: str) -> QemuNbd:
        disk = self._disks[disk_id]
        server = QemuNbd(
            Path(disk.path), disk.format, bitmap=self._bases.get(disk_id) or None, force_share=True, export=disk_id
        )
        server.start()
        return server

    def bitmap_name(self, disk_id: str, base: str) -> str:
        """The bitmap has the checkpoint's name."""
        return base

    def explain(self, problem: NbdError) -> AsrError:
        """The view is lost when the machine is no longer off."""
        try:
            self.confirm()
        except AsrError as error:
            return error
        return DriverFailed(operation="reading a disk", site=self._host.name, detail=str(problem))

    def confirm(self) -> None:
        """The machine is off still, and its images are what they were at the start."""
        if self._closed:
            raise ViewLost(machine=self._machine_id, detail="it was closed")
        with self._host.guard("confirming a view", self._machine_id):
            if self._host.domain(self._machine_id).isActive():
                raise ViewLost(machine=self._machine_id, detail="the machine was started while it was read")
        for disk_id, stamp in self._stamps.items():
            if image_stamp(self._disks[disk_id].path) != stamp:
                detail = f"the image of {disk_id} was written while it was read"
                raise ViewLost(machine=self._machine_id, detail=detail)

    def close(self) -> None:
        """Stop the servers."""
        with self._lock:
            self._closed = True
            servers, self._servers = list(self._servers.values()), {}
        for server in servers:
            with contextlib.suppress(QemuError):
                server.close()


class LateFrozen(Frozen):
    """A machine that stayed off unchanged: nothing is opened until something is read."""

    def __init__(self, open_: Callable[[], Frozen], unchanged: Callable[[], None]) -> None:
        """`unchanged` raises ViewLost when that is not so any more."""
        self._open = open_
        self._unchanged = unchanged
        self._lock = threading.Lock()
        self._inner: Frozen | None = None

    def _get(self) -> Frozen:
        with self._lock:
            if self._inner is None:
                self._unchanged()
                self._inner = self._open()
            return self._inner

    def connect(self, disk_id: str, bitmap: str) -> NbdClient:
        """Opens first."""
        return self._get().connect(disk_id, bitmap)

    def bitmap_name(self, disk_id: str, base: str) -> str:
        """As where it is read from."""
        return self._get().bitmap_name(disk_id, base)

    def explain(self, problem: NbdError) -> AsrError:
        """As where it is read from."""
        return self._get().explain(problem)

    def confirm(self) -> None:
        """Unchanged, or frozen by now."""
        with self._lock:
            inner = self._inner
        if inner is None:
            self._unchanged()
        else:
            inner.confirm()

    def close(self) -> None:
        """Close what was opened."""
        with self._lock:
            inner = self._inner
        if inner is not None:
            inner.close()


def image_stamp(path: str) -> str:
    """The state of a local file: equal stamps mean that it was not written. "" where that is unknown: there is no such
    file, or it is a device, whose times do not follow its content."""
    try:
        state = Path(path).stat()
    except OSError:
        return ""
    if not stat.S_ISREG(state.st_mode):
        return ""
    return f"file:{state.st_mtime_ns}.{state.st_size}.{state.st_ino}"
