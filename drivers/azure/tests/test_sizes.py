"""The choice of a size."""

from __future__ import annotations

import attrs
import pytest

from asr_driver_azure._settings import SiteSettings
from asr_driver_azure._sizes import choose, sizes_of
from asrcore.model.machine import Disk, Firmware, Machine
from asrcore.units import GiB, MiB
from drivers.azure.tests.peers.arm.compute import SIZES
from drivers.azure.tests.peers.arm.server import _sku

GIVEN = {"account_url": "https://lab.blob.core.windows.net", "container": "replicas"}
OFFERED = sizes_of(_sku(name) for name in SIZES)


def machine(cpus: int, memory: int, disks: int = 1, firmware: Firmware = Firmware.BIOS) -> Machine:
    return Machine("id", "web", cpus, memory, firmware, tuple(Disk(f"vd{n}", GiB) for n in range(disks)))


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        (machine(1, 256 * MiB), "Standard_B1ls"),
        (machine(1, GiB), "Standard_B1s"),
        (machine(2, 4 * GiB), "Standard_B2s"),
        (machine(2, 5 * GiB), "Standard_D2s_v5"),
        (machine(1, GiB, disks=6), "Standard_D4s_v5"),
        (machine(1, GiB, disks=6, firmware=Firmware.UEFI), "Standard_D2s_v6"),
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
    assert choose(attrs.evolve(machine(1, GiB), name="db"), OFFERED, settings) is None


def test_a_size_that_the_subscription_may_not_have() -> None:
    sku = _sku("Standard_B1ls") | {"restrictions": [{"type": "Location", "reasonCode": "NotAvailableForSubscription"}]}
    assert sizes_of([sku]) == []
