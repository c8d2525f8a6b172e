"""What holds something until it is closed."""

from __future__ import annotations

from types import TracebackType
from typing import Self

__all__ = ["Closing"]


class Closing:
    """A resource with `close`, which may be called twice; leaving the `with` block closes it."""

    def close(self) -> None:
        """Give back what is held. Never raises for something already gone."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # the first error is the one that says what went wrong
                raise
