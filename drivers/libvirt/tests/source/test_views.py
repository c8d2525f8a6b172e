"""Frozen views of a running guest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from asr_driver_libvirt.site import LibvirtSite
from asrcore.driver import FrozenView, MachineView, Tracking, ViewRequest
from asrcore.errors import MachineBusy, NotReady, ViewLost
from asrcore.model.extent import Extent, intersect, split, subtract, total
from asrcore.model.point import Consistency, Mark
from tests.lab import BlankDisk, Lab

pytestmark = pytest.mark.system

MIB = 1 << 20


class Copy:
    """A replica of a machine in memory, made from extents as the engine does."""

    def __init__(self) -> None:
        self.disks: dict[str, bytearray] = {}

    def apply(self, view: MachineView) -> dict[str, list[Extent]]:
        """Copy what the view reports as changed; returns the extents."""
        sent = {}
        for disk_id, disk in view.disks.items():
            known = disk.tracking is Tracking.CHANGED and disk_id in self.disks
            extents = disk.changed() if known else disk.allocated()
            here = self.disks.setdefault(disk_id, bytearray())
            here.extend(bytes(max(0, disk.disk.size - len(here))))
            with disk.reader() as reader:
                for piece in split(extents, MIB):
                    if piece.zero:
                        here[piece.offset : piece.end] = bytes(piece.length)
                    else:
                        with memoryview(here) as whole:
                            reader.read_into(piece.offset, whole[piece.offset : piece.end])
            sent[disk_id] = extents
        for gone in set(self.disks) - set(view.disks):
            del self.disks[gone]
        return sent

    def hashes(self) -> dict[str, str]:
        return {disk_id: blake3(content).hexdigest() for disk_id, content in self.disks.items()}


def content_hashes(view: MachineView) -> dict[str, str]:
    """Digests of every byte of each disk, read without using extents."""
    found = {}
    for disk_id, disk in view.disks.items():
        digest, buffer = blake3(), memoryview(bytearray(4 * MIB))
        with disk.reader() as reader:
            for offset in range(0, disk.disk.size, len(buffer)):
                piece = buffer[: min(len(buffer), disk.disk.size - offset)]
                reader.read_into(offset, piece)
                digest.update(piece)
        found[disk_id] = digest.hexdigest()
    return found


class Guest:
    """A guest under load and the source that reads it."""

    def __init__(self, lab: Lab, site: LibvirtSite, name: str, start: Callable[[str], None]) -> None:
        self.lab, self.site, self.name, self.start = lab, site, name, start
        self.id = next(machine.id for machine in site.inventory.machines() if machine.name == name)
        self._count = 0

    def open(self, since: Mark | None = None, view_id: str = "", want: str = "crash") -> FrozenView:
        self._count += 1
        request = ViewRequest(self.id, view_id or f"view-{self._count}", since)
        return self.site.source.open_view([request], consistency=Consistency(want), freeze_limit=5.0)

    def of(self, view: FrozenView) -> MachineView:
        return view.machines[self.id]

    def virsh(self, *words: str, check: bool = True) -> str:
        return self.lab.sites["a"].virsh(*words, check=check).stdout

    def command(self, line: str) -> str:
        return self.lab.command("a", self.name, line)

    def ours(self) -> list[str]:
        """asrcore's checkpoints at the host."""
        return [name for name in self.virsh("checkpoint-list", self.name, "--name").split() if name.startswith("asr-")]

    def scratch_files(self) -> list[str]:
        return [file for file in self.lab.run_in("a", ["ls", "/srv/images"]).stdout.split() if ".asr-" in file]


@pytest.fixture(scope="module")
def running(lab: Lab) -> str:
    lab.define_guest("a", "bios-direct", "views", rate=20)
    return "views"


@pytest.fixture
def guest(lab: Lab, site: LibvirtSite, running: str, start: Callable[[str], None]) -> Iterator[Guest]:
    made = Guest(lab, site, running, start)
    if lab.state("a", running) != "running":
        start(running)
    yield made
    site.source.keep_marks(made.id, [])
    assert made.scratch_files() == []
    assert made.ours() == [] or lab.state("a", running) != "running"


