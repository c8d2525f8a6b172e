"""The target's storage is full or read-only: a catalogued error, no damage, and the same cycle resumes afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.rig import MIB, TARGETS, EngineError, Rig

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


@contextmanager
def ballast(rig: Rig, target: str, leave: int) -> Iterator[None]:
    """Fill the target's file system except for this many bytes."""
    path = rig.lab.host_path("b", f"{TARGETS[target]}/ballast")
    status = os.statvfs(path.parent)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave)
    try:
        yield
    finally:
        path.unlink()
        os.sync()


def everything(home: Path) -> dict[str, tuple[int, int]]:
    """Name, size and time of all files of a replica."""
    found = {}
    for path in sorted(home.rglob("*")):
        status = path.stat()
        found[str(path.relative_to(home))] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.mark.parametrize("target", ["small-xfs", pytest.param("small", marks=pytest.mark.long)])
def test_full_target(rig: Rig, target: str) -> None:
    lab, name = rig.lab, rig.guest(f"full-{target}", rate=2)
    lab.command("a", name, "fill /mnt/lab-scratch/first 0 24")
    with ballast(rig, target, 20 * MIB), pytest.raises(EngineError) as failed:
        rig.protect(name, target)
    assert (failed.value.code, failed.value.exit_code) == ("target-full", 8)
    assert rig.state(name) == "initial-copy"
    assert rig.points(name) == []

    rig.replicate(name)
    assert rig.state(name) == "protected"
    old = rig.points(name)
    before = {point: rig.content(name, point) for point in old}

    lab.command("a", name, "fill /mnt/lab-ledger/second 0 16")
    with ballast(rig, target, 6 * MIB):
        for _ in range(2):  # still full: nothing accumulates
            with pytest.raises(EngineError) as failed:
                rig.replicate(name)
            assert (failed.value.code, failed.value.exit_code) == ("target-full", 8)
        known = rig.protection(name)
        assert known["state"] == "protected"
        assert known["error"]["code"] == "target-full"
        assert known["retry_at"] is not None
        assert rig.points(name) == old
        assert {point: rig.content(name, point) for point in old} == before
        pending = known["pending"]["id"]

    facts = rig.replicate(name)
    assert facts["resumed"]
    assert rig.engine("cycles", name)[-1]["id"] == pending
    assert facts["bytes_sent"] < 18 * MIB
    assert rig.protection(name)["error"] is None
    assert {point: rig.content(name, point) for point in old} == before
    cycle = rig.engine("frozen_cycle", name)
    assert rig.content(name, cycle["point"]) == cycle["content"]
    rig.forget(name)


@pytest.mark.parametrize("target", ["small-xfs", pytest.param("small", marks=pytest.mark.long)])
def test_read_only_target(rig: Rig, target: str) -> None:
    lab, name = rig.lab, rig.guest(f"fixed-{target}", rate=5)
    rig.protect(name, target)
    old = rig.points(name)
    before, stored = rig.content(name), everything(rig.home(name))
    mount = ["mount", "-o", "remount,ro", TARGETS[target]]
    lab.run_in("b", mount)
    try:
        with pytest.raises(EngineError) as failed:
            rig.replicate(name)
        assert (failed.value.code, failed.value.exit_code) == ("target-read-only", 7)
        known = rig.protection(name)
        assert known["state"] == "protected"
        assert known["attempt"] == 1
        assert known["retry_at"] is not None  # within a minute: somebody may have remounted it
        health = next(item for item in rig.engine("status") if item["protection"]["name"] == name)["health"]
        assert ("target-read-only", "error") in {(reason["code"], reason["severity"]) for reason in health["reasons"]}
        assert everything(rig.home(name)) == stored
        assert rig.points(name) == old
    finally:
        lab.run_in("b", [*mount[:2], "remount,rw", mount[3]])
    facts = rig.replicate(name)
    assert facts["mode"] == "delta"
    known = rig.protection(name)
    assert (known["attempt"], known["error"]) == (0, None)
    assert rig.content(name, old[0]) == before
    cycle = rig.engine("frozen_cycle", name)
    assert rig.content(name, cycle["point"]) == cycle["content"]
    rig.forget(name)
