"""Builds the disks of the lab's physical server: a complete Debian with its own boot loader, once for each set of
inputs.

Two disks. The first has a GPT with GRUB's partition and a plain ext4 root; the second is a physical volume of LVM with
one logical volume, `data`, for the ledger. Nothing is mounted and no device mapper is needed.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.lab import _places
from tests.lab._disks import MIB, copy_sparse
from tests.lab._run import LabError, run

PACKAGES = (
    "systemd-sysv", "udev", "openssh-server", "python3-minimal", "libpython3-stdlib", "linux-image-cloud-amd64",
    "initramfs-tools", "grub2-common", "grub-pc-bin", "iproute2", "kmod", "e2fsprogs", "lvm2", "zstd",
)  # fmt: skip
ROOT_DISK, DATA_DISK = 1024 * MIB, 256 * MIB
ROOT_START = 4096 * 512
AREA_BLOCKS = 2048
BUILD_SECONDS = 500.0
KEPT = 2

MAC = "52:54:00:77:0a:01"
ADDRESS = "10.78.0.10"
GATEWAY = "10.78.0.1"
UUID = "5e0c0a70-1ab0-4d5e-8c11-0a77aa010001"
ROWS, AREAS = "/srv/data/rows", ("/srv/data/area", "/srv/plain/area")

# Units that a server does not need for a test, or that write or wait at boot.
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "fstrim.timer", "getty@tty1.service", "systemd-networkd-wait-online.service", "systemd-pstore.service",
    "systemd-timesyncd.service", "systemd-random-seed.service", "systemd-update-utmp.service", "lvm2-monitor.service",
    "blk-availability.service", "lvm2-lvmpolld.socket", "systemd-binfmt.service", "serial-getty@ttyS0.service",
    "systemd-update-utmp-runlevel.service", "keyboard-setup.service", "console-setup.service",
)  # fmt: skip

LEDGER_UNIT = f"""\
[Unit]
Description=the ledger
RequiresMountsFor=/srv/data
[Service]
ExecStart=/usr/local/bin/ledgerd run 10 {ROWS} {" ".join(AREAS)}
[Install]
WantedBy=multi-user.target
"""

# Named by its slot in the machine, as on real servers: in another machine the interface has another name.
NETWORK = f"""\
[Match]
Name=ens3
[Network]
Address={ADDRESS}/24
Gateway={GATEWAY}
LinkLocalAddressing=no
IPv6AcceptRA=no
"""


@dataclass(frozen=True)
class ServerImage:
    """The files from which the server is made."""

    directory: Path

    @property
    def root(self) -> Path:
        """Raw template of the first disk."""
        return self.directory / "root.raw"

    @property
    def data(self) -> Path:
        """Raw template of the second disk."""
        return self.directory / "data.raw"

    @property
    def key(self) -> Path:
        """Private SSH key for root."""
        return self.directory / "key"

    @property
    def known_hosts(self) -> Path:
        """known_hosts with the server's address and host key."""
        return self.directory / "known_hosts"


def _sources() -> Path:
    for path in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        if path.is_file() and path.stat().st_size:
            return path
    raise LabError("apt has no sources: neither sources.list nor debian.sources")


