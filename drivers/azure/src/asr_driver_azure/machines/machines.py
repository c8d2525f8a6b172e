"""The machines of a site: those that the driver created, and all others."""

from __future__ import annotations

import json

import attrs

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.cloud.arm import Resource, tags_of
from asr_driver_azure.machines.record import (
    MACHINES,
    TAG_DISK,
    TAG_FENCE,
    TAG_OWNER,
    TAG_SIZE,
    Defined,
    FenceAt,
    fence_blob,
    machine_blob,
)
from asrcore import codec
from asrcore.driver import Fence
from asrcore.errors import DriverFailed, MachineNotFound
from asrcore.model.machine import Description, Disk, Firmware, Machine, Nic, PowerState

__all__ = ["PLATFORM", "Machines"]

PLATFORM = "azure"
_POWER = {
    "running": PowerState.RUNNING,
    "starting": PowerState.RUNNING,
    "stopping": PowerState.RUNNING,
    "stopped": PowerState.OFF,
    "deallocating": PowerState.OFF,
    "deallocated": PowerState.OFF,
    "": PowerState.OFF,  # defined, and not started yet
}


class Machines:
    """Looks machines up; their id is the driver's for machines that it created, else Azure's name."""

    def __init__(self, account: AzureAccount) -> None:
        self._account = account
        self._container = account.container
        self._arm = account.arm

    # -- machines that the driver created

    def defined(self, name: str) -> Defined | None:
        """The record of a machine that the driver created, by Azure's name."""
        found = self._container.read(machine_blob(name))
        if found is None:
            return None
        try:
            return codec.load(Defined, found[0])
        except ValueError as problem:
            raise DriverFailed(
                operation="reading a machine's record", site=self._account.name, detail=f"{problem}"
            ) from problem

    def all_defined(self) -> list[Defined]:
        """All that the driver created, including those put aside."""
        listed = [item.name[len(MACHINES) :] for item in self._container.listed(MACHINES)]
        names = [name.removesuffix(".json") for name in listed if "/" not in name]
        return [item for item in (self.defined(name) for name in names) if item is not None]

    def whole(self, name: str) -> bool:
        """Whether it was created completely."""
        return self.defined(name) is not None

    def put_aside(self, name: str, aside: bool) -> None:
        """Hide a machine that the driver created from the inventory, or show it again."""
        known = self.defined(name)
        if known is not None and known.aside is not aside:
            self._container.write(machine_blob(name), codec.dump(attrs.evolve(known, aside=aside)))

    def find(self, machine_id: str) -> str | None:
        """Azure's name of the machine of that id, or None."""
        for item in self.all_defined():
            if item.machine_id == machine_id and not item.aside:
                return item.name
        found = self._arm.get("virtualMachines", machine_id) if _may_be_a_name(machine_id) else None
        return None if found is None or TAG_OWNER in tags_of(found) else str(found["name"])

    def name(self, machine_id: str) -> str:
        """The same. Raises MachineNotFound."""
        found = self.find(machine_id)
        if found is None:
            raise MachineNotFound(site=self._account.name, machine=machine_id)
        return found

    def power(self, name: str) -> PowerState:
        """Of Azure's machine of that name."""
        return _POWER.get(self._arm.power(name), PowerState.UNKNOWN)

    def runs(self, name: str) -> bool:
        """Whether it may be writing."""
        return self.power(name) is not PowerState.OFF

    # -- quarantine

    def fenced(self, machine_id: str) -> Fence | None:
        """The fence that is recorded, or None."""
        found = self._container.read(fence_blob(machine_id))
        return codec.load(FenceAt, found[0]).fence if found else None

    def fence(self, machine_id: str, fence: Fence) -> None:
        """Record it, and tag the machine for people."""
        self._account.make_container()
        self._container.write(fence_blob(machine_id), codec.dump(FenceAt(machine_id, fence)))
        sign = json.dumps({"epoch": fence.epoch, "reason": fence.reason})[:256]
        self._arm.tag("virtualMachines", self.name(machine_id), {TAG_FENCE: sign})

    def unfence(self, machine_id: str, epoch: int) -> None:
        """Remove a fence of at most `epoch`."""
        found = self.fenced(machine_id)
        if found is None or found.epoch > epoch:
            return
        name = self.find(machine_id)
        if name is not None:
            self._arm.tag("virtualMachines", name, {TAG_FENCE: None})
        self._container.delete(fence_blob(machine_id))

    # -- looking

    def all(self) -> list[Description]:
        """Every machine of the group that is not put aside."""
        known = self.all_defined()
        made = [self._describe(item) for item in known if not item.aside]
        others = [self._foreign(item) for item in self._arm.listed("virtualMachines") if TAG_OWNER not in tags_of(item)]
        return [*made, *others]

    def describe(self, machine_id: str) -> Description:
        """One of them. Raises MachineNotFound."""
        name = self.name(machine_id)
        known = self.defined(name)
        if known is not None:
            return self._describe(known)
        found = self._arm.get("virtualMachines", name)
        if found is None:
            raise MachineNotFound(site=self._account.name, machine=machine_id)
        return self._foreign(found)

    def disks(self, machine_id: str) -> dict[str, tuple[str, int]]:
        """Azure's name and the size in bytes of each disk, by the disk's id."""
        name = self.name(machine_id)
        known, vm = self.defined(name), self._arm.get("virtualMachines", name)
        names = known.in_order if known is not None and vm is None else _disks_of(vm or {})
        return {disk_id: (azure, size) for disk_id, azure, size in self._sized(names)}

    def _sized(self, names: list[str]) -> list[tuple[str, str, int]]:
        found = []
        for number, name in enumerate(names):
            resource = self._arm.get("disks", name) or {}
            size = int(resource.get("properties", {}).get("diskSizeBytes", 0))
            reported = int(tags_of(resource).get(TAG_SIZE, 0))
            # A size that the driver rounded up is reported as protected; one that was enlarged since is not.
            size = reported if 0 < reported <= size < reported + _PADDING else size
            found.append((tags_of(resource).get(TAG_DISK) or (f"lun{number - 1}" if number else "os"), name, size))
        return found

    def _describe(self, item: Defined) -> Description:
        """As it was protected, so that it can fail back unchanged; its disks and networks as they are now."""
        vm = self._arm.get("virtualMachines", item.name)
        names = item.in_order if vm is None else _disks_of(vm)
        before = {disk.id: disk for disk in item.description.machine.disks}
        disks = tuple(
            attrs.evolve(before.get(disk_id, Disk(disk_id, size)), size=size, location=name, format="raw")
            for disk_id, name, size in self._sized(names)
        )
        nics = tuple(
            attrs.evolve(nic, network=network)
            for nic, network in zip(item.description.machine.nics, item.networks, strict=False)
        )
        power = self.power(item.name) if vm is not None else PowerState.OFF
        machine = attrs.evolve(item.description.machine, id=item.machine_id, disks=disks, nics=nics, power=power)
        if {disk.id for disk in disks} == before.keys():
            return attrs.evolve(item.description, machine=machine)
        return Description(machine, PLATFORM)  # what its first platform kept of it no longer fits

    def _foreign(self, vm: Resource) -> Description:
        properties = vm["properties"]
        size = next(
            (item for item in self._account.sizes() if item.name == properties["hardwareProfile"]["vmSize"]), None
        )
        names = _disks_of(vm)
        system = self._arm.get("disks", names[0]) if names else None
        uefi = bool(system) and (system or {}).get("properties", {}).get("hyperVGeneration") == "V2"
        disks = tuple(Disk(disk_id, size, location=name) for disk_id, name, size in self._sized(names))
        machine = Machine(
            id=str(vm["name"]),
            name=str(vm["name"]),
            cpus=size.cpus if size else 1,
            memory=size.memory if size else 0,
            firmware=Firmware.UEFI if uefi else Firmware.BIOS,
            disks=disks,
            nics=tuple(self._nic(card["id"]) for card in properties["networkProfile"]["networkInterfaces"]),
            power=self.power(str(vm["name"])),
            os=str(properties["storageProfile"]["osDisk"].get("osType", "")),
        )
        return Description(machine, PLATFORM)

    def _nic(self, card_id: str) -> Nic:
        card = self._arm.get("networkInterfaces", card_id.rpartition("/")[2]) or {}
        properties = card.get("properties", {})
        configs = properties.get("ipConfigurations") or [{}]
        subnet = configs[0].get("properties", {}).get("subnet", {}).get("id", "")
        parts = subnet.split("/")
        known = next(
            (
                item.name
                for item in self._account.settings.networks
                if parts[-3:] == [item.vnet, "subnets", item.subnet]
            ),
            "/".join(parts[-3::2]),
        )
        return Nic(str(properties.get("macAddress", "")).replace("-", ":").lower(), known)


_PADDING = 21 * 1024 * 1024


def _may_be_a_name(text: str) -> bool:
    return 0 < len(text) <= 64 and all(letter.isalnum() or letter in "-_." for letter in text)


def _disks_of(vm: Resource) -> list[str]:
    storage = vm["properties"]["storageProfile"] if vm else {}
    data = sorted(storage.get("dataDisks") or [], key=lambda disk: int(disk["lun"]))
    disks = [storage["osDisk"], *data] if storage else []
    return [str(disk["managedDisk"]["id"]).rpartition("/")[2] for disk in disks]
