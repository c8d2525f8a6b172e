"""A self-test for users with a subscription: the driver's own work on a few mebibytes, all of it deleted afterwards.

Costs: a container with 20 MiB for some minutes; where machines are run, also a 20 MiB disk, two snapshots and the
smallest machine for about as long as it takes to start and stop it.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import attrs

from asr_driver_azure.check.recorder import Recorder
from asr_driver_azure.cleanup.probes import clear, replica_of, sweep_probes, tried
from asr_driver_azure.settings import PROBES, SiteSettings
from asr_driver_azure.site import AzureSite
from asrcore.driver import Check, CycleSpec, ReplicaSpec, SealSpec, TestSpec, ViewRequest
from asrcore.errors import AsrError, StaleEpoch
from asrcore.model.machine import Description, Disk, Firmware, Machine, PowerState
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.units import MiB, format_size

__all__ = ["run"]

_SIZE = 20 * MiB
_BLOCK = 64 * 1024


def run(settings: SiteSettings, record: Path | None = None) -> Generator[Check]:
    """One finding after the other; everything created is deleted whatever happens. `record`: see `Driver.check`."""
    identity = uuid.uuid4().hex[:8]
    recorder = Recorder(record) if record is not None else None
    site = AzureSite("check", attrs.evolve(settings, container=f"{PROBES}{identity}"), heard=recorder)
    try:
        yield from _Probe(site, replica_of(site.account.settings.container)).run()
    finally:
        site.close()
        if recorder is not None:
            recorder.close()


class _Probe:
    def __init__(self, site: AzureSite, replica: str) -> None:
        self._site = site
        self._id = replica
        self._random = random.Random(5)
        self._head: str | None = None
        self._content = bytearray(_SIZE)
        disk = Disk("vda", _SIZE)
        machine = Machine(replica, replica, 1, 512 * MiB, Firmware.BIOS, (disk,))
        self._description = Description(machine, "check")

    def run(self) -> Generator[Check]:
        """The steps stop at the first that fails; deletion is always tried."""
        yield self._timed("delete what interrupted probes have left", self._others)
        removed = False
        try:
            yield from self._steps()
            removed = True
            yield self._timed("delete everything created", self._remove)
        finally:
            if not removed:  # interrupted: the caller is gone, but machines cost money
                self._remove()

    def _steps(self) -> Iterator[Check]:
        steps: list[tuple[str, Callable[[], str]]] = [
            ("sign in and see the storage account", self._sign_in),
            ("create page blobs and lease them", self._create),
            ("write, clear and seal a point", lambda: self._cycle("p1")),
            ("read the point back", self._read),
            ("seal a second point by a delta", lambda: self._cycle("p2")),
            ("list changes since a snapshot, cleared ranges included", self._diff),
            ("refuse an older owner", self._fence),
        ]
        if self._site.account.settings.runs_machines:
            steps += [
                ("list machine sizes", self._sizes),
                ("create a disk by upload, and start a machine in an isolated network", self._machine),
                ("read the disk by two snapshots and their diff", self._home),
            ]
        for name, step in steps:
            check = self._timed(name, step)
            yield check
            if not check.passed:
                break

    def _timed(self, name: str, step: Callable[[], str]) -> Check:
        started = time.monotonic()
        try:
            reported, passed = step(), True
        except AsrError as problem:
            reported, passed = f"[{problem.code}] {problem}", False
        except AssertionError as problem:
            reported, passed = str(problem), False
        except Exception as problem:  # noqa: BLE001 - an unexpected failure is reported as a failed step, too
            reported, passed = f"{type(problem).__name__}: {problem}", False
        return Check(name, passed, time.monotonic() - started, reported)

    def _others(self) -> str:
        return ", ".join(sweep_probes(self._site.account)) or "none found"

    def _sign_in(self) -> str:
        status = self._site.status()
        return ", ".join(f"{key}: {value}" for key, value in status.details.items())

    def _create(self) -> str:
        self._site.target.create_replica(ReplicaSpec(self._id, self._id, 1, self._description), Watch())
        return format_size(_SIZE)

    def _cycle(self, point: str) -> str:
        replica = self._site.target.replica(self._id)
        data = self._random.randbytes(MiB)
        with replica.open_cycle(CycleSpec(f"c-{point}", 1, self._head, {"vda": _SIZE})) as writer:
            writer.write("vda", 0, memoryview(data))
            writer.zero("vda", MiB // 2, _BLOCK)
            stored = writer.seal(SealSpec(point, time.time(), Consistency.CRASH, True, self._description))
        self._content[:MiB] = data
        self._content[MiB // 2 : MiB // 2 + _BLOCK] = bytes(_BLOCK)
        self._head = stored.id
        return f"point {stored.id}"

    def _read(self) -> str:
        data = bytearray(_SIZE)
        with self._site.target.replica(self._id).reader("vda") as reader:
            reader.read_into(0, memoryview(data))
        assert data == self._content, "what was read is not what was written"
        return f"{format_size(_SIZE)} equal"

    def _diff(self) -> str:
        record = self._site.account.container.record(self._id, self._site.name)
        first, second = (point.disks["vda"] for point in record.points)
        found = self._site.account.container.page_blob(second.blob, second.snapshot).changed(first.snapshot, _SIZE)
        written = sum(item.length for item in found if not item.zero)
        assert 0 < written <= MiB, f"{written} bytes are reported as changed, at most {MiB} were"
        cleared = sum(item.length for item in found if item.zero)
        return f"{written} bytes written, {cleared} cleared"

    def _fence(self) -> str:
        replica = self._site.target.replica(self._id)
        replica.raise_epoch(2)
        try:
            replica.open_cycle(CycleSpec("c-old", 1, self._head, {"vda": _SIZE})).close()
        except StaleEpoch as refused:
            return str(refused)
        raise AssertionError("a cycle of an older epoch was opened")

    def _sizes(self) -> str:
        return f"{len(self._site.account.sizes())} sizes in {self._site.account.settings.location}"

    def _machine(self) -> str:
        assert self._head is not None
        spec = TestSpec("probe", self._id, self._head, self._id)
        instance = self._site.failover.start_test(spec, Watch())
        machine = self._site.inventory.machine(instance.machine_id)
        assert machine.power is PowerState.RUNNING, f"the machine is {machine.power.value}"
        return f"{instance.name} is running"

    def _home(self) -> str:
        data = bytearray(_SIZE)
        source = self._site.source
        machine_id = "test-probe"
        self._site.inventory.power_off(machine_id, graceful=False, timeout=300.0)
        with source.open_view(
            [ViewRequest(machine_id, "first", None)], consistency=Consistency.CRASH, freeze_limit=10.0
        ) as view:
            found = view.machines[machine_id]
            with found.disks["vda"].reader() as reader:
                reader.read_into(0, memoryview(data))
            mark = found.mark
        assert data == self._content, "the machine's disk differs from the recovery point"
        with source.open_view(
            [ViewRequest(machine_id, "second", mark)], consistency=Consistency.CRASH, freeze_limit=10.0
        ) as view:
            changed = view.machines[machine_id].disks["vda"].changed()
        assert not changed, f"{len(changed)} ranges are reported as changed of a stopped machine"
        return "equal; no changes while it is stopped"

    def _remove(self) -> str:
        """Delete it as the engine does; then whatever still exists. What cannot be deleted does not stop the rest."""
        problems = []
        if self._site.account.settings.runs_machines:
            problems += tried(lambda: self._site.failover.stop_test(self._id, "probe"))
        problems += tried(lambda: self._site.target.delete_replica(self._id, 2))
        problems += clear(self._site.account)
        assert not problems, "; ".join(problems)
        return "nothing left"
