"""Ranges that are read together: how many requests are in flight, and what an error or a close does to the others."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.blobs.pageblob import PageBlob
from asr_driver_azure.blobs.ranges import RangeSet
from asr_driver_azure.cloud.pacer import PARALLEL
from asr_driver_azure.settings import SiteSettings
from asr_driver_azure.source import _Reader, _View
from asr_driver_azure.target.replica import BlobReader
from asrcore.driver import DiskReader
from asrcore.errors import SiteUnreachable, ViewLost
from asrcore.model.extent import Extent, align, intersect
from asrcore.units import KiB

SIZE = 1024 * KiB
SECONDS = 60.0
GIVEN = {"account_url": "http://127.0.0.1:1/devstoreaccount1", "container": "reads", "account_key": "a2V5"}


class Blob:
    """Holds some pages, and counts requests. While `hold` is set none is answered; `fail` is raised by the request for
    that offset."""

    def __init__(self) -> None:
        self.content, self.held = bytes(SIZE), [Extent(0, SIZE)]
        self.fill(random.Random(8).randbytes(SIZE), [Extent(0, SIZE)])
        self.changed = threading.Condition()
        self.asked: list[int] = []
        self.in_flight = self.most = 0
        self.hold = False
        self.fail: dict[int, Exception] = {}

    def fill(self, data: bytes, held: list[Extent]) -> None:
        """Hold these ranges of the data, and zeroes elsewhere."""
        content = bytearray(SIZE)
        for item in held:
            content[item.offset : item.end] = data[item.offset : item.end]
        self.content, self.held = bytes(content), held

    def stored(self, size: int) -> list[Extent]:
        return self.held

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert intersect([Extent(offset, 1)], self.held)
        assert intersect([Extent(offset + len(buffer) - 1, 1)], self.held)
        with self.changed:
            self.asked.append(offset)
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            self.changed.notify_all()
            # One that fails does so when all that can be in flight is: what has not begun is cancelled then.
            assert self.changed.wait_for(
                lambda: not self.hold or (offset in self.fail and self.in_flight == PARALLEL), SECONDS
            )
        try:
            if offset in self.fail:
                raise self.fail[offset]
            buffer[:] = self.content[offset : offset + len(buffer)]
        finally:
            with self.changed:
                self.in_flight -= 1
                self.changed.notify_all()

    def wait(self, true: Callable[[], bool]) -> None:
        """Until something is so."""
        with self.changed:
            assert self.changed.wait_for(true, SECONDS)

    def release(self) -> None:
        """Answer from now on."""
        with self.changed:
            self.hold = False
            self.changed.notify_all()


class Frozen(_View):
    """A view of one snapshot, whose content is a Blob's."""

    def __init__(self, account: AzureAccount, blob: Blob) -> None:
        self._account, self._blob = account, blob
        self._blocks = {}
        self._lock = threading.Lock()

    def access(self, snapshot: str) -> Any:
        return self._blob

    def lost(self, problem: Any) -> Any:
        return ViewLost(machine="m", detail=str(problem))


@pytest.fixture(scope="module")
def account() -> Iterator[AzureAccount]:
    with AzureAccount("azure", SiteSettings.parse(GIVEN)) as made:
        yield made


@pytest.fixture
def blob() -> Iterator[Blob]:
    made = Blob()
    yield made
    made.release()


Make = Callable[[AzureAccount, Blob], DiskReader]


def replica_reader(account: AzureAccount, blob: Blob) -> DiskReader:
    return BlobReader(account, cast(PageBlob, blob), SIZE)


def snapshot_reader(account: AzureAccount, blob: Blob) -> DiskReader:
    return _Reader(Frozen(account, blob), "s", RangeSet(blob.held))


BOTH = pytest.mark.parametrize("make", [replica_reader, snapshot_reader])


def buffers(extents: list[tuple[int, int]]) -> list[tuple[int, memoryview]]:
    return [(offset, memoryview(bytearray(b"\xff" * length))) for offset, length in extents]


def check(reads: list[tuple[int, memoryview]], content: bytes) -> None:
    for offset, buffer in reads:
        assert buffer == content[offset : offset + len(buffer)]


