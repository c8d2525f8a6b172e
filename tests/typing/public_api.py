"""Never run: mypy must infer these types of the public names."""

from __future__ import annotations

from typing import assert_type

import asrcore
from asrcore import driver
from asrcore.hookspecs import hookimpl
from asrcore.model.finding import Finding
from asrcore.model.machine import Machine
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import Protection
from asrcore.vault import Job


def library(engine: asrcore.Engine) -> None:
    assert_type(engine.machines("a"), list[Machine])
    assert_type(engine.protect("web", source="a", target="b", policy="gold"), Job)
    assert_type(engine.wait(engine.replicate("web")), Job)
    assert_type(engine.resync("web"), Job | None)
    assert_type(engine.points("web"), list[RecoveryPoint])
    assert_type(engine.status()[0].protection, Protection)
    assert_type(engine.readiness("web", source="a", target="b", policy="gold"), list[Finding])
    with asrcore.Engine.open("vault.db") as opened:
        assert_type(opened, asrcore.Engine)


class MyDriver(driver.Driver):
    info = driver.DriverInfo("mine", "Mine", "1", driver.API, frozenset({driver.Capability.POWER}))

    def connect(self, name: str, settings: object) -> driver.Site:
        return driver.Site()


@hookimpl
def asr_register_drivers() -> list[driver.Driver]:
    return [MyDriver()]
