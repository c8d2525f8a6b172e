"""What travels between processes: frames, channel, TLS. The names here are public, for drivers with an agent."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asrcore.wire.carrier import Address, Carrier, Limits
    from asrcore.wire.channel import Answer, Channel
    from asrcore.wire.listener import Listener
    from asrcore.wire.tls import Component, Identity, Role

__all__ = ["Address", "Answer", "Carrier", "Channel", "Component", "Identity", "Limits", "Listener", "Role"]

_PLACES = {
    "Address": "carrier",
    "Answer": "channel",
    "Carrier": "carrier",
    "Channel": "channel",
    "Component": "tls",
    "Identity": "tls",
    "Limits": "carrier",
    "Listener": "listener",
    "Role": "tls",
}


def __getattr__(name: str) -> object:
    """Import these when they are first used: `frames` alone, as an agent has it, needs only the standard library."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    value: object = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
