"""The findings about a target site, derived from facts."""

from __future__ import annotations

import uuid
from typing import Any

import attrs
import pytest

from asr_driver_libvirt.target.readiness import TargetFacts, judged
from asr_driver_libvirt.xml.domain import parse_domain
from asr_driver_libvirt.xml.foreign import domain_of
from asr_storage.replica.store import ReplicaKind
from asrcore.model.finding import Severity
from asrcore.model.machine import Artifact, Description, Disk, Firmware, Machine, Nic
from asrcore.units import GiB, MiB

CAPABILITIES = """<domainCapabilities><os><loader><value>/x</value></loader></os><cpu>
<mode name='host-passthrough' supported='yes'/><mode name='host-model' supported='no'/>
<mode name='custom' supported='yes'><model usable='yes'>Nehalem</model><model usable='no'>Icelake</model></mode>
</cpu></domainCapabilities>"""
FACTS = TargetFacts(
    kind=ReplicaKind.REFLINK,
    problem="",
    total=100 * GiB,
    free=50 * GiB,
    networks=frozenset({"lan"}),
    bridges=frozenset({"br0"}),
    capabilities=CAPABILITIES,
)


def machine(
    cpu: str = "<cpu mode='custom'><model>Nehalem</model></cpu>", firmware: Firmware = Firmware.UEFI
) -> Description:
    neutral = Machine("u", "web", 1, GiB, firmware, (Disk("vda", 10 * GiB),), (Nic("m", "lan"), Nic("m", "br0")))
    xml = f"<domain type='kvm'><name>web</name><uuid>u</uuid>{cpu}<devices/></domain>"
    return Description(neutral, "libvirt", (Artifact("domain.xml", xml.encode()),))


def codes(facts: TargetFacts, description: Description) -> list[tuple[str, str]]:
    found = judged(facts, "/r", description)
    for finding in found:
        assert finding.what
        assert finding.cause
        assert finding.action or finding.severity is Severity.INFO
    return [(finding.code, finding.severity.value) for finding in found if finding.code != "replica-kind"]


