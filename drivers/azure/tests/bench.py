"""How fast pages arrive, beside a plain upload with the same SDK to the same server in one run.

    python -m drivers.azure.tests.bench [MIB [ROUNDS]]

Plain: puts of 4 MiB, eight at a time, as azcopy sends them. Driver: the calls that the engine makes, pieces of 512 KiB
from two threads, sealed as a point. Each round measures both, the order turned each time; medians. The figures compare
the two and say nothing of Azure: Azurite and the proxy are what is measured.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from asr_driver_azure._driver import AzureDriver
from asr_driver_azure._site import AzureSite
from asrcore.driver import CycleSpec, ReplicaSpec, SealSpec
from asrcore.model.machine import Description, Disk, Firmware, Machine
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from drivers.azure.tests.peers.azurite import Azurite
from drivers.azure.tests.peers.proxy import Proxy
from drivers.azure.tests.peers.storage import Storage

MIB = 1 << 20
PIECE, PUT, PARALLEL = 512 * 1024, 4 * MIB, 8


def plain(site: AzureSite, number: int, data: bytes) -> float:
    """Seconds."""
    client = site.clients.blobs.get_blob_client(site.settings.container, f"plain{number}")
    started = time.monotonic()
    client.create_page_blob(len(data))
    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in pool.map(lambda at: client.upload_page(data[at : at + PUT], at, PUT), range(0, len(data), PUT)):
            pass
    return time.monotonic() - started


def driver(site: AzureSite, number: int, data: bytes) -> float:
    """Seconds, the seal included."""
    disk = Disk("vda", len(data))
    description = Description(Machine("m", "m", 1, 64 * MIB, Firmware.BIOS, (disk,)), "bench")
    replica = site.target.create_replica(ReplicaSpec(f"bench{number}", "bench", 1, description), Watch())
    view = memoryview(data)
    started = time.monotonic()
    with replica.open_cycle(CycleSpec("c", 1, None, {"vda": len(data)})) as writer:
        with ThreadPoolExecutor(2) as pool:
            calls = pool.map(lambda at: writer.write("vda", at, view[at : at + PIECE]), range(0, len(data), PIECE))
            for _ in calls:
                pass
        writer.seal(SealSpec("p", 1.0, Consistency.CRASH, True, description))
    return time.monotonic() - started


def main() -> None:
    """Measure and print."""
    given = [int(word) for word in sys.argv[1:]]
    size, rounds = given[0] if given else 128, given[1] if len(given) > 1 else 5
    data = random.Random(1).randbytes(MIB) * size
    with tempfile.TemporaryDirectory() as directory, Azurite(Path(directory)) as azurite, Proxy(azurite.port) as proxy:
        storage = Storage(azurite, proxy)
        site = AzureDriver().connect("bench", storage.settings())
        site.make_container()
        plain(site, 0, data[: 8 * MIB])  # warm
        seconds: dict[str, list[float]] = {"plain": [], "driver": []}
        for number in range(1, rounds + 1):
            for way in (plain, driver) if number % 2 else (driver, plain):
                seconds[way.__name__].append(way(site, number, data))
        for name, values in seconds.items():
            value = statistics.median(values)
            print(f"{name:7} {size / value:6.1f} MiB/s  ({', '.join(f'{item:.2f}' for item in values)} s)")
        faster = [one / other for one, other in zip(seconds["plain"], seconds["driver"], strict=True)]
        medians = statistics.median(seconds["plain"]) / statistics.median(seconds["driver"])
        print(f"driver / plain: {medians:.3f} of the medians; median of the rounds {statistics.median(faster):.3f}")
        site.close()
        storage.close()


if __name__ == "__main__":
    main()
