"""SIGKILL in the middle of a transaction: the complete old state or the complete new one."""

from __future__ import annotations

import signal

import attrs
import pytest

from asrcore.model.epoch import next_generation
from asrcore.model.point import Mark
from asrcore.model.protection import NetworkMap, Protection
from asrcore.model.state import State
from asrcore.vault import Vault
from tests.unit.vault import samples

RECORD = """
    vault = Vault.open(sys.argv[1])
    vault.record_point("id-1", "c2", samples.point(2), stats=samples.stats(2))
"""
REVERSE = """
    from asrcore.model.protection import NetworkMap
    vault = Vault.open(sys.argv[1])
    vault.start_reverse("id-1", replica_id="back", source_machine="t", seed_machine="uuid-1", networks=NetworkMap())
"""


def state(place: str) -> tuple[Protection, list[str], list[str]]:
    with Vault.open(place) as vault:
        points = [item.id for item in vault.points("id-1")]
        return vault.protection("id-1"), points, [item.id for item in vault.cycles("id-1")]


def crash(code: str, place: str, at: str) -> None:
    status, said = samples.run(code, place, ASRCORE_CRASH_AT=at)
    assert status == -signal.SIGKILL, said


@pytest.mark.parametrize(
    ("at", "recorded"),
    [
        ("vault.record-point.inserted", False),
        ("vault.record-point.written", False),
        ("vault.record-point.committed", True),
    ],
)
def test_recording_is_whole_or_not_at_all(at: str, recorded: bool, place: str) -> None:
    with Vault.open(place) as vault:
        samples.record(vault, 1)
        before = vault.begin_cycle("id-1", samples.cycle(2, "p1"))
    old = (before, ["p1"], ["c1"])
    after = attrs.evolve(before, pending=None, head_point="p2", mark=Mark("mark-2"), last_cycle_at=1002.1)
    new = (after, ["p2"], ["c1", "c2"])
    crash(RECORD, place, at)
    assert state(place) == (new if recorded else old)
    with Vault.open(place) as vault:  # the engine repeats the step
        vault.record_point("id-1", "c2", samples.point(2), stats=samples.stats(2))
    assert state(place) == new


@pytest.mark.parametrize(("at", "reversed_"), [("written", False), ("committed", True)])
def test_a_reversal_is_whole_or_not_at_all(at: str, reversed_: bool, place: str) -> None:
    with Vault.open(place) as vault:
        samples.record(vault, 1)
        with vault._write("test") as connection:
            connection.exec_driver_sql("UPDATE protections SET state='committed'")
        before = state(place)
    crash(REVERSE, place, f"vault.start-reverse.{at}")
    if not reversed_:
        assert state(place) == before
    with Vault.open(place) as vault:
        vault.start_reverse("id-1", replica_id="back", source_machine="t", seed_machine="uuid-1", networks=NetworkMap())
    found, points, _ = state(place)
    assert (found.state, found.epoch, found.source_site, found.mark, found.head_point, points) == (
        State.REVERSING,
        next_generation(before[0].epoch),
        "south",
        None,
        None,
        [],
    )


def test_killed_at_any_moment(place: str) -> None:
    """At any place, not only crash points: what the child reported as recorded exists after the kill."""
    code = """
    vault = Vault.open(sys.argv[1])
    for number in range(int(sys.argv[2]), 100000):
        samples.record(vault, number, kept=number % 3 == 0)
        print(number, flush=True)
    """
    said = 0
    for _ in range(3):
        first = said + 1
        with samples.child(code, place, first) as process:
            assert process.stdout is not None
            while said < first + 20:
                said = int(process.stdout.readline())
            process.kill()
            rest = process.stdout.read().split()  # not communicate(), which ignores lines that were read ahead
            process.wait(60)
        said = int(rest[-1]) if rest else said
        with Vault.open(place) as vault:
            found = vault.protection("id-1")
            head = int(str(found.head_point)[1:])
            assert head in (said, said + 1)
            kept = range(3, head, 3)
            assert [item.id for item in vault.points("id-1")] == [f"p{number}" for number in [*kept, head]]
            assert vault.cycles("id-1")[-1].id == f"c{head}"
            if found.pending is not None:
                vault.abandon_cycle("id-1", found.pending.id)
        said = head
