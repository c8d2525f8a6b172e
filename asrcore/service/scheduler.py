"""The replication service: runs what is due, a bounded number of machines at a time, until it is stopped.

Cycles are not jobs: each commits to the vault, and a killed one is resumed. Work that a person decides on or that
changes a state is a job. The service also keeps fences: a source that returns after an unplanned failover is
quarantined as soon as its site answers, and stopped again if it is started there. It completes an undo at a site that
could not do its part, and releases what a killed engine left at the source of a machine that is not due.

Each poll reads the vault's records and queues the cycles with their times; a cycle that ends starts the next one. Only
the records count: a queued cycle is checked again when its turn comes.

What the service itself waits for is counted by the monotonic clock: fences, health and verifications do not depend on
the host's clock. What is recorded and lies in the future is due now (`due`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from heapq import heapify, heappop

from asrcore.errors import (
    AsrError,
    Cancelled,
    MachineBusy,
    MachineNotFound,
    NotAssigned,
    QuarantinedByAnother,
    SiteUnreachable,
    SourcePaused,
    SourceWasPaused,
    VaultUnavailable,
    WrongState,
)
from asrcore.logline import report
from asrcore.model.epoch import shown
from asrcore.model.health import Clock, Health, Load, assess
from asrcore.model.policy import Policy
from asrcore.model.protection import Protection
from asrcore.model.state import STATES_WITH_POINTS, State
from asrcore.model.watch import Watch
from asrcore.procedures.failure import recorded_failure
from asrcore.procedures.give_back import finish_undo, release, withdraw_late_fence
from asrcore.procedures.procedure import Arguments
from asrcore.procedures.quarantine import before_fence, quarantine
from asrcore.procedures.scrub import scrub
from asrcore.procedures.steps import refused
from asrcore.procedures.verify import VERIFY
from asrcore.replication.agreement import check_fence
from asrcore.replication.context import Context
from asrcore.replication.cycle import release_left, run_cycle
from asrcore.service.due import QUICK, SLOW, Action, cycle_at, due_action, load, scrub_due, verification_due
from asrcore.service.pool import Lanes
from asrcore.vault import JobState

__all__ = ["Scheduler"]

_log = logging.getLogger(__name__)

TICK = 0.25  # seconds between two looks into the queue for what has come due
LOOK_SHARE = 20  # a poll of the vault costs 40 us a machine; it is repeated after 20 times as long as it took
LOOK_PAUSE = 5.0  # seconds at most until that: a poll that was held up by the network says nothing of the next one
JOBS = 8  # jobs at a time that the service submits: 500 comparisons may become due in one minute
FENCE_EVERY = 5.0  # seconds between checks of a machine that has to stay quarantined
SATURATED_FOR = 30.0  # seconds until it is reported that the service cannot keep up: after a pause all are late
VAULT_PAUSE = 1.0  # seconds without new cycles after the vault did not answer one: each would open a view for nothing
LEFT_EVERY = 60.0  # seconds between attempts to look for what a killed engine left at a source that did not answer
HEALTH_EVERY = 5.0  # seconds between judgements of the machines' health
VERIFY_LOOK = 60.0  # seconds between checks for replicas that are to be verified
SCRUB_AGAIN = 3600.0  # seconds until a scrub that could not end is resumed: other machines come first
VERIFICATIONS = 1  # at a time that the service submits: each reads all data of a machine, and none is urgent

_SOURCE_FENCED = (State.FAILED_OVER, State.COMMITTING, State.COMMITTED)
_TARGET_FENCED = (State.REVERSING, State.PROTECTED, State.RESYNC_PENDING, State.RESYNCING)
_READ = (
    State.INITIAL_COPY,
    State.FINALIZING,
    State.PROTECTED,
    State.RESYNC_PENDING,
    State.RESYNCING,
    State.REVERSING,
)
"""States in which an engine may have read the source, and left something there."""
_JOBS = {
    Action.PROTECT: "protect",
    Action.RESYNC: "resync",
    Action.REPROTECT: "reprotect",
    Action.UNDO: "failover-undo",
    Action.COMMIT: "failover-commit",
    Action.UNPROTECT: "unprotect",
}


class _Queue:
    """Machines by source site, each with the time its cycle is due; what is due first comes first."""

    def __init__(self) -> None:
        self._heaps: dict[str, list[tuple[float, str]]] = {}
        self._lock = threading.Lock()

    def fill(self, due: Mapping[str, list[tuple[float, str]]]) -> None:
        """Replace the queue: by site, times and machines' ids."""
        for heap in due.values():
            heapify(heap)
        with self._lock:
            self._heaps = dict(due)

    def pop(self, now: float, has_room: Callable[[str], bool]) -> tuple[str, str] | None:
        """Site and id of the machine that waited longest, of the sites that have room; None if none is due."""
        with self._lock:
            heads = [(heap[0], site) for site, heap in self._heaps.items() if heap and heap[0][0] <= now]
            for (_, machine), site in sorted(heads):
                if has_room(site):
                    heappop(self._heaps[site])
                    return site, machine
        return None


