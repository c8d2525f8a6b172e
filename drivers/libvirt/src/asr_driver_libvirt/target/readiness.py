"""Readiness of a site as a target for a machine: facts are gathered, then judged by a pure function."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import libvirt
from lxml import etree

from asr_driver_libvirt.failover.instances import domain_xml
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.xml.description import DOMAIN_XML, NVRAM
from asr_driver_libvirt.xml.domain import FENCE_URI, parse_domain, parse_xml
from asr_driver_libvirt.xml.instance import made_of
from asr_driver_libvirt.xml.needs import HostNeeds, host_needs, numbers
from asr_storage.replica.store import Layout, ReplicaKind, probe_kind
from asrcore.driver import PromoteSpec
from asrcore.errors import AsrError
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import Description, Firmware
from asrcore.model.policy import Policy
from asrcore.units import KiB, MiB, format_size

__all__ = ["TargetFacts", "failover_findings", "findings", "judged"]

_ERROR, _WARNING, _INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

_LEAST_FREE = 16 * MiB


@attrs.frozen
class TargetFacts:
    """What is known of the site, for one machine. `namesake`, `twin`: what already has its name or its UUID there.

    `twin_power`: "running", "off" or "fenced". `capabilities`: libvirt's own XML for the machine's kind of domain,
    or the reason why there is none. `missing_files`: by path, what they are. `hugepages`: what is wrong with them.
    """

    kind: ReplicaKind | None
    problem: str
    total: int
    free: int
    networks: frozenset[str]
    bridges: frozenset[str]
    namesake: bool = False
    twin_power: str = ""
    capabilities: str = ""
    unsupported: str = ""
    missing_boot_files: tuple[str, ...] = ()
    missing_files: Mapping[str, str] = attrs.field(factory=dict)
    stopped_networks: frozenset[str] = frozenset()
    missing_cpus: frozenset[int] = frozenset()
    missing_nodes: frozenset[int] = frozenset()
    hugepages: str = ""


def findings(host: LibvirtHost, layout: Layout, description: Description, policy: Policy) -> list[Finding]:
    """Ask the site and judge. Raises SiteUnreachable, AccessDenied."""
    return judged(_gather(host, layout, description), str(layout.path), description)


def failover_findings(host: LibvirtHost, layout: Layout, description: Description, spec: PromoteSpec) -> list[Finding]:
    """The same for a failover now, to the mapped networks: what libvirt would refuse is an ERROR."""
    machine = description.machine
    nics = tuple(attrs.evolve(nic, network=spec.networks.target(nic.network)) for nic in machine.nics)
    description = attrs.evolve(description, machine=attrs.evolve(machine, nics=nics))
    return judged(_gather(host, layout, description, spec.replica_id), str(layout.path), description, failover=True)


# -- facts -------------------------------------------------------------------------------------------------------


def _gather(host: LibvirtHost, layout: Layout, description: Description, replica_id: str = "") -> TargetFacts:
    """`replica_id`: a machine that was made of this replica is not in the way."""
    kind, problem, total, free = _storage(layout)
    machine = description.machine
    xml = domain_xml(description, emulated=host.settings.emulates)
    with host.guard("asking what the site can run"):
        conn = host.conn()
        networks = {network.name(): bool(network.isActive()) for network in conn.listAllNetworks()}
        domains = conn.listAllDomains()
        namesake = any(item.name() == machine.name and item.UUIDString() != machine.id for item in domains)
        twin = next((item for item in domains if item.UUIDString() == machine.id), None)
        twin_power = "" if twin is None else _power(twin, replica_id)
        capabilities, unsupported = _capabilities(conn, xml)
    needs = host_needs(xml, has_nvram=description.artifact(NVRAM) is not None)
    missing = {path: what for path, what in needs.files.items() if _is_missing(path)}
    return TargetFacts(
        kind=kind,
        problem=problem,
        total=total,
        free=free,
        networks=frozenset(networks),
        bridges=_links(),
        namesake=namesake,
        twin_power=twin_power,
        capabilities=capabilities,
        unsupported=unsupported,
        missing_boot_files=tuple(path for path in missing if path in needs.boot_files),
        missing_files={path: what for path, what in missing.items() if path not in needs.boot_files},
        stopped_networks=frozenset(name for name, active in networks.items() if not active),
        missing_cpus=_absent(needs.cpus, "/sys/devices/system/cpu/online"),
        missing_nodes=_absent(needs.nodes, "/sys/devices/system/node/online"),
        hugepages=_hugepages(needs, machine.memory),
    )


def _is_missing(path: str) -> bool:
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False  # it cannot be seen by this user; libvirt's may
    return False


def _absent(wanted: frozenset[int], online: str) -> frozenset[int]:
    """Of processors or nodes: those that the host, which is also this one, does not have."""
    try:
        return wanted - numbers(Path(online).read_text())
    except OSError:
        return frozenset()


def _hugepages(needs: HostNeeds, memory: int) -> str:
    if needs.hugepages is None:
        return ""
    try:
        size = needs.hugepages
        if not size:
            found = re.search(r"^Hugepagesize:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
            size = int(found[1]) * KiB if found else 0
        pages = Path(f"/sys/kernel/mm/hugepages/hugepages-{size // KiB}kB/free_hugepages")
        free = int(pages.read_text()) * size if size and pages.exists() else 0
    except (OSError, ValueError):
        return ""
    if free >= memory:
        return ""
    return f"{format_size(memory)} of huge pages are needed, {format_size(free)} are free"


def _storage(layout: Layout) -> tuple[ReplicaKind | None, str, int, int]:
    try:
        layout.check()
        status = os.statvfs(layout.path)
        total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
        return probe_kind(layout.path), "", total, free
    except (OSError, AsrError) as problem:
        return None, str(problem), 0, 0


def _power(domain: libvirt.virDomain, replica_id: str) -> str:
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    made = made_of(xml)
    if replica_id and made is not None and (made.replica_id, made.role) == (replica_id, "promotion"):
        return ""  # it was made by this failover, which is repeated
    if domain.isActive():
        return "running"
    return "off" if parse_xml(xml).find(f"metadata/{{{FENCE_URI}}}fence") is None else "fenced"


def _capabilities(conn: libvirt.virConnect, xml: bytes) -> tuple[str, str]:
    root = parse_xml(xml)
    kind = root.find("os/type")
    arch, machine = ("", "") if kind is None else (kind.get("arch", ""), kind.get("machine", ""))
    try:
        return conn.getDomainCapabilities(None, arch or None, machine or None, root.get("type"), 0), ""
    except libvirt.libvirtError as problem:
        wrong = (libvirt.VIR_ERR_INVALID_ARG, libvirt.VIR_ERR_CONFIG_UNSUPPORTED, libvirt.VIR_ERR_NO_SUPPORT)
        if problem.get_error_code() not in wrong:
            raise
        return "", problem.get_error_message() or str(problem)


def _links() -> frozenset[str]:
    """Network devices of this host, which is also the site's host."""
    try:
        return frozenset(path.name for path in Path("/sys/class/net").iterdir())
    except OSError:
        return frozenset()


