"""A machine of a recovery point: disks by direct upload, cards in their networks; and the deletion of all of it.

Every resource has a name that follows from its purpose, so each step may be repeated; and a tag that names its machine,
so that what a killed engine leaves is found.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.blobs import vhd
from asr_driver_azure.blobs.digests import DigestTable
from asr_driver_azure.blobs.pageblob import MOST, PageBlob
from asr_driver_azure.blobs.record import Snapshot
from asr_driver_azure.cloud import sizes
from asr_driver_azure.cloud.arm import KINDS, Resource, tags_of
from asr_driver_azure.cloud.errors import NetworkUnknown, SizeNotFound, UploadFailed
from asr_driver_azure.machines.disk_access import Access
from asr_driver_azure.machines.record import (
    BASE_VIEW,
    MACHINES,
    TAG_COMMITTED,
    TAG_DISK,
    TAG_POWER,
    TAG_SIZE,
    TAG_TAKEN,
    TAG_VAULT,
    TAG_VIEW,
    Defined,
    belongs,
    machine_blob,
    repairs_blob,
    tags_for,
)
from asr_driver_azure.repair.system_disk import Repair
from asr_driver_azure.settings import Network
from asrcore import codec
from asrcore.crashpoint import reach
from asrcore.driver import DIGEST_BLOCK, block_digests
from asrcore.errors import AsrError
from asrcore.model.extent import Extent, align, split, total, union
from asrcore.model.machine import Description, Machine
from asrcore.model.watch import Watch

__all__ = ["Builder"]

_CLOSED = {"protocol": "*", "sourcePortRange": "*", "destinationPortRange": "*", "access": "Deny", "priority": 100}
_UPLOADED_TO = ("ReadyToUpload", "ActiveUpload")
_ANYWHERE = {"sourceAddressPrefix": "*", "destinationAddressPrefix": "*"}


class Builder:
    """Creates and deletes the resources of machines at one site."""

    def __init__(self, account: AzureAccount) -> None:
        self._account = account
        self._arm = account.arm
        self._settings = account.settings

    # -- planning

    def size_for(self, machine: Machine) -> str:
        """Raises SizeNotFound."""
        found = sizes.choose(machine, self._account.sizes(), self._settings)
        if found is None:
            raise SizeNotFound(
                region=self._settings.location,
                machine=machine.name,
                needs=sizes.why_none(machine, self._account.sizes(), self._settings),
            )
        return found.name

    def networks_for(self, names: Sequence[str]) -> list[Network]:
        """Raises NetworkUnknown."""
        found = []
        for name in names:
            network = self._settings.network(name)
            if network is None:
                raise NetworkUnknown(site=self._account.name, network=name)
            found.append(network)
        return found

    # -- making

    def define(
        self,
        owner: str,
        machine_id: str,
        description: Description,
        snapshots: Mapping[str, Snapshot],
        networks: Sequence[Network] | None,
        watch: Watch,
    ) -> Defined:
        """Disks and cards; `networks` None: cards in an isolated network. The machine is not started."""
        machine = description.machine
        size = self.size_for(machine)
        disks = {}
        work = {disk.id: snapshots[disk.id] for disk in machine.disks if disk.id in snapshots}
        blobs = {disk_id: self._account.container.page_blob(at.blob, at.snapshot) for disk_id, at in work.items()}
        # Whole digest blocks: what is between the pages of one is sent as the zeroes that it is.
        ranges = {disk_id: align(blobs[disk_id].stored(at.size), DIGEST_BLOCK, at.size) for disk_id, at in work.items()}
        watch.start("copying to managed disks", sum(total(extents) for extents in ranges.values()))
        for number, (disk_id, at) in enumerate(work.items()):
            name = disks[disk_id] = f"{owner}-{number}"
            system = machine if number == 0 else None
            self._disk(name, owner, disk_id, at.size, system)
            blob, extents = blobs[disk_id], ranges[disk_id]
            if system is None:
                self._upload(name, owner, disk_id, blob, at.size, extents, watch)
            else:
                self._system(name, owner, disk_id, blob, at.size, extents, watch, repair=self._repairs(description))
            reach("azure.disk.made")
        cards = self._cards(owner, networks, max(1, len(machine.nics)))
        names = [item.name for item in networks] if networks else [f"{owner}-net"] * len(cards)
        return Defined(owner, machine_id, description, size, disks, tuple(cards), tuple(names))

    def repairs(self, owner: str) -> tuple[str, ...]:
        """What was changed on a machine's system disk so that it boots, and what was not."""
        return self._recorded(owner)[0]

    def _recorded(self, owner: str) -> tuple[tuple[str, ...], list[Extent]]:
        """The repairs, and where they changed the disk."""
        found = self._account.container.read(repairs_blob(owner))
        reported = json.loads(found[0]) if found else {"repairs": [], "extents": []}
        return tuple(reported["repairs"]), [Extent(offset, length) for offset, length in reported["extents"]]

    def _record(self, owner: str, repairs: Sequence[str], extents: Sequence[Extent]) -> None:
        reported = {"repairs": repairs, "extents": [[item.offset, item.length] for item in extents]}
        self._account.container.write(repairs_blob(owner), json.dumps(reported).encode())

    def _repairs(self, description: Description) -> bool:
        """Whether to repair the system disk: only a Linux system from another platform needs it."""
        away = description.platform != self._account.driver
        return self._settings.repair and away and sizes.os_of(description.machine) == "Linux"

    def publish(self, defined: Defined) -> None:
        """From now on the machine is defined."""
        self._account.container.write(machine_blob(defined.name), codec.dump(defined))
        reach("azure.machine.defined")

    def _disk(self, name: str, owner: str, disk_id: str, size: int, system: Machine | None) -> None:
        if self._arm.get("disks", name) is not None:
            return
        properties: dict[str, Any] = {
            "creationData": {"createOption": "Upload", "uploadSizeBytes": vhd.managed_size(size) + vhd.FOOTER}
        }
        if system is not None:
            properties |= {"osType": sizes.os_of(system), "hyperVGeneration": sizes.generation_of(system)}
        body = {
            "location": self._settings.location,
            "sku": {"name": self._settings.disk_sku},
            "tags": self._tags(owner, **{TAG_DISK: disk_id, TAG_SIZE: str(size)}),
            "properties": properties,
        }
        self._arm.put("disks", name, body)
        reach("azure.disk.created")

    def _system(
        self,
        name: str,
        owner: str,
        disk_id: str,
        blob: PageBlob,
        size: int,
        extents: list[Extent],
        watch: Watch,
        *,
        repair: bool,
    ) -> None:
        """Upload the system disk's content; repaired, if asked for."""
        # Where an interrupted attempt had put its repairs, the recovery point's content is sent again.
        _, touched = self._recorded(owner)
        extents = union(extents, touched)
        repair = repair and self._state(name) in _UPLOADED_TO
        with Repair(size, extents, blob.read_into) if repair else nullcontext() as repairing:

            def finish(access: Access, pieces: list[Extent], digests: dict[int, bytes]) -> DigestTable:
                if repairing is None:
                    self._record(owner, (), touched)
                    return DigestTable(size, pieces, digests)
                repaired = repairing.finish(pieces, digests)
                self._record(owner, repaired.reported, union(touched, repaired.differs))
                reach("azure.repairs.recorded")
                for run in repaired.differs:
                    watch.check()
                    access.put(run.offset, repairing.read(run))
                return repaired.digests

            keep = repairing.keep if repairing is not None else None
            self._upload(name, owner, disk_id, blob, size, extents, watch, keep, finish)

    def _upload(
        self,
        name: str,
        owner: str,
        disk_id: str,
        blob: PageBlob,
        size: int,
        extents: list[Extent],
        watch: Watch,
        keep: Callable[[Extent, bytearray], None] | None = None,
        finish: Callable[[Access, list[Extent], dict[int, bytes]], DigestTable] | None = None,
    ) -> None:
        """Upload the content to a new disk; does nothing if that is done. `keep` is given what was sent; `finish` may
        send more before the upload ends, and returns the digests of it all."""
        state = self._state(name)
        if state in _UPLOADED_TO:
            access = Access(self._account, "disks", name, write=True)
            reach("azure.disk.opened")
            digests: dict[int, bytes] = {}

            def send(piece: Extent) -> None:
                watch.check()
                data = bytearray(piece.length)
                blob.read_into(piece.offset, memoryview(data))
                access.put(piece.offset, bytes(data))
                digests[piece.offset] = block_digests(memoryview(data))
                if keep is not None:
                    keep(piece, data)
                watch.advance(piece.length)
                reach("azure.disk.put")

            with ThreadPoolExecutor(self._account.calls.pacer.parallel, thread_name_prefix="azure-disk") as pool:
                # The disk is new, and what is not sent of it is zero.
                pieces = list(split(extents, MOST))
                for _ in pool.map(send, pieces):
                    pass
            table = finish(access, pieces, digests) if finish is not None else DigestTable(size, pieces, digests)
            table.save(self._account.container, owner, disk_id)
            self._close_upload(name, vhd.managed_size(size), access)
            reach("azure.disk.closed")
            state = self._state(name)
        if state not in ("Unattached", "Attached", "Reserved", "ActiveSAS"):
            raise UploadFailed(disk=name, state=state or "unknown")

    def _close_upload(self, name: str, size: int, access: Access) -> None:
        access.put(size, vhd.footer(size, uuid.uuid5(uuid.NAMESPACE_URL, name)))
        access.close()

    def _state(self, name: str) -> str:
        found = self._arm.get("disks", name) or {}
        return str(found.get("properties", {}).get("diskState", ""))

    # -- networks

    def _cards(self, owner: str, networks: Sequence[Network] | None, count: int) -> list[str]:
        cards = []
        if networks:
            for number, network in enumerate(networks):
                cards.append(self._card(owner, number, self._subnet(network), network))
        else:
            subnet = self._nowhere(owner)
            cards = [self._card(owner, number, subnet, None) for number in range(count)]
        reach("azure.cards.made")
        return cards

    def _subnet(self, network: Network) -> str:
        return f"{self._arm.id('virtualNetworks', network.vnet, network.group)}/subnets/{network.subnet}"

    def _card(self, owner: str, number: int, subnet: str, network: Network | None) -> str:
        name = f"{owner}-nic{number}"
        config: dict[str, Any] = {"subnet": {"id": subnet}, "privateIPAllocationMethod": "Dynamic"}
        if network is not None and network.public:
            config["publicIPAddress"] = {"id": self._address(owner, number)}
        properties: dict[str, Any] = {"ipConfigurations": [{"name": "first", "properties": config}]}
        if network is not None and network.security_group:
            group = self._arm.id("networkSecurityGroups", network.security_group, network.group)
            properties["networkSecurityGroup"] = {"id": group}
        if self._arm.get("networkInterfaces", name) is None:
            self._arm.put("networkInterfaces", name, self._body(owner, properties))
        return name

    def _address(self, owner: str, number: int) -> str:
        name = f"{owner}-ip{number}"
        properties = {"publicIPAllocationMethod": "Static", "publicIPAddressVersion": "IPv4"}
        body = self._body(owner, properties) | {"sku": {"name": "Standard"}}
        if self._arm.get("publicIPAddresses", name) is None:
            self._arm.put("publicIPAddresses", name, body)
        return self._arm.id("publicIPAddresses", name)

    def _nowhere(self, owner: str) -> str:
        """A subnet of a separate network: no peer, no public address, and no traffic in or out."""
        group, network = f"{owner}-nsg", f"{owner}-net"
        rules = [
            {"name": f"none-{way.lower()}", "properties": _CLOSED | _ANYWHERE | {"direction": way}}
            for way in ("Inbound", "Outbound")
        ]
        self._arm.put("networkSecurityGroups", group, self._body(owner, {"securityRules": rules}))
        subnet = {
            "addressPrefix": "10.255.0.0/24",
            "networkSecurityGroup": {"id": self._arm.id("networkSecurityGroups", group)},
        }
        space = {"addressPrefixes": ["10.255.0.0/24"]}
        subnets = [{"name": "nowhere", "properties": subnet}]
        self._arm.put("virtualNetworks", network, self._body(owner, {"addressSpace": space, "subnets": subnets}))
        return f"{self._arm.id('virtualNetworks', network)}/subnets/nowhere"

    def _body(self, owner: str, properties: Mapping[str, Any]) -> dict[str, Any]:
        return {"location": self._settings.location, "tags": self._tags(owner), "properties": properties}

    def _tags(self, owner: str, **more: str) -> dict[str, str]:
        return tags_for(self._account.container.identity, owner, **more)

    # -- the machine itself

    def start(self, defined: Defined) -> None:
        """Start it; the first start creates Azure's machine."""
        if self._arm.get("virtualMachines", defined.name) is not None:
            self._arm.start(defined.name)
        else:
            self._arm.put("virtualMachines", defined.name, self._machine(defined))
        reach("azure.machine.started")

    def _machine(self, defined: Defined) -> dict[str, Any]:
        system, *data = defined.in_order

        def attached(name: str) -> dict[str, Any]:
            return {"createOption": "Attach", "managedDisk": {"id": self._arm.id("disks", name)}}

        cards = [
            {"id": self._arm.id("networkInterfaces", name), "properties": {"primary": number == 0}}
            for number, name in enumerate(defined.cards)
        ]
        properties = {
            "hardwareProfile": {"vmSize": defined.size},
            "storageProfile": {
                "osDisk": attached(system) | {"osType": sizes.os_of(defined.description.machine)},
                "dataDisks": [attached(name) | {"lun": number} for number, name in enumerate(data)],
            },
            "networkProfile": {"networkInterfaces": cards},
            # The console shows why a machine does not boot.
            "diagnosticsProfile": {"bootDiagnostics": {"enabled": True}},
        }
        return self._body(defined.name, properties)

    def base(self, defined: Defined) -> None:
        """Snapshots of the disks before the machine first runs: its changes are determined against them."""
        for disk_id, disk in defined.disks.items():
            name = f"{disk}-base"
            if self._arm.get("snapshots", name) is None:
                self.snapshot(name, defined.name, disk, disk_id, BASE_VIEW)
            reach("azure.base.snapshotted")

    def snapshot(self, name: str, owner: str, disk: str, disk_id: str, view: str, *, runs: bool = False) -> None:
        """An incremental snapshot of a disk as it is now."""
        power = "running" if runs else "off"
        own = {TAG_DISK: disk_id, TAG_VIEW: view, TAG_TAKEN: repr(self._account.clock()), TAG_POWER: power}
        if self._settings.owner:
            own[TAG_VAULT] = self._settings.owner
        tags = self._tags(owner, **own)
        creation = {"createOption": "Copy", "sourceResourceId": self._arm.id("disks", disk)}
        body = {
            "location": self._settings.location,
            "tags": tags,
            "properties": {"creationData": creation, "incremental": True},
        }
        self._arm.put("snapshots", name, body)

    def settle(self, owner: str) -> None:
        """From now on the machine belongs to the user: nothing of it counts as left over."""
        for item in self._arm.listed("disks"):
            if belongs(tags_of(item), self._account.container.identity, owner):
                self._arm.tag("disks", str(item["name"]), {TAG_COMMITTED: "yes"})

    # -- removing

    def remove(self, owner: str) -> None:
        """Delete everything of a machine, also what is incomplete."""
        for kind, name in self.resources(owner):
            self.remove_resource(kind, name)
            reach("azure.resource.removed")
        for item in self._account.container.listed(f"{MACHINES}{owner}/"):
            self._account.container.delete(item.name)
        self._account.container.delete(machine_blob(owner))
        reach("azure.machine.removed")

    def resources(self, owner: str) -> list[tuple[str, str]]:
        """Kind and name of all that a machine consists of, in the order in which it may be deleted."""
        return [
            (kind, str(item["name"]))
            for kind in KINDS
            for item in self._arm.listed(kind)
            if belongs(tags_of(item), self._account.container.identity, owner)
        ]

    def remove_resource(self, kind: str, name: str) -> None:
        """Delete one of them; open access to it is ended first."""
        if kind in ("disks", "snapshots"):
            self._unlock(kind, name)
        self._arm.delete(kind, name)

    def _unlock(self, kind: str, name: str) -> None:
        found: Resource = self._arm.get(kind, name) or {}
        properties = found.get("properties", {})
        state = properties.get("diskState")
        if state == "ActiveSAS":
            self._arm.revoke(kind, name)
        elif state == "ActiveUpload":
            # Azure deletes no disk that is being uploaded to, and ends no upload without a footer.
            size = int(properties["creationData"]["uploadSizeBytes"]) - vhd.FOOTER
            try:
                self._arm.revoke(kind, name)
            except AsrError:
                self._close_upload(name, size, Access(self._account, kind, name, write=True))
