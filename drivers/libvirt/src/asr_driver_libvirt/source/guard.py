"""A small process that ends what a killed engine leaves at a source: backup jobs, and machines held to be read.

An engine starts one for each site at its first view, in a session of its own, and reports to it through a pipe what is
about to be opened and what has ended. The kernel closes the pipe when the engine ends, however that happens. From then
on the guard ends each job that is left, when no client has read it for `GRACE_SECONDS` (so a restarted engine can still
open the same view again), or at once when space for its scratch files runs short, and exits. It also acts on low space
while the engine is there but does nothing (stopped, or without processor time): at half of the engine's own limit.

It runs on the engine's host, so it does not help when that host or the link is lost: see *What a lost engine leaves* in
the driver's README. Until the engine ends it uses the standard library only: 10 MiB instead of 40.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import syslog
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from asr_driver_libvirt.source import reserve

if TYPE_CHECKING:
    from asr_driver_libvirt.host.connection import LibvirtHost
    from asr_driver_libvirt.settings import SiteSettings
    from asr_driver_libvirt.xml.backup import NbdServer

__all__ = ["GRACE_SECONDS", "Guard", "main"]

_log = logging.getLogger(__name__)
GRACE_SECONDS = 60.0
TICK_SECONDS = 1.0
RETRY_SECONDS = 10.0
# A host that does not answer for so long has most likely restarted, and nothing is left there.
GIVE_UP_SECONDS = 24 * 3600.0
# For a guard that reads slowly. One that does not read at all is replaced.
WRITE_SECONDS = 2.0
# Forks before it imports anything: the engine waits for this process, and the guard is no child of it. Prints the
# guard's process ID. Whoever reads the engine's output must not wait for the guard, so that is not its output.
_PROGRAM = """\
import os
if pid := os.fork():
    os.write(1, b"%d" % pid)
    os._exit(0)
os.dup2(2, 1)
from asr_driver_libvirt.source.guard import main
main()
"""

_Entry = dict[str, Any]


class Guard:
    """The engine's side."""

    def __init__(self, site: str, settings: SiteSettings) -> None:
        self._first = {
            "site": site,
            "settings": {
                "uri": settings.uri,
                "user": settings.user,
                "password": settings.password,
                "owner": settings.owner,
            },
            "local": settings.local,
            "reserve": settings.scratch_reserve,
        }
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._pipe: weakref.finalize[..., Guard] | None = None
        self._fd = -1
        self._pid = 0

    def hold(self, machine: str, *, started: bool) -> None:
        """A machine that is off is about to be started with its processors stopped, or (`started`) has been."""
        self._add(machine, {"machine": machine, "view": "", "held": True, "starting": not started, "places": []})

    def view(self, machine: str, name: str, *, held: bool, places: Sequence[str]) -> None:
        """A backup job of that name is about to begin, or was taken over."""
        self._add(name, {"machine": machine, "view": name, "held": held, "starting": False, "places": list(places)})

    def _add(self, key: str, entry: _Entry) -> None:
        with self._lock:
            self._entries[key] = entry
            self._send([{"add": key, **entry}])

    def ended(self, key: str) -> None:
        """Nothing is left of that view, or of that held machine."""
        with self._lock:
            if self._entries.pop(key, None) is not None:
                self._send([{"remove": key}])

    def close(self) -> None:
        """What is not reported as ended counts as left over from now on."""
        with self._lock:
            self._close()
            self._entries.clear()

    def _close(self) -> None:
        if self._pipe is not None:
            self._pipe()
            self._pipe = None

    def _send(self, messages: Iterable[_Entry]) -> None:
        try:
            if self._pipe is None:
                self._start()
                messages = self._all()
            try:
                self._write(messages)
            except OSError:  # it was killed, or does not run
                self._abandon()
                self._start()
                self._write(self._all())
        except OSError as problem:
            self._abandon()
            _log.warning("the guard of site %s cannot be started: %s", self._first["site"], problem)

    def _all(self) -> list[_Entry]:
        return [self._first, *({"add": key, **entry} for key, entry in self._entries.items())]

    def _abandon(self) -> None:
        """Kill it before its pipe is closed: it would take this process for dead, and end views that are in use."""
        if self._pipe is None:
            return
        with contextlib.suppress(OSError):
            process = os.pidfd_open(self._pid)
            try:
                # No other process has this pipe. The number alone may be another's by now.
                pipe = os.stat(f"/proc/{self._pid}/fd/0")  # noqa: PTH116 - no file
                if os.path.samestat(pipe, os.fstat(self._fd)):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            finally:
                os.close(process)
        self._close()

    def _write(self, messages: Iterable[_Entry]) -> None:
        data = "".join(json.dumps(message) + "\n" for message in messages).encode()
        end = time.monotonic() + WRITE_SECONDS
        while data:
            if not select.select([], [self._fd], [], max(0.0, end - time.monotonic()))[1]:
                raise BlockingIOError
            data = data[os.write(self._fd, data) :]

    def _start(self) -> None:
        reading, writing = os.pipe()
        try:
            started = subprocess.run(
                # -P: `-c` would put the working directory before everything else, and its files would run as root.
                [sys.executable, "-P", "-c", _PROGRAM],
                stdin=reading,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path))},
                check=True,
            )
            self._pid = int(started.stdout)
        except (OSError, ValueError, subprocess.SubprocessError) as problem:
            os.close(writing)
            raise OSError(str(problem)) from problem
        finally:
            os.close(reading)
        os.set_blocking(writing, False)
        self._fd = writing
        self._pipe = weakref.finalize(self, os.close, writing)


