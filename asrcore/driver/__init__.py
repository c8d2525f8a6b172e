"""The contract between the engine and a driver: five roles by capability, in values of `asrcore.model`.

A driver connects to a *site*. A site offers the roles that it can fill; a role or an operation that is not offered
raises UnsupportedOperation, so the contract grows by a capability with a default, never by a new abstract method.

Rules for every operation:
- It may be repeated: a step that was killed is called again with the same identities and ends in the same state.
- It raises errors of `asrcore.errors` for every failure that can be expected, and has a time limit wherever it waits.
- Offsets, lengths and disk sizes are bytes as the guest sees them, multiples of 512 but for the end of a disk; times
  are seconds; `taken_at` is the engine host's clock.
"""

from __future__ import annotations

from asrcore.closing import Closing
from asrcore.driver._buffer import page_buffer
from asrcore.driver._digests import (
    DIGEST_BLOCK,
    DIGEST_SIZE,
    Digest,
    block_digests,
    different_blocks,
    digest_of,
    digests_of,
    zero_digest,
)
from asrcore.driver._examine import Examination, examination_parts
from asrcore.driver._failover import Failover, Instance, PromoteSpec, TestSpec
from asrcore.driver._inventory import Fence, Inventory
from asrcore.driver._reader import DiskReader
from asrcore.driver._site import API, Capability, Check, Driver, DriverInfo, Setting, Site, SiteStatus
from asrcore.driver._source import DiskView, FrozenView, MachineView, Source, Tracking, ViewRequest
from asrcore.driver._target import (
    Capacity,
    CycleSpec,
    CycleWriter,
    Promoted,
    Replica,
    ReplicaInfo,
    ReplicaSpec,
    SealSpec,
    StoredPoint,
    Target,
)

__all__ = [
    "API",
    "DIGEST_BLOCK",
    "DIGEST_SIZE",
    "Capability",
    "Capacity",
    "Check",
    "Closing",
    "CycleSpec",
    "CycleWriter",
    "Digest",
    "DiskReader",
    "DiskView",
    "Driver",
    "DriverInfo",
    "Examination",
    "Failover",
    "Fence",
    "FrozenView",
    "Instance",
    "Inventory",
    "MachineView",
    "PromoteSpec",
    "Promoted",
    "Replica",
    "ReplicaInfo",
    "ReplicaSpec",
    "SealSpec",
    "Setting",
    "Site",
    "SiteStatus",
    "Source",
    "StoredPoint",
    "Target",
    "TestSpec",
    "Tracking",
    "ViewRequest",
    "block_digests",
    "different_blocks",
    "digest_of",
    "digests_of",
    "examination_parts",
    "page_buffer",
    "zero_digest",
]
