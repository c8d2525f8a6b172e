"""qemu-nbd as a child, and qemu-img, on real images."""

import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from asr_storage.nbd.client import NbdError
from asr_storage.nbd.status import BASE_ALLOCATION, merge_status
from asr_storage.qemu import img, process
from asr_storage.qemu.img import Bitmap
from asr_storage.qemu.nbd_server import QemuNbd
from asr_storage.qemu.process import QemuError, QemuTimeout
from asrcore.errors import HostIncomplete
from asrcore.units import GiB, KiB, MiB
from drivers.storage.tests.nbdkit import stopped

SIZE = 4 * MiB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    img.create(path, SIZE, "qcow2")
    return path


@pytest.fixture
def hanging_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu-img and qemu-nbd that print a line and then hang."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("qemu-img", "qemu-nbd"):
        (directory / name).write_text("#!/bin/sh\necho 'waiting for a lock' >&2\nexec sleep 300\n")
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def write(path: Path, fmt: str, content: bytes, offset: int = 0) -> None:
    with QemuNbd(path, fmt, writable=True) as server, server.connect() as client:
        client.write(content, offset)


def read(path: Path, fmt: str, size: int = SIZE) -> bytes:
    buffer = bytearray(size)
    with QemuNbd(path, fmt) as server, server.connect() as client:
        client.read_into(buffer, 0)
    return bytes(buffer)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- qemu-nbd ---


@pytest.mark.parametrize("name", ["plain", "a,b=c", "nbd:unix:x", "json:{}", "with space", "ünï"])
def test_any_file_name_is_just_a_file_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    img.create(path, SIZE, "qcow2")
    write(path, "qcow2", b"content")
    assert read(path, "qcow2").startswith(b"content\0")
    assert img.info(path, "qcow2").virtual_size == SIZE


def test_a_guests_raw_disk_is_raw_whatever_it_holds(tmp_path: Path) -> None:
    """A guest may write a qcow2 header that names a file of the host as its backing file."""
    secret, disk = tmp_path / "secret", tmp_path / "disk.raw"
    secret.write_bytes(b"secret" * 10_000)
    img.create(disk, 65536, "qcow2", backing=secret, backing_fmt="raw")
    assert b"secretsecret" in read(disk, "qcow2", 65536)  # the trap works
    header = disk.read_bytes() + bytes(-disk.stat().st_size % 512)  # QEMU uses whole sectors
    disk.write_bytes(header)
    assert read(disk, "raw", len(header)) == header
    reported = img.info(disk, "raw")
    assert (reported.format, reported.virtual_size, reported.backing_file) == ("raw", len(header), None)


def test_a_server_that_cannot_start_says_why(tmp_path: Path, image: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(MiB))
    for server, words in (
        (QemuNbd(tmp_path / "none", "raw"), "No such file"),
        (QemuNbd(raw, "qcow2"), "not in qcow2 format"),
        (QemuNbd(image, "qcow2", bitmap="c1"), "c1"),
        (QemuNbd(image, "qcow99"), "qcow99"),
    ):
        with pytest.raises(QemuError, match=words) as caught:
            server.start()
        assert caught.value.exit_code == 1
        assert "did not start" in str(caught.value)
        server.close()


def test_a_server_that_never_answers_is_given_up(image: Path, hanging_tools: None) -> None:
    server = QemuNbd(image, "qcow2", start_timeout=0.3)
    with pytest.raises(QemuTimeout, match=r"0\.3 s.*waiting for a lock"):
        server.start()
    with pytest.raises(ValueError, match="not started"):
        _ = server.pid


def test_writable_is_exclusive_and_force_share_reads_beside_it(image: Path) -> None:
    with QemuNbd(image, "qcow2", writable=True) as server:
        with server.connect() as client:
            client.write(b"x" * 100, 0)
            client.flush()
        with pytest.raises(QemuError, match="lock"):
            QemuNbd(image, "qcow2", writable=True).start()
        with pytest.raises(QemuError, match="lock"):
            QemuNbd(image, "qcow2").start()
        with QemuNbd(image, "qcow2", force_share=True) as beside, beside.connect() as client:
            assert client.read_only
        with pytest.raises(QemuError, match="lock"):
            img.info(image, "qcow2")
        assert img.info(image, "qcow2", in_use=True).virtual_size == SIZE
    with pytest.raises(ValueError, match="force_share"):
        QemuNbd(image, "qcow2", writable=True, force_share=True)


