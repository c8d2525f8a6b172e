"""The driver: who it is, and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from asrcore.driver import API, Capability, Driver, DriverInfo, Setting

if TYPE_CHECKING:
    from asrcore.remote.client.site import RemoteSite

__all__ = ["RemoteDriver"]


class RemoteDriver(Driver):
    """Sites that are served elsewhere."""

    info = DriverInfo(
        name="remote",
        title="A site served by a master target",
        version=version("asrcore"),
        api=API,
        capabilities=frozenset(Capability),
        settings=(
            Setting("address", "address of the master target: HOST:PORT", required=True),
            Setting("identity", "directory with certificate.pem, key.pem, ca.pem, optionally crl.pem", required=True),
            Setting("peer", "name in the other side's certificate; without it the certificate must be for the address"),
            Setting("role", "role in the other side's certificate", default="master-target"),
            Setting("connections", "connections used for data, 1 to 8", default="2"),
            Setting("silence", "drop a connection after this long without traffic", default="30s"),
        ),
    )

    def connect(self, name: str, settings: Mapping[str, str]) -> RemoteSite:
        """See `Driver.connect`."""
        from asrcore.remote.client.dial import dial  # noqa: PLC0415 - TLS loads with a site only

        return dial(name, {item.name: settings.get(item.name) or item.default for item in self.info.settings})
