"""The guests' disks, as templates for copies: made without mounting anything."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.lab._run import run

MIB = 1024 * 1024
AREA_BLOCKS = 2048
"""Blocks of 4 KiB that the workload overwrites, on each data disk."""

COMMAND_LINE = "console=ttyS0 quiet loglevel=3 panic=5"
GRUB_MODULES = ("normal", "configfile", "linux", "serial", "terminal", "boot", "echo")
FIRST_PARTITION = 1 * MIB
BOOT_PARTITION = 40 * MIB


def make_ext4(path: Path, size: int, label: str, content: Path, offset: int = 0) -> None:
    """Make a file with an ext4 file system of `size` bytes that contains the directory `content`.

    With an `offset` (in bytes) it is made at that place of an existing file.
    """
    if not offset:
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
    # Leave nothing for the guest's kernel to initialise later: an idle guest writes nothing.
    options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0"
    options = f"{options},offset={offset}"
    words: list[str | Path] = ["-q", "-F", "-b", "4096", "-J", "size=4", "-L", label, "-E", options, "-d", content]
    run(["mkfs.ext4", *words, path, f"{size // 1024}k"])


def make_area(init: Path, path: Path, number: int) -> None:
    """Prepare area `number` of the workload in a file or at the start of a disk image."""
    run([init, "mkarea", path, str(number), str(AREA_BLOCKS)])


def make_data_disk(path: Path, size: int, label: str, area: int, init: Path, work: Path) -> None:
    """Make a raw disk that is one ext4 file system with an area."""
    content = work / f"content-{label}"
    shutil.rmtree(content, ignore_errors=True)
    content.mkdir(parents=True)
    make_area(init, content / "area", area)
    make_ext4(path, size, label, content)


def make_raw_area_disk(path: Path, size: int, area: int, init: Path) -> None:
    """Make a raw disk without a file system: an area at its start, the rest free."""
    with path.open("wb") as file:
        file.truncate(size)
    make_area(init, path, area)


def to_qcow2(raw: Path) -> Path:
    """Convert a raw image to qcow2, in the same directory."""
    output = raw.with_suffix(".qcow2")
    run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, output])
    raw.unlink()
    return output


def copy_sparse(source: Path, target: Path, offset: int = 0) -> None:
    """Copy a file to an offset (in bytes, a multiple of 1 MiB) of another, leaving holes for zeroes."""
    with source.open("rb") as reading, target.open("r+b") as writing:
        while chunk := reading.read(MIB):
            if chunk.strip(b"\0"):
                writing.seek(offset)
                writing.write(chunk)
            offset += len(chunk)


def partition(path: Path, label: str, parts: Mapping[Path, str], size: int) -> None:
    """Make a disk of `size` bytes with one partition for each file of `parts`, of the given type, with that file as its
    content."""
    with path.open("wb") as file:
        file.truncate(size)
    start, lines = FIRST_PARTITION, [f"label: {label}"]
    for part, kind in parts.items():
        lines.append(f"start={start // 512},size={part.stat().st_size // 512},type={kind}")
        start += part.stat().st_size
    run(["sfdisk", "-q", path], text="\n".join(lines) + "\n")
    start = FIRST_PARTITION
    for part in parts:
        copy_sparse(part, path, start)
        start += part.stat().st_size


def _grub_config(search: str) -> str:
    return f"""serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
{search}
linux /vmlinuz {COMMAND_LINE}
initrd /initrd
boot
"""


def make_bios_disk(path: Path, kernel: Path, initrd: Path, init: Path, work: Path) -> None:
    """Make a disk that boots on a BIOS: GRUB, a boot file system, the ledger's file system."""
    boot, ledger = work / "boot", work / "bios-ledger.raw"
    boot.mkdir(parents=True)
    shutil.copy(kernel, boot / "vmlinuz")
    shutil.copy(initrd, boot / "initrd")
    (boot / "grub").mkdir()
    (boot / "grub/grub.cfg").write_text(_grub_config("search --no-floppy --label --set=root boot"))
    make_ext4(work / "bios-boot.raw", BOOT_PARTITION, "boot", boot)
    make_data_disk(ledger, 128 * MIB, "lab-ledger", 0, init, work)
    partition(path, "dos", {work / "bios-boot.raw": "83", ledger: "83"}, 256 * MIB)

    early = work / "early.cfg"
    early.write_text("search --no-floppy --label --set=root boot\nset prefix=($root)/grub\n")
    core = work / "core.img"
    modules = ["biosdisk", "part_msdos", "ext2", "search", "search_label", *GRUB_MODULES]
    run(["grub-mkimage", "-O", "i386-pc", "-c", early, "-p", "/grub", "-o", core, *modules])
    image = core.read_bytes()
    if 512 + len(image) > FIRST_PARTITION:
        raise ValueError(f"GRUB's core image does not fit before the first partition: {len(image)} bytes")
    # boot.img expects the core image in the next sector, and the core image expects its rest after that.
    with path.open("r+b") as disk:
        disk.write(Path("/usr/lib/grub/i386-pc/boot.img").read_bytes()[:440])
        disk.seek(512)
        disk.write(image)


def make_uefi_disk(path: Path, kernel: Path, initrd: Path, init: Path, work: Path) -> None:
    """Make a disk that boots on UEFI: an EFI system partition, the ledger's file system."""
    esp, ledger = work / "esp.raw", work / "uefi-ledger.raw"
    with esp.open("wb") as file:
        file.truncate(BOOT_PARTITION)
    config, loader = work / "efi.cfg", work / "bootx64.efi"
    config.write_text(_grub_config("search --no-floppy --file --set=root /initrd"))
    modules = ["part_gpt", "fat", "search", "search_fs_file", *GRUB_MODULES]
    run(["grub-mkimage", "-O", "x86_64-efi", "-c", config, "-p", "/efi/boot", "-o", loader, *modules])
    run(["mkfs.vfat", "-F", "32", "-s", "1", "-n", "ESP", esp])
    run(["mmd", "-i", esp, "::/EFI", "::/EFI/BOOT"])
    run(["mcopy", "-i", esp, loader, "::/EFI/BOOT/BOOTX64.EFI"])
    run(["mcopy", "-i", esp, kernel, "::/vmlinuz"])
    run(["mcopy", "-i", esp, initrd, "::/initrd"])
    make_data_disk(ledger, 128 * MIB, "lab-ledger", 0, init, work)
    partition(path, "gpt", {esp: "U", ledger: "L"}, 256 * MIB)
