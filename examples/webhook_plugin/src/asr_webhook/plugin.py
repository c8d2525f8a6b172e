"""What asrcore loads: the hooks. A value of an event becomes JSON as `asr --json` shows it."""

from __future__ import annotations

import os
import time

from asr_webhook.sender import Sender
from asrcore.hookspecs import hookimpl
from asrcore.model.event import FailoverKind, FinishedJob
from asrcore.model.health import Health
from asrcore.model.plain import plain
from asrcore.model.protection import Protection

__all__ = ["Webhook", "plugin"]


class Webhook:
    """Recovery points are left out: there may be one every few seconds."""

    def __init__(self, url: str, *, timeout: float = 5.0) -> None:
        self.sender = Sender(url, timeout=timeout) if url else None

    def _post(self, event: str, machine: str, **values: object) -> None:
        if self.sender is not None:
            self.sender.post({"event": event, "at": time.time(), "machine": machine, **plain(values)})

    @hookimpl
    def asr_before_failover(self, machine: Protection, kind: FailoverKind) -> None:
        """`failover-begun`"""
        self._post("failover-begun", machine.name, kind=kind, source=machine.source_site, target=machine.target_site)

    @hookimpl
    def asr_after_failover(self, machine: Protection, kind: FailoverKind) -> None:
        """`failover-done`"""
        point = machine.failover_point if kind is not FailoverKind.TEST else None
        self._post("failover-done", machine.name, kind=kind, target=machine.target_site, point=point)

    @hookimpl
    def asr_health_changed(self, machine: Protection, old: Health, new: Health) -> None:
        """`health-changed`"""
        self._post("health-changed", machine.name, old=old.level, new=new.level, reasons=new.reasons)

    @hookimpl
    def asr_job_finished(self, job: FinishedJob) -> None:
        """`job-finished`"""
        self._post("job-finished", job.machine, job=job)


plugin = Webhook(os.environ.get("ASR_WEBHOOK_URL", ""))
