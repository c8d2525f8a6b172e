"""The replica equals the source, byte for byte, and is no larger: both replica kinds; qcow2 and raw; virtio and
SCSI."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.rig import MIB, Rig

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

DISKS = {"vda": "qcow2", "vdb": "raw", "sda": "qcow2"}
SCRATCH = "/mnt/lab-scratch"


class Equal:
    """A guest with three disks that is protected while it works."""

    def __init__(self, rig: Rig, target: str) -> None:
        self.rig = rig
        self.target = target
        self.name = rig.guest(f"eq-{target}", rate=20)
        rig.rows(self.name, 10)
        self.used_before = rig.used(target)
        self.facts = rig.protect(self.name, target)
        self.taken = rig.used(target) - self.used_before
        self.source_bytes = rig.allocated(self.name)


@pytest.fixture(scope="module", params=["xfs", "ext4"])
def protected(rig: Rig, request: pytest.FixtureRequest) -> Iterator[Equal]:
    made = Equal(rig, request.param)
    yield made
    rig.forget(made.name)


@pytest.fixture
def equal(protected: Equal) -> Equal:
    """The guest, running again whatever the previous test did."""
    rig, name = protected.rig, protected.name
    if rig.lab.state("a", name) != "running":
        rig.start(name)
    return protected


def test_frozen_source_equals_point_under_load(equal: Equal) -> None:
    """Deltas while the guest writes; each frozen disk as QEMU serves it is compared with the replica's files."""
    rig, name = equal.rig, equal.name
    assert {disk: fmt for disk, (_, fmt) in rig.sources(name).items()} == DISKS
    kinds = {path.suffix for path in rig.point_images(name)[rig.points(name)[0]].values()}
    assert kinds == {".raw"}
    for _ in range(2):
        rig.rows(name, 5)
        cycle = rig.engine("frozen_cycle", name)
        assert cycle["mode"] == "delta"
        assert set(cycle["content"]) == set(DISKS)
        assert rig.content(name, cycle["point"]) == cycle["content"]
    if equal.target == "ext4":
        assert {path.suffix for path in rig.point_images(name)[cycle["point"]].values()} == {".qcow2"}


def test_verify_says_the_same(equal: Equal) -> None:
    rig, name = equal.rig, equal.name
    facts = rig.job("verify", name)
    assert facts["equal"]
    assert set(facts["disks"]) == set(DISKS)
    for disk, proof in facts["disks"].items():
        assert proof["source_digest"] == proof["replica_digest"] == rig.disk_digest(name, disk)


def test_damaged_replica_is_found_and_repaired(equal: Equal) -> None:
    """A sector of a tracked disk's image is changed outside replication: it is reported, and that piece is sent
    again."""
    rig, name = equal.rig, equal.name
    rig.paused(name)
    try:
        rig.replicate(name)
        before = rig.content(name)
        rig.damage(name, "sda", 200 * MIB)
        facts = rig.job("verify", name, repair=True)
        assert not facts["equal"]
        assert {disk for disk, proof in facts["disks"].items() if not proof["equal"]} == {"sda"}
        assert facts["repaired_bytes"] < MIB
        assert rig.content(name, facts["repaired_point"]) == before
    finally:
        rig.lab.command("a", name, "resume")


def test_thin_source_makes_a_thin_replica(equal: Equal) -> None:
    """The state right after the initial copy."""
    rig, name = equal.rig, equal.name
    size = sum(disk["size"] for disk in rig.engine("machine", "a", rig.protection(name)["source_machine"])["disks"])
    assert equal.source_bytes < size / 8  # otherwise the test would prove nothing
    assert equal.facts["bytes_sent"] < equal.source_bytes * 1.2
    assert equal.taken < equal.source_bytes * 1.2 + 8 * MIB


def test_trim_travels_as_zeroes_and_frees_space(equal: Equal) -> None:
    rig, name = equal.rig, equal.name
    rig.paused(name)
    try:
        rig.replicate(name)
        rig.lab.command("a", name, f"fill {SCRATCH}/big 0 24")
        filled = rig.replicate(name, keep=False)
        assert filled["bytes_sent"] > 24 * MIB
        used = rig.used(equal.target)
        rig.lab.command("a", name, f"rm {SCRATCH}/big; sync; fstrim {SCRATCH}")
        trimmed = rig.replicate(name, keep=False)
        assert trimmed["bytes_zeroed"] > 20 * MIB
        assert trimmed["bytes_sent"] < 8 * MIB  # blocks that are partly free
        assert rig.used(equal.target) < used - 16 * MIB
    finally:
        rig.lab.command("a", name, "resume")


def test_stopped_guest_equals_its_last_point(equal: Equal) -> None:
    """Finally the guest shuts down: its image files, read by qemu-img, are compared with the replica's."""
    rig, name = equal.rig, equal.name
    rig.rows(name, 5)
    rig.lab.shutdown("a", name)
    facts = rig.replicate(name)
    assert facts["consistency"] == "offline"
    assert rig.content(name) == rig.source_content(name)