def test_a_good_site_has_only_its_kind_to_tell() -> None:
    assert codes(FACTS, machine()) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"free": 5 * GiB}, ("target-small", "warning")),
        ({"free": 1 * MiB}, ("target-full", "error")),
        ({"kind": None, "problem": "read-only"}, ("replica-dir-unusable", "error")),
        ({"namesake": True}, ("name-taken", "error")),
        ({"twin_power": "running"}, ("twin-running", "error")),
        ({"twin_power": "off"}, ("twin-defined", "warning")),
        ({"networks": frozenset()}, ("network-missing", "warning")),
        ({"capabilities": "", "unsupported": "no such machine"}, ("domain-unsupported", "error")),
        ({"missing_boot_files": ("/boot/x",)}, ("boot-file-missing", "error")),
        ({"missing_files": {"/srv/core.ign": "argument of QEMU"}}, ("host-file-missing", "warning")),
        ({"stopped_networks": frozenset({"lan"})}, ("network-stopped", "warning")),
        ({"missing_cpus": frozenset({9})}, ("host-cpus-missing", "warning")),
        ({"missing_nodes": frozenset({1})}, ("host-cpus-missing", "warning")),
        ({"hugepages": "2 GiB are needed"}, ("hugepages-missing", "warning")),
        ({"capabilities": CAPABILITIES.replace("<value>/x</value>", "")}, ("firmware-missing", "error")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_each_trouble_is_told(change: dict[str, Any], expected: tuple[str, str]) -> None:
    assert codes(attrs.evolve(FACTS, **change), machine()) == [expected]


@pytest.mark.parametrize(
    ("firmware", "bus", "size", "refused"),
    [
        (Firmware.UEFI, "virtio", 4096, False),
        (Firmware.UEFI, "sata", 4096, True),
        (Firmware.BIOS, "virtio", 4096, True),
        (Firmware.BIOS, "ide", 512, False),
    ],
)
def test_sectors_that_the_replica_cannot_have_are_found(firmware: Firmware, bus: str, size: int, refused: bool) -> None:
    disk = Disk("S1", 10 * GiB, bus=bus, sector_size=size)
    server = Description(Machine("u", "web", 1, GiB, firmware, (disk,)), "physical")
    assert (("sector-size", "error") in codes(FACTS, server)) is refused


def test_the_sector_size_of_another_platform_s_disk_is_kept() -> None:
    disks = (Disk("S1", GiB, bus="virtio", sector_size=4096), Disk("S2", GiB, bus="virtio"))
    made = domain_of(
        Description(Machine(str(uuid.uuid4()), "web", 1, GiB, Firmware.UEFI, disks), "physical"), kvm=False
    )
    assert [disk.sector_size for disk in parse_domain(made).disks] == [4096, 512]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"kind": None, "problem": "not mounted"}, "replica-dir-unusable"),
        ({"namesake": True}, "name-taken"),
        ({"twin_power": "running"}, "twin-running"),
        ({"twin_power": "off"}, "twin-defined"),
        ({"networks": frozenset()}, "network-missing"),
        ({"stopped_networks": frozenset({"lan"})}, "network-stopped"),
        ({"capabilities": "", "unsupported": "no such machine"}, "domain-unsupported"),
        ({"missing_boot_files": ("/boot/x",)}, "boot-file-missing"),
        ({"missing_files": {"/srv/core.ign": "argument of QEMU"}}, "host-file-missing"),
        ({"missing_cpus": frozenset({9})}, "host-cpus-missing"),
        ({"hugepages": "2 GiB are needed"}, "hugepages-missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_libvirt_would_refuse_is_an_error_at_a_failover(change: dict[str, Any], code: str) -> None:
    found = judged(attrs.evolve(FACTS, **change), "/r", machine(), failover=True)
    assert [(item.code, item.severity) for item in found] == [(code, Severity.ERROR)]


def test_a_failover_needs_no_space_for_a_copy() -> None:
    assert judged(attrs.evolve(FACTS, free=0), "/r", machine(), failover=True) == []


@pytest.mark.parametrize(
    ("device", "offered", "expected"),
    [
        ("<graphics type='spice'/>", "<graphics supported='yes'><enum name='type'><value>vnc</value></enum></graphics>",
         ["device-unsupported"]),
        ("<graphics type='vnc'/>", "<graphics supported='yes'><enum name='type'><value>vnc</value></enum></graphics>",
         []),
        ("<graphics type='spice'/>", "", []),
        ("<video><model type='none'/></video>",
         "<video supported='yes'><enum name='modelType'><value>virtio</value></enum></video>", []),
        ("<video><model type='qxl'/></video>",
         "<video supported='yes'><enum name='modelType'><value>virtio</value></enum></video>", ["device-unsupported"]),
        ("<tpm><backend type='emulator'/></tpm>", "<tpm supported='no'/>", ["device-unsupported"]),
        ("<tpm><backend type='emulator'/></tpm>", "<tpm supported='yes'/>", []),
    ],
)  # fmt: skip
def test_a_device_that_the_target_does_not_offer(device: str, offered: str, expected: list[str]) -> None:
    xml = f"<domain type='kvm'><name>web</name><uuid>u</uuid><devices>{device}</devices></domain>"
    description = attrs.evolve(machine(), artifacts=(Artifact("domain.xml", xml.encode()),))
    capabilities = CAPABILITIES.replace("</domainCapabilities>", f"<devices>{offered}</devices></domainCapabilities>")
    found = judged(attrs.evolve(FACTS, capabilities=capabilities), "/r", description)
    assert [item.code for item in found if item.code != "replica-kind"] == expected


@pytest.mark.parametrize("power", ["fenced", ""])
def test_a_twin_that_may_be_replaced_is_fine(power: str) -> None:
    assert codes(attrs.evolve(FACTS, twin_power=power), machine()) == []


@pytest.mark.parametrize(
    ("cpu", "severity"),
    [
        ("<cpu mode='custom'><model>Icelake</model></cpu>", "warning"),
        ("<cpu mode='custom'><model>Z80</model></cpu>", "error"),
        ("<cpu mode='host-model'/>", "error"),
        ("<cpu mode='host-passthrough'/>", "warning"),
        ("", None),
    ],
)
def test_cpu(cpu: str, severity: str | None) -> None:
    assert codes(FACTS, machine(cpu)) == ([("cpu-unsupported", severity)] if severity else [])


def test_bios_needs_no_uefi_firmware() -> None:
    facts = attrs.evolve(FACTS, capabilities=CAPABILITIES.replace("<value>/x</value>", ""))
    assert codes(facts, machine(firmware=Firmware.BIOS)) == []


def test_machine_of_another_platform_is_judged_by_its_neutral_values() -> None:
    assert codes(attrs.evolve(FACTS, capabilities=""), attrs.evolve(machine(), platform="vmware")) == []
