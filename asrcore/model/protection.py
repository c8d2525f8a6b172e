"""A protected machine as the vault knows it, and what surrounds it: sites, instances, cycles under way."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import attrs

from asrcore.model.extent import Extent
from asrcore.model.finding import Finding
from asrcore.model.point import Mark
from asrcore.model.state import STATES_WITH_POINTS, State

__all__ = ["CycleMode", "Direction", "NetworkMap", "PendingCycle", "Protection", "Site", "TestRun"]


class Direction(Enum):
    """Which way a machine replicates, seen from its home."""

    FORWARD = "forward"
    REVERSE = "reverse"


@attrs.frozen
class Site:
    """A site of the vault: the driver that serves it and the driver's settings (text by name)."""

    name: str
    driver: str
    settings: Mapping[str, str]


@attrs.frozen
class NetworkMap:
    """Source network name -> target network name. What is not named keeps its name."""

    networks: Mapping[str, str] = attrs.field(factory=dict)

    def target(self, network: str) -> str:
        """The target's network for a source's."""
        return self.networks.get(network, network)

    def changed(self, names: Mapping[str, str]) -> NetworkMap:
        """With these mappings added or replaced; "" removes one."""
        return NetworkMap({source: target for source, target in {**self.networks, **names}.items() if target})


class CycleMode(Enum):
    """What a cycle sends."""

    FULL = "full"
    """All allocated data, to a replica that has no point yet."""
    DELTA = "delta"
    """What changed since the mark."""
    COMPARE = "compare"
    """What differs, found by checksums on both sides."""


@attrs.frozen
class PendingCycle:
    """A cycle that has a frozen view but is not recorded as sealed: what a restart needs to resume it.

    `view_mark` is the mark of the view it copies from (None: the source does not track). `plan` is, per disk,
    what the cycle has to cover; what is already done the target knows.
    """

    id: str
    point_id: str
    mode: CycleMode
    base_point: str | None
    taken_at: float
    view_mark: Mark | None
    plan: Mapping[str, tuple[Extent, ...]]


@attrs.frozen
class TestRun:
    """A running test failover."""

    id: str
    point_id: str
    machine_id: str
    started_at: float
    __test__ = False  # not a test class, whatever pytest thinks of the name


@attrs.frozen
class Protection:
    """One protected machine. Site fields name the sites of *now*: a reversal swaps source and target.

    `epoch` counts ownership changes (`model.epoch`), so that a former owner can be refused. `mark` is what the last
    recorded point left at the source; it only changes together with `head_point` (invariants 4 and 2 in
    docs/explanation/architecture.md).
    `last_cycle_at`: when the last recorded cycle began. `last_scrub_at`: when a scrub of its points last ended.
    `attempt` and `retry_at`: retries of a failed cycle.
    `notices`: what the source's newest view reported beside the data.
    `restored`: this record is from an earlier copy of the vault, and the target has not agreed with it since.
    `replica_kind` is the target's word for how it keeps points. `fence_due`: the source is not quarantined yet; see
    also `undo_due`.
    """

    id: str
    name: str
    policy: str
    home_site: str
    source_site: str
    source_machine: str
    target_site: str
    replica_id: str
    networks: NetworkMap = NetworkMap()
    test_network: str = ""
    replica_kind: str = ""
    state: State = State.ENABLING
    epoch: int = 1
    mark: Mark | None = None
    head_point: str | None = None
    pending: PendingCycle | None = None
    target_machine: str | None = None
    failover_point: str | None = None
    planned: bool = False
    fence_due: bool = False
    seed_machine: str | None = None
    test: TestRun | None = None
    created_at: float = 0.0
    last_cycle_at: float | None = None
    last_test_at: float | None = None
    last_scrub_at: float | None = None
    resync_reason: str = ""
    attempt: int = 0
    retry_at: float | None = None
    error: Mapping[str, object] | None = None
    notices: tuple[Finding, ...] = ()
    restored: bool = False

    @property
    def direction(self) -> Direction:
        """FORWARD while the source is the machine's home."""
        return Direction.FORWARD if self.source_site == self.home_site else Direction.REVERSE

    @property
    def undo_due(self) -> bool:
        """A failover was taken back, but a site still owes a part of it: the target a clean-up, or the source its
        release. `fence_due` then says that the source is not to be started again."""
        return self.failover_point is not None and self.state in STATES_WITH_POINTS
