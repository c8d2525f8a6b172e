"""A server as the neutral values of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asr_driver_physical.errors import OtherServer
from asr_driver_physical.servers.identity import ServerRecord
from asr_driver_physical.servers.readiness import boot_bus
from asr_driver_physical.settings import DRIVER
from asrcore.model.machine import Description, Disk, Firmware, Machine, Nic, PowerState

__all__ = ["check_same", "description_of", "machine_of"]


def check_same(server: ServerRecord, reported: Mapping[str, Any]) -> None:
    """Raises OtherServer unless the agent says that it is the server that was enrolled."""
    if reported["id"] != server.reported_id:
        raise OtherServer(server=server.name, reported=reported["id"], enrolled=server.reported_id)


def machine_of(server: ServerRecord, reported: Mapping[str, Any], power: PowerState) -> Machine:
    """`reported`: what the agent reports of the machine; its id is that of its record. A disk's bus is one from which
    its system can boot on any platform; a card's network is the card's name, since the server does not know what it is
    plugged into."""
    bus = boot_bus(server.facts)
    return Machine(
        id=server.machine_id,
        name=server.name,
        cpus=reported["cpus"],
        memory=_rounded(reported["memory"]),
        firmware=Firmware(reported["firmware"]),
        disks=tuple(
            Disk(
                id=item["id"],
                size=item["size"],
                bus=bus,
                location=f"/dev/{item['name']}",
                sector_size=item.get("sector_size", 512),
            )
            for item in reported["disks"]
        ),
        nics=tuple(Nic(mac=item["mac"], network=item["name"], model="virtio") for item in reported["nics"]),
        power=power,
        os=reported["os"],
        secure_boot=reported["secure_boot"],
        tpm=reported["tpm"],
    )


def description_of(server: ServerRecord, reported: Mapping[str, Any]) -> Description:
    """Neutral values only: any target creates a machine of its platform from them."""
    return Description(machine_of(server, reported, PowerState.RUNNING), DRIVER)


def _rounded(memory: int) -> int:
    """The kernel's count lacks what the firmware reserves: rounded up to the next 128 MiB."""
    step = 128 << 20
    return -(-memory // step) * step
