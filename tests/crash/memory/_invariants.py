"""The six invariants of the contract, checked against the test's own record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import attrs

from asrcore import driver
from asrcore.errors import StaleEpoch
from asrcore.model.extent import Extent, subtract, total
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency
from asrcore.model.protection import CycleMode, Protection
from asrcore.model.state import State
from asrcore.testing.memory._content import BLOCK
from asrcore.vault import Vault
from tests.crash.memory._workspace import MACHINE, Workspace

__all__ = ["Interrupted", "check_always", "check_at_rest", "check_resumed", "content", "interrupted"]

_GOING = (State.COMMITTING, State.COMMITTED, State.DISABLING)
"""The replica is being deleted or has been deleted: at a commit its content becomes the machine's."""


def _replica(stage: Workspace, protection: Protection) -> driver.Replica | None:
    """The replica through the driver, as the engine opens it; None if it does not exist."""
    site = _site(stage, protection.target_site)
    return site.target.replica(protection.replica_id) if protection.replica_id in site.target.replicas() else None


def _site(stage: Workspace, name: str) -> driver.Site:
    from asrcore.testing.memory import MemoryDriver

    return MemoryDriver().connect(name, {"world": stage.worlds[name].name})


def content(replica: driver.Replica, point: driver.StoredPoint) -> dict[str, str]:
    """SHA-256 of each disk of a point."""
    result = {}
    for disk_id, size in point.disks.items():
        data = bytearray(size)
        with replica.reader(disk_id, point.id) as reader:
            reader.read_into(0, memoryview(data))
        result[disk_id] = hashlib.sha256(data).hexdigest()
    return result


# -- at any time -----------------------------------------------------------------------------------------------------


def check_always(stage: Workspace, vault: Vault) -> None:
    """What holds right after a kill, before anything is restarted, and at any later time."""
    for protection in vault.protections():
        _points_are_whole(stage, vault, protection)
        _mark_belongs_to_head(stage, protection)
        _epochs_only_rise(stage, protection)
        _one_copy_runs(stage, protection)


def _points_are_whole(stage: Workspace, vault: Vault, protection: Protection) -> None:
    """Invariants 1, 5 and 6."""
    points = {point.id: point for point in vault.points(protection.id)}
    replica = _replica(stage, protection)
    if replica is None:
        assert protection.state in (*_GOING, State.ENABLING, State.REVERSING), "the replica is gone"
        assert not points or protection.state in _GOING, "points without a replica"
        return
    info = replica.info()
    missing = [point for point in points.values() if point.id not in {stored.id for stored in info.points}]
    if missing and protection.pending is not None and info.head == protection.pending.point_id:
        # Sealed, not recorded yet: the newer point has replaced the one that was only the latest state.
        missing = [point for point in missing if point.kept or point.pinned or point.id != protection.head_point]
    assert missing == []
    assert protection.head_point in (None, *points)
    known = {*points, *vault.dropping(protection.id), protection.pending and protection.pending.point_id}
    assert {stored.id for stored in info.points} <= known, "the target has points that the vault does not know"
    for stored in info.points:
        truth = stage.truth(protection.source_site, stored.taken_at)
        frozen = replica.description(stored.id).machine.power
        expected = Consistency.OFFLINE if frozen is PowerState.OFF else truth.consistency
        assert stored.consistency is expected, f"point {stored.id}"
        if not _tampered(stage, stored.taken_at):
            assert content(replica, stored) == truth.disks, f"point {stored.id} differs from the frozen view"
        if stored.id in points:
            recorded = points[stored.id]
            assert (recorded.taken_at, recorded.consistency, recorded.kept) == (
                stored.taken_at,
                stored.consistency,
                stored.kept,
            )


def _tampered(stage: Workspace, taken_at: float) -> bool:
    first, last = stage.notes.get("tampered", (float("inf"), 0.0))
    return bool(first <= taken_at < last)


