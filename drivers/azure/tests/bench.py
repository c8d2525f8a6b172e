"""How fast pages arrive, beside a plain upload with the same SDK to the same server in one run.

    python -m drivers.azure.tests.bench [MIB]

Plain: puts of 4 MiB, eight at a time, as azcopy sends them. Driver: the calls that the engine makes, pieces of 512 KiB
from two threads, sealed as a point. Each in turn, three times; medians. The figures compare the two and say nothing of
Azure: Azurite and the proxy are what is measured.
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


def plain(storage: Storage, site: AzureSite, number: int, data: bytes) -> float:
    """Seconds."""
    client = site.clients.blobs.get_blob_client(site.settings.container, f"plain{number}")
    started = time.monotonic()
    client.create_page_blob(len(data))
    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in pool.map(lambda at: client.upload_page(data[at : at + PUT], at, PUT), range(0, len(data), PUT)):
            pass
    return time.monotonic() - started


def driver(storage: Storage, site: AzureSite, number: int, data: bytes) -> float:
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
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 128
    data = random.Random(1).randbytes(MIB) * size
    with tempfile.TemporaryDirectory() as directory, Azurite(Path(directory)) as azurite, Proxy(azurite.port) as proxy:
        storage = Storage(azurite, proxy)
        site = AzureDriver().connect("bench", storage.settings())
        site.make_container()
        plain(storage, site, 0, data[: 8 * MIB])  # warm
        seconds: dict[str, list[float]] = {"plain": [], "driver": []}
        for number in range(1, 4):
            for way in (plain, driver):
                seconds[way.__name__].append(way(storage, site, number, data))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, value in medians.items():
            print(f"{name:7} {size / value:6.1f} MiB/s  ({', '.join(f'{item:.2f}' for item in seconds[name])} s)")
        print(f"driver / plain: {medians['plain'] / medians['driver']:.2f}")
        site.close()
        storage.close()


if __name__ == "__main__":
    main()
