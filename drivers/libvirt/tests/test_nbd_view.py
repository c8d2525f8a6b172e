"""The requests of a disk view to the server, as recorded in nbdkit's log."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from asr_driver_libvirt.source.tracking import DiskPlan
from asr_driver_libvirt.source.view import Frozen, LibvirtDiskView, contexts
from asrcore.driver import Tracking
from asrcore.model.extent import Extent
from asrcore.model.machine import Disk
from asrcore.units import KiB, MiB
from drivers.storage.tests.nbdkit import Nbdkit


@pytest.mark.parametrize(
    ("written", "largest", "asked"),
    [
        pytest.param(20, "32M", [(20 * MiB + 32 * KiB, 8 * MiB)], id="a-hole-behind-data"),
        pytest.param(20, "1M", [], id="the-server-takes-none-so-large"),
        pytest.param(28, "32M", [], id="no-hole-so-large"),
    ],
)
def test_who_asks_for_all_of_a_disk_reads_8_mib_of_a_hole_at_once(
    tmp_path: Path, written: int, largest: str, asked: list[tuple[int, int]]
) -> None:
    """This makes QEMU's allocator keep memory, see `view`; only this test detects its absence."""
    log = tmp_path / "log"
    sizes = ["blocksize-minimum=1", "blocksize-preferred=4K", f"blocksize-maximum={largest}"]
    words = ["--filter=log", "--filter=blocksize-policy", "memory", "32M", f"logfile={log}", *sizes]
    with Nbdkit.run("unix", tmp_path, *words) as server:
        with server.connect() as client:
            client.write(b"x" * (written * MiB + 1), 0)
        frozen = cast(Frozen, SimpleNamespace(connect=lambda _, bitmap: server.connect(contexts=contexts(bitmap))))
        view = LibvirtDiskView(frozen, Disk("vda", 32 * MiB), DiskPlan(Tracking.NONE))
        data, hole = view.allocated()
        view.close()
    end = written * MiB + 32 * KiB  # the plugin's page
    assert (data, hole) == (Extent(0, end), Extent(end, 32 * MiB - end, zero=True))
    reads = re.findall(r"\bRead id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)", log.read_text())
    assert [(int(offset, 16), int(count, 16)) for offset, count in reads] == asked
