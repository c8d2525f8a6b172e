"""What a probe (`asr driver check azure`) makes is removed by itself; what a killed one leaves, by whoever comes later.

A probe has a container of its own, whose name says what it is and whose identity is in the tags of its resources. The
container goes last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import attrs
from azure.core.exceptions import ResourceNotFoundError

from asr_driver_azure._arm import KINDS, tags_of
from asr_driver_azure._build import Builder
from asr_driver_azure._machine import MACHINES, TAG_CONTAINER
from asr_driver_azure._record import REPLICAS
from asr_driver_azure._settings import PROBES
from asrcore.errors import AccessDenied, AsrError

if TYPE_CHECKING:
    from asr_driver_azure._site import AzureSite

__all__ = ["clear", "replica_of", "sweep_probes", "tried"]

ABANDONED = 3 * 3600.0
"""Seconds. A probe takes minutes; an older one does not run any more."""


def tried(call: Callable[[], object]) -> list[str]:
    """What went wrong, if anything."""
    try:
        call()
    except AsrError as problem:
        return [f"[{problem.code}] {problem}"]
    except Exception as problem:  # noqa: BLE001 - it must keep nothing else from being removed
        return [f"{type(problem).__name__}: {problem}"]
    return []


def clear(site: AzureSite) -> list[str]:
    """Remove all that was made from a probe's container, and the container; what could not be removed, and why."""
    if not site.reach():
        return []
    problems = []
    if site.settings.runs_machines:
        builder = Builder(site)
        for kind in KINDS:
            for item in site.arm.listed(kind):
                if tags_of(item).get(TAG_CONTAINER) == site.container.identity:
                    name = str(item["name"])
                    problems += tried(partial(builder.remove_resource, kind, name))
    if not problems:  # else it is what the rest is found by
        problems += tried(lambda: _drop(site))
    return problems


def _drop(site: AzureSite) -> None:
    def drop() -> None:
        try:
            site.container.client.delete_container()
        except ResourceNotFoundError:
            return

    site.container.run("deleting the container", drop, write=True)


def sweep_probes(site: AzureSite) -> list[str]:
    """Remove what probes that were killed have left; names of their containers. Nothing, where none may be listed."""
    from asr_driver_azure._site import AzureSite  # noqa: PLC0415 - it imports this module

    def walk() -> list[str]:
        found = site.clients.blobs.list_containers(name_starts_with=PROBES)
        return [str(item.name) for item in found if time.time() - item.last_modified.timestamp() > ABANDONED]

    try:
        names = site.calls.run("listing containers", walk)
    except AccessDenied:
        return []  # the identity may be good for one container only: then there are no others
    removed = []
    for name in names:
        if name == site.settings.container:
            continue
        with AzureSite(site.name, attrs.evolve(site.settings, container=name)) as left:
            if _is_one(left) and not clear(left):
                removed.append(name)
    return removed


def _is_one(site: AzureSite) -> bool:
    """Whether nothing but a probe's is in the container; whoever else calls one like that shall keep it."""
    own = f"{REPLICAS}{replica_of(site.settings.container)}/"
    return all(item.name == "identity" or item.name.startswith((own, MACHINES)) for item in site.container.listed(""))


def replica_of(container: str) -> str:
    """Id of the one replica that a probe makes in its container."""
    return container.removeprefix("asr-")
