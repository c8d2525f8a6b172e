"""The source role, for failback: incremental snapshots of the machine's disks, and what differs between two.

A mark names a snapshot of each disk; it is valid as long as these exist. A view is the snapshots of one instant;
they are kept when it is closed, for its mark.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import threading
from collections.abc import Mapping, Sequence

import attrs

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.blobs.digests import DigestTable
from asr_driver_azure.blobs.ranges import RangeSet
from asr_driver_azure.blobs.reading import fill_around, read_together
from asr_driver_azure.cloud.arm import Resource, tags_of
from asr_driver_azure.machines.builder import Builder
from asr_driver_azure.machines.disk_access import Access
from asr_driver_azure.machines.machines import Machines
from asr_driver_azure.machines.record import BASE_VIEW, TAG_DISK, TAG_POWER, TAG_TAKEN, TAG_VAULT, TAG_VIEW, belongs
from asrcore.crashpoint import reach
from asrcore.driver import (
    DIGEST_BLOCK,
    DiskReader,
    DiskView,
    FrozenView,
    MachineView,
    Source,
    Tracking,
    ViewRequest,
    digest_of,
)
from asrcore.errors import AsrError, UnsupportedOperation, ViewLost
from asrcore.model.extent import Extent, align, batches, split, subtract
from asrcore.model.finding import Finding, Severity
from asrcore.model.machine import Description, Disk
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy
from asrcore.units import MiB, format_duration

__all__ = ["LEAST_INTERVAL", "AzureSource"]

_REMEMBERED = 256  # blocks of 64 KiB
_DIGEST_READ = 4 * MiB  # at a time, in requests that are in flight together
LEAST_INTERVAL = 45.0
"""Seconds: Azure allows seven snapshots of a disk in five minutes."""


class AzureSource(Source):
    """See `Source`."""

    def __init__(self, account: AzureAccount, machines: Machines) -> None:
        self._account = account
        self._machines = machines
        self._arm = account.arm
        self._builder = Builder(account)

    def findings(self, machine_id: str, policy: Policy) -> list[Finding]:
        machine = self._machines.describe(machine_id).machine
        found = self._other_vaults(self._machines.name(machine_id), named=True)
        if policy.interval < LEAST_INTERVAL:
            found.append(
                Finding(
                    "azure-interval-short",
                    Severity.WARNING,
                    f"the policy asks for a cycle every {format_duration(policy.interval)}",
                    "Azure allows seven snapshots of a disk in five minutes: cycles cannot run more often.",
                    "Use a policy with an interval of a minute or more for failback.",
                )
            )
        if len(machine.disks) > 1:
            found.append(
                Finding(
                    "azure-several-disks",
                    Severity.WARNING,
                    f"it has {len(machine.disks)} disks",
                    "Snapshots of several disks are not taken at one instant while the machine runs.",
                    "It is replicated only while it is stopped: stop it before failback.",
                )
            )
        return found

    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        if len(requests) != 1:
            raise UnsupportedOperation(driver=self._account.driver, operation="freeze several machines at one barrier")
        request = requests[0]
        name = self._machines.name(request.machine_id)
        disks = self._machines.disks(request.machine_id)
        taken = self._of_view(name, request.view_id)
        if not disks.keys() <= taken.keys():
            taken = self._take(name, request, disks, taken)
        off = all(tags_of(item).get(TAG_POWER) == "off" for item in taken.values())
        description = self._machines.describe(request.machine_id)
        known = self._known(name, disks) if request.since is None else {}
        view = _View(self._account, request, description, {key: taken[key] for key in disks}, known, off=off)
        view.machines[request.machine_id].notices = self._other_vaults(name, named=False)
        return view

    def _known(self, name: str, disks: Mapping[str, tuple[str, int]]) -> dict[str, _Known]:
        """What is known of the disks as they were promoted, for a comparison that need not download all of them."""
        base = self._of_view(name, BASE_VIEW)
        tables = {key: DigestTable.load(self._account.container, name, key) for key in disks.keys() & base.keys()}
        return {
            key: _Known(str(base[key]["name"]), table)
            for key, table in tables.items()
            if table is not None and table.size == disks[key][1]
        }

    def _of_another_vault(self, snapshot: Resource) -> bool:
        return tags_of(snapshot).get(TAG_VAULT, "") not in ("", self._account.settings.owner)

    def _other_vaults(self, name: str, *, named: bool) -> list[Finding]:
        """`named`: with the ids of their snapshots. A notice is without: the vault stores it when it changes, and each
        cycle of the other vault makes new ones."""
        others = [item for item in self._snapshots(name) if self._of_another_vault(item)]
        if not others:
            return []
        tags = sorted({tags_of(item)[TAG_VAULT] for item in others})
        if named:
            ids = [shlex.quote(str(item["id"])) for item in others]
            commands = "delete its snapshots: " + ", ".join(f"`az snapshot delete --ids {item}`" for item in ids)
        else:
            lists = ", ".join(f"`az resource list --tag {TAG_VAULT}={tag}`" for tag in tags)
            commands = f"delete its snapshots of this machine, which {lists} shows, with `az snapshot delete --ids ID`"
        return [
            Finding(
                "protected-by-another-vault",
                Severity.WARNING,
                f"another vault protects the machine too (tag {', '.join(tags)})",
                "Both replicate it, and each leaves the other's snapshots alone; but a failover by one of them is not "
                "known to the other.",
                "Run `asr unprotect` in one of the two vaults. If the other vault is gone for good, "
                f"{commands}. Or take over its tag, and this vault deletes them: `asr site update SITE "
                f"--set owner={tags[0]}`.",
            )
        ]

    def _of_view(self, owner: str, view_id: str) -> dict[str, Resource]:
        return {
            tags_of(item).get(TAG_DISK, ""): item
            for item in self._snapshots(owner)
            if tags_of(item)[TAG_VIEW] == view_id
        }

    def _snapshots(self, owner: str) -> list[Resource]:
        """Of all views of a machine."""
        container = self._account.container.identity
        found = [item for item in self._arm.listed("snapshots") if belongs(tags_of(item), container, owner)]
        return [item for item in found if TAG_VIEW in tags_of(item)]

    def _take(
        self, name: str, request: ViewRequest, disks: Mapping[str, tuple[str, int]], half: Mapping[str, Resource]
    ) -> dict[str, Resource]:
        for item in half.values():
            self._builder.remove_resource("snapshots", str(item["name"]))  # not of the coming instant
        runs = self._machines.runs(name)
        if runs and len(disks) > 1:
            raise UnsupportedOperation(
                driver=self._account.driver,
                operation="freeze several disks of a running machine at one instant: stop it",
            )
        # Another instant under the same id gets another mark.
        salt = hashlib.sha256(f"{request.view_id}/{self._account.clock()!r}".encode()).hexdigest()[:10]
        for number, (disk_id, (disk, _)) in enumerate(disks.items()):
            self._builder.snapshot(f"{name}-{salt}-{number}", name, disk, disk_id, request.view_id, runs=runs)
            reach("azure.view.snapshotted")
        if not runs and len(disks) > 1 and self._machines.runs(name):
            raise ViewLost(machine=request.machine_id, detail="the machine was started while it was frozen")
        return self._of_view(name, request.view_id)

    def keep_marks(self, machine_id: str, keep: Sequence[Mark]) -> None:
        name = self._machines.find(machine_id)
        if name is None:
            return
        kept = {snapshot for mark in keep for snapshot, _ in (_parse(mark) or {}).values()}
        for item in self._snapshots(name):
            # What has no tag was taken before the site had one.
            if item["name"] not in kept and not self._of_another_vault(item):
                self._builder.remove_resource("snapshots", str(item["name"]))
                reach("azure.mark.released")


def _mark(snapshots: Mapping[str, Resource]) -> Mark:
    return Mark(
        json.dumps(
            {
                disk_id: [item["name"], item["properties"]["creationData"]["sourceUniqueId"]]
                for disk_id, item in sorted(snapshots.items())
            }
        )
    )


def _parse(mark: Mark) -> dict[str, tuple[str, str]] | None:
    """Snapshot and Azure's id of its disk, by disk; None for what is not a mark of this driver."""
    try:
        return {str(disk_id): (str(pair[0]), str(pair[1])) for disk_id, pair in json.loads(mark.token).items()}
    except (ValueError, AttributeError, IndexError, TypeError):
        return None