# -- judgement ---------------------------------------------------------------------------------------------------


def judged(facts: TargetFacts, where: str, description: Description, *, failover: bool = False) -> list[Finding]:
    """All findings, errors first. `failover`: for one that is to happen now, else for protection."""
    # Until a failover it can be repaired, and replication needs none of it.
    refused = _ERROR if failover else _WARNING
    found = [
        *_about_storage(facts, where, description, failover),
        *_about_names(facts, description, refused),
        *_about_hardware(facts, description),
        *_about_host(facts, refused),
        *_about_networks(facts, description, refused),
    ]
    order = [_ERROR, _WARNING, _INFO]
    return sorted(found, key=lambda item: order.index(item.severity))


def _about_storage(facts: TargetFacts, where: str, description: Description, failover: bool) -> Iterator[Finding]:
    if facts.kind is None:
        yield Finding(
            "replica-dir-unusable",
            _ERROR,
            f"{where} cannot hold replicas",
            facts.problem,
            "Mount it, make it writable for this user, or set another: `asr site update NAME --set replica_dir=...`.",
        )
        return
    if failover:
        return  # a machine of a point needs space only for what it writes
    yield Finding(
        "replica-kind",
        _INFO,
        f"replicas in {where} are of kind {facts.kind.value}; {format_size(facts.free)} are free",
        "The file system clones files." if facts.kind is ReplicaKind.REFLINK else "The file system cannot clone files.",
        "No action needed; XFS or btrfs makes recovery points cheaper."
        if facts.kind is ReplicaKind.CHAIN
        else "No action needed.",
    )
    wanted = sum(disk.size for disk in description.machine.disks)
    if facts.free < _LEAST_FREE:
        yield Finding(
            "target-full",
            _ERROR,
            f"only {format_size(facts.free)} are free in {where}",
            "A replica needs space for the initial copy, for changes and for recovery points.",
            "Free or add space there.",
        )
    elif facts.free < wanted:
        yield Finding(
            "target-small",
            _WARNING,
            f"{format_size(facts.free)} are free in {where}, the machine's disks have {format_size(wanted)}",
            "Only allocated data is copied; how much that is becomes known during the copy. Points need space as well.",
            "Add space before the machine fills its disks.",
        )


