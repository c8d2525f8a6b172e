"""Waiting for a condition, with a generous limit."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["wait_until"]


def wait_until(true: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait until it is true. Raises AssertionError."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, f"{what}: not true after {seconds:g} s"
        time.sleep(0.02)
