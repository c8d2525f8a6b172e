"""The guests' initramfs: busybox, the guest's own init, the kernel modules it needs, the QEMU guest agent."""

from __future__ import annotations

import gzip
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from tests.lab._run import LabError, run

# In this order, after their dependencies. sd_mod is the last of the disk modules: loading it waits for all disks.
WANTED_MODULES = (
    "virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console", "virtio_net", "button", "evdev", "efivarfs",
)  # fmt: skip

DIRECTORIES = ("bin", "dev", "etc", "mnt", "modules", "proc", "run", "sbin", "sys", "tmp", "usr/sbin", "var/run")


def _modules_in_order(kernel_tree: Path) -> Iterator[Path]:
    """The required modules, each after its dependencies (named in each module's .modinfo section)."""
    files = {path.name.removesuffix(".ko").replace("-", "_"): path for path in kernel_tree.rglob("*.ko")}
    if not files:
        raise LabError(f"no uncompressed kernel modules below {kernel_tree}")
    seen: set[str] = set()

    def visit(name: str) -> Iterator[Path]:
        if name in seen:
            return
        seen.add(name)
        found = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
        for needed in found[1].decode().split(",") if found else ():
            if needed:
                yield from visit(needed.replace("-", "_"))
        yield files[name]

    for name in WANTED_MODULES:
        if name in files:  # otherwise it is built in
            yield from visit(name)


def _copy_with_libraries(program: Path, libraries: Path, tree: Path) -> None:
    """Copy a dynamic program, its loader and its libraries, from the host or from `libraries`."""
    linked = run(["ldd", program], env={"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": str(libraries)}).stdout
    if "not found" in linked:
        raise LabError(f"libraries of {program} are missing:\n{linked}")
    for match in re.finditer(r"^\s*(?:\S+ => )?(/\S+) \(0x", linked, re.MULTILINE):
        place = "lib64" if Path(match[1]).name.startswith("ld-linux") else "lib"
        target = tree / place / Path(match[1]).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(match[1]), target)
    target = tree / "usr/sbin" / program.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(program, target)


def _entry(number: int, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry of a cpio archive of the "newc" kind, padded to four bytes."""
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


def _cpio(tree: Path) -> bytes:
    entries = [_entry(0, "dev/console", stat.S_IFCHR | 0o600, b"", (5, 1))]
    for number, path in enumerate(sorted(tree.rglob("*")), 1):
        status = path.lstat()
        content = b""
        if path.is_symlink():
            content = str(path.readlink()).encode()
        elif path.is_file():
            content = path.read_bytes()
        entries.append(_entry(number, str(path.relative_to(tree)), status.st_mode, content))
    # A directory must come before its content; "dev" contains the console.
    entries.insert(0, _entry(0, "dev", stat.S_IFDIR | 0o755, b""))
    return b"".join([*entries, _entry(0, "TRAILER!!!", 0, b"")])


def build_initramfs(output: Path, work: Path, kernel_tree: Path, init: Path, agent: Path) -> None:
    """Write the initramfs to `output`, using the directory `work`."""
    tree = work / "initramfs"
    for name in DIRECTORIES:
        (tree / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(init, tree / "init")
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    for applet in run(["/bin/busybox", "--list"]).stdout.split():
        link = tree / "bin" / applet
        if not link.exists():
            link.symlink_to("busybox")
    order = []
    for module in _modules_in_order(kernel_tree):
        shutil.copy(module, tree / "modules" / module.name)
        order.append(module.name)
    (tree / "modules/order").write_text("\n".join(order) + "\n")
    _copy_with_libraries(agent, agent.parents[1] / "lib/x86_64-linux-gnu", tree)
    shutdown = tree / "sbin/shutdown"  # what the agent calls
    shutdown.write_text("#!/bin/sh\nexec kill -TERM 1\n")
    shutdown.chmod(0o755)
    output.write_bytes(gzip.compress(_cpio(tree), 1, mtime=0))
