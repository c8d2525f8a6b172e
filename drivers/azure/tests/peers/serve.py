"""The emulated Azure in a separate process: Azurite, the proxy in front of it, and a cloud whose machines are real
guests.

    python -m drivers.azure.tests.peers.serve DIRECTORY

prints the settings of a site as one line of JSON, then serves until its input ends. Each line that it reads is answered
with the state of the cloud, as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from drivers.azure.tests.peers.arm.server import Cloud
from drivers.azure.tests.peers.azurite import ACCOUNT, Azurite
from drivers.azure.tests.peers.proxy import Proxy


def main() -> None:
    """Serve."""
    directory = Path(sys.argv[1])
    with Azurite(directory / "storage") as azurite, Proxy(azurite.port) as proxy, Cloud(directory, boots=True) as cloud:
        settings = cloud.settings() | {
            "account_url": proxy.url(ACCOUNT),
            "account_key": azurite.key,
            "container": "asr-replicas",
        }
        print(json.dumps(settings), flush=True)
        for _ in sys.stdin:
            print(json.dumps(_state(cloud, proxy)), flush=True)


def _state(cloud: Cloud, proxy: Proxy) -> dict[str, object]:
    """The state of the cloud, read without the driver."""
    return {
        "resources": cloud.names(),
        "cards": {item["name"]: _subnet(item) for item in cloud.all("networkInterfaces")},
        "rules": {
            item["name"]: [rule["properties"]["access"] for rule in item["properties"].get("securityRules", [])]
            for item in cloud.all("networkSecurityGroups")
        },
        "page_bytes": proxy.sent(),
        "read_bytes": cloud.content.read,
        "requests": len(proxy.requests),
    }


def _subnet(card: dict[str, Any]) -> str:
    subnet: str = card["properties"]["ipConfigurations"][0]["properties"]["subnet"]["id"]
    return subnet.rpartition("/virtualNetworks/")[2]


if __name__ == "__main__":
    main()
