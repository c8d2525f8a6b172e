"""The storage account over HTTPS, as in Azure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from azure.storage.blob import BlobClient

from asr_driver_azure.cloud.calls import Calls
from asr_driver_azure.driver import AzureDriver
from asr_driver_azure.site import AzureSite
from asrcore.errors import AccessDenied
from asrcore.model.extent import Extent
from drivers.azure.tests import bench
from drivers.azure.tests.peers.azurite import ACCOUNT, Azurite

SIZE = 8 * bench.MIB


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with Azurite(tmp_path_factory.mktemp("tls"), tls=True) as azurite:
        url = f"https://127.0.0.1:{azurite.port}/{ACCOUNT}"
        yield {"account_url": url, "account_key": azurite.key, "container": "tls", "ca_file": str(azurite.ca_file)}


def test_no_put_carries_a_checksum_beside(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS already has a checksum for all traffic; the service would spend an eighth of its time on another one."""
    puts: list[dict[str, Any]] = []
    upload = BlobClient.upload_page

    def noted(client: BlobClient, page: bytes, offset: int, length: int, **options: Any) -> Any:
        puts.append(options)
        return upload(client, page, offset, length, **options)

    monkeypatch.setattr(BlobClient, "upload_page", noted)
    with AzureDriver().connect("tls", settings) as site:
        assert isinstance(site, AzureSite)
        site.account.make_container()
        data = bytes(range(256)) * (SIZE // 256)
        replica = bench.made(site, "r", SIZE)
        with bench.opened(replica, "c", None, SIZE) as writer:
            bench.replicate(writer, data, [Extent(0, SIZE)])
            bench.seal(writer, "p", SIZE)
        found = bytearray(SIZE)
        with replica.reader("vda") as reader:
            for at in range(0, SIZE, bench.PUT):
                reader.read_into(at, memoryview(found)[at : at + bench.PUT])
        assert found == data
    assert len(puts) >= SIZE // bench.PUT
    assert not any("transactional_content_md5" in options for options in puts)


def test_a_server_that_nobody_vouches_for_is_not_spoken_to(settings: dict[str, str]) -> None:
    """It is not retried: waiting does not help."""
    given = {name: value for name, value in settings.items() if name != "ca_file"}
    begun = time.monotonic()
    with pytest.raises(AccessDenied, match="the server's certificate is not trusted"):
        AzureDriver().connect("tls", given).close()
    assert time.monotonic() - begun < Calls("tls").patience / 2
