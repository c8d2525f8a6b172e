"""Networks, security groups, addresses and network interfaces."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from drivers.azure.tests.peers.arm.schema import Refusal, check

if TYPE_CHECKING:
    from drivers.azure.tests.peers.arm.server import Cloud

KINDS = {
    "virtualNetworks": "VirtualNetwork",
    "networkSecurityGroups": "NetworkSecurityGroup",
    "publicIPAddresses": "PublicIPAddress",
    "networkInterfaces": "NetworkInterface",
}


class Network:
    """The state of Microsoft.Network in one resource group."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud

    def put(self, kind: str, name: str, body: dict[str, Any], former: dict[str, Any] | None) -> dict[str, Any]:
        """Create or change one."""
        check("network", KINDS[kind], body)
        self.cloud.tagged(body)
        if kind == "virtualNetworks":
            self._network(name, body)
        elif kind == "networkInterfaces":
            self._card(name, body, former)
        elif kind == "publicIPAddresses":
            if body.get("sku", {}).get("name") != "Standard":
                raise Refusal(400, "IPv4BasicSkuPublicIpCountLimitReached", "Basic addresses are retired")
            if body["properties"].get("publicIPAllocationMethod") != "Static":
                raise Refusal(400, "StandardSkuPublicIPAddressesMustBeStatic", name)
            body["properties"]["ipAddress"] = f"203.0.113.{1 + len(self.cloud.all(kind))}"
        return body

    def _network(self, name: str, body: dict[str, Any]) -> None:
        if not body["properties"].get("addressSpace", {}).get("addressPrefixes"):
            raise Refusal(400, "InvalidRequestFormat", f"network {name} needs an address space")
        for subnet in body["properties"].get("subnets", []):
            if not subnet["properties"].get("addressPrefix"):
                raise Refusal(400, "InvalidRequestFormat", f"subnet {subnet['name']} needs an address prefix")
            group = subnet["properties"].get("networkSecurityGroup")
            if group:
                self.cloud.by_id(group["id"], "networkSecurityGroups")
            subnet["id"] = f"{self.cloud.id('virtualNetworks', name)}/subnets/{subnet['name']}"

    def _card(self, name: str, body: dict[str, Any], former: dict[str, Any] | None) -> None:
        properties = body["properties"]
        if not properties.get("ipConfigurations"):
            raise Refusal(400, "NetworkInterfaceMustHaveAtLeastOneIpConfiguration", name)
        for config in properties["ipConfigurations"]:
            self.subnet(config["properties"]["subnet"]["id"])
            address = config["properties"].get("publicIPAddress")
            if address:
                self.cloud.by_id(address["id"], "publicIPAddresses")
            config["properties"].setdefault("privateIPAddress", "10.0.0.4")
        if properties.get("networkSecurityGroup"):
            self.cloud.by_id(properties["networkSecurityGroup"]["id"], "networkSecurityGroups")
        old = former["properties"] if former else {}
        properties["macAddress"] = old.get("macAddress") or "00-0D-3A-" + "-".join(
            f"{byte:02X}" for byte in secrets.token_bytes(3)
        )
        if old.get("virtualMachine"):
            properties["virtualMachine"] = old["virtualMachine"]

    def subnet(self, subnet_id: str) -> dict[str, Any]:
        """Raises Refusal for a missing one."""
        network, _, name = subnet_id.rpartition("/subnets/")
        found: list[dict[str, Any]] = self.cloud.by_id(network, "virtualNetworks")["properties"].get("subnets", [])
        for subnet in found:
            if subnet["name"] == name:
                return subnet
        raise Refusal(404, "NotFound", f"no subnet {subnet_id}")

    def delete(self, kind: str, name: str, item: dict[str, Any]) -> None:
        """Refused while it is in use."""
        if kind == "networkInterfaces":
            if item["properties"].get("virtualMachine"):
                raise Refusal(400, "NicInUse", name)
            return
        for card in self.cloud.all("networkInterfaces"):
            if item["id"] + '"' in repr(card).replace("'", '"') or item["id"] + "/" in repr(card):
                raise Refusal(400, "InUse", f"{name} is used by card {card['name']}")
        if kind == "networkSecurityGroups":
            for network in self.cloud.all("virtualNetworks"):
                if item["id"] in repr(network):
                    raise Refusal(400, "InUseNetworkSecurityGroupCannotBeDeleted", name)
