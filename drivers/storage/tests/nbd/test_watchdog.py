"""Reads as in the engine's workers, in separate threads, where one call of libnbd waits for the answers."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asr_storage.nbd import _watchdog
from asr_storage.nbd._requests import IN_FLIGHT, LARGE_IN_FLIGHT, REQUEST_SIZE
from asr_storage.nbd.client import NbdClient, NbdError, NbdTimeout
from asrcore.units import KiB, MiB
from drivers.storage.tests.nbdkit import Kind, Nbdkit, stopped

SIZE = 8 * MiB
LIMIT = 0.6


@pytest.fixture(params=["tcp", "unix"])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = random.Random(3).randbytes(SIZE)
    (tmp_path / "disk").write_bytes(data)
    return data


def elsewhere(call: Callable[[], object]) -> None:
    """Call it in a thread other than the main one, and wait for it; raises its exception."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def test_what_is_read_is_what_is_there(kind: Kind, tmp_path: Path, content: bytes) -> None:
    chance = random.Random(4)
    whole = [1, 511, 65537, REQUEST_SIZE - 1, REQUEST_SIZE, REQUEST_SIZE + 1, (LARGE_IN_FLIGHT + 2) * REQUEST_SIZE + 7]
    batches = [[size] for size in whole]
    batches += [[64 * KiB] * count for count in (2, IN_FLIGHT, IN_FLIGHT + 1)]
    batches += [[chance.randrange(1, 2 * REQUEST_SIZE) for _ in range(chance.randrange(1, 9))] for _ in range(20)]

    def read(client: NbdClient, sizes: list[int]) -> None:
        parts = [(chance.randrange(SIZE - size), bytearray(size)) for size in sizes]
        client.read_each(parts)
        for offset, buffer in parts:
            assert buffer == content[offset : offset + len(buffer)]

    with Nbdkit.run(kind, tmp_path, "-r", "file", str(tmp_path / "disk")) as server, server.connect() as client:
        for sizes in batches:
            elsewhere(lambda sizes=sizes: read(client, sizes))  # type: ignore[misc]


@pytest.mark.parametrize("sizes", [[REQUEST_SIZE], [64 * KiB] * 5, [4 * REQUEST_SIZE]], ids=["one", "small", "several"])
def test_a_silent_server_costs_the_time_limit_and_no_more(kind: Kind, tmp_path: Path, sizes: list[int]) -> None:
    parts = [(number * MiB, bytearray(size)) for number, size in enumerate(sizes)]
    with Nbdkit.run(kind, tmp_path, "memory", "16M") as server, server.connect(LIMIT) as client:
        elsewhere(lambda: client.read_each(parts))
        with stopped(server.pid):
            start = time.monotonic()
            with pytest.raises(NbdTimeout, match=r"no answer in 0\.6 s") as caught:
                elsewhere(lambda: client.read_each(parts))
            assert LIMIT * 0.9 < time.monotonic() - start < LIMIT + 1.5
            assert caught.value.errno == errno.ETIMEDOUT
        with pytest.raises(NbdError, match=r"unusable since: .*no answer in 0\.6 s"):
            elsewhere(lambda: client.read_each(parts))


@pytest.mark.parametrize("sizes", [[64 * KiB] * IN_FLIGHT, [4 * REQUEST_SIZE]], ids=["small", "several"])
def test_a_slow_server_is_not_a_silent_one(kind: Kind, tmp_path: Path, sizes: list[int]) -> None:
    """The whole read takes longer than the limit, but no single answer does."""
    parts = [(number * 64 * KiB, bytearray(size)) for number, size in enumerate(sizes)]
    slow = ["--filter=delay", "--threads=1", "memory", "16M", f"rdelay={LIMIT * 600:.0f}ms"]
    with Nbdkit.run(kind, tmp_path, *slow) as server, server.connect(LIMIT) as client:
        start = time.monotonic()
        elsewhere(lambda: client.read_each(parts))
        assert time.monotonic() - start > LIMIT


def test_a_failed_read_has_its_errno_and_the_connection_lives(kind: Kind, tmp_path: Path) -> None:
    cut_off = tmp_path / "cut-off"  # while this file exists every read fails
    failing = ["error-pread=EIO", f"error-pread-file={cut_off}", "error-pread-rate=100%"]
    parts = [(0, bytearray(64 * KiB)), (MiB, bytearray(2 * MiB))]
    with (
        Nbdkit.run(kind, tmp_path, "--filter=error", "memory", "16M", *failing) as server,
        server.connect() as client,
    ):
        cut_off.touch()
        with pytest.raises(NbdError, match="Input/output error") as caught:
            elsewhere(lambda: client.read_each(parts))
        assert caught.value.errno == errno.EIO
        cut_off.unlink()
        elsewhere(lambda: client.read_each(parts))


def test_a_killed_server_fails_the_call_at_once_and_all_later_ones(kind: Kind, tmp_path: Path) -> None:
    memory = Nbdkit.run(kind, tmp_path, "memory", "16M")
    with memory as server, server.connect() as client, ThreadPoolExecutor(1) as pool:
        with stopped(server.pid):
            reading = pool.submit(client.read_into, bytearray(4 * MiB), 0)
            while not client._connection.lock.locked():
                time.sleep(0.01)
            start = time.monotonic()
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(NbdError) as caught:
                reading.result()
        assert not isinstance(caught.value, NbdTimeout)
        assert time.monotonic() - start < 5
        with pytest.raises(NbdError, match="unusable"):
            client.flush()


STOPPED = """
import sys, threading
from asr_storage.nbd.client import NbdClient
client = NbdClient.connect_tcp("127.0.0.1", int(sys.argv[1]), "", timeout=float(sys.argv[2]))
reading = threading.Thread(target=client.read_into, args=(bytearray(1 << 20), 0))
print("connected", flush=True)
input()
reading.start()
print("reading", flush=True)
reading.join()
client.flush()
print("alive", flush=True)
client.close()
"""


def test_who_was_stopped_does_not_blame_the_server(tmp_path: Path) -> None:
    with Nbdkit.run("tcp", tmp_path, "memory", "16M") as server:
        words = [sys.executable, "-c", STOPPED, str(server.where), str(LIMIT)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdin is not None
            assert reader.stdout is not None
            assert reader.stdout.readline() == "connected\n"
            with stopped(server.pid):
                print(file=reader.stdin, flush=True)
                assert reader.stdout.readline() == "reading\n"
                os.kill(reader.pid, signal.SIGSTOP)
            try:
                time.sleep(3 * LIMIT)
            finally:
                os.kill(reader.pid, signal.SIGCONT)
            assert reader.stdout.read() == "alive\n"


def test_the_thread_that_looks_ends_when_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_watchdog, "_LEISURE", 0.1)
    with Nbdkit.run("tcp", tmp_path, "memory", "16M") as server, server.connect() as client:
        for _ in range(2):
            elsewhere(lambda: client.read_into(bytearray(MiB), 0))
            deadline = time.monotonic() + 10
            while any(thread.name == "nbd-silence" for thread in threading.enumerate()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
