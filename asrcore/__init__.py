"""Open-source site recovery: replicate machines to another site, fail them over, and fail them back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asrcore.engine import Engine
    from asrcore.model.policy import Policy
    from asrcore.plugins import load as load_plugins

__all__ = ["Engine", "Policy", "load_plugins"]

_PLACES = {
    "Engine": ("asrcore.engine", "Engine"),
    "Policy": ("asrcore.model.policy", "Policy"),
    "load_plugins": ("asrcore.plugins", "load"),
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: drivers need only the contract and must not load the engine."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    module, attribute = _PLACES[name]
    value: object = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