def test_a_copy_by_extents_equals_the_frozen_machine_first_and_after_each_delta(guest: Guest) -> None:
    copy, mark, sent = Copy(), None, {}
    for turn in range(3):
        with guest.open(mark) as view:
            sent = copy.apply(guest.of(view))
            assert copy.hashes() == content_hashes(guest.of(view)), f"turn {turn}"
            view.confirm()
            mark = guest.of(view).mark
        assert mark is not None
        guest.site.source.keep_marks(guest.id, [mark])
        assert len(guest.ours()) == 1
        guest.command("fill /dev/vdb 20 3")
    assert 0 < total(sent["vda"]) < 20 * MIB, "a delta is small"


def test_only_qcow2_disks_are_tracked_and_all_are_of_one_view(guest: Guest) -> None:
    with guest.open() as view:
        mark = guest.of(view).mark
        assert {disk.tracking for disk in guest.of(view).disks.values()} == {Tracking.NONE}
    with guest.open(mark) as view:
        tracking = {disk_id: disk.tracking for disk_id, disk in guest.of(view).disks.items()}
        assert tracking == {"vda": Tracking.CHANGED, "vdb": Tracking.NONE, "sda": Tracking.CHANGED}
        assert "raw" in guest.of(view).disks["vdb"].reason


def test_a_view_does_not_change_while_the_guest_writes(guest: Guest) -> None:
    with guest.open() as view:
        before = content_hashes(guest.of(view))
        guest.command("fill /dev/vdb 24 4")
        guest.command("dd if=/dev/urandom of=/mnt/lab-scratch/noise bs=1M count=4; sync")
        assert content_hashes(guest.of(view)) == before
        view.confirm()
    with guest.open() as view:
        assert content_hashes(guest.of(view)) != before


def test_what_the_guest_trimmed_travels_as_zeroes(guest: Guest) -> None:
    guest.command("dd if=/dev/urandom of=/mnt/lab-scratch/big bs=1M count=32; sync; sleep 1")
    with guest.open() as view:
        copy = Copy()
        copy.apply(guest.of(view))
        mark = guest.of(view).mark
    guest.command("rm /mnt/lab-scratch/big; sync; fstrim -v /mnt/lab-scratch")
    with guest.open(mark) as view:
        sent = copy.apply(guest.of(view))
        zeroes = total(item for item in sent["sda"] if item.zero)
        data = total(item for item in sent["sda"] if not item.zero)
        assert zeroes >= 31 * MIB
        # The workload continues meanwhile: on this disk it rewrites an area of 8 MiB and a journal of 4 MiB, not more.
        assert data < 16 * MIB
        assert copy.hashes() == content_hashes(guest.of(view))


def test_a_killed_qemu_loses_tracking_and_only_that(guest: Guest) -> None:
    with guest.open() as view:
        mark = guest.of(view).mark
    guest.lab.kill_qemu("a", guest.name)
    guest.start(guest.name)
    with guest.open(mark) as view:
        disks = guest.of(view).disks
        assert {disks["vda"].tracking, disks["sda"].tracking} == {Tracking.LOST}
        assert "bitmap" in disks["vda"].reason
        renewed = guest.of(view).mark
    assert renewed is not None
    guest.site.source.keep_marks(guest.id, [renewed])
    assert len(guest.ours()) == 1, "asrcore's stale bitmaps are deleted"
    with guest.open(renewed) as view:
        assert guest.of(view).disks["vda"].tracking is Tracking.CHANGED


def test_a_bitmap_left_inconsistent_in_the_image_is_removed(guest: Guest) -> None:
    with guest.open() as view:
        mark = guest.of(view).mark
    guest.virsh("destroy", guest.name)  # a clean stop: the bitmap is saved ...
    guest.start(guest.name)  # ... and marked as in use
    guest.lab.kill_qemu("a", guest.name)
    guest.start(guest.name)
    with guest.open(mark) as view:
        assert guest.of(view).disks["vda"].tracking is Tracking.LOST
    guest.site.source.keep_marks(guest.id, [])
    size = int(guest.virsh("domblkinfo", guest.name, "sda").split()[1])
    guest.virsh("blockresize", guest.name, "sda", f"{size}b")  # which QEMU refuses while such a bitmap exists


