"""The calls of the process server: the source part of the driver contract, by name, in plain values.

Times are sent as ages (seconds before the answer), since the two clocks may differ; ranges as [offset, length].
"""

from __future__ import annotations

import os
import resource
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from asr_mobility import facts
from asr_mobility.channel import Answer, CallFailed
from asr_mobility.disks import Disk, Reader, digests, find_disks
from asr_mobility.freeze import Freeze, FreezeError, mounts_on
from asr_mobility.tracker import Run, Tracker, remove_pins

__all__ = ["Budget", "Service"]

MIB = 1 << 20
MAX_READ = 2 * MIB
DIGEST_READ = 64 * MIB
SCRIPT_SECONDS = 60.0
_QUIET_ROUNDS = 3
_KEPT_FREEZES = 1000
_ZEROES = bytes(MAX_READ)


class Budget:
    """Bytes that may be read for the process server: at most `rate` a second, with a burst of half a second."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, count: int) -> None:
        """Wait until they may be read; does not wait without a rate."""
        if self._rate <= 0:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - 0.5) + count / self._rate
            wait = self._free_at - now
        if wait > 0:
            time.sleep(wait)


class _Watched:
    """A disk with its tracking, or with the reason why there is none."""

    def __init__(self, disk: Disk, tracker: Tracker | None, reason: str) -> None:
        self.disk, self.tracker, self.reason = disk, tracker, reason


class _Held:
    """Content of the changed ranges at the instant of a freeze, in memory until the process server has it."""

    def __init__(self) -> None:
        self.pieces: dict[str, list[tuple[int, bytes]]] = {}
        self.size = 0
        """Of all disks: the memory limit is the server's, whatever the number of disks."""


