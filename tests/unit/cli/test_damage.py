"""A damaged recovery point at the command line: refused, shown, and used only if that is asked for."""

from __future__ import annotations

from asrcore.testing.memory import MemoryWorld
from asrcore.units import KiB
from tests.unit.cli.conftest import Asr


def test_a_damaged_point_is_refused_shown_and_allowed(asr: Asr, sites: MemoryWorld) -> None:
    assert asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")[0] == 0
    status = asr("status")[1][0]
    point = status["last_point"]["id"]
    away = MemoryWorld.find("away")
    assert away is not None
    with away.look() as state:
        (replica,) = state.replicas
    away.damage_point(replica, point, "vda", 100 * KiB)
    code, proved = asr("failover", "test", "web", "--prove")
    assert (code, proved["error"]["code"]) == (9, "point-damaged")
    code, refused = asr("failover", "unplanned", "web", "--yes")
    assert (code, refused["error"]["code"]) == (9, "point-damaged")
    (shown,) = asr("point", "list", "web")[1]
    assert "disk vda" in shown["damaged"]
    assert shown["proved_at"] is not None
    status = asr("status")[1][0]
    assert (status["damaged_points"], status["health"]["level"]) == (1, "critical")
    plan = asr("failover", "unplanned", "web", "--point", point, "--dry-run")[1]["plan"]
    assert any("is damaged" in text for text in plan["effects"])
    assert asr("failover", "test", "web", "--allow-damaged")[0] == 0
