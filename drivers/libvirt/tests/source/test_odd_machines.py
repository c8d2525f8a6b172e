"""Unusual machines. No guest runs in them: QEMU itself is instructed what to write, exactly and immediately."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asr_driver_libvirt.site import LibvirtSite
from asrcore.driver import FrozenView, MachineView, Tracking, ViewRequest
from asrcore.errors import NotReady
from asrcore.model.extent import Extent
from asrcore.model.finding import Severity
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy
from tests.lab import Lab

pytestmark = pytest.mark.system

MIB = 1 << 20
KIB = 1 << 10


class Bare:
    """A machine without an operating system."""

    def __init__(self, lab: Lab, site: LibvirtSite, name: str, disks: str) -> None:
        self._virsh = lab.sites["a"].virsh
        self.lab, self.site, self.name = lab, site, name
        self.disks = disks
        self.define()
        self.virsh("start", name)
        self.id = self.virsh("domuuid", name).strip()

    def define(self) -> None:
        xml = f"""
        <domain type='qemu'><name>{self.name}</name><memory unit='MiB'>32</memory>
          <os><type arch='x86_64' machine='pc'>hvm</type></os>
          <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{self.disks}
          <controller type='usb' model='none'/><memballoon model='none'/></devices>
        </domain>"""
        self._virsh("define", "/dev/stdin", text=xml)

    def virsh(self, *words: str, check: bool = True) -> str:
        return self._virsh(*words, check=check).stdout

    def write(self, disk: str, command: str) -> None:
        """Run a qemu-io command on a disk, as if the guest did it."""
        device = {"vda": "virtio-disk0", "vdb": "virtio-disk1"}[disk]
        line = f'qemu-io -d /machine/peripheral/{device}/virtio-backend "{command}"'
        said = self.virsh("qemu-monitor-command", "--hmp", self.name, line)
        assert "error" not in said.lower(), said

    def open(self, view_id: str, since: Mark | None = None) -> tuple[FrozenView, MachineView]:
        view = self.site.source.open_view(
            [ViewRequest(self.id, view_id, since)], consistency=Consistency.CRASH, freeze_limit=5.0
        )
        return view, view.machines[self.id]

    def codes(self) -> dict[str, Severity]:
        return {item.code: item.severity for item in self.site.source.findings(self.id, Policy("p"))}

    def remove(self) -> None:
        self.virsh("destroy", self.name, check=False)
        self.virsh("undefine", self.name, "--checkpoints-metadata", "--snapshots-metadata", check=False)


Make = Callable[..., Bare]


@pytest.fixture
def make(lab: Lab, site: LibvirtSite) -> Iterator[Make]:
    made: list[Bare] = []

    def begin(disks: str, name: str = "bare") -> Bare:
        made.append(Bare(lab, site, name, disks))
        return made[-1]

    yield begin
    for bare in made:
        bare.remove()


def image(lab: Lab, name: str, size: str = "32M", fmt: str = "qcow2") -> str:
    path = f"/srv/images/{name}"
    lab.run_in("a", ["rm", "-f", path])
    lab.run_in("a", ["qemu-img", "create", "-q", "-f", fmt, path, size])
    return path


def disk(path: str, target: str = "vda", fmt: str = "qcow2", *, kind: str = "file", extra: str = "") -> str:
    source = {"file": "file", "block": "dev"}[kind]
    return f"""<disk type='{kind}' device='disk'><driver name='qemu' type='{fmt}' discard='unmap'/>
        <source {source}='{path}'/><target dev='{target}' bus='virtio'/>{extra}</disk>"""


def test_exactly_what_was_written_is_told_and_a_discard_is_zero(lab: Lab, make: Make) -> None:
    bare = make(disk(image(lab, "exact.qcow2")))
    bare.write("vda", "write -P 1 0 1M")
    bare.write("vda", "write -P 2 8M 1M")
    view, machine = bare.open("v1")
    zero, data = True, False
    assert machine.disks["vda"].allocated() == [
        Extent(0, MIB, data),
        Extent(MIB, 7 * MIB, zero),
        Extent(8 * MIB, MIB, data),
        Extent(9 * MIB, 23 * MIB, zero),
    ]
    mark = machine.mark
    bare.write("vda", "write -P 3 20M 64k")
    view.confirm()
    view.close()
    bare.write("vda", "discard 8M 1M")
    view, machine = bare.open("v2", mark)
    changed = machine.disks["vda"].changed()
    # QEMU ignores discards while a backup runs: the content stays, so nothing is reported.
    mark = machine.mark
    bare.write("vda", "discard 0 1M")
    view.close()
    assert changed == [Extent(8 * MIB, MIB, zero), Extent(20 * MIB, 64 * KIB, data)]
    view, machine = bare.open("v3", mark)
    with view, machine.disks["vda"].reader() as reader:
        assert machine.disks["vda"].changed() == []
        buffer = bytearray(1)
        reader.read_into(0, memoryview(buffer))
        assert buffer == b"\1"


def test_a_machine_of_raw_disks_only_has_no_mark_and_is_attached_to_all_the_same(lab: Lab, make: Make) -> None:
    bare = make(disk(image(lab, "only.raw", fmt="raw"), fmt="raw"))
    bare.write("vda", "write -P 5 4M 1M")
    first, machine = bare.open("raw")
    assert (machine.mark, machine.disks["vda"].tracking) == (None, Tracking.NONE)
    bare.write("vda", "write -P 6 4M 1M")
    again, same = bare.open("raw")
    assert again.taken_at == first.taken_at
    with same.disks["vda"].reader() as reader:
        buffer = bytearray(4)
        reader.read_into(4 * MIB, memoryview(buffer))
    assert buffer == b"\5\5\5\5"
    again.close()
    first.close()


def test_a_block_device_is_a_source_with_its_scratch_file_elsewhere(lab: Lab, make: Make, tmp_path: Path) -> None:
    backing = tmp_path / "device.img"
    with backing.open("wb") as file:
        file.truncate(16 * MIB)
    device = lab.run_in("a", ["losetup", "--show", "-f", backing]).stdout.strip()
    try:
        lab.run_in("a", ["mkdir", "-p", "/var/lib/libvirt/images"])
        bare = make(disk(device, fmt="raw", kind="block"), name="block")
        bare.write("vda", "write -P 9 1M 1M")
        view, machine = bare.open("v1")
        assert machine.disks["vda"].disk.size == 16 * MIB
        assert "/var/lib/libvirt/images/" in bare.virsh("backup-dumpxml", "block")
        with machine.disks["vda"].reader() as reader:
            buffer = bytearray(2)
            reader.read_into(MIB, memoryview(buffer))
        assert buffer == b"\x09\x09"
        view.close()
        bare.remove()
    finally:
        lab.run_in("a", ["losetup", "-d", device])


def test_drives_with_media_take_no_part(lab: Lab, make: Make) -> None:
    medium = image(lab, "medium.iso", "2M", "raw")
    drive = f"""<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{medium}'/>
        <target dev='hda' bus='ide'/><readonly/></disk>
        <disk type='file' device='cdrom'><target dev='hdb' bus='ide'/><readonly/></disk>"""
    bare = make(disk(image(lab, "boot.qcow2")) + drive)
    assert bare.codes() == {"removable-medium": Severity.INFO}
    view, machine = bare.open("v1")
    assert set(machine.disks) == {"vda"}
    mark = machine.mark
    view.close()
    view, machine = bare.open("v2", mark)
    assert machine.disks["vda"].tracking is Tracking.CHANGED
    view.close()


def test_an_external_snapshot_made_after_protection_does_not_break_the_delta(lab: Lab, make: Make) -> None:
    bare = make(disk(image(lab, "base.qcow2")))
    bare.write("vda", "write -P 1 0 1M")
    view, machine = bare.open("v1")
    mark = machine.mark
    view.close()
    bare.write("vda", "write -P 2 2M 1M")
    bare.virsh("snapshot-create-as", bare.name, "later", "--disk-only")
    bare.write("vda", "write -P 3 4M 1M")
    assert bare.codes()["machine-has-snapshots"] is Severity.ERROR
    view, machine = bare.open("v2", mark)
    frozen = machine.disks["vda"]
    # Either known completely, in whichever layer, or reported as unknown.
    assert frozen.tracking in (Tracking.CHANGED, Tracking.LOST, Tracking.NEW)
    if frozen.tracking is Tracking.CHANGED:
        assert frozen.changed() == [Extent(2 * MIB, MIB), Extent(4 * MIB, MIB)]
    view.close()


def test_a_disk_replaced_by_another_image_is_new(lab: Lab, make: Make) -> None:
    bare = make(disk(image(lab, "one.qcow2")))
    view, machine = bare.open("v1")
    mark = machine.mark
    view.close()
    bare.virsh("destroy", bare.name)
    bare.disks = disk(image(lab, "two.qcow2"))
    bare.virsh("undefine", bare.name, "--checkpoints-metadata")
    uuid = bare.id
    bare.disks = f"<!-- -->{bare.disks}"
    xml_uuid = f"<uuid>{uuid}</uuid>"
    definition = f"""<domain type='qemu'><name>{bare.name}</name>{xml_uuid}<memory unit='MiB'>32</memory>
        <os><type arch='x86_64' machine='pc'>hvm</type></os><devices>{bare.disks}
        <controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"""
    lab.sites["a"].virsh("define", "/dev/stdin", text=definition)
    bare.virsh("start", bare.name)
    view, machine = bare.open("v2", mark)
    assert machine.disks["vda"].tracking is Tracking.NEW
    assert "replaced" in machine.disks["vda"].reason
    view.close()
    assert len(bare.virsh("checkpoint-list", bare.name, "--name").split()) == 1, "no record of a missing checkpoint"


def test_an_image_recreated_at_the_same_path_is_lost(lab: Lab, make: Make) -> None:
    path = image(lab, "same.qcow2")
    bare = make(disk(path))
    view, machine = bare.open("v1")
    mark = machine.mark
    view.close()
    bare.virsh("destroy", bare.name)
    image(lab, "same.qcow2")
    bare.virsh("start", bare.name)
    view, machine = bare.open("v2", mark)
    assert machine.disks["vda"].tracking is Tracking.LOST
    view.close()
    bare.site.source.keep_marks(bare.id, [])


def test_a_mark_that_is_not_ours_is_lost_not_an_error(lab: Lab, make: Make) -> None:
    bare = make(disk(image(lab, "marks.qcow2")))
    for token in ("", "{}", "[1]", '{"version":1,"checkpoint":"theirs","disks":{},"off":false}', "\x00"):
        view, machine = bare.open("v", Mark(token))
        assert machine.disks["vda"].tracking is Tracking.LOST
        view.close()


def test_a_paused_machine_is_frozen_like_a_running_one(lab: Lab, make: Make) -> None:
    bare = make(disk(image(lab, "paused.qcow2")))
    bare.virsh("suspend", bare.name)
    view, machine = bare.open("v1")
    assert machine.description.machine.power is PowerState.PAUSED
    assert machine.consistency is Consistency.CRASH
    view.close()
    assert lab.state("a", bare.name) == "paused", "only its user resumes a machine that the user paused"


@pytest.mark.parametrize(
    ("code", "extra"),
    [("disk-shareable", "<shareable/>"), ("disk-read-only", "<readonly/>"), ("disk-transient", "<transient/>")],
)
def test_disks_that_cannot_be_replicated_are_refused(lab: Lab, make: Make, code: str, extra: str) -> None:
    fmt = "raw" if code == "disk-shareable" else "qcow2"
    bare = make(disk(image(lab, "main.qcow2")) + disk(image(lab, f"x.{fmt}", fmt=fmt), "vdb", fmt, extra=extra))
    assert bare.codes()[code] is Severity.ERROR
    with pytest.raises(NotReady, match=code):
        bare.open("v1")


def test_view_ids_of_any_letters_name_their_view(lab: Lab, make: Make) -> None:
    bare = make(disk(image(lab, "ids.qcow2")))
    for view_id in ("a/b:c", "Ümläut <&> 'quotes'", "x" * 300, "01J-plain_id"):
        first, _ = bare.open(view_id)
        again, _ = bare.open(view_id)
        assert again.taken_at == first.taken_at
        again.close()
        first.close()


def test_the_kept_definition_can_be_defined_as_it_is(lab: Lab, make: Make) -> None:
    bare = make(disk(image(lab, "defined.qcow2")))
    view, machine = bare.open("v1")
    again, attached = bare.open("v1")
    for description in (machine.description, attached.description):
        xml = description.artifact("domain.xml")
        assert xml is not None
        lab.sites["b"].virsh("define", "/dev/stdin", text=xml.decode())
        assert lab.sites["b"].virsh("domuuid", bare.name).stdout.strip() == bare.id
        lab.sites["b"].virsh("undefine", bare.name)
    view.close()
    again.close()
