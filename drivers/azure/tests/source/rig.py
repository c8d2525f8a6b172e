"""The kit's rig for the failback: a machine that runs in Azure is the source, the memory driver the target."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from asr_driver_azure.driver import AzureDriver
from asr_driver_azure.machines.builder import Builder
from asr_driver_azure.machines.record import TAG_DISK, TAG_SIZE, Defined, machine_blob, tags_for
from asr_driver_azure.site import AzureSite
from asrcore import codec
from asrcore.driver import Closing, Site
from asrcore.model.machine import Description, Disk, Firmware, Machine
from asrcore.testing.conformance import ConformanceRig
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.units import KiB, MiB
from drivers.azure.tests.peers.arm.server import LOCATION, Cloud
from drivers.azure.tests.peers.storage import Storage

SIZE = 21 * MiB - 32 * KiB
"""Not whole mebibytes: Azure's disk is larger than the machine's."""
_DISCARDED = 8 * MiB


class SourceRig(ConformanceRig):
    """One machine with one disk, as a failover left it."""

    machine_id = "web"

    def __init__(self, storage: Storage, cloud: Cloud) -> None:
        super().__init__()
        self.driver = self._driver = AzureDriver()
        self.cloud = cloud
        self.settings = storage.settings() | cloud.settings()
        self._random = random.Random(3)
        self._sites: list[AzureSite] = []
        self._discarded = 0
        name = self.settings["container"]
        self.away = MemoryWorld(f"azure-{name}-away")
        self._owner = f"web-{name}"
        self._connect()
        self._source.account.make_container()
        self._make()

    def _connect(self) -> None:
        self._source = self._driver.connect("azure", self.settings)
        self._target = MemoryDriver().connect("away", {"world": self.away.name})
        self._sites.append(self._source)

    def _make(self) -> None:
        disk, machine = f"{self._owner}-0", Machine("web", "web", 1, 64 * MiB, Firmware.BIOS, (Disk("vda", SIZE),))
        creation = {"createOption": "Upload", "uploadSizeBytes": 21 * MiB + 512}
        tags = tags_for(self._source.account.container.identity, self._owner, **{TAG_DISK: "vda", TAG_SIZE: str(SIZE)})
        self.cloud._make("disks", disk, {"location": LOCATION, "tags": tags, "properties": {"creationData": creation}})
        with self.path.open("r+b") as file:
            file.truncate(21 * MiB)
            file.seek(_DISCARDED)
            file.write(self._random.randbytes(4 * MiB))
        self.cloud.item("disks", disk)["properties"]["diskState"] = "Unattached"
        cards = Builder(self._source.account)._cards(self._owner, self._source.account.settings.networks[:1], 1)
        defined = Defined(
            self._owner, "web", Description(machine, "memory"), "Standard_B1s", {"vda": disk}, tuple(cards), ("lab",)
        )
        self._source.account.container.write(machine_blob(self._owner), codec.dump(defined))
        self._source.inventory.power_on("web")

    @property
    def path(self) -> Path:
        """The disk's file."""
        return self.cloud.content.path(f"disks/{self._owner}-0")

    def close(self) -> None:
        super().close()
        Builder(self._source.account).remove(self._owner)
        for site in self._sites:
            site.close()

    @property
    def source_site(self) -> AzureSite:
        return self._source

    @property
    def target_site(self) -> Site:
        return self._target

    def restart(self) -> None:
        self.away.crash()
        self._connect()

    def abandon(self, handle: Closing) -> None:
        """The access of a view stays granted, as in Azure when its owner dies."""

    @contextmanager
    def unreachable_target(self) -> Iterator[None]:
        self.away.cut()
        yield
        self.away.restore()

    def change(self, machine_id: str) -> None:
        with self.path.open("r+b") as file:
            for at in (self._random.randrange(SIZE // 4), SIZE - 100):
                file.seek(at)
                file.write(self._random.randbytes(100))

    def discard(self, machine_id: str) -> None:
        with self.path.open("r+b") as file:
            file.seek(_DISCARDED + self._discarded)
            file.write(bytes(64 * KiB))
        self._discarded += 64 * KiB

    def still(self, machine_id: str) -> AbstractContextManager[None]:
        return nullcontext()  # it writes in `change` only

    def sha256(self, machine_id: str, disk_id: str) -> str:
        with self.path.open("rb") as file:
            return hashlib.sha256(file.read(SIZE)).hexdigest()

    def _drop(self, names: list[str]) -> None:
        for name in names:
            self.cloud.content.revoke(f"snapshots/{name}")
            self.cloud._items.pop(("snapshots", name.lower()))

    def lose_tracking(self, machine_id: str) -> None:
        self._drop(self.leftovers(machine_id))

    def lose_view(self, machine_id: str) -> None:
        self._drop(self.leftovers(machine_id))

    def leftovers(self, machine_id: str) -> list[str]:
        return [item["name"] for item in self.cloud.all("snapshots") if item["name"].startswith(self._owner)]

    @contextmanager
    def ignore_shutdown(self, machine_id: str) -> Iterator[None]:
        self.cloud.hypervisor(self._owner).deaf = True
        yield
        self.cloud.hypervisor(self._owner).deaf = False
        self.cloud.pressed.clear()

    def start_past_driver(self, machine_id: str) -> None:
        self.cloud.compute.power_on(self._owner, self.cloud.item("virtualMachines", self._owner))
