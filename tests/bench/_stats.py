"""Rounds, medians and ratios. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import attrs

__all__ = ["OURS", "TIDIED", "Measured", "Result", "document", "median", "order", "ratio", "sealed"]

OURS = "asrcore"
TIDIED = "asrcore, tidied up"
"""asrcore until its job has ended: includes the work after the point, which is done before the next cycle."""


@attrs.frozen
class Measured:
    """One round of one contender. `cpu_seconds`: of the contender's processes and threads, without QEMU's; `peak_rss`:
    bytes, 0 where it was not measured; `more`: further numbers, such as bytes sent."""

    seconds: float
    cpu_seconds: float = 0.0
    peak_rss: int = 0
    more: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen
class Result:
    """The results of a section: `rounds` by contender, `figures` by key of build/bench.json, `missing`: what was not
    measured, and why."""

    section: str
    title: str
    rounds: Mapping[str, Sequence[Measured]]
    figures: Mapping[str, float] = attrs.field(factory=dict)
    missing: Sequence[str] = ()


def sealed(rounds: Mapping[str, Sequence[Measured]], *names: str) -> dict[str, list[Measured]]:
    """The rounds with asrcore's time (and that of `names`, if present) only until the recovery point existed, and
    asrcore's full time in addition."""
    result = {name: list(items) for name, items in rounds.items()}
    for name in {OURS, *names} & rounds.keys():
        result[name] = [attrs.evolve(item, seconds=item.more["sealed_seconds"]) for item in rounds[name]]
    return {OURS: result.pop(OURS), TIDIED: list(rounds[OURS]), **result}


def median(rounds: Sequence[Measured], field: str = "") -> float:
    """Median seconds, or of a number among `more`."""
    return statistics.median(item.more[field] if field else item.seconds for item in rounds)


def ratio(rounds: Mapping[str, Sequence[Measured]], peer: str, field: str = "") -> float:
    """How many times faster asrcore is than the peer: the peer's median divided by asrcore's. `field`: compares that
    number instead."""
    return median(rounds[peer]) / median(rounds[OURS], field)


def order(names: Sequence[str], number: int) -> list[str]:
    """The contenders in the order of a round. Each is first in turn, because the first one finds different caches.
    Every second round is reversed, so that no contender always follows the same one: each finds the memory as the
    previous one left it.
    """
    start = number // 2 % len(names) if names else 0
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if number % 2 else turned


def document(results: Sequence[Result], machine: Mapping[str, object]) -> dict[str, object]:
    """build/bench.json."""
    figures = {key: float(f"{value:.4g}") for result in results for key, value in result.figures.items()}
    rounds = {
        result.section: {
            name: [
                {
                    "seconds": round(item.seconds, 4),
                    "cpu_seconds": round(item.cpu_seconds, 4),
                    "peak_rss_bytes": item.peak_rss,
                    **{key: round(value, 4) for key, value in item.more.items()},
                }
                for item in items
            ]
            for name, items in result.rounds.items()
        }
        for result in results
    }
    missing = [f"{result.section}: {text}" for result in results for text in result.missing]
    return {"figures": figures, "rounds": rounds, "machine": dict(machine), "not_measured": missing}