class Scheduler:
    """`submit(kind, protection, arguments)` starts a job; it may raise, and is called again at the next look."""

    def __init__(self, context: Context, submit: Callable[[str, Protection, Arguments], object]) -> None:
        self._context = context
        self._submit = submit
        self._queue = _Queue()
        self._policies: Mapping[str, Policy] = {}
        self._fence_at: dict[str, float] = {}
        self._left = Lanes("left-over", quick=2)
        self._left_at: dict[str, float] = {}  # when a source is looked at for what was left there; endless: it was
        self._health_at = self._verify_at = context.elapsed()
        self._scrub_at: dict[str, float] = {}
        self._scrubs = Lanes("scrub", quick=1)
        self._health: dict[str, Health] = {}
        self._idle: set[str] = set()
        self._saturated = False
        self._keeps_up_at: float | None = None
        self._starting = threading.Lock()
        self._paused_until = 0.0

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; then stop what runs (it is resumed at the next start) and return."""
        self._cycles = Lanes("cycle", quick=QUICK, slow=SLOW, ended=self._start_cycles)
        self._fences = Lanes("fence", quick=1)  # separate: a lost site that swallows connections must not block cycles
        look_at = 0.0
        try:
            while not stop.wait(TICK):
                began = time.monotonic()
                if began >= look_at:
                    try:
                        self._look()
                    except AsrError as problem:  # for example the vault's disk is full: continue when it answers again
                        _log.error("%s; %s", problem, problem.action_text)
                    except Exception:  # noqa: BLE001 - a defect must not end the service; the next look may succeed
                        _log.exception("looking for work failed unexpectedly")
                    ended = time.monotonic()
                    look_at = ended + min(LOOK_PAUSE, LOOK_SHARE * (ended - began))
                self._start_cycles()
        finally:
            self._cycles.close()
            self._fences.close()
            self._scrubs.close()
            self._left.close()

    def _start_cycles(self) -> None:
        with self._starting:
            if time.monotonic() < self._paused_until:
                return
            while (found := self._queue.pop(self._context.clock(), self._cycles.has_room)) is not None:
                site, machine = found
                self._cycles.start(machine, site, partial(self._cycle, machine))

    def _look(self) -> None:
        vault, now = self._context.vault, self._context.clock()
        protections = vault.my_protections()
        # A machine that another server has had meanwhile is looked at again.
        self._left_at = {item.id: self._left_at[item.id] for item in protections if item.id in self._left_at}
        self._policies = policies = {policy.name: policy for policy in vault.policies()}
        for policy in policies.values():
            self._context.throttle(policy)  # a changed limit also applies to cycles that are running
        self._context.aging.keep_only({item.id for item in protections})
        self._context.aging.watch()
        self._context.aging.meet((item.id, policies[item.policy].interval) for item in protections if item.head_point)
        jobs = vault.jobs(limit=1000, active=True)
        active = {job.machine for job in jobs}
        due: dict[str, list[tuple[float, str]]] = {}
        wanted = []
        for protection in protections:
            if _to_fence(protection) is not None and self._fence_is_due(protection):
                self._fences.start(protection.id, protection.source_site, partial(self._fence, protection))
            late = protection.id in self._context.fencing
            if late and protection.name not in active and self._fence_is_due(protection):
                self._fences.start(protection.id, protection.source_site, partial(self._release_late, protection))
            if protection.undo_due and protection.name not in active and self._fence_is_due(protection):
                self._fences.start(protection.id, protection.target_site, partial(self._finish_undo, protection))
            if protection.name in active or self._context.locks.busy(protection.id):
                continue
            policy = policies[protection.policy]
            at = cycle_at(protection, policy, now)
            if protection.state in _READ and not protection.undo_due and (at is None or at > now):
                self._look_for_left(protection)
            if at is not None:
                due.setdefault(protection.source_site, []).append((at, protection.id))
            elif due_action(protection, policy, now) in _JOBS:
                wanted.append(protection)
        self._queue.fill(due)
        if (elapsed := self._context.elapsed()) >= self._health_at:
            self._health_at = elapsed + HEALTH_EVERY
            self._tell_load(service := load(protections, policies, now), now)
            self._tell_health(protections, active, service, now)
        for protection in wanted[: max(0, JOBS - len(active))]:
            self._submit(_JOBS[due_action(protection, policies[protection.policy], now)], protection, Arguments())
        if elapsed >= self._verify_at and not wanted:
            self._verify_at = elapsed + VERIFY_LOOK
            idle = [item for item in protections if item.name not in active]
            self._verify(idle, VERIFICATIONS - sum(job.kind == VERIFY.kind for job in jobs), now)
            self._start_scrub(idle, elapsed, now)

    def _verify(self, protections: Sequence[Protection], room: int, now: float) -> None:
        """Submit the verifications that are due, as many as there is room for; the oldest first."""
        if room <= 0:
            return
        ended = self._context.vault.last_ended(VERIFY.kind)
        due = [
            item
            for item in protections
            if verification_due(item, self._policies[item.policy], ended.get(item.name, {}), now)
        ]
        due.sort(key=lambda item: ended.get(item.name, {}).get(JobState.DONE, item.created_at))
        for protection in due[:room]:
            self._submit(VERIFY.kind, protection, Arguments(repair=True))

    def _start_scrub(self, protections: Sequence[Protection], elapsed: float, now: float) -> None:
        """One at a time, the machine that has waited longest."""
        due = [
            item
            for item in protections
            if elapsed >= self._scrub_at.get(item.id, elapsed) and scrub_due(item, self._policies[item.policy], now)
        ]
        for item in sorted(due, key=lambda item: item.last_scrub_at or item.created_at)[:1]:
            self._scrubs.start(item.id, item.target_site, partial(self._scrub, item))

    def _scrub(self, protection: Protection, watch: Watch) -> None:
        try:
            if not scrub(self._context, protection.id, watch):
                self._scrub_at[protection.id] = self._context.elapsed() + SCRUB_AGAIN
        except (Cancelled, NotAssigned):
            pass  # the service stops, or another server took over
        except AsrError as problem:
            self._scrub_at[protection.id] = self._context.elapsed() + SCRUB_AGAIN
            _log.info("%s: its recovery points are not read to the end: %s", protection.name, problem)

    def _cycle(self, protection_id: str, watch: Watch) -> None:
        try:
            protection = self._context.vault.protection(protection_id)
            policy = self._policies.get(protection.policy)
            if policy is None or due_action(protection, policy, self._context.clock()) is not Action.CYCLE:
                return  # its record has changed since it was queued
            with (
                self._context.locks.hold(protection, "a replication cycle", watch),
                recorded_failure(self._context, protection.id, of_a_job=False),
            ):
                result = run_cycle(self._context, protection.id, watch)
                withdraw_late_fence(self._context, protection, result)
                if result.halted:  # there is a point; what is reported is the machine, until it runs again
                    raise SourcePaused(machine=protection.name, site=protection.source_site, detail=result.halted)
            self._tell_paused(protection, None)
        except (Cancelled, MachineBusy, WrongState, NotAssigned):
            pass  # a job or another server took over, or the service stops
        except VaultUnavailable as problem:  # the cycle is still due, and is run when the vault is back
            self._paused_until = time.monotonic() + VAULT_PAUSE
            _log.warning("%s: %s", protection_id, problem)
        except AsrError as problem:
            self._log_failed(protection_id, problem)
            if isinstance(problem, (SourcePaused, SourceWasPaused)):
                self._tell_paused(protection, problem)

    def _tell_paused(self, before: Protection, problem: AsrError | None) -> None:
        """Record once that the source is paused, and once that it runs again. `before`: as before the cycle."""
        was = before.error is not None and before.error.get("code") == SourcePaused.code
        if problem is None and was:
            text = f"{before.name} runs again at {before.source_site}"
        elif isinstance(problem, SourceWasPaused) or (problem is not None and not was):
            text = str(problem)
        else:
            return
        with suppress(AsrError):
            self._context.vault.add_event(
                at=self._context.clock(), machine=before.name, kind="source-paused", text=text
            )

    def _log_failed(self, protection_id: str, problem: AsrError) -> None:
        name, attempt = protection_id, None
        with suppress(AsrError):  # the vault may be what failed
            protection = self._context.vault.protection(protection_id)
            name, attempt = protection.name, protection.attempt or None
        report(
            _log,
            logging.WARNING,
            "cycle failed",
            machine=name,
            error=problem.code,
            failures=attempt,
            happened=problem,
            action=problem.action_text,
        )

    def _fence_is_due(self, protection: Protection) -> bool:
        elapsed = self._context.elapsed()
        if elapsed < self._fence_at.get(protection.id, elapsed):
            return False
        self._fence_at[protection.id] = elapsed + FENCE_EVERY
        return True

    def _fence(self, protection: Protection, watch: Watch) -> None:
        watch.check()
        place = _to_fence(protection)
        if place is None:
            return
        site, machine = place
        problem: Exception | None = None
        try:
            if protection.restored:  # also where the source is lost: nothing else asks
                check_fence(self._context, protection)
            inventory = self._context.site(site).inventory
            before = before_fence(inventory, protection, place)
            if isinstance(before.problem, (SiteUnreachable, MachineNotFound)):
                raise before.problem
            if not before.kept:
                check_fence(self._context, protection)  # before the fence changes anything
            now = self._context.vault.protection(protection.id)
            if now.epoch != protection.epoch or _to_fence(now) != place:
                return  # connecting took so long that the machine was given back meanwhile
            self._context.fencing[protection.id] = place, before.start
            reason = f"{now.name} is owned elsewhere since epoch {shown(now.epoch)}"
            inventory.fence(machine, quarantine(now, reason))
        except MachineNotFound:
            pass  # the site was rebuilt: there is nothing left to quarantine
        except Exception as error:  # noqa: BLE001 - a driver's defect is a fence that failed, as any other
            problem = error
            unexpected = None if isinstance(error, AsrError) else error
            _log.info("%s: quarantine at %s is still pending: %s", protection.name, site, problem, exc_info=unexpected)
            if protection.id not in self._context.fencing and not isinstance(error, QuarantinedByAnother):
                return
        try:
            now = self._context.vault.protection(protection.id)
        except AsrError:
            return  # a later look checks whether the fence came too late
        if _to_fence(now) != place:
            self._release_late(now, watch)
            return
        self._context.fencing.pop(protection.id, None)
        if now.fence_due and problem is not None and (found := refused(now, problem)) != now.error:
            self._context.vault.update(protection.id, error=found)
        if now.fence_due and problem is None:
            self._context.vault.update(protection.id, fence_due=False, error=None)
            text = f"the machine came back at {site} and was quarantined"
            self._context.vault.add_event(
                at=self._context.clock(), machine=protection.name, kind="quarantine", text=text
            )
            _log.warning("%s: %s", protection.name, text)

    def _release_late(self, protection: Protection, watch: Watch) -> None:
        """Withdraw a fence that came after the machine was given back: nothing else would ever start it again."""
        unsure = self._context.fencing.get(protection.id)
        if unsure is None:
            return
        place, start = unsure
        try:
            with self._context.locks.hold(protection, "withdrawing a late quarantine", watch):
                now = self._context.vault.protection(protection.id)
                # In any other state the machine must not run there, or a person's next command releases it.
                if _owner(now) == place and release(self._context, now, place, start=start) is not None:
                    return
                self._context.fencing.pop(protection.id, None)
        except (Cancelled, MachineBusy, NotAssigned):
            pass  # a job or another server took over, or the service stops
        except AsrError as problem:
            _log.info("%s: a late quarantine is not withdrawn yet: %s", protection.name, problem)

    def _look_for_left(self, protection: Protection) -> None:
        """Once for each machine, when this process begins to work on it. A cycle that is due does it, and may still
        open the view of a killed engine again."""
        elapsed = self._context.elapsed()
        if elapsed >= self._left_at.get(protection.id, elapsed):
            self._left_at[protection.id] = elapsed + LEFT_EVERY
            self._left.start(protection.id, protection.source_site, partial(self._release_left, protection))

    def _release_left(self, protection: Protection, watch: Watch) -> None:
        try:
            with self._context.locks.hold(protection, "releasing what was left at its source", watch):
                now = self._context.vault.protection(protection.id)
                if now.state in _READ:
                    release_left(self._context.site(now.source_site).source, now)
            self._left_at[protection.id] = math.inf
        except (Cancelled, MachineBusy, NotAssigned):
            pass  # a job or another server took over, or the service stops
        except MachineNotFound:
            self._left_at[protection.id] = math.inf
        except AsrError as problem:
            _log.info("%s: what was left at its source is not released yet: %s", protection.name, problem)

    def _finish_undo(self, protection: Protection, watch: Watch) -> None:
        """Complete an undo at a site that could not do its part before."""
        try:
            with self._context.locks.hold(protection, "completing an undo", watch):
                finish_undo(self._context, protection.id)
        except (Cancelled, MachineBusy, NotAssigned):
            pass  # a job or another server took over, or the service stops
        except AsrError as problem:
            _log.info("%s: its undo is still incomplete: %s", protection.name, problem)

    def _tell_health(self, protections: Sequence[Protection], active: set[str], service: Load, now: float) -> None:
        vault, former = self._context.vault, self._health
        heads, clock = vault.heads(), vault.clock_state()
        damaged = vault.damaged_counts()
        counts = vault.point_counts() if damaged else {}
        stale = vault.heads_until(clock.before)
        # The jobs were read after the machines: one that ended in between is seen by the next judgement only.
        idle, self._idle = self._idle, {item.name for item in protections} - active
        self._health = {
            item.id: assess(
                item,
                self._policies[item.policy],
                heads.get(item.id),
                now,
                load=service,
                working=item.name not in idle & self._idle,
                clock=Clock(clock.held, clock.text, item.id in stale),
                points=counts.get(item.id, 0),
                damaged=damaged.get(item.id, 0),
            )
            for item in protections
        }
        for item in protections:
            old, new = former.get(item.id, Health()), self._health[item.id]
            if old.level is not new.level:
                self._context.plugins.health_changed(item, old, new)

    def _tell_load(self, service: Load, now: float) -> None:
        if not service.saturated or self._keeps_up_at is None:
            self._keeps_up_at = self._context.elapsed()
        if not self._saturated and self._context.elapsed() - self._keeps_up_at < SATURATED_FOR:
            return
        if self._saturated and service.late > service.at_a_time // 2:
            return
        text = f"{service.late} of {service.machines} machines are late"
        text = f"the service cannot keep up: {text}" if service.saturated else f"the service keeps up again: {text}"
        self._saturated = service.saturated
        _log.warning("%s", text)
        self._context.vault.add_event(at=now, machine="", kind="service", text=text)


def _owner(protection: Protection) -> tuple[str, str | None] | None:
    """Site and machine that are to run, in a state that is no step of a job."""
    if protection.state in STATES_WITH_POINTS:
        return protection.source_site, protection.source_machine
    if protection.state is State.FAILED_OVER:
        return protection.target_site, protection.target_machine
    return None


def _to_fence(protection: Protection) -> tuple[str, str] | None:
    """Site and machine that must not run: the former source, or after a reversal the machine the replica began with."""
    if protection.state is State.UNDOING or protection.undo_due:
        return None  # the undo is returning the source: a fence that is still due would be set after the undo
    if protection.state is State.FAILING_OVER and protection.target_machine is None:
        return None  # nothing is taken from the source before there is a machine at the target
    if protection.fence_due or protection.state in _SOURCE_FENCED:
        return protection.source_site, protection.source_machine
    if protection.seed_machine is not None and protection.state in _TARGET_FENCED:
        return protection.target_site, protection.seed_machine
    return None