class Service:
    """Serves one process server at a time; a call that changes something waits for the one before it."""

    def __init__(self, home: Path, *, capture_memory: int = 64 * MIB, bandwidth: float = 0) -> None:
        """`home`: directory of the administrator's scripts. `capture_memory`: bytes that may be held at a freeze.
        `bandwidth`: bytes per second, 0 for no limit."""
        self._home = home
        self._memory = capture_memory
        self._budget = Budget(bandwidth)
        self._lock = threading.Lock()
        self._readers = threading.local()
        self._watched: dict[str, _Watched] = {}
        self._held: dict[str, _Held] = {}
        self._freezes: list[float] = []
        self._started = time.monotonic()
        self._calls: dict[str, Callable[..., Answer]] = {
            "status": self._status,
            "machine": lambda: (facts.machine(), b""),
            "readiness": lambda: (facts.readiness(), b""),
            "open": self._open,
            "settle": self._settle,
            "held": self._read_held,
            "release": self._release,
            "read": self._read,
            "read-each": self._read_each,
            "digests": self._digests,
            "keep": self._keep,
            "power-off": self._power_off,
            "renew": self._renew,
        }

    def serve(self, call: str, arguments: Mapping[str, Any]) -> Answer:
        """Answer one request. Raises CallFailed."""
        known = self._calls.get(call)
        if known is None:
            raise CallFailed("unsupported-operation", {"driver": "physical", "operation": call})
        return known(**arguments)

    # -- disks and their tracking

    def _refresh(self) -> dict[str, _Watched]:
        """Read the current list of disks; those that are new or have another size are tracked from now on."""
        now: dict[str, _Watched] = {}
        for disk in find_disks():
            known = self._watched.get(disk.id)
            if known is not None and known.tracker and known.disk.is_same(disk):
                now[disk.id] = known
                continue
            try:
                tracker: Tracker | None = Tracker(disk.path, disk.size, disk.identity)
                reason = ""
            except (OSError, ValueError) as problem:
                tracker, reason = None, f"this kernel cannot track it: {problem}"
            now[disk.id] = _Watched(disk, tracker, reason)
        before, self._watched = self._watched, now
        for key, item in before.items():
            if item.tracker and now.get(key) is not item:
                item.tracker.close()
        return now

    def _tracking(self, item: _Watched, since: Mapping[str, Sequence[Any]] | None) -> tuple[str, str]:
        if item.tracker is None:
            return "none", item.reason
        if since is None:
            return "none", ""
        mark = since.get(item.disk.id)
        if mark is None:
            return "new", ""
        if item.tracker.knows(mark[0], int(mark[1])):
            return "changed", ""
        if mark[2] != facts.boot_id():
            return "lost", "the server was restarted"
        if item.tracker.reset:
            return "lost", "its tracking was restarted: " + item.tracker.reset
        return "lost", "its tracking was restarted (it was grown, replaced or removed from tracking)"

    # -- views

    def _open(self, since: Mapping[str, Sequence[Any]] | None) -> Answer:
        """Begin a view: its disks are read as they are, and `settle` reports what is written from now on."""
        with self._lock:
            self._held.clear()
            watched = self._refresh()
            tracking = {key: self._tracking(item, since) for key, item in watched.items()}
            marks = self._turn(watched)
            disks = [
                {
                    "id": key,
                    "name": item.disk.name,
                    "size": item.disk.size,
                    "tracking": tracking[key][0],
                    "reason": tracking[key][1],
                    "changed": self._changed(item, since, key) if tracking[key][0] == "changed" else [],
                }
                for key, item in watched.items()
            ]
            return {"marks": marks, "disks": disks, "machine": facts.machine()}, b""

    def _changed(self, item: _Watched, since: Mapping[str, Sequence[Any]] | None, key: str) -> list[list[int]]:
        assert since is not None
        assert item.tracker is not None
        return _ranges(item.tracker.changed_since(int(since[key][1])), item)

    def _turn(self, watched: Mapping[str, _Watched]) -> dict[str, list[Any]]:
        for item in watched.values():
            if item.tracker:
                item.tracker.begin_turn()
                item.tracker.take()
        return self._marks(watched)

    @staticmethod
    def _marks(watched: Mapping[str, _Watched]) -> dict[str, list[Any]]:
        boot = facts.boot_id()
        return {
            key: [item.tracker.generation, item.tracker.last, boot] for key, item in watched.items() if item.tracker
        }

    def _settle(self, view: str, marks: Mapping[str, Sequence[Any]], freeze_limit: float) -> Answer:
        """What was written since these marks. If it is little, it is captured at this instant and `live` is false; else
        the caller reads it now, and calls this again with the new marks."""
        with self._lock:
            watched = {key: item for key, item in self._refresh().items() if key in marks}
            for key, mark in marks.items():
                item = watched.get(key)
                if item is None or item.tracker is None or not item.tracker.knows(mark[0], int(mark[1])):
                    why = item.tracker.reset if item and item.tracker else ""
                    raise _view_lost(f"tracking of disk {key} was interrupted" + (why and ": " + why))
            if not watched:
                raise _view_lost("no disk of the server can be tracked, so its state cannot be captured")
            numbers = {key: int(mark[1]) for key, mark in marks.items()}
            due = sum(item.tracker.pending() << item.tracker.shift for item in watched.values() if item.tracker)
            if due <= self._memory // 2:
                answer = self._capture(view, watched, numbers, freeze_limit)
            else:
                answer = {"live": True, "marks": self._turn(watched)}
            answer["changed"] = {
                key: _ranges(item.tracker.changed_since(numbers[key]), item)
                for key, item in watched.items()
                if item.tracker
            }
            answer["machine"] = facts.machine()
            return answer, b""

    def _capture(
        self, view: str, watched: Mapping[str, _Watched], since: Mapping[str, int], freeze_limit: float
    ) -> dict[str, Any]:
        """Freeze, copy what has changed since these marks into memory, thaw."""
        scripts = self._script("pre-freeze")
        held = _Held()
        readers: dict[str, Reader] = {}
        try:
            readers.update((key, Reader(item.disk.path, item.disk.size)) for key, item in watched.items())
            freeze = Freeze(mounts_on([item.disk.name for item in watched.values()]), freeze_limit)
            with freeze:
                still = self._take_in(held, watched, since, readers, freeze)
                self._prove(watched)
                instant = freeze.began
        except FreezeError as problem:
            raise _view_lost(str(problem)) from problem
        finally:
            for reader in readers.values():
                reader.close()
            scripts = self._script("post-thaw") and scripts
        self._freezes = [*self._freezes, freeze.held][-_KEPT_FREEZES:]
        self._held[view] = held
        consistency = "crash"
        if still and not freeze.not_frozen:
            consistency = "application" if scripts else "filesystem"
        return {
            "live": False,
            "age": time.monotonic() - instant,
            "consistency": consistency,
            "marks": self._marks(watched),
            "frozen_seconds": freeze.held,
            "not_frozen": [[mount.path, why] for mount, why in freeze.not_frozen],
        }

    def _take_in(
        self,
        held: _Held,
        watched: Mapping[str, _Watched],
        since: Mapping[str, int],
        readers: Mapping[str, Reader],
        freeze: Freeze,
    ) -> bool:
        """Read all that has changed. Returns whether nothing was written meanwhile: swap, vfat and programs that write
        to a disk without a file system are not stopped by a freeze."""
        for item in watched.values():
            if item.tracker:
                item.tracker.begin_turn()
        first = True
        for _ in range(_QUIET_ROUNDS):
            fresh = {key: item.tracker.take() for key, item in watched.items() if item.tracker}
            for key, item in watched.items():
                assert item.tracker is not None
                runs = item.tracker.changed_since(since[key]) if first else fresh[key]
                self._read_runs(held, key, item, runs, readers[key], freeze)
            first = False
            if not any(item.tracker.pending() for item in watched.values() if item.tracker):
                return True
        return False

    @staticmethod
    def _prove(watched: Mapping[str, _Watched]) -> None:
        """Nothing was written to these disks that is not noted: checked while they are quiet, so to the sector."""
        for key, item in watched.items():
            if item.tracker and not item.tracker.check():
                raise FreezeError(f"disk {key}: {item.tracker.reset}; the next cycle compares the disk")

    def _read_runs(
        self, held: _Held, key: str, item: _Watched, runs: Sequence[Run], reader: Reader, freeze: Freeze
    ) -> None:
        pieces = held.pieces.setdefault(key, [])
        for offset, length in _ranges(runs, item):
            for at in range(offset, offset + length, MIB):
                if freeze.left() <= 0:
                    raise FreezeError("reading the changes took longer than the freeze limit")
                count = min(MIB, offset + length - at)
                held.size += count
                if held.size > self._memory:
                    raise FreezeError(f"the changes exceed the memory for a freeze ({self._memory / MIB:g} MiB)")
                pieces.append((at, bytes(reader.read(at, count))))

    def _script(self, name: str) -> bool:
        """Run the administrator's script of that name; returns whether it exists and succeeded."""
        path = self._home / name
        if not os.access(path, os.X_OK):
            return False
        try:
            script = subprocess.Popen([str(path)], stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError:
            return False
        try:
            return script.wait(SCRIPT_SECONDS) == 0
        except subprocess.TimeoutExpired:
            os.killpg(script.pid, signal.SIGKILL)  # with all that it has started
            script.wait()
            return False

    # -- reading

    def _read_held(self, view: str, disk: str, start: int) -> Answer:
        """Pieces of a captured view from the one with this number on: their places, and their content as one body."""
        held = self._held.get(view)
        if held is None:
            raise _view_lost("its captured content is gone")
        pieces = held.pieces.get(disk, [])
        places, body = [], bytearray()
        for offset, data in pieces[start:]:
            if body and len(body) + len(data) > MAX_READ:
                break
            places.append([offset, len(data)])
            body += data
        self._budget.take(len(body))
        return {"places": places, "more": start + len(places) < len(pieces)}, body

    def _release(self, view: str) -> Answer:
        """The process server has the captured content, or does not need it."""
        self._held.pop(view, None)
        return {}, b""

    def _reader(self, disk: str) -> Reader:
        item = self._watched.get(disk)
        if item is None:  # this service was restarted since
            with self._lock:
                item = self._refresh().get(disk)
        if item is None:
            raise _view_lost(f"disk {disk} no longer exists")
        mine: dict[str, tuple[_Watched, Reader]] = self._readers.__dict__
        known = mine.get(disk)
        if known is None or known[0] is not item:
            if known is not None:
                known[1].close()
            known = mine[disk] = (item, Reader(item.disk.path, item.disk.size, MAX_READ))
        return known[1]

    def _read(self, disk: str, offset: int, length: int) -> Answer:
        """Content as it is now."""
        if not 0 < length <= MAX_READ:
            raise CallFailed("driver-failed", {"operation": "read", "site": "", "detail": f"length {length}"})
        self._budget.take(length)
        content = bytes(self._reader(disk).read(offset, length))
        # Much of a disk is zeroes; detecting them costs less than encrypting them.
        return ({"zero": True}, b"") if content == _ZEROES[:length] else ({}, content)

    def _read_each(self, disk: str, ranges: Sequence[Sequence[int]]) -> Answer:
        """Content of several ranges as it is now: which of them are zeroes, and the content of the others."""
        total = sum(length for _, length in ranges)
        if total > MAX_READ or any(length <= 0 for _, length in ranges):
            raise CallFailed("driver-failed", {"operation": "read-each", "site": "", "detail": f"length {total}"})
        self._budget.take(total)
        reader, zero, body = self._reader(disk), [], bytearray()
        for number, (offset, length) in enumerate(ranges):
            content = bytes(reader.read(offset, length))
            if content == _ZEROES[:length]:
                zero.append(number)
            else:
                body += content
        return {"zero": zero}, body

    def _digests(self, disk: str, offset: int, length: int) -> Answer:
        """Digests of the blocks of a range as they are now."""
        if not 0 < length <= DIGEST_READ:
            raise CallFailed("driver-failed", {"operation": "digests", "site": "", "detail": f"length {length}"})
        self._budget.take(length)
        return {}, digests(self._reader(disk), offset, length)

    # -- the rest

    def _keep(self, marks: Sequence[Mapping[str, Sequence[Any]]]) -> Answer:
        """Drop what is only needed for other marks; with none, tracking ends."""
        with self._lock:
            if not marks:
                for item in self._watched.values():
                    if item.tracker:
                        item.tracker.close()
                self._watched = {}
                self._held.clear()
                remove_pins()
                return {}, b""
            for key, item in self._refresh().items():
                if item.tracker is None:
                    continue
                known = [int(mark[key][1]) for mark in marks if key in mark and mark[key][0] == item.tracker.generation]
                if known:
                    item.tracker.keep(min(known))
            return {}, b""

    def _renew(self, pem: str) -> Answer:
        """Store a new key and certificate; they are used from the next connection on."""
        path = self._home / "agent.pem"
        fresh = path.with_name("agent.pem.new")
        with suppress(FileNotFoundError):
            fresh.unlink()
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(str(fresh))  # else it could never connect again
        fresh.replace(path)
        directory = os.open(self._home, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return {}, b""

    def _power_off(self, graceful: bool) -> Answer:
        """Shut the server down; without grace at once, as at a power cut, with the data already on its disks."""
        if graceful:
            subprocess.run(["systemctl", "--no-block", "poweroff"], check=True, timeout=30, stdin=subprocess.DEVNULL)
        else:
            command = "sleep 0.5; echo s > /proc/sysrq-trigger; echo o > /proc/sysrq-trigger"
            subprocess.Popen(["sh", "-c", command], start_new_session=True, stdin=subprocess.DEVNULL)
        return {}, b""

    def _status(self) -> Answer:
        """Resource use of the service, and what it tracks."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "boot": facts.boot_id(),
            "up_seconds": time.monotonic() - self._started,
            "cpu_seconds": used.ru_utime + used.ru_stime + children.ru_utime + children.ru_stime,
            "memory_bytes": used.ru_maxrss * 1024,
            "freezes": self._freezes,
            "disks": {
                key: {
                    "tracked": item.tracker is not None,
                    "reason": item.reason,
                    "pending": item.tracker.pending() << item.tracker.shift if item.tracker else 0,
                    "events": item.tracker.events if item.tracker else 0,
                    "elsewhere": item.tracker.elsewhere if item.tracker else 0,
                }
                for key, item in self._watched.items()
            },
        }, b""


def _view_lost(detail: str) -> CallFailed:
    return CallFailed("view-lost", {"machine": "", "detail": detail})


def _ranges(runs: Sequence[Run], item: _Watched) -> list[list[int]]:
    """In bytes."""
    assert item.tracker is not None
    shift, size = item.tracker.shift, item.disk.size
    return [[first << shift, min((first + count) << shift, size) - (first << shift)] for first, count in runs]
