"""The driver `remote`: a site that a process elsewhere serves (`asr master-target`), used as any other site."""

from asrcore.driver import Driver
from asrcore.hookspecs import hookimpl
from asrcore.service.remote._driver import RemoteDriver
from asrcore.service.remote._peer import Links, Peer
from asrcore.service.remote._site import RemoteSite
from asrcore.service.remote._source import RemoteInventory, RemoteSource
from asrcore.service.remote._target import RemoteFailover, RemoteTarget

__all__ = [
    "Links",
    "Peer",
    "RemoteDriver",
    "RemoteFailover",
    "RemoteInventory",
    "RemoteSite",
    "RemoteSource",
    "RemoteTarget",
    "asr_register_drivers",
]


@hookimpl
def asr_register_drivers() -> list[Driver]:
    """Offer the driver."""
    return [RemoteDriver()]
