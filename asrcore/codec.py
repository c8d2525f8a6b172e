"""attrs values to JSON and back, by their type annotations; what does not fit raises ValueError.

msgspec checks types and names the field in its errors. Fields that a newer version added are ignored; a record's
`format` says what may not be.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

__all__ = ["convert", "dump", "load"]

T = TypeVar("T")

_decoders: dict[type, msgspec.json.Decoder[Any]] = {}  # making one costs 0.1 ms


def dump(value: object) -> bytes:
    """The value as JSON text."""
    return msgspec.json.encode(value, order="sorted") + b"\n"


def load(kind: type[T], text: bytes) -> T:
    """The value that `dump` wrote. Raises ValueError, naming the field."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        result: T = decoder.decode(text)
    except RecursionError as problem:  # what the kind does not name is skipped level by level
        raise ValueError("it is nested too deeply") from problem
    return result


def convert(kind: type[T], plain: object) -> T:
    """The value that JSON's types make. Raises ValueError, naming the field."""
    return msgspec.convert(plain, kind)
