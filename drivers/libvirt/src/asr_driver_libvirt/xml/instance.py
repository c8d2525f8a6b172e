"""From the domain of a recovery point to the domain of a machine created from it. Pure: XML in, XML out.

Only what must differ is edited; everything unknown stays as the user defined it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping

import attrs
from lxml import etree

from asr_driver_libvirt.xml.domain import METADATA_URI, parse_xml
from asrcore.model.protection import NetworkMap

__all__ = ["MADE_URI", "DiskFile", "Made", "element_text", "isolated_network", "made_of", "promoted", "test_machine"]

MADE_URI = METADATA_URI + "/made"
"""Namespace of the mark that says from which replica a domain was created."""

# Character devices that a second machine can have as well: private to each QEMU.
_PRIVATE = {"null", "vc", "stdio", "spicevmc", "qemu-vdagent"}

# What a card has of the network it was plugged into.
_OF_THE_SITE = ("source", "target", "virtualport", "filterref", "vlan", "ip", "route", "script", "backend", "bandwidth")


@attrs.frozen
class DiskFile:
    """An image in the place of a disk."""

    path: str
    format: str


@attrs.frozen
class Made:
    """The mark: of which replica and point, and "test" or "promotion" with an id."""

    replica_id: str
    point_id: str
    role: str
    role_id: str = ""


def test_machine(
    xml: bytes,
    *,
    machine_id: str,
    name: str,
    made: Made,
    disks: Mapping[str, DiskFile],
    nvram: str | None,
    network: str,
    exists: Callable[[str], bool],
) -> tuple[str, list[str]]:
    """The domain of a test, and the files that it will log to (they are deleted after it).

    It is isolated: its cards are all plugged into `network`, and devices of the host and shared directories are left
    out. `exists` says whether a file exists at the target.
    """
    root = _prepared(xml, made, disks, nvram, exists)
    _set_text(root, "name", name)
    _set_text(root, "uuid", machine_id)
    for entry in root.findall("sysinfo/system/entry[@name='uuid']"):
        entry.text = machine_id  # libvirt insists that both agree
    title = root.find("title")
    if title is not None:
        title.text = f"{(title.text or '').strip()} (test)"
    for path in ("hostdev", "filesystem", "shmem", "redirdev", "interface[@type='hostdev']"):
        for element in root.findall(f"devices/{path}"):
            _drop(element)
    for element in root.findall("devices/interface"):
        _plug_into_test(element, network)
    for element in root.findall("devices/graphics"):
        _free_graphics(element)
    for element in root.findall("devices/vsock/cid"):
        element.attrib.pop("address", "")
        element.set("auto", "yes")
    logs = _separate_character_devices(root, f".asr-test-{made.role_id}")
    return _text(root), logs


def promoted(
    xml: bytes,
    *,
    made: Made,
    disks: Mapping[str, DiskFile],
    nvram: str | None,
    networks: NetworkMap,
    known_networks: frozenset[str],
    exists: Callable[[str], bool],
) -> str:
    """The domain of a failover: the same name, UUID and MACs, its cards plugged into the mapped networks.

    `known_networks`: the networks that libvirt has at the target; other names are bridges.
    """
    root = _prepared(xml, made, disks, nvram, exists)
    for element in root.findall("devices/interface"):
        _plug_into_mapped(element, networks, known_networks)
    for element in root.findall("devices/channel[@type='unix']/source"):
        if "/channel/" in element.get("path", ""):
            _drop(element)  # libvirt's own path, of the domain at the source: it makes a new one
    return _text(root)


def made_of(xml: str | bytes) -> Made | None:
    """The mark in a domain's XML, or None."""
    element = parse_xml(xml).find(f"metadata/{{{MADE_URI}}}made")
    if element is None:
        return None
    return Made(*(element.get(name, "") for name in ("replica", "point", "role", "id")))


def element_text(element: etree._Element) -> str:
    """An element as XML."""
    return etree.tostring(element, encoding="unicode", with_tail=False)