# -- the process -----------------------------------------------------------------------------------------------------


class _Process:
    def __init__(self, first: _Entry, grace: float) -> None:
        self._first = first
        self._grace = grace
        self._entries: dict[str, _Entry] = {}
        self._unread: dict[str, float] = {}
        self._retry: dict[str, float] = {}
        self._host: LibvirtHost | None = None
        self._terminated = False
        self._over: float | None = None  # when the engine ended

    def run(self, rest: bytes) -> None:
        """Until the engine and everything that it left have ended."""
        signal.signal(signal.SIGTERM, self._terminate)
        waiting = rest
        while True:
            if self._over is None:
                ready = select.select([0], [], [], TICK_SECONDS if self._watches else None)[0]
                if ready:
                    data = os.read(0, 65536)
                    waiting = self._take(waiting + data)
                    if not data:
                        self._over = time.monotonic()
            else:
                time.sleep(TICK_SECONDS)
            if not self._entries:
                if self._over is not None:
                    return
                continue
            self._look()
            if self._over is not None and time.monotonic() - self._over > GIVE_UP_SECONDS:
                return

    @property
    def _watches(self) -> bool:
        return bool(self._first["local"] and self._entries)

    def _terminate(self, *_: object) -> None:
        # The service manager ends what is left of a service: there is no time to wait for another engine.
        self._terminated = True

    def _take(self, data: bytes) -> bytes:
        *lines, rest = data.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "remove" in message:
                self._entries.pop(message["remove"], None)
            else:
                self._entries[message.pop("add")] = message
        return rest

    def _look(self) -> None:
        now = time.monotonic()
        for key, entry in list(self._entries.items()):
            low = self._first["local"] and [place for place in entry["places"] if self._is_low(place, entry)]
            if not low and self._over is None:
                continue
            if now < self._retry.get(key, now):
                continue
            try:
                if low or self._is_left(key, entry, now):
                    self._end(entry)
                    del self._entries[key]
            except Exception as problem:  # noqa: BLE001 - whatever it is, it is tried again
                syslog.syslog(syslog.LOG_WARNING, f"{entry['machine']}: {problem}")
                self._retry[key] = now + RETRY_SECONDS

    def _is_low(self, place: str, entry: _Entry) -> bool:
        """At half of the engine's limit while it is there: otherwise it is the engine that ends the job."""
        with contextlib.suppress(OSError):
            state = os.statvfs(place)
            total, free = state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize
            configured = self._first["reserve"]
            before = entry.setdefault("before", {}).setdefault(place, free)
            limit = reserve.limit(reserve.usual(configured, total), reserve.least(configured, total), before)
            return bool(free < (limit / 2 if self._over is None else limit))
        return False

    def _is_left(self, key: str, entry: _Entry, now: float) -> bool:
        """Whether no client has read it for long enough, or its machine was deleted."""
        from asrcore.errors import MachineNotFound  # noqa: PLC0415 - see the module's text

        if self._terminated:
            return True
        try:
            server = self._server(entry)
        except MachineNotFound:
            return True
        if server is not None and _clients(server):
            self._unread[key] = now
        return now - self._unread.setdefault(key, self._over or now) >= self._grace

    def _connected(self) -> LibvirtHost:
        from asr_driver_libvirt.host.connection import LibvirtHost  # noqa: PLC0415 - see the module's text
        from asr_driver_libvirt.settings import SiteSettings  # noqa: PLC0415

        if self._host is None:
            self._host = LibvirtHost(self._first["site"], SiteSettings.parse(self._first["settings"]))
        return self._host

    def _server(self, entry: _Entry) -> NbdServer | None:
        from asr_driver_libvirt.source import backup_jobs  # noqa: PLC0415

        domain = self._connected().domain(entry["machine"])
        backup = backup_jobs.current_backup(domain) if domain.isActive() else None
        return None if backup is None or backup.name is None else backup.server

    def _end(self, entry: _Entry) -> None:
        from asr_driver_libvirt.source import left_over  # noqa: PLC0415
        from asrcore.errors import MachineNotFound  # noqa: PLC0415

        with contextlib.suppress(MachineNotFound):
            host = self._connected()
            domain = host.domain(entry["machine"])
            done = left_over.end(host, domain, entry["view"], held=entry["held"], starting=entry["starting"])
            if done:
                syslog.syslog(syslog.LOG_WARNING, f"{domain.name()}: {done}, which a process that has ended left over")


