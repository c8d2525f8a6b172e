"""Findings: results of a readiness check, `asr doctor` or a health check."""

from __future__ import annotations

from enum import Enum

import attrs

__all__ = ["Finding", "Severity"]


class Severity(Enum):
    """An ERROR prevents protection, a WARNING limits it, INFO is good to know."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@attrs.frozen
class Finding:
    """`code` is stable (`disk-raw`, `machine-has-snapshots`); the rest is for people."""

    code: str
    severity: Severity
    what: str
    cause: str
    action: str
