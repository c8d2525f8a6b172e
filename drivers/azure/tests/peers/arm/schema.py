"""Bodies checked against the types that Microsoft generates from its OpenAPI descriptions (`azure.mgmt.*.types`)."""

from __future__ import annotations

import functools
import typing
from collections.abc import MutableMapping
from enum import Enum
from types import ModuleType, UnionType
from typing import Any, Union

import azure.mgmt.compute.models
import azure.mgmt.compute.types
import azure.mgmt.network.models
import azure.mgmt.network.types
import typing_extensions

_KINDS: dict[str, tuple[ModuleType, ModuleType]] = {
    "compute": (azure.mgmt.compute.types, azure.mgmt.compute.models),
    "network": (azure.mgmt.network.types, azure.mgmt.network.models),
}


class Refusal(Exception):
    """An error answer. `after`: seconds to wait."""

    def __init__(self, status: int, code: str, message: str, after: float | None = None) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code, self.message, self.after = status, code, message, after


def check(provider: str, kind: str, body: object) -> None:
    """Raises Refusal for an unknown property, a value of a wrong type, or an unknown value of an enum."""
    _check(provider, getattr(_KINDS[provider][0], kind), body, kind)


@functools.cache
def _hints(provider: str, kind: type) -> dict[str, Any]:
    types, models = _KINDS[provider]
    return typing_extensions.get_type_hints(kind, globalns=vars(models) | vars(types), include_extras=True)


def check_sent(provider: str, kind: str, body: object) -> None:
    """Raises Refusal for a property that is read-only in its description."""
    _check_sent(provider, getattr(_KINDS[provider][1], kind), body, kind)


@functools.cache
def _fields(provider: str, model: Any) -> dict[str, tuple[bool, Any]]:
    """Whether each property is read-only, and its type, by name."""
    models = _KINDS[provider][1]
    names = vars(models) | {"_models": models}
    hints = typing_extensions.get_type_hints(model, globalns=names)
    model({})  # the first instance of a model defines its fields
    fields = model._attr_to_rest_field
    return {field._rest_name: (field._visibility == ["read"], hints.get(name)) for name, field in fields.items()}


def _check_sent(provider: str, kind: Any, value: object, path: str) -> None:
    for part in (kind, *typing.get_args(kind)):
        if isinstance(value, list) and typing.get_origin(part) is list:
            for index, item in enumerate(value):
                _check_sent(provider, typing.get_args(part)[0], item, f"{path}[{index}]")
        elif isinstance(value, dict) and isinstance(part, type) and issubclass(part, MutableMapping):
            for name, item in value.items():
                read_only, hint = _fields(provider, part).get(name, (False, None))
                if read_only:
                    raise Refusal(400, "PropertyChangeNotAllowed", f"{path}.{name} can only be read")
                _check_sent(provider, hint, item, f"{path}.{name}")


def _check(provider: str, kind: Any, value: object, path: str) -> None:
    origin = typing.get_origin(kind)
    if origin in (typing_extensions.Required, typing_extensions.NotRequired):
        _check(provider, typing.get_args(kind)[0], value, path)
    elif typing_extensions.is_typeddict(kind):
        _check_object(provider, kind, value, path)
    elif origin in (Union, UnionType):
        _check_union(provider, typing.get_args(kind), value, path)
    elif origin is list:
        if not isinstance(value, list):
            raise _wrong(path, "a list")
        for index, item in enumerate(value):
            _check(provider, typing.get_args(kind)[0], item, f"{path}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict):
            raise _wrong(path, "an object")
        for name, item in value.items():
            _check(provider, typing.get_args(kind)[1], item, f"{path}.{name}")
    elif kind is int and isinstance(value, bool):
        raise _wrong(path, "a number")
    elif kind in (str, int, bool) and not isinstance(value, kind):
        raise _wrong(path, kind.__name__)


def _check_object(provider: str, kind: Any, value: object, path: str) -> None:
    if not isinstance(value, dict):
        raise _wrong(path, "an object")
    hints = _hints(provider, kind)
    for name, item in value.items():
        if name not in hints:
            raise Refusal(400, "InvalidRequestContent", f"{path} has no property {name!r}")
        if item is not None:
            _check(provider, hints[name], item, f"{path}.{name}")
    needed = {name for name, hint in hints.items() if typing_extensions.get_origin(hint) is typing_extensions.Required}
    missing = needed - value.keys()
    if missing:
        raise Refusal(400, "InvalidParameter", f"{path} needs {', '.join(sorted(missing))}")


def _check_union(provider: str, kinds: tuple[Any, ...], value: object, path: str) -> None:
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if enums:
        words = {item.value for item in enums[0]}
        # Sizes are an open list, and the description names only the oldest; the region's own list is decisive.
        if value not in words and not path.endswith(".vmSize"):
            raise Refusal(400, "InvalidParameter", f"{path} is {value!r}, and must be one of {sorted(words)}")
        return
    problems = []
    for kind in kinds:
        try:
            _check(provider, kind, value, path)
        except Refusal as problem:
            problems.append(problem)
        else:
            return
    raise problems[0]


def _wrong(path: str, wanted: str) -> Refusal:
    return Refusal(400, "InvalidRequestContent", f"{path} must be {wanted}")
