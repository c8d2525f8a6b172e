"""Which machine size a machine gets: by rule, or the smallest that holds it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from asr_driver_azure._settings import SiteSettings
from asrcore.model.machine import Firmware, Machine
from asrcore.units import GiB

__all__ = ["Size", "choose", "generation_of", "sizes_of"]

# Where nobody says which: general-purpose sizes. Others cost more, or are made for one thing (GPUs, storage, HPC).
_GENERAL = re.compile(r"Standard_(B\d+\w*|D\d+\w*s)(_v\d+)?")


@attrs.frozen
class Size:
    """`memory` in bytes; `disks` besides the system's; `generations`: V1 boots by BIOS, V2 by UEFI."""

    name: str
    cpus: int
    memory: int
    disks: int
    generations: frozenset[str]


def generation_of(machine: Machine) -> str:
    """Azure's word for the firmware."""
    return "V2" if machine.firmware is Firmware.UEFI else "V1"


def sizes_of(skus: Iterable[Mapping[str, Any]]) -> list[Size]:
    """What the region offers to this subscription."""
    found = []
    for sku in skus:
        if any(item.get("type") == "Location" for item in sku.get("restrictions") or ()):
            continue  # not for this subscription
        able = {item["name"]: item["value"] for item in sku.get("capabilities") or ()}
        found.append(
            Size(
                name=str(sku["name"]),
                cpus=int(able.get("vCPUsAvailable") or able.get("vCPUs", 0)),
                memory=int(float(able.get("MemoryGB", 0)) * GiB),
                disks=int(able.get("MaxDataDiskCount", 0)),
                generations=frozenset(str(able.get("HyperVGenerations", "V1")).split(",")),
            )
        )
    return found


def choose(machine: Machine, sizes: Iterable[Size], settings: SiteSettings) -> Size | None:
    """The size for the machine; None if none fits, or the one that a rule names is not there."""
    offered = {size.name: size for size in sizes}
    rule = next((item.size for item in settings.size_rules if item.machine == machine.name), None)
    if rule is not None:
        return offered.get(rule)
    allowed = [
        size
        for size in offered.values()
        if (size.name in settings.sizes if settings.sizes else _GENERAL.fullmatch(size.name))
        and size.cpus >= machine.cpus
        and size.memory >= machine.memory
        and size.disks >= len(machine.disks) - 1
        and generation_of(machine) in size.generations
    ]
    return min(allowed, key=lambda size: (size.cpus, size.memory, size.name), default=None)
