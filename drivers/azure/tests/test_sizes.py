"""The choice of a size."""

from __future__ import annotations

import attrs
import pytest

from asr_driver_azure.cloud.sizes import choose, sizes_of, why_none
from asr_driver_azure.settings import SiteSettings
from asrcore.model.machine import Disk, Firmware, Machine, Nic
from asrcore.units import GiB, MiB
from drivers.azure.tests.peers.arm.compute import SIZES
from drivers.azure.tests.peers.arm.server import _sku

GIVEN = {"account_url": "https://lab.blob.core.windows.net", "container": "replicas"}
OFFERED = sizes_of(_sku(name) for name in SIZES)


UEFI = Firmware.UEFI


def machine(cpus: int, memory: int, disks: int = 1, firmware: Firmware = Firmware.BIOS, cards: int = 1) -> Machine:
    nics = tuple(Nic(f"52:54:00:00:00:0{n}", "lan") for n in range(cards))
    return Machine("id", "web", cpus, memory, firmware, tuple(Disk(f"vd{n}", GiB) for n in range(disks)), nics)


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        (machine(1, 256 * MiB), "Standard_B1ls"),
        (machine(1, GiB), "Standard_B1s"),
        (machine(2, 4 * GiB), "Standard_B2s"),
        (machine(2, 5 * GiB), "Standard_D2s_v5"),
        (machine(1, GiB, disks=6), "Standard_D4s_v5"),
        (machine(1, GiB, disks=6, firmware=UEFI), "Standard_D2ds_v5"),  # D2s_v6 takes NVMe disks only
        (machine(2, GiB, firmware=UEFI), "Standard_B2s"),  # B2pts_v2 has Arm processors
        (machine(1, GiB, cards=3), "Standard_B2s"),
        (machine(1, GiB, cards=4), "Standard_D8s_v5"),
        (machine(1, GiB, cards=5), None),
        (machine(64, GiB), None),
    ],
)
def test_the_smallest_that_fits(wanted: Machine, name: str | None) -> None:
    size = choose(wanted, OFFERED, SiteSettings.parse(GIVEN))
    assert (size.name if size else None) == name


def test_only_what_is_allowed() -> None:
    settings = SiteSettings.parse(GIVEN | {"sizes": "Standard_D8s_v5, Standard_D4s_v5"})
    size = choose(machine(1, GiB), OFFERED, settings)
    assert size is not None
    assert size.name == "Standard_D4s_v5"


def test_a_rule_names_it() -> None:
    settings = SiteSettings.parse(GIVEN | {"size_rules": "web=Standard_A1_v2; db=Standard_XXL"})
    size = choose(machine(4, GiB), OFFERED, settings)
    assert size is not None
    assert size.name == "Standard_A1_v2"
    missing = attrs.evolve(machine(1, GiB), name="db")
    assert choose(missing, OFFERED, settings) is None
    assert "does not offer" in why_none(missing, OFFERED, settings)


@pytest.mark.parametrize(
    ("wanted", "rule", "reported"),
    [
        (machine(1, GiB, firmware=UEFI), "Standard_A1_v2", "boots V1 only"),
        (machine(1, GiB), "Standard_D2ds_v5", "boots V2 only"),
        (machine(1, GiB, firmware=UEFI), "Standard_D2ps_v5", "Arm64"),
        (machine(1, GiB, firmware=UEFI), "Standard_D2s_v6", "NVMe"),
        (machine(1, GiB, cards=3), "Standard_B1s", "2 network cards"),
        (machine(1, GiB, disks=4), "Standard_B1s", "2 disks"),
    ],
)
def test_a_rule_names_what_it_cannot_boot_on(wanted: Machine, rule: str, reported: str) -> None:
    settings = SiteSettings.parse(GIVEN | {"size_rules": f"web={rule}"})
    assert choose(wanted, OFFERED, settings) is None
    assert reported in why_none(wanted, OFFERED, settings)


def test_a_size_that_the_subscription_may_not_have() -> None:
    sku = _sku("Standard_B1ls") | {"restrictions": [{"type": "Location", "reasonCode": "NotAvailableForSubscription"}]}
    assert sizes_of([sku]) == []