@BOTH
def test_requests_are_in_flight_together_and_bounded(make: Make, account: AzureAccount, blob: Blob) -> None:
    """Two readers share what Azure may be asked at once."""
    blob.hold = True
    all_reads = [buffers([(at, 4 * KiB) for at in range(0, SIZE, 64 * KiB)]) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(make(account, blob).read_each, reads) for reads in all_reads]
        blob.wait(lambda: blob.in_flight == PARALLEL)
        assert not any(item.done() for item in work)
        blob.release()
        for item in work:
            item.result(SECONDS)
    assert (len(blob.asked), blob.most) == (32, PARALLEL)
    for reads in all_reads:
        check(reads, blob.content)


@BOTH
def test_one_range_is_read_by_the_caller(make: Make, account: AzureAccount, blob: Blob) -> None:
    blob.fill(blob.content, [Extent(0, 4 * KiB)])
    before = threading.active_count()
    reads = buffers([(0, 4 * KiB), (64 * KiB, 4 * KiB)])
    make(account, blob).read_each(reads)
    assert (blob.asked, threading.active_count()) == ([0], before)
    check(reads, blob.content)


@BOTH
def test_an_error_ends_the_read_and_the_next_one_works(
    make: Make, account: AzureAccount, blob: Blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not sent is not sent then; what was is waited for: it writes to the caller's buffers."""
    begun: list[Future[None]] = []
    begin = account.begin

    def noted(read: Callable[[], None]) -> Future[None]:
        begun.append(begin(read))
        return begun[-1]

    monkeypatch.setattr(account, "begin", noted)
    blob.hold = True
    blob.fail = {64 * KiB: SiteUnreachable(site="azure", detail="in the middle")}
    reader, reads = make(account, blob), buffers([(at, 4 * KiB) for at in range(0, SIZE, 32 * KiB)])
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(reader.read_each, reads)
        blob.wait(lambda: 64 * KiB in blob.asked and blob.in_flight >= PARALLEL - 1)
        end = time.monotonic() + SECONDS
        while sum(future.cancelled() for future in begun) < len(reads) - PARALLEL - 1:
            assert time.monotonic() < end, "what had not begun was not cancelled"
            time.sleep(0.001)
        assert not work.done(), "it does not wait for what is in flight"
        blob.release()
        with pytest.raises((SiteUnreachable, ViewLost), match="in the middle"):
            work.result(SECONDS)
    assert blob.in_flight == 0
    assert len(blob.asked) <= PARALLEL + 1 < len(reads)
    blob.fail = {}
    reader.read_each(reads)
    check(reads, blob.content)


@BOTH
def test_a_close_in_the_middle_lets_what_is_in_flight_end(make: Make, blob: Blob) -> None:
    account = AzureAccount("azure", SiteSettings.parse(GIVEN))
    blob.hold = True
    reads = buffers([(0, 4 * KiB), (64 * KiB, 4 * KiB)])
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(make(account, blob).read_each, reads)
        blob.wait(lambda: blob.in_flight == 2)
        account.close()
        blob.release()
        work.result(SECONDS)
    check(reads, blob.content)
    with pytest.raises((SiteUnreachable, ViewLost), match="was closed"):
        make(account, blob).read_each(reads)


EXTENTS = st.lists(
    st.integers(0, SIZE - 1).flatmap(lambda offset: st.tuples(st.just(offset), st.integers(0, SIZE - offset))),
    max_size=20,
)
PAGES = st.lists(st.tuples(st.integers(0, SIZE // 512 - 1), st.integers(1, 300)), max_size=10)


@BOTH
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extents=EXTENTS, pages=PAGES)
def test_any_extents_are_read_as_they_are(
    make: Make, account: AzureAccount, extents: list[tuple[int, int]], pages: list[tuple[int, int]]
) -> None:
    blob = Blob()
    held = align([Extent(first * 512, count * 512) for first, count in sorted(pages)], 512, SIZE)
    blob.fill(blob.content, held)
    reads = buffers(extents)
    make(account, blob).read_each(reads)
    check(reads, blob.content)
    assert len(blob.asked) == sum(bool(intersect([Extent(*item)], held)) for item in extents), "one request for each"
    assert blob.most <= PARALLEL
