"""The kit's rig for a site that runs machines: the source is the memory driver's, the machines only pretend to run."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

from asr_driver_azure.blobs import vhd
from asr_driver_azure.driver import AzureDriver
from asr_driver_azure.machines.record import TAG_DISK, TAG_SIZE, Defined, machine_blob, owner_of, tags_for
from asrcore import codec
from asrcore.driver import Instance, PromoteSpec
from asrcore.model.machine import Description, Machine, PowerState
from asrcore.model.protection import NetworkMap
from asrcore.model.watch import Watch
from asrcore.testing.conformance._target_bench import TargetBench
from drivers.azure.tests.peers.arm.server import LOCATION, Cloud
from drivers.azure.tests.peers.storage import Storage
from drivers.azure.tests.target.rig import TargetRig


class FailoverRig(TargetRig):
    """`cloud`: where the machines are made."""

    def __init__(self, storage: Storage, cloud: Cloud, driver: AzureDriver | None = None) -> None:
        self.cloud = cloud
        self._random = random.Random(11)
        settings = cloud.settings()
        settings["networks"] += ";lan=production/lab"
        super().__init__(storage, driver, settings)

    def promote(self, bench: TargetBench, network: str = "lab") -> None:
        """Its first point becomes a machine, in that network."""
        self.target_site.failover.promote(PromoteSpec(bench.id, "p1", 1, NetworkMap({"lan": network})), Watch())

    @contextmanager
    def unreachable_target(self) -> Iterator[None]:
        with self.storage.switched("cut"):
            yield

    def _disks(self, machine_id: str) -> dict[str, tuple[str, int]]:
        return self.target_site.machines.disks(machine_id)

    def change_instance(self, instance: Instance) -> None:
        for name, size in self._disks(instance.machine_id).values():
            with self.cloud.content.path(f"disks/{name}").open("r+b") as file:
                for at in (0, size - 512):
                    file.seek(at)
                    file.write(b"written by the instance")

    def check_instance(self, instance: Instance) -> None:
        assert self.target_site.inventory.machine(instance.machine_id).power is PowerState.RUNNING
        for disk_id, (name, size) in self._disks(instance.machine_id).items():
            with self.cloud.content.path(f"disks/{name}").open("rb") as file:
                middle = file.read(size)[1024 : size - 1024]
            seen = self.notes.setdefault(f"{instance.machine_id}/{disk_id}", hashlib.sha256(middle).hexdigest())
            assert seen == hashlib.sha256(middle).hexdigest(), f"disk {disk_id} changed under the instance"

    def target_sha256(self, machine_id: str, disk_id: str) -> str:
        name, size = self._disks(machine_id)[disk_id]
        with self.cloud.content.path(f"disks/{name}").open("rb") as file:
            return hashlib.sha256(file.read(size)).hexdigest()

    def remove_target_machine(self, machine_id: str) -> None:
        from asr_driver_azure.machines.builder import Builder

        for item in self.target_site.machines.all_defined():
            if item.machine_id == machine_id:
                Builder(self.target_site.account).remove(item.name)
        self.target_site.machines.unfence(machine_id, 1000)

    def make_target_machine(self, machine: Machine) -> str:
        """As an earlier failover left it: a stopped machine made by the driver."""
        owner = owner_of(machine.name, f"former/{machine.id}")
        disks = {}
        container = self.target_site.account.container.identity
        for number, disk in enumerate(machine.disks):
            name = disks[disk.id] = f"{owner}-{number}"
            body = {
                "location": LOCATION,
                "tags": tags_for(container, owner, **{TAG_DISK: disk.id, TAG_SIZE: str(disk.size)}),
                "properties": {
                    "creationData": {
                        "createOption": "Upload",
                        "uploadSizeBytes": vhd.managed_size(disk.size) + vhd.FOOTER,
                    }
                },
            }
            self.cloud._make("disks", name, body)
            path = self.cloud.content.path(f"disks/{name}")
            with path.open("r+b") as file:
                file.truncate(vhd.managed_size(disk.size))
                file.write(self._random.randbytes(100 * 1024))
            self.cloud.item("disks", name)["properties"]["diskState"] = "Unattached"
        defined = Defined(owner, machine.id, Description(machine, "memory"), "Standard_B1s", disks, (), ())
        self.target_site.account.container.write(machine_blob(owner), codec.dump(defined))
        return machine.id

    def other_network(self) -> str:
        return "dmz"

    def target_leftovers(self, replica_id: str) -> list[str]:
        return self.cloud.names()
