"""A probe (`asr driver check azure`) deletes what it creates; a later probe or sweep deletes what a killed one leaves.

Each probe has a separate container, whose name marks it as a probe's and whose identity is in the tags of its
resources. The container is deleted last.
"""

from __future__ import annotations

from collections.abc import Callable
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import attrs
from azure.core.exceptions import ResourceNotFoundError

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.blobs.record import REPLICAS
from asr_driver_azure.cloud.arm import KINDS, tags_of
from asr_driver_azure.machines.builder import Builder
from asr_driver_azure.machines.record import MACHINES, TAG_CONTAINER
from asr_driver_azure.settings import PROBES
from asrcore.errors import AccessDenied, AsrError

__all__ = ["clear", "replica_of", "sweep_probes", "tried"]

ABANDONED = 3 * 3600.0
"""Seconds. A probe takes minutes; an older one is no longer running."""


def tried(call: Callable[[], object]) -> list[str]:
    """What went wrong, if anything."""
    try:
        call()
    except AsrError as problem:
        return [f"[{problem.code}] {problem}"]
    except Exception as problem:  # noqa: BLE001 - it must keep nothing else from being removed
        return [f"{type(problem).__name__}: {problem}"]
    return []


def clear(account: AzureAccount) -> list[str]:
    """Delete all that was created from a probe's container, and the container; returns what could not be deleted, and
    why."""
    if not account.reach():
        return []
    problems = []
    if account.settings.runs_machines:
        builder = Builder(account)
        for kind in KINDS:
            for item in account.arm.listed(kind):
                if tags_of(item).get(TAG_CONTAINER) == account.container.identity:
                    name = str(item["name"])
                    problems += tried(partial(builder.remove_resource, kind, name))
    if not problems:  # else the rest is still found by it
        problems += tried(lambda: _drop(account))
    return problems


def _drop(account: AzureAccount) -> None:
    def drop() -> None:
        try:
            account.container.client.delete_container()
        except ResourceNotFoundError:
            return

    account.container.run("deleting the container", drop, write=True)


def sweep_probes(account: AzureAccount) -> list[str]:
    """Delete what killed probes have left; names of their containers. Empty where containers may not be listed."""

    # The cloud's own time: by a clock here that is ahead, a probe of another host would count as one that was killed.
    answered: list[float] = []

    def note(response: Any) -> None:
        dated = response.http_response.headers.get("Date")
        if dated:
            answered.append(parsedate_to_datetime(dated).timestamp())

    def walk() -> list[str]:
        found = list(account.clients.blobs.list_containers(name_starts_with=PROBES, raw_response_hook=note))
        # Without a time the age of none is known.
        return [
            str(item.name) for item in found if answered and answered[0] - item.last_modified.timestamp() > ABANDONED
        ]

    try:
        names = account.calls.run("listing containers", walk)
    except AccessDenied:
        return []  # the identity may be limited to one container: then there are no others
    removed = []
    for name in names:
        if name == account.settings.container:
            continue
        with AzureAccount(account.name, attrs.evolve(account.settings, container=name)) as left:
            if _is_one(left) and not clear(left):
                removed.append(name)
    return removed


def _is_one(account: AzureAccount) -> bool:
    """Whether nothing but a probe's is in the container; another container with such a name is kept."""
    own = f"{REPLICAS}{replica_of(account.settings.container)}/"
    return all(
        item.name == "identity" or item.name.startswith((own, MACHINES)) for item in account.container.listed("")
    )


def replica_of(container: str) -> str:
    """Id of the one replica that a probe creates in its container."""
    return container.removeprefix("asr-")
