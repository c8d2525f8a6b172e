"""The kit as a whole: nothing hidden, nothing untested, nothing that only one driver needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from asrcore.testing.conformance import DriverConformance

from .mutants import MUTANTS

PARTS = [part for part in DriverConformance.__mro__ if part.__module__.startswith("asrcore.testing.conformance")]


def kit_tests(part: type) -> set[str]:
    return {name for name in vars(part) if name.startswith("test_")}


def test_no_part_hides_a_test_of_another() -> None:
    names = [name for part in PARTS for name in kit_tests(part)]
    assert sorted(names) == sorted(set(names))


def test_every_test_says_what_it_needs() -> None:
    """A test without capabilities must hold for every driver: those of the site and of listing."""
    free = {
        f"{part.__name__}.{name}"
        for part in PARTS
        for name in kit_tests(part)
        if "asr_needs" not in vars(part)[name].__dict__
    }
    assert {name.partition(".")[0] for name in free} == {"SiteConformance", "InventoryConformance"}


# The kit itself closes each view again when it cleans up: a driver that does not accept that fails everywhere.
WITHOUT_MUTANT = {"test_a_view_may_be_closed_twice"}


def test_every_test_can_fail() -> None:
    caught = set().union(*(mutant.caught_by for mutant in MUTANTS))
    assert {name for part in PARTS for name in kit_tests(part)} - caught == WITHOUT_MUTANT


@pytest.mark.parametrize("module", ["asrcore.testing", "asrcore.testing.memory", "asrcore.testing.faults"])
def test_only_the_kit_needs_pytest(module: str) -> None:
    code = f"import sys; sys.modules['pytest'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_asserts_of_the_kit_explain_themselves(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        from asrcore.testing.conformance import InventoryConformance
        from asrcore.testing.conformance.memory_rig import MemoryRig
        from asrcore.testing.memory._inventory import MemoryInventory

        class TestIt(InventoryConformance):
            @pytest.fixture
            def rig(self, monkeypatch):
                monkeypatch.setattr(MemoryInventory, "fence", lambda self, machine_id, fence: None)
                with MemoryRig("explained") as rig:
                    yield rig
        """
    )
    result = pytester.runpytest_subprocess("-k", "recorded_at_the_site", "-p", "no:randomly")
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["*assert None == Fence(*"])


pytest_plugins = ["pytester"]