def _about_names(facts: TargetFacts, description: Description, refused: Severity) -> Iterator[Finding]:
    name = description.machine.name
    if facts.namesake:
        yield Finding(
            "name-taken",
            _ERROR,
            f"another machine at the target is named {name}",
            "A failover keeps the machine's name, and names are unique in libvirt.",
            "Rename one of the two.",
        )
    if facts.twin_power == "running":
        yield Finding(
            "twin-running",
            _ERROR,
            f"{name} is already running at the target",
            "A machine with the same UUID is running there; both of them would write.",
            "Stop it there and quarantine or undefine it.",
        )
    elif facts.twin_power == "off":
        yield Finding(
            "twin-defined",
            refused,
            f"{name} is already defined at the target, and not quarantined",
            "A failover refuses to replace a machine that is not quarantined.",
            "Undefine it there before a failover (its disks are kept), unless it is the one to fail back to.",
        )


def _about_hardware(facts: TargetFacts, description: Description) -> Iterator[Finding]:
    if facts.unsupported:
        yield Finding(
            "domain-unsupported",
            _ERROR,
            "the target cannot run machines of this kind",
            facts.unsupported,
            "Install the emulator, or a version of QEMU that knows this machine type, at the target.",
        )
    for path in facts.missing_boot_files:
        yield Finding(
            "boot-file-missing",
            _ERROR,
            f"{path} is missing at the target",
            "The machine boots from this file of the host (firmware or kernel), which is not on its disks.",
            "Install or copy it there, under the same path.",
        )
    if description.artifact(DOMAIN_XML) is None:  # else it runs so at the source
        yield from _about_sectors(description)
    if not facts.capabilities:
        return
    root = parse_xml(facts.capabilities)
    if description.machine.firmware is Firmware.UEFI and root.find("os/loader/value") is None:
        yield Finding(
            "firmware-missing",
            _ERROR,
            "the target has no UEFI firmware",
            "libvirt finds no OVMF image there.",
            "Install it (Debian: apt-get install ovmf).",
        )
    xml = description.artifact(DOMAIN_XML)
    if xml is not None:
        yield from _about_devices(parse_xml(xml), root)
    model = parse_xml(xml).find("cpu/model") if xml is not None else None
    mode = parse_domain(xml).cpu_mode if xml is not None else ""
    if mode in ("host-passthrough", "host-model", "maximum"):
        offered = root.find(f"cpu/mode[@name='{mode}']")
        if offered is None or offered.get("supported") != "yes":
            yield _cpu(_ERROR, f"CPU mode {mode} is not possible at the target")
        elif mode == "host-passthrough":
            yield _cpu(_WARNING, "the machine sees its host's own CPU, which may differ at the target")
    elif model is not None and model.text:
        known = {item.text: item.get("usable") for item in root.findall("cpu/mode[@name='custom']/model")}
        if model.text not in known:
            yield _cpu(_ERROR, f"CPU model {model.text} is not known at the target")
        elif known[model.text] == "no":
            yield _cpu(_WARNING, f"CPU model {model.text} has features that the target's CPU lacks")


