"""A point exists when its cycle is sealed; the heads are written at the close, or earlier when they are read."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asr_storage.replica.chain import ChainImages
from asr_storage.replica.journal import Journal
from asr_storage.replica.reflink import ReflinkImages
from asrcore.driver import CycleWriter
from asrcore.errors import DriverFailed

MIB = 1024 * 1024
DATA = random.Random(1).randbytes(4096)
Make = Callable[..., Any]


def sealed(one: Any) -> CycleWriter:
    """The open writer of a sealed second cycle; a first cycle is written directly to the heads."""
    one.cycle([("vda", 0, bytes(reversed(DATA)))])
    writer: CycleWriter = one.replica.open_cycle(one.spec())
    writer.write("vda", 0, memoryview(DATA))
    one.head["vda"][: len(DATA)] = DATA
    writer.seal(one.seal_spec(keep=True))
    assert Journal.is_committed(one.replica.home.path)
    return writer


def test_who_looks_before_finds_it(bench: Make, replica_dir: Path, tools: Any) -> None:
    one = bench(replica_dir, {"vda": MIB})
    with sealed(one):
        assert one.replica.description("p2") == tools.machine(one.disks)
        assert not Journal.is_committed(one.replica.home.path)
        assert tools.read(one.replica, "vda", MIB) == one.head["vda"]
    assert [point.id for point in one.replica.info().points] == ["p1", "p2"]


def test_the_close_applies_it(bench: Make, replica_dir: Path, tools: Any) -> None:
    one = bench(replica_dir, {"vda": MIB})
    sealed(one).close()
    assert not Journal.is_committed(one.replica.home.path)
    assert tools.read(one.replica, "vda", MIB) == one.head["vda"]


def test_an_error_is_told_to_the_next_and_tried_again(
    bench: Make, replica_dir: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bench(replica_dir, {"vda": MIB})
    writer = sealed(one)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "the disk does not answer")

    with monkeypatch.context() as patch:
        for images in (ReflinkImages, ChainImages):
            patch.setattr(images, "apply", broken)
        writer.close()
        with pytest.raises(DriverFailed, match="does not answer"):
            one.replica.info()
    assert one.replica.info().head == "p2"
    assert tools.read(one.replica, "vda", MIB) == one.head["vda"]
