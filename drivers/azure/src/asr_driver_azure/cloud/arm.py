"""Azure's management, by kind of resource, with time limits. A body is JSON as Azure documents it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from azure.core.exceptions import ResourceNotFoundError

from asr_driver_azure.cloud.calls import Calls
from asrcore.errors import TimedOut

if TYPE_CHECKING:
    from asr_driver_azure.cloud.clients import Clients

__all__ = ["KINDS", "Arm", "Resource", "tags_of"]

Resource = Mapping[str, Any]

KINDS = {
    "virtualMachines": ("compute", "virtual_machines"),
    "networkInterfaces": ("network", "network_interfaces"),
    "publicIPAddresses": ("network", "public_ip_addresses"),
    "disks": ("compute", "disks"),
    "snapshots": ("compute", "snapshots"),
    "virtualNetworks": ("network", "virtual_networks"),
    "networkSecurityGroups": ("network", "network_security_groups"),
}
"""In order of deletion: what depends on others comes first."""

_MOST_SECONDS = 1800.0


class Arm:
    """One resource group. Every change may be repeated: resources are known by their names."""

    def __init__(self, clients: Clients, subscription: str, group: str, calls: Calls) -> None:
        self._clients = clients
        self._subscription = subscription
        self.group = group
        self.calls = calls

    def _kind(self, kind: str) -> Any:
        client, operations = KINDS[kind]
        return getattr(getattr(self._clients, client), operations)

    def id(self, kind: str, name: str, group: str = "") -> str:
        """A resource's full name."""
        provider = "Microsoft.Compute" if KINDS[kind][0] == "compute" else "Microsoft.Network"
        where = f"/subscriptions/{self._subscription}/resourceGroups/{group or self.group}"
        return f"{where}/providers/{provider}/{kind}/{name}"

    def _wait(self, operation: str, begin: Callable[[], Any], seconds: float = _MOST_SECONDS) -> Any:
        """Begin and wait for the end. A killed engine begins again: Azure continues the operation in progress."""

        def run() -> Any:
            poller = begin()
            poller.wait(seconds)
            if not poller.done():
                raise TimedOut(operation=operation, seconds=seconds, detail="Azure has not finished yet.")
            return poller.result()

        return self.calls.run(operation, run)

    def get(self, kind: str, name: str, group: str = "") -> Resource | None:
        """None if there is no such resource."""

        def get() -> Resource | None:
            try:
                found: Resource = self._kind(kind).get(group or self.group, name).as_dict()
            except ResourceNotFoundError:
                return None
            return found

        return self.calls.run(f"reading {kind}/{name}", get)

    def listed(self, kind: str) -> list[Resource]:
        """All of the group."""
        operations = self._kind(kind)
        walk = getattr(operations, "list_by_resource_group", None) or operations.list
        return self.calls.run(f"listing {kind}", lambda: [item.as_dict() for item in walk(self.group)])

    def put(self, kind: str, name: str, body: Mapping[str, Any]) -> Resource:
        """Create or update it."""
        begin = self._kind(kind).begin_create_or_update
        made: Resource = self._wait(f"creating {kind}/{name}", lambda: begin(self.group, name, body)).as_dict()
        return made

    def delete(self, kind: str, name: str) -> None:
        """A missing one is no error."""
        self._wait(f"deleting {kind}/{name}", lambda: self._kind(kind).begin_delete(self.group, name))

    def tag(self, kind: str, name: str, tags: Mapping[str, str | None]) -> None:
        """Set tags, or remove those that are None; the others are kept."""
        found = self.get(kind, name)
        if found is None:
            return
        wanted = {key: value for key, value in (tags_of(found) | dict(tags)).items() if value is not None}
        if wanted == tags_of(found):
            return
        begin = self._kind(kind).begin_update
        self._wait(f"tagging {kind}/{name}", lambda: begin(self.group, name, {"tags": wanted}))

    # -- disks and snapshots

    def grant(self, kind: str, name: str, *, write: bool, seconds: int) -> str:
        """A SAS for the content."""
        body = {"access": "Write" if write else "Read", "durationInSeconds": seconds}
        begin = self._kind(kind).begin_grant_access
        granted = self._wait(f"opening {kind}/{name}", lambda: begin(self.group, name, body)).as_dict()
        return str(granted["accessSAS"])

    def revoke(self, kind: str, name: str) -> None:
        """End all access to the content; of a disk that is uploaded to: the upload."""
        self._wait(f"closing {kind}/{name}", lambda: self._kind(kind).begin_revoke_access(self.group, name))

    # -- machines

    def power(self, name: str) -> str:
        """Azure's power state: running, stopped, deallocated, starting, ...; empty if there is no such machine."""

        def look() -> str:
            try:
                view = self._kind("virtualMachines").instance_view(self.group, name).as_dict()
            except ResourceNotFoundError:
                return ""
            codes = [str(item.get("code", "")) for item in view.get("statuses", [])]
            return next((code.partition("/")[2] for code in codes if code.startswith("PowerState/")), "unknown")

        return self.calls.run(f"reading machine {name}", look)

    def start(self, name: str) -> None:
        """Start an existing machine."""
        self._wait(f"starting {name}", lambda: self._kind("virtualMachines").begin_start(self.group, name))

    def shut_down(self, name: str, seconds: float) -> None:
        """Ask the guest to shut down. Raises TimedOut."""
        begin = self._kind("virtualMachines").begin_power_off
        self._wait(f"shutting {name} down", lambda: begin(self.group, name, skip_shutdown=False), seconds)

    def deallocate(self, name: str) -> None:
        """Stop it at once; a deallocated machine is not billed."""
        self._wait(f"deallocating {name}", lambda: self._kind("virtualMachines").begin_deallocate(self.group, name))

    def skus(self, location: str) -> list[Resource]:
        """Machine sizes of a region, with their capabilities."""
        walk = self._clients.compute.resource_skus.list
        found = self.calls.run(
            "listing machine sizes", lambda: [item.as_dict() for item in walk(filter=f"location eq '{location}'")]
        )
        return [item for item in found if item.get("resourceType") == "virtualMachines"]


def tags_of(resource: Resource) -> dict[str, str]:
    """Its tags."""
    return dict(resource.get("tags") or {})
