"""Memory for reading disks: page-aligned, exclusive while in use, reused afterwards."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from threading import Barrier

import pytest

from asrcore.driver import _buffer, page_buffer
from asrcore.units import KiB, MiB


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize("size", [1, 4096, 4 * MiB, 4 * MiB + 1, 9 * MiB + 512])
def test_begins_at_a_page_and_is_as_large_as_asked_for(size: int) -> None:
    with page_buffer(size) as buffer:
        assert _address(buffer) % mmap.PAGESIZE == 0
        buffer[:] = b"?" * size
        assert bytes(buffer) == b"?" * size


def test_nobody_else_has_it_meanwhile() -> None:
    with ExitStack() as stack:
        buffers = [stack.enter_context(page_buffer(MiB)) for _ in range(20)]
        starts = sorted(_address(buffer) for buffer in buffers)
        assert all(other - one >= MiB for one, other in pairwise(starts))


def test_serves_again() -> None:
    with page_buffer(MiB) as buffer:
        buffer[:4] = b"mark"
    with page_buffer(64 * KiB) as buffer:
        assert bytes(buffer[:4]) == b"mark"  # newly mapped memory is zero


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[memoryview] = []
    monkeypatch.setattr(_buffer, "_free", kept)
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(page_buffer(MiB))
    with page_buffer(5 * MiB):
        pass
    assert [len(memory) for memory in kept] == [4 * MiB] * 8


def test_threads_have_their_own() -> None:
    together = Barrier(16)

    def work(number: int) -> bool:
        with page_buffer(64 * KiB) as buffer:
            buffer[:] = bytes([number]) * len(buffer)
            together.wait(30)  # all of them have written
            return bytes(buffer) == bytes([number]) * len(buffer)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(64)))


FORK = """
import os
from asrcore.driver import page_buffer
with page_buffer(65536) as buffer:
    buffer[:] = b"p" * 65536
child = os.fork()
if not child:
    with page_buffer(65536) as other:
        other[:] = b"c" * 65536
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert bytes(buffer) == b"p" * 65536
"""


def test_a_child_has_other_memory() -> None:
    """Data that a child reads must not appear in the data that its parent compares."""
    done = subprocess.run([sys.executable, "-c", FORK], check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
