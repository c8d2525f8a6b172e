"""The driver `remote`: a site that another process serves (`asr master-target`), used like any other site."""

from asrcore.driver import Driver
from asrcore.hookspecs import hookimpl
from asrcore.remote.client.driver import RemoteDriver
from asrcore.remote.client.peer import Links, Peer
from asrcore.remote.client.site import RemoteSite
from asrcore.remote.client.source import RemoteInventory, RemoteSource
from asrcore.remote.client.target import RemoteFailover, RemoteTarget

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
