"""How long calls wait for a busy service, which calls wait, and the errors for its refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from azure.core.exceptions import HttpResponseError

from asr_driver_azure.cloud.calls import Calls
from asr_driver_azure.cloud.errors import translated
from asr_driver_azure.cloud.pacer import Pacer
from asrcore.errors import AsrError, SiteUnreachable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def refusal(status: int, after: float | None = None, code: str = "", message: str = "no") -> HttpResponseError:
    """An error as the SDK raises it."""
    headers = {"x-ms-error-code": code} | ({} if after is None else {"Retry-After": f"{after:g}"})
    response: Any = SimpleNamespace(status_code=status, headers=headers, reason="")
    return HttpResponseError(message, response=response)


class Service:
    """Refuses this many times; `at`: the times of the calls."""

    def __init__(self, clock: Clock, *refusals: HttpResponseError) -> None:
        self._clock, self._refusals = clock, list(refusals)
        self.at: list[float] = []

    def ask(self) -> str:
        self.at.append(self._clock.now - 100)
        if self._refusals:
            raise self._refusals.pop(0)
        return "answer"


def calls(clock: Clock, *, together: bool = True, **more: float) -> Calls:
    pacer = Pacer(1000, clock=lambda: clock.now, sleep=clock.sleep)
    return Calls("cloud", pacer=pacer, clock=lambda: clock.now, sleep=clock.sleep, together=together, **more)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("status", [429, 503])
def test_it_waits_as_long_as_it_is_asked_to(status: int, together: bool) -> None:
    clock = Clock()
    service = Service(clock, refusal(status, 300), refusal(status, 7))
    assert calls(clock, together=together).run("asking", service.ask) == "answer"
    assert service.at == pytest.approx([0, 300, 307], abs=0.1)


def test_one_that_is_asked_to_wait_holds_up_no_other() -> None:
    """A disk has reached its limit of seven snapshots: reading machines must not wait for that."""
    clock = Clock()
    slept: list[float] = []
    management = calls(clock, together=False)
    management.sleep = slept.append
    assert management.run("asking", Service(clock, refusal(429, 300)).ask) == "answer"
    assert slept == [300]
    management.run("asking", Service(clock).ask)
    assert clock.now - 100 < 1


def test_all_wait_for_a_busy_account() -> None:
    clock = Clock()
    storage = calls(clock)
    storage.pacer.busy(300)
    storage.run("asking", Service(clock).ask)
    assert clock.now - 100 >= 300


def test_what_is_asked_has_an_end() -> None:
    clock = Clock()
    with pytest.raises(SiteUnreachable):
        calls(clock).run("asking", Service(clock, refusal(503, 86400)).ask)
    assert clock.now - 100 < 1
    service = Service(clock, *[refusal(503, 1000)] * 9)
    with pytest.raises(SiteUnreachable):
        calls(clock).run("asking", service.ask)
    assert len(service.at) == 2


def test_who_has_little_patience_does_not_wait() -> None:
    clock = Clock()
    with pytest.raises(SiteUnreachable):
        calls(clock).run("looking", Service(clock, refusal(503, 300)).ask, patience=5)
    assert clock.now - 100 < 1


def test_who_is_not_told_how_long_is_patient_for_a_while() -> None:
    clock = Clock()
    service = Service(clock, *[refusal(503)] * 99)
    with pytest.raises(SiteUnreachable):
        calls(clock).run("asking", service.ask)
    assert 60 <= clock.now - 100 < 80
    assert len(service.at) > 5


@pytest.mark.parametrize(
    ("code", "message", "reported"),
    [
        (
            "OperationNotAllowed",
            "It results in exceeding approved Total Regional Cores quota.",
            "quota-exceeded",
        ),
        ("OperationNotAllowed", "Disk web-0 is being read through a SAS.", "state-refused"),
        ("QuotaExceeded", "Cores.", "quota-exceeded"),
        ("SkuNotAvailable", "Not here.", "quota-exceeded"),
    ],
)
def test_a_quota_is_told_from_a_state(code: str, message: str, reported: str) -> None:
    found: AsrError = translated(refusal(409, code=code, message=message), site="cloud", operation="making a disk")
    assert found.code == f"azure-{reported}"
