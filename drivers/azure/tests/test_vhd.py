"""The footer, checked with QEMU."""

from __future__ import annotations

import json
import subprocess
import uuid
from pathlib import Path

import pytest

from asr_driver_azure.blobs import vhd
from asrcore.units import GiB, MiB


@pytest.mark.parametrize("size", [MiB, 3 * MiB, 129 * MiB, 10 * GiB, 2040 * GiB])
def test_qemu_reads_the_size(tmp_path: Path, size: int) -> None:
    image = tmp_path / "disk.vhd"
    with image.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(vhd.footer(size, uuid.uuid4()))
    command = ["qemu-img", "info", "--output=json", "-f", "vpc", str(image)]
    reported = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert reported["virtual-size"] == size


def test_a_footer_is_read_back() -> None:
    data = vhd.footer(5 * MiB, uuid.uuid4())
    assert len(data) == vhd.FOOTER
    assert vhd.parse(data) == 5 * MiB


@pytest.mark.parametrize("at", [0, 48, 60, 64, 100])
def test_a_broken_footer_is_refused(at: int) -> None:
    data = bytearray(vhd.footer(5 * MiB, uuid.uuid4()))
    data[at] ^= 1
    with pytest.raises(ValueError, match=r"VHD|footer"):
        vhd.parse(bytes(data))


def test_sizes_are_rounded_up() -> None:
    assert [vhd.rounded(size) for size in (512, MiB, MiB + 512)] == [MiB, MiB, 2 * MiB]
    assert vhd.blob_size(MiB + 512) == 2 * MiB + 512
