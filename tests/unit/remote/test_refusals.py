"""Invalid frames from a peer with a valid certificate, at a master target with an open cycle: each is refused with its
own error, the replica does not change, and the real engine continues.

The intruder has every advantage: it has the engine's certificate, knows its session and the name of its cycle, and
makes frames with the keys of its own connection.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from blake3 import blake3

from asrcore.driver import CycleSpec, CycleWriter, ReplicaSpec, SealSpec, Site
from asrcore.errors import AsrError, PeerVersion, StaleEpoch
from asrcore.model.extent import Extent
from asrcore.model.machine import Description, Disk, Firmware, Machine
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.remote import RemoteDriver
from asrcore.remote.master_target import MasterTarget
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.units import KiB, MiB
from asrcore.wire import frames
from asrcore.wire.carrier import Address, Carrier, ConnectionLost, Limits
from asrcore.wire.failures import goodbye_error
from asrcore.wire.frames import Connection, Frame
from asrcore.wire.tls import Identity, Role
from tests.certificates import Authority
from tests.unit.service.waiting import wait_until

LIMITS = Limits(connect=10.0, silence=10.0)
DESCRIPTION = Description(Machine("m", "m", 1, MiB, Firmware.BIOS, (Disk("vda", MiB),)), "memory")
HONEST, EVIL = b"honest" * 1024, b"evil!!" * 1024


class Intruder:
    """A connection with hellos exchanged, and a stream of the engine's cycle."""

    def __init__(self, field: Field) -> None:
        self.carrier = Carrier.dial(field.target.address, field.identity, [Role.MASTER_TARGET], limits=LIMITS)
        self.link = Connection(dialled=True, me={"session": field.session}, hashes={"blake3": blake3})
        before = field.target._listener.channels
        self.carrier.send(self.link.hello())
        self.receive()
        wait_until(lambda: set(field.target._listener.channels) - set(before), "it is connected")
        (self.channel,) = set(field.target._listener.channels) - set(before)
        self.stream = self.link.open_stream()
        self.carrier.send(
            self.pack(Frame(frames.REQUEST, self.stream, {"call": "cycle.data", **field.cycle}, b"", frames.MORE))
        )
        self.heard = b""

    def pack(self, frame: Frame) -> bytes:
        """The bytes on the wire."""
        return b"".join(map(bytes, self.link.pack(frame)))

    def data(self, content: bytes = EVIL, at: int = 0) -> bytes:
        """A data frame as bytes on the wire."""
        return self.pack(Frame(frames.DATA, self.stream, {"disk": "vda", "at": at}, content))

    def receive(self) -> Frame:
        """The next frame."""
        header = bytearray(frames.HEADER_SIZE)
        self.carrier.fill(memoryview(header))
        parsed = self.link.header(header)
        payload = bytearray(parsed.payload)
        self.carrier.fill(memoryview(payload))
        self.heard = bytes(header + payload)
        frame = self.link.payload(parsed, payload)
        assert frame is not None
        return frame

    def last_words(self) -> Exception:
        """The error for the other side's goodbye."""
        while (frame := self.receive()).type != frames.GOODBYE:
            pass
        return goodbye_error(frame.head, "the master target")


@attrs.define
class Field:
    """A master target, an engine with an open cycle, and the directory of the replica."""

    directory: Path
    target: MasterTarget
    identity: Identity
    engine: Site
    writer: CycleWriter

    @property
    def session(self) -> str:
        return str(self.engine._links._about["session"])  # type: ignore[attr-defined]

    @property
    def cycle(self) -> dict[str, str]:
        return dict(self.writer._handle)  # type: ignore[attr-defined]

    def state(self) -> str:
        """A digest of all durable data of the target."""
        whole = hashlib.sha256()
        for path in sorted(self.directory.rglob("*")):
            whole.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
        return whole.hexdigest()

    def go_on(self) -> None:
        """The engine writes the rest and seals; the point contains what it has written."""
        self.writer.write("vda", 512 * KiB, memoryview(HONEST))
        self.writer.seal(SealSpec("p1", 1.0, Consistency.CRASH, True, DESCRIPTION))
        data = bytearray(MiB)
        with self.engine.target.replica("r").reader("vda", "p1") as reader:
            reader.read_into(0, memoryview(data))
        wanted = bytearray(MiB)
        wanted[: len(HONEST)] = wanted[512 * KiB : 512 * KiB + len(HONEST)] = HONEST
        assert data == wanted


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    authority = Authority()
    serving = authority.issue(tmp_path / "serving", "master-target")
    engine = authority.issue(tmp_path / "engine", "process-server")
    MemoryWorld("refusing", path=tmp_path / "world")
    with (
        MemoryDriver().connect("served", {"world": "refusing", "path": str(tmp_path / "world")}) as served,
        MasterTarget(served, Address("127.0.0.1", 0), Identity(serving), limits=LIMITS) as target,
        RemoteDriver().connect("there", {"address": str(target.address), "identity": str(engine)}) as site,
    ):
        site.target.create_replica(ReplicaSpec("r", "m", 3, DESCRIPTION), Watch())
        with site.target.replica("r").open_cycle(CycleSpec("c1", 3, None, {"vda": MiB})) as writer:
            writer.write("vda", 0, memoryview(HONEST))
            writer.flush()
            yield Field(tmp_path / "world", target, Identity(engine), site, writer)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def reordered(intruder: Intruder) -> bytes:
    intruder.data(at=0)
    return intruder.data(at=8 * KiB)


