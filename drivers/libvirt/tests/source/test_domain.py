"""Domain definitions read as values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr_driver_libvirt.xml.description import describe, without_our_metadata
from asr_driver_libvirt.xml.domain import (
    METADATA_URI,
    DiskKind,
    fence_from_xml,
    fence_xml,
    machine_of,
    parse_domain,
    parse_xml,
)
from asrcore.driver import Fence
from asrcore.model.machine import Firmware, PowerState

WINDOWS = """
<domain type='kvm' id='7'>
  <name>win11</name>
  <uuid>9c7b2f1e-0000-4000-8000-0000000000aa</uuid>
  <title>Accounting</title>
  <metadata>
    <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
      <libosinfo:os id="http://microsoft.com/win/11"/>
    </libosinfo:libosinfo>
    <asrfence:fence xmlns:asrfence="https://asrcore.dev/xmlns/libvirt/1.0/fence" epoch="3" reason="x"/>
  </metadata>
  <memory unit='GiB'>8</memory>
  <currentMemory unit='KiB'>8388608</currentMemory>
  <vcpu placement='static' current='2'>4</vcpu>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <firmware><feature enabled='yes' name='secure-boot'/></firmware>
    <loader readonly='yes' secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.ms.fd'>/var/lib/libvirt/qemu/nvram/win11_VARS.fd</nvram>
  </os>
  <cpu mode='host-passthrough' check='none'/>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/vm/win11.qcow2' index='2'/>
      <backingStore type='file' index='3'>
        <format type='qcow2'/><source file='/vm/base.qcow2'/><backingStore/>
      </backingStore>
      <target dev='sda' bus='scsi'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/><source dev='/dev/vg/data'/><target dev='vdb' bus='virtio'/><shareable/>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <source protocol='rbd' name='pool/image'><host name='mon'/><encryption format='luks'/></source>
      <target dev='vdc' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/><source file='/iso/virtio.iso'/><target dev='sdb' bus='sata'/><readonly/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sdc' bus='sata'/><readonly/></disk>
    <interface type='bridge'>
      <mac address='52:54:00:00:00:01'/><source bridge='br0'/><model type='virtio'/>
    </interface>
    <interface type='hostdev'><mac address='52:54:00:00:00:02'/></interface>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
    </channel>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <filesystem type='mount'><source dir='/share'/><target dir='share'/></filesystem>
    <memory model='nvdimm'/>
    <shmem name='s'/>
  </devices>
</domain>
"""

PLAIN = """
<domain type='qemu'>
  <name>plain</name><uuid>9c7b2f1e-0000-4000-8000-0000000000bb</uuid>
  <memory>131072</memory>
  <os><type>hvm</type><kernel>/boot/vmlinuz</kernel></os>
  <devices>
    <disk type='volume'><source pool='default' volume='x.qcow2'/><target dev='vda'/></disk>
    <disk type='file' device='lun'><source file='/x'><slices/></source><target dev='sda'/><transient/><mirror/></disk>
  </devices>
</domain>
"""


def test_a_machine_with_everything() -> None:
    model = parse_domain(WINDOWS)
    assert (model.name, model.title, model.cpus, model.memory) == ("win11", "Accounting", 4, 8 << 30)
    assert (model.firmware, model.secure_boot) == (Firmware.UEFI, True)
    assert model.nvram == "/var/lib/libvirt/qemu/nvram/win11_VARS.fd"
    assert model.os == "http://microsoft.com/win/11"
    assert (model.tpm, model.cpu_mode, model.nvdimms, model.shared_memory) == (True, "host-passthrough", 1, True)
    assert model.shared_folders == ("share",)
    assert model.host_devices == ("network card 52:54:00:00:00:02",)
    assert (model.agent_channel, model.agent_connected) == (True, True)
    assert model.media == ("sdb",)
    assert [disk.id for disk in model.hard_disks] == ["sda", "vdb", "vdc"]


def test_its_disks() -> None:
    sda, vdb, vdc = parse_domain(WINDOWS).hard_disks
    assert (sda.kind, sda.path, sda.format, sda.tracked) == (DiskKind.FILE, "/vm/win11.qcow2", "qcow2", True)
    assert (vdb.kind, vdb.path, vdb.tracked, vdb.shareable) == (DiskKind.BLOCK, "/dev/vg/data", False, True)
    assert (vdc.kind, vdc.source_type, vdc.encrypted) == (DiskKind.OTHER, "network", True)


def test_a_plain_one() -> None:
    model = parse_domain(PLAIN)
    assert (model.memory, model.cpus, model.firmware) == (128 << 20, 1, Firmware.BIOS)
    assert (model.direct_kernel, model.agent_channel, model.nvram) == (True, False, "")
    vda, sda = model.hard_disks
    assert (vda.kind, vda.path, vda.format) == (DiskKind.OTHER, "x.qcow2", "")
    assert (sda.device, sda.transient, sda.mirrored, sda.sliced) == ("lun", True, True, True)


def test_the_neutral_value() -> None:
    machine = machine_of(parse_domain(WINDOWS), {"sda": 5, "vdb": 6}, PowerState.RUNNING)
    assert [(disk.id, disk.size) for disk in machine.disks] == [("sda", 5), ("vdb", 6), ("vdc", 0)]
    assert [(nic.mac, nic.network) for nic in machine.nics] == [("52:54:00:00:00:01", "br0"), ("52:54:00:00:00:02", "")]
    assert (machine.tpm, machine.secure_boot, machine.power) == (True, True, PowerState.RUNNING)


@pytest.mark.parametrize("text", ["", "no xml", "<domain>", "<network/>", "\x00"])
def test_what_is_no_domain_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"XML|not a domain"):
        parse_domain(text)


def test_no_file_is_read_for_an_entity() -> None:
    text = '<!DOCTYPE d [<!ENTITY e SYSTEM "file:///etc/hostname">]><domain><name>a&e;b</name></domain>'
    assert parse_domain(text).name == "a"


def test_a_description_leaves_our_own_records_behind_and_nothing_else() -> None:
    model = parse_domain(WINDOWS)
    description = describe(model, WINDOWS, {}, PowerState.OFF, b"vars")
    kept = description.artifact("domain.xml")
    assert kept is not None
    assert description.artifact("nvram") == b"vars"
    assert METADATA_URI not in kept.decode()
    assert "libosinfo" in kept.decode()
    assert len(parse_xml(kept).findall("devices/*")) == len(parse_xml(WINDOWS).findall("devices/*"))
    assert parse_domain(kept) == model


def test_metadata_that_held_only_ours_goes_too() -> None:
    xml = f"<domain><metadata><a:held xmlns:a='{METADATA_URI}/held'/></metadata><name>x</name></domain>"
    assert without_our_metadata(xml) == "<domain><name>x</name></domain>"


@given(epoch=st.integers(0, 2**60), reason=st.text())
def test_a_fence_is_read_as_it_was_written(epoch: int, reason: str) -> None:
    found = fence_from_xml(fence_xml(Fence(epoch, reason)))
    assert found is not None
    assert found.epoch == epoch
    assert len(found.reason) == len(reason)


@pytest.mark.parametrize("text", ["", "<fence", "<fence epoch='three'/>", "<fence epoch='-1'/>"])
def test_a_damaged_fence_still_fences(text: str) -> None:
    found = fence_from_xml(text)
    assert found is not None
    assert found.epoch == 2**62
