"""Where no reserve is set, a machine on a file system that is nearly full is still replicated; without a hypervisor."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.settings import SiteSettings
from asr_driver_libvirt.source.guard import _Process
from asr_driver_libvirt.source.space import Space, SpaceMeter
from asrcore.model.finding import Severity
from asrcore.units import GiB, MiB
from drivers.libvirt.tests.source.test_readiness import codes, facts

Fill = Callable[[int, int], None]


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Fill:
    """Sets what is free, and the size, of every file system."""

    def to(free: int, total: int) -> None:
        state = SimpleNamespace(f_bavail=free, f_blocks=total, f_frsize=1)
        monkeypatch.setattr(os, "statvfs", lambda _: state)

    return to


def look(**settings: str) -> Space:
    host = LibvirtHost("a", SiteSettings.parse({"uri": "qemu:///system", **settings}))
    found = SpaceMeter(host).look("/s")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("free", "total", "short"),
    [
        (200 * MiB, 100 * GiB, False),  # preallocated images fill it
        (64 * MiB, 100 * GiB, False),
        (63 * MiB, 100 * GiB, True),
        (5 * MiB, 100 * MiB, False),
        (4 * MiB, 100 * MiB, True),
    ],
)
def test_a_view_is_refused_below_the_floor_only(fill: Fill, free: int, total: int, short: bool) -> None:
    fill(free, total)
    assert look().short == short


def test_the_check_of_a_machine_there_warns_only(fill: Fill) -> None:
    fill(200 * MiB, 100 * GiB)
    assert codes(facts(scratch=((look(), 100 * GiB),))) == {"scratch-small": Severity.WARNING}
    fill(63 * MiB, 100 * GiB)
    assert codes(facts(scratch=((look(), 100 * GiB),))) == {"scratch-small": Severity.ERROR}


def test_a_reserve_that_the_operator_set_is_kept(fill: Fill) -> None:
    fill(200 * MiB, 100 * GiB)
    found = look(scratch_reserve="1GiB")
    assert found.short
    assert found.reserve == found.usual == GiB


def test_the_guard_leaves_what_was_opened_with_little_space(fill: Fill) -> None:
    process = _Process({"site": "a", "settings": {}, "local": True, "reserve": None}, 60.0)
    entry = {"machine": "m", "view": "asr-v1", "held": False, "starting": False, "places": ["/s"]}
    for free, low in [(200, False), (51, False), (49, True)]:
        fill(free * MiB, 100 * GiB)
        assert process._is_low("/s", entry) == low
    process._over = 1.0
    for free, low in [(101, False), (99, True)]:
        fill(free * MiB, 100 * GiB)
        assert process._is_low("/s", entry) == low
    ample = {**entry, "before": {"/s": 50 * GiB}}
    for free, low in [(513, False), (511, True)]:
        fill(free * MiB, 100 * GiB)
        assert process._is_low("/s", ample) == low
