"""Disks read over the link: TCP, TLS, and a link that is cut."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab import Lab

pytestmark = pytest.mark.system

URI = "qemu+tcp://10.77.0.1/system"
Engines = Callable[..., Any]
# libvirt's keep-alive and the NBD client each notice within 20 s; a repeated request takes no longer.
NOTICE_SECONDS = 45


@pytest.fixture(scope="module")
def guest(lab: Lab, start: Callable[[str], None]) -> str:
    lab.define_guest("a", "bios-direct", "linked", rate=20)
    start("linked")
    return lab.sites["a"].virsh("domuuid", "linked").stdout.strip()


@pytest.fixture
def machine(lab: Lab, guest: str) -> Iterator[str]:
    yield guest
    lab.restore()


def test_a_cut_link_is_noticed_and_the_same_view_is_there_afterwards(lab: Lab, machine: str, engines: Engines) -> None:
    engine = engines("b", uri=URI)
    first = engine.open(machine=machine, view="cut")
    content = engine.hash(view="cut", disk="vda")
    engine.send("read_until_it_fails", view="cut", disk="vda", ready="reading")
    assert engine.answer() == "reading"
    lab.cut()
    begun = time.monotonic()
    with pytest.raises(Exception, match=r"site-unreachable|view-lost"):
        engine.answer()
    assert time.monotonic() - begun < NOTICE_SECONDS
    begun = time.monotonic()
    with pytest.raises(Exception, match="site-unreachable"):
        engine.open(machine=machine, view="cut")
    assert time.monotonic() - begun < NOTICE_SECONDS
    lab.restore()
    again = engine.open(machine=machine, view="cut")
    assert (again["taken_at"], again["mark"]) == (first["taken_at"], first["mark"])
    assert engine.hash(view="cut", disk="vda") == content
    engine.confirm(view="cut")
    engine.close(view="cut")
    engine.keep(machine=machine, marks=[])


def test_another_process_reads_the_same_instant_after_a_kill(lab: Lab, machine: str, engines: Engines) -> None:
    engine = engines("b", uri=URI)
    first = engine.open(machine=machine, view="kill")
    content = {disk: engine.hash(view="kill", disk=disk) for disk in first["disks"]}
    engine.kill()
    lab.command("a", "linked", "fill /dev/vdb 30 4")
    second = engines("b", uri=URI)
    again = second.open(machine=machine, view="kill")
    assert (again["taken_at"], again["mark"], again["consistency"]) == (
        first["taken_at"],
        first["mark"],
        first["consistency"],
    )
    assert {disk: second.hash(view="kill", disk=disk) for disk in again["disks"]} == content
    second.close(view="kill")
    second.keep(machine=machine, marks=[])


def test_a_taken_port_is_passed_over(lab: Lab, machine: str, engines: Engines) -> None:
    engine = engines("b", uri=URI, nbd="tcp:10.77.0.1:12000-12002")
    script = (
        "import socket, sys\n"
        "held = [socket.create_server(('10.77.0.1', port)) for port in (12000, 12001)]\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
    )
    taken = lab.popen_in("a", [sys.executable, "-c", script], stdin=subprocess.PIPE)
    assert taken.stdout is not None
    try:
        assert taken.stdout.readline() == b"up\n"
        engine.open(machine=machine, view="port")
        assert "port='12002'" in lab.sites["a"].virsh("backup-dumpxml", "linked").stdout
        engine.close(view="port")
    finally:
        taken.communicate(timeout=20)


def test_a_range_without_a_free_port_is_an_error(machine: str, engines: Engines) -> None:
    engine = engines("b", uri=URI, nbd="tcp:10.99.99.1:12000-12001")
    with pytest.raises(Exception, match=r"driver-failed.*assign requested address"):
        engine.open(machine=machine, view="nowhere")


def test_a_host_that_does_not_answer_is_unreachable_in_bounded_time(lab: Lab, machine: str) -> None:
    lab.cut()
    begun = time.monotonic()
    code = (
        "from asr_driver_libvirt.driver import LibvirtDriver\n"
        "from asrcore.errors import SiteUnreachable\n"
        "try: LibvirtDriver().connect('a', {'uri': 'qemu+tcp://10.77.0.1/system'})\n"
        "except SiteUnreachable as error: print(error)\n"
    )
    done = lab.run_in("b", [sys.executable, "-c", code])
    assert "cannot be reached" in done.stdout
    assert time.monotonic() - begun < 30
