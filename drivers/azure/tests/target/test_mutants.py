"""Each broken variant of the driver fails the tests meant for it; the correct one passes them (elsewhere)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SUITE = Path(__file__).with_name("mutant_suite.py")
ROOT = Path(__file__).parents[4]
PASSED = {
    "TestPointBeforeItsAcknowledgement": {"test_a_kept_point_keeps_its_content", "test_allocated_covers_the_head"}
}
"""Tests that pass for a mutant that is broken only at a kill."""
CAUGHT_BY = {
    "TestNoFooter": {"test_a_blob_is_a_disk"},
    "TestZerosSkippedOnADirtyBlob": {"test_zeroes_read_as_zeroes", "test_the_last_call_counts"},
    "TestFullListTakenForADiff": {"test_zeroes_are_put_back"},
    "TestPointBeforeItsAcknowledgement": {"test_a_recorded_point_is_whole"},
    "TestFlushBeforeTheAcknowledgement": {"test_flushed_data_is_done_after_a_kill"},
    "TestEpochIgnored": {"test_a_stale_epoch_is_refused", "test_a_writer_of_the_time_before_cannot_seal"},
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Names of the tests that failed, by mutant."""
    report = tmp_path_factory.mktemp("mutants") / "report.xml"
    asked = {mutant: sorted(tests | PASSED.get(mutant, set())) for mutant, tests in CAUGHT_BY.items()}
    chosen = [f"{SUITE}::{mutant}::{test}" for mutant, tests in asked.items() for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1, done.stdout[-5000:]  # 1: some tests failed, as they must
    result: dict[str, set[str]] = {mutant: set() for mutant in CAUGHT_BY}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None:
            result[case.attrib["classname"].rpartition(".")[2]].add(case.attrib["name"])
    return result


@pytest.mark.parametrize("mutant", CAUGHT_BY)
def test_a_mutant_is_caught(mutant: str, failed: dict[str, set[str]]) -> None:
    assert failed[mutant] == CAUGHT_BY[mutant]
