"""One page blob: created, leased, written, snapshotted, read. Sizes and offsets are bytes."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import attrs
from azure.core import MatchConditions
from azure.core.exceptions import (
    HttpResponseError,
    ResourceExistsError,
    ResourceModifiedError,
    ResourceNotFoundError,
)
from azure.storage.blob import BlobClient, BlobLeaseClient, PageRange

from asr_driver_azure.blobs import vhd
from asr_driver_azure.cloud import errors
from asr_driver_azure.cloud.calls import Calls
from asrcore.model.extent import Extent, clip, normalise
from asrcore.units import GiB

__all__ = ["MOST", "Fenced", "PageBlob", "Properties"]

T = TypeVar("T")
MOST = 4 * 1024 * 1024
"""Bytes of the largest put."""
_DIFF_SPAN = 64 * GiB  # this call's answer does not come in pages
_SIZE = "asrsize"  # metadata: the disk's size for which the footer was written
_LEASE_ERRORS = {
    "LeaseIdMismatchWithBlobOperation",
    "LeaseIdMissing",
    "LeaseLost",
    "LeaseNotPresentWithBlobOperation",
    "SequenceNumberConditionNotMet",
}


class Fenced(Exception):  # never shown: its handlers know the epoch to report
    """The lease or the sequence number says that another has taken over."""


@attrs.frozen
class Properties:
    """`length`: bytes, footer included. `footed`: the disk's size whose footer is in place; 0 for none."""

    length: int
    sequence: int
    footed: int