def test_a_shutdown_and_start_keep_the_delta_going(guest: Guest) -> None:
    copy = Copy()
    with guest.open() as view:
        copy.apply(guest.of(view))
        mark = guest.of(view).mark
    guest.lab.shutdown("a", guest.name)
    guest.start(guest.name)
    with guest.open(mark) as view:
        assert guest.of(view).disks["vda"].tracking is Tracking.CHANGED
        copy.apply(guest.of(view))
        assert copy.hashes() == content_hashes(guest.of(view))


def test_a_renamed_machine_goes_on_even_when_libvirt_forgot_its_checkpoints(guest: Guest) -> None:
    copy = Copy()
    with guest.open() as view:
        copy.apply(guest.of(view))
        mark = guest.of(view).mark
    guest.lab.shutdown("a", guest.name)
    guest.virsh("domrename", guest.name, "renamed")
    try:
        definition = guest.virsh("dumpxml", "--inactive", "renamed")
        guest.virsh("undefine", "renamed", "--checkpoints-metadata")
        guest.lab.sites["a"].virsh("define", "/dev/stdin", text=definition)
        guest.virsh("start", "renamed")
        assert guest.virsh("checkpoint-list", "renamed", "--name").split() == []
        with guest.open(mark) as view:
            assert guest.of(view).description.machine.name == "renamed"
            assert guest.of(view).disks["vda"].tracking is Tracking.CHANGED
            copy.apply(guest.of(view))
            assert copy.hashes() == content_hashes(guest.of(view))
        guest.site.source.keep_marks(guest.id, [])
    finally:
        guest.virsh("destroy", "renamed", check=False)
        guest.virsh("domrename", "renamed", guest.name)
        guest.start(guest.name)


def test_disks_may_be_added_grown_and_removed(guest: Guest) -> None:
    copy = Copy()
    with guest.open() as view:
        copy.apply(guest.of(view))
        mark = guest.of(view).mark
    guest.lab.run_in("a", ["qemu-img", "create", "-q", "-f", "qcow2", "/srv/images/more.qcow2", "32M"])
    disk = "--driver qemu --subdriver qcow2 --live --targetbus virtio"
    guest.virsh("attach-disk", guest.name, "/srv/images/more.qcow2", "vdm", *disk.split())
    guest.virsh("blockresize", guest.name, "sda", f"{300 * MIB}b")
    try:
        with guest.open(mark) as view:
            disks = guest.of(view).disks
            assert disks["vdm"].tracking is Tracking.NEW
            assert disks["sda"].tracking is Tracking.CHANGED
            assert disks["sda"].disk.size == 300 * MIB
            grown = [Extent(256 * MIB, 44 * MIB)]
            assert total(intersect(grown, disks["sda"].changed())) == 44 * MIB, "the new part is reported"
            copy.apply(guest.of(view))
            assert copy.hashes() == content_hashes(guest.of(view))
            mark = guest.of(view).mark
        with guest.open(mark) as view:
            assert guest.of(view).disks["vdm"].tracking is Tracking.CHANGED
    finally:
        guest.virsh("detach-disk", guest.name, "vdm", "--live")
    with guest.open(mark) as view:
        assert set(guest.of(view).disks) == {"vda", "vdb", "sda"}
        copy.apply(guest.of(view))
        assert copy.hashes() == content_hashes(guest.of(view))


def test_allocated_tells_every_byte_once(guest: Guest) -> None:
    with guest.open() as view:
        for disk in guest.of(view).disks.values():
            extents = disk.allocated()
            assert subtract([Extent(0, disk.disk.size)], extents) == []
            assert total(extents) == disk.disk.size
            assert total(item for item in extents if not item.zero) < disk.disk.size / 2, "thin stays thin"


