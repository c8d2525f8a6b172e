"""The first connection to a served site, from settings as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from asrcore.errors import InvalidSetting, InvalidValue
from asrcore.remote.client.peer import DialledLinks
from asrcore.remote.client.site import RemoteSite
from asrcore.units import parse_duration
from asrcore.wire.carrier import Address, Limits
from asrcore.wire.tls import Identity, Role

__all__ = ["MOST_CONNECTIONS", "dial"]

T = TypeVar("T")
MOST_CONNECTIONS = 8


def dial(name: str, given: Mapping[str, str]) -> RemoteSite:
    """The site, which has answered. `given`: a text for each setting. Raises InvalidSetting, SiteUnreachable, and what
    TLS refuses."""
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
    if not text.isdecimal() or not 1 <= int(text) <= MOST_CONNECTIONS:
        raise InvalidValue(what="connections", value=text, wanted=f"a number from 1 to {MOST_CONNECTIONS}")
    return int(text)
