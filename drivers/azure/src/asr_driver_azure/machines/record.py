"""What the driver records of a machine that it created, and the names and tags of that machine's resources.

A machine is *defined* by a small blob: its disks and cards exist, and its description as protected. Azure's own machine
is created by the first start, since Azure creates none without starting it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from urllib.parse import quote

import attrs

from asrcore.driver import Fence
from asrcore.model.machine import Description

__all__ = [
    "BASE_VIEW",
    "FENCES",
    "MACHINES",
    "TAG_COMMITTED",
    "TAG_CONTAINER",
    "TAG_DISK",
    "TAG_FENCE",
    "TAG_OWNER",
    "TAG_POWER",
    "TAG_SIZE",
    "TAG_TAKEN",
    "TAG_VAULT",
    "TAG_VIEW",
    "Defined",
    "FenceAt",
    "belongs",
    "fence_blob",
    "machine_blob",
    "owner_of",
    "repairs_blob",
    "tags_for",
    "test_owner",
]

MACHINES = "machines/"
FENCES = "fences/"
TAG_OWNER = "asr-owner"
"""Name of the machine that a resource belongs to; what has no such machine is left over."""
TAG_CONTAINER = "asr-container"
"""Identity of the container whose records name the owner; records in other containers do not apply."""
TAG_COMMITTED = "asr-committed"
"""Of the disks of a machine whose failover was committed: never left over, whatever happened to the records."""
TAG_DISK = "asr-disk"
"""Id of the disk within the machine."""
TAG_SIZE = "asr-size"
"""Bytes of the disk as it was protected; Azure's disk may be larger."""
TAG_VIEW = "asr-view"
"""Of a snapshot: the view that it belongs to."""
TAG_VAULT = "asr-vault"
"""Of a snapshot: the tag of the vault that took it, none for a site that has none."""
TAG_TAKEN = "asr-taken"
"""Of a snapshot: when it was taken, seconds since the epoch."""
TAG_POWER = "asr-power"
"""Of a snapshot: whether the machine was running."""
TAG_FENCE = "asr-fence"
"""Of a machine: shows people that it is quarantined; the record is a blob."""
BASE_VIEW = "promoted"
"""View of the snapshots that show a machine as it was promoted, before it first ran."""


@attrs.frozen
class FenceAt:
    """A fence with the machine that it is of."""

    machine_id: str
    fence: Fence


@attrs.frozen
class Defined:
    """`name`: of Azure's machine and of the blob. `disks`, `cards`: Azure's names by disk id, and in the cards' order.
    `networks`: what each card is plugged into, by the site's network names. `aside`: put aside by a failover, for
    undo."""

    name: str
    machine_id: str
    description: Description
    size: str
    disks: Mapping[str, str]
    cards: tuple[str, ...]
    networks: tuple[str, ...]
    aside: bool = False

    @property
    def in_order(self) -> list[str]:
        """Azure's names of the disks as the machine has them, the system's first; what is kept is sorted by id."""
        return [self.disks[disk.id] for disk in self.description.machine.disks if disk.id in self.disks]


def owner_of(name: str, instance: str) -> str:
    """Azure's name for the machine of an instance: readable, unique, at most 49 characters."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "machine"
    return f"{readable}-{hashlib.sha256(instance.encode()).hexdigest()[:8]}"


def tags_for(container: str, owner: str, **more: str) -> dict[str, str]:
    """Of a resource of that machine. `container`: its identity."""
    return {TAG_OWNER: owner, TAG_CONTAINER: container, **more}


def belongs(tags: Mapping[str, str], container: str, owner: str) -> bool:
    """Whether a resource with these tags is of that machine."""
    return tags.get(TAG_OWNER) == owner and tags.get(TAG_CONTAINER) == container


def machine_blob(owner: str) -> str:
    """Of what is kept of a machine."""
    return f"{MACHINES}{owner}.json"


def repairs_blob(owner: str) -> str:
    """Of what was changed on its system disk so that it boots, and what was not, for people."""
    return f"{MACHINES}{owner}/repairs.json"


def fence_blob(machine_id: str) -> str:
    """Of a machine's fence."""
    return f"{FENCES}{quote(machine_id, safe='')}.json"


def test_owner(replica_id: str, test_id: str) -> str:
    """Azure's name of a test's machine."""
    return owner_of("asr-test", f"test/{replica_id}/{test_id}")
