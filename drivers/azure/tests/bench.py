"""How fast pages arrive, beside a plain upload with the same SDK to the same server in one run.

    python -m drivers.azure.tests.bench [--image DISK] [--mib MIB] [--rounds ROUNDS]

Plain: puts of 4 MiB, eight at a time, as azcopy sends them; pieces that are all zero are left out. Driver: the calls
that the engine makes, pieces of 512 KiB from two threads with their zero grains told, a flush after each 128 MiB,
sealed as a point. The data are the first MIB of a raw disk, or noise, of which nothing can be left out. Each round
measures both, the order turned each time. The figures compare the two and say nothing of Azure: Azurite is what is
measured.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from asr_driver_azure._driver import AzureDriver
from asr_driver_azure._site import AzureSite
from asrcore.driver import CycleSpec, ReplicaSpec, SealSpec
from asrcore.model.extent import Extent, normalise
from asrcore.model.machine import Description, Disk, Firmware, Machine
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from drivers.azure.tests.peers.azurite import Azurite
from drivers.azure.tests.peers.proxy import Proxy
from drivers.azure.tests.peers.storage import Storage

MIB = 1 << 20
PIECE, GRAIN, PUT, PARALLEL, FLUSH = 512 * 1024, 64 * 1024, 4 * MIB, 8, 128 * MIB
_ZEROES = bytes(PUT)


def plain(site: AzureSite, number: int, data: bytes) -> float:
    """Seconds."""
    client = site.clients.blobs.get_blob_client(site.settings.container, f"plain{number}")

    def send(at: int) -> None:
        piece = data[at : at + PUT]
        if piece != _ZEROES[: len(piece)]:
            client.upload_page(piece, at, len(piece))

    started = time.monotonic()
    client.create_page_blob(len(data))
    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in pool.map(send, range(0, len(data), PUT)):
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

        def send(at: int) -> None:
            grains = [Extent(grain, GRAIN, zero=view[grain : grain + GRAIN] == _ZEROES[:GRAIN])
                      for grain in range(at, at + PIECE, GRAIN)]  # fmt: skip
            for run in normalise(grains):
                if run.zero:
                    writer.zero("vda", run.offset, run.length)
                else:
                    writer.write("vda", run.offset, view[run.offset : run.end])
            if at and at % FLUSH == 0:
                writer.flush()

        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(send, range(0, len(data), PIECE)):
                pass
        writer.seal(SealSpec("p", 1.0, Consistency.CRASH, True, description))
    return time.monotonic() - started


def main() -> None:
    """Measure and print."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--image", type=Path, help="a raw disk to send instead of noise")
    words.add_argument("--mib", type=int, default=256)
    words.add_argument("--rounds", type=int, default=7)
    given = words.parse_args()
    if given.image:
        with given.image.open("rb") as file:
            data = file.read(given.mib * MIB)
        data = data[: len(data) // PIECE * PIECE]
    else:
        data = random.Random(1).randbytes(MIB) * given.mib
    with tempfile.TemporaryDirectory() as directory, Azurite(Path(directory)) as azurite, Proxy(azurite.port) as proxy:
        storage = Storage(azurite, proxy)
        site = AzureDriver().connect("bench", storage.settings())
        site.make_container()
        for way in (plain, driver):
            way(site, 0, data[: 16 * MIB])  # warm
        seconds: dict[str, list[float]] = {"plain": [], "driver": []}
        sent = {}
        for number in range(1, given.rounds + 1):
            for way in (plain, driver) if number % 2 else (driver, plain):
                before = proxy.sent()
                seconds[way.__name__].append(way(site, number, data))
                sent[way.__name__] = (proxy.sent() - before) // MIB
        for name, values in seconds.items():
            told = ", ".join(f"{item:.2f}" for item in values)
            print(
                f"{name:7} {len(data) / MIB / statistics.median(values):6.1f} MiB/s, {sent[name]} MiB sent ({told} s)"
            )
        rounds = [one / other for one, other in zip(seconds["plain"], seconds["driver"], strict=True)]
        medians = statistics.median(seconds["plain"]) / statistics.median(seconds["driver"])
        print(f"driver / plain: {medians:.3f} of the medians; median of the rounds {statistics.median(rounds):.3f}")
        site.close()
        storage.close()


if __name__ == "__main__":
    main()
