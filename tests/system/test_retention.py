"""Retention on real replicas: expired points are deleted, kept points are unchanged and boot."""

from __future__ import annotations

import json
import math

import pytest

from tests.system.rig import MIB, Rig

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

BUCKET = 600.0
HOUR = 3600.0
CYCLES = 6  # each deletes at most a quarter of the kept points


@pytest.mark.parametrize("target", ["xfs", pytest.param("ext4", marks=pytest.mark.long)])
def test_dropped_points_are_gone_and_kept_ones_boot(rig: Rig, target: str) -> None:
    lab, name, policy = rig.lab, rig.guest(f"kept-{target}"), f"ladder-{target}"
    rig.engine(
        "add_policy", policy, interval=5.0, point_interval=5.0, keep=24 * HOUR, ladder=[(HOUR, BUCKET)]
    )  # fmt: skip
    rig.protect(name, target, policy)
    rows, content = {}, {}
    for number in range(4):
        row = rig.paused(name)
        lab.command("a", name, f"fill /mnt/lab-scratch/big {6 * number} 6")
        point = rig.replicate(name)["point"]
        rows[point], content[point] = row, rig.content(name)
        lab.command("a", name, "resume")
        rig.rows(name, 3)
    points = rig.engine("points", name)
    first_of: dict[int, str] = {}
    for item in points:
        first_of.setdefault(math.floor(item["taken_at"] / BUCKET), item["id"])
    used = rig.used(target)

    rig.engine("clock_ahead", 2 * HOUR)
    try:
        newest = [rig.replicate(name)["point"] for _ in range(CYCLES)]
    finally:
        rig.engine("clock_ahead", 0.0)
    left = rig.points(name)
    assert left == [*first_of.values(), *newest]
    assert not set(left) >= {item["id"] for item in points}
    _only_these_are_stored(rig, name, left)
    for point in set(left) & set(content):
        assert rig.content(name, point) == content[point]
    if target == "ext4":
        assert rig.used(target) < used + (3 + CYCLES) * MIB

    rig.engine("clock_ahead", 30 * HOUR)
    try:
        last = [rig.replicate(name)["point"] for _ in range(CYCLES)]
    finally:
        rig.engine("clock_ahead", 0.0)
    assert rig.points(name) == last
    _only_these_are_stored(rig, name, last)
    with rig.tested(name, last[-1]) as console:
        assert console.audits[-1].intact
        assert console.audits[-1].last >= max(rows.values())
    rig.forget(name)


def _only_these_are_stored(rig: Rig, name: str, points: list[str]) -> None:
    home = rig.home(name)
    record = json.loads((home / "replica.json").read_text())
    assert [point["stored"]["id"] for point in record["points"]] == points
    assert sorted(path.name for path in (home / "points").iterdir()) == sorted(points)
    needed = {home / image for image in record["heads"].values()} | {home / image for image in record["layers"]}
    assert set((home / "images").iterdir()) == needed
    if record["kind"] == "chain":
        assert len(needed) <= 3 * len(points)
