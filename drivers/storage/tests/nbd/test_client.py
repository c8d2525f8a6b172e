"""The NBD client against real servers: qemu-nbd and nbdkit."""

import errno
import gc
import hashlib
import mmap
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asr_storage.nbd import _ffi
from asr_storage.nbd._requests import LARGE_IN_FLIGHT, REQUEST_SIZE
from asr_storage.nbd.client import (
    NbdClient,
    NbdContextMissing,
    NbdError,
    NbdExportMissing,
    NbdTimeout,
)
from asr_storage.nbd.status import BASE_ALLOCATION, DiskExtent, dirty_bitmap_context, merge_status
from asr_storage.qemu import img
from asr_storage.qemu.nbd_server import QemuNbd
from asrcore.errors import HostIncomplete
from asrcore.units import GiB, KiB, MiB
from drivers.storage.tests.nbdkit import Nbdkit, stopped

SIZE = 16 * MiB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    img.create(path, SIZE, "qcow2")
    return path


@pytest.fixture
def server(image: Path) -> Iterator[QemuNbd]:
    with QemuNbd(image, "qcow2", writable=True) as running:
        yield running


@pytest.fixture
def filled(server: QemuNbd) -> bytes:
    content = random.Random(1).randbytes(SIZE)
    with server.connect() as client:
        client.write(content, 0)
    return content


# --- data ---


def test_what_is_written_is_read_and_is_in_the_file(server: QemuNbd, image: Path, tmp_path: Path) -> None:
    model = bytearray(SIZE)
    chance = random.Random(2)
    with server.connect() as client:
        assert client.size == SIZE
        assert (client.read_only, client.can_flush, client.can_zero, client.can_trim) == (False, True, True, True)
        for size in (1, 511, 4096, 65537, REQUEST_SIZE, REQUEST_SIZE + 1, (LARGE_IN_FLIGHT + 3) * REQUEST_SIZE + 7):
            offset = chance.randrange(SIZE - size)
            piece = chance.randbytes(size)
            client.write(piece, offset)
            model[offset : offset + size] = piece
            back = bytearray(size)
            client.read_into(back, offset)
            assert back == piece
        client.write(b"", 0)
        client.flush()
        whole = bytearray(SIZE)
        client.read_into(whole, 0)
        assert whole == model
    server.close()
    flat = tmp_path / "flat"
    img.convert(image, "qcow2", flat, "raw", timeout=60)
    assert flat.read_bytes() == model


def test_reads_fill_any_writable_buffer_and_nothing_beside_it(server: QemuNbd, filled: bytes) -> None:
    with server.connect() as client, mmap.mmap(-1, 1 * MiB) as mapped:
        client.read_into(mapped, 5)
        assert mapped[:] == filled[5 : 5 + MiB]
        frame = bytearray(b"x" * 100)
        with memoryview(frame) as view:
            client.read_into(view[10:90], 1000)
        assert frame == b"x" * 10 + filled[1000:1080] + b"x" * 10
        with pytest.raises(BufferError):
            client.read_into(b"not writable", 0)
        client.read_into(frame, 0)  # a caller's mistake does not break the client
        assert frame == filled[:100]


