"""A machine as every hypervisor knows it, and its description as kept with a recovery point."""

from __future__ import annotations

from enum import Enum

import attrs

__all__ = ["Artifact", "Description", "Disk", "Firmware", "Machine", "Nic", "PowerState"]


class Firmware(Enum):
    """What starts the boot loader."""

    BIOS = "bios"
    UEFI = "uefi"


class PowerState(Enum):
    """Power as the site reports it."""

    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"
    UNKNOWN = "unknown"


@attrs.frozen
class Disk:
    """A disk of a machine. `id` names it within the machine and stays the same over its life (`vda`, `scsi0:1`).

    `size` is what the guest sees, in bytes; `sector_size` is the smallest unit that it may read or write (512, or 4096
    of a "4Kn" disk, whose partition table is unreadable with any other). `location` and `format` are the site's words,
    for people.
    """

    id: str
    size: int
    format: str = "raw"
    bus: str = ""
    location: str = ""
    sector_size: int = 512


@attrs.frozen
class Nic:
    """A network card: `network` is the site's name for what it is plugged into."""

    mac: str
    network: str
    model: str = ""


@attrs.frozen
class Machine:
    """A machine at a site. `id` outlives renaming; `memory` is in bytes."""

    id: str
    name: str
    cpus: int
    memory: int
    firmware: Firmware
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...] = ()
    power: PowerState = PowerState.UNKNOWN
    os: str = ""
    secure_boot: bool = False
    tpm: bool = False

    def disk(self, disk_id: str) -> Disk:
        """The disk of that id; KeyError if there is none."""
        for disk in self.disks:
            if disk.id == disk_id:
                return disk
        raise KeyError(disk_id)


@attrs.frozen
class Artifact:
    """A piece of a machine in its own platform's form, such as a domain definition or the UEFI variables."""

    name: str
    data: bytes = attrs.field(repr=lambda data: f"<{len(data)} bytes>")


@attrs.frozen
class Description:
    """All of a machine but its disks' content: neutral values, and artifacts only `platform` understands.

    A target of the same platform rebuilds exactly what was protected from the artifacts; any other builds
    from the neutral values.
    """

    machine: Machine
    platform: str
    artifacts: tuple[Artifact, ...] = ()

    def artifact(self, name: str) -> bytes | None:
        """The data of the named artifact, or None."""
        return next((item.data for item in self.artifacts if item.name == name), None)
