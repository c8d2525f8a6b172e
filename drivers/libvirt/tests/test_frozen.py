"""The connections of a view and its end, which must not overlap."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import pytest

from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.settings import SiteSettings
from asr_driver_libvirt.source.frozen import JobFrozen
from asr_driver_libvirt.source.space import SpaceMeter
from asr_driver_libvirt.source.watch import ViewWatch
from asr_driver_libvirt.xml.backup import NbdServer
from asr_driver_libvirt.xml.mark import CheckpointName
from asr_storage.nbd.client import NbdError
from asrcore.errors import ViewLost
from asrcore.model.point import Consistency


class Host(LibvirtHost):
    """A site whose libvirt answers, and has no job any more."""

    connected = True

    def guard(self, *_: object) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


def test_the_watch_does_not_wait_for_a_connection_that_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Host("a", SiteSettings.parse({"uri": "qemu:///system"}))
    watch = ViewWatch(site, SpaceMeter(site))
    monkeypatch.setattr(watch, "_add", lambda views, view: views.add(view))  # without its thread
    ends: list[float] = []
    monkeypatch.setattr(JobFrozen, "_end_job", lambda _, wait: ends.append(wait))
    name = CheckpointName.make("view", 1.0, Consistency.CRASH)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(2) as pool:
        host, port = server.getsockname()
        frozen = JobFrozen(site, "machine", name, NbdServer(host=host, port=port), held=False, watch=watch)
        connecting = pool.submit(frozen.connect, "vda", "")
        client, _ = server.accept()
        with client:
            pool.submit(frozen.end_early, "space ran short").result(10)
            assert watch._owed == {frozen}
            assert not frozen.end_late()
            assert not ends, "QEMU would wait for this client for ever"
            with pytest.raises(ViewLost, match="space ran short"):
                frozen.confirm()
        with pytest.raises(NbdError):  # the connection was closed
            connecting.result(10)
        assert frozen.end_late()
    assert len(ends) == 1
    assert ends[0] < 1, "the watch has other views"


def test_a_view_is_not_closed_while_a_connection_is_being_made() -> None:
    site = LibvirtHost("a", SiteSettings.parse({"uri": "qemu:///system"}))  # not connected: the job is not touched
    name = CheckpointName.make("view", 1.0, Consistency.CRASH)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(2) as pool:
        host, port = server.getsockname()
        frozen = JobFrozen(site, "machine", name, NbdServer(host=host, port=port), held=False)
        connecting = pool.submit(frozen.connect, "vda", "")
        client, _ = server.accept()
        with client:
            closing = pool.submit(frozen.close)
            with pytest.raises(TimeoutError):
                closing.result(0.3)
        with pytest.raises(NbdError):  # the connection was closed
            connecting.result(10)
        closing.result(10)
    with pytest.raises(ViewLost):
        frozen.connect("vda", "")
