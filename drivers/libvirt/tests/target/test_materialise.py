"""From the domain of a point to the domain of an instance: only what must differ is changed."""

from __future__ import annotations

import pytest
from lxml import etree

from asr_driver_libvirt.xml.domain import METADATA_URI, parse_xml
from asr_driver_libvirt.xml.instance import DiskFile, Made, isolated_network, made_of, promoted, test_machine
from asrcore.model.protection import NetworkMap

test_machine.__test__ = False  # type: ignore[attr-defined]

XML = f"""<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <uuid>11111111-1111-4111-8111-111111111111</uuid>
  <genid>22222222-2222-4222-8222-222222222222</genid>
  <title>shop</title>
  <metadata>
    <user:note xmlns:user='http://example.com/user'>mine</user:note>
    <asr:fence xmlns:asr='{METADATA_URI}' epoch='3' reason='x'/>
  </metadata>
  <sysinfo type='smbios'><system><entry name='uuid'>11111111-1111-4111-8111-111111111111</entry>
    <entry name='serial'>S1</entry></system></sysinfo>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>
  </os>
  <vcpu placement='static' cpuset='0-1'>4</vcpu>
  <devices>
    <emulator>/opt/own/qemu</emulator>
    <disk type='file' device='disk' snapshot='no'>
      <driver name='qemu' type='raw' cache='none' discard='unmap' iothread='1'/>
      <source file='/home/web.img' index='2'><seclabel model='dac' relabel='no'/></source>
      <backingStore type='file'><format type='qcow2'/><source file='/home/base'/></backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>DISK-1</serial>
      <boot order='1'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
    <disk type='block' device='lun' sgio='unfiltered'><driver name='qemu' type='raw'/><source dev='/dev/sdx'/>
      <target dev='sda' bus='scsi'/></disk>
    <disk type='file' device='disk'><source file='/home/skip'/><target dev='vdz' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/iso/debian.iso'/><target dev='sdb' bus='sata'/><readonly/></disk>
    <interface type='bridge'>
      <mac address='52:54:00:00:00:01'/><source bridge='br0'/><virtualport type='openvswitch'/>
      <vlan><tag id='42'/></vlan><target dev='vnet3'/><model type='virtio'/><filterref filter='clean-traffic'/>
    </interface>
    <interface type='network'>
      <mac address='52:54:00:00:00:02'/><source network='lan' portid='p' bridge='virbr0'/><model type='e1000'/>
    </interface>
    <interface type='hostdev'><mac address='52:54:00:00:00:03'/>
      <source><address type='pci' domain='0' bus='1' slot='0' function='0'/></source></interface>
    <serial type='file'><source path='/log/web.log' append='on'/><target port='0'/></serial>
    <serial type='tcp'><source mode='bind' host='0.0.0.0' service='4444'/><protocol type='raw'/>
      <target port='1'/></serial>
    <serial type='pty'><source path='/dev/pts/3'/><log file='/log/pty.log'/><target port='2'/></serial>
    <channel type='unix'><source mode='bind' path='/run/libvirt/qemu/channel/7-web/org.qemu.guest_agent.0'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
    <graphics type='vnc' port='5907' autoport='no' listen='10.1.1.1'>
      <listen type='address' address='10.1.1.1'/></graphics>
    <hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/></source></hostdev>
    <filesystem type='mount'><source dir='/export'/><target dir='x'/></filesystem>
    <vsock><cid auto='no' address='3'/></vsock>
    <unheard-of flavour='new'><child/></unheard-of>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+64055</label>
    <imagelabel>+0:+0</imagelabel></seclabel>
  <qemu:commandline><qemu:arg value='-foo'/></qemu:commandline>
</domain>""".encode()

DISKS = {"vda": DiskFile("/r/vda.qcow2", "qcow2"), "sda": DiskFile("/r/sda.qcow2", "qcow2")}
NEW = "33333333-3333-4333-8333-333333333333"


def exists(path: str) -> bool:
    return path.startswith("/iso")


@pytest.fixture
def tested() -> tuple[etree._Element, list[str]]:
    xml, logs = test_machine(
        XML,
        machine_id=NEW,
        name="web-test",
        made=Made("r1", "p1", "test", "t1"),
        disks=DISKS,
        nvram="/r/nvram.fd",
        network="asr-test-1",
        exists=exists,
    )
    return parse_xml(xml), logs


def real(networks: dict[str, str], nvram: str | None = "/r/nvram.fd") -> etree._Element:
    return parse_xml(
        promoted(
            XML,
            made=Made("r1", "p1", "promotion"),
            disks=DISKS,
            nvram=nvram,
            networks=NetworkMap(networks),
            known_networks=frozenset({"lan", "away"}),
            exists=exists,
        )
    )


def test_both_keep_what_they_do_not_know(tested: tuple[etree._Element, list[str]]) -> None:
    for root in (tested[0], real({})):
        assert root.find("devices/unheard-of[@flavour='new']/child") is not None
        assert root.find("{http://libvirt.org/schemas/domain/qemu/1.0}commandline") is not None
        assert root.find("metadata/{http://example.com/user}note") is not None
        assert root.find("vcpu[@cpuset='0-1']") is not None
        disk = root.find("devices/disk")
        assert disk is not None
        assert disk.findtext("serial") == "DISK-1"
        assert disk.find("address[@bus='0x04']") is not None
        assert disk.find("driver[@discard='unmap'][@iothread='1'][@cache='none']") is not None