def _inputs_key() -> str:
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in (Path(__file__), here / "server/ledgerd.c", here / "guest/ledger.c", here / "guest/lab.h"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _unpack(tree: Path, work: Path) -> None:
    """Debian's packages; the downloaded files are kept for the next build."""
    archives = _places.CACHE / "server-debs"
    archives.mkdir(parents=True, exist_ok=True)
    nodoc = work / "nodoc"
    nodoc.write_text("".join(f"path-exclude=/usr/share/{part}/*\n" for part in ("man", "locale", "doc", "info")))
    keep = f'cp -n "$1"/var/cache/apt/archives/*.deb "{archives}/" || true; rm -f "$1"/var/cache/apt/archives/*.deb'
    give = (
        f'mkdir -p "$1/var/cache/apt/archives"; cp "{archives}"/*.deb "$1/var/cache/apt/archives/" 2>/dev/null || true'
    )
    # update-initramfs is held back: it would run at each package, and is run once below.
    config = (
        'mkdir -p "$1/etc/initramfs-tools/conf.d"; '
        'printf "MODULES=most\\nCOMPRESS=zstd\\nCOMPRESSLEVEL=1\\n" > "$1/etc/initramfs-tools/conf.d/lab"; '
        'printf "update_initramfs=no\\n" > "$1/etc/initramfs-tools/update-initramfs.conf"'
    )
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
    command += ['--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"']
    command += [f"--dpkgopt={nodoc}", "--dpkgopt=force-unsafe-io", "--dpkgopt=force-confold", "--skip=download/empty"]
    command += [f"--setup-hook={give}", f"--essential-hook={config}", f"--customize-hook={keep}"]
    command += ["bookworm", str(tree), str(_sources())]
    run(command, timeout=BUILD_SECONDS)


def _configure(tree: Path, work: Path, root_id: str) -> None:
    etc = tree / "etc"
    (etc / "hostname").write_text("server1\n")
    (etc / "hosts").write_text("127.0.0.1 localhost server1\n")
    (etc / "machine-id").write_text(uuid.uuid4().hex + "\n")  # otherwise systemd treats each boot as the first one
    (etc / "fstab").write_text(
        f"UUID={root_id} / ext4 noatime,errors=remount-ro 0 1\n/dev/vg0/data /srv/data ext4 noatime 0 2\n"
    )
    for directory in ("srv/data", "srv/plain", "root/.ssh", "etc/systemd/network"):
        (tree / directory).mkdir(parents=True, exist_ok=True)
    shutil.copy(work / "key.pub", tree / "root/.ssh/authorized_keys")
    (tree / "root/.ssh").chmod(0o700)
    for path in (etc / "ssh").glob("ssh_host_*"):
        path.unlink()
    for name in ("ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"):
        shutil.copy(work / name, etc / "ssh" / name)
    (etc / "ssh/sshd_config.d/lab.conf").write_text("PermitRootLogin prohibit-password\nUseDNS no\n")
    (etc / "systemd/network/50-lab.network").write_text(NETWORK)
    units = etc / "systemd/system"
    (units / "lab-ledger.service").write_text(LEDGER_UNIT)
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "lab-ledger.service").symlink_to("../lab-ledger.service")
    (wants / "systemd-networkd.service").symlink_to("/lib/systemd/system/systemd-networkd.service")
    for unit in MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    shutil.copy(work / "ledgerd", tree / "usr/local/bin/ledgerd")
    run([work / "ledgerd", "mkarea", tree / "srv/plain/area", "1", str(AREA_BLOCKS)])


def _initramfs(tree: Path) -> str:
    """Build it; returns the kernel's version."""
    (version,) = (path.name for path in (tree / "lib/modules").iterdir())
    run(["mount", "--bind", "/proc", tree / "proc"])
    try:
        run(["chroot", tree, "mkinitramfs", "-o", f"/boot/initrd.img-{version}", version], timeout=BUILD_SECONDS)
    finally:
        run(["umount", tree / "proc"])
    (tree / "etc/initramfs-tools/update-initramfs.conf").write_text("update_initramfs=yes\n")
    return version


def _boot_menu(tree: Path, root_id: str, version: str) -> None:
    modules = tree / "boot/grub/i386-pc"
    modules.mkdir(parents=True)
    for path in (tree / "usr/lib/grub/i386-pc").glob("*.mod"):
        shutil.copy(path, modules)
    (tree / "boot/grub/grub.cfg").write_text(
        f"""serial --unit=0
terminal_output serial
set timeout=0
search --no-floppy --fs-uuid --set=root {root_id}
linux /boot/vmlinuz-{version} root=UUID={root_id} ro console=ttyS0 quiet fsck.mode=skip
initrd /boot/initrd.img-{version}
boot
"""
    )


def _make_root_disk(path: Path, tree: Path, work: Path, root_id: str) -> None:
    with path.open("wb") as file:
        file.truncate(ROOT_DISK)
    grub = "21686148-6449-6E6F-744E-656564454649"
    run(["sfdisk", "-q", path], text=f"label: gpt\nstart=2048,size=2048,type={grub}\nstart=4096\n")
    last = int(run(["sfdisk", "-l", "-o", "End", path]).stdout.split()[-1])
    part = work / "root-partition"
    with part.open("wb") as file:
        file.truncate((last + 1) * 512 - ROOT_START)
    options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0"
    size = ["-b", "4096", "-J", "size=16", "-U", root_id, "-E", options, "-d", str(tree)]
    run(["mkfs.ext4", "-q", "-F", *size, part], timeout=BUILD_SECONDS)
    copy_sparse(part, path, ROOT_START)
    part.unlink()
    _install_grub(path, tree, work, root_id)


