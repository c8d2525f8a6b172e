"""What a request is answered with, and what takes the data that follows one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import attrs

from asrcore.wire.frames import Bytes

__all__ = ["Answer", "Sink"]


@attrs.frozen
class Answer:
    """What a request is answered with."""

    head: Mapping[str, Any] = attrs.field(factory=dict)
    body: Bytes = b""


class Sink(Protocol):
    """Takes the DATA of a stream, in order, on the thread that receives."""

    def data(self, head: Mapping[str, Any], body: Bytes) -> None:
        """One frame; it is acknowledged when this returns. `body` must not be kept."""

    def end(self) -> Answer:
        """No more data comes."""
