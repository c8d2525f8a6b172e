"""The engine is killed at every crash point, in every chapter of a protected machine's scenario.

Each case: the chapter runs in a process that kills itself at the place; the invariants are checked right after the
kill; a new process completes the interrupted work; the invariants are checked again; then the machine is protected
again and a delta must make the replica equal. `places.txt` lists the places; it is compared with the places found.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

import asrcore
from tests.crash.memory import places
from tests.crash.memory._scenario import CHAPTERS
from tests.crash.memory._workers import Outcome, Story, Workers

pytestmark = pytest.mark.crash

# A case mostly waits: until the job log is read, and for the disk.
LANES = 3 * (os.cpu_count() or 1)
CASES = [(chapter, "") for chapter in CHAPTERS] + places.cases()

# Places in no chapter: creating, moving and upgrading a vault, which have their own tests, and single manual calls.
ELSEWHERE = {
    "adopt.recorded",  # `tests/faults/test_vault_known_behind.py`
    "jobs.left-to-person",  # `tests/unit/jobs/test_put_back.py`
    "vault.adopt.points",
    "vault.create.filled",
    "vault.move.copied",
    "vault.move.renamed",
    "vault.upgrade.committed",
    "vault.upgrade.copied",
    "vault.upgrade.written",
    "examine.noted",  # these and those of the scrub: `tests/unit/procedures/test_scrub.py`
    "scrub.ended",
    "scrub.part",
    "target.marked",
    "target.pinned",
    "test.taken-back",  # of a test that failed: `tests/unit/procedures/test_drill.py`
    "undo.completed",  # of a site that could not do its part: `tests/faults/test_failover.py`
    "vault.forget-mark.*",
    "vault.pin-point.*",
    "vault.request-cancel.*",
}


def case_id(case: tuple[str, str]) -> str:
    chapter, place = case
    return f"{chapter}/{place or 'undisturbed'}"


@pytest.fixture(scope="module")
def story() -> Iterator[Story]:
    # In memory if possible: a kill is no power failure, so nothing depends on flushes to the disk.
    quick = Path("/dev/shm")
    base = Path(tempfile.mkdtemp(prefix="asr-crash-", dir=quick if os.access(quick, os.W_OK) else None))
    with Workers(LANES) as lanes:
        yield Story(base, lanes)
    shutil.rmtree(base)


@pytest.fixture(scope="module")
def outcome(story: Story, request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], Outcome]]:
    """The selected cases, started ahead, several at once."""
    wanted: list[tuple[str, str]] = [
        cast(tuple[str, str], item.callspec.params["case"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == Path(__file__) and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(LANES) as pool:
        running: dict[tuple[str, str], Future[Outcome]] = {
            (chapter, place): pool.submit(story.disturbed, chapter, place) for chapter, place in wanted
        }
        yield lambda chapter, place: running[chapter, place].result()
        pool.shutdown(cancel_futures=True)


def marked(cases: Iterable[tuple[str, str]]) -> Iterator[Any]:
    """`long`: a place that an earlier case covers, in another chapter or at its first time."""
    seen = set()
    for case in cases:
        name = case[1].partition(":")[0]
        yield pytest.param(case, id=case_id(case), marks=[pytest.mark.long] if name in seen else [])
        if name:
            seen.add(name)


@pytest.mark.parametrize("case", list(marked(CASES)))
def test_killed(case: tuple[str, str], outcome: Callable[[str, str], Outcome]) -> None:
    chapter, place = case
    found = outcome(chapter, place)
    assert found.killed == -signal.SIGKILL, found.log
    assert found.went_on == 0, found.log


def test_what_was_flushed_is_not_sent_again(outcome: Callable[[str, str], Outcome], story: Story) -> None:
    """So that `check_resumed` does not pass because nothing was done."""
    for chapter, place in (("enable", "cycle.flushed:4"), ("delta", "cycle.flushed:2"), ("resync", "cycle.flushed:3")):
        notes = story.disturbed(chapter, place).notes
        assert int(str(notes["done"])) > 0
        assert int(str(notes["left"])) > 0
        assert notes["resumed"] is True


def test_no_place_is_forgotten(story: Story) -> None:
    """A new crash point appears here: `python -m tests.crash.memory.places` adds it to the list."""
    found = {name: story.places(name) for name in CHAPTERS}
    assert places.render(found) == places.FILE.read_text()


def test_every_place_named_in_the_engine_is_killed_at() -> None:
    """Including those that only a rare path reaches: read from the engine's source."""
    named = set()
    for file in Path(asrcore.__file__).parent.rglob("*.py"):
        if "conformance" not in file.parts and file.name != "crashpoint.py":
            named |= {
                re.sub(r"\{[^}]*\}", "*", name) for name in re.findall(r'reach\(\s*f?"([^"]+)"', file.read_text())
            }
    reached = {name for names in places.committed().values() for name in names}
    patterns = {name: re.compile(re.escape(name).replace(r"\*", ".*")) for name in named}
    missed = {name for name, pattern in patterns.items() if not any(map(pattern.fullmatch, reached))}
    assert missed <= ELSEWHERE, missed - ELSEWHERE
    assert len(reached) >= 25
