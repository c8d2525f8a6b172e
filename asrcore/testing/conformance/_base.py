"""Fixtures and skips that all parts of the kit use."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import pytest

from asrcore.driver import Capability, DiskView, FrozenView, MachineView, Site, Source, ViewRequest
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency, Mark
from asrcore.testing.conformance.copying import Scratch
from asrcore.testing.conformance.rig import ConformanceRig

__all__ = ["FREEZE_LIMIT", "Base", "SourceBench", "needs", "new_id", "source_of", "target_of", "wait_for_power"]

_Test = TypeVar("_Test", bound=Callable[..., object])
FREEZE_LIMIT = 10.0
"""Seconds that a view may hold up the machine."""


def needs(*, source: Iterable[Capability] = (), target: Iterable[Capability] = ()) -> Callable[[_Test], _Test]:
    """Skip the test unless the connected sites claim these capabilities."""

    def mark(test: _Test) -> _Test:
        test.__dict__["asr_needs"] = (tuple(source), tuple(target))
        return test

    return mark


def new_id(prefix: str) -> str:
    """An id that no earlier run has used."""
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def source_of(rig: ConformanceRig) -> Site:
    """The connected source site; skips if there is none."""
    site = rig.source_site
    if site is None:
        pytest.skip("the rig has no source site")
    return site


def target_of(rig: ConformanceRig) -> Site:
    """The connected target site; skips if there is none."""
    site = rig.target_site
    if site is None:
        pytest.skip("the rig has no target site")
    return site


def wait_for_power(site: Site, machine_id: str, power: PowerState, seconds: float) -> None:
    """Assert that the inventory reports this power within `seconds`."""
    end = time.monotonic() + seconds
    while (now := site.inventory.machine(machine_id).power) is not power and time.monotonic() < end:
        time.sleep(0.1)  # no platform here has an event to wait for
    assert now is power


class SourceBench:
    """Opens views and puts everything back at the end."""

    def __init__(self, rig: ConformanceRig) -> None:
        self.rig = rig
        self._opened: list[FrozenView] = []
        self._copies: list[Scratch] = []
        self._machines: set[str] = set()
        rig.wait_for_guest(rig.machine_id)

    @property
    def source(self) -> Source:
        """Of the current connection."""
        return source_of(self.rig).source

    def open(
        self,
        since: Mark | None = None,
        *,
        view_id: str | None = None,
        machines: Iterable[str] = (),
        consistency: Consistency = Consistency.CRASH,
    ) -> FrozenView:
        """A view of the rig's machine, or of those named."""
        chosen = tuple(machines) or (self.rig.machine_id,)
        self._machines.update(chosen)
        requests = [ViewRequest(machine_id, view_id or new_id("view"), since) for machine_id in chosen]
        view = self.source.open_view(requests, consistency=consistency, freeze_limit=FREEZE_LIMIT)
        self._opened.append(view)
        return view

    def of(self, view: FrozenView) -> MachineView:
        """The rig's machine in a view."""
        return view.machines[self.rig.machine_id]

    def is_whole(self, view: FrozenView) -> bool:
        """Whether the view freezes all disks of all its machines."""
        return all(disk.whole for machine in view.machines.values() for disk in machine.disks.values())

    def unmoved(self, view: FrozenView) -> AbstractContextManager[None]:
        """Within this context every range shows the instant of the view, once it has settled. Where the source cannot
        ensure that, the rig keeps the machine from writing."""
        return nullcontext() if self.is_whole(view) else self.rig.still(self.rig.machine_id)

    def settle(self, view: FrozenView, copies: Mapping[str, Scratch]) -> None:
        """Bring copies of the machine's disks to the instant of the view."""
        while rounds := {disk: again for disk, again in view.settle().get(self.rig.machine_id, {}).items() if again}:
            for disk_id, again in rounds.items():
                copies[disk_id].update(self.of(view).disks[disk_id], again)

    def mark(self) -> Mark:
        """The mark of a view that is opened and closed just for it."""
        with self.open() as view:
            mark = self.of(view).mark
        assert mark is not None, "the source claims TRACKING but a view has no mark"
        return mark

    def copy(self, disk: DiskView) -> Scratch:
        """A scratch copy of a frozen disk."""
        self._copies.append(Scratch.of(disk))
        return self._copies[-1]

    def forget(self, view: FrozenView) -> None:
        """The engine is killed with this view open."""
        self._opened.remove(view)
        self.rig.abandon(view)

    def close(self) -> None:
        """Close what is open, release all marks."""
        for item in (*self._copies, *self._opened):
            item.close()
        for machine_id in self._machines:
            self.source.keep_marks(machine_id, [])


class Base:
    """What every part of the kit has: the rig, and skipping by capability."""

    @pytest.fixture
    def rig(self) -> ConformanceRig:
        """Override it in your class. Share a machine that boots: `scope="class"`, on a classmethod."""
        raise NotImplementedError(
            "define a fixture named `rig` in your test class that gives a ConformanceRig of your platform:\n"
            "    @pytest.fixture(scope='class')\n"
            "    @classmethod\n"
            "    def rig(cls):\n"
            "        with MyRig() as rig:\n"
            "            yield rig"
        )

    @pytest.fixture(autouse=True)
    def _capabilities(self, request: pytest.FixtureRequest, rig: ConformanceRig) -> None:
        source, target = getattr(request.function, "asr_needs", ((), ()))
        for site, needed, role in ((rig.source_site, source, "source"), (rig.target_site, target, "target")):
            if needed and site is None:
                pytest.skip(f"the rig has no {role} site")
            claimed = site.status().capabilities if needed and site is not None else frozenset()
            missing = [capability.value for capability in needed if capability not in claimed]
            if missing:
                pytest.skip(f"the {role} site does not claim {', '.join(missing)}")

    @pytest.fixture
    def bench(self, rig: ConformanceRig) -> Iterator[SourceBench]:
        """Views of the rig's machine."""
        bench = SourceBench(rig)
        yield bench
        bench.close()
