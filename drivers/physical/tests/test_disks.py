"""Which disks are the server's, and what their sectors are."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from asr_mobility import disks

SATA = "pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:0/block/sda"
USB = "pci0000:00/0000:00:14.0/usb2/2-1/2-1:1.0/host6/target6:0:0/6:0:0:0/block/sdb"
ISCSI = "platform/host7/session1/target7:0:0/7:0:0:1/block/sdc"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A server with a disk on SATA, one on USB and one on iSCSI, as its sysfs shows them."""
    listing = tmp_path / "class"
    listing.mkdir()
    for place in (SATA, USB, ISCSI):
        disk = tmp_path / "devices" / place
        disk.mkdir(parents=True)
        (disk / "size").write_text("2048")
        (disk / "removable").write_text("0")
        (disk / "serial").write_text(disk.name.upper())
        part = disk / (disk.name + "1")
        part.mkdir()
        (part / "partition").write_text("1")
        for item in (disk, part):
            (listing / item.name).symlink_to(item)
    monkeypatch.setattr(disks, "SYS_BLOCK", listing)
    return tmp_path


def test_what_may_be_attached_for_a_while_only_is_known(server: Path) -> None:
    assert [(disk.name, disk.attached) for disk in disks.find_disks()] == [
        ("sda", ""),
        ("sdb", "USB"),
        ("sdc", "iSCSI"),
    ]


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    """A loop device with sectors of 4096 bytes."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    command = ["losetup", "--find", "--show", "--sector-size", "4096", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr}")
    yield Path(done.stdout.strip()).name
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def test_the_size_of_sectors_is_known(loop: str) -> None:
    assert disks.Disk(loop).sector_size == 4096
