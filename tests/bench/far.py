"""Do scattered extents cost more than one large read of as many bytes over a far link? Through a proxy that delays.

python -m tests.bench.far [--rounds 5] [--delay 0.01]

Two sources are read by the real transfer: a site that is served to an engine elsewhere, and a physical server's agent.
Each is a process of its own, and so is the proxy: on one interpreter they would wait for each other. The target only
compares what it is given with what was expected, so that nothing but the link and its two ends is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs

from asr_driver_physical.driver import PhysicalDriver
from asr_driver_physical.enrol.push import Limits, enrolment
from asr_driver_physical.site import PhysicalSite
from asr_mobility import __main__ as mobility
from asr_mobility.channel import Answer, Channel
from asr_mobility.service import Service, _Watched
from asrcore.driver import CycleWriter, DiskView, SealSpec, Site, StoredPoint, ViewRequest
from asrcore.model.extent import Extent, total
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.remote import RemoteDriver
from asrcore.remote.master_target import MasterTarget
from asrcore.replication.throttle import Throttle
from asrcore.replication.transfer import Counts, Transfer
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.units import KiB, MiB
from asrcore.wire.carrier import Address
from asrcore.wire.tls import Identity
from drivers.physical.tests.test_parts import FACTS
from tests.certificates import Authority
from tests.lab._places import PROJECT

__all__ = ["DELAY", "SCATTERED", "SINGLE", "Far", "far"]

DELAY = 0.01
"""Seconds, each way."""
EXTENTS, LENGTH = 3000, 16 * KiB
SIZE = 2 * EXTENTS * LENGTH
"""Of the disk: every second piece of it is read."""
SCATTERED = tuple(Extent(2 * LENGTH * number, LENGTH) for number in range(EXTENTS))
SINGLE = (Extent(0, EXTENTS * LENGTH),)
_HOST, _NAME = "127.0.0.1", "far"
_LATE = 64 * MiB  # bytes that the link holds each way: far more than is ever in flight
_START_SECONDS = 60.0


class Expecting(CycleWriter):
    """A target that compares what it gets, and keeps nothing."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._lock = threading.Lock()
        self.written = 0

    def write(self, disk_id: str, offset: int, data: memoryview) -> None:
        if bytes(data) != self._content[offset : offset + len(data)]:
            raise AssertionError(f"other bytes at {offset} than the disk has")
        with self._lock:
            self.written += len(data)

    def zero(self, disk_id: str, offset: int, length: int) -> None:
        raise AssertionError("the disk has no zeroes")

    def same(self, disk_id: str, offset: int, length: int) -> None:
        raise AssertionError("nothing is compared")

    def done(self, disk_id: str) -> list[Extent]:
        return []

    def flush(self) -> None:
        """Nothing is kept."""

    def seal(self, spec: SealSpec) -> StoredPoint:
        raise NotImplementedError

    def discard(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open."""


@attrs.define
class Far:
    """`disks`: what can be read over the link, by what serves it."""

    disks: dict[str, DiskView]
    content: bytes

    def read(self, name: str, extents: tuple[Extent, ...]) -> float:
        """Seconds that the transfer takes for them."""
        writer = Expecting(self.content)
        begun = time.monotonic()
        Transfer(self.disks[name], writer, Counts(), Watch(), Throttle()).copy(extents)
        took = time.monotonic() - begun
        if writer.written != total(extents):
            raise AssertionError(f"{writer.written} bytes arrived of {total(extents)}")
        return took


def content() -> bytes:
    """Of the disk: incompressible."""
    return random.Random(7).randbytes(SIZE)


@contextmanager
def far(delay: float = DELAY) -> Iterator[Far]:
    """Both sources, behind a link with that delay each way."""
    with tempfile.TemporaryDirectory(prefix="asr-far-") as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        disks = {
            "remote": stack.enter_context(_remote(root, delay)),
            "agent": stack.enter_context(_agent(root, delay)),
        }
        place = Far(disks, content())
        for name in disks:
            place.read(name, SCATTERED[: EXTENTS // 10])  # the first read makes the connections
        yield place


@contextmanager
def _remote(root: Path, delay: float) -> Iterator[DiskView]:
    authority = Authority()
    serving = authority.issue(root / "serving", "master-target")
    engine = authority.issue(root / "engine", "process-server")
    with _process("serve", str(serving)) as port, _process("delay", port, str(delay)) as near:
        settings = {"address": f"{_HOST}:{near}", "identity": str(engine)}
        with RemoteDriver().connect("there", settings) as site, _opened(site, "web") as disk:
            yield disk


@contextmanager
def _agent(root: Path, delay: float) -> Iterator[DiskView]:
    with socket.create_server((_HOST, 0)) as free:
        port = free.getsockname()[1]
    settings = {
        "listen": f"{_HOST}:{port}",
        "identity": str(root / "identity"),
        "spool": str(root / "spool"),
    }
    home = root / "home"
    home.mkdir()
    with PhysicalDriver().connect("dc", settings) as site:
        assert isinstance(site, PhysicalSite)
        made = enrolment(site.servers.identity, _NAME, [f"{_HOST}:{port}"], FACTS, Limits(), python=sys.executable)
        for name, (data, _) in made.files.items():
            if name.endswith((".pem", "config.json")):
                (home / Path(name).name).write_bytes(data)
        site.servers.identity.save(made.record)
        with (
            _process("delay", str(port), str(delay)) as near,
            _process("agent", near, str(home)),
            _opened(site, FACTS["machine"]["id"]) as disk,
        ):
            yield disk


@contextmanager
def _opened(site: Site, machine_id: str) -> Iterator[DiskView]:
    requests = [ViewRequest(machine_id, "v1", None)]
    with site.source.open_view(requests, consistency=Consistency.CRASH, freeze_limit=5.0) as view:
        yield view.machines[machine_id].disks["vda"]


# -- the processes -----------------------------------------------------------------------------------------------------


@contextmanager
def _process(*words: str) -> Iterator[str]:
    """Another process of this file; what it prints first, such as its port."""
    command = [sys.executable, "-m", "tests.bench.far", *words]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{' '.join(command)} has ended at once")
        yield line
    finally:
        process.terminate()
        process.wait(_START_SECONDS)
        process.stdout.close()


def serve(identity: str) -> None:
    """A site whose machine `web` has the disk."""
    world = MemoryWorld("far")
    world.add_machine("web", {"vda": SIZE}).write("vda", 0, content())
    with (
        MemoryDriver().connect("far", {"world": world.name}) as site,
        MasterTarget(site, Address(_HOST, 0), Identity(identity)) as target,
    ):
        print(target.address.port, flush=True)
        signal.pause()


@attrs.define
class _File:
    """Counts as a disk of the agent."""

    path: str
    size: int = SIZE


def agent(port: str, home: str) -> None:
    """The mobility service, whose disk is a file."""
    path = Path(home) / "disk"
    path.write_bytes(content())
    service = Service(Path(home))
    service._watched = {"vda": _Watched(_File(str(path)), None, "")}  # type: ignore[arg-type]

    def answer(call: str, arguments: Any) -> Answer:
        if call != "open":
            return service.serve(call, arguments)
        disk = {"id": "vda", "name": "sda", "size": SIZE, "tracking": "none", "reason": "", "changed": []}
        return {"marks": {}, "disks": [disk], "machine": FACTS["machine"]}, b""

    carrier = mobility._dial(f"{_HOST}:{port}", mobility._context(Path(home)))
    me = {"name": _NAME, "identity": FACTS["identity"]}
    with closing(Channel(carrier, dialled=True, me=me, serve=answer)) as channel:
        print("connected", flush=True)
        channel.wait_ended()


def delay(port: str, seconds: str) -> None:
    """A link to that port that lets everything arrive so much later, in both directions, and is as fast as it gets."""
    with socket.create_server((_HOST, 0)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            near, _ = server.accept()
            far_end = socket.create_connection((_HOST, int(port)))
            for end in (near, far_end):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((near, far_end), (far_end, near)):
                _Way(source, sink, float(seconds)).start()


class _Way:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, seconds: float) -> None:
        self._source, self._sink, self._seconds = source, sink, seconds
        self._under_way: queue.Queue[tuple[float, bytes]] = queue.Queue(_LATE // (64 * KiB))

    def start(self) -> None:
        for work in (self._take, self._deliver):
            threading.Thread(target=work, daemon=True).start()

    def _take(self) -> None:
        data = b"-"
        while data:
            try:
                data = self._source.recv(256 * KiB)
            except OSError:
                data = b""
            self._under_way.put((time.monotonic() + self._seconds, data))

    def _deliver(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                at, data = self._under_way.get()
                time.sleep(max(0.0, at - time.monotonic()))
                if not data:
                    self._sink.shutdown(socket.SHUT_WR)
                    return
                self._sink.sendall(data)


# -- alone -------------------------------------------------------------------------------------------------------------


def measure(rounds: int, delay: float) -> dict[str, float]:
    """Medians, by what is read and how, and how much slower scattered extents are."""
    figures: dict[str, float] = {}
    with far(delay) as place:
        for name in place.disks:
            took: dict[str, list[float]] = {"scattered": [], "single": []}
            for number in range(rounds):
                order = [("scattered", SCATTERED), ("single", SINGLE)]
                for kind, extents in order[:: -1 if number % 2 else 1]:
                    took[kind].append(place.read(name, extents))
            medians = {kind: statistics.median(seconds) for kind, seconds in took.items()}
            figures |= {f"{name}_{kind}_seconds": seconds for kind, seconds in medians.items()}
            figures[f"{name}_scattered_vs_single"] = medians["single"] / medians["scattered"]
    return figures


def main() -> None:
    """Print the figures as JSON; or be one of the processes."""
    works: dict[str, Callable[..., None]] = {"serve": serve, "agent": agent, "delay": delay}
    if len(sys.argv) > 1 and sys.argv[1] in works:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        works[sys.argv[1]](*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delay", type=float, default=DELAY)
    given = parser.parse_args()
    print(json.dumps({key: round(value, 3) for key, value in measure(given.rounds, given.delay).items()}, indent=2))


if __name__ == "__main__":
    main()