def test_two_connections_in_two_threads_read_the_whole(server: QemuNbd, filled: bytes) -> None:
    digests: dict[int, str] = {}

    def read(half: int) -> None:
        with server.connect() as client:
            assert client.can_multi_conn or not client.read_only
            digest, buffer = hashlib.sha256(), bytearray(300 * KiB)
            for offset in range(half, half + SIZE // 2, len(buffer)):
                view = memoryview(buffer)[: min(len(buffer), half + SIZE // 2 - offset)]
                client.read_into(view, offset)
                digest.update(view)
            digests[half] = digest.hexdigest()

    threads = [threading.Thread(target=read, args=(half,)) for half in (0, SIZE // 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == {half: hashlib.sha256(filled[half : half + SIZE // 2]).hexdigest() for half in (0, SIZE // 2)}


def test_threads_may_share_one_client(server: QemuNbd, filled: bytes) -> None:
    wrong = []
    with server.connect() as client:

        def read(seed: int) -> None:
            chance, buffer = random.Random(seed), bytearray(700 * KiB)
            for _ in range(20):
                offset = chance.randrange(SIZE - len(buffer))
                client.read_into(buffer, offset)
                if buffer != filled[offset : offset + len(buffer)]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_requests_respect_the_servers_maximum(tmp_path: Path) -> None:
    limits = [
        "blocksize-maximum=64K",
        "blocksize-preferred=4K",
        "blocksize-minimum=512",
        "blocksize-error-policy=error",
    ]
    with (
        Nbdkit.run("unix", tmp_path, "--filter=blocksize-policy", "memory", "4M", *limits) as nbdkit,
        nbdkit.connect() as client,
    ):
        assert (client.min_block_size, client.preferred_block_size, client.max_block_size) == (512, 4096, 64 * KiB)
        content = random.Random(3).randbytes(4 * MiB)
        client.write(content, 0)
        back = bytearray(4 * MiB)
        client.read_into(back, 0)
        assert back == content


def test_zero_makes_holes_unless_allocated(tmp_path: Path) -> None:
    path, content = tmp_path / "disk.raw", random.Random(4).randbytes(SIZE)
    path.write_bytes(content)

    def used() -> float:
        """MiB on the disk; the file system's metadata for the file does not count."""
        return round(path.stat().st_blocks * 512 / MiB, 1)

    with QemuNbd(path, "raw", writable=True) as server, server.connect(contexts=[BASE_ALLOCATION]) as client:
        client.zero(4 * MiB, 2 * MiB, allocate=True)
        client.flush()
        assert used() == 16
        client.zero(1 * MiB, 2 * MiB)
        client.flush()
        assert used() == 14
        client.trim(8 * MiB, 1 * MiB)
        client.write(bytes(MiB), 9 * MiB)  # written zeroes do not allocate space either
        client.flush()
        assert used() == 12
        merged = list(merge_status(client.block_status(0, SIZE), 0, SIZE, bitmap=None))
    zeroes = [(1 * MiB, 2 * MiB), (4 * MiB, 2 * MiB), (8 * MiB, 2 * MiB)]
    assert [(extent.offset, extent.length) for extent in merged if extent.zero] == zeroes
    model = bytearray(content)
    for start, length in zeroes:
        model[start : start + length] = bytes(length)
    assert path.read_bytes() == model


# --- block status ---


def test_status_of_a_disk_beyond_one_request(tmp_path: Path) -> None:
    """20 GiB takes five requests at least (4 GiB - 64 KiB each)."""
    path = tmp_path / "big.qcow2"
    img.create(path, 20 * GiB, "qcow2")
    spots = [0, 4 * GiB - 64 * KiB, 4 * GiB, 13 * GiB + 64 * KiB, 20 * GiB - 64 * KiB]
    with QemuNbd(path, "qcow2", writable=True) as server, server.connect(contexts=[BASE_ALLOCATION]) as client:
        for spot in spots:
            client.write(b"x" * 64 * KiB, spot)
        status = list(client.block_status(0, client.size))
        merged = list(merge_status(status, 0, client.size, bitmap=None))
        part = list(client.block_status(13 * GiB + 70 * KiB, 5 * GiB))
    assert len(status) > len(merged)
    data = [extent.offset for extent in merged if not extent.zero]
    assert data == [0, 4 * GiB - 64 * KiB, 13 * GiB + 64 * KiB, 20 * GiB - 64 * KiB]
    assert sum(extent.length for extent in merged) == 20 * GiB
    assert sum(extent.length for extent in merged if not extent.zero) == 5 * 64 * KiB
    assert (part[0].offset, part[0].length, part[0].flags) == (13 * GiB + 70 * KiB, 58 * KiB, 0)
    assert part[-1].offset + part[-1].length == 18 * GiB + 70 * KiB


def test_dirty_bitmap_tells_what_was_written_and_what_was_zeroed(image: Path) -> None:
    with QemuNbd(image, "qcow2", writable=True) as server, server.connect() as client:
        client.write(b"a" * MiB, 0)
        client.write(b"a" * MiB, 8 * MiB)
    subprocess.run(["qemu-img", "bitmap", "-f", "qcow2", "--add", image, "c1"], check=True)
    with QemuNbd(image, "qcow2", writable=True) as server, server.connect() as client:
        client.write(b"b", 3 * MiB + 5)
        client.write(b"b" * 2 * MiB, 5 * MiB)
        client.zero(8 * MiB, 512 * KiB)
    context = dirty_bitmap_context("c1")
    with QemuNbd(image, "qcow2", bitmap="c1") as server:
        with server.connect(contexts=[BASE_ALLOCATION, context]) as client:
            assert client.read_only
            assert client.contexts == (BASE_ALLOCATION, context)
            merged = list(merge_status(client.block_status(0, client.size), 0, client.size, bitmap="c1"))
        with server.connect(contexts=[context]) as client:
            dirt = merge_status(client.block_status(0, client.size), 0, client.size, bitmap="c1", allocation=False)
            assert [(e.offset, e.length) for e in dirt if e.dirty] == [
                (3 * MiB, 64 * KiB),
                (5 * MiB, 2 * MiB),
                (8 * MiB, 512 * KiB),
            ]
    assert [extent for extent in merged if extent.dirty] == [
        DiskExtent(3 * MiB, 64 * KiB, dirty=True, zero=False),
        DiskExtent(5 * MiB, 2 * MiB, dirty=True, zero=False),
        DiskExtent(8 * MiB, 512 * KiB, dirty=True, zero=True),
    ]
    assert [extent.offset for extent in merged if not extent.dirty and not extent.zero] == [0, 8 * MiB + 512 * KiB]
    assert sum(extent.length for extent in merged) == SIZE


def test_a_bitmap_that_is_not_offered_is_not_taken_for_a_clean_disk(server: QemuNbd) -> None:
    with pytest.raises(NbdContextMissing) as caught:
        server.connect(contexts=[BASE_ALLOCATION, dirty_bitmap_context("c1")])
    assert caught.value.contexts == (dirty_bitmap_context("c1"),)
    with server.connect() as client, pytest.raises(NbdError, match="no context"):
        list(client.block_status(0, client.size))


# --- errors ---


def test_a_wrong_export_is_told_from_a_missing_socket(server: QemuNbd, tmp_path: Path) -> None:
    with pytest.raises(NbdExportMissing, match="no export named 'other'") as caught:
        NbdClient.connect_unix(server.socket, "other")
    assert (caught.value.errno, caught.value.export) == (errno.ENOENT, "other")
    with pytest.raises(NbdError, match="No such file") as missing:
        NbdClient.connect_unix(tmp_path / "none", "")
    assert not isinstance(missing.value, NbdExportMissing)


def test_a_closed_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening
        with pytest.raises(NbdError) as caught:
            NbdClient.connect_tcp("127.0.0.1", taken.getsockname()[1], "")
    assert caught.value.errno == errno.ECONNREFUSED


def test_requests_outside_of_the_disk_are_refused_and_break_nothing(server: QemuNbd) -> None:
    with server.connect() as client:
        for offset, length in ((SIZE, 1), (SIZE - 1, 2), (-1, 1)):
            with pytest.raises(NbdError, match="outside") as caught:
                client.read_into(bytearray(length), offset)
            assert caught.value.errno == errno.EINVAL
            with pytest.raises(NbdError, match="outside"):
                client.write(b"x" * length, offset)
            with pytest.raises(NbdError, match="outside"):
                client.zero(offset, length)
        client.read_into(bytearray(1), SIZE - 1)


def test_a_read_only_export_takes_no_writes(image: Path) -> None:
    with QemuNbd(image, "qcow2") as server, server.connect() as client:
        with pytest.raises(NbdError) as caught:
            client.write(b"x", 0)
        assert caught.value.errno == errno.EPERM
        client.read_into(bytearray(1), 0)


def test_a_failed_read_has_its_errno_and_the_connection_lives(tmp_path: Path) -> None:
    trigger = tmp_path / "fail"
    failing = ["error-pread=EIO", f"error-pread-file={trigger}", "error-pread-rate=100%"]
    with (
        Nbdkit.run("unix", tmp_path, "--filter=error", "memory", "64M", *failing) as nbdkit,
        nbdkit.connect() as client,
    ):
        buffer = bytearray(16 * MiB)
        trigger.touch()
        with pytest.raises(NbdError, match="Input/output error") as caught:
            client.read_into(buffer, 0)
        assert caught.value.errno == errno.EIO
        trigger.unlink()
        client.read_into(buffer, 0)
        assert buffer == bytes(16 * MiB)


def test_a_read_at_once_is_one_request_of_any_size(server: QemuNbd, filled: bytes, tmp_path: Path) -> None:
    with server.connect() as client:
        client.zero(MiB, 8 * MiB)
        buffer = bytearray(b"x" * 10 * MiB)
        client.read_at_once(buffer, 0)
        assert buffer == filled[:MiB] + bytes(8 * MiB) + filled[9 * MiB : 10 * MiB]
        with pytest.raises(NbdError, match="outside"):
            client.read_at_once(buffer, SIZE - MiB)
    small = ["--filter=blocksize-policy", "memory", "16M", "blocksize-maximum=1M", "blocksize-error-policy=error"]
    with Nbdkit.run("unix", tmp_path, *small) as nbdkit, nbdkit.connect() as client:
        client.read_into(buffer, 0)
        with pytest.raises(NbdError):
            client.read_at_once(buffer, 0)


def test_a_killed_server_fails_the_call_and_all_later_ones(image: Path) -> None:
    server = QemuNbd(image, "qcow2")
    server.start()
    try:
        with server.connect() as client:
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(NbdError):
                client.read_into(bytearray(8 * MiB), 0)
            with pytest.raises(NbdError, match="unusable") as caught:
                client.read_into(bytearray(1), 0)
            assert caught.value.errno == errno.ENOTCONN
            with pytest.raises(NbdError, match="unusable"):
                client.flush()
    finally:
        with pytest.raises(Exception, match="exit code -9"):
            server.close()


@pytest.mark.parametrize("verb", ["read", "write", "flush", "zero", "status", "connect"])
def test_a_silent_server_costs_the_time_limit_and_no_more(server: QemuNbd, verb: str) -> None:
    buffer = bytearray(8 * MiB)
    with server.connect(contexts=[BASE_ALLOCATION], timeout=0.4) as client:
        calls: dict[str, Callable[[], object]] = {
            "read": lambda: client.read_into(buffer, 0),
            "write": lambda: client.write(buffer, 0),
            "flush": client.flush,
            "zero": lambda: client.zero(0, SIZE),
            "status": lambda: list(client.block_status(0, SIZE)),
            "connect": lambda: server.connect(timeout=0.4),
        }
        with stopped(server.pid):
            start = time.monotonic()
            with pytest.raises(NbdTimeout, match=r"no answer in 0\.4 s") as caught:
                calls[verb]()
            took = time.monotonic() - start
            assert caught.value.errno == errno.ETIMEDOUT
            assert 0.3 < took < 2
            if verb != "connect":
                with pytest.raises(NbdError, match="unusable"):
                    client.flush()
            start = time.monotonic()
            client.close()
            assert time.monotonic() - start < 1.5


def test_a_slow_server_is_not_a_silent_one(tmp_path: Path) -> None:
    """The whole read takes longer than the limit, but no single answer does."""
    with (
        Nbdkit.run("unix", tmp_path, "--filter=delay", "--threads=1", "memory", "16M", "rdelay=100ms") as nbdkit,
        nbdkit.connect(0.6) as client,
    ):
        start = time.monotonic()
        client.read_into(bytearray(8 * MiB), 0)
        assert time.monotonic() - start > 0.6


@pytest.mark.parametrize("how", ["abort", "close"])
def test_another_thread_can_end_a_waiting_call(server: QemuNbd, how: str) -> None:
    client = server.connect(timeout=60)
    failed: list[NbdError] = []

    def read() -> None:
        try:
            client.read_into(bytearray(8 * MiB), 0)
        except NbdError as error:
            failed.append(error)

    with stopped(server.pid):
        thread = threading.Thread(target=read)
        thread.start()
        while not client._connection.lock.locked():
            thread.join(0.01)
        start = time.monotonic()
        getattr(client, how)()
        thread.join(30)
        assert time.monotonic() - start < 5
    assert len(failed) == 1
    client.close()


def test_ctrl_c_ends_a_waiting_call_and_leaves_no_pointer_behind(server: QemuNbd, filled: bytes) -> None:
    class Interrupted(BaseException):
        pass

    def handler(_number: int, _frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with server.connect(timeout=60) as client:
            buffer = bytearray(8 * MiB)
            with stopped(server.pid):
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                start = time.monotonic()
                with pytest.raises(Interrupted):
                    client.read_into(buffer, 0)
                assert time.monotonic() - start < 3
            with pytest.raises(NbdError, match="unusable"):
                client.read_into(bytearray(1), 0)
            with pytest.raises(NbdError, match="unusable"):
                client.flush()
            assert buffer.count(0) == len(buffer)  # later data from the server are discarded
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_unusable_library_is_told_as_something_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "LIBRARY", "libnbd-of-another-world.so.0")
    monkeypatch.setattr(_ffi, "load", _ffi.load.__wrapped__)
    with pytest.raises(HostIncomplete, match="libnbd-of-another-world"):
        NbdClient.connect_unix("/none", "")


# --- closing ---


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_close_twice_then_use(server: QemuNbd) -> None:
    client = server.connect()
    client.close()
    client.close()
    client.abort()
    with pytest.raises(NbdError, match="closed"):
        client.read_into(bytearray(1), 0)


def test_no_descriptor_is_left_behind(server: QemuNbd, tmp_path: Path) -> None:
    server.connect().close()
    before = descriptors()
    for _ in range(10):
        server.connect().close()
        with pytest.raises(NbdExportMissing):
            NbdClient.connect_unix(server.socket, "wrong")
        with pytest.raises(NbdError):
            NbdClient.connect_unix(tmp_path / "none", "")
        with pytest.raises(NbdContextMissing):
            server.connect(contexts=["qemu:dirty-bitmap:none"])
    assert descriptors() == before


def test_a_forgotten_client_is_reported_and_freed(server: QemuNbd) -> None:
    before = descriptors()
    client = server.connect(contexts=[BASE_ALLOCATION])
    with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031 - either may free it
        del client
        gc.collect()
    assert descriptors() == before
