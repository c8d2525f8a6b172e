"""Readiness of Azure for a machine: what prevents it, what its guest needs to boot there, and what it will cost."""

from __future__ import annotations

import attrs

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.blobs import vhd
from asr_driver_azure.cloud.sizes import choose, generation_of, os_of, why_none
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import Description, Disk, Firmware, Machine
from asrcore.model.policy import Policy
from asrcore.model.protection import NetworkMap
from asrcore.units import DAY, GiB, MiB, TiB, format_duration, format_size

__all__ = ["failover_findings", "findings"]

MOST_BLOB = 8 * TiB
MOST_SYSTEM = {"V1": 2 * TiB, "V2": 4 * TiB - GiB}
"""Bytes of the largest disk that Azure boots from, by generation."""
ASKED_BY_THE_ENGINE = 2
REQUESTS_PER_CYCLE, REQUESTS_PER_DISK = 8 + ASKED_BY_THE_ENGINE, 6
"""Requests of a cycle in which nothing changed; the driver's tests count them, but for the record that the engine reads
before it opens one."""


def findings(account: AzureAccount, description: Description, policy: Policy) -> list[Finding]:
    """See `Target.findings`."""
    machine = description.machine
    found = [item for disk in machine.disks for item in _disk(disk)]
    found.append(_cost(machine, policy))
    if account.settings.runs_machines:
        found += _system(machine)
        found += _place(account, machine)
        if description.platform != account.driver:
            found.append(_guest(machine, account.settings.repair))
    else:
        found.append(_no_machines(Severity.WARNING))
    return found


def failover_findings(account: AzureAccount, description: Description, networks: NetworkMap) -> list[Finding]:
    """See `Target.failover_findings`."""
    if not account.settings.runs_machines:
        return [_no_machines(Severity.ERROR)]
    nics = tuple(attrs.evolve(nic, network=networks.target(nic.network)) for nic in description.machine.nics)
    machine = attrs.evolve(description.machine, nics=nics)
    return [*_system(machine), *_place(account, machine)]


def _no_machines(severity: Severity) -> Finding:
    return Finding(
        "azure-no-machines",
        severity,
        "the site stores the replica but cannot run it",
        "Its setting `subscription` is not set.",
        "Set `subscription`, `resource_group` and `location` before a failover is needed, and test one.",
    )


def _disk(disk: Disk) -> list[Finding]:
    if disk.size > MOST_BLOB:
        return [
            Finding(
                "azure-disk-too-large",
                Severity.ERROR,
                f"disk {disk.id} has {format_size(disk.size)}",
                "A page blob holds 8 TiB at most.",
                "Split the disk in the guest, or do not protect this machine to Azure.",
            )
        ]
    if disk.sector_size != 512:
        return [
            Finding(
                "azure-sector-size",
                Severity.ERROR,
                f"disk {disk.id} has sectors of {disk.sector_size} bytes",
                "A disk made of a page blob has sectors of 512 bytes: its partition table could not be read.",
                "Move the machine to a disk with sectors of 512 bytes, or do not protect it to Azure.",
            )
        ]
    if vhd.managed_size(disk.size) != disk.size:
        return [
            Finding(
                "azure-disk-rounded",
                Severity.INFO,
                f"disk {disk.id} of {disk.size} bytes becomes one of {format_size(vhd.managed_size(disk.size))}",
                "Azure's disks are whole mebibytes, at least 20; zeroes are added at the end.",
                "No action needed. Failback restores its own size.",
            )
        ]
    return []


