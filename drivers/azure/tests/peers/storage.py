"""A storage account for a test: settings for a site, and access without the driver."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from azure.storage.blob import BlobServiceClient

from asr_driver_azure.cloud.clients import BLOB_API
from drivers.azure.tests.peers.azurite import ACCOUNT, Azurite
from drivers.azure.tests.peers.proxy import Proxy

_numbers = itertools.count(1)


class Storage:
    """`proxy`: the proxy in front of it; `direct`: a client without the proxy."""

    def __init__(self, azurite: Azurite, proxy: Proxy) -> None:
        self.proxy = proxy
        self.key = azurite.key
        self.direct = BlobServiceClient(
            f"http://127.0.0.1:{azurite.port}/{ACCOUNT}", credential=azurite.key, api_version=BLOB_API
        )

    def settings(self, container: str = "") -> dict[str, str]:
        """Settings for a site with its own container."""
        return {
            "account_url": self.proxy.url(ACCOUNT),
            "account_key": self.key,
            "container": container or f"test{next(_numbers)}",
        }

    def blobs(self, container: str) -> dict[tuple[str, str], Any]:
        """All blobs and snapshots by name, without the driver."""
        found = self.direct.get_container_client(container).list_blobs(include=["snapshots", "metadata"])
        return {(item.name, item.snapshot or ""): item for item in found}

    def content(self, container: str, name: str, snapshot: str = "") -> bytes:
        """A blob's bytes, without the driver."""
        client = self.direct.get_blob_client(container, name, snapshot=snapshot or None)
        return bytes(client.download_blob().readall())

    def close(self) -> None:
        """Close the client."""
        self.direct.close()

    @contextmanager
    def switched(self, fault: str, value: object = True) -> Iterator[None]:
        """Enable a fault of the proxy within the block."""
        before = getattr(self.proxy, fault)
        setattr(self.proxy, fault, value)
        try:
            yield
        finally:
            setattr(self.proxy, fault, before)