def isolated_network(name: str, bridge: str) -> str:
    """An isolated network: no forwarding, no address of the host, no DHCP."""
    root = etree.Element("network")
    etree.SubElement(root, "name").text = name
    etree.SubElement(root, "bridge", name=bridge, stp="off", delay="0")
    etree.SubElement(root, "dns", enable="no")
    return etree.tostring(root, encoding="unicode")


# -- what both have in common ------------------------------------------------------------------------------------


def _prepared(
    xml: bytes, made: Made, disks: Mapping[str, DiskFile], nvram: str | None, exists: Callable[[str], bool]
) -> etree._Element:
    root = parse_xml(xml)
    if root.tag != "domain":
        raise ValueError(f"<{root.tag}> is not a domain")
    root.attrib.pop("id", "")
    for element in root.findall("seclabel[@type='dynamic']"):
        for child in element:
            if child.tag in ("label", "imagelabel"):  # of the process that ran at the source
                element.remove(child)
    _mark(root, made)
    for element in root.findall("devices/disk"):
        _replace_disk(element, disks, exists)
    emulator = root.find("devices/emulator")
    if emulator is not None and not exists((emulator.text or "").strip()):
        _drop(emulator)  # libvirt takes its own
    for element in root.findall("genid"):
        # A guest that asks (a domain controller) must learn that it continues from an earlier state.
        instance = f"{MADE_URI}/{made.replica_id}/{made.point_id}/{made.role_id}"
        element.text = str(uuid.uuid5(uuid.NAMESPACE_URL, instance))
    _set_nvram(root, nvram)
    return root


def _mark(root: etree._Element, made: Made) -> None:
    metadata = root.find("metadata")
    if metadata is None:
        metadata = etree.Element("metadata")
        place = root.find("uuid")
        root.insert(0 if place is None else root.index(place) + 1, metadata)
    for element in list(metadata):
        namespace = etree.QName(element).namespace if isinstance(element.tag, str) else None
        if namespace is not None and namespace.startswith(METADATA_URI):
            _drop(element)  # a fence belongs to the machine that it was put on
    etree.SubElement(
        metadata,
        f"{{{MADE_URI}}}made",
        nsmap={"asrmade": MADE_URI},
        replica=made.replica_id,
        point=made.point_id,
        role=made.role,
        id=made.role_id,
    )


def _replace_disk(element: etree._Element, disks: Mapping[str, DiskFile], exists: Callable[[str], bool]) -> None:
    target = element.find("target")
    disk_id = "" if target is None else target.get("dev", "")
    if element.get("device", "disk") not in ("disk", "lun"):
        source = element.find("source")
        path = "" if source is None else source.get("file") or source.get("dev") or ""
        if source is not None and not (path and exists(path)):
            _drop(source)  # the drive is empty
            if element.get("type") not in ("file", "block"):
                element.set("type", "file")
        for child in element.findall("backingStore"):
            _drop(child)
        return
    image = disks.get(disk_id)
    if image is None:
        _drop(element)  # it was not part of the point
        return
    element.set("type", "file")
    if element.get("device") == "lun":  # passing SCSI commands on needs the real unit
        element.set("device", "disk")
        for name in ("sgio", "rawio"):
            element.attrib.pop(name, "")
    for tag in ("backingStore", "mirror", "auth", "encryption", "reservations"):
        for child in element.findall(tag):
            _drop(child)
    driver = element.find("driver")
    if driver is None:
        driver = etree.Element("driver", name="qemu")
        element.insert(0, driver)
    driver.set("type", image.format)
    driver.attrib.pop("metadata_cache", "")
    source = element.find("source")
    if source is None:
        source = etree.Element("source")
        element.insert(element.index(driver) + 1, source)
    tail = source.tail
    source.clear()
    source.tail = tail
    source.set("file", image.path)


def _set_nvram(root: etree._Element, nvram: str | None) -> None:
    element = root.find("os/nvram")
    if nvram is None:
        return
    if element is None:
        parent = root.find("os")
        if parent is None:
            return
        element = etree.Element("nvram")
        loader = parent.find("loader")
        parent.insert(len(parent) if loader is None else parent.index(loader) + 1, element)
    for child in list(element):
        _drop(child)
    element.attrib.pop("type", "")
    element.text = nvram


