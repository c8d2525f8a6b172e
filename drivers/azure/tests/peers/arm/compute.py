"""Disks, snapshots and machines: their states, and the order in which they may change."""

from __future__ import annotations

import math
import time
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any

from drivers.azure.tests.peers.arm.schema import Refusal, check

if TYPE_CHECKING:
    from drivers.azure.tests.peers.arm.server import Cloud

MIB = 1 << 20
LEAST_UPLOAD, MOST_UPLOAD = 20 * MIB + 512, 35183298347520
SNAPSHOTS_PER_DISK = 500
SNAPSHOTS_IN_WINDOW = 7
SAS_SECONDS = 60 * 86400
SIZES = {
    # name: CPUs, memory in GiB, data disks, generations, network interfaces, processors, disk controllers (none given:
    # SCSI)
    "Standard_B1ls": (1, 0.5, 2, "V1,V2", 2, "x64", ""),
    "Standard_B1s": (1, 1, 2, "V1,V2", 2, "x64", ""),
    "Standard_B2s": (2, 4, 4, "V1,V2", 3, "x64", ""),
    "Standard_B2pts_v2": (2, 1, 4, "V2", 2, "Arm64", ""),
    "Standard_D2s_v5": (2, 8, 4, "V1,V2", 2, "x64", "SCSI"),
    "Standard_D4s_v5": (4, 16, 8, "V1,V2", 2, "x64", "SCSI"),
    "Standard_D8s_v5": (8, 32, 16, "V1,V2", 4, "x64", "SCSI"),
    "Standard_D2ds_v5": (2, 8, 8, "V2", 2, "x64", "SCSI, NVMe"),
    "Standard_D2ps_v5": (2, 8, 4, "V2", 2, "Arm64", "SCSI"),
    "Standard_A1_v2": (1, 2, 2, "V1", 2, "x64", ""),
    "Standard_D2s_v6": (2, 8, 8, "V2", 2, "x64", "NVMe"),
}


