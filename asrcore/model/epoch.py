"""The ownership epoch of a machine: one number that counts two things apart.

The high part is the generation: it is raised by each failover, undo, re-protect and adopted replica, thus whenever the
machine may run elsewhere or a vault was put back. The low part counts servers of the same vault that took over. So an
older vault never reaches a later generation by take-overs, however many there are. Drivers compare the numbers and know
nothing of their parts. Epochs from before the two were apart are generation 0.
"""

from __future__ import annotations

__all__ = ["generation", "next_generation", "shown"]

_SHIFT = 32  # two billion take-overs in a generation; as many generations in PostgreSQL's and SQLite's integers


def generation(epoch: int) -> int:
    """The part that failovers raise."""
    return epoch >> _SHIFT


def next_generation(epoch: int) -> int:
    """The first epoch of the next generation."""
    return (generation(epoch) + 1) << _SHIFT


def shown(epoch: int) -> str:
    """For people: `2.1` is the second generation after one take-over."""
    return f"{generation(epoch)}.{epoch - (generation(epoch) << _SHIFT)}"
