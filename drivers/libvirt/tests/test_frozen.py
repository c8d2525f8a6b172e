"""The connections of a view and its end, which must not overlap."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.settings import SiteSettings
from asr_driver_libvirt.source.frozen import JobFrozen
from asr_driver_libvirt.xml.backup import NbdServer
from asr_driver_libvirt.xml.mark import CheckpointName
from asr_storage.nbd.client import NbdError
from asrcore.errors import ViewLost
from asrcore.model.point import Consistency


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
