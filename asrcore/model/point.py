"""A recovery point: a moment of a machine that can be booted at the target."""

from __future__ import annotations

from enum import Enum

import attrs

__all__ = ["Consistency", "Mark", "RecoveryPoint"]


class Consistency(Enum):
    """How the content was obtained. Ordered by what it promises."""

    CRASH = "crash"
    """As after a power cut: all disks of the machine at one instant."""
    FILESYSTEM = "filesystem"
    """The guest's file systems were frozen: no journal replay is needed."""
    APPLICATION = "application"
    """Applications took part (freeze scripts, VSS)."""
    OFFLINE = "offline"
    """The machine was shut down."""


@attrs.frozen
class Mark:
    """Where change tracking stood at a frozen view: opaque to the engine, kept in the vault, given back later."""

    token: str


@attrs.frozen
class RecoveryPoint:
    """A sealed point. Times are seconds since the epoch by the engine's clock.

    `taken_at` is the instant of the frozen view, `sealed_at` when all of it was durable. A point that is not
    `kept` is the latest state only: the next sealed cycle takes its place. A `pinned` one outlives retention.
    `held`: bytes that the target kept for its disks, as last known; None where the target does not report it.
    `damaged`: what was found wrong with it at the target, for people; "" if nothing was. `proved_at`: when all of it
    was last read to look for damage; `proved_to`: how far that got which is under way, in bytes of its disks.
    """

    id: str
    taken_at: float
    sealed_at: float
    consistency: Consistency
    kept: bool
    pinned: bool = False
    bytes_sent: int = 0
    held: int | None = None
    damaged: str = ""
    proved_at: float | None = None
    proved_to: int = 0
