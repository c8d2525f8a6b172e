"""The Debian packages that the lab and the project's own build need on a Debian 12 host."""

from __future__ import annotations

from collections.abc import Sequence

from tests.lab._run import run

GROUPS = {
    # libvirt-python is built from source
    "build": ("gcc", "libc6-dev", "libvirt-dev", "pkg-config"),
    "lab": (
        # hypervisor and firmware
        "libvirt-clients",
        "libvirt-daemon-driver-qemu",
        "libvirt-daemon-system",
        "ovmf",
        "qemu-system-x86",
        "qemu-utils",
        # libraries loaded by the driver's binding
        "libnbd0",
        # the sites: network, replica directories
        "iproute2",
        "iptables",
        "util-linux",
        "xfsprogs",
        # the guests' disks
        "busybox-static",
        "dosfstools",
        "e2fsprogs",
        "fdisk",
        "gcc",
        "grub-common",
        "grub-efi-amd64-bin",
        "grub-pc-bin",
        "libc6-dev",
        "mtools",
    ),
    # the physical server: a whole Debian with LVM, reached by SSH
    "server": ("lvm2", "mmdebstrap", "openssh-client"),
    "tests": (
        # a server other than QEMU to test the libnbd binding with
        "nbdkit",
        # SSH between the sites, with a server that its package does not start
        "dropbear-bin",
        "openssh-client",
        "openssh-sftp-server",
        # the vault of several servers: tests start their own cluster
        "postgresql",
    ),
}
"""Packages by purpose; a target of the Makefile names the groups that it needs."""

INSTALL_SECONDS = 900.0


def missing_packages(names: Sequence[str]) -> list[str]:
    """The packages that are not installed."""
    asked = run(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *names], check=False)
    present = {line.split()[0] for line in asked.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in names if name not in present]


def install_packages(names: list[str]) -> None:
    """Install them with apt; returns immediately for an empty list."""
    if not names:
        return
    apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    run([*apt, "update"], timeout=INSTALL_SECONDS, env=env)
    run([*apt, "install", "-y", "--no-install-recommends", *names], timeout=INSTALL_SECONDS, env=env)
