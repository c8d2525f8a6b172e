"""Machines without an operating system: QEMU itself is instructed what to write, exactly and immediately."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.lab._lab import Lab

__all__ = ["BareMachine"]


class BareMachine:
    """32 MiB of memory, one qcow2 disk of 32 MiB, running."""

    def __init__(self, lab: Lab, site: str, name: str, *, compat: str = "1.1") -> None:
        self.lab, self.site, self.name = lab, site, name
        self.image = f"/srv/images/{name}.qcow2"
        lab.run_in(site, ["rm", "-f", self.image])
        lab.run_in(site, ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", self.image, "32M"])
        self.define(f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{self.image}'/>")
        self.virsh("start", name)
        self.id = self.virsh("domuuid", name).strip()

    def define(self, disk: str) -> None:
        """Define it with that disk (XML without its target)."""
        xml = f"""
        <domain type='qemu'><name>{self.name}</name><memory unit='MiB'>32</memory>
          <os><type arch='x86_64' machine='pc'>hvm</type></os>
          <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{disk}<target dev='vda' bus='virtio'/></disk>
          <controller type='usb' model='none'/><memballoon model='none'/></devices>
        </domain>"""
        self.lab.sites[self.site].virsh("define", "/dev/stdin", text=xml)

    def virsh(self, *words: str, check: bool = True) -> str:
        """What virsh prints at its site."""
        return self.lab.sites[self.site].virsh(*words, check=check).stdout

    def write(self, at: str) -> None:
        """64 KiB at that offset, as if the guest did it."""
        line = f'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "write -P 7 {at} 64k"'
        said = self.virsh("qemu-monitor-command", "--hmp", self.name, line)
        assert "error" not in said.lower(), said

    def checkpoints(self) -> set[str]:
        """Names of libvirt's."""
        return set(self.virsh("checkpoint-list", self.name, "--name").split())

    def bitmaps(self) -> str:
        """What its image holds of them; the machine must be off."""
        found = self.lab.run_in(self.site, ["qemu-img", "info", self.image]).stdout
        return found.partition("bitmaps:")[2]

    def remove(self) -> None:
        """Stop it and forget it."""
        self.virsh("destroy", self.name, check=False)
        self.virsh("undefine", self.name, "--checkpoints-metadata", "--snapshots-metadata", check=False)
