"""Tests of the kit: every broken driver fails exactly the tests meant for it, a correct driver none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import attrs
import pytest

from .mutants import MUTANTS, Mutant

pytestmark = pytest.mark.once

SUITE = Path(__file__).with_name("mutant_suite.py")
ROOT = Path(__file__).parents[3]
PROCESSES = 2


@attrs.frozen
class Outcome:
    """Results of one class of the suite: names of its tests, without parameters."""

    passed: set[str] = attrs.field(factory=set)
    failed: dict[str, str] = attrs.field(factory=dict)
    skipped: dict[str, str] = attrs.field(factory=dict)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Results of the whole suite by class, run once in separate processes."""
    classes = [f"Test{mutant.name}" for mutant in MUTANTS] + ["TestLittleIsClaimed", "TestRigIsMissing"]
    folder = tmp_path_factory.mktemp("mutants")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:randomly"]
    running = []
    for number in range(PROCESSES):
        chosen = [f"{SUITE}::{name}" for name in classes[number::PROCESSES]]
        with (folder / f"{number}.log").open("w") as log:
            running.append(
                subprocess.Popen(
                    [*command, f"--junitxml={folder / f'{number}.xml'}", *chosen],
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    result: dict[str, Outcome] = {}
    for number, process in enumerate(running):
        try:
            code = process.wait(timeout=250)
        finally:
            process.kill()
        assert code == 1, (folder / f"{number}.log").read_text()[-5000:]  # 1: some tests failed, as they must
        for case in ElementTree.parse(folder / f"{number}.xml").iter("testcase"):
            _sort(case, result.setdefault(case.attrib["classname"].rpartition(".")[2], Outcome()))
    assert set(result) == set(classes)
    return result


def _sort(case: ElementTree.Element, outcome: Outcome) -> None:
    name = case.attrib["name"].partition("[")[0]
    bad = [item for item in case if item.tag in ("failure", "error")]
    skipped = case.find("skipped")
    if bad:
        outcome.failed[name] = f"{bad[0].get('message')}\n{bad[0].text}"
    elif skipped is not None:
        outcome.skipped[name] = skipped.get("message", "")
    else:
        outcome.passed.add(name)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fails_exactly_the_tests_meant_for_it(mutant: Mutant, outcomes: dict[str, Outcome]) -> None:
    assert mutant.caught_by, "no test of the kit would detect this driver"
    assert set(outcomes[f"Test{mutant.name}"].failed) == mutant.caught_by


def test_what_is_not_claimed_is_skipped_with_a_reason(outcomes: dict[str, Outcome]) -> None:
    little = outcomes["TestLittleIsClaimed"]
    assert little.failed == {}
    assert "test_a_view_is_frozen_while_the_machine_writes" in little.passed
    assert "test_dropping_keeps_the_others" in little.passed
    assert little.skipped["test_changes_are_complete"] == "the source site does not claim tracking"
    assert little.skipped["test_undo_leaves_the_replica_as_before"] == "the target site does not claim failover, power"


def test_a_missing_rig_is_explained(outcomes: dict[str, Outcome]) -> None:
    missing = outcomes["TestRigIsMissing"]
    assert missing.passed == set()
    for reported in missing.failed.values():
        assert "define a fixture named `rig`" in reported