class PageBlob:
    """A disk's blob, or a snapshot of it. Thread-safe."""

    def __init__(self, client: BlobClient, calls: Calls, where: str = "") -> None:
        self._client = client
        self._calls = calls
        self._where = where
        self._in_clear = str(client.url).startswith("http://")
        self.name = str(client.blob_name)
        self.snapshot = str(client.snapshot or "")

    def _run(self, operation: str, call: Callable[[], T], *, write: bool = False) -> T:
        def reported() -> T:
            try:
                return call()
            except HttpResponseError as error:
                if errors.status_of(error) in (409, 412) and errors.code_of(error) in _LEASE_ERRORS:
                    raise Fenced(errors.code_of(error)) from error
                raise

        return self._calls.run(f"{operation} {self.name}", reported, where=self._where if write else "")

    # -- life

    def create(self, size: int) -> None:
        """Create it for a disk of `size` bytes, empty except for the footer; an existing one is kept."""

        def create() -> None:
            with contextlib.suppress(ResourceExistsError, ResourceModifiedError):
                self._client.create_page_blob(vhd.blob_size(size), match_condition=MatchConditions.IfMissing)

        self._run("creating", create, write=True)

    def properties(self) -> Properties | None:
        """None if there is no such blob."""

        def get() -> Properties | None:
            try:
                found = self._client.get_blob_properties()
            except ResourceNotFoundError:
                return None
            sequence = int(found.page_blob_sequence_number or 0)
            return Properties(int(found.size), sequence, int((found.metadata or {}).get(_SIZE, 0)))

        return self._run("reading", get)

    def fit(self, size: int, lease: str, known: Properties) -> None:
        """Make it fit a disk of `size` bytes: length, and the footer at its end. May be repeated after a crash."""
        if known.footed == vhd.rounded(size) and known.length == vhd.blob_size(size):
            return
        wanted = vhd.blob_size(size)
        if known.length != wanted:
            # Before it is grown: else a footer would be left in the middle of the disk, as content.
            self.clear(known.length - vhd.FOOTER, vhd.FOOTER, lease, None)
            self._run("resizing", lambda: self._client.resize_blob(wanted, lease=lease), write=True)
        footer = vhd.footer(vhd.rounded(size), uuid.uuid5(uuid.NAMESPACE_URL, self.name))
        self.put(wanted - vhd.FOOTER, footer, lease, None)
        metadata = {_SIZE: str(vhd.rounded(size))}
        self._run("describing", lambda: self._client.set_blob_metadata(metadata, lease=lease), write=True)

    # -- ownership

    def take(self, lease: str, former: Sequence[str]) -> bool:
        """Lease it without an end. One of `former` is changed to the new lease; any other holder keeps it: False.

        It is never broken: a broken lease could be that of an owner not known yet.
        """

        def acquire(holder: str) -> bool:
            client = BlobLeaseClient(self._client, lease_id=holder)
            try:
                if holder == lease:
                    client.acquire(lease_duration=-1)
                else:
                    client.change(proposed_lease_id=lease)
            except HttpResponseError as error:
                if errors.status_of(error) in (409, 412):
                    return False
                if errors.status_of(error) == 404:
                    return True  # the cycle that writes to it creates it, with its lease
                raise
            return True

        return any(self._run("leasing", partial(acquire, holder), write=True) for holder in (lease, *former))

    def release(self, leases: Sequence[str]) -> None:
        """Give up whichever of these leases it has."""
        for lease in leases:

            def release(lease: str = lease) -> bool:
                try:
                    BlobLeaseClient(self._client, lease_id=lease).release()
                except HttpResponseError as error:
                    if errors.status_of(error) in (404, 409, 412):
                        return False
                    raise
                return True

            if self._run("releasing", release, write=True):
                return

    def number(self, lease: str) -> tuple[int, int]:
        """Give it the next sequence number, and return it: puts sent under another one are refused, and no two callers
        get the same number. Also returns how often that was asked: after a lost answer it may have counted more than
        once. Raises Fenced."""
        asked = 0

        def increment() -> int:
            nonlocal asked
            asked += 1
            answer: Any = self._client.set_sequence_number("increment", lease=lease)
            return int(answer["blob_sequence_number"])

        return self._run("numbering", increment, write=True), asked

    # -- content

    def put(self, offset: int, data: bytes | memoryview, lease: str, sequence: int | None) -> None:
        """Write at most MOST bytes. Raises Fenced."""
        body: Any = data  # the SDK says bytes; what has a length and bytes is sent without a copy
        condition = self._conditions(lease, sequence)
        if self._in_clear and lease:  # TLS proves more at less cost; a managed disk, which has no leases, refuses it
            condition["transactional_content_md5"] = hashlib.md5(data, usedforsecurity=False).digest()
        self._run("writing to", lambda: self._client.upload_page(body, offset, len(body), **condition), write=True)

    def clear(self, offset: int, length: int, lease: str, sequence: int | None) -> None:
        """Make a range of any length read as zeroes, and free it. Raises Fenced."""
        condition = self._conditions(lease, sequence)
        self._run("clearing", lambda: self._client.clear_page(offset, length, **condition), write=True)

    def _conditions(self, lease: str, sequence: int | None) -> dict[str, Any]:
        found: dict[str, Any] = {"lease": lease} if lease else {}
        return found if sequence is None else found | {"if_sequence_number_eq": sequence}

    def snapshot_now(self, lease: str) -> str:
        """The name of a new snapshot, once Azure has acknowledged it. Raises Fenced."""
        return self._run("snapshotting", lambda: str(self._client.create_snapshot(lease=lease)["snapshot"]), write=True)

    def stored(self, size: int) -> list[Extent]:
        """Ranges within `size` bytes that hold data; all other bytes are zero."""

        def walk() -> list[Extent]:
            return [_extent(item) for item in self._client.list_page_ranges()]

        return clip(normalise(self._run("listing pages of", walk)), size)

    def changed(self, since: str, size: int) -> list[Extent]:
        """Ranges within `size` bytes that were written since the snapshot of that name; `zero` where cleared."""

        def walk() -> list[Extent]:
            found = self._client.list_page_ranges(previous_snapshot=since)
            return [_extent(item) for item in found]

        return clip(normalise(self._run("listing changes of", walk)), size)

    def changed_since(self, former: str, size: int) -> list[Extent]:
        """The same of a managed disk's snapshot, since the one with that URL."""

        def walk() -> list[Extent]:
            found: list[Extent] = []
            for start in range(0, size, _DIFF_SPAN):
                written, cleared = self._client.get_page_range_diff_for_managed_disk(
                    previous_snapshot_url=former, offset=start, length=min(_DIFF_SPAN, size - start)
                )
                found += [Extent(item["start"], item["end"] - item["start"] + 1) for item in written]
                found += [Extent(item["start"], item["end"] - item["start"] + 1, zero=True) for item in cleared]
            return found

        return clip(normalise(self._run("listing changes of", walk)), size)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer. Raises ResourceNotFoundError's translation where blob or snapshot is gone."""

        def read() -> None:
            stream: Any = self._client.download_blob(offset=offset, length=len(buffer))
            data = stream.readall()
            if len(data) != len(buffer):
                raise HttpResponseError(f"{len(data)} bytes received, {len(buffer)} requested")
            buffer[:] = data

        self._run("reading", read)


def _extent(item: PageRange) -> Extent:
    start = int(item.start or 0)
    return Extent(start, int(item.end or 0) - start + 1, zero=bool(item.cleared))
