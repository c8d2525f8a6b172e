"""Builds the guests' kernel, initramfs and disks from Debian packages, once for each set of inputs."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.lab import _disks, _initramfs, _places
from tests.lab._disks import MIB
from tests.lab._run import LabError, run

KERNEL_PACKAGE = "linux-image-cloud-amd64"
AGENT_PACKAGES = ("qemu-guest-agent", "liburing2", "libnuma1")
GUEST_SOURCES = Path(__file__).parent / "guest"
DOWNLOAD_SECONDS = 300.0
BUILD_SECONDS = 120.0
KEPT = 3
"""Number of image sets kept, the newest ones: a lab of an older version of these sources may still use its own set."""


@dataclass(frozen=True)
class Images:
    """The files from which guests are made."""

    directory: Path

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    def disk(self, kind: str, target: str) -> Path:
        """Template of a disk (`vda`, ...) of a kind of guest; its suffix is its format."""
        found = list((self.directory / kind).glob(f"{target}.*"))
        if len(found) != 1:
            raise LabError(f"no single template {target} for guests of kind {kind}: {found}")
        return found[0]


def _inputs_key() -> str:
    """Hash of everything that the images depend on; quick, because it is computed each time."""
    digest = hashlib.sha256()
    sources = [*GUEST_SOURCES.glob("*.[ch]"), Path(_disks.__file__), Path(_initramfs.__file__), Path(__file__)]
    for path in sorted(sources):
        digest.update(path.read_bytes())
    tools = ("/bin/busybox", "/usr/lib/grub/i386-pc/boot.img", "/usr/lib/grub/x86_64-efi/linux.mod")
    for tool in tools:
        try:
            status = Path(tool).stat()
        except OSError as error:
            raise LabError(f"{error}; install missing packages: python -m tests.lab packages --install") from error
        digest.update(f"{tool} {status.st_size} {int(status.st_mtime)}\n".encode())
    return digest.hexdigest()[:16]


def _download(package: str, debs: Path) -> Path:
    """The package's file, from the cache or from the distribution's archive."""
    found = sorted(debs.glob(f"{package}_*.deb"))
    if found:
        return found[-1]
    with tempfile.TemporaryDirectory(dir=debs) as work:
        get = ["apt-get", "-q", "-o", "APT::Sandbox::User=root"]
        done = run([*get, "download", package], cwd=Path(work), timeout=DOWNLOAD_SECONDS, check=False)
        if done.returncode:  # package lists absent or out of date
            run([*get, "update"], timeout=DOWNLOAD_SECONDS)
            run([*get, "download", package], cwd=Path(work), timeout=DOWNLOAD_SECONDS)
        (deb,) = Path(work).glob("*.deb")
        return deb.rename(debs / deb.name)


def _unpack_kernel(debs: Path, tree: Path) -> None:
    found = sorted(debs.glob("linux-image-*-cloud-amd64_*.deb"))
    if found:
        kernel = found[-1]
    else:
        meta = _download(KERNEL_PACKAGE, debs)
        depends = run(["dpkg-deb", "-f", meta, "Depends"]).stdout
        kernel = _download(depends.split()[0].rstrip(","), debs)
    run(["dpkg-deb", "-x", kernel, tree], timeout=BUILD_SECONDS)


def _unpack_agent(debs: Path, tree: Path) -> Path:
    for package in AGENT_PACKAGES:
        run(["dpkg-deb", "-x", _download(package, debs), tree])
    return tree / "usr/sbin/qemu-ga"


def _build(output: Path, work: Path, say: Callable[[str], None]) -> None:
    debs = _places.CACHE / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    say("guest kernel: unpacking Debian's cloud kernel")
    _unpack_kernel(debs, work / "kernel")
    (kernel,) = (work / "kernel/boot").glob("vmlinuz-*")
    images = Images(output)
    shutil.copy(kernel, images.kernel)

    say("guest initramfs")
    init = work / "lab-init"
    sources = sorted(GUEST_SOURCES.glob("*.c"))
    flags = ["-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-format-truncation"]
    run(["gcc", *flags, "-o", init, *sources], timeout=BUILD_SECONDS)
    _initramfs.build_initramfs(images.initrd, work, work / "kernel", init, _unpack_agent(debs, work / "agent"))

    say("guest disks: bios-direct")
    kind = output / "bios-direct"
    kind.mkdir()
    _disks.make_data_disk(kind / "vda.raw", 256 * MIB, "lab-ledger", 0, init, work)
    _disks.to_qcow2(kind / "vda.raw")
    _disks.make_raw_area_disk(kind / "vdb.raw", 64 * MIB, 1, init)
    _disks.make_data_disk(kind / "sda.raw", 256 * MIB, "lab-scratch", 2, init, work)
    _disks.to_qcow2(kind / "sda.raw")

    say("guest disks: bios-disk")
    kind = output / "bios-disk"
    kind.mkdir()
    _disks.make_bios_disk(kind / "vda.raw", images.kernel, images.initrd, init, work)
    _disks.to_qcow2(kind / "vda.raw")

    say("guest disks: uefi")
    kind = output / "uefi"
    kind.mkdir()
    _disks.make_uefi_disk(kind / "vda.raw", images.kernel, images.initrd, init, work)
    _disks.to_qcow2(kind / "vda.raw")


def build_images(say: Callable[[str], None] = lambda _: None) -> Images:
    """Return the images, building them first if any input changed. An interrupted build leaves no image behind."""
    final = _places.CACHE / "images" / _inputs_key()
    if final.is_dir():
        return Images(final)
    with _places.lock("images"):
        if final.is_dir():
            return Images(final)
        final.parent.mkdir(exist_ok=True)
        for leftover in final.parent.glob("tmp-*"):  # of a killed build: this process holds the lock
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=final.parent) as work:
            output = Path(work) / "output"
            output.mkdir()
            _build(output, Path(work), say)
            output.rename(final)
        for old in sorted(final.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old)
    return Images(final)
