"""When a failed cycle is retried: after 1, 2, 4, 8, 10 minutes, then every 30; every minute where something has to be
repaired first; never after refused credentials, since repeated attempts may lock an account.

W6 in docs/reference/site-recovery-map.md.
"""

from __future__ import annotations

import attrs

from asrcore.errors import AccessDenied, AsrError, Cancelled
from asrcore.units import MINUTE

__all__ = ["DELAYS", "LAST_DELAY", "REPAIR_DELAY", "Decision", "decide", "delay"]

DELAYS = (1 * MINUTE, 2 * MINUTE, 4 * MINUTE, 8 * MINUTE, 10 * MINUTE)
LAST_DELAY = 30 * MINUTE
REPAIR_DELAY = 1 * MINUTE
"""Where time alone repairs nothing: such an attempt fails at once and costs little, and replication continues within
this time after a mount, a redefinition of the machine, or the end of another tool's work on its disks."""


@attrs.frozen
class Decision:
    """`attempt`: failures in a row, this one included, to be recorded. `delay`: seconds to wait; None: no retry."""

    attempt: int
    delay: float | None

    def at(self, now: float) -> float | None:
        """When to retry, in seconds since the epoch; None: not automatically."""
        return None if self.delay is None else now + self.delay


def decide(error: BaseException, attempt: int) -> Decision:
    """What to do about an error after `attempt` earlier failures in a row.

    A catalogued error states whether waiting may help. Anything else is a defect: every step may be repeated without
    harm, so it is retried like a recoverable error instead of leaving the machine without replication. What a person
    cancelled is not retried.
    """
    attempt = max(0, attempt)
    if isinstance(error, (AccessDenied, Cancelled)):
        return Decision(attempt + 1, None)
    if isinstance(error, AsrError) and not error.retry:
        return Decision(attempt + 1, REPAIR_DELAY)
    return Decision(attempt + 1, delay(attempt + 1))


def delay(attempt: int) -> float:
    """Seconds between the failure number `attempt` in a row and its retry."""
    return DELAYS[max(0, attempt - 1)] if attempt <= len(DELAYS) else LAST_DELAY
