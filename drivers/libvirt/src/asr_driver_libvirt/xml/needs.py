"""What a domain needs of its host beside its disks and networks. Pure: XML in, values out.

libvirt and QEMU look for most of it only when the machine is started; a missing file ends the start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import attrs
from lxml import etree

from asr_driver_libvirt.xml.domain import parse_xml

__all__ = ["BOOT_FILES", "HostNeeds", "host_needs", "numbers"]

BOOT_FILES = ("loader", "kernel", "initrd", "dtb", "shim")
"""Elements of <os> that name a file of the host."""

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"

# Element (and its attribute; without one its text) that names a file which must exist, and what it is for people.
_FILES = (
    *((f"os/{tag}", "", tag) for tag in BOOT_FILES),
    ("os/acpi/table", "", "ACPI table"),
    ("sysinfo[@type='fwcfg']/entry", "file", "firmware configuration"),
    ("devices/interface/rom", "file", "network card's ROM"),
    ("devices/hostdev/rom", "file", "host device's ROM"),
    ("devices/interface/script", "path", "network card's script"),
    ("devices/interface[@type='vhostuser']/source[@mode='client']", "path", "network card's socket"),
    ("devices/rng/backend[@model='random']", "", "source of random numbers"),
    ("devices/tpm/backend/device", "path", "TPM"),
    ("devices/input/source", "evdev", "input device"),
    ("devices/input/source", "dev", "input device"),
    ("devices/graphics/gl", "rendernode", "graphics device"),
    ("devices/video/model/acceleration", "rendernode", "graphics device"),
    ("devices/filesystem/source", "dir", "shared directory"),
    ("devices/filesystem/source", "socket", "shared directory's socket"),
    ("devices/filesystem/binary", "path", "shared directory's server"),
    ("devices/serial[@type='dev']/source", "path", "serial port"),
    ("devices/console[@type='dev']/source", "path", "console"),
    ("devices/parallel[@type='dev']/source", "path", "parallel port"),
    ("devices/memory/source/path", "", "persistent memory"),
)
# The same for files that QEMU makes: their directory must exist.
_MADE = (
    *((f"devices/{tag}[@type='file']/source", "path", "log of a port") for tag in ("serial", "console", "parallel")),
    *((f"devices/{tag}[@type='unix']/source", "path", "socket of a port") for tag in ("serial", "console", "channel")),
    *((f"devices/{tag}/log", "file", "log of a port") for tag in ("serial", "console", "channel", "parallel")),
    ("devices/graphics/listen[@type='socket']", "socket", "socket of the display"),
)
# Arguments of QEMU: options whose value is a file, and keys of values that name one which must exist.
_FILE_OPTIONS = ("-bios", "-kernel", "-initrd", "-dtb", "-pflash", "-L")
_FILE_KEYS = ("file", "romfile", "filename")
_MADE_BY_QEMU = ("-chardev", "-serial", "-monitor", "-qmp", "-debugcon", "-D", "-pidfile", "-trace", "-msg")


@attrs.frozen
class HostNeeds:
    """`files`: what must exist, by path, with what it is; `boot_files`: those that the machine boots from; `cpus` and
    `nodes`: numbers of the host's; `hugepages`: bytes of a page, 0 for the host's own size, None for no such pages."""

    files: dict[str, str]
    boot_files: tuple[str, ...]
    cpus: frozenset[int]
    nodes: frozenset[int]
    hugepages: int | None


def host_needs(xml: bytes | str, *, has_nvram: bool) -> HostNeeds:
    """Read a domain's XML. `has_nvram`: its UEFI variables are kept with the point, so no template is needed."""
    root = parse_xml(xml)
    files: dict[str, str] = {}
    for path, attribute, what in _FILES:
        for element in root.findall(path):
            _add(files, element.get(attribute, "") if attribute else element.text or "", what)
    if not has_nvram:
        for element in root.findall("os/nvram"):
            _add(files, element.get("template", ""), "template of the UEFI variables")
    for path, attribute, what in _MADE:
        for element in root.findall(path):
            made = element.get(attribute, "").strip()
            # libvirt makes the directory of its own channels; a socket that is connected to is another program's.
            if "/channel/" not in made and element.get("mode") != "connect":
                _add(files, made.rpartition("/")[0], f"directory for the {what}")
    arguments = [element.get("value", "") for element in root.findall(f"{_QEMU}commandline/{_QEMU}arg")]
    for file in _argument_files(arguments):
        _add(files, file, "argument of QEMU")
    return HostNeeds(
        files=files,
        boot_files=tuple(
            text for tag in BOOT_FILES if (text := (root.findtext(f"os/{tag}") or "").strip()).startswith("/")
        ),
        cpus=_numbers(root, "cpuset", "vcpu", "cputune/vcpupin", "cputune/emulatorpin", "cputune/iothreadpin"),
        nodes=_numbers(root, "nodeset", "numatune/memory", "numatune/memnode"),
        hugepages=_hugepages(root),
    )


def numbers(text: str) -> frozenset[int]:
    """A list as libvirt and the kernel write it: `0-3,^2,8`. What cannot be read is left out."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\^?)(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is not None:
            first = int(match[2])
            some = range(first, int(match[3] or first) + 1)
            found = found - set(some) if match[1] else found | set(some)
    return frozenset(found)


def _add(files: dict[str, str], path: str, what: str) -> None:
    path = path.strip()
    if path.startswith("/"):
        files.setdefault(path, what)


def _numbers(root: etree._Element, attribute: str, *paths: str) -> frozenset[int]:
    texts = [element.get(attribute, "") for path in paths for element in root.findall(path)]
    return frozenset().union(*map(numbers, texts))


def _hugepages(root: etree._Element) -> int | None:
    element = root.find("memoryBacking/hugepages")
    if element is None:
        return None
    pages = element.findall("page")
    if len(pages) != 1:
        return 0 if not pages else None  # several sizes for parts of the memory: not judged
    size, unit = pages[0].get("size", ""), pages[0].get("unit", "KiB")
    factor = {"B": 1, "KiB": 1 << 10, "KB": 1 << 10, "MiB": 1 << 20, "M": 1 << 20, "GiB": 1 << 30, "G": 1 << 30}
    return int(size) * factor[unit] if size.isdecimal() and unit in factor else None


def _argument_files(arguments: list[str]) -> Iterator[str]:
    before = ""
    for argument in arguments:
        if before in _FILE_OPTIONS:
            yield argument
        elif before not in _MADE_BY_QEMU:
            # A comma within a value is written twice.
            for part in re.split(r"(?<!,),(?!,)", argument):
                key, _, value = part.partition("=")
                if key in _FILE_KEYS or key.endswith((".filename", ".file")):
                    yield value.replace(",,", ",")
        before = argument
