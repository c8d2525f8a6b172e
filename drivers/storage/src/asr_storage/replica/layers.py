"""The layers of a chain as a record has them: which backs which, what is not needed, what is to be gathered. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from asr_storage.replica.store import Record

__all__ = [
    "Run",
    "children",
    "frozen",
    "in_place_of",
    "next_merge",
    "path",
    "renamed",
    "to_gather",
    "without_leaves",
]


@attrs.frozen
class Run:
    """Layers to be gathered into one of `level` on top of `below`; the topmost first."""

    layers: Sequence[str]
    below: str
    level: int


def path(record: Record, image: str) -> list[str]:
    """The image itself and all below it."""
    result = []
    at: str | None = image
    while at is not None:
        result.append(at)
        layer = record.layers.get(at)
        at = layer.parent if layer else None
    return result


def children(record: Record) -> dict[str, list[str]]:
    """The children of each layer."""
    result: dict[str, list[str]] = {}
    for name, layer in record.layers.items():
        if layer.parent is not None:
            result.setdefault(layer.parent, []).append(name)
    return result


def frozen(record: Record) -> frozenset[str]:
    """Images that are not written by a cycle: kept points consist of them, or a holder uses them."""
    return record.held.union(*(point.images.values() for point in record.points if point.stored.kept))


def to_gather(record: Record, head: str, span: int) -> Run | None:
    """The run that ends in a head, if it is `span` layers long; with the runs below it that thereby reach that length.

    From the head down levels never decrease. A gathered layer would be one more of its level: if that fills the level,
    all is gathered into the level above at once.
    """
    below = path(record, head)
    at = level = 0
    while True:
        run = 0
        while at + run < len(below) - 1 and record.layers[below[at + run]].level == level:
            run += 1
        if run + (level > 0) < span:
            break
        at += run
        level += 1
    return Run(below[:at], below[at], level) if level else None


def next_merge(record: Record) -> str | None:
    """A layer that is neither needed nor held, with one child, to be merged into it: the lowest of its run.

    With several children it stays: each takes from it what it does not hold itself.
    """
    needed = _needed(record)
    stood_on = _with_ancestors(record, record.held)
    standing = children(record)

    def free(name: str | None) -> bool:
        return name is not None and name not in needed and name not in stood_on and len(standing.get(name, ())) == 1

    found = next((name for name in record.layers if free(name)), None)
    while found is not None and free(record.layers[found].parent):
        found = record.layers[found].parent
    return found


def in_place_of(record: Record, child: str, below: str) -> Record:
    """The record after `child` was merged into `below`."""
    layers = {
        name: attrs.evolve(layer, parent=below) if layer.parent == child else layer
        for name, layer in record.layers.items()
        if name != child
    }
    layers[below] = attrs.evolve(layers[below], size=max(layers[below].size, record.layers[child].size))
    return renamed(attrs.evolve(record, layers=layers), child, below)


def renamed(record: Record, old: str, new: str) -> Record:
    """The record with `new` in place of `old` in points and heads; what uses `old` as its backing file still does."""

    def changed(images: Mapping[str, str]) -> dict[str, str]:
        return {disk_id: new if image == old else image for disk_id, image in images.items()}

    points = tuple(
        attrs.evolve(point, images=changed(point.images)) if old in point.images.values() else point
        for point in record.points
    )
    return attrs.evolve(record, points=points, heads=changed(record.heads))


def without_leaves(record: Record) -> Record:
    """The record without layers that are neither needed nor used by another."""
    alive = _with_ancestors(record, _needed(record))
    return attrs.evolve(record, layers={name: layer for name, layer in record.layers.items() if name in alive})


def _needed(record: Record) -> set[str]:
    return {
        *record.heads.values(),
        *record.held,
        *(image for point in record.points for image in point.images.values()),
    }


def _with_ancestors(record: Record, images: frozenset[str] | set[str]) -> set[str]:
    """The images and all their backing files."""
    result: set[str] = set()
    for image in images:
        at: str | None = image
        while at is not None and at not in result:
            result.add(at)
            layer = record.layers.get(at)
            at = layer.parent if layer else None
    return result
