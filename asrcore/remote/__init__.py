"""The driver contract over the wire: a site that another process serves, and the driver `remote` that uses it."""

from asrcore.driver import Driver
from asrcore.hookspecs import hookimpl
from asrcore.remote.client.driver import RemoteDriver

__all__ = ["RemoteDriver", "asr_register_drivers"]


@hookimpl
def asr_register_drivers() -> list[Driver]:
    """Offer the driver `remote`."""
    return [RemoteDriver()]
