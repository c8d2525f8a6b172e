"""The engine that is measured: a separate process inside a site, controlled over its standard input.

    python -m tests.bench._worker VAULT

It uses the library as `asr` does, without shortcuts. The verbs are those of
`tests.system.engine_process`, and these.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

from asrcore import driver
from asrcore.hookspecs import hookimpl
from asrcore.model.point import Consistency, RecoveryPoint
from asrcore.model.watch import Watch
from asrcore.replication.cycle import apply_retention, run_cycle
from tests.system import engine_process

LINK = Path("/sys/class/net/wan0/statistics/rx_bytes")
OURS = ("/asrcore/", "/asr_driver_libvirt/")
SAMPLE_SECONDS = 0.005
WAITING = ("follow", "_work_on_queue", "look", "sample")
"""Functions that only wait for other threads or processes."""


class Worker(engine_process.EngineProcess):
    """Verbs that measure. A measurement is {"seconds", "cpu_seconds", "peak_rss", "link_bytes", ...}.

    `from_view_seconds`: from the instant of the frozen view until the vault has recorded its point. `sealed_seconds`:
    from the command until then; the clean-up for the next cycle comes later.
    """

    _view: driver.FrozenView | None = None
    _recorded: float = 0.0
    _recorded_at: float = 0.0
    _profile = False

    def __init__(self, url: str) -> None:
        super().__init__(url)
        assert self.engine.plugins.register("bench", self)

    @hookimpl
    def asr_recovery_point_created(self, point: RecoveryPoint) -> None:
        """A point is durable at the target and recorded in the vault."""
        self._recorded, self._recorded_at = time.time() - point.taken_at, time.monotonic()

    def profile(self, on: bool) -> None:
        """Whether to sample where the time is spent, which takes some time itself."""
        self._profile = on

    @contextmanager
    def _meter(self) -> Iterator[dict[str, Any]]:
        """Seconds, CPU seconds of all threads of this process and of the programs it started, peak memory, bytes from
        the link."""
        report: dict[str, Any] = {}
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        with _sampled(report) if self._profile else nullcontext():
            link, cpu, begun = int(LINK.read_text()), _cpu(), time.monotonic()
            yield report
            report["seconds"] = time.monotonic() - begun
            report["cpu_seconds"] = _cpu() - cpu
            report["link_bytes"] = int(LINK.read_text()) - link
            status = Path("/proc/self/status").read_text()
            report["peak_rss"] = int(status.split("VmHWM:")[1].split()[0]) << 10

    def measured(self, verb: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Run a verb that is a job to its end."""
        self._recorded = 0.0
        begun = time.monotonic()
        with self._meter() as report:
            job = getattr(self.engine, verb)(*arguments, **options)
            done = self.engine.wait(job, timeout=600)
        report["facts"] = json.loads(done.result) if done.result else {}
        if self._recorded:
            report["from_view_seconds"] = self._recorded
            report["sealed_seconds"] = self._recorded_at - begun
        return report

    def cycle(self, machine: str, *, keep: bool = False) -> dict[str, Any]:
        """One cycle, as the replication service runs it."""
        protection = self.engine.vault.protection(machine)
        watch = Watch()
        with self._meter() as report, self.engine.context.locks.hold(protection, "a cycle", watch, wait=10):
            run_cycle(self.engine.context, protection.id, watch, keep=keep)
        return report

    def drop(self, machine: str, points: list[str]) -> dict[str, Any]:
        """Retention of these points, as at the end of a cycle for which the policy finds them due."""
        protection = self.engine.vault.protection(machine)
        watch = Watch()
        with self._meter() as report, self.engine.context.locks.hold(protection, "retention", watch, wait=10):
            self.engine.vault.mark_dropping(protection.id, points)
            apply_retention(self.engine.context, protection, watch)
        return report

    def open_export(self, site: str, machine: str) -> str:
        """Freeze a machine as a cycle does, for a peer to read; returns the NBD URI of its only disk."""
        connected = self.engine.context.site(site)
        (found,) = [item for item in connected.inventory.machines() if item.name == machine]
        request = driver.ViewRequest(found.id, "bench", None)
        self._view = connected.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=10.0)
        uri = self.engine.vault.site(site).settings["uri"]
        job = ["virsh", "-c", uri, "backup-dumpxml", found.id]
        backup = ElementTree.fromstring(subprocess.run(job, check=True, capture_output=True, timeout=20).stdout)
        server = backup.find("server")
        assert server is not None
        return f"nbd://{server.get('name')}:{server.get('port')}/vda"

    def close_export(self, site: str, machine: str) -> None:
        """Release what `open_export` holds, for a machine that is not protected."""
        view, self._view = self._view, None
        if view is None:
            return
        view.close()
        connected = self.engine.context.site(site)
        (found,) = [item for item in connected.inventory.machines() if item.name == machine]
        protections = [item for item in self.engine.vault.protections() if item.name == machine]
        marks = [item.mark for item in protections if item.mark is not None]
        connected.source.keep_marks(found.id, marks)


@contextmanager
def _sampled(report: dict[str, Any]) -> Iterator[None]:
    """Sample every 5 ms where each thread is: at the innermost line of asrcore or a driver, and what that line
    calls."""
    found: Counter[str] = Counter()
    ended = threading.Event()

    def look() -> None:
        names = {thread.ident: thread.name.rstrip("0123456789_-") for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            place: FrameType | None = frame
            while place is not None and not any(part in place.f_code.co_filename for part in OURS):
                place = place.f_back
            if place is not None and ident != threading.get_ident() and place.f_code.co_name not in WAITING:
                file = Path(place.f_code.co_filename).name
                found[f"{names.get(ident)}: {file} {place.f_code.co_name} line {place.f_lineno}"] += 1

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            look()

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join()
        report["profile"] = dict(found)


def _cpu() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in spent)


if __name__ == "__main__":
    engine_process.main(Worker)