def _system(machine: Machine) -> list[Finding]:
    found = []
    generation = generation_of(machine)
    if machine.disks and machine.disks[0].size > MOST_SYSTEM[generation]:
        found.append(
            Finding(
                "azure-system-disk-too-large",
                Severity.ERROR,
                f"the first disk, {machine.disks[0].id}, has {format_size(machine.disks[0].size)}",
                f"Azure boots machines of generation {generation[1:]} from disks of "
                f"{format_size(MOST_SYSTEM[generation])} at most.",
                "Move data to another disk, then shrink it.",
            )
        )
    if machine.secure_boot or machine.tpm:
        found.append(
            Finding(
                "azure-no-secure-boot",
                Severity.WARNING,
                "the machine has secure boot or a TPM",
                "It runs in Azure without either. Disk encryption keys sealed to the TPM are not available there.",
                "Keep the recovery key at hand; run a test failover.",
            )
        )
    return found


def _place(account: AzureAccount, machine: Machine) -> list[Finding]:
    found = [
        Finding(
            "azure-network-missing",
            Severity.ERROR,
            f"the site has no network {network!r}",
            "The machine is plugged into it at the source, and no mapping names another.",
            "Add it to the site's setting `networks`, or map it: `--network SOURCE=NAME`.",
        )
        for network in sorted({nic.network for nic in machine.nics})
        if account.settings.network(network) is None
    ]
    settings = account.settings
    size = choose(machine, account.sizes(), settings)
    if size is None:
        found.append(
            Finding(
                "azure-size-missing",
                Severity.ERROR,
                f"no machine size of {settings.location} fits: {why_none(machine, account.sizes(), settings)}",
                "The settings `sizes` and `size_rules` allow none, or the region or subscription has none.",
                "Add sizes to `sizes`, or set one in `size_rules`.",
            )
        )
    else:
        found.append(
            Finding(
                "azure-size",
                Severity.INFO,
                f"it will run as {size.name}, generation {generation_of(machine)[1:]} "
                f"({'UEFI' if machine.firmware is Firmware.UEFI else 'BIOS'})",
                f"The chosen size has {size.cpus} CPUs, {format_size(size.memory)} of memory.",
                "No action needed. The site's `sizes` and `size_rules` select another size.",
            )
        )
    return found


def _guest(machine: Machine, repair: bool) -> Finding:
    why = "Azure's hypervisor shows other disks and cards than the machine has now; "
    if os_of(machine) == "Windows":
        needs = "the Hyper-V drivers of Windows 8 / Server 2012 or newer are built in"
        why += "nothing is changed in the guest."
        action = "Set all cards to DHCP, enable the serial console (`bcdedit /ems on`), and run a test failover."
    else:
        needs = "hv_vmbus, hv_storvsc and hv_netvsc in the initramfs, root by UUID, DHCP, and console=ttyS0"
        why += (
            "at a failover all but the initramfs is repaired on the machine's disk, if its root is an ext file system."
            if repair
            else "the site's setting `repair` is off: nothing is changed in the guest."
        )
        action = (
            "In the guest: `lsinitramfs /boot/initrd.img-$(uname -r) | grep hv_` (or `lsinitrd`); add what is missing "
            "to the initramfs, then run a test failover: it lists what it changed and what not. Read its console."
        )
    return Finding(
        "azure-guest",
        Severity.WARNING,
        f"whether the guest boots under Hyper-V was not checked ({needs})",
        why,
        action,
    )


def _cost(machine: Machine, policy: Policy) -> Finding:
    cycles = DAY / policy.interval
    requests = round(cycles * (REQUESTS_PER_CYCLE + REQUESTS_PER_DISK * len(machine.disks)))
    size = sum(vhd.blob_size(disk.size) for disk in machine.disks)
    first = -(-size // (4 * MiB))
    return Finding(
        "azure-cost",
        Severity.INFO,
        f"up to {format_size(size)} of page blobs and {first} writes at first; about {requests} requests a day at a "
        f"cycle every {format_duration(policy.interval)}, and one write for each 4 MiB or scattered change",
        "Azure bills pages that hold data, the differences of each kept point, and requests; during a failover also "
        "disks and machines.",
        "A longer interval costs fewer requests; a shorter retention keeps fewer pages. `asr site show` shows what is "
        "stored.",
    )
