"""Readiness of a site as a target for a machine: facts are gathered, then judged by a pure function."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import attrs
import libvirt

from asr_driver_libvirt.failover.instances import domain_xml
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.xml.description import DOMAIN_XML
from asr_driver_libvirt.xml.domain import FENCE_URI, parse_domain, parse_xml
from asr_storage.replica.store import Layout, ReplicaKind, probe_kind
from asrcore.errors import AsrError
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import Description, Firmware
from asrcore.model.policy import Policy
from asrcore.units import MiB, format_size

__all__ = ["TargetFacts", "findings", "judged"]

_ERROR, _WARNING, _INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

_LEAST_FREE = 16 * MiB


@attrs.frozen
class TargetFacts:
    """What is known of the site, for one machine. `namesake`, `twin`: what already has its name or its UUID there.

    `twin_power`: "running", "off" or "fenced". `capabilities`: libvirt's own XML for the machine's kind of domain,
    or the reason why there is none.
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
    missing_files: tuple[str, ...] = ()


def findings(host: LibvirtHost, layout: Layout, description: Description, policy: Policy) -> list[Finding]:
    """Ask the site and judge. Raises SiteUnreachable, AccessDenied."""
    return judged(_gather(host, layout, description), str(layout.path), description)


# -- facts -------------------------------------------------------------------------------------------------------


def _gather(host: LibvirtHost, layout: Layout, description: Description) -> TargetFacts:
    kind, problem, total, free = _storage(layout)
    machine = description.machine
    xml = domain_xml(description, emulated=host.settings.emulates)
    with host.guard("asking what the site can run"):
        conn = host.conn()
        networks = frozenset(network.name() for network in conn.listAllNetworks())
        domains = conn.listAllDomains()
        namesake = any(item.name() == machine.name and item.UUIDString() != machine.id for item in domains)
        twin = next((item for item in domains if item.UUIDString() == machine.id), None)
        twin_power = "" if twin is None else _power(twin)
        capabilities, unsupported = _capabilities(conn, xml)
    missing = tuple(path for path in _boot_files(xml) if not Path(path).exists())
    return TargetFacts(
        kind=kind,
        problem=problem,
        total=total,
        free=free,
        networks=networks,
        bridges=_links(),
        namesake=namesake,
        twin_power=twin_power,
        capabilities=capabilities,
        unsupported=unsupported,
        missing_files=missing,
    )


def _storage(layout: Layout) -> tuple[ReplicaKind | None, str, int, int]:
    try:
        layout.check()
        status = os.statvfs(layout.path)
        total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
        return probe_kind(layout.path), "", total, free
    except (OSError, AsrError) as problem:
        return None, str(problem), 0, 0


def _power(domain: libvirt.virDomain) -> str:
    root = parse_xml(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    if domain.isActive():
        return "running"
    return "off" if root.find(f"metadata/{{{FENCE_URI}}}fence") is None else "fenced"


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


def _boot_files(xml: bytes) -> list[str]:
    root = parse_xml(xml)
    texts = (root.findtext(f"os/{tag}") or "" for tag in ("loader", "kernel", "initrd", "dtb"))
    return [text.strip() for text in texts if text.strip().startswith("/")]


def _links() -> frozenset[str]:
    """Network devices of this host, which is also the site's host."""
    try:
        return frozenset(path.name for path in Path("/sys/class/net").iterdir())
    except OSError:
        return frozenset()


# -- judgement ---------------------------------------------------------------------------------------------------


def judged(facts: TargetFacts, where: str, description: Description) -> list[Finding]:
    """All findings, errors first."""
    found = [
        *_about_storage(facts, where, description),
        *_about_names(facts, description),
        *_about_hardware(facts, description),
        *_about_networks(facts, description),
    ]
    order = [_ERROR, _WARNING, _INFO]
    return sorted(found, key=lambda item: order.index(item.severity))


def _about_storage(facts: TargetFacts, where: str, description: Description) -> Iterator[Finding]:
    if facts.kind is None:
        yield Finding(
            "replica-dir-unusable",
            _ERROR,
            f"{where} cannot hold replicas",
            facts.problem,
            "Mount it, make it writable for this user, or set another: `asr site update NAME --set replica_dir=...`.",
        )
        return
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


def _about_names(facts: TargetFacts, description: Description) -> Iterator[Finding]:
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
            _WARNING,
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
    for path in facts.missing_files:
        yield Finding(
            "boot-file-missing",
            _ERROR,
            f"{path} is missing at the target",
            "The machine boots from this file of the host (firmware or kernel), which is not on its disks.",
            "Install or copy it there, under the same path.",
        )
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


def _cpu(severity: Severity, what: str) -> Finding:
    return Finding(
        "cpu-unsupported",
        severity,
        what,
        "A machine may not boot where it finds different CPU features.",
        "Give the machine a CPU model that both hosts have (`virsh hypervisor-cpu-baseline`).",
    )


def _about_networks(facts: TargetFacts, description: Description) -> Iterator[Finding]:
    for network in sorted({nic.network for nic in description.machine.nics if nic.network}):
        if network not in facts.networks and network not in facts.bridges:
            yield Finding(
                "network-missing",
                _WARNING,
                f"the target has no network {network}",
                "A failover plugs the machine into a network of that name unless it is mapped to another.",
                f"Map it (`asr protect --network {network}=OTHER`), or define it at the target.",
            )
