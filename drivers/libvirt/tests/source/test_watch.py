"""When the jobs at a scratch place are ended, without a hypervisor."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.settings import SiteSettings
from asr_driver_libvirt.source import watch
from asr_driver_libvirt.source.space import Space, SpaceMeter
from asr_driver_libvirt.source.watch import ViewWatch, Watched
from asrcore.errors import SiteUnreachable
from asrcore.units import GiB, MiB

LOCAL = "qemu:///system"
REMOTE = "qemu+ssh://host/system"


class View(Watched):
    """Counts what it is asked for."""

    def __init__(self, *places: str) -> None:
        self.places = places
        self.reason = ""
        self.late = 0
        self.answers = False

    def end_early(self, reason: str) -> None:
        self.reason = reason

    def end_if_stalled(self) -> None:
        raise SiteUnreachable(site="a", detail="a cut link")

    def end_late(self) -> bool:
        self.late += 1
        if not self.answers:
            raise SiteUnreachable(site="a", detail="a cut link")
        return True


class Bench:
    """A watch whose clock and file system are set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, uri: str, reserve: int = 100 * MiB, usual: int = 0) -> None:
        host = LibvirtHost("a", SiteSettings.parse({"uri": uri}))
        self.now, self.free = 1000.0, {"/s": 10 * GiB}
        monkeypatch.setattr("asr_driver_libvirt.source.watch.time.monotonic", lambda: self.now)
        monkeypatch.setattr(SpaceMeter, "look", lambda _, place, __=0.0: self.look(place))
        self.reserve, self.usual = reserve, usual or reserve
        self.watch = ViewWatch(host, SpaceMeter(host))

    def look(self, place: str) -> Space:
        return Space(place, self.free[place], GiB, self.reserve, self.usual)

    def after(self, seconds: float, free: int, *views: View, owed: tuple[View, ...] = ()) -> float:
        self.now += seconds
        self.free["/s"] = free
        return self.watch._look(views, owed)


Make = Callable[..., Bench]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Make:
    return lambda uri=LOCAL, **more: Bench(monkeypatch, uri, **more)


def test_a_view_ends_at_half_of_the_reserve(bench: Make) -> None:
    made, view, other = bench(), View("/s"), View("/other")
    made.free["/other"] = 10 * GiB
    made.after(20, 51 * MiB, view, other)
    assert view.reason == ""
    made.after(20, 49 * MiB, view, other)
    assert "49.0 MiB were free at /s" in view.reason
    assert other.reason == ""


def test_a_view_ends_earlier_the_faster_the_space_is_used(bench: Make) -> None:
    made, view = bench(), View("/s")
    made.after(0.5, 1000 * MiB, view)
    made.after(0.5, 900 * MiB, view)  # 200 MiB/s: gone in less than five seconds
    assert view.reason == ""
    made.after(0.5, 500 * MiB, view)  # 800 MiB/s: 2.5 s need 2000 MiB
    assert "2.0 GiB are needed" in view.reason


def test_a_view_that_was_opened_with_little_space_ends_at_half_of_that(bench: Make) -> None:
    """No reserve is set, so it is opened below the usual one."""
    made, view = bench(reserve=64 * MiB, usual=GiB), View("/s")
    made.watch._thread = threading.current_thread()  # the test looks instead
    made.watch.begin(view)
    made.after(20, 200 * MiB, view)
    made.after(20, 101 * MiB, view)
    assert view.reason == ""
    made.after(20, 99 * MiB, view)
    assert "100.0 MiB are needed" in view.reason
    made.watch.end(view)
    again = View("/s")
    made.watch.begin(again)
    made.after(20, 2 * GiB, again)
    made.after(20, 513 * MiB, again)
    assert again.reason == ""
    made.after(20, 511 * MiB, again)
    assert "512.0 MiB are needed" in again.reason


def test_space_that_is_freed_ends_no_view(bench: Make) -> None:
    made, view = bench(), View("/s")
    made.after(0.5, 100 * MiB, view)
    made.after(0.5, 1000 * MiB, view)
    assert view.reason == ""


def test_a_remote_host_is_asked_more_often_when_space_is_low(bench: Make) -> None:
    made = bench(REMOTE)
    assert made.after(5, 401 * MiB, View("/s")) == watch.REMOTE_SECONDS
    assert made.after(5, 400 * MiB, View("/s")) == watch.LOOK_SECONDS


def test_a_job_that_could_not_be_ended_is_tried_until_it_is(bench: Make) -> None:
    made, owed = bench(REMOTE), View("/s")
    made.watch._owed.add(owed)
    made.after(5, GiB, owed=(owed,))
    assert owed in made.watch._owed
    owed.answers = True
    made.after(5, GiB, owed=(owed,))
    assert owed.late == 2
    assert not made.watch._owed