def _install_grub(disk: Path, tree: Path, work: Path, root_id: str) -> None:
    """The same as grub-install, without mounting the disk: boot.img in the first sector, the core in GRUB's
    partition."""
    early, core = work / "early.cfg", work / "core.img"
    early.write_text(f"search.fs_uuid {root_id} root\nset prefix=($root)/boot/grub\n")
    modules = ["biosdisk", "part_gpt", "ext2", "search", "search_fs_uuid", "normal", "linux", "configfile", "serial"]
    modules += ["terminal", "boot", "echo"]
    platform = tree / "usr/lib/grub/i386-pc"
    run(["grub-mkimage", "-O", "i386-pc", "-d", platform, "-c", early, "-p", "/boot/grub", "-o", core, *modules])
    first = 2048
    boot = bytearray((platform / "boot.img").read_bytes())
    image = bytearray(core.read_bytes())
    image += bytes(-len(image) % 512)
    struct.pack_into("<Q", boot, 0x5C, first)
    boot[0x66:0x68] = b"\x90\x90"  # use the drive that the BIOS names
    # The list of the blocks that follow, at the end of the core's first sector.
    struct.pack_into("<QHH", image, 512 - 12, first + 1, len(image) // 512 - 1, 0x820)
    with disk.open("r+b") as file:
        file.write(boot[:0x1B8])
        file.seek(first * 512)
        file.write(image)


def _make_data_disk(path: Path, work: Path) -> None:
    """A physical volume with one logical volume. Its metadata is written through a loop device; the volume's content is
    written at its first extent."""
    with path.open("wb") as file:
        file.truncate(DATA_DISK)
    loop = run(["losetup", "--find", "--show", path]).stdout.strip()
    config = 'devices { filter = [ "a|^' + loop + '$|", "r|.*|" ] use_devicesfile = 0 } global { locking_type = 0 }'
    lvm = ["--driverloaded", "n", "--config", config]
    try:
        run(["pvcreate", "-q", "-y", *lvm, loop])
        run(["vgcreate", "-q", "-y", *lvm, "vg0", loop])
        run(["lvcreate", "-q", "-y", "-an", "-Zn", "-Wn", *lvm, "-n", "data", "-l", "100%FREE", "vg0"])
        units = ["--noheadings", "--units", "b", "--nosuffix"]
        start = int(run(["pvs", *lvm, *units, "-o", "pe_start", loop]).stdout.split()[-1])
        size = int(run(["lvs", *lvm, *units, "-o", "lv_size", "vg0"]).stdout.split()[-1])
    finally:
        run(["losetup", "-d", loop])
    content, volume = work / "data", work / "data-volume"
    content.mkdir()
    run([work / "ledgerd", "mkarea", content / "area", "0", str(AREA_BLOCKS)])
    with volume.open("wb") as file:
        file.truncate(size)
    options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0"
    run(["mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=4", "-E", options, "-d", content, volume])
    copy_sparse(volume, path, start)


def _build(output: Path, work: Path, say: Callable[[str], None]) -> None:
    root_id = str(uuid.uuid4())
    for name in ("key", "ssh_host_ed25519_key"):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", work / name])
    host_key = " ".join((work / "ssh_host_ed25519_key.pub").read_text().split()[:2])
    here = Path(__file__).parent
    flags = ["-O2", "-static", "-Wall", "-Wextra", "-Werror", "-Wno-format-truncation"]
    run(["gcc", *flags, "-o", work / "ledgerd", here / "server/ledgerd.c", here / "guest/ledger.c"])
    tree = work / "tree"
    say("physical server: unpacking Debian (a minute)")
    _unpack(tree, work)
    say("physical server: initramfs")
    _configure(tree, work, root_id)
    _boot_menu(tree, root_id, _initramfs(tree))
    say("physical server: disks")
    _make_root_disk(output / "root.raw", tree, work, root_id)
    _make_data_disk(output / "data.raw", work)
    shutil.copy(work / "key", output / "key")
    (output / "key").chmod(0o600)
    (output / "known_hosts").write_text(f"{ADDRESS} {host_key}\n")


def build_server_image(say: Callable[[str], None] = lambda _: None) -> ServerImage:
    """Return the image, building it first if any input changed. An interrupted build leaves no image behind."""
    final = _places.CACHE / "server" / _inputs_key()
    if final.is_dir():
        return ServerImage(final)
    with _places.lock("server"):
        if final.is_dir():
            return ServerImage(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob("tmp-*"):  # of a killed build: this process holds the lock
            run(["umount", leftover / "tree/proc"], check=False)
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=final.parent) as work:
            output = Path(work) / "output"
            output.mkdir()
            _build(output, Path(work), say)
            output.rename(final)
        for old in sorted(final.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old)
    return ServerImage(final)