def test_zeroes_written_do_not_thicken_the_image(image: Path) -> None:
    before = image.stat().st_blocks
    write(image, "qcow2", bytes(SIZE))
    assert (image.stat().st_blocks - before) * 512 < 256 * KiB  # a table or two
    assert read(image, "qcow2") == bytes(SIZE)


def test_close_returns_when_the_image_is_let_go_and_leaves_nothing(image: Path, tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    server = QemuNbd(image, "qcow2", writable=True, runtime_dir=runtime)
    for _ in range(3):  # it can be started again
        server.start()
        pid = server.pid
        assert server.socket.parent.stat().st_mode & 0o077 == 0
        with pytest.raises(ValueError, match="already started"):
            server.start()
        server.close()
        server.close()
        assert not alive(pid)
        assert list(runtime.iterdir()) == []


def test_a_server_that_does_not_stop_is_killed_and_told(image: Path) -> None:
    server = QemuNbd(image, "qcow2", stop_timeout=0.3)
    server.start()
    pid = server.pid
    with stopped(pid), pytest.raises(QemuTimeout, match=r"does not stop in 0\.3 s"):
        server.close()
    assert not alive(pid)
    server.close()


def test_the_first_error_is_not_hidden_by_the_servers_end(image: Path) -> None:
    with pytest.raises(KeyError) as caught, QemuNbd(image, "qcow2") as server:  # noqa: PT012
        os.kill(server.pid, signal.SIGKILL)
        raise KeyError("first")
    assert any("exit code -9" in note for note in caught.value.__notes__)


def test_too_long_a_socket_path_is_told(image: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with pytest.raises(ValueError, match="longer than"):
        QemuNbd(image, "qcow2", runtime_dir=deep).start()
    assert list(deep.iterdir()) == []


def test_the_server_outlives_the_thread_that_started_it_but_not_the_process(image: Path) -> None:
    """The kernel sends the parent-death signal at the end of the starting *thread*, which must not be a worker."""
    program = """
import sys, threading
from pathlib import Path
from asr_storage.qemu.nbd_server import QemuNbd

server = QemuNbd(Path(sys.argv[1]), "qcow2", writable=True)
thread = threading.Thread(target=server.start)
thread.start()
thread.join()
with server.connect() as client:
    client.write(b"x", 0)
print(server.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, image],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        with suppress(subprocess.TimeoutExpired):
            parent.wait(0.2)
            pytest.fail("the parent exited")
        assert alive(pid)
        watch = os.pidfd_open(pid)
        parent.kill()
    try:
        poller = select.poll()
        poller.register(watch)
        assert poller.poll(5000), "the server survived its parent"
    finally:
        os.close(watch)


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    backing = tmp_path / "backing"
    backing.write_bytes(random.Random(1).randbytes(SIZE))
    done = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    yield Path(done.stdout.strip())
    subprocess.run(["losetup", "-d", done.stdout.strip()], check=True)


def test_a_block_device_is_served(block_device: Path, tmp_path: Path) -> None:
    assert read(block_device, "raw") == (tmp_path / "backing").read_bytes()
    write(block_device, "raw", b"changed!" * 64)
    assert read(block_device, "raw").startswith(b"changed!" * 64)


# --- qemu-img ---


def test_info_of_a_plain_image(image: Path) -> None:
    reported = img.info(image, "qcow2")
    assert (reported.format, reported.virtual_size, reported.cluster_size) == ("qcow2", SIZE, 64 * KiB)
    assert (reported.backing_file, reported.backing_format, reported.data_file) == (None, None, None)
    assert (reported.encrypted, reported.corrupt, reported.dirty, reported.snapshots, reported.bitmaps) == (
        False,
        False,
        False,
        (),
        (),
    )
    assert 0 < reported.actual_size < MiB


def test_info_tells_snapshots_data_file_and_encryption(tmp_path: Path, image: Path) -> None:
    subprocess.run(["qemu-img", "snapshot", "-c", "before", image], check=True)
    assert img.info(image, "qcow2").snapshots == ("before",)
    outside = tmp_path / "outside.qcow2"
    options = f"data_file={tmp_path}/data"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, outside, "1M"], check=True)
    assert img.info(outside, "qcow2").data_file == f"{tmp_path}/data"
    locked = tmp_path / "locked.qcow2"
    img.create(locked, SIZE, "qcow2")
    with locked.open("r+b") as header:
        header.seek(32)  # crypt_method; making a LUKS image takes long and fails on a busy machine
        header.write((1).to_bytes(4))
    assert img.info(locked, "qcow2").encrypted


def test_a_bitmap_is_consistent_after_an_orderly_end_and_in_use_after_a_crash(image: Path) -> None:
    subprocess.run(["qemu-img", "bitmap", "-f", "qcow2", "--add", "-g", "128K", image, "c1"], check=True)
    assert img.info(image, "qcow2").bitmaps == (Bitmap("c1", 128 * KiB, in_use=False, auto=True),)
    write(image, "qcow2", b"x")
    assert img.info(image, "qcow2").bitmaps[0].in_use is False
    server = QemuNbd(image, "qcow2", writable=True)
    server.start()
    with server.connect() as client:
        client.write(b"x", 0)
        client.flush()
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(QemuError, match="-9"):
        server.close()
    assert img.info(image, "qcow2").bitmaps[0].in_use is True
    with pytest.raises(QemuError, match="c1"):
        QemuNbd(image, "qcow2", bitmap="c1").start()


def test_create_overwrites_nothing(image: Path) -> None:
    before = image.read_bytes()
    with pytest.raises(FileExistsError):
        img.create(image, SIZE, "qcow2")
    assert image.read_bytes() == before
    with pytest.raises(ValueError, match="format"):
        img.create(image.with_name("new"), SIZE, "qcow2", backing=image)
    with pytest.raises(ValueError, match="size"):
        img.create(image.with_name("new"), None, "qcow2")


def test_an_overlay_is_merged_and_merging_can_be_repeated(image: Path, tmp_path: Path) -> None:
    write(image, "qcow2", b"a" * MiB)
    overlay = tmp_path / "overlay.qcow2"
    img.create(overlay, None, "qcow2", backing=image, backing_fmt="qcow2")
    reported = img.info(overlay, "qcow2")
    assert (reported.virtual_size, reported.backing_file, reported.backing_format) == (SIZE, str(image), "qcow2")
    assert reported.full_backing_file == str(image)
    write(overlay, "qcow2", b"b" * 100 * KiB, 512 * KiB)
    write(overlay, "qcow2", bytes(64 * KiB), 0)
    wanted = read(overlay, "qcow2")
    for _ in range(2):
        img.commit(overlay, "qcow2", timeout=60)
        assert read(image, "qcow2") == wanted
        assert read(overlay, "qcow2") == wanted


def test_convert_flattens_layers_and_keeps_holes(image: Path, tmp_path: Path) -> None:
    overlay, flat, raw = tmp_path / "overlay.qcow2", tmp_path / "flat.qcow2", tmp_path / "flat.raw"
    write(image, "qcow2", b"a" * 64 * KiB, MiB)
    img.create(overlay, None, "qcow2", backing=image, backing_fmt="qcow2")
    write(overlay, "qcow2", b"b" * 64 * KiB, 2 * MiB)
    img.convert(overlay, "qcow2", flat, "qcow2", timeout=60)
    img.convert(flat, "qcow2", raw, "raw", timeout=60)
    assert img.info(flat, "qcow2").backing_file is None
    assert raw.read_bytes() == read(overlay, "qcow2")
    assert raw.stat().st_blocks * 512 < 256 * KiB


def test_rebase_records_another_backing_file(image: Path, tmp_path: Path) -> None:
    write(image, "qcow2", b"a" * MiB)
    copy, overlay = tmp_path / "copy.raw", tmp_path / "overlay.qcow2"
    img.convert(image, "qcow2", copy, "raw", timeout=60)
    img.create(overlay, None, "qcow2", backing=image, backing_fmt="qcow2")
    write(overlay, "qcow2", b"b" * MiB, 2 * MiB)
    wanted = read(overlay, "qcow2")
    img.rebase_unsafe(overlay, "qcow2", copy, "raw")
    reported = img.info(overlay, "qcow2")
    assert (reported.backing_file, reported.backing_format) == (str(copy), "raw")
    assert read(overlay, "qcow2") == wanted
    img.rebase_unsafe(overlay, "qcow2", None, None)
    assert img.info(overlay, "qcow2").backing_file is None


def test_check_tells_sound_leaking_and_corrupt_images_apart(image: Path, tmp_path: Path) -> None:
    write(image, "qcow2", b"a" * MiB)
    assert img.check(image, "qcow2", timeout=60) == img.CheckResult(corruptions=0, leaks=0)
    server = QemuNbd(image, "qcow2", writable=True)
    server.start()
    with server.connect() as client:
        client.write(b"b" * 64 * KiB, 2 * MiB)
        client.flush()
    server.close()
    content = bytearray(image.read_bytes())
    l1 = int.from_bytes(content[40:48])
    l2 = int.from_bytes(content[l1 : l1 + 8]) & 0x00FF_FFFF_FFFF_FE00
    leaking, corrupt = bytearray(content), bytearray(content)
    leaking[l2 : l2 + 8] = bytes(8)  # the first cluster is no longer referenced
    corrupt[l2 : l2 + 8] = corrupt[l2 + 8 : l2 + 16]  # the second one is referenced twice
    image.write_bytes(leaking)
    reported = img.check(image, "qcow2", timeout=60)
    assert (reported.corruptions, reported.sound) == (0, True)
    assert reported.leaks == 1
    image.write_bytes(corrupt)
    reported = img.check(image, "qcow2", timeout=60)
    assert reported.corruptions > 0
    assert not reported.sound
    with pytest.raises(QemuError, match="does not support"):
        img.check(tmp_path / "disk.qcow2", "raw", timeout=60)


def test_resize_grows_with_zeroes_and_shrinks_only_when_told(image: Path) -> None:
    write(image, "qcow2", b"a" * SIZE)
    img.resize(image, "qcow2", 2 * SIZE)
    assert read(image, "qcow2", 2 * SIZE) == b"a" * SIZE + bytes(SIZE)
    with pytest.raises(QemuError, match="shrink"):
        img.resize(image, "qcow2", SIZE)
    img.resize(image, "qcow2", SIZE, shrink=True)
    assert img.info(image, "qcow2").virtual_size == SIZE


def test_errors_repeat_what_qemu_img_said(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match="No such file") as caught:
        img.info(tmp_path / "none", "qcow2")
    assert caught.value.exit_code == 1
    assert caught.value.command[:2] == ("qemu-img", "info")


@pytest.mark.usefixtures("hanging_tools")
def test_a_hanging_tool_is_killed_at_the_time_limit(tmp_path: Path) -> None:
    with pytest.raises(QemuTimeout, match=r"not done in 0\.3 s.*waiting for a lock"):
        img.info(tmp_path / "any", "raw", timeout=0.3)


def test_a_missing_tool_is_told_as_something_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostIncomplete, match="setpriv"):
        img.info(tmp_path / "any", "raw")


def test_a_forked_process_starts_children_too(tmp_path: Path) -> None:
    """A fork does not inherit the thread that starts processes."""
    program = """
import os, sys
from asr_storage.qemu import process
process.run(["true"], what="before", timeout=5)
child = os.fork()
if child == 0:
    process.run(["true"], what="after", timeout=5)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=30, check=True)


def test_many_threads_start_children_at_once() -> None:
    codes: list[int] = []

    def work() -> None:
        codes.extend(process.run(["sh", "-c", "exit 3"], what="x", timeout=30, accept=(3,))[0] for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [3] * 30


def test_big_sparse_images_are_cheap(tmp_path: Path) -> None:
    path = tmp_path / "big.qcow2"
    img.create(path, 500 * GiB, "qcow2")
    with QemuNbd(path, "qcow2") as server, server.connect(contexts=[BASE_ALLOCATION]) as client:
        assert [tuple(e) for e in merge_status(client.block_status(0, client.size), 0, client.size, bitmap=None)] == [
            (0, 500 * GiB, True, True)
        ]
        with pytest.raises(NbdError, match="outside"):
            client.read_into(bytearray(1), client.size)
