"""What the vault keeps besides the values of the model: jobs, cycle statistics, the log."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypedDict

import attrs

from asrcore.model.finding import Finding
from asrcore.model.protection import CycleMode, NetworkMap, TestRun

__all__ = [
    "Assigned",
    "Certificate",
    "Changes",
    "ClockAnchor",
    "ClockDoubt",
    "ClockGap",
    "ClockState",
    "CycleStats",
    "Job",
    "JobChanges",
    "JobState",
    "LogEntry",
]


@attrs.frozen
class CycleStats:
    """What a recorded cycle did. Times are seconds since the epoch; `bytes_zeroed` were sent as zeroes, not data;
    `bytes_same` were compared and found equal."""

    id: str
    mode: CycleMode
    taken_at: float
    started_at: float
    sealed_at: float
    bytes_read: int = 0
    bytes_sent: int = 0
    bytes_zeroed: int = 0
    bytes_same: int = 0
    extents: int = 0


@attrs.frozen
class ClockAnchor:
    """A machine's count of time was `counted` when the clock said `at`. It holds while `point` is the newest point."""

    point: str
    at: float
    counted: float


@attrs.frozen
class ClockGap:
    """Seconds of the clock, not seen by any engine, between the machine's points up to `number` and the later ones."""

    machine: str
    number: int
    seconds: float


@attrs.frozen
class ClockDoubt:
    """Why a server does not trust the clock of its host: since the monotonic time `elapsed` of the host's run `boot`.
    `server`: its name, empty for the one engine of a vault in a file."""

    server: str
    boot: str
    elapsed: float
    text: str


@attrs.frozen
class ClockState:
    """Whether the clock of an engine's host is in doubt (`held`: nothing is deleted by age), by the log entry `number`.
    Each server has at most one of the `doubts`. `before`: the points up to that number were recorded before the clock
    last went back. `gaps` count as passed when the server that works on the machine trusts its clock again."""

    held: bool = False
    number: int = 0
    at: float = 0.0
    text: str = ""
    doubts: tuple[ClockDoubt, ...] = ()
    before: int = 0
    anchors: Mapping[str, ClockAnchor] = attrs.field(factory=dict)
    gaps: tuple[ClockGap, ...] = ()

    def without(self, seconds: float) -> tuple[ClockGap, ...]:
        """The gaps when the clock was that much ahead: shorter for each machine, the latest first."""
        left: dict[str, float] = {}
        result = []
        for gap in reversed(self.gaps):
            taken = min(gap.seconds, left.setdefault(gap.machine, seconds))
            left[gap.machine] -= taken
            if gap.seconds > taken:
                result.append(attrs.evolve(gap, seconds=gap.seconds - taken))
        return tuple(reversed(result))


class JobState(Enum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Nothing more will happen to the job."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@attrs.frozen
class Job:
    """Requested work. `machine` is "" when it is about none.

    `arguments` and `result` are JSON text, understood by the job's kind; `error` is `AsrError.as_dict`.
    """

    id: str
    kind: str
    machine: str = ""
    state: JobState = JobState.QUEUED
    step: str = ""
    progress_done: int = 0
    progress_total: int = 0
    progress_work: str = ""
    arguments: str = "{}"
    result: str | None = None
    error: Mapping[str, object] | None = None
    created_at: float = 0.0
    started_at: float | None = None
    ended_at: float | None = None


@attrs.frozen
class Assigned:
    """A machine that was given to a process server. `before`: the name of the one that had it, "" if none that is
    registered; `epoch`: the machine's from now on."""

    machine: str
    name: str
    server: str
    before: str
    epoch: int


@attrs.frozen
class Certificate:
    """A certificate that the authority issued to a component. `serial` is hexadecimal; `addresses` are the DNS names
    and IP addresses in it. A token is one, too: `grants` is then the role to join with, `used_by` the digest of the
    public key that it was used for."""

    serial: str
    role: str
    name: str
    addresses: tuple[str, ...]
    issued_at: float
    expires_at: float
    grants: str | None = None
    revoked_at: float | None = None
    used_by: str | None = None


@attrs.frozen
class LogEntry:
    """An event of a machine ("" for none), for people and audits. `number` rises with time."""

    number: int
    at: float
    machine: str
    kind: str
    text: str
    data: Mapping[str, object]


class Changes(TypedDict, total=False):
    """Fields of a protection that `update` and `transition` may change. The others have separate methods."""

    name: str
    policy: str
    networks: NetworkMap
    test_network: str
    replica_kind: str
    epoch: int
    target_machine: str | None
    failover_point: str | None
    planned: bool
    fence_due: bool
    seed_machine: str | None
    test: TestRun | None
    last_test_at: float | None
    last_scrub_at: float | None
    resync_reason: str
    attempt: int
    retry_at: float | None
    error: Mapping[str, object] | None
    notices: tuple[Finding, ...]
    restored: bool


class JobChanges(TypedDict, total=False):
    """Fields of a job that `update_job` may change."""

    state: JobState
    step: str
    progress_done: int
    progress_total: int
    progress_work: str
    result: str | None
    error: Mapping[str, object] | None
    started_at: float | None
    ended_at: float | None