def _mark_belongs_to_head(stage: Workspace, protection: Protection) -> None:
    """Invariant 2: every difference from the head is within the changes that the source reports since the mark."""
    if protection.mark is None or protection.state is State.DISABLING or stage.notes.get("tracking lost"):
        return
    source, target = stage.worlds[protection.source_site], stage.worlds[protection.target_site]
    with source.look() as there, target.look() as here:
        if protection.replica_id not in here.replicas:
            return
        machine, head = there.machine(protection.source_machine), here.replica(protection.replica_id)
        assert protection.mark.token in machine.marks, "the recorded mark was released"
        dirty = machine.marks[protection.mark.token]
        # The content of a newer point may exist before it is recorded; the mark still refers to the older one.
        point = head.points[-1]
        if point.point.id != protection.head_point or _tampered(stage, point.point.taken_at):
            return
        for disk_id, disk in machine.disks.items():
            now, then = disk.content, point.disks[disk_id]
            differs = {
                number
                for number in range(now.size // BLOCK)
                if now.read(number * BLOCK, BLOCK) != then.read(number * BLOCK, BLOCK)
            }
            assert differs <= set(dirty[disk_id].blocks or ()), f"a delta from {protection.mark} would miss changes"


def _epochs_only_rise(stage: Workspace, protection: Protection) -> None:
    """Invariant 4."""
    assert protection.epoch >= stage.notes.get("epoch", 0)
    replica = _replica(stage, protection)
    seen: dict[str, int] = stage.notes.get("replica epochs", {})
    if replica is not None:
        epoch = replica.info().epoch
        assert seen.get(protection.replica_id, 0) <= epoch <= protection.epoch
        seen[protection.replica_id] = epoch
    stage.note(**{"epoch": protection.epoch, "replica epochs": seen})


def _one_copy_runs(stage: Workspace, protection: Protection) -> None:
    """Invariant 4: two copies run only while the source cannot be reached and its fence is pending."""
    running = stage.running_at()
    assert len(running) <= 1 or protection.fence_due, f"runs at {running}"


# -- when nothing is in progress ---------------------------------------------------------------------------------------


def check_at_rest(stage: Workspace, vault: Vault) -> None:
    """What also holds when the interrupted work has ended."""
    protections = vault.protections()
    _nothing_is_left(stage, vault, protections)
    for protection in protections:
        state = protection.state
        assert state in (State.PROTECTED, State.RESYNC_PENDING, State.FAILED_OVER, State.COMMITTED), state
        _old_owners_are_refused(stage, protection)
        if state in (State.FAILED_OVER, State.COMMITTED):
            _moved(stage, protection)
        else:
            assert stage.running_at() == [protection.source_site]
            with stage.worlds[protection.source_site].look() as world:
                assert world.machine(MACHINE).fence is None


def _nothing_is_left(stage: Workspace, vault: Vault, protections: Iterable[Protection]) -> None:
    expected_replicas: dict[str, set[str]] = {name: set() for name in stage.worlds}
    tests: dict[str, set[str]] = {name: set() for name in stage.worlds}
    for protection in protections:
        if protection.state is not State.COMMITTED:
            expected_replicas[protection.target_site].add(protection.replica_id)
        if protection.test is not None:
            tests[protection.target_site].add(protection.test.machine_id)
        replica = _replica(stage, protection)
        if replica is None:
            assert protection.state is State.COMMITTED
            assert vault.points(protection.id) == []
            continue
        assert {point.id for point in replica.info().points} == {point.id for point in vault.points(protection.id)}
        assert vault.dropping(protection.id) == []
    for name, world in stage.worlds.items():
        with world.look() as state:
            assert set(state.replicas) == expected_replicas[name], f"replicas at {name}"
            assert set(state.machines) - {MACHINE} == tests[name], f"machines at {name}"


def _old_owners_are_refused(stage: Workspace, protection: Protection) -> None:
    """Invariant 4: a replica refuses writes of an older epoch. At epoch 1 there was no other owner yet."""
    replica = _replica(stage, protection)
    if replica is None:
        return
    info = replica.info()
    assert protection.epoch in (1, info.epoch), "the replica was never taken over"
    spec = driver.CycleSpec("c-of-an-old-owner", info.epoch - 1, info.head, info.disks)
    for refused in (
        lambda: replica.open_cycle(spec),
        lambda: replica.raise_epoch(info.epoch - 1),
        lambda: replica.drop_points([], info.epoch - 1),
    ):
        try:
            refused()
        except StaleEpoch:
            continue
        raise AssertionError(f"epoch {info.epoch - 1} may still write")
    assert replica.info() == info


def _moved(stage: Workspace, protection: Protection) -> None:
    """The machine runs at the target with the content of the failover's point; the old one is quarantined."""
    assert protection.target_site in stage.running_at()
    taken_at = stage.notes["failover taken at"]
    assert stage.sha256(protection.target_site) == stage.truth(protection.source_site, taken_at).disks
    with stage.worlds[protection.source_site].look() as world:
        there = world.machines.get(protection.source_machine)
        if there is not None and not protection.fence_due:
            assert there.fence is not None, "the old source is not quarantined"
            assert there.fence.epoch == protection.epoch
            assert there.power is PowerState.OFF
            assert not there.autostart


# -- an interrupted cycle ------------------------------------------------------------------------------------------


@attrs.frozen
class Interrupted:
    """A cycle at the moment of the kill. Bytes: `done` is durable at the target, `left` is not; `changed` is what the
    guest has written since the view that the cycle was read from, if that view is lost. `pieces`: extents."""

    cycle_id: str
    protection_id: str
    compares: bool
    sealed: bool
    done: int
    left: int
    changed: int
    pieces: int


def interrupted(stage: Workspace, vault: Vault) -> Interrupted | None:
    """The cycle that the kill interrupted, if any."""
    protection = next(iter(vault.protections()), None)
    pending = protection.pending if protection else None
    if protection is None or pending is None:
        return None
    with stage.worlds[protection.target_site].look() as world:
        journal = world.replicas[protection.replica_id].journal
        points = world.replicas[protection.replica_id].points
        sealed = points[-1:] and points[-1].point.id == pending.point_id
        sealed = bool(sealed or (journal and journal.cycle_id == pending.id and journal.commit))
        logs = journal.logs if journal is not None and journal.cycle_id == pending.id else {}
        done: dict[str, list[Extent]] = {disk_id: log.done for disk_id, log in logs.items()}
    left = [item for disk_id, plan in pending.plan.items() for item in subtract(plan, done.get(disk_id, []))]
    compares = pending.mode is CycleMode.COMPARE
    with stage.worlds[protection.source_site].look() as world:
        machine = world.machine(protection.source_machine)
        view = machine.views.get(pending.id)
        stands = view is not None and view.taken_at == pending.taken_at
        dirty = {} if stands or pending.view_mark is None else machine.marks[pending.view_mark.token]
        changed = [extent for disk_id, disk in dirty.items()
                   for extent in machine.disks[disk_id].content.extents_of(disk.blocks or ())]  # fmt: skip
    all_done = sum(total(items) for items in done.values())
    pieces = len(left) + len(changed)
    return Interrupted(pending.id, protection.id, compares, sealed, all_done, total(left), total(changed), pieces)


def check_resumed(vault: Vault, cycle: Interrupted, written: int, ranges: int) -> bool:
    """Invariant 3: nothing that was durable is read again, except what the guest has written since, in bytes and
    ranges. False if the cycle was abandoned instead of resumed; the caller decides whether that is allowed.
    """
    found = next((item for item in vault.cycles(cycle.protection_id) if item.id == cycle.cycle_id), None)
    if found is None:
        return False
    if cycle.sealed:
        assert found.bytes_read == found.bytes_sent == 0, "a sealed cycle was copied again"
        return True
    # A comparison reads whole digest blocks: each end of an extent may cost one.
    allowance = 2 * driver.DIGEST_BLOCK * (cycle.pieces + ranges) if cycle.compares else 0
    most = cycle.left + cycle.changed + written + allowance
    assert found.bytes_read <= most, f"{found.bytes_read} bytes were read, {most} were needed; {cycle}"
    return True
