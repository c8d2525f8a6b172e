"""Tokens and SAS that expire while they are in use. The servers refuse expired and replaced ones."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from asr_driver_azure.machines import disk_access
from asrcore.driver import FrozenView, Tracking, ViewRequest
from asrcore.model.extent import Extent
from asrcore.model.point import Consistency
from asrcore.testing.conformance._target_bench import TargetBench
from asrcore.units import KiB, MiB
from drivers.azure.tests.failover.rig import FailoverRig


@pytest.fixture(autouse=True)
def _replaced(rig: FailoverRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.cloud.content, "replaces", True)
    monkeypatch.setattr(rig.cloud.content, "late", 0)


def check_disk(rig: FailoverRig, target: TargetBench) -> None:
    for disk, size in target.sizes.items():
        name, _ = rig._disks(target.id)[disk]
        with rig.cloud.content.path(f"disks/{name}").open("rb") as file:
            assert file.read(size) == target.head[disk]


def open_view(rig: FailoverRig, target: TargetBench, view: str, since: FrozenView | None = None) -> FrozenView:
    mark = since.machines[target.id].mark if since else None
    request = ViewRequest(target.id, view, mark)
    return rig.target_site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0)


@pytest.fixture
def views(rig: FailoverRig, target: TargetBench) -> Iterator[tuple[FrozenView, FrozenView]]:
    """Views of a machine as it was promoted, and after a change of its first disk."""
    rig.promote(target)
    with open_view(rig, target, "first") as first:
        name, _ = rig._disks(target.id)[target.first]
        with rig.cloud.content.path(f"disks/{name}").open("r+b") as file:
            file.seek(MiB)
            file.write(b"changed in the cloud")
        with open_view(rig, target, "second", first) as second:
            yield first, second
    rig.target_site.source.keep_marks(target.id, [])


def read(view: FrozenView, target: TargetBench) -> bytes:
    buffer = bytearray(target.sizes[target.first])
    with view.machines[target.id].disks[target.first].reader() as reader:
        reader.read_into(0, memoryview(buffer))
    return bytes(buffer)


def test_a_token_is_renewed_in_a_long_upload(
    rig: FailoverRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same connection signs in again; its first token is refused by then."""
    monkeypatch.setattr(rig.cloud, "token_seconds", 3)
    monkeypatch.setattr(rig.cloud.content, "delay", 3.5)
    rig.restart()  # a connection without a token
    given, begun = rig.cloud.tokens_given, time.monotonic()
    rig.promote(target)
    assert time.monotonic() - begun > 3.5
    assert rig.cloud.tokens_given > given + 1
    assert min(rig.cloud._tokens.values()) < time.time()
    check_disk(rig, target)
    monkeypatch.undo()
    rig.restart()


def test_a_sas_is_renewed_before_its_time_is_over(
    rig: FailoverRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_access, "SAS_SECONDS", 4)
    monkeypatch.setattr(rig.cloud.content, "delay", 3.7)
    before = rig.cloud.content.granted_count
    rig.promote(target)
    assert rig.cloud.content.granted_count - before > len(target.sizes)
    assert rig.cloud.content.late == 0, "renewed only after a refusal"
    check_disk(rig, target)


def test_a_sas_that_was_refused_is_renewed(
    rig: FailoverRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one is used: the old one stays refused."""
    put, puts = disk_access.Access.put, []

    def expiring(self: disk_access.Access, offset: int, data: bytes) -> None:
        puts.append(offset)
        if len(puts) == 2:
            rig.cloud.content.expire()
        put(self, offset, data)

    monkeypatch.setattr(disk_access.Access, "put", expiring)
    rig.promote(target)
    assert len(puts) >= 2
    assert rig.cloud.content.late > 0
    check_disk(rig, target)


def test_a_read_goes_on_with_a_new_sas(
    rig: FailoverRig, target: TargetBench, views: tuple[FrozenView, FrozenView]
) -> None:
    wanted = read(views[0], target)
    assert wanted == target.head[target.first]
    rig.cloud.content.expire()
    assert read(views[0], target) == wanted
    assert rig.cloud.content.late == 1


def test_a_read_renews_before_its_time_is_over(
    rig: FailoverRig, target: TargetBench, views: tuple[FrozenView, FrozenView], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_access, "SAS_SECONDS", 2)
    with open_view(rig, target, "third") as third:
        read(third, target)
        time.sleep(2.1)
        assert read(third, target)[MiB:].startswith(b"changed in the cloud")
    assert rig.cloud.content.late == 0


def test_both_ends_of_a_diff_are_renewed(
    rig: FailoverRig, target: TargetBench, views: tuple[FrozenView, FrozenView]
) -> None:
    """The older snapshot's SAS is in a header of the request for the newer one."""
    disk = views[1].machines[target.id].disks[target.first]
    assert disk.tracking is Tracking.CHANGED
    wanted = [Extent(MiB, 4 * KiB)]
    assert disk.changed() == wanted
    rig.cloud.content.expire()
    assert disk.changed() == wanted
    rig.cloud.content.revoke(f"snapshots/{_base(views[1], target)}")  # the older one only
    assert disk.changed() == wanted


def test_the_older_end_of_a_diff_is_renewed_before_its_time_is_over(
    rig: FailoverRig, target: TargetBench, views: tuple[FrozenView, FrozenView], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_access, "SAS_SECONDS", 2)
    disk = views[1].machines[target.id].disks[target.first]
    disk.changed()
    time.sleep(2.1)
    before = rig.cloud.content.granted_count
    disk.changed()
    assert rig.cloud.content.granted_count == before + 2
    assert rig.cloud.content.late == 0


def _base(view: FrozenView, target: TargetBench) -> str:
    return str(getattr(view.machines[target.id].disks[target.first], "_base"))  # noqa: B009 - it is the driver's own
