"""What a domain needs of its host, read from its XML."""

from __future__ import annotations

import pytest

from asr_driver_libvirt.xml.needs import host_needs, numbers

QEMU = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"


def files(inside: str, *, has_nvram: bool = True) -> list[str]:
    return sorted(host_needs(f"<domain type='kvm' {QEMU}>{inside}</domain>", has_nvram=has_nvram).files)


def arguments(*values: str) -> list[str]:
    return files("<qemu:commandline>" + "".join(f"<qemu:arg value='{item}'/>" for item in values)
                 + "</qemu:commandline>")  # fmt: skip


@pytest.mark.parametrize(
    "inside",
    [
        "<os><loader type='rom'>/f</loader></os>",
        "<os><kernel>/f</kernel></os>",
        "<os><initrd> /f\n</initrd></os>",
        "<os><dtb>/f</dtb></os>",
        "<os><acpi><table type='slic'>/f</table></acpi></os>",
        "<sysinfo type='fwcfg'><entry name='opt/com.coreos/config' file='/f'/></sysinfo>",
        "<devices><interface type='network'><rom file='/f'/></interface></devices>",
        "<devices><rng><backend model='random'>/f</backend></rng></devices>",
        "<devices><tpm><backend type='passthrough'><device path='/f'/></backend></tpm></devices>",
        "<devices><input type='evdev'><source dev='/f'/></input></devices>",
        "<devices><filesystem type='mount'><source dir='/f'/><target dir='x'/></filesystem></devices>",
        "<devices><serial type='dev'><source path='/f'/></serial></devices>",
        "<devices><serial type='file'><source path='/f/serial.log'/></serial></devices>",
        "<devices><serial type='unix'><source mode='bind' path='/f/serial.sock'/></serial></devices>",
        "<devices><serial type='pty'><log file='/f/serial.log'/></serial></devices>",
        "<devices><graphics type='vnc'><listen type='socket' socket='/f/vnc'/></graphics></devices>",
        "<devices><graphics type='spice'><gl enable='yes' rendernode='/f'/></graphics></devices>",
    ],
)
def test_a_file_of_the_host_is_named(inside: str) -> None:
    assert files(inside) == ["/f"]


@pytest.mark.parametrize(
    "inside",
    [
        "<os firmware='efi'/>",
        "<sysinfo type='fwcfg'><entry name='opt/x'>text</entry></sysinfo>",
        "<devices><disk type='file'><source file='/f'/></disk><emulator>/f</emulator></devices>",
        "<devices><channel type='unix'><source mode='bind' path='/v/channel/target/x/a.0'/></channel></devices>",
        "<devices><serial type='unix'><source mode='connect' path='/f/x'/></serial></devices>",
        "<devices><interface type='network'><source network='lan'/></interface></devices>",
    ],
)
def test_what_the_host_need_not_have_is_not_named(inside: str) -> None:
    assert files(inside) == []


def test_a_template_is_needed_only_without_variables() -> None:
    inside = "<os><nvram template='/t'>/x</nvram></os>"
    assert files(inside) == []
    assert files(inside, has_nvram=False) == ["/t"]


def test_arguments_of_qemu() -> None:
    assert arguments("-fw_cfg", "name=opt/com.coreos/config,file=/srv/images/core.ign") == ["/srv/images/core.ign"]
    assert arguments("-acpitable", "sig=SLIC,file=/a", "-smbios", "file=/b") == ["/a", "/b"]
    assert arguments("-device", "e1000,romfile=/a,,b") == ["/a,b"]
    assert arguments("-blockdev", "driver=raw,file.filename=/a") == ["/a"]
    assert arguments("-bios", "/a", "-kernel", "/b") == ["/a", "/b"]
    assert arguments("-chardev", "file,id=c,path=/made", "-debugcon", "file:/made", "-D", "/made") == []
    assert arguments("-fw_cfg", "name=opt/x,string=file", "-device", "isa-debugcon,chardev=c") == []


def test_processors_and_nodes() -> None:
    needs = host_needs(
        "<domain><vcpu cpuset='0-3,^2'>2</vcpu><cputune><vcpupin vcpu='0' cpuset='9'/></cputune>"
        "<numatune><memory mode='strict' nodeset='1'/></numatune></domain>",
        has_nvram=True,
    )
    assert needs.cpus == frozenset({0, 1, 3, 9})
    assert needs.nodes == frozenset({1})
    assert numbers("0-2,x,,^1") == {0, 2}


@pytest.mark.parametrize(
    ("inside", "size"),
    [
        ("", None),
        ("<hugepages/>", 0),
        ("<hugepages><page size='2048' unit='KiB'/></hugepages>", 2 << 20),
        ("<hugepages><page size='1' unit='G'/></hugepages>", 1 << 30),
        ("<hugepages><page size='1' unit='G' nodeset='0'/><page size='2' unit='M'/></hugepages>", None),
    ],
)
def test_hugepages(inside: str, size: int | None) -> None:
    needs = host_needs(f"<domain><memoryBacking>{inside}</memoryBacking></domain>", has_nvram=True)
    assert needs.hugepages == size
