"""Recorded traffic checked against Microsoft's own description, as contained in the SDK of that API version.

What `oav` would do with the OpenAPI documents: each request and answer body has properties, types and values that the
SDK's types and models declare; no request body has a read-only property; each long-running operation is answered as
one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import azure.mgmt.compute.models

from drivers.azure.tests.peers.arm.schema import Refusal, check, check_sent

_RESOURCE = re.compile(
    r"/subscriptions/[^/]+(?:/resourceGroups/[^/]+)?/providers/Microsoft\.(\w+)/(\w+)(/[^/?]+)?(/\w+)?"
)
KINDS = {
    "disks": "Disk",
    "snapshots": "Snapshot",
    "virtualMachines": "VirtualMachine",
    "networkInterfaces": "NetworkInterface",
    "networkSecurityGroups": "NetworkSecurityGroup",
    "publicIPAddresses": "PublicIPAddress",
    "virtualNetworks": "VirtualNetwork",
    "skus": "ResourceSku",
}


def problems(traffic: Iterable[Mapping[str, Any]]) -> list[str]:
    """Deviations from the description, one line each."""
    found = []
    for item in traffic:
        try:
            _exchange(item)
        except Refusal as problem:
            found.append(f"{item['method']} {item['path']} {item['status']}: {problem.message}")
    return found


def _exchange(item: Mapping[str, Any]) -> None:
    match = _RESOURCE.match(item["path"])
    if match is None or match[2] not in KINDS:
        raise Refusal(500, "Traffic", "a path that is not described")
    provider, kind, action = match[1].lower(), KINDS[match[2]], match[4]
    given, status = item["given"], item["status"]
    if item["method"] == "PUT" and status < 300:
        check(provider, kind, item["sent"])
        check_sent(provider, kind, item["sent"])
    if status >= 400:
        if not isinstance(given, dict) or given.keys() != {"error"} or given["error"].keys() < {"code", "message"}:
            raise Refusal(500, "Traffic", f"an error of another form: {given}")
        return
    headers = {name.lower() for name in item["headers"]}
    if status == 202 and not headers & {"azure-asyncoperation", "location"}:
        raise Refusal(500, "Traffic", "accepted, and nowhere to ask what becomes of it")
    if not given:
        return
    if action == "/instanceView":
        check(provider, "VirtualMachineInstanceView", given)
    elif "value" in given and not match[3]:
        for entry in given["value"]:
            _body(provider, kind, entry)
    else:
        _body(provider, kind, given)


def _body(provider: str, kind: str, body: Mapping[str, Any]) -> None:
    if kind == "ResourceSku":  # read-only: the SDK has a model of it and no type
        fields = vars(azure.mgmt.compute.models)[kind]._attr_to_rest_field.values()
        unknown = body.keys() - {field._rest_name for field in fields}
        if unknown:
            raise Refusal(500, "Traffic", f"{kind} has no property {', '.join(sorted(unknown))}")
    else:
        check(provider, kind, body)