class Compute:
    """The state of Microsoft.Compute in one resource group."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.snapshot_window = 300.0
        """Seconds within which a disk has at most seven snapshots."""
        self._taken: dict[str, deque[float]] = {}

    # -- disks

    def put_disk(self, name: str, body: dict[str, Any], former: dict[str, Any] | None) -> dict[str, Any]:
        """Create a disk for an upload; repeating the request changes nothing."""
        check("compute", "Disk", body)
        self.cloud.tagged(body)
        creation = body["properties"]["creationData"]
        if creation["createOption"] != "Upload":
            raise Refusal(400, "InvalidParameter", "this server makes disks by upload only")
        size = creation.get("uploadSizeBytes", 0)
        if not LEAST_UPLOAD <= size <= MOST_UPLOAD or (size - 512) % MIB:
            raise Refusal(400, "InvalidParameter", f"uploadSizeBytes {size}: whole mebibytes and a footer, from 20 MiB")
        if former is not None:
            if former["properties"]["creationData"] != creation:
                raise Refusal(409, "PropertyChangeNotAllowed", "creationData cannot be changed")
            return former | {"tags": body.get("tags", {})}
        self.cloud.content.make(f"disks/{name}", size)
        properties = body["properties"] | {
            "diskState": "ReadyToUpload",
            "diskSizeBytes": size - 512,
            "diskSizeGB": max(1, math.ceil(size / (1 << 30))),
            "uniqueId": str(uuid.uuid4()),
            "timeCreated": _now(),
        }
        return body | {"properties": properties}

    def grant(self, kind: str, name: str, item: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """A SAS for a disk or snapshot."""
        check("compute", "GrantAccessData", body)
        seconds, write = body["durationInSeconds"], body["access"] == "Write"
        if not 0 < seconds <= SAS_SECONDS:
            raise Refusal(400, "InvalidParameter", f"durationInSeconds {seconds}: at most 60 days")
        state = item["properties"]["diskState"]
        if write:
            if kind != "disks" or state not in ("ReadyToUpload", "ActiveUpload"):
                raise Refusal(409, "OperationNotAllowed", f"{name} cannot be written in state {state}")
            item["properties"]["diskState"] = "ActiveUpload"
        else:
            if state not in ("Unattached", "Reserved", "ActiveSAS"):
                raise Refusal(409, "OperationNotAllowed", f"{name} cannot be read in state {state}")
            self._family(kind, name, item)
            item["properties"]["diskState"] = "ActiveSAS"
        sas = self.cloud.content.grant(f"{kind}/{name}", write=write, seconds=seconds)
        return {"accessSAS": self.cloud.url + sas}

    def _family(self, kind: str, name: str, item: dict[str, Any]) -> None:
        """At most five snapshots of a disk can be read at once."""
        origin = item["properties"]["creationData"].get("sourceResourceId")
        family = [
            other["name"]
            for other in self.cloud.all("snapshots")
            if other["properties"]["creationData"]["sourceResourceId"] == origin
            and self.cloud.content.granted(f"snapshots/{other['name']}")
        ]
        if kind == "snapshots" and name not in family and len(family) >= 5:
            raise Refusal(409, "OperationNotAllowed", "five snapshots of this disk are being read already")

    def revoke(self, kind: str, name: str, item: dict[str, Any]) -> None:
        """End the access; an upload ends with it."""
        properties = item["properties"]
        if properties["diskState"] == "ActiveUpload":
            self.cloud.content.finish(f"{kind}/{name}")
            properties["diskState"] = "Unattached"
        elif properties["diskState"] == "ActiveSAS":
            properties["diskState"] = "Reserved" if item.get("managedBy") else "Unattached"
        self.cloud.content.revoke(f"{kind}/{name}")

    def delete_disk(self, kind: str, name: str, item: dict[str, Any]) -> None:
        """Refused while it is attached or accessed."""
        state = item["properties"]["diskState"]
        if item.get("managedBy") or state in ("ActiveSAS", "ActiveUpload", "Attached", "Reserved"):
            raise Refusal(409, "OperationNotAllowed", f"{name} cannot be deleted in state {state}")
        self.cloud.content.remove(f"{kind}/{name}")

    def put_snapshot(self, name: str, body: dict[str, Any], former: dict[str, Any] | None) -> dict[str, Any]:
        """A snapshot of a disk at this instant."""
        check("compute", "Snapshot", body)
        self.cloud.tagged(body)
        creation = body["properties"]["creationData"]
        if creation["createOption"] != "Copy" or body["properties"].get("incremental") is not True:
            raise Refusal(400, "InvalidParameter", "this server makes incremental snapshots of a disk only")
        if former is not None:
            if former["properties"]["creationData"] != creation:
                raise Refusal(409, "PropertyChangeNotAllowed", "creationData cannot be changed")
            return former | {"tags": body.get("tags", {})}
        disk = self.cloud.by_id(creation["sourceResourceId"], "disks")
        state = disk["properties"]["diskState"]
        if state not in ("Unattached", "Attached", "Reserved", "ActiveSAS"):
            raise Refusal(409, "OperationNotAllowed", f"a disk in state {state} has no snapshots")
        self._limited(disk)
        owner = disk.get("managedBy")
        machine = self.cloud.hypervisor_of(owner) if owner else None
        if machine is not None:
            machine.pause()
        try:
            self.cloud.content.copy(f"disks/{disk['name']}", f"snapshots/{name}")
        finally:
            if machine is not None:
                machine.go_on()
        given = body["properties"]
        properties = given | {
            "creationData": creation | {"sourceUniqueId": disk["properties"]["uniqueId"]},
            "diskState": "Unattached",
            "diskSizeBytes": disk["properties"]["diskSizeBytes"],
            "diskSizeGB": disk["properties"]["diskSizeGB"],
            "uniqueId": str(uuid.uuid4()),
            "timeCreated": _now(),
        }
        return body | {"properties": properties}

    def _limited(self, disk: dict[str, Any]) -> None:
        of_disk = [
            item
            for item in self.cloud.all("snapshots")
            if item["properties"]["creationData"]["sourceUniqueId"] == disk["properties"]["uniqueId"]
        ]
        if len(of_disk) >= SNAPSHOTS_PER_DISK:
            raise Refusal(409, "OperationNotAllowed", "a disk has 500 snapshots at most")
        taken = self._taken.setdefault(disk["id"], deque())
        now = time.monotonic()
        while taken and taken[0] <= now - self.snapshot_window:
            taken.popleft()
        if len(taken) >= SNAPSHOTS_IN_WINDOW:
            left = math.ceil(taken[0] + self.snapshot_window - now)
            raise Refusal(429, "TooManyRequests", "seven snapshots of a disk in five minutes", after=left)
        taken.append(now)

    # -- machines

    def put_machine(self, name: str, body: dict[str, Any], former: dict[str, Any] | None) -> dict[str, Any]:
        """Create a machine, which starts it."""
        check("compute", "VirtualMachine", body)
        self.cloud.tagged(body)
        if former is not None:
            return former | {"tags": body.get("tags", {})}
        properties = body["properties"]
        size = properties["hardwareProfile"]["vmSize"]
        if size not in SIZES:
            raise Refusal(409, "SkuNotAvailable", f"size {size} is not available here")
        disks = self._disks_of(name, properties["storageProfile"], size)
        if len(properties["networkProfile"]["networkInterfaces"]) > SIZES[size][4]:
            raise Refusal(409, "NetworkInterfaceCountExceeded", f"size {size} has {SIZES[size][4]} cards at most")
        for card in properties["networkProfile"]["networkInterfaces"]:
            nic = self.cloud.by_id(card["id"], "networkInterfaces")
            if nic["properties"].get("virtualMachine"):
                raise Refusal(409, "OperationNotAllowed", f"card {nic['name']} is in use")
            nic["properties"]["virtualMachine"] = {"id": self.cloud.id("virtualMachines", name)}
        for disk in disks:
            disk["managedBy"] = self.cloud.id("virtualMachines", name)
            disk["properties"]["diskState"] = "Attached"
        made = body | {"properties": properties | {"vmId": str(uuid.uuid4()), "timeCreated": _now()}}
        self.power_on(name, made)
        return made

    def _disks_of(self, name: str, storage: dict[str, Any], size: str) -> list[dict[str, Any]]:
        system = storage["osDisk"]
        data = storage.get("dataDisks", [])
        if system["createOption"] != "Attach" or any(item["createOption"] != "Attach" for item in data):
            raise Refusal(400, "InvalidParameter", "this server makes machines of existing disks only")
        if "osType" not in system:
            raise Refusal(400, "InvalidParameter", "osDisk needs osType when it is attached")
        if len({item["lun"] for item in data}) != len(data) or len(data) > SIZES[size][2]:
            raise Refusal(409, "OperationNotAllowed", f"{len(data)} data disks, or a LUN used twice")
        disks = [self.cloud.by_id(item["managedDisk"]["id"], "disks") for item in (system, *data)]
        for disk in disks:
            if disk["properties"]["diskState"] != "Unattached":
                state = disk["properties"]["diskState"]
                raise Refusal(409, "OperationNotAllowed", f"disk {disk['name']} of {name} is in state {state}")
        _, _, _, _, _, processors, controllers = SIZES[size]
        if processors != "x64":
            raise Refusal(400, "BadRequest", f"size {size} has {processors} processors, the disk's system is x64")
        if controllers == "NVMe":
            raise Refusal(400, "InvalidParameter", f"size {size} takes NVMe disks only, and {disks[0]['name']} is none")
        generation = disks[0]["properties"].get("hyperVGeneration", "V1")
        if generation not in SIZES[size][3].split(","):
            raise Refusal(400, "BadRequest", f"size {size} boots no disk of generation {generation}")
        return disks

    def disks_of(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """The machine's disks, the system's first."""
        storage = item["properties"]["storageProfile"]
        data = sorted(storage.get("dataDisks", []), key=lambda disk: int(disk["lun"]))
        return [self.cloud.by_id(disk["managedDisk"]["id"], "disks") for disk in (storage["osDisk"], *data)]

    def power_on(self, name: str, item: dict[str, Any]) -> None:
        """Start it. A disk that is being read cannot be written."""
        if self.cloud.hypervisor(name).running:
            return
        disks = self.disks_of(item)
        for disk in disks:
            if disk["properties"]["diskState"] == "ActiveSAS":
                raise Refusal(409, "OperationNotAllowed", f"disk {disk['name']} is being read")
            disk["properties"]["diskState"] = "Attached"
        paths = [self.cloud.content.path(f"disks/{disk['name']}") for disk in disks]
        self.cloud.hypervisor(name).start(paths, uefi=disks[0]["properties"].get("hyperVGeneration") == "V2")
        self.cloud.deallocated.discard(name)

    def power_off(self, name: str, *, skip_shutdown: bool) -> bool:
        """Stop it; False until the guest has shut down."""
        machine = self.cloud.hypervisor(name)
        if skip_shutdown:
            machine.kill()
        elif machine.running and name not in self.cloud.pressed:
            self.cloud.pressed.add(name)
            machine.shutdown()
        if machine.running:
            return False
        self.cloud.pressed.discard(name)
        return True

    def deallocate(self, name: str, item: dict[str, Any]) -> None:
        """Stop it and release its host."""
        self.cloud.hypervisor(name).kill()
        self.cloud.pressed.discard(name)
        self.cloud.deallocated.add(name)
        for disk in self.disks_of(item):
            disk["properties"]["diskState"] = "Reserved"

    def delete_machine(self, name: str, item: dict[str, Any]) -> None:
        """Its disks and cards stay."""
        self.cloud.hypervisor(name).kill()
        for disk in self.disks_of(item):
            disk.pop("managedBy", None)
            disk["properties"]["diskState"] = "Unattached"
        for card in item["properties"]["networkProfile"]["networkInterfaces"]:
            self.cloud.by_id(card["id"], "networkInterfaces")["properties"].pop("virtualMachine", None)
        self.cloud.deallocated.discard(name)

    def power_state(self, name: str) -> str:
        """Azure's name for the power state."""
        if self.cloud.hypervisor(name).running:
            return "running"
        return "deallocated" if name in self.cloud.deallocated else "stopped"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
