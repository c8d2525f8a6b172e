"""Broken variants of the failback fail the kit's tests meant for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from asr_driver_azure.blobs.pageblob import PageBlob
from asr_driver_azure.source import _Disk
from asrcore.driver import Tracking
from asrcore.testing.conformance import TrackingConformance
from asrcore.testing.conformance._base import SourceBench
from drivers.azure.tests.peers.arm.server import Cloud
from drivers.azure.tests.peers.storage import Storage
from drivers.azure.tests.source.rig import SourceRig


@pytest.fixture(scope="module")
def rig(storage: Storage, cloud: Cloud) -> Iterator[SourceRig]:
    with SourceRig(storage, cloud) as made:
        yield made


@pytest.fixture
def bench(rig: SourceRig) -> Iterator[SourceBench]:
    made = SourceBench(rig)
    yield made
    made.close()


def test_the_full_list_taken_for_a_diff(rig: SourceRig, bench: SourceBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not small, and does not report what was cleared."""
    monkeypatch.setattr(PageBlob, "changed_since", lambda self, former, size: self.stored(size))
    kit = TrackingConformance()
    with pytest.raises(AssertionError):
        kit.test_discarded_data_is_told_as_zeroes(rig, bench)


def test_the_clears_of_a_diff_forgotten(rig: SourceRig, bench: SourceBench, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _Disk.changed
    monkeypatch.setattr(_Disk, "changed", lambda self: [item for item in honest(self) if not item.zero])
    with pytest.raises(AssertionError):
        TrackingConformance().test_discarded_data_is_told_as_zeroes(rig, bench)


def test_a_lost_mark_taken_for_no_change(rig: SourceRig, bench: SourceBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Disk, "_track", lambda self, snapshot, since: (Tracking.CHANGED, ""))
    monkeypatch.setattr(_Disk, "changed", lambda self: [])
    with pytest.raises(AssertionError):
        TrackingConformance().test_a_lost_mark_is_told(rig, bench)


def test_the_honest_one_passes(rig: SourceRig, bench: SourceBench) -> None:
    TrackingConformance().test_discarded_data_is_told_as_zeroes(rig, bench)
