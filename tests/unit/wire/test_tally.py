"""A log that stays small: equal lines are counted."""

from __future__ import annotations

import logging

import attrs
import pytest

from asrcore.errors import CertificateMissing, CertificateRevoked
from asrcore.wire import tally
from asrcore.wire.tally import Tally


@attrs.define
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock, caplog: pytest.LogCaptureFixture) -> Tally:
    caplog.set_level(logging.INFO, "tally")
    return Tally(logging.getLogger("tally"), clock)


def test_equal_lines_are_logged_once_a_minute(log: Tally, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for at in range(1000):
        clock.now = at / 10
        log.warning("connection from %s refused", at)
    assert caplog.messages == [
        "connection from 0 refused",
        "connection from 599 refused (the last of 599 more such lines in 60 seconds)",
    ]
    clock.now = 130.0
    log.flush()
    assert len(caplog.messages) == 3
    clock.now = 200.0
    log.flush()
    log.warning("connection from %s refused", "later")
    assert caplog.messages[3:] == ["connection from later refused"]


def test_other_reasons_and_other_components_are_other_lines(log: Tally, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        log.warning("refused: %s", CertificateMissing(peer="p", whose="its"))
        log.warning("refused: %s", CertificateRevoked(peer="p", whose="its"))
        for name in ("a", "b"):
            log.info("%s connected", name, extra={"kind": name})
    assert len(caplog.messages) == 4


def test_kinds_are_bounded(log: Tally, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_KINDS", 10)
    for name in range(100):
        log.info("%s connected", name, extra={"kind": name})
    assert len(caplog.messages) == 11


def test_a_level_that_is_not_logged_is_not_counted(log: Tally, caplog: pytest.LogCaptureFixture) -> None:
    log.debug("nothing")
    caplog.set_level(logging.DEBUG, "tally")
    log.debug("nothing")
    assert caplog.messages == ["nothing"]
