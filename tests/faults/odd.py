"""Odd input for the places where something comes in from outside: made from a seed, so that each can be made again."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

__all__ = ["USUAL", "WHOLE", "inputs", "value"]

USUAL = 1_000
"""Inputs of each place in `make test`."""
WHOLE = 20_000
"""And in `make test-all`."""

_TEXTS = (
    "", "\0", "\ud800", "a\udcffb", "../../etc/passwd", "-rf", "\n", "%00", "x" * 5_000, "'; DROP TABLE jobs;--",
    "\u202e", "latest", "web", "NaN", "2026-11-30T00:00:00Z", "9" * 5_000, "\x1b[2J", "é", "\U0001f600",
)  # fmt: skip
_NUMBERS = (
    0,
    1,
    -1,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
)


def value(rng: random.Random, depth: int = 3) -> object:
    """A value of JSON's types, or nearly."""
    kind = rng.randrange(7 if depth else 5)
    if kind == 0:
        return rng.choice(_TEXTS)
    if kind == 1:
        return rng.choice(_NUMBERS)
    if kind == 2:
        return rng.choice((None, True, False))
    if kind == 3:
        return "".join(chr(rng.randrange(0x3000)) for _ in range(rng.randrange(12)))
    if kind == 4:
        return rng.randrange(-(2**70), 2**70)
    if kind == 5:
        return [value(rng, depth - 1) for _ in range(rng.randrange(5))]
    return {str(value(rng, 0)): value(rng, depth - 1) for _ in range(rng.randrange(5))}


def inputs(corpus: Sequence[dict[str, object]], count: int, seed: int = 0) -> Iterator[bytes]:
    """Texts near the JSON objects of the corpus: fields odd, missing or added, bytes flipped, cut, doubled or nested.
    The objects themselves are the first."""
    rng = random.Random(seed)
    yield from (json.dumps(item).encode() for item in corpus)
    for number in range(count):
        item = dict(rng.choice(corpus))
        for _ in range(rng.randrange(3)):
            name = rng.choice([*item, "odd", "\0", "verb"])
            if rng.randrange(4):
                item[name] = value(rng)
            else:
                item.pop(name, None)
        text = json.dumps(item, ensure_ascii=number % 2 == 0).encode("utf-8", "surrogatepass")
        yield _bent(text, rng) if number % 3 == 0 else text


def _bent(text: bytes, rng: random.Random) -> bytes:
    way = rng.randrange(6)
    at = rng.randrange(len(text) + 1)
    if way == 0:
        return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    if way == 1:
        return text[:at]
    if way == 2:
        return text[:at] + text
    if way == 3:
        return b"[" * 30_000 + text + b"]" * 30_000
    if way == 4:
        return b'{"a":' * 9_000 + text + b"}" * 9_000
    return text[:at] + rng.randbytes(rng.randrange(40)) + text[at:]
