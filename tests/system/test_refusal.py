"""A machine that cannot be replicated completely is refused with the reason, and left unchanged. On the command
line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import Kind, Lab
from tests.lab._run import run
from tests.system.asr_cli import AsrCli, AsrFailed

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

NAME = "odd"

DISK = (
    "<disk type='file' device='disk'><driver name='qemu' type='{fmt}'/>{source}{flag}"
    "<target dev='vdx' bus='virtio'/></disk>"
)
FILE = "<source file='/srv/images/odd-x.img'/>"
ODD_DISKS = {
    "network": "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='x'>"
    "<host name='10.77.0.1' port='10809'/></source><target dev='vdx' bus='virtio'/></disk>",
    "read-only": DISK.format(fmt="qcow2", source=FILE, flag="<readonly/>"),
    "shareable": DISK.format(fmt="raw", source=FILE, flag="<shareable/>"),
    "transient": DISK.format(fmt="qcow2", source=FILE, flag="<transient/>"),
    "vmdk": DISK.format(fmt="vmdk", source=FILE, flag=""),
    "image missing": DISK.format(fmt="qcow2", source="<source file='/srv/images/gone.qcow2'/>", flag=""),
}
CODES = {
    "network": "disk-unsupported",
    "read-only": "disk-read-only",
    "shareable": "disk-shareable",
    "transient": "disk-transient",
    "vmdk": "disk-format",
    "image missing": "disk-unreadable",
}


@pytest.fixture(scope="module")
def asr(lab: Lab) -> AsrCli:
    asr = AsrCli(lab, vault="/srv/asr-refusal/vault.db")
    asr.init()
    asr("policy", "create", "gold", "--interval", "5min")
    return asr


@pytest.fixture
def odd(lab: Lab) -> Iterator[str]:
    """A machine that is off and can be protected."""
    lab.define_guest("a", Kind.BIOS_DISK, NAME)
    yield NAME
    lab.remove_guest("a", NAME)


def refused(asr: AsrCli, lab: Lab, code: str) -> None:
    """`asr protect` names the code, and leaves nothing behind."""
    site, replicas = lab.sites["a"], lab.host_path("b", "/srv/xfs/replicas")

    def seen() -> list[object]:
        there = sorted(replicas.iterdir()) if replicas.exists() else []
        listed = site.virsh("checkpoint-list", NAME, "--name").stdout
        return [there, listed, site.virsh("dumpxml", NAME).stdout, lab.state("a", NAME)]

    before = seen()
    with pytest.raises(AsrFailed) as failed:
        asr("protect", NAME, "--from", "a", "--to", "b", "--policy", "gold")
    assert failed.value.exit_code == 5
    assert failed.value.error is not None
    assert failed.value.error["code"] == "not-ready"
    assert f"[{code}]" in str(failed.value.error["happened"])
    assert seen() == before
    assert asr("status") == []


def test_internal_snapshot(asr: AsrCli, lab: Lab, odd: str) -> None:
    lab.sites["a"].virsh("snapshot-create-as", odd, "before-upgrade")
    refused(asr, lab, "machine-has-snapshots")


def test_external_snapshot(asr: AsrCli, lab: Lab, odd: str) -> None:
    lab.sites["a"].virsh("snapshot-create-as", odd, "before-upgrade", "--disk-only")
    refused(asr, lab, "machine-has-snapshots")
    for left in lab.host_path("a", "/srv/images").glob("odd*before-upgrade"):
        left.unlink()


@pytest.mark.parametrize("disk", ODD_DISKS)
def test_unsupported_disk(asr: AsrCli, lab: Lab, odd: str, disk: str) -> None:
    run(["qemu-img", "create", "-q", "-f", "qcow2", lab.host_path("a", "/srv/images/odd-x.img"), "16M"])
    lab.sites["a"].virsh("attach-device", odd, "/dev/stdin", "--config", text=ODD_DISKS[disk])
    refused(asr, lab, CODES[disk])


def test_check_shows_the_findings_and_the_rest_is_protected(asr: AsrCli, lab: Lab, odd: str) -> None:
    """A refused machine can be protected once the cause is fixed: the refusals left nothing behind."""
    lab.sites["a"].virsh("attach-device", odd, "/dev/stdin", "--config", text=ODD_DISKS["vmdk"])
    shown = asr("protect", odd, "--from", "a", "--to", "b", "--policy", "gold", "--check")["findings"]
    errors = {item["code"] for item in shown if item["severity"] == "error"}
    assert "disk-format" in errors
    assert all(item["what"] and item["cause"] and item["action"] for item in shown)
    lab.sites["a"].virsh("detach-disk", odd, "vdx", "--config")
    assert asr.result("protect", odd, "--from", "a", "--to", "b", "--policy", "gold")["bytes_sent"] > 0
    assert asr.status(odd)["state"] == "protected"
    asr("unprotect", odd, "--yes")
    assert asr("status") == []