# -- backup jobs of asrcore and of others ---------------------------------------------------------------------------


def test_the_same_view_id_attaches_to_the_view_that_is_frozen_still(guest: Guest) -> None:
    first = guest.open(view_id="again")
    guest.command("fill /dev/vdb 28 2")
    second = guest.open(view_id="again")
    assert second.taken_at == first.taken_at
    assert guest.of(second).mark == guest.of(first).mark
    assert content_hashes(guest.of(second)) == content_hashes(guest.of(first))
    second.close()
    with pytest.raises(ViewLost):
        first.confirm()
    first.close()


def test_asked_from_its_own_mark_the_same_view_has_no_changes(guest: Guest) -> None:
    view = guest.open(view_id="own")
    mark = guest.of(view).mark
    with guest.open(mark, view_id="own") as again:
        assert guest.of(again).mark == mark
        assert [disk.changed() for disk in guest.of(again).disks.values()] == [[], [], []]


def test_the_same_id_after_its_view_ended_is_a_new_view_with_another_mark(guest: Guest) -> None:
    with guest.open(view_id="twice") as view:
        mark = guest.of(view).mark
    with guest.open(mark, view_id="twice") as view:
        assert guest.of(view).mark != mark
        assert guest.of(view).disks["vda"].tracking is Tracking.CHANGED


def test_a_view_that_nobody_reads_any_more_gives_way(guest: Guest) -> None:
    abandoned = guest.open(view_id="abandoned")
    with guest.open(view_id="next") as view:
        view.confirm()
    with pytest.raises(ViewLost):
        abandoned.confirm()
    abandoned.close()


def test_a_backup_of_somebody_else_is_busy_and_left_alone(guest: Guest, nbd_directory: Path) -> None:
    xml = f"""<domainbackup mode='pull'><server transport='unix' socket='{nbd_directory}/other.sock'/>
    <disks><disk name='vda' backup='yes' type='file'><scratch file='/srv/images/other.scratch'/></disk></disks>
    </domainbackup>"""
    path = nbd_directory / "other.xml"
    path.write_text(xml)
    guest.virsh("backup-begin", guest.name, str(path))
    try:
        with pytest.raises(MachineBusy) as caught:
            guest.open()
        assert caught.value.retry
        guest.site.source.keep_marks(guest.id, [])
        assert "other.scratch" in guest.virsh("backup-dumpxml", guest.name)
    finally:
        guest.virsh("domjobabort", guest.name)


def test_checkpoints_of_others_stay_and_do_not_disturb(guest: Guest, nbd_directory: Path) -> None:
    path = nbd_directory / "theirs.xml"
    path.write_text(
        "<domaincheckpoint><name>theirs</name><disks><disk name='vda' checkpoint='bitmap'/></disks></domaincheckpoint>"
    )
    with guest.open() as view:
        mark = guest.of(view).mark
    guest.virsh("checkpoint-create", guest.name, str(path))
    try:
        with guest.open(mark) as view:
            assert guest.of(view).disks["vda"].tracking is Tracking.CHANGED
            guest.site.source.keep_marks(guest.id, [])
            view.confirm()
    except ViewLost:
        pass  # nothing to keep: its view has ended, too
    assert guest.virsh("checkpoint-list", guest.name, "--name").split() == ["theirs"]
    guest.virsh("checkpoint-delete", guest.name, "theirs")


def test_keep_marks_ends_a_forgotten_view_and_keeps_what_is_kept(guest: Guest) -> None:
    with guest.open() as view:
        mark = guest.of(view).mark
    forgotten = guest.open()
    assert mark is not None
    guest.site.source.keep_marks(guest.id, [mark])
    assert "no domain backup job" in guest.lab.sites["a"].virsh("backup-dumpxml", guest.name, check=False).stderr
    assert len(guest.ours()) == 1
    assert guest.scratch_files() == []
    forgotten.close()


