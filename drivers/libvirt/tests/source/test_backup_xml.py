"""XML of backups and checkpoints, checked against libvirt's own schemas where they are installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from lxml import etree

from asr_driver_libvirt.xml.backup import (
    BackupDisk,
    NbdServer,
    RunningBackup,
    backup_xml,
    bitmap_sizes,
    checkpoint_description,
    checkpoint_domain,
    checkpoint_xml,
    parse_backup,
    redefine_xml,
)
from asr_driver_libvirt.xml.mark import CheckpointName
from asrcore.model.point import Consistency

SCHEMAS = Path("/usr/share/libvirt/schemas")
NAME = CheckpointName.make("v1", 1700000000.0, Consistency.CRASH, "0af3")
OLD = CheckpointName.make("v0", 1600000000.0, Consistency.FILESYSTEM)
DISKS = [
    BackupDisk("vda", f"/vm/a & b.qcow2.{NAME}", base=str(OLD), tracked=True),
    BackupDisk("vdb", f"/vm/b.raw.{NAME}"),
]
SERVERS = {
    "unix": NbdServer(socket="/run/x.sock"),
    "tcp": NbdServer(host="10.0.0.1", port=10810),
    "tls": NbdServer(host="10.0.0.1", port=10810, tls=True),
}


def check(xml: str, schema: str) -> None:
    file = SCHEMAS / f"{schema}.rng"
    if not file.is_file():
        pytest.skip(f"{file} is not installed")
    etree.RelaxNG(etree.parse(file)).assertValid(etree.fromstring(xml))


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_a_backup_is_valid_and_read_again(server: NbdServer) -> None:
    xml = backup_xml(server, DISKS)
    check(xml, "domainbackup")
    assert parse_backup(xml) == RunningBackup(NAME, server, ("vda", "vdb"))


def test_a_checkpoint_is_valid() -> None:
    xml = checkpoint_xml(str(NAME), DISKS, 'notes: <&> "')
    check(xml, "domaincheckpoint")
    assert checkpoint_description(xml) == 'notes: <&> "'
    assert checkpoint_domain(xml) == ""


def test_a_restored_checkpoint_is_valid() -> None:
    domain = (
        "<domain type='qemu'><name>x</name><memory>1</memory><os><type>hvm</type></os>"
        "<devices><disk type='file'><source file='/a'/><target dev='vda'/></disk></devices></domain>"
    )
    xml = redefine_xml(str(NAME), ["vda"], domain, created=5)
    check(xml, "domaincheckpoint")
    assert "<name>x</name>" in checkpoint_domain(xml)


def test_only_whole_bitmaps_have_a_size() -> None:
    xml = """<domaincheckpoint><name>n</name><disks>
      <disk name='vda' checkpoint='bitmap' bitmap='n' size='0'/>
      <disk name='vdb' checkpoint='bitmap' bitmap='n'/>
      <disk name='vdc' checkpoint='no'/></disks></domaincheckpoint>"""
    assert bitmap_sizes(xml) == {"vda"}


@pytest.mark.parametrize(
    "scratch",
    [
        ["/vm/a.scratch"],
        [f"/vm/a.{NAME}", "/vm/b.scratch"],
        [f"/vm/a.{NAME}", f"/vm/b.{OLD}"],
        ["/vm/a.asr-notes"],
        [""],
    ],
)
def test_a_job_that_is_not_wholly_ours_is_somebody_elses(scratch: list[str]) -> None:
    disks = "".join(f"<disk name='d{i}' backup='yes'><scratch file='{f}'/></disk>" for i, f in enumerate(scratch))
    assert parse_backup(f"<domainbackup mode='pull'><disks>{disks}</disks></domainbackup>").name is None


def test_a_push_backup_of_others_has_no_name() -> None:
    disk = "<disk name='vda' backup='yes'><target file='/t'/></disk>"
    xml = f"<domainbackup mode='push'><disks>{disk}</disks></domainbackup>"
    assert parse_backup(xml) == RunningBackup(None, NbdServer(), ("vda",))
