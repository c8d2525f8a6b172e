"""Which machine size a machine gets: by rule, or the smallest that holds it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from asr_driver_azure.settings import SiteSettings
from asrcore.model.machine import Firmware, Machine
from asrcore.units import GiB, format_size

__all__ = ["Size", "choose", "generation_of", "misfit", "os_of", "sizes_of", "why_none"]

# Without a setting: general-purpose sizes. Others cost more, or are made for one thing (GPUs, storage, HPC).
_GENERAL = re.compile(r"Standard_(B\d+\w*|D\d+\w*s)(_v\d+)?")


@attrs.frozen
class Size:
    """`memory` in bytes; `disks` besides the system's; `generations`: V1 boots by BIOS, V2 by UEFI. `controllers`: how
    disks are shown to the guest."""

    name: str
    cpus: int
    memory: int
    disks: int
    generations: frozenset[str]
    cards: int = 1
    architecture: str = "x64"
    controllers: frozenset[str] = frozenset({"SCSI"})


def generation_of(machine: Machine) -> str:
    """Azure's name for the firmware."""
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
                generations=_words(able.get("HyperVGenerations", "V1")),
                cards=int(able.get("MaxNetworkInterfaces", 1)),
                architecture=str(able.get("CpuArchitectureType", "x64")),
                controllers=_words(able.get("DiskControllerTypes", "SCSI")),
            )
        )
    return found


def _words(text: str) -> frozenset[str]:
    return frozenset(word.strip() for word in text.split(","))


def misfit(machine: Machine, size: Size) -> str:
    """Why the machine cannot run on that size, whatever its CPU and memory; empty if it can."""
    if size.architecture != "x64":
        return f"its processors are {size.architecture}"
    if generation_of(machine) not in size.generations:
        return f"it boots {', '.join(sorted(size.generations))} only, and the machine is {generation_of(machine)}"
    if "SCSI" not in size.controllers:
        # A disk would have to be marked as fit for it, and only its guest knows whether it is.
        return "it shows disks by NVMe only"
    if size.disks < len(machine.disks) - 1:
        return f"it takes {size.disks} disks besides the system's"
    if size.cards < len(machine.nics):
        return f"it has {size.cards} network cards at most"
    return ""


def rule_for(machine: Machine, settings: SiteSettings) -> str:
    """The size that the site's rules name for it; empty if none does."""
    return next((item.size for item in settings.size_rules if item.machine == machine.name), "")


def choose(machine: Machine, sizes: Iterable[Size], settings: SiteSettings) -> Size | None:
    """The size for the machine; None if none fits. A rule may give it less than it has, but no size on which it cannot
    boot."""
    offered = {size.name: size for size in sizes if not misfit(machine, size)}
    rule = rule_for(machine, settings)
    if rule:
        return offered.get(rule)
    allowed = [
        size
        for size in offered.values()
        if (size.name in settings.sizes if settings.sizes else _GENERAL.fullmatch(size.name))
        and size.cpus >= machine.cpus
        and size.memory >= machine.memory
    ]
    return min(allowed, key=lambda size: (size.cpus, size.memory, size.name), default=None)


def why_none(machine: Machine, sizes: Iterable[Size], settings: SiteSettings) -> str:
    """The reason, where `choose` found none."""
    rule = rule_for(machine, settings)
    if not rule:
        return (
            f"{machine.cpus} CPUs, {format_size(machine.memory)} of memory, {len(machine.disks)} disks, "
            f"{len(machine.nics)} network cards, generation {generation_of(machine)[1:]}, x64, SCSI"
        )
    named = next((size for size in sizes if size.name == rule), None)
    return f"its rule names {rule}: " + (misfit(machine, named) if named else "the region does not offer it")


def os_of(machine: Machine) -> str:
    """Azure's name for the operating system."""
    return "Windows" if "windows" in machine.os.lower() else "Linux"
