"""The findings about a target site, derived from facts."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from asr_driver_libvirt.target.readiness import TargetFacts, judged
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
        ({"missing_files": ("/boot/x",)}, ("boot-file-missing", "error")),
        ({"capabilities": CAPABILITIES.replace("<value>/x</value>", "")}, ("firmware-missing", "error")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_each_trouble_is_told(change: dict[str, Any], expected: tuple[str, str]) -> None:
    assert codes(attrs.evolve(FACTS, **change), machine()) == [expected]


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
