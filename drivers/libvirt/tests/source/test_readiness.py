"""Readiness findings: facts in, codes out."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from asr_driver_libvirt.source.facts import SourceFacts
from asr_driver_libvirt.source.readiness import disk_findings, findings, notices, other_vaults
from asr_driver_libvirt.source.space import Space
from asr_driver_libvirt.xml.domain import DiskKind, DomainDisk, DomainModel, parse_domain
from asr_driver_libvirt.xml.mark import CheckpointName
from asr_storage.qemu.img import ImageInfo
from asrcore.model.finding import Severity
from asrcore.model.machine import Firmware
from asrcore.model.point import Consistency
from asrcore.model.policy import Policy
from asrcore.units import GiB, MiB

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO

GOOD = parse_domain(
    """<domain type='kvm'><name>good</name><uuid>u</uuid><memory>1024</memory><os><type>hvm</type></os>
    <cpu mode='host-model'/><devices>
      <disk type='file' device='disk'>
        <driver type='qcow2'/><source file='/vm/a'/><target dev='vda' bus='virtio'/>
      </disk>
      <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
    </devices></domain>"""
)
DISK = GOOD.disks[0]
IMAGE = ImageInfo("qcow2", 1, 1, 65536, None, None, None, None, False, False, False, (), ())
CRASH, FILESYSTEM = Policy("p"), Policy("p", consistency=Consistency.FILESYSTEM)
APPLICATION = Policy("p", consistency=Consistency.APPLICATION)


def facts(model: DomainModel = GOOD, **changes: Any) -> SourceFacts:
    return attrs.evolve(SourceFacts(model=model, active=True), **changes)


def model(**changes: Any) -> DomainModel:
    return attrs.evolve(GOOD, **changes)


def codes(given: SourceFacts, policy: Policy = CRASH) -> dict[str, Severity]:
    return {item.code: item.severity for item in findings(given, policy)}


def test_scratch_space_is_judged_by_the_reserve_and_the_size_of_the_disks() -> None:
    assert codes(facts(scratch=((Space("/s", 200, 1000, 100), 2000),))) == {}
    (low,) = findings(facts(scratch=((Space("/s", 99 * MiB, GiB, 100 * MiB), GiB),)), CRASH)
    assert low.what == "99.0 MiB are free for scratch files at /s"
    assert "100.0 MiB" in low.cause
    assert "scratch_dir" in low.action


@pytest.mark.parametrize("policy", [CRASH, FILESYSTEM])
def test_a_good_machine_has_no_findings(policy: Policy) -> None:
    assert codes(facts(), policy) == {}


@pytest.mark.parametrize(
    ("given", "code", "severity"),
    [
        (facts(libvirt_version=7_000_000), "libvirt-too-old", ERROR),
        (facts(nbd_in_the_clear=True), "nbd-in-the-clear", WARNING),
        (facts(persistent=False), "transient-domain", ERROR),
        (facts(halted="an I/O error of its disks paused it"), "source-paused", WARNING),
        (facts(scratch=((Space("/s", 99, 1000, 100), 500),)), "scratch-small", ERROR),
        (facts(scratch=((Space("/s", 200, 1000, 100), 2001),)), "scratch-small", WARNING),
        (facts(snapshots=2), "machine-has-snapshots", ERROR),
        (facts(foreign_checkpoints=("theirs",)), "machine-has-foreign-checkpoints", INFO),
        (facts(foreign_backup=True), "foreign-backup-running", WARNING),
        (facts(managed_save=True, active=False), "managed-save-present", WARNING),
        (facts(block_jobs=("vda",)), "active-block-job", ERROR),
        (facts(autostart=True), "autostart", INFO),
        (facts(active=False, local=False), "machine-off-remote", INFO),
        (facts(nvram_readable=False), "nvram-unreadable", WARNING),
        (facts(missing={"vda": "no such file"}), "disk-unreadable", ERROR),
        (facts(model(disks=())), "no-disks", ERROR),
        (facts(model(host_devices=("pci",))), "host-device", ERROR),
        (facts(model(launch_security=True)), "launch-security", ERROR),
        (facts(model(nvdimms=1)), "persistent-memory", ERROR),
        (facts(model(tpm=True)), "tpm-present", WARNING),
        (facts(model(cpu_mode="host-passthrough")), "cpu-passthrough", WARNING),
        (facts(model(shared_folders=("x",))), "shared-folder", WARNING),
        (facts(model(shared_memory=True)), "shared-memory", WARNING),
        (facts(model(direct_kernel=True)), "direct-kernel", WARNING),
        (facts(model(media=("sdb",))), "removable-medium", INFO),
        (facts(old_images=("vda",)), "disk-qcow2-v2", WARNING),
        (facts(other_vaults=("asr-view.1c.b",)), "protected-by-another-vault", WARNING),
        (facts(model(firmware=Firmware.UEFI)), "nvram-not-made-yet", INFO),
        (facts(images={"vda": attrs.evolve(IMAGE, encrypted=True)}), "disk-encrypted", ERROR),
        (facts(images={"vda": attrs.evolve(IMAGE, data_file="/d")}), "disk-data-file", ERROR),
        (facts(images={"vda": attrs.evolve(IMAGE, corrupt=True)}), "disk-corrupt", ERROR),
        (facts(images={"vda": attrs.evolve(IMAGE, snapshots=("s",))}), "machine-has-snapshots", ERROR),
        (facts(images={"vda": attrs.evolve(IMAGE, backing_file="/b")}), "backing-format", ERROR),
    ],
)
def test_what_is_found(given: SourceFacts, code: str, severity: Severity) -> None:
    assert codes(given) == {code: severity}


@pytest.mark.parametrize(
    ("changes", "code", "severity"),
    [
        ({"kind": DiskKind.OTHER, "source_type": "network"}, "disk-unsupported", ERROR),
        ({"format": "vmdk"}, "disk-format", ERROR),
        ({"format": ""}, "disk-format", ERROR),
        ({"format": "raw"}, "disk-raw", WARNING),
        ({"device": "lun"}, "disk-passthrough", ERROR),
        ({"read_only": True}, "disk-read-only", ERROR),
        ({"shareable": True}, "disk-shareable", ERROR),
        ({"transient": True}, "disk-transient", ERROR),
        ({"encrypted": True}, "disk-encrypted", ERROR),
        ({"sliced": True}, "disk-slice", ERROR),
        ({"data_file": True}, "disk-data-file", ERROR),
        ({"mirrored": True}, "active-block-job", ERROR),
    ],
)
def test_what_is_found_of_a_disk(changes: dict[str, Any], code: str, severity: Severity) -> None:
    changed: DomainDisk = attrs.evolve(DISK, **changes)
    assert [(item.code, item.severity) for item in disk_findings(changed)] == [(code, severity)]
    assert "vda" in disk_findings(changed)[0].what


def test_the_advice_for_a_storage_volume_is_to_name_its_file() -> None:
    volume = attrs.evolve(DISK, kind=DiskKind.OTHER, source_type="volume", path="web disk.qcow2")
    (found,) = disk_findings(volume)
    assert "`virsh vol-path --pool POOL 'web disk.qcow2'`" in found.action
    assert "Move it" not in found.action


def checkpoint(owner: str, view: str = "view") -> str:
    return str(CheckpointName.make(view, 1.0, Consistency.CRASH, owner))


def test_what_a_cycle_reports_of_a_protected_machine() -> None:
    assert notices(0, [], []) == []
    found = notices(2, [checkpoint("bbbb2222")], ["/vm/my disk.asr-v.1c"])
    assert {item.code: item.severity for item in found} == {
        "protected-by-another-vault": WARNING,
        "machine-has-snapshots": WARNING,
        "scratch-left": WARNING,
    }
    assert "bbbb2222" in found[0].what
    assert "`rm '/vm/my disk.asr-v.1c'`" in found[1].action


def test_a_notice_is_the_same_in_each_cycle_and_names_no_machine() -> None:
    """It is stored when it changes; the machine may have another name than its protection."""
    first, later = (notices(1, [checkpoint("bbbb2222", view)], []) for view in ("v1", "v2"))
    assert first == later
    assert all("asr resync MACHINE" not in item.action for item in first)


def test_a_finding_names_the_commands_that_delete_what_another_vault_left() -> None:
    name = checkpoint("bbbb2222")
    found = other_vaults(attrs.evolve(GOOD, name="my vm"), [name], active=False)
    assert f"virsh checkpoint-delete 'my vm' {name} --metadata" in found.action
    assert f"qemu-img bitmap --remove {GOOD.hard_disks[0].path} {name}" in found.action
    assert "--set owner=bbbb2222" in found.action


def test_the_tag_of_a_site_without_one_cannot_be_taken_over() -> None:
    for names in ([checkpoint("")], [checkpoint(""), checkpoint("bbbb2222")]):
        for found in (other_vaults(GOOD, names, active=True), *notices(0, names, [])):
            assert "tag none" in found.what
            assert "owner=none" not in found.action
            assert ("--set owner=bbbb2222" in found.action) == (len(names) == 2)


@pytest.mark.parametrize(
    ("given", "policy", "code"),
    [
        (facts(model(agent_channel=False, agent_connected=False)), FILESYSTEM, "guest-agent-missing"),
        (facts(model(agent_connected=False)), APPLICATION, "guest-agent-missing"),
        (facts(), APPLICATION, "application-consistency-unknown"),
    ],
)
def test_the_guest_agent_is_looked_for_where_the_policy_needs_it(given: SourceFacts, policy: Policy, code: str) -> None:
    assert list(codes(given, policy)) == [code]
    assert codes(given, CRASH) == {}


def test_an_agent_of_a_machine_that_is_off_is_not_missed() -> None:
    assert codes(facts(model(agent_connected=False), active=False), FILESYSTEM) == {}


def test_errors_come_first_and_each_finding_says_what_to_do() -> None:
    found = findings(facts(model(tpm=True, media=("sdb",)), snapshots=1, autostart=True), CRASH)
    assert [item.severity for item in found] == [ERROR, WARNING, INFO, INFO]
    assert all(item.what and item.cause and item.action for item in found)