def _clients(server: NbdServer) -> int:
    """Connections to QEMU's server from this host. None are seen from other hosts, nor to a socket of another network
    namespace."""
    if server.socket:
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - a table, not a file
            rows = [line.split(None, 7) for line in file]
        return sum(len(row) == 8 and row[7].strip() == server.socket and row[5] == "03" for row in rows)
    ends = {f"{address}:{server.port:04X}" for address in _addresses(server.host)}
    count = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as file:  # noqa: PTH123
            count += sum(row[3] == "01" and bool(ends & set(row[1:3])) for row in (line.split() for line in file))
    return count


def _addresses(host: str) -> set[str]:
    """As the kernel writes them: words of four bytes in this processor's order, IPv4 also as IPv6."""
    found = set()
    with contextlib.suppress(OSError):
        for family, *_, place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            packed = socket.inet_pton(family, str(place[0]).partition("%")[0])
            kinds = [packed] if family == socket.AF_INET6 else [packed, bytes(10) + b"\xff\xff" + packed]
            for kind in kinds:
                words = struct.unpack(f"={len(kind) // 4}I", kind)
                found.add("".join(f"{word:08X}" for word in words))
    return found


def main() -> None:
    """What the guard runs."""
    syslog.openlog("asr-guard", syslog.LOG_PID, syslog.LOG_DAEMON)
    data = b""
    while b"\n" not in data:
        piece = os.read(0, 65536)
        if not piece:
            return
        data += piece
    line, _, rest = data.partition(b"\n")
    first = json.loads(line)
    process = _Process(first, float(os.environ.get("ASRCORE_GUARD_GRACE", GRACE_SECONDS)))
    process.run(process._take(rest))
