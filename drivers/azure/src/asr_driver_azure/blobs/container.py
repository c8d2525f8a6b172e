"""The container that holds replicas: small blobs as a whole, page blobs by their own class, and listing."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import attrs
from azure.core import MatchConditions
from azure.core.exceptions import ResourceExistsError, ResourceModifiedError, ResourceNotFoundError
from azure.storage.blob import BlobServiceClient, BlobType, ContainerClient

from asr_driver_azure.blobs.pageblob import PageBlob
from asr_driver_azure.blobs.record import FORMAT, Record, prefix_of, record_blob
from asr_driver_azure.cloud.calls import Calls
from asrcore import codec
from asrcore.errors import DriverFailed, MachineBusy, ReplicaDamaged, ReplicaNotFound

__all__ = ["Container", "Known", "Listed"]

T = TypeVar("T")
_ATTEMPTS = 20
_IDENTITY = "identity"


@attrs.frozen
class Listed:
    """A blob, or a snapshot of one."""

    name: str
    snapshot: str
    is_disk: bool


class Known(NamedTuple):
    """A record, and the ETag that it has until it is changed."""

    record: Record
    etag: str


class Container:
    """One container of a storage account. Thread-safe."""

    def __init__(self, service: BlobServiceClient, name: str, calls: Calls) -> None:
        self.client: ContainerClient = service.get_container_client(name)
        self.calls = calls
        self.where = f"{service.url.rstrip('/')}/{name}"

    def run(self, operation: str, call: Callable[[], T], *, write: bool = False, patience: float | None = None) -> T:
        """See `Calls.run`; `write`: permission problems are reported as those of a target."""
        return self.calls.run(operation, call, where=self.where if write else "", patience=patience)

    def page_blob(self, name: str, snapshot: str = "") -> PageBlob:
        """A disk, or a disk of a point."""
        return PageBlob(self.client.get_blob_client(name, snapshot=snapshot or None), self.calls, self.where)

    @cached_property
    def identity(self) -> str:
        """The identity of this container, independent of its name: the first caller creates it."""
        found = self.read(_IDENTITY)
        if found is None:
            self.write(_IDENTITY, str(uuid.uuid4()).encode(), new=True)
            found = self.read(_IDENTITY)
        if found is None:
            raise DriverFailed(operation="naming the container", site=self.calls.site, detail=f"{_IDENTITY} is missing")
        return found[0].decode()

    # -- small blobs

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Content and ETag; None if there is no such blob."""

        def get() -> tuple[bytes, str] | None:
            try:
                stream: Any = self.client.download_blob(name)
                return bytes(stream.readall()), str(stream.properties.etag)
            except ResourceNotFoundError:
                return None

        return self.run(f"reading {name}", get)

    def write(self, name: str, data: bytes, *, etag: str | None = None, new: bool = False) -> str | None:
        """Write all of a blob, and return its new ETag; None if it is no longer as `etag` says, or if a `new` one
        exists already."""
        conditions: dict[str, Any] = {}
        if etag is not None:
            conditions = {"etag": etag, "match_condition": MatchConditions.IfNotModified}
        elif new:
            conditions = {"match_condition": MatchConditions.IfMissing}

        def put() -> str | None:
            try:
                answer = self.client.get_blob_client(name).upload_blob(data, overwrite=not new, **conditions)
            except (ResourceModifiedError, ResourceExistsError):
                return None
            except ResourceNotFoundError:
                if etag is None:
                    raise
                return None
            return str(answer["etag"])

        return self.run(f"writing {name}", put, write=True)

    def delete(self, name: str, snapshot: str = "") -> None:
        """Delete a blob with its snapshots, or one snapshot; a missing one is no error."""

        def delete() -> None:
            blob = self.client.get_blob_client(name, snapshot=snapshot or None)
            with contextlib.suppress(ResourceNotFoundError):
                blob.delete_blob(delete_snapshots=None if snapshot else "include")

        self.run(f"deleting {name}", delete, write=True)

    def append(self, name: str, data: bytes) -> None:
        """Add to an append blob, which is created if missing. Repeating may add twice."""

        def append() -> None:
            blob = self.client.get_blob_client(name)
            try:
                blob.append_block(data)
            except ResourceNotFoundError:
                with contextlib.suppress(ResourceExistsError, ResourceModifiedError):
                    blob.create_append_blob(match_condition=MatchConditions.IfMissing)
                blob.append_block(data)

        self.run(f"writing {name}", append, write=True)

    def begin(self, name: str) -> None:
        """An empty append blob; the content of an existing one is deleted."""
        self.run(f"writing {name}", lambda: self.client.get_blob_client(name).create_append_blob(), write=True)

    def listed(self, prefix: str, *, snapshots: bool = False) -> list[Listed]:
        """Blobs whose names begin with `prefix`."""

        def walk() -> list[Listed]:
            found: Iterator[Any] = self.client.list_blobs(
                name_starts_with=prefix, include=["snapshots"] if snapshots else None
            )
            return [Listed(item.name, item.snapshot or "", item.blob_type == BlobType.PAGEBLOB) for item in found]

        return self.run("listing blobs", walk)

    def folders(self, prefix: str) -> list[str]:
        """Names of the next level below `prefix`, which ends with a slash."""

        def walk() -> list[str]:
            found: Any = self.client.walk_blobs(name_starts_with=prefix, delimiter="/")
            return [item.name[len(prefix) :].rstrip("/") for item in found if item.name.endswith("/")]

        return self.run("listing blobs", walk)

    # -- records

    def load(self, replica_id: str) -> Known | None:
        """The record and its ETag, also of a replica that is being deleted. Raises ReplicaDamaged."""
        found = self.read(record_blob(replica_id))
        if found is None:
            return None
        try:
            record = codec.load(Record, found[0])
        except ValueError as problem:
            raise ReplicaDamaged(replica=replica_id, detail=f"replica.json: {problem}") from problem
        if record.format > FORMAT:
            detail = f"replica.json has format {record.format}; this driver supports up to {FORMAT}: upgrade it"
            raise ReplicaDamaged(replica=replica_id, detail=detail)
        return Known(record, found[1])

    def record(self, replica_id: str, site: str) -> Record:
        """Raises ReplicaNotFound, ReplicaDamaged."""
        found = self.load(replica_id)
        if found is None or found.record.deleting:
            raise ReplicaNotFound(site=site, replica=replica_id)
        return found.record

    def create(self, record: Record) -> bool:
        """False if there is a record already."""
        return self.write(record_blob(record.replica_id), codec.dump(record), new=True) is not None

    def change(self, replica_id: str, site: str, edit: Callable[[Record], Record], known: Known | None = None) -> Known:
        """Read, edit and write the record; a concurrent write makes it start again from the new content.
        `known`: what `load` or `change` gave earlier, which is tried first.

        `edit` may be called several times and may raise. Raises ReplicaNotFound, MachineBusy.
        """
        for _ in range(_ATTEMPTS):
            found, known = known or self.load(replica_id), None
            if found is None or found.record.deleting:
                raise ReplicaNotFound(site=site, replica=replica_id)
            record, etag = found
            edited = edit(record)
            if edited == record:
                return Known(record, etag)
            written = self.write(record_blob(replica_id), codec.dump(edited), etag=etag)
            if written is not None:
                return Known(edited, written)
        raise MachineBusy(machine=replica_id, work="changes of its record by another engine")

    def erase(self, record: Record, leases: list[str]) -> None:
        """Delete everything of a replica that is marked as being deleted, the record last."""
        own = record_blob(record.replica_id)
        for item in self.listed(prefix_of(record.replica_id)):
            if item.name == own:
                continue
            if item.is_disk:
                self.page_blob(item.name).release(leases)
            self.delete(item.name)
        self.delete(own)
