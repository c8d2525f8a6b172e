"""The metrics of `/metrics`: read from the vault at each scrape; nothing is counted in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from asrcore.model.health import Level
from asrcore.service import due, status
from asrcore.service.status import MachineStatus
from asrcore.vault import JobState, Vault

__all__ = ["exposition"]

_LEVELS = {Level.OK: 0, Level.WARNING: 1, Level.CRITICAL: 2}


def exposition(vault: Vault, now: float) -> bytes:
    """The text that Prometheus reads, at `now` in seconds since the epoch."""
    registry = CollectorRegistry()
    registry.register(_Vault(vault, now))
    return generate_latest(registry)


class _Vault(Collector):
    def __init__(self, vault: Vault, now: float) -> None:
        self._vault = vault
        self._now = now

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        machines = status.machines(self._vault, self._now)
        yield from self._machines(machines)
        yield from self._cycles(machines)
        yield from self._jobs()
        yield from self._servers()

    def _machines(self, machines: list[MachineStatus]) -> Iterator[Metric]:
        def gauge(name: str, text: str, value: Callable[[MachineStatus], float | None]) -> Metric:
            family = GaugeMetricFamily(f"asr_machine_{name}", text, labels=["machine"])
            for item in machines:
                found = value(item)
                if found is not None:
                    family.add_metric([item.protection.name], found)
            return family

        yield gauge("rpo_seconds", "Age of the data in the newest recovery point.", lambda item: item.rpo_seconds)
        yield gauge("interval_seconds", "The policy's interval.", lambda item: item.policy.interval)
        yield gauge("health", "0 ok, 1 warning, 2 critical.", lambda item: _LEVELS[item.health.level])
        yield gauge("points", "Recovery points.", lambda item: item.points)
        yield gauge("epoch", "Changes of ownership.", lambda item: item.protection.epoch)
        yield gauge("lag_seconds", "How long the next cycle is overdue.", self._lag)
        yield gauge("failures", "Failed cycles since the last successful one.", lambda item: item.protection.attempt)
        states = GaugeMetricFamily("asr_machine_state", "1 for the current state.", labels=["machine", "state"])
        for item in machines:
            states.add_metric([item.protection.name, item.protection.state.value], 1)
        yield states

    def _lag(self, item: MachineStatus) -> float | None:
        at = due.cycle_at(item.protection, item.policy, self._now)
        return None if at is None else max(0.0, self._now - at)

    def _cycles(self, machines: list[MachineStatus]) -> Iterator[Metric]:
        totals = self._vault.cycle_totals()
        cycles = CounterMetricFamily("asr_machine_cycles", "Recorded cycles.", labels=["machine"])
        read = GaugeMetricFamily("asr_machine_last_cycle_read_bytes", "Read at the source.", labels=["machine"])
        sent = GaugeMetricFamily("asr_machine_last_cycle_sent_bytes", "Sent to the target.", labels=["machine"])
        churn = GaugeMetricFamily("asr_machine_churn_bytes_per_second", "Sent in an interval.", labels=["machine"])
        for item in machines:
            name, last = [item.protection.name], item.last_cycle
            cycles.add_metric(name, totals.get(item.protection.id, 0))
            if last is not None:
                read.add_metric(name, last.bytes_read)
                sent.add_metric(name, last.bytes_sent)
                churn.add_metric(name, last.bytes_sent / item.policy.interval)
        yield from (cycles, read, sent, churn)

    def _jobs(self) -> Iterator[Metric]:
        found = Counter(job.state for job in self._vault.jobs())
        jobs = GaugeMetricFamily("asr_jobs", "Jobs recorded in the vault.", labels=["state"])
        for state in JobState:
            jobs.add_metric([state.value], found[state])
        yield jobs

    def _servers(self) -> Iterator[Metric]:
        assigned = Counter(self._vault.assigned().values())
        up = GaugeMetricFamily("asr_server_up", "1 if a heartbeat came within the lease.", labels=["server"])
        silent = GaugeMetricFamily("asr_server_silent_seconds", "Time since the last heartbeat.", labels=["server"])
        machines = GaugeMetricFamily("asr_server_machines", "Machines assigned to it.", labels=["server"])
        for server in self._vault.servers():
            up.add_metric([server.name], server.alive)
            silent.add_metric([server.name], server.silent)
            machines.add_metric([server.name], assigned[server.session])
        yield from (up, silent, machines)
