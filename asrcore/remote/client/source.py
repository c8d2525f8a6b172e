"""Inventory and source of a site that is served elsewhere; reading a disk of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from asrcore.driver import (
    DiskReader,
    DiskView,
    Fence,
    FrozenView,
    Inventory,
    MachineView,
    Source,
    ViewRequest,
)
from asrcore.errors import AsrError, FrameRefused
from asrcore.model.extent import Extent, split
from asrcore.model.finding import Finding
from asrcore.model.machine import Description, Machine
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy
from asrcore.remote import calls
from asrcore.remote.client.peer import Peer
from asrcore.units import MiB
from asrcore.wire.channel import Answer

__all__ = ["RemoteInventory", "RemoteReader", "RemoteSource", "digests"]

# What a reader has in flight: so many requests of so many bytes in so many extents. While the other side reads for one,
# the answer to the other is on its way, and memory stays at 2 MiB a reader. The other side works on eight requests of a
# connection at a time, those of four readers, as many as a transfer has. An extent takes 17 bytes of the request.
_READ, _EXTENTS, _IN_FLIGHT = 1 * MiB, 4096, 2
_DIGESTS = 64 * MiB  # bytes of disk whose digests come in one reply

_Reads = Sequence[tuple[int, memoryview]]


class RemoteInventory(Inventory):
    """See `Inventory`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def machines(self) -> list[Machine]:
        result: list[Machine] = self._peer.plain("inventory.machines")
        return result

    def machine(self, machine_id: str) -> Machine:
        result: Machine = self._peer.plain("inventory.machine", machine_id=machine_id)
        return result

    def description(self, machine_id: str) -> Description:
        result: Description = self._peer.plain("inventory.description", machine_id=machine_id)
        return result

    def power_on(self, machine_id: str) -> None:
        self._peer.plain("inventory.power_on", machine_id=machine_id)

    def power_off(self, machine_id: str, *, graceful: bool, timeout: float) -> None:
        self._peer.plain("inventory.power_off", machine_id=machine_id, graceful=graceful, timeout=timeout)

    def fence(self, machine_id: str, fence: Fence) -> None:
        self._peer.plain("inventory.fence", machine_id=machine_id, fence=fence)

    def unfence(self, machine_id: str, epoch: int) -> None:
        self._peer.plain("inventory.unfence", machine_id=machine_id, epoch=epoch)

    def fenced(self, machine_id: str) -> Fence | None:
        result: Fence | None = self._peer.plain("inventory.fenced", machine_id=machine_id)
        return result


class RemoteSource(Source):
    """See `Source`."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def findings(self, machine_id: str, policy: Policy) -> list[Finding]:
        result: list[Finding] = self._peer.plain("source.findings", machine_id=machine_id, policy=policy)
        return result

    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        asked = {"requests": list(requests), "consistency": consistency, "freeze_limit": freeze_limit}
        answer = self._peer.ask("source.open_view", calls.plain(asked))
        return RemoteView(self._peer, calls.value(answer.head.get("result"), calls.ViewState, "view"))

    def keep_marks(self, machine_id: str, keep: Sequence[Mark]) -> None:
        self._peer.plain("source.keep_marks", machine_id=machine_id, keep=list(keep))


class RemoteView(FrozenView):
    """See `FrozenView`."""

    def __init__(self, peer: Peer, state: calls.ViewState) -> None:
        self._peer = peer
        self._handle = {"view": state.handle}
        self._closed = False
        self.taken_at = state.taken_at
        self._machines = {name: _RemoteMachine(peer, state.handle, name, it) for name, it in state.machines.items()}
        self.machines: Mapping[str, MachineView] = self._machines

    def settle(self) -> Mapping[str, Mapping[str, Sequence[Extent]]]:
        answer = self._peer.ask_held("view.settle", self._handle)
        settled: calls.Settled = calls.value(answer.head.get("result"), calls.Settled, "view.settle")
        self.taken_at = settled.taken_at
        for name, instant in settled.machines.items():
            self._machines[name].consistency, self._machines[name].mark = instant.consistency, instant.mark
        return settled.again

    def confirm(self) -> None:
        self._peer.ask_held("view.confirm", self._handle)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with suppress(AsrError):  # the other side closes it after a while without a connection
                self._peer.ask_held("view.close", self._handle)


class _RemoteMachine(MachineView):
    def __init__(self, peer: Peer, view: str, machine_id: str, state: calls.MachineState) -> None:
        self.description = state.description
        self.consistency = state.consistency
        self.mark = state.mark
        self.notices = state.notices
        self.halted = state.halted
        self.disks = {
            disk_id: _RemoteDisk(peer, {"view": view, "machine": machine_id, "disk": disk_id}, disk)
            for disk_id, disk in state.disks.items()
        }


class _RemoteDisk(DiskView):
    hashes_at_source = True

    def __init__(self, peer: Peer, names: Mapping[str, str], state: calls.DiskState) -> None:
        self.disk = state.disk
        self.tracking = state.tracking
        self.reason = state.reason
        self.whole = state.whole
        self.digest = state.digest
        self._peer = peer
        self._names = names

    def changed(self) -> list[Extent]:
        return self._peer.extents("view.changed", self._names, held=True)

    def allocated(self) -> list[Extent]:
        return self._peer.extents("view.allocated", self._names, held=True)

    def reader(self) -> DiskReader:
        return RemoteReader(self._peer, "view.reader", self._names)

    def digests(self, extent: Extent) -> bytes:
        return digests(self._peer, "view.digests", self._names, extent)


def digests(peer: Peer, call: str, names: Mapping[str, str], extent: Extent) -> bytes:
    """Digests of an extent's blocks, computed at the other side."""
    channel = peer.links.channel(peer.next_index())
    parts = (
        channel.ask(call, {**names, "offset": part.offset, "length": part.length}).body
        for part in split([extent], _DIGESTS)
    )
    return b"".join(parts)


