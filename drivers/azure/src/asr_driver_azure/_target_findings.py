"""Readiness of the site as a target for a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import Description
from asrcore.model.policy import Policy
from asrcore.units import TiB, format_size

if TYPE_CHECKING:
    from asr_driver_azure._site import AzureSite

__all__ = ["findings"]

MOST_BLOB = 8 * TiB


def findings(site: AzureSite, description: Description, policy: Policy) -> list[Finding]:
    """See `Target.findings`."""
    return [
        Finding(
            "azure-disk-too-large",
            Severity.ERROR,
            f"disk {disk.id} has {format_size(disk.size)}",
            "A page blob holds 8 TiB at most.",
            "Split the disk in the guest, or leave the machine where it is.",
        )
        for disk in description.machine.disks
        if disk.size > MOST_BLOB
    ]