def _about_sectors(description: Description) -> Iterator[Finding]:
    """QEMU emulates IDE and SATA disks with sectors of 512 bytes only, and SeaBIOS boots from no others."""
    machine = description.machine
    for number, disk in enumerate(machine.disks):
        boots = not number and machine.firmware is Firmware.BIOS
        if disk.sector_size != 512 and (boots or disk.bus in ("ide", "sata")):
            yield Finding(
                "sector-size",
                _ERROR,
                f"disk {disk.id} has sectors of {disk.sector_size} bytes, with which the replica cannot start",
                "A BIOS boots from sectors of 512 bytes only."
                if boots
                else f"A disk on {disk.bus} has 512 bytes only.",
                "Let the machine boot with UEFI and have virtio drivers in its initramfs, or move it to a disk with "
                "sectors of 512 bytes.",
            )


# What a domain asks for, and where the capabilities list what is offered.
_DEVICES = (
    ("graphics", "devices/graphics", "type", "type"),
    ("video", "devices/video/model", "type", "modelType"),
    ("tpm", "devices/tpm/backend", "type", "backendModel"),
    ("rng", "devices/rng/backend", "model", "backendModel"),
)


def _about_devices(domain: etree._Element, capabilities: etree._Element) -> Iterator[Finding]:
    for tag, path, attribute, enum in _DEVICES:
        wanted = {element.get(attribute, "") for element in domain.findall(path)} - {"", "none"}
        device = capabilities.find(f"devices/{tag}")
        if not wanted or device is None:
            continue  # an older libvirt does not list it
        offered = {value.text for value in device.findall(f"enum[@name='{enum}']/value")}
        if device.get("supported") == "no":
            offered = set()
        elif not offered:
            continue
        for kind in sorted(wanted - {text for text in offered if text}):
            yield Finding(
                "device-unsupported",
                _ERROR,
                f"the target has no {tag} of type {kind}",
                "Its emulator or libvirt was built without it, or a program for it is not installed.",
                "Install it at the target, or give the machine another device.",
            )


def _about_host(facts: TargetFacts, refused: Severity) -> Iterator[Finding]:
    for path, what in facts.missing_files.items():
        yield Finding(
            "host-file-missing",
            refused,
            f"{path} is missing at the target ({what})",
            "The machine's definition names this file of the host, and the machine does not start without it.",
            "Copy or create it there, under the same path.",
        )
    absent = [f"CPU {number}" for number in sorted(facts.missing_cpus)]
    absent += [f"NUMA node {number}" for number in sorted(facts.missing_nodes)]
    if absent:
        yield Finding(
            "host-cpus-missing",
            refused,
            f"the machine is bound to {', '.join(absent)}, which the target does not have",
            "Its definition binds it to processors or NUMA nodes of its host.",
            "Bind the machine to those that both hosts have, or to none (`virsh vcpupin`, `virsh numatune`).",
        )
    if facts.hugepages:
        yield Finding(
            "hugepages-missing",
            refused,
            f"the target has too few huge pages: {facts.hugepages}",
            "The machine's memory is backed by huge pages.",
            "Reserve them there (`/proc/sys/vm/nr_hugepages`), or define the machine without.",
        )


def _cpu(severity: Severity, what: str) -> Finding:
    return Finding(
        "cpu-unsupported",
        severity,
        what,
        "A machine may not boot where it finds different CPU features.",
        "Give the machine a CPU model that both hosts have (`virsh hypervisor-cpu-baseline`).",
    )


def _about_networks(facts: TargetFacts, description: Description, refused: Severity) -> Iterator[Finding]:
    for network in sorted({nic.network for nic in description.machine.nics if nic.network}):
        if network not in facts.networks and network not in facts.bridges:
            yield Finding(
                "network-missing",
                refused,
                f"the target has no network {network}",
                "A failover plugs the machine into a network of that name unless it is mapped to another.",
                f"Map it (`asr protect --network {network}=OTHER`), or define it at the target.",
            )
        elif network in facts.stopped_networks and network not in facts.bridges:
            yield Finding(
                "network-stopped",
                refused,
                f"network {network} is not active at the target",
                "libvirt starts no machine that is plugged into it.",
                f"Start it there: `virsh net-start {network}`, and `virsh net-autostart {network}`.",
            )