# -- cards -------------------------------------------------------------------------------------------------------


def _plug_into_test(element: etree._Element, network: str) -> None:
    element.set("type", "network")
    for tag in _OF_THE_SITE:
        for child in element.findall(tag):
            _drop(child)
    for name in ("managed", "trustGuestRxFilters"):
        element.attrib.pop(name, "")
    mac = element.find("mac")
    source = etree.Element("source", network=network)
    element.insert(0 if mac is None else element.index(mac) + 1, source)


def _plug_into_mapped(element: etree._Element, networks: NetworkMap, known: frozenset[str]) -> None:
    source = element.find("source")
    if source is None or element.get("type") not in ("network", "bridge", "direct"):
        return
    named = next((name for name in ("network", "bridge", "dev") if source.get(name)), None)
    # A running domain's XML names the bridge beside the network: the network is what was defined.
    if named is None:
        return
    old = source.get(named, "")
    new = networks.target(old)
    for name in ("portid", "portgroup") if new != old else ("portid",):
        source.attrib.pop(name, "")
    if named == "network":
        source.attrib.pop("bridge", "")
    target = element.find("target")
    if target is not None and target.get("dev", "").startswith(("vnet", "macvtap", "macvlan")):
        _drop(target)
    if new == old:
        return
    source.attrib.pop(named, "")
    source.attrib.pop("mode", "")
    if new in known:
        element.set("type", "network")
        source.set("network", new)
    else:
        element.set("type", "bridge")
        source.set("bridge", new)
    for child in element.findall("virtualport"):
        _drop(child)  # of the switch at the source


# -- consoles ----------------------------------------------------------------------------------------------------


def _free_graphics(element: etree._Element) -> None:
    for name in ("port", "tlsPort", "websocket", "socket", "listen"):
        element.attrib.pop(name, "")
    for child in element.findall("listen"):
        _drop(child)
    if element.get("type") in ("vnc", "spice", "rdp"):
        element.set("autoport", "yes")


def _separate_character_devices(root: etree._Element, suffix: str) -> list[str]:
    """Give a test its own files and sockets, and remove what leads to the network or to devices of the host."""
    logs = [_with_suffix(log, "file", suffix) for log in root.findall("devices/*/log")]
    logs += [_with_suffix(log, "file", suffix) for log in root.findall("devices/rng/backend/log")]
    for tag in ("serial", "console", "parallel", "channel"):
        for element in root.findall(f"devices/{tag}"):
            logs += _separate(element, suffix)
    return sorted({path for path in logs if path})


def _separate(element: etree._Element, suffix: str) -> list[str]:
    kind = element.get("type", "")
    sources = element.findall("source")
    if kind == "file":
        return [_with_suffix(source, "path", suffix) for source in sources]
    if kind == "unix" and element.tag != "channel":
        if any(source.get("mode") == "connect" for source in sources):
            _make_null(element)
            return []
        return [_with_suffix(source, "path", suffix) for source in sources]
    if kind in ("pty", "unix"):
        for source in sources:
            _drop(source)  # libvirt makes its own
        element.attrib.pop("tty", "")
    elif kind not in _PRIVATE:
        _make_null(element)
    return []


def _with_suffix(element: etree._Element, name: str, suffix: str) -> str:
    path = element.get(name, "")
    if path:
        element.set(name, path + suffix)
        return path + suffix
    return ""


def _make_null(element: etree._Element) -> None:
    element.set("type", "null")
    for tag in ("source", "protocol"):
        for child in element.findall(tag):
            _drop(child)


# -- elements ----------------------------------------------------------------------------------------------------


def _drop(element: etree._Element) -> None:
    parent = element.getparent()
    if parent is not None:
        parent.remove(element)


def _set_text(root: etree._Element, path: str, text: str) -> None:
    element = root.find(path)
    if element is None:
        element = etree.Element(path)
        root.insert(0, element)
    element.text = text


def _text(root: etree._Element) -> str:
    return etree.tostring(root, encoding="unicode")