def test_both_have_the_points_disks_and_no_others(tested: tuple[etree._Element, list[str]]) -> None:
    for root in (tested[0], real({})):
        found = {
            disk.find("target").get("dev"): (  # type: ignore[union-attr]
                disk.get("type"),
                disk.get("device"),
                disk.find("driver").get("type"),  # type: ignore[union-attr]
                dict(disk.find("source").attrib),  # type: ignore[union-attr]
            )
            for disk in root.findall("devices/disk")
            if disk.get("device") != "cdrom"
        }
        assert found == {
            "vda": ("file", "disk", "qcow2", {"file": "/r/vda.qcow2"}),
            "sda": ("file", "disk", "qcow2", {"file": "/r/sda.qcow2"}),
        }
        assert b"/home/" not in etree.tostring(root)
        assert root.find("devices/disk/backingStore") is None
        assert root.find("devices/disk[@device='cdrom']/source[@file='/iso/debian.iso']") is not None


def test_both_forget_the_host_they_ran_on(tested: tuple[etree._Element, list[str]]) -> None:
    for root in (tested[0], real({})):
        assert root.get("id") is None
        assert root.find("seclabel/label") is None
        assert root.find("devices/emulator") is None, "that path does not exist here: libvirt uses its own"
        assert root.findtext("os/nvram") == "/r/nvram.fd"
        assert root.find("os/nvram[@template='/usr/share/OVMF/OVMF_VARS_4M.fd']") is not None
        assert root.find("devices/channel/source") is None
        assert root.find(f"metadata/{{{METADATA_URI}}}fence") is None
        assert root.findtext("genid") not in (None, "22222222-2222-4222-8222-222222222222")


def test_marks_tell_what_a_domain_was_made_of(tested: tuple[etree._Element, list[str]]) -> None:
    assert made_of(etree.tostring(tested[0])) == Made("r1", "p1", "test", "t1")
    assert made_of(etree.tostring(real({}))) == Made("r1", "p1", "promotion")
    assert made_of(XML) is None


def test_a_test_leads_nowhere(tested: tuple[etree._Element, list[str]]) -> None:
    root, logs = tested
    assert root.findtext("name") == "web-test"
    assert root.findtext("uuid") == root.findtext("sysinfo/system/entry[@name='uuid']") == NEW
    assert root.findtext("sysinfo/system/entry[@name='serial']") == "S1"
    cards = root.findall("devices/interface")
    assert [mac.get("address", "")[-2:] for mac in root.findall("devices/interface/mac")] == ["01", "02"]
    for card in cards:
        assert card.get("type") == "network"
        assert [dict(source.attrib) for source in card.findall("source")] == [{"network": "asr-test-1"}]
        assert not {child.tag for child in card} & {"vlan", "virtualport", "filterref", "target"}
    for path in ("hostdev", "filesystem", "graphics/listen", "graphics[@port]"):
        assert root.find(f"devices/{path}") is None, path
    assert root.find("devices/vsock/cid[@auto='yes']") is not None
    serials = root.findall("devices/serial")
    assert [serial.get("type") for serial in serials] == ["file", "null", "pty"]
    assert logs == ["/log/pty.log.asr-test-t1", "/log/web.log.asr-test-t1"]
    assert root.find("devices/serial/source[@path='/log/web.log.asr-test-t1']") is not None


def test_promoted_is_the_machine_itself(tested: tuple[etree._Element, list[str]]) -> None:
    root = real({})
    assert root.findtext("name") == "web"
    assert root.findtext("uuid") == "11111111-1111-4111-8111-111111111111"
    assert root.findtext("title") == "shop"
    assert root.find("devices/serial/source[@path='/log/web.log']") is not None
    assert root.find("devices/hostdev") is not None
    first, second, _ = root.findall("devices/interface")
    assert dict(first.find("source").attrib) == {"bridge": "br0"}  # type: ignore[union-attr]
    assert first.find("virtualport") is not None
    assert dict(second.find("source").attrib) == {"network": "lan"}  # type: ignore[union-attr]


def test_promoted_cards_follow_the_mapping() -> None:
    root = real({"br0": "away", "lan": "br9"})
    first, second, _ = root.findall("devices/interface")
    assert (first.get("type"), dict(first.find("source").attrib)) == ("network", {"network": "away"})  # type: ignore[union-attr]
    assert first.find("virtualport") is None
    assert first.find("vlan") is not None
    assert (second.get("type"), dict(second.find("source").attrib)) == ("bridge", {"bridge": "br9"})  # type: ignore[union-attr]


def test_isolated_network_has_no_way_out() -> None:
    root = parse_xml(isolated_network("asr-test-1", "asrt1"))
    assert root.find("forward") is None
    assert root.find("ip") is None
    assert root.find("bridge[@name='asrt1']") is not None


@pytest.mark.parametrize(
    "text", [b"", b"<x/>", b"<domain", b"not xml", b"<!DOCTYPE d [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><x>&e;</x>"]
)
def test_what_is_no_domain_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        promoted(
            text,
            made=Made("r", "p", "promotion"),
            disks={},
            nvram=None,
            networks=NetworkMap(),
            known_networks=frozenset(),
            exists=exists,
        )