def replayed(intruder: Intruder) -> bytes:
    frame = intruder.data(HONEST)  # already there
    intruder.carrier.send(frame)
    while intruder.receive().type != frames.ACK:
        pass
    return frame


def sent_back(intruder: Intruder) -> bytes:
    replayed(intruder)
    return intruder.heard


BAD: dict[str, tuple[str, Callable[[Intruder], bytes]]] = {
    "replayed": ("sequence", replayed),
    "reordered": ("sequence", reordered),
    "sent back": ("forged", sent_back),
    "a bit of the header": ("forged", lambda intruder: flipped(intruder.data(), 11)),
    "a bit of the sequence number": ("forged", lambda intruder: flipped(intruder.data(), 19)),
    "a bit of the code": ("forged", lambda intruder: flipped(intruder.data(), frames.HEADER_SIZE - 1)),
    "a bit of the place": ("digest", lambda intruder: flipped(intruder.data(), frames.HEADER_SIZE + 21)),
    "a bit of the data": ("digest", lambda intruder: flipped(intruder.data(), -1 % len(intruder.data()))),
    "another protocol": ("magic", lambda intruder: flipped(intruder.data(), 0)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_frame_is_refused(field: Field, case: str) -> None:
    reason, make = BAD[case]
    intruder = Intruder(field)
    bad = make(intruder)
    before = field.state()
    intruder.carrier.send(bad + bytes(512 * KiB))  # later data do not hide the reason
    reported = intruder.last_words()
    assert isinstance(reported, AsrError)
    assert reported.code == "frame-refused"
    assert f"refused a frame: {reason}: " in str(reported)
    assert intruder.channel.error is not None
    assert intruder.channel.error.code == "frame-refused"
    assert reason in str(intruder.channel.error)
    intruder.carrier.close()
    assert field.state() == before
    field.go_on()


def test_a_frame_of_another_connection_is_refused(field: Field) -> None:
    one, two = Intruder(field), Intruder(field)
    before = field.state()
    two.carrier.send(one.data())
    reported = two.last_words()
    assert isinstance(reported, AsrError)
    assert (reported.code, "forged" in str(reported)) == ("frame-refused", True)
    assert one.channel.error is None, "the first sender is not affected"
    for intruder in (one, two):
        intruder.carrier.close()
    assert field.state() == before
    field.go_on()


@pytest.mark.parametrize("kept", [frames.HEADER_SIZE // 2, frames.HEADER_SIZE + 10, -1])
def test_a_truncated_frame_is_not_used(field: Field, kept: int) -> None:
    intruder = Intruder(field)
    before = field.state()
    intruder.carrier.send(intruder.data()[:kept])
    intruder.carrier.close()
    wait_until(lambda: intruder.channel.error is not None, "its end is noticed")
    assert intruder.channel.error is not None
    assert intruder.channel.error.code == "site-unreachable"
    assert field.state() == before
    field.go_on()


def test_an_old_epoch_is_refused(field: Field) -> None:
    settings: dict[str, Any] = {"address": str(field.target.address), "identity": str(field.identity.directory)}
    before = field.state()
    with RemoteDriver().connect("there", settings) as old, pytest.raises(StaleEpoch):
        old.target.replica("r").open_cycle(CycleSpec("c1", 2, None, {"vda": MiB}))
    assert field.state() == before
    assert field.writer.done("vda") == [Extent(0, len(HONEST))]
    field.go_on()


# -- another version ---------------------------------------------------------------------------------------------------


def of_another_version(frame: bytes) -> bytes:
    return frame[:4] + bytes([frames.VERSION + 1]) + frame[5:]


def test_another_version_is_refused_by_who_serves(field: Field, caplog: pytest.LogCaptureFixture) -> None:
    before = field.state()
    carrier = Carrier.dial(field.target.address, field.identity, [Role.MASTER_TARGET], limits=LIMITS)
    with caplog.at_level(logging.WARNING, "asrcore.wire.listener"):
        carrier.send(of_another_version(Connection(dialled=True).hello()))
        with pytest.raises(ConnectionLost):
            carrier.fill(memoryview(bytearray(1 << 16)))
        wait_until(lambda: caplog.records, "it is logged")
    carrier.close()
    (record,) = caplog.records
    assert isinstance(record.args, tuple)
    refused = record.args[1]
    assert isinstance(refused, PeerVersion)
    assert (refused.attributes["theirs"], refused.attributes["ours"]) == (str(frames.VERSION + 1), str(frames.VERSION))
    assert field.state() == before
    field.go_on()


def test_another_version_is_refused_after_the_hello(field: Field) -> None:
    intruder = Intruder(field)
    before = field.state()
    intruder.carrier.send(of_another_version(intruder.data()))
    assert isinstance(intruder.last_words(), PeerVersion)
    assert isinstance(intruder.channel.error, PeerVersion)
    intruder.carrier.close()
    assert field.state() == before
    field.go_on()


def test_another_version_is_refused_by_who_dials(tmp_path: Path) -> None:
    """It receives the reason, whatever the other side does with its hello."""
    authority = Authority()
    serving = Identity(authority.issue(tmp_path / "serving", "master-target"))
    engine = authority.issue(tmp_path / "engine", "process-server")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            plain, _ = listening.accept()
            carrier = Carrier.answer(plain, "the engine", serving, LIMITS)
            carrier.send(of_another_version(Connection(dialled=False).hello()))
            carrier.hang_up()
            carrier.close()

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(PeerVersion) as caught:
            RemoteDriver().connect("there", {"address": address, "identity": str(engine)})
        thread.join(10)
    assert (caught.value.attributes["theirs"], caught.value.attributes["ours"]) == ("2", "1")
