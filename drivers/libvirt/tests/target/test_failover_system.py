"""Machines made from recovery points on a real site: tests, promotion, undo, commit, and a kill at each crash point."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asr_driver_libvirt.xml.domain import parse_domain
from drivers.libvirt.tests.target.driven import COMMAND, Driven
from tests.lab import Lab

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

DIRS = {"chain": "/srv/ext4", "reflink": "/srv/xfs"}

TEST_STEPS = [
    "failover.test.recorded",
    "failover.test.images",
    "failover.test.defined",
    "failover.test.network",
    "failover.test.started",
]
STOP_STEPS = ["failover.test.undefined", "failover.test.unplugged", "failover.test.released", "failover.test.removed"]
PROMOTE_STEPS = [
    "failover.promote.begun",
    "failover.promote.held",
    "failover.promote.images",
    "failover.promote.put-aside",
    "failover.promote.defined",
    "failover.promote.done",
]
UNDO_STEPS = [
    "failover.undo.begun",
    "failover.undo.undefined",
    "failover.undo.restored",
    "failover.undo.removed",
    "failover.undo.done",
]
COMMIT_STEPS = [
    "failover.commit.begun",
    "failover.commit.disk-flattened",
    "failover.commit.flattened",
    "failover.commit.superseded-removed",
    "failover.commit.done",
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("drv-failover") as made:
        yield made


@pytest.fixture(scope="module")
def driven(lab: Lab) -> Iterator[Driven]:
    process = lab.popen_in("b", COMMAND, stdin=subprocess.PIPE, stderr=None)
    with Driven(process) as made:
        yield made


class Bench:
    """Site b with a replica directory, and states m1, m2 of guest g1, which runs at site a."""

    def __init__(self, lab: Lab, work: Path, directory: str, driven: Driven) -> None:
        self.lab, self.work, self.directory, self.driven = lab, work, directory, driven

    def drive(self, *arguments: str, crash_at: str = "") -> Any:
        """Run one operation in a process inside site b; None if it was killed."""
        status, output, errors = self.driven("qemu:///system", self.directory, *arguments, crash_at=crash_at)
        if status == -signal.SIGKILL:
            assert crash_at, "killed by something else"
            return None
        assert status in (0, 3), errors
        return json.loads(output)

    def virsh(self, *arguments: str, text: str | None = None) -> str:
        return self.lab.run_in("b", ["virsh", *arguments], text=text).stdout

    def domains(self) -> list[str]:
        return sorted(self.virsh("list", "--all", "--name").split())

    def networks(self) -> list[str]:
        return sorted(self.virsh("net-list", "--all", "--name").split())

    def files(self, under: str) -> list[str]:
        top = self.lab.host_path("b", f"{self.directory}/{under}")
        return sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file())

    def state(self, number: int) -> str:
        return str(self.work / f"m{number}")

    @property
    def model(self) -> Any:
        return parse_domain((self.work / "m1" / "domain.xml").read_bytes())

    def replica(self, name: str) -> None:
        """A replica with a kept point p1 (m1) and the latest state p2 (m2)."""
        self.drive("create", name, self.state(1))
        self.drive("cycle", name, self.state(1), "c1", "p1", "keep")
        self.drive("cycle", name, self.state(2), "c2", "p2", "no")

    def equal(self, name: str) -> None:
        assert self.drive("read", name, "p1", self.state(1)) == "equal"
        assert self.drive("read", name, "p2", self.state(2)) == "equal"

    def wait_for(self, path: str, words: bytes, seconds: float = 60.0) -> str:
        """Wait until a file of the site contains the words."""
        file = self.lab.host_path("b", path)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if file.exists() and words in (text := file.read_bytes()):
                return text.decode(errors="replace")
            time.sleep(0.1)
        raise AssertionError(f"no {words!r} in {path}")

    def twin(self, *, fenced: bool) -> str:
        """Another definition of the machine at site b, with a disk of the user."""
        self.lab.run_in("b", ["sh", "-c", "mkdir -p /srv/images && truncate -s 1M /srv/images/own.raw"])
        xml = f"""<domain type='qemu'><name>{self.model.name}</name><uuid>{self.model.uuid}</uuid>
<memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/srv/images/own.raw'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>"""
        self.virsh("define", "/dev/stdin", text=xml)
        if fenced:
            self.drive("fence", self.model.uuid, "2")
        return "/srv/images/own.raw"

    def clear(self) -> None:
        """Delete everything from earlier tests."""
        for name in self.domains():
            if name in self.virsh("list", "--name").split():
                self.virsh("destroy", name)
            self.virsh("undefine", name, "--nvram", "--checkpoints-metadata")
        self.lab.run_in("b", ["sh", "-c", f"rm -rf {self.directory}/replicas {self.directory}/machines"])
        self.lab.run_in("b", ["sh", "-c", "rm -rf /srv/images/* /srv/console/*"])


def snapshot(lab: Lab, name: str, directory: Path) -> None:
    """The stopped guest's definition, NVRAM and disks, as raw files."""
    directory.mkdir()
    xml = lab.run_in("a", ["virsh", "dumpxml", "--inactive", "--security-info", name]).stdout
    (directory / "domain.xml").write_text(xml)
    model = parse_domain(xml)
    for disk in model.hard_disks:
        image = lab.host_path("a", disk.path)
        command: list[str | Path] = [
            "qemu-img",
            "convert",
            "-f",
            disk.format,
            "-O",
            "raw",
            image,
            directory / f"{disk.id}.raw",
        ]
        subprocess.run(command, check=True, timeout=60)
    if model.nvram:
        (directory / "nvram").write_bytes(lab.host_path("a", model.nvram).read_bytes())


