"""Every request to Azure goes through here: paced, repeated where that may help, limited in time, errors translated."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import attrs
from azure.core.exceptions import AzureError

from asr_driver_azure.cloud import errors
from asr_driver_azure.cloud.pacer import Pacer

__all__ = ["Calls"]

T = TypeVar("T")
_FIRST_PAUSE = 0.4
_LONGEST_PAUSE = 15.0


@attrs.define
class Calls:
    """`patience`: seconds for which a request is repeated while the service is busy or does not answer, not counting
    waits that it asks for: `most_asked` seconds in all. `together`: whether all requests wait when one is asked to."""

    site: str
    patience: float = 60.0
    most_asked: float = 1800.0
    together: bool = True
    pacer: Pacer = attrs.field(factory=Pacer)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def run(self, operation: str, call: Callable[[], T], *, where: str = "", patience: float | None = None) -> T:
        """The answer of `call`, which must be repeatable. Raises AsrError for what Azure refuses.

        Errors that a caller handles itself (a condition that failed) it catches within `call`.
        """
        end = self.clock() + (self.patience if patience is None else patience)
        left = self.most_asked if patience is None else 0.0  # a caller with little patience does not wait for that
        pause = _FIRST_PAUSE
        while True:
            try:
                with self.pacer.request():
                    answer = call()
            except AzureError as error:
                asked = errors.retry_after(error) or 0.0
                late = self.clock() + asked > end if asked > left else self.clock() >= end
                if not errors.waits(error) or late:
                    raise errors.translated(error, site=self.site, operation=operation, where=where) from error
                if asked <= left:
                    left -= asked
                    end += asked
                busy = errors.status_of(error) in (429, 503)
                if busy and self.together:
                    self.pacer.busy(asked or pause)
                else:
                    self.sleep(asked or pause * random.uniform(0.7, 1.0))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self.pacer.well()
                return answer
