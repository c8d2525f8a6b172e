"""Values of the model as JSON has them, for `--json` and the configuration server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import attrs

__all__ = ["plain"]


def plain(value: object) -> Any:
    """A value of the model as JSON has it: enums by value, attrs classes by field, bytes by size."""
    if isinstance(value, Enum):
        return value.value
    kind: Any = type(value)
    if attrs.has(kind):
        return {field.name: plain(getattr(value, field.name)) for field in attrs.fields(kind)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