def test_scratch_files_that_a_crashed_host_left_are_removed(guest: Guest) -> None:
    stale = "/srv/images/views-vda.qcow2.asr-old.18f0a0c"
    theirs = "/srv/images/views-vda.qcow2.asr-notes"
    guest.lab.run_in("a", ["touch", f"{stale}c", theirs])
    guest.site.source.keep_marks(guest.id, [])
    assert guest.scratch_files() == [Path(theirs).name]
    guest.lab.run_in("a", ["rm", theirs])


def test_a_disk_that_cannot_be_replicated_is_not_left_out_silently(guest: Guest) -> None:
    guest.lab.run_in("a", ["truncate", "-s", "8M", "/srv/images/shared.raw"])
    plug = "--driver qemu --subdriver raw --live --targetbus virtio --mode shareable"
    guest.virsh("attach-disk", guest.name, "/srv/images/shared.raw", "vdn", *plug.split())
    try:
        with pytest.raises(NotReady, match="disk-shareable"):
            guest.open()
    finally:
        guest.virsh("detach-disk", guest.name, "vdn", "--live")


def test_libvirtd_may_be_restarted_under_a_view(guest: Guest, restart_libvirtd: Callable[[], None]) -> None:
    view = guest.open(view_id="survivor")
    before = content_hashes(guest.of(view))
    restart_libvirtd()
    assert content_hashes(guest.of(view)) == before
    again = guest.open(view_id="survivor")
    assert (again.taken_at, content_hashes(guest.of(again))) == (view.taken_at, before)
    view.confirm()
    again.close()
    view.close()


def test_a_view_ends_with_its_qemu(guest: Guest) -> None:
    view = guest.open()
    reader = guest.of(view).disks["vda"].reader()
    guest.lab.kill_qemu("a", guest.name)
    with pytest.raises(ViewLost):
        reader.read_into(0, memoryview(bytearray(MIB)))
    with pytest.raises(ViewLost):
        view.confirm()
    reader.close()
    view.close()


# -- consistency -------------------------------------------------------------------------------------------------------


def test_the_agents_freeze_is_recorded_and_undone(guest: Guest) -> None:
    wait_for_agent(guest)
    for asked, obtained in (("filesystem", "filesystem"), ("application", "filesystem"), ("crash", "crash")):
        with guest.open(want=asked) as view:
            assert guest.of(view).consistency.value == obtained
        assert "thawed" in guest.virsh("qemu-agent-command", guest.name, '{"execute":"guest-fsfreeze-status"}')
    guest.command("echo alive >/mnt/lab-scratch/alive; sync")


def test_a_consistency_that_cannot_be_had_is_no_error(guest: Guest) -> None:
    wait_for_agent(guest)
    guest.command("killall -STOP qemu-ga || kill -STOP $(pidof qemu-ga)")
    try:
        with guest.open(want="filesystem") as view:
            assert guest.of(view).consistency is Consistency.CRASH
    finally:
        guest.command("kill -CONT $(pidof qemu-ga)")
    wait_for_agent(guest)
    # It now receives the freeze that it had missed, and the thaw after it.
    thawed = '{"execute":"guest-fsfreeze-status"}'
    assert wait(lambda: "thawed" in guest.virsh("qemu-agent-command", guest.name, thawed, check=False), 60)
    guest.command("echo alive >/mnt/lab-scratch/alive; sync")


def wait_for_agent(guest: Guest) -> None:
    ping = '{"execute":"guest-ping"}'
    assert wait(lambda: "return" in guest.virsh("qemu-agent-command", guest.name, ping, check=False), 30)


def wait(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_blank_disks_cost_nothing(lab: Lab, site: LibvirtSite, start: Callable[[str], None]) -> None:
    lab.define_guest("a", "bios-direct", "blank", rate=1, extra_disks=[BlankDisk("vdc", size=64 * MIB)])
    guest = Guest(lab, site, "blank", start)
    start("blank")
    try:
        with guest.open() as view:
            assert guest.of(view).disks["vdc"].allocated() == [Extent(0, 64 * MIB, zero=True)]
    finally:
        lab.sites["a"].virsh("destroy", "blank", check=False)
