"""The driver: settings, and the first connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TypeVar

from asrcore.driver import API, Capability, Driver, DriverInfo, Setting
from asrcore.errors import InvalidSetting, InvalidValue
from asrcore.remote.client.peer import DialledLinks
from asrcore.remote.client.site import RemoteSite
from asrcore.units import parse_duration
from asrcore.wire.carrier import Address, Limits
from asrcore.wire.tls import Identity, Role

__all__ = ["RemoteDriver"]

T = TypeVar("T")
_MOST_CONNECTIONS = 8


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
            Setting("role", "role in the other side's certificate", default=Role.MASTER_TARGET.value),
            Setting("connections", f"connections used for data, 1 to {_MOST_CONNECTIONS}", default="2"),
            Setting("silence", "drop a connection after this long without traffic", default="30s"),
        ),
    )

    def connect(self, name: str, settings: Mapping[str, str]) -> RemoteSite:
        """See `Driver.connect`."""
        given = {item.name: settings.get(item.name) or item.default for item in self.info.settings}
        links = DialledLinks(
            _checked("address", lambda: Address.parse(given["address"])),
            Identity(given["identity"]),
            roles=[_checked("role", lambda: Role(given["role"]))],
            name=given["peer"],
            limits=Limits(silence=_checked("silence", lambda: _silence(given["silence"]))),
            count=_checked("connections", lambda: _connections(given["connections"])),
        )
        site = RemoteSite(name, links)
        try:
            site.status()
        except BaseException:
            site.close()
            raise
        return site


def _checked(setting: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except (ValueError, InvalidValue) as problem:
        raise InvalidSetting(driver="remote", setting=setting, problem=str(problem)) from problem


def _silence(text: str) -> float:
    seconds = parse_duration(text, "silence")
    if not 1 <= seconds <= 600:
        raise InvalidValue(what="silence", value=text, wanted="between 1s and 10min")
    return seconds


def _connections(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_CONNECTIONS:
        raise InvalidValue(what="connections", value=text, wanted=f"a number from 1 to {_MOST_CONNECTIONS}")
    return int(text)
