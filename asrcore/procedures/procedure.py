"""A job as a list of named steps: each is durable when it returns and may be run again if it was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum

import attrs

from asrcore.model.protection import Protection
from asrcore.model.watch import Watch
from asrcore.replication.context import Context

__all__ = ["Arguments", "Holds", "Procedure", "Step", "Work"]


@attrs.frozen
class Arguments:
    """What a person gave with the verb. `point`: `latest`, an id or an ISO time; `timeout` in seconds. `force`: fail
    over although the target finds that it cannot run the machine. `prove`: read all of the point before it is used;
    `allow_damaged`: use it although it is damaged."""

    point: str = "latest"
    force: bool = False
    force_off: bool = False
    timeout: float = 120.0
    network: str = ""
    keep: bool = False
    repair: bool = False
    sha256: bool = False
    prove: bool = False
    allow_damaged: bool = False

    def to_json(self) -> str:
        """As the job's durable input."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Arguments:
        """The arguments of a job's durable input."""
        return cls(**json.loads(text))


@attrs.define
class Work:
    """A running job. `facts` become the job's result: figures and names for people and scripts."""

    context: Context
    job_id: str
    protection_id: str
    arguments: Arguments
    watch: Watch
    facts: dict[str, object] = attrs.field(factory=dict)
    save: Callable[[], None] = lambda: None
    """Makes the facts so far durable within a long step; a step that was killed finds them when it is run again."""

    @property
    def protection(self) -> Protection:
        """As the vault has it now."""
        return self.context.vault.protection(self.protection_id)

    def note(self, kind: str, text: str) -> None:
        """Append to the vault's log of events."""
        vault = self.context.vault
        vault.add_event(at=self.context.clock(), machine=self.protection.name, kind=kind, text=text)


@attrs.frozen
class Step:
    """One step; `asr job list` shows its name, and the crash tests kill at it. `checks_itself`: it begins also when the
    job is cancelled, because it has something to take back then, or is the end of what cannot be."""

    name: str
    run: Callable[[Work], None]
    checks_itself: bool = False


class Holds(Enum):
    """What a procedure locks while it runs."""

    MACHINE = "machine"
    """No cycle and no other job of the machine runs beside it."""
    REPLICATION = "replication"
    """No cycle and no other job but a test's: a comparison that takes hours must not block tests."""
    TEST = "test"
    """No other test of the machine; replication continues."""


@attrs.frozen
class Procedure:
    """`kind` is the job's verb. `preempts`: work that holds the machine is cancelled instead of waited for."""

    kind: str
    steps: tuple[Step, ...]
    holds: Holds = Holds.MACHINE
    preempts: bool = False
