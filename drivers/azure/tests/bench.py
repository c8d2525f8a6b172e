"""The throughput of pages compared with a plain upload by the same SDK to the same server, and the size of a delta.

    python -m drivers.azure.tests.bench [--image DISK] [--mib MIB] [--rounds ROUNDS]

Plain: puts of 4 MiB, eight at a time, as azcopy sends them; pieces that are all zero are omitted. Driver: a cycle of
the engine (its `Transfer`) that ends as a point. The data are the first MIB of a guest's disk (the bench's, half of it
a file tree, or a raw DISK), and as much noise, of which nothing can be omitted. Each round measures all four, in
rotating order. They connect directly to Azurite, a separate process, over HTTPS as with Azure; the figures compare the
two and say nothing about Azure's own speed.

A delta is 4 MiB in one piece, 256 scattered grains of 64 KiB, and as much that became zero. A proxy, also a separate
process, counts what is sent. The results are written to build/bench-azure.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
from rich.console import Console
from rich.table import Table

from asr_driver_azure.driver import AzureDriver
from asr_driver_azure.site import AzureSite
from asrcore.driver import (
    CycleSpec,
    CycleWriter,
    DiskReader,
    DiskView,
    Replica,
    ReplicaSpec,
    SealSpec,
    Tracking,
)
from asrcore.model.extent import Extent, normalise
from asrcore.model.machine import Description, Disk, Firmware, Machine
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.replication.throttle import Throttle
from asrcore.replication.transfer import Counts, Transfer
from drivers.azure.tests.peers.azurite import ACCOUNT, Azurite
from drivers.azure.tests.peers.proxy import Aside
from tests.bench._disk import build_disk
from tests.bench._report import machine_facts
from tests.lab._images import build_images

MIB = 1 << 20
GRAIN, PUT, PARALLEL = 64 * 1024, 4 * MIB, 8
SCATTERED = 256
REPORT = Path(__file__).parents[3] / "build/bench-azure.json"
_ZEROES = bytes(PUT)


@attrs.frozen
class Round:
    """The cost of one way; `cpu_seconds`: of the measured process, without either server."""

    seconds: float
    cpu_seconds: float


def timed(work: Callable[[], None]) -> Round:
    """Run it once."""
    cpu, began = time.process_time(), time.monotonic()
    work()
    return Round(time.monotonic() - began, time.process_time() - cpu)


def plain(site: AzureSite, name: str, data: bytes) -> Round:
    """The bytes in a page blob."""
    client = site.account.clients.blobs.get_blob_client(site.account.settings.container, name)

    def send(at: int) -> None:
        piece = data[at : at + PUT]
        if piece != _ZEROES[: len(piece)]:
            client.upload_page(piece, at, len(piece))

    def upload() -> None:
        client.create_page_blob(len(data))
        with ThreadPoolExecutor(PARALLEL) as pool:
            for _ in pool.map(send, range(0, len(data), PUT)):
                pass

    return timed(upload)


def driver(site: AzureSite, name: str, data: bytes) -> Round:
    """The bytes in a point, the seal included."""
    replica = made(site, name, len(data))

    def upload() -> None:
        with opened(replica, "c", None, len(data)) as writer:
            replicate(writer, data, [Extent(0, len(data))])
            seal(writer, "p", len(data))

    return timed(upload)


def _described(size: int) -> Description:
    return Description(Machine("m", "m", 1, 64 * MIB, Firmware.BIOS, (Disk("vda", size),)), "bench")


def made(site: AzureSite, name: str, size: int) -> Replica:
    """A replica of one disk."""
    return site.target.create_replica(ReplicaSpec(name, "bench", 1, _described(size)), Watch())


def opened(replica: Replica, cycle: str, base: str | None, size: int) -> CycleWriter:
    """Run a cycle of it."""
    return replica.open_cycle(CycleSpec(cycle, 1, base, {"vda": size}))


def seal(writer: CycleWriter, point: str, size: int) -> None:
    """Close it."""
    writer.seal(SealSpec(point, 1.0, Consistency.CRASH, True, _described(size)))


class _Reader(DiskReader):
    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]


class _View(DiskView):
    """Bytes as a frozen disk without allocation information."""

    tracking = Tracking.NONE

    def __init__(self, data: bytes) -> None:
        self.disk = Disk("vda", len(data))
        self._data = data

    def changed(self) -> list[Extent]:
        raise AssertionError("nothing is tracked")

    def allocated(self) -> list[Extent]:
        return [Extent(0, len(self._data))]

    def reader(self) -> DiskReader:
        return _Reader(self._data)


def replicate(writer: CycleWriter, data: bytes, extents: list[Extent]) -> None:
    """Send the changes as the engine does."""
    Transfer(_View(data), writer, Counts(), Watch(), Throttle()).copy(extents)


def delta(site: AzureSite, proxy: Aside, data: bytes) -> float:
    """Bytes of pages sent for each changed byte that is not zero."""
    chance, size = random.Random(7), len(data)
    replica = made(site, "delta", size)
    with opened(replica, "c1", None, size) as writer:
        replicate(writer, data, [Extent(0, size)])
        seal(writer, "p1", size)
    changed = bytearray(data)
    changed[:PUT] = chance.randbytes(PUT)
    grains = chance.sample(range(PUT // GRAIN, size // GRAIN), min(2 * SCATTERED, (size - PUT) // GRAIN // 2 * 2))
    written, zeroed = grains[::2], grains[1::2]
    for grain in written:
        changed[grain * GRAIN : (grain + 1) * GRAIN] = chance.randbytes(GRAIN)
    for grain in zeroed:
        changed[grain * GRAIN : (grain + 1) * GRAIN] = bytes(GRAIN)
    extents = normalise([Extent(0, PUT), *(Extent(grain * GRAIN, GRAIN) for grain in grains)])
    before = proxy.sent()
    with opened(replica, "c2", "p1", size) as writer:
        replicate(writer, bytes(changed), extents)
        seal(writer, "p2", size)
    ratio = (proxy.sent() - before) / (PUT + len(written) * GRAIN)
    found = bytearray(size)
    with replica.reader("vda") as reader:
        for at in range(0, size, PUT):
            reader.read_into(at, memoryview(found)[at : at + PUT])
    assert found == changed, "the point differs from the replicated data"
    return ratio


def show(size: int, rounds: dict[str, list[Round]], figures: dict[str, float]) -> None:
    """A table on the terminal."""
    table = Table(title=f"{size // MIB} MiB into a page blob of Azurite", title_justify="left")
    for column in ("", "MiB/s", "median s", "from", "to", "CPU s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, items in rounds.items():
        seconds = [item.seconds for item in items]
        median = statistics.median(seconds)
        cpu = statistics.median(item.cpu_seconds for item in items)
        reported = (
            f"{size / MIB / median:.1f}",
            *(f"{item:.3f}" for item in (median, min(seconds), max(seconds), cpu)),
        )
        table.add_row(name, *reported)
    console = Console()
    console.print(table)
    for key, value in figures.items():
        console.print(f"  {key} = {value:.4g}", highlight=False)


def _start_of(image: Path, size: int) -> bytes:
    with image.open("rb") as file:
        data = file.read(size)
    return data[: len(data) // GRAIN * GRAIN]


def main() -> None:
    """Measure, print and write."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--image", type=Path, help="a raw disk instead of the bench's")
    words.add_argument("--mib", type=int, default=512)
    words.add_argument("--rounds", type=int, default=7)
    given = words.parse_args()
    facts = machine_facts(quick=given.rounds < 5)
    disk = _start_of(given.image or build_disk(build_images(print), print).raw, given.mib * MIB)
    contents = {"disk": disk, "noise": random.Random(1).randbytes(GRAIN) * (len(disk) // GRAIN)}
    rounds: dict[str, list[Round]] = {f"{name}, {way}": [] for name in contents for way in ("plain", "driver")}
    with tempfile.TemporaryDirectory() as directory, Azurite(Path(directory), tls=True) as azurite:
        direct = {"account_url": f"https://127.0.0.1:{azurite.port}/{ACCOUNT}", "ca_file": str(azurite.ca_file)}
        keys = {"account_key": azurite.key, "container": "bench"}
        with AzureDriver().connect("bench", keys | direct) as site:
            assert isinstance(site, AzureSite)
            site.account.make_container()
            for way in (plain, driver):
                way(site, f"warm-{way.__name__}", contents["noise"][: 16 * MIB])
            for number in range(given.rounds):
                for name, data in contents.items():
                    for way in (driver, plain) if number % 2 else (plain, driver):
                        took = way(site, f"{name}-{way.__name__}{number}", data)
                        rounds[f"{name}, {way.__name__}"].append(took)
    with tempfile.TemporaryDirectory() as directory, Azurite(Path(directory)) as azurite, Aside(azurite.port) as proxy:
        keys = {"account_key": azurite.key, "container": "bench", "account_url": proxy.url(ACCOUNT)}
        with AzureDriver().connect("bench", keys) as site:
            assert isinstance(site, AzureSite)
            site.account.make_container()
            ratio = delta(site, proxy, contents["noise"][: 64 * MIB])
    middle = {name: statistics.median(item.seconds for item in items) for name, items in rounds.items()}
    figures = {
        "storage_throughput_vs_plain_upload": middle["disk, plain"] / middle["disk, driver"],
        "storage_throughput_vs_plain_upload_of_noise": middle["noise, plain"] / middle["noise, driver"],
        "delta_sent_ratio": ratio,
    }
    show(len(disk), rounds, figures)
    REPORT.parent.mkdir(exist_ok=True)
    reported = {name: [attrs.asdict(item) for item in items] for name, items in rounds.items()}
    document = {"machine": facts, "figures": figures, "bytes": len(disk), "rounds": reported}
    REPORT.write_text(json.dumps(document, indent=2) + "\n")
    print(REPORT)


if __name__ == "__main__":
    main()