@attrs.frozen
class _Known:
    """Snapshot of a disk as it was promoted, and its digests."""

    snapshot: str
    table: DigestTable


class _View(FrozenView):
    def __init__(
        self,
        account: AzureAccount,
        request: ViewRequest,
        description: Description,
        snapshots: Mapping[str, Resource],
        known: Mapping[str, _Known],
        *,
        off: bool,
    ) -> None:
        self._account = account
        self._snapshots = snapshots
        self._machine_id = request.machine_id
        self.taken_at = min(float(tags_of(item)[TAG_TAKEN]) for item in snapshots.values())
        self._access: dict[str, Access] = {}
        self._blocks: dict[tuple[str, int], bytes] = {}
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        views = {
            disk_id: _Disk(self, description.machine.disk(disk_id), item, request.since, known.get(disk_id))
            for disk_id, item in snapshots.items()
        }
        obtained = Consistency.OFFLINE if off else Consistency.CRASH
        self.machines = {request.machine_id: _Machine(description, obtained, _mark(snapshots), views)}

    def access(self, snapshot: str) -> Access:
        """Access to a snapshot's content, opened when it is first read."""
        with self._opening:
            found = self._access.get(snapshot)
            if found is None:
                found = self._access[snapshot] = Access(self._account, "snapshots", snapshot)
            return found

    def remember(self, snapshot: str, offset: int, block: bytes) -> None:
        """Keep a block that was read, in case it is read again soon."""
        with self._lock:
            self._blocks[snapshot, offset] = block
            while len(self._blocks) > _REMEMBERED:
                del self._blocks[next(iter(self._blocks))]

    def recall(self, snapshot: str, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer from blocks that are kept; False if one of them is not."""
        first = offset // DIGEST_BLOCK * DIGEST_BLOCK
        with self._lock:
            blocks = [self._blocks.get((snapshot, at)) for at in range(first, offset + len(buffer), DIGEST_BLOCK)]
        if not blocks or None in blocks:
            return False
        data = b"".join(block for block in blocks if block is not None)[offset - first :][: len(buffer)]
        buffer[:] = data
        return True

    def read(self, snapshot: str, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Read stored data of a snapshot."""
        try:
            read_together(self._account.begin, wanted, self.access(snapshot).read_into)
        except AsrError as problem:
            raise self.lost(problem) from problem

    def there(self, snapshot: str) -> Resource | None:
        """The snapshot, if it still exists."""
        return self._account.arm.get("snapshots", snapshot)

    def lost(self, problem: AsrError) -> AsrError:
        """What a failed read means: the snapshot was deleted, or the site cannot be reached."""
        if any(self.there(str(item["name"])) is None for item in self._snapshots.values()):
            return ViewLost(machine=self._machine_id, detail="its snapshot was deleted")
        return problem

    def confirm(self) -> None:
        for item in self._snapshots.values():
            if self.there(str(item["name"])) is None:
                raise ViewLost(machine=self._machine_id, detail=f"snapshot {item['name']} was deleted")

    def close(self) -> None:
        for access in self._access.values():
            try:
                access.close()
            except AsrError:
                continue  # it was deleted, or is closed when it is deleted
        self._access.clear()


@attrs.define
class _Machine(MachineView):
    description: Description
    consistency: Consistency
    mark: Mark | None
    disks: Mapping[str, DiskView]
    notices: Sequence[Finding] = ()


class _Disk(DiskView):
    def __init__(self, view: _View, disk: Disk, snapshot: Resource, since: Mark | None, known: _Known | None) -> None:
        self._view = view
        self.disk = disk
        self._name = str(snapshot["name"])
        self._base = ""
        self._stored: RangeSet | None = None
        self._known = known
        self._lock = threading.Lock()
        self._unknown: RangeSet | None = None
        self.hashes_at_source = known is not None
        self.tracking, self.reason = self._track(snapshot, since)

    def _track(self, snapshot: Resource, since: Mark | None) -> tuple[Tracking, str]:
        if since is None:
            return Tracking.NONE, "no mark was given"
        marks = _parse(since)
        if marks is None:
            return Tracking.LOST, "the mark is not one of this driver"
        base = marks.get(self.disk.id)
        if base is None:
            return Tracking.NEW, ""
        if base[1] != snapshot["properties"]["creationData"]["sourceUniqueId"]:
            return Tracking.NEW, ""
        if self._view.there(base[0]) is None:
            return Tracking.LOST, f"snapshot {base[0]}, the base of the changes, was deleted"
        self._base = base[0]
        return Tracking.CHANGED, ""

    def changed(self) -> list[Extent]:
        access = self._view.access(self._name)
        found = access.changed(self._view.access(self._base), self.disk.size)
        reach("azure.view.compared")
        return found

    def digests(self, extent: Extent) -> bytes:
        """Those of the promotion, for what has not changed since; only the rest is downloaded."""
        if self._known is None:
            return super().digests(extent)
        if extent.offset % DIGEST_BLOCK:
            raise ValueError(f"extent at {extent.offset} does not start at a digest block")
        changed = self._changed_since_promotion(self._known).within(extent.offset, extent.end)
        digests = {block.offset: self._known.table.of(block.offset) for block in split([extent], DIGEST_BLOCK)}
        with self.reader() as reader:
            for runs in batches(
                align(changed, DIGEST_BLOCK, self.disk.size), _DIGEST_READ, _DIGEST_READ // DIGEST_BLOCK
            ):
                reads = [(run.offset, memoryview(bytearray(run.length))) for run in runs]
                reader.read_each(reads)
                for offset, data in reads:
                    for start in range(0, len(data), DIGEST_BLOCK):
                        block = bytes(data[start : start + DIGEST_BLOCK])
                        digests[offset + start] = digest_of(block)
                        self._view.remember(self._name, offset + start, block)  # it is probably sent next
        return b"".join(digests[offset] for offset in sorted(digests))

    def _changed_since_promotion(self, known: _Known) -> RangeSet:
        with self._lock:
            if self._unknown is None:
                base = self._view.access(known.snapshot)
                self._unknown = RangeSet(self._view.access(self._name).changed(base, self.disk.size))
            return self._unknown

    def allocated(self) -> list[Extent]:
        data = self._held().extents()
        holes = (Extent(item.offset, item.length, zero=True) for item in subtract([Extent(0, self.disk.size)], data))
        return sorted([*data, *holes])

    def _held(self) -> RangeSet:
        if self._stored is None:
            try:
                self._stored = RangeSet(self._view.access(self._name).stored(self.disk.size))
            except AsrError as problem:
                raise self._view.lost(problem) from problem
        return self._stored

    def reader(self) -> DiskReader:
        return _Reader(self._view, self._name, self._held())


class _Reader(DiskReader):
    def __init__(self, view: _View, snapshot: str, stored: RangeSet) -> None:
        self._view = view
        self._snapshot = snapshot
        self._stored = stored

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.read_each([(offset, buffer)])

    def read_each(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        wanted = [
            part
            for offset, buffer in reads
            if not self._view.recall(self._snapshot, offset, buffer)
            and (part := fill_around(self._stored, offset, buffer))
        ]
        if wanted:
            self._view.read(self._snapshot, wanted)
        for _ in wanted:
            reach("azure.view.read")
