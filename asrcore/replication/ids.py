"""Ids of cycles, points, replicas and jobs."""

from __future__ import annotations

import uuid

__all__ = ["new_id"]


def new_id(prefix: str) -> str:
    """The prefix and 48 random bits: short enough to type, unique enough for any vault."""
    return f"{prefix}{uuid.uuid4().hex[:12]}"
