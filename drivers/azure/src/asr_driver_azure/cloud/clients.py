"""Clients of Azure's SDK for one site: signed in, with time limits, and with the driver's retries instead of the
SDK's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from azure.core.credentials import TokenCredential
from azure.identity import ClientSecretCredential, DefaultAzureCredential
from azure.mgmt.compute import ComputeManagementClient
from azure.mgmt.network import NetworkManagementClient
from azure.storage.blob import BlobClient, BlobServiceClient

from asr_driver_azure.settings import SiteSettings

__all__ = ["BLOB_API", "Clients"]

# The SDK's default is newer than the storage emulator of the tests supports; everything used here is older.
BLOB_API = "2026-06-06"
_CONNECT_SECONDS = 10
_READ_SECONDS = 60


class Clients:
    """Made when first used. Tokens are renewed by the SDK with each request, however long a copy takes."""

    def __init__(self, settings: SiteSettings, heard: Callable[[Any], None] | None = None) -> None:
        """`heard`: called with each answer."""
        self._settings = settings
        self._heard = heard
        self._opened: list[Any] = []

    def _common(self) -> dict[str, Any]:
        verify: Any = self._settings.ca_file or True
        return {
            "connection_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "connection_verify": verify,
            "retry_total": 0,  # `Calls` retries: it paces all threads, and reports what it waits for
            "raw_response_hook": self._heard,
        }

    @cached_property
    def credential(self) -> TokenCredential:
        """The engine's identity in Azure."""
        settings = self._settings
        options: dict[str, Any] = {"authority": settings.authority} if settings.authority else {}
        if settings.ca_file:
            options["connection_verify"] = settings.ca_file
        if not settings.tenant:
            return DefaultAzureCredential(**options)
        return ClientSecretCredential(
            settings.tenant,
            settings.client_id,
            settings.client_secret,
            # Asking the public cloud about another cloud's sign-in endpoint is useless.
            disable_instance_discovery=bool(settings.authority),
            **options,
        )

    @cached_property
    def blobs(self) -> BlobServiceClient:
        """The storage account."""
        credential: Any = self._settings.account_key or self.credential
        client = BlobServiceClient(
            self._settings.account_url, credential=credential, api_version=BLOB_API, **self._common()
        )
        self._opened.append(client)
        return client

    def disk(self, sas: str) -> BlobClient:
        """The content of a managed disk or snapshot, by its SAS."""
        return BlobClient.from_blob_url(sas, api_version=BLOB_API, **self._common())

    @cached_property
    def compute(self) -> ComputeManagementClient:
        """Disks, snapshots and machines."""
        client: ComputeManagementClient = self._management(ComputeManagementClient)
        return client

    @cached_property
    def network(self) -> NetworkManagementClient:
        """Networks, cards and addresses."""
        client: NetworkManagementClient = self._management(NetworkManagementClient)
        return client

    def _management(self, kind: Any) -> Any:
        settings = self._settings
        client = kind(
            self.credential,
            settings.subscription,
            base_url=settings.management_url,
            credential_scopes=[f"{settings.management_url}/.default"],
            **self._common(),
        )
        self._opened.append(client)
        return client

    def close(self) -> None:
        """Close all connections."""
        for client in self._opened:
            client.close()
        self._opened.clear()
