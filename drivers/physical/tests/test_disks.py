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
    for name, path in (("SYS_BLOCK", listing), ("FSTAB", tmp_path / "fstab"), ("MOUNTS", tmp_path / "mounts")):
        monkeypatch.setattr(disks, name, path)
    (tmp_path / "fstab").write_text("# a comment\n/dev/sda1 / ext4 defaults 0 1\n")
    (tmp_path / "mounts").write_text("/dev/sda1 / ext4 rw 0 0\n/dev/sdb1 /media/backup ext4 rw 0 0\n")
    return tmp_path


def names() -> list[str]:
    return [disk.name for disk in disks.find_disks()]


def test_a_disk_that_only_visits_is_left_out(server: Path) -> None:
    assert names() == ["sda"]
    assert disks.left_out() == {"sdb": "USB", "sdc": "iSCSI"}


def test_a_disk_that_the_system_mounts_at_each_boot_belongs_to_it(server: Path) -> None:
    (server / "fstab").write_text(
        "/dev/sda1 / ext4 defaults 0 1\nUUID=1 /media/backup ext4 noauto 0 2\nUUID=2 /data xfs _netdev 0 2\n"
    )
    with (server / "mounts").open("a") as file:
        file.write("/dev/sdc1 /data xfs rw 0 0\n")
    assert names() == ["sda", "sdc"]
    assert disks.left_out() == {"sdb": "USB"}


def test_the_root_belongs_to_it_whatever_it_is_on(server: Path) -> None:
    (server / "fstab").write_text("")
    (server / "mounts").write_text("/dev/sdc1 / ext4 rw 0 0\n")
    assert names() == ["sda", "sdc"]


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
