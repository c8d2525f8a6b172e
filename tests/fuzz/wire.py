"""Bytes of any kind against the wire protocol: python -m tests.fuzz.wire [options of libFuzzer: -max_total_time=60].

The first byte chooses the receiver: a connection that waits for a hello, one after its hello, or one whose peer has the
keys and sends anything. Anything but a ProtocolError is a finding.
"""

from __future__ import annotations

import sys
from contextlib import suppress

import atheris

with atheris.instrument_imports(include=["asrcore.wire.frames"]):
    from asrcore.wire import frames


def _entropy(count: int) -> bytes:
    return bytes(count)


def _greeted() -> tuple[frames.Connection, frames.Connection]:
    ends = frames.Connection(dialled=True, entropy=_entropy), frames.Connection(dialled=False, entropy=_entropy)
    hellos = ends[0].hello(), ends[1].hello()
    list(ends[1].feed(hellos[0]))
    list(ends[0].feed(hellos[1]))
    return ends


def _stamped(end: frames.Connection, data: bytes) -> bytes:
    """The bytes as fields and payload of a frame whose digest, number and code are right."""
    provider = atheris.FuzzedDataProvider(data)
    kind, flags, stream = (
        provider.ConsumeIntInRange(0, 12),
        provider.ConsumeIntInRange(0, 7),
        provider.ConsumeInt(1) % 5,
    )
    head, plain = provider.ConsumeIntInRange(0, 40), provider.ConsumeIntInRange(0, 3)
    payload = bytes(provider.ConsumeBytes(200))
    head = min(head, len(payload))
    digest = frames._digest(frames._blake2b, payload, b"")
    sequence = end._out_sequence
    end._out_sequence += 1
    sizes = head, len(payload) - head, plain
    fields = frames._HEADER.pack(frames.MAGIC, frames.VERSION, kind, flags, stream, sequence, *sizes, digest)
    return fields + frames._mac(end._out_key, fields) + payload


def one(data: bytes) -> None:
    """One input."""
    if not data:
        return
    how, data = data[0] % 3, data[1:]
    with suppress(frames.ProtocolError):
        if how == 0:
            list(frames.Connection(dialled=False, entropy=_entropy).feed(data))
            return
        near, far = _greeted()
        if how == 1:
            list(far.feed(data))
            return
        stream = near.open_stream()
        far_stream = far.open_stream()
        list(far.feed(b"".join(near.pack(frames.Frame(frames.REQUEST, stream, {"call": "x"}, b"", frames.MORE)))))
        list(near.feed(b"".join(far.pack(frames.Frame(frames.REQUEST, far_stream, {"call": "y"}, b"", frames.MORE)))))
        for at in range(0, len(data), 64):
            list(far.feed(_stamped(near, data[at : at + 64])))


def main() -> None:
    """Fuzz until libFuzzer ends."""
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
