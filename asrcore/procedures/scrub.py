"""Reading kept recovery points at the target, one after the other, to find damage before they are needed.

It takes no lock and is no job: replication, tests and failovers continue beside it. It is slow on purpose, stands back
while anything else works on the machine, and resumes where it stopped, at the next start of the service, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import attrs

from asrcore.crashpoint import reach
from asrcore.errors import PointNotFound
from asrcore.model.point import RecoveryPoint
from asrcore.model.watch import Watch
from asrcore.procedures.examine import note_examined
from asrcore.replication import windows
from asrcore.replication.context import Context
from asrcore.units import MiB

__all__ = ["PART", "points_due", "scrub"]

PART = 64 * MiB
"""Bytes that are read at a time: a tenth of a second to a second, which a cycle may have to share its disk with it."""
RATE = 64.0 * MiB
"""Bytes of a point per second at most: 100 GiB take half an hour."""
STAND_BACK = 0.5  # seconds between looks whether the machine's other work has ended
GIVE_UP = 300.0
"""Seconds of that at a time, until it is left to a later call: other machines wait for this scrub."""


def points_due(points: Sequence[RecoveryPoint], every: float, now: float) -> list[RecoveryPoint]:
    """Kept points to be read in a scrub, those first that an earlier one had begun: the newest, which shares most with
    all others and with the latest state, and each that was not read for as long as the policy says, the longest first.

    `points` oldest first.
    """
    kept = [point for point in points if point.kept or point.pinned]

    def since(point: RecoveryPoint) -> float:
        return point.sealed_at if point.proved_at is None else point.proved_at

    begun = [point for point in kept if point.proved_to]
    old = [point for point in kept[:-1] if not 0 <= now - since(point) < every]
    due = [*begun, *kept[-1:], *sorted(old, key=since)]
    return [point for number, point in enumerate(due) if point not in due[:number]]


def scrub(
    context: Context,
    protection_id: str,
    watch: Watch,
    *,
    rate: float = RATE,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Read the machine's points that are due, within the policy's resync window. Returns whether all were read: not if
    the window closes, or the machine is worked on for long.

    Raises what drivers raise; a later call resumes.
    """
    vault = context.vault
    policy = vault.policy(vault.protection(protection_id).policy)
    for point in points_due(vault.points(protection_id), policy.scrub_every, context.clock()):
        if not _Reading(context, protection_id, point, watch, rate, clock).run():
            return False
    vault.update(protection_id, last_scrub_at=context.clock())
    reach("scrub.ended")
    return True


@attrs.frozen
class _Reading:
    """Of one point."""

    context: Context
    protection_id: str
    point: RecoveryPoint
    watch: Watch
    rate: float
    clock: Callable[[], float]

    def run(self) -> bool:
        """Whether all of it was read, damage was found, or it was deleted meanwhile: nothing is left to be read."""
        start: int | None = self.point.proved_to
        waited = 0.0
        while start is not None:
            if not self._may_run():
                return False
            if self.context.locks.busy(self.protection_id):
                if waited >= GIVE_UP:
                    return False
                self.watch.wait(STAND_BACK)
                waited += STAND_BACK
                continue
            waited = 0.0
            try:
                start = self._part(start)
            except PointNotFound:
                return True
        return True

    def _may_run(self) -> bool:
        vault = self.context.vault
        policy = vault.policy(vault.protection(self.protection_id).policy)
        return bool(policy.scrub_every) and windows.is_open(policy.resync_window, self.context.clock())

    def _marked_meanwhile(self) -> bool:
        points = self.context.vault.points(self.protection_id)
        return any(item.damaged not in ("", self.point.damaged) for item in points if item.id == self.point.id)

    def _part(self, start: int) -> int | None:
        vault, began = self.context.vault, self.clock()
        protection = vault.protection(self.protection_id)
        replica = self.context.site(protection.target_site).target.replica(protection.replica_id)
        digests = replica.info().keeps_digests
        if digests:
            found = replica.examine(self.point.id, start=start, limit=PART, watch=self.watch)
        else:  # all that reading it could say is that it can be read; in a cloud that is paid for
            found = replica.examine(self.point.id, watch=self.watch)
        if found.damage or found.end is None:
            if not found.damage and self._marked_meanwhile():
                vault.note_proved_to(self.protection_id, self.point.id, 0)
                return None  # by a quick look: what was read before that does not take it back
            note_examined(self.context, protection, self.point.id, found, whole=digests)
            return None
        vault.note_proved_to(self.protection_id, self.point.id, found.end)
        reach("scrub.part")
        self.watch.wait(max(0.0, (found.end - start) / self.rate - (self.clock() - began)))
        return found.end
