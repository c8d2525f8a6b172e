"""SIGKILL in the middle of a transaction: the old state whole, or the new one."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import attrs
import pytest

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


def state(path: Path) -> tuple[Protection, list[str], list[str]]:
    with Vault.open(path) as vault:
        points = [item.id for item in vault.points("id-1")]
        return vault.protection("id-1"), points, [item.id for item in vault.cycles("id-1")]


def crash(code: str, path: Path, place: str) -> None:
    status, said = samples.run(code, path, ASRCORE_CRASH_AT=place)
    assert status == -signal.SIGKILL, said


@pytest.mark.parametrize(
    ("place", "recorded"),
    [
        ("vault.record-point.inserted", False),
        ("vault.record-point.written", False),
        ("vault.record-point.committed", True),
    ],
)
def test_recording_is_whole_or_not_at_all(place: str, recorded: bool, path: Path) -> None:
    with Vault.open(path) as vault:
        samples.record(vault, 1)
        before = vault.begin_cycle("id-1", samples.cycle(2, "p1"))
    old = (before, ["p1"], ["c1"])
    after = attrs.evolve(before, pending=None, head_point="p2", mark=Mark("mark-2"), last_cycle_at=1002.5)
    new = (after, ["p2"], ["c1", "c2"])
    crash(RECORD, path, place)
    assert state(path) == (new if recorded else old)
    with Vault.open(path) as vault:  # the engine repeats the step, whatever it was
        vault.record_point("id-1", "c2", samples.point(2), stats=samples.stats(2))
    assert state(path) == new


@pytest.mark.parametrize(("place", "reversed_"), [("written", False), ("committed", True)])
def test_a_reversal_is_whole_or_not_at_all(place: str, reversed_: bool, path: Path) -> None:
    with Vault.open(path) as vault:
        samples.record(vault, 1)
        with vault._write("test") as connection:
            connection.exec_driver_sql("UPDATE protections SET state='committed'")
        before = state(path)
    crash(REVERSE, path, f"vault.start-reverse.{place}")
    if not reversed_:
        assert state(path) == before
    with Vault.open(path) as vault:
        vault.start_reverse("id-1", replica_id="back", source_machine="t", seed_machine="uuid-1", networks=NetworkMap())
    found, points, _ = state(path)
    assert (found.state, found.epoch, found.source_site, found.mark, found.head_point, points) == (
        State.REVERSING,
        before[0].epoch + 1,
        "south",
        None,
        None,
        [],
    )


def test_killed_at_any_moment(path: Path) -> None:
    """Not at a named place but anywhere: what the child said that it recorded is there after the kill."""
    code = """
    vault = Vault.open(sys.argv[1])
    for number in range(1, 100000):
        samples.record(vault, number, kept=number % 3 == 0)
        print(number, flush=True)
    """
    said = 0
    for turn in range(3):
        copy = Path(shutil.copy(path, path.with_name(f"copy-{turn}.db")))
        with samples.child(code, copy) as process:
            assert process.stdout is not None
            while said < 20 * (turn + 1):
                said = int(process.stdout.readline())
            process.kill()
            rest = process.stdout.read().split()  # not communicate: it does not know of lines read ahead
            process.wait(60)
        said = int(rest[-1]) if rest else said
        with Vault.open(copy) as vault:
            head = vault.protection("id-1").head_point
            points = [item.id for item in vault.points("id-1")]
            cycles = [item.id for item in vault.cycles("id-1")]
        assert head in (f"p{said}", f"p{said + 1}")
        assert points[-1] == head
        assert cycles[-1] == "c" + head[1:]
        assert points[:-1] == [f"p{number}" for number in range(3, int(head[1:]), 3)]
        said = 0