@pytest.fixture(scope="module")
def states(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest that ran twice: m1 after the first run, m2 after the second."""
    work = tmp_path_factory.mktemp("states")
    lab.define_guest("a", "bios-direct", "g1", rate=20)
    for number in (1, 2):
        lab.start("a", "g1")
        time.sleep(1)
        lab.shutdown("a", "g1")
        snapshot(lab, "g1", work / f"m{number}")
    return work


@pytest.fixture(params=sorted(DIRS))
def bench(lab: Lab, states: Path, driven: Driven, request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(lab, states, DIRS[request.param], driven)
    made.clear()
    yield made
    made.clear()


BY_KIND = pytest.mark.parametrize("bench", ["reflink", pytest.param("chain", marks=pytest.mark.long)], indirect=True)
"""For tests that take long and do the same for both kinds of replica."""


def audited(text: str) -> str:
    """The first audit in a console."""
    return next(line for line in text.splitlines() if "LAB-AUDIT" in line)


# -- tests -------------------------------------------------------------------------------------------------------------


@BY_KIND
def test_test_failover_boots_isolated_while_replication_goes_on(bench: Bench) -> None:
    bench.replica("r1")
    machine_id, name = bench.drive("start-test", "r1", "t1", "p2", "g1-test")
    assert name == "g1-test"
    assert machine_id != bench.model.uuid
    text = bench.wait_for("/srv/console/g1.log.asr-test-t1", b"LAB-READY")
    for good in ("gaps=0", "torn=0", "bad=0", "blocks_bad=0", "behind=0", "ahead=0", "missing=0"):
        assert good in audited(text)
    live = parse_domain(bench.virsh("dumpxml", "g1-test"))
    assert [nic.mac for nic in live.nics] == [nic.mac for nic in bench.model.nics]
    own = [name for name in bench.networks() if name.startswith("asr-test-")]
    assert [nic.network for nic in live.nics] == own
    network = bench.virsh("net-dumpxml", own[0])
    assert "<forward" not in network
    assert "<ip" not in network
    # both the tested point's successors and its removal
    bench.drive("cycle", "r1", bench.state(1), "c3", "p3", "keep")
    bench.drive("cycle", "r1", bench.state(2), "c4", "p4", "no")
    bench.drive("drop", "r1", "1", "p1", "p2", "p3")
    bench.wait_for("/srv/console/g1.log.asr-test-t1", b"LAB-READY")
    assert bench.drive("read", "r1", "p4", bench.state(2)) == "equal"
    assert bench.drive("start-test", "r1", "t1", "p2", "g1-test") == [machine_id, name]
    assert bench.drive("start-test", "r1", "t2", "p4", "g1-test")["error"] == "already-exists"
    assert bench.drive("stop-test", "r1", "t1") == []
    assert bench.drive("stop-test", "r1", "t1") == []
    assert bench.domains() == []
    assert bench.networks() == ["lab"]
    assert len(bench.files("replicas/r1/images")) == 3, "unused layers are merged"
    assert not bench.lab.host_path("b", "/srv/console/g1.log.asr-test-t1").exists()
    assert bench.drive("read", "r1", "p4", bench.state(2)) == "equal"


def test_a_test_outlives_the_kept_point_that_it_stands_on(bench: Bench) -> None:
    bench.replica("r1")
    bench.drive("start-test", "r1", "t1", "p1", "g1-test")
    bench.drive("drop", "r1", "1", "p1")
    bench.drive("cycle", "r1", bench.state(1), "c3", "p3", "keep")
    assert bench.drive("info", "r1")["points"] == ["p3"]
    text = bench.wait_for("/srv/console/g1.log.asr-test-t1", b"LAB-READY")
    for good in ("gaps=0", "torn=0", "bad=0", "blocks_bad=0", "behind=0", "ahead=0", "missing=0"):
        assert good in audited(text)
    assert bench.drive("stop-test", "r1", "t1") == []
    assert not [path for path in bench.files("replicas/r1/points") if path.startswith("p1/")]
    assert bench.drive("read", "r1", "p3", bench.state(1)) == "equal"


@BY_KIND
def test_kill_at_each_step_of_a_test(bench: Bench) -> None:
    bench.replica("r1")
    for step in TEST_STEPS:
        assert bench.drive("start-test", "r1", "t1", "p1", "g1-test", crash_at=step) is None, step
        instance = bench.drive("start-test", "r1", "t1", "p1", "g1-test")
        assert bench.virsh("domstate", instance[0]).strip() == "running"
        if step == TEST_STEPS[0]:
            assert bench.drive("stop-test", "r1", "t1") == []
        else:
            stop = STOP_STEPS[TEST_STEPS.index(step) - 1]
            assert bench.drive("stop-test", "r1", "t1", crash_at=stop) is None, stop
            assert bench.drive("stop-test", "r1", "t1") == []
        assert bench.domains() == []
        assert bench.networks() == ["lab"]
        assert bench.files("replicas/r1/tests") == []
    # killed and never repeated: only deleted
    for step in TEST_STEPS:
        assert bench.drive("start-test", "r1", "t1", "p2", "g1-test", crash_at=step) is None, step
        assert bench.drive("stop-test", "r1", "t1") == []
        assert (bench.domains(), bench.networks()) == ([], ["lab"])
    bench.equal("r1")


def test_deleting_a_replica_ends_its_tests(bench: Bench) -> None:
    bench.replica("r1")
    bench.drive("start-test", "r1", "t1", "p1", "g1-test")
    assert bench.drive("delete", "r1", "1") == []
    assert (bench.domains(), bench.networks()) == ([], ["lab"])


# -- promotion ---------------------------------------------------------------------------------------------------------


@BY_KIND
def test_promoted_machine_runs_and_becomes_its_own(bench: Bench) -> None:
    bench.replica("r1")
    machine_id, name = bench.drive("promote", "r1", "p2", "2")
    assert (machine_id, name) == (bench.model.uuid, "g1")
    assert bench.virsh("domstate", "g1").strip() == "shut off"
    assert bench.drive("promote", "r1", "p2", "2") == [machine_id, name]
    bench.lab.start("b", "g1")
    for good in ("gaps=0", "torn=0", "bad=0", "blocks_bad=0", "behind=0", "ahead=0"):
        assert good in audited(bench.wait_for("/srv/console/g1.log", b"LAB-READY"))
    model = parse_domain(bench.virsh("dumpxml", "g1"))
    assert [disk.format for disk in model.hard_disks] == ["qcow2"] * 3, "so that it can be tracked for failback"
    assert [nic.network for nic in model.nics] == ["lab"]
    assert bench.drive("promote", "r1", "p1", "2")["error"] == "wrong-state"
    assert bench.drive("delete", "r1", "2")["error"] == "wrong-state"
    assert bench.drive("undo", "r1", "1")["error"] == "stale-epoch"
    assert bench.drive("commit", "r1", "1")["error"] == "stale-epoch"
    assert bench.drive("commit", "r1", "2") == []
    assert bench.drive("commit", "r1", "2") == []
    assert bench.files("replicas") == []
    audit = bench.lab.command("b", "g1", "audit")
    for good in ("gaps=0", "torn=0", "bad=0", "blocks_bad=0", "behind=0", "ahead=0"):
        assert good in audit
    bench.lab.shutdown("b", "g1")
    bench.lab.start("b", "g1")  # from its own disks
    assert bench.drive("delete", "r1", "2") == []
    assert any(file.endswith("vda.qcow2") for file in bench.files("machines"))


@BY_KIND
def test_another_point_before_commit(bench: Bench) -> None:
    bench.replica("r1")
    bench.drive("promote", "r1", "p2", "2")
    bench.lab.start("b", "g1")
    bench.lab.kill_qemu("b", "g1")
    machine_id = bench.drive("promote", "r1", "p1", "2")[0]
    assert machine_id == bench.model.uuid
    bench.lab.start("b", "g1")
    bench.drive("undo", "r1", "3")
    assert bench.domains() == []
    assert bench.files("machines") == []
    bench.equal("r1")
    bench.drive("cycle", "r1", bench.state(1), "c3", "p3", "keep")
    assert bench.drive("read", "r1", "p3", bench.state(1)) == "equal"


def test_only_a_fenced_twin_is_put_aside(bench: Bench) -> None:
    bench.replica("r1")
    bench.twin(fenced=False)
    before = bench.virsh("dumpxml", "g1")
    assert bench.drive("promote", "r1", "p2", "2")["error"] == "already-exists"
    assert bench.virsh("dumpxml", "g1") == before
    assert bench.files("machines") == []


@BY_KIND
def test_kill_at_each_step_of_promote_and_undo(bench: Bench) -> None:
    bench.replica("r1")
    bench.twin(fenced=True)
    before = bench.virsh("dumpxml", "--inactive", "g1")
    for number, step in enumerate(PROMOTE_STEPS):
        assert bench.drive("promote", "r1", "p1", "2", crash_at=step) is None, step
        if number % 2:  # undone as it was left, or finished first
            assert bench.drive("promote", "r1", "p1", "2")[0] == bench.model.uuid
            assert parse_domain(bench.virsh("dumpxml", "g1")).hard_disks[0].path.startswith(bench.directory)
        undo = UNDO_STEPS[number % len(UNDO_STEPS)]
        assert bench.drive("undo", "r1", "2", crash_at=undo) is None, undo
        bench.drive("undo", "r1", "2")
        assert bench.virsh("dumpxml", "--inactive", "g1") == before, (step, undo)
        assert bench.drive("fenced", bench.model.uuid) == 2
        assert bench.files("machines") == []
    bench.equal("r1")


def test_kill_at_each_step_of_commit(bench: Bench) -> None:
    steps = COMMIT_STEPS if bench.directory == DIRS["chain"] else [s for s in COMMIT_STEPS if "disk-flat" not in s]
    for number, step in enumerate(steps):
        name = f"r{number}"
        bench.replica(name)
        own = bench.twin(fenced=True)
        bench.drive("promote", name, "p2", "2")
        assert bench.drive("commit", name, "2", crash_at=step) is None, step
        if step != "failover.commit.done":
            assert bench.drive("undo", name, "2")["error"] == "wrong-state", "undo is no longer possible"
        assert bench.drive("commit", name, "2") == [], step
        assert bench.lab.host_path("b", own).exists(), "the user's own disk stays"
        assert [file for file in bench.files("machines") if file.startswith(f"g1-{name}/")]
        for file in bench.lab.host_path("b", f"{bench.directory}/machines/g1-{name}").glob("*.qcow2"):
            below = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", file], timeout=60))
            assert "replicas" not in below.get("backing-filename", ""), "it does not depend on the replica"
        if number == 1:
            bench.lab.start("b", "g1")
            assert "gaps=0" in bench.lab.command("b", "g1", "audit")
            bench.lab.kill_qemu("b", "g1")
        bench.virsh("undefine", "g1")


def test_failover_back_removes_our_superseded_disks_at_commit(bench: Bench) -> None:
    bench.replica("r1")
    bench.drive("promote", "r1", "p1", "2")
    bench.drive("commit", "r1", "2")
    first = bench.files("machines")
    assert first
    assert all(file.startswith("g1-r1/") for file in first)
    bench.drive("fence", bench.model.uuid, "3")
    # re-protect: the disks of the fenced machine are the initial content of the new replica
    bench.drive("create", "r2", bench.state(2), bench.model.uuid)
    sent = bench.drive("cycle", "r2", bench.state(2), "c1", "p1", "keep")
    total = sum(path.stat().st_size for path in Path(bench.state(2)).glob("*.raw"))
    assert 0 < sent < total / 2, "only differences are sent"
    assert bench.drive("read", "r2", "p1", bench.state(2)) == "equal"
    bench.drive("promote", "r2", "p1", "4")
    assert set(first) <= set(bench.files("machines")), "undo is possible until the commit"
    bench.lab.start("b", "g1")
    bench.drive("commit", "r2", "4")
    assert all(file.startswith("g1-r2/") for file in bench.files("machines"))
    assert "gaps=0" in bench.lab.command("b", "g1", "audit")


def test_running_machine_is_no_seed(bench: Bench) -> None:
    bench.replica("r1")
    bench.drive("promote", "r1", "p1", "2")
    bench.lab.start("b", "g1")
    assert bench.drive("create", "r2", bench.state(2), bench.model.uuid)["error"] == "wrong-state"
    bench.lab.kill_qemu("b", "g1")
    bench.drive("create", "r2", bench.state(2), bench.model.uuid)
    bench.drive("cycle", "r2", bench.state(2), "c1", "p1", "keep")
    assert bench.drive("read", "r2", "p1", bench.state(2)) == "equal"
    assert bench.drive("create", "r3", bench.state(2), "00000000-0000-4000-8000-000000000000")["error"] == (
        "machine-not-found"
    )


# -- readiness ----------------------------------------------------------------------------------------------------


def test_findings_of_a_good_and_a_bad_site(bench: Bench, tmp_path: Path) -> None:
    kind = next(kind for kind, directory in DIRS.items() if directory == bench.directory)
    assert bench.drive("details")["replica kind"] == kind
    good = bench.drive("findings", bench.state(1), "p")
    assert good == {"replica-kind": "info"}
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in Path(bench.state(1)).iterdir():
        (bad / path.name).symlink_to(path)
    xml = (bad / "domain.xml").read_text()
    (bad / "domain.xml").unlink()
    xml = xml.replace("pc-i440fx-7.2", "pc-i440fx-99.1").replace("network='lab'", "network='office'")
    (bad / "domain.xml").write_text(xml.replace("/srv/boot/vmlinuz", "/srv/boot/another"))
    bench.twin(fenced=False)
    found = bench.drive("findings", str(bad), "p")
    assert found == {
        "domain-unsupported": "error",
        "boot-file-missing": "error",
        "network-missing": "warning",
        "twin-defined": "warning",
        "replica-kind": "info",
    }
    bench.drive("fence", bench.model.uuid, "1")
    assert "twin-defined" not in bench.drive("findings", str(bad), "p")


# -- UEFI ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_uefi_machine_boots_from_its_own_nvram(lab: Lab, driven: Driven, tmp_path: Path) -> None:
    lab.define_guest("a", "uefi", "u1", rate=20)
    lab.start("a", "u1")
    lab.shutdown("a", "u1")
    snapshot(lab, "u1", tmp_path / "m1")
    nvram = (tmp_path / "m1" / "nvram").read_bytes()
    bench = Bench(lab, tmp_path, DIRS["reflink"], driven)
    bench.clear()
    bench.drive("create", "r1", bench.state(1))
    bench.drive("cycle", "r1", bench.state(1), "c1", "p1", "keep")
    bench.drive("start-test", "r1", "t1", "p1", "u1-test")
    bench.wait_for("/srv/console/u1.log.asr-test-t1", b"LAB-READY", 120)
    bench.drive("stop-test", "r1", "t1")
    bench.drive("promote", "r1", "p1", "2")
    path = parse_domain(bench.virsh("dumpxml", "u1")).nvram
    assert path.startswith(bench.directory)
    assert lab.host_path("b", path).read_bytes() == nvram
    lab.start("b", "u1")
    bench.drive("undo", "r1", "2")
    assert bench.files("machines") == []
    bench.clear()
