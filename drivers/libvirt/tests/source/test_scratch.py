"""Space for scratch files runs short: the machine is not stopped, or is started again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from asr_driver_libvirt.driver import LibvirtDriver
from asr_driver_libvirt.site import LibvirtSite
from asr_driver_libvirt.source import space, watch
from asrcore.driver import FrozenView, MachineView
from asrcore.errors import AsrError, ScratchSpaceLow, SourceWasPaused, ViewLost
from drivers.libvirt.tests.source.test_odd_machines import Bare, disk, image
from drivers.libvirt.tests.source.test_views import Guest
from tests.lab import Lab

pytestmark = pytest.mark.system

MIB = 1 << 20
PLACE = "/srv/scratch"


@pytest.fixture
def place(lab: Lab) -> Iterator[str]:
    """A scratch place of 16 MiB."""
    lab.run_in("a", ["mkdir", "-p", PLACE])
    lab.run_in("a", ["mount", "-t", "tmpfs", "-o", "size=16m", "asr-scratch", PLACE])
    yield PLACE
    lab.run_in("a", ["umount", "-l", PLACE])


@pytest.fixture
def small(lab: Lab, place: str) -> Iterator[LibvirtSite]:
    """Site a with its scratch files there; no view is opened with less than 8 MiB, and open ones end at 4."""
    settings = {"uri": lab.uri("a"), "nbd": "unix:/tmp", "scratch_dir": place, "scratch_reserve": "8MiB"}
    with LibvirtDriver().connect("a", settings) as found:
        yield found


@pytest.fixture
def bare(lab: Lab, small: LibvirtSite) -> Iterator[Bare]:
    made = Bare(lab, small, "scratch", disk(image(lab, "scratch.qcow2", "64M")))
    made.write("vda", "write -P 1 0 64M")
    yield made
    small.source.keep_marks(made.id, [])
    made.remove()


@pytest.fixture
def guest(lab: Lab, small: LibvirtSite, start: Callable[[str], None]) -> Iterator[Guest]:
    """A guest with an operating system: QEMU pauses it if its own write fails."""
    lab.define_guest("a", "bios-direct", "paused", rate=0)
    start("paused")
    made = Guest(lab, small, "paused", start)
    made.command("dd if=/dev/urandom of=/dev/vdb bs=1M count=48; sync")
    yield made
    small.source.keep_marks(made.id, [])
    made.virsh("destroy", "paused", check=False)
    lab.remove_guest("a", "paused")


def reason(machine: Bare | Guest) -> str:
    return machine.virsh("domstate", machine.name, "--reason").strip()


def has_job(machine: Bare | Guest) -> bool:
    return "<domainbackup" in machine.virsh("backup-dumpxml", machine.name, check=False)


def until(true: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def fill(guest: Guest) -> None:
    """Overwrite more than the scratch place holds, without waiting for it."""
    guest.command("(dd if=/dev/zero of=/dev/vdb bs=1M count=40 conv=fsync 2>/dev/null &) ; true")


def read_all(machine: MachineView) -> None:
    buffer = memoryview(bytearray(MIB))
    with machine.disks["vda"].reader() as reader:
        for offset in range(0, machine.disks["vda"].disk.size, MIB):
            reader.read_into(offset, buffer)


def problem_of(view: FrozenView) -> AsrError:
    with pytest.raises(AsrError) as caught:
        view.confirm()
    return caught.value


def test_the_job_ends_before_the_space_is_gone(bare: Bare) -> None:
    view, machine = bare.open("v1")
    mark = machine.mark
    for mib in range(13):
        bare.write("vda", f"write -P 2 {mib}M 1M")
        time.sleep(0.1)
        if not has_job(bare):
            break
    until(lambda: not has_job(bare), "the job was not ended")
    lost = problem_of(view)
    assert isinstance(lost, ViewLost)
    assert f"free at {PLACE}" in str(lost)
    with pytest.raises(ViewLost, match="space for scratch files ran short"):
        read_all(machine)
    view.close()
    assert reason(bare) == "running (booted)"
    # Its scratch files are deleted, so the next view is opened, and its delta has what was written meanwhile.
    view, machine = bare.open("v2", mark)
    assert sum(item.length for item in machine.disks["vda"].changed()) >= 4 * MIB
    view.close()


def test_no_view_is_opened_where_space_is_low(lab: Lab, bare: Bare) -> None:
    lab.run_in("a", ["fallocate", "-l", "9M", f"{PLACE}/other"])
    with pytest.raises(ScratchSpaceLow) as caught:
        bare.open("v1")
    assert caught.value.retry
    assert "7.0 MiB" in str(caught.value)
    assert "not 8.0 MiB" in str(caught.value)
    assert PLACE in str(caught.value)
    assert "scratch_dir=DIRECTORY" in caught.value.action_text
    assert not has_job(bare)
    lab.run_in("a", ["rm", f"{PLACE}/other"])
    until(lambda: opens(bare), "it is opened when there is space again")


def opens(bare: Bare) -> bool:
    try:
        bare.open("v1")[0].close()
    except ScratchSpaceLow:
        return False
    return True


def test_a_guest_that_the_view_stopped_is_resumed(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    # The watch sees space that is not there, so that it cannot act before.
    monkeypatch.setattr(space.SpaceMeter, "look", lambda *_, **__: None)
    view = guest.open()
    fill(guest)
    until(lambda: not has_job(guest), "the job was not ended")
    assert isinstance(problem_of(view), SourceWasPaused)
    until(lambda: reason(guest).startswith("running"), "the guest stays paused")
    view.close()
    guest.command("sync")
    until(lambda: "asr-stalled" not in guest.virsh("dumpxml", guest.name), "the mark stays")


def test_a_guest_that_was_stopped_is_resumed_at_the_end_of_the_view(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch.ViewWatch, "_look", lambda *_: 60.0)
    view = guest.open()
    fill(guest)
    until(lambda: reason(guest) == "paused (I/O error)", "the guest is not paused")
    view.close()
    until(lambda: reason(guest).startswith("running"), "the guest stays paused", 3)


def test_a_guest_that_something_else_stopped_is_replicated_and_reported_only(lab: Lab, guest: Guest) -> None:
    lab.run_in("a", ["mkdir", "-p", "/srv/full"])
    lab.run_in("a", ["mount", "-t", "tmpfs", "-o", "size=8m", "asr-full", "/srv/full"])
    try:
        path = "/srv/full/vdc.qcow2"
        lab.run_in("a", ["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"])
        guest.virsh("attach-disk", guest.name, path, "vdc", "--subdriver", "qcow2")
        until(lambda: "vdc" in guest.command("ls /dev"), "the disk does not appear")
        guest.command("(dd if=/dev/urandom of=/dev/vdc bs=1M count=32 conv=fsync 2>/dev/null &) ; true")
        until(lambda: reason(guest) == "paused (I/O error)", "the guest is not paused")
        with guest.open() as view:
            assert guest.of(view).halted == "an I/O error of its disks paused it (vdc: no space)"
            time.sleep(3 * watch.LOOK_SECONDS)
            view.confirm()
        guest.site.source.keep_marks(guest.id, [])
        assert reason(guest) == "paused (I/O error)"
        lab.run_in("a", ["mount", "-o", "remount,size=80m", "/srv/full"])
        guest.virsh("resume", guest.name)
        with guest.open() as view:
            assert guest.of(view).halted == ""
    finally:
        guest.virsh("destroy", guest.name)
        lab.run_in("a", ["umount", "-l", "/srv/full"])