def _requests(reads: _Reads, count: int) -> Iterator[_Reads]:
    """The reads, cut and gathered to at most _READ bytes and `count` extents for each request."""
    gathered: list[tuple[int, memoryview]] = []
    length = 0
    for offset, buffer in reads:
        for piece in split([Extent(offset, len(buffer))], _READ):
            if gathered and (length + piece.length > _READ or len(gathered) == count):
                yield gathered
                gathered, length = [], 0
            gathered.append((piece.offset, buffer[piece.offset - offset : piece.end - offset]))
            length += piece.length
    if gathered:
        yield gathered


class RemoteReader(DiskReader):
    """Reads a disk through one of the connections."""

    def __init__(self, peer: Peer, call: str, names: Mapping[str, object]) -> None:
        """`call` opens it with `names`."""
        self._channel = peer.links.channel(peer.next_index())
        head = self._channel.ask(call, names).head
        self._handle = head.get("handle")
        self._each = bool(head.get("each"))  # otherwise an older version, which takes one read after the other
        self._closed = False

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.read_each([(offset, buffer)])

    def read_each(self, reads: Sequence[tuple[int, memoryview]]) -> None:
        begun: deque[tuple[Callable[[], Answer], _Reads]] = deque()
        try:
            for wanted in _requests(reads, _EXTENTS if self._each else 1):
                if len(begun) == (_IN_FLIGHT if self._each else 1):
                    self._take(*begun.popleft())
                begun.append((self._begin(wanted), wanted))
            while begun:
                self._take(*begun.popleft())
        except AsrError:
            for answer, _ in begun:  # so that nothing of this read is in flight when the next one begins
                with suppress(AsrError):
                    answer()
            raise

    def _begin(self, wanted: _Reads) -> Callable[[], Answer]:
        if not self._each:
            [(offset, buffer)] = wanted
            return self._channel.begin("reader.read", {"reader": self._handle, "offset": offset, "length": len(buffer)})
        extents = calls.pack_extents(Extent(offset, len(buffer)) for offset, buffer in wanted)
        return self._channel.begin("reader.read_each", {"reader": self._handle}, extents)

    def _take(self, answer: Callable[[], Answer], wanted: _Reads) -> None:
        body = memoryview(answer().body)
        length = sum(len(buffer) for _, buffer in wanted)
        if len(body) != length:
            raise FrameRefused(peer=self._channel.peer, detail=f"{len(body)} bytes came instead of {length}")
        at = 0
        for _, buffer in wanted:
            buffer[:] = body[at : at + len(buffer)]
            at += len(buffer)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with suppress(AsrError):  # it ended with its connection
                self._channel.ask("reader.close", {"reader": self._handle})
