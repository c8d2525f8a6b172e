"""The guard as a process, and how it sees readers; without a hypervisor."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asr_driver_libvirt.settings import SiteSettings
from asr_driver_libvirt.source.guard import Guard, _clients, _Process
from asr_driver_libvirt.xml.backup import NbdServer
from asrcore.errors import MachineNotFound


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def pids(guard: Guard) -> list[int]:
    """Processes whose standard input is the guard's pipe."""
    pipe = Path(f"/proc/self/fd/{guard._fd}").readlink()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "fd/0").readlink() == pipe:
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.fixture
def guard() -> Iterator[Guard]:
    made = Guard("a", SiteSettings.parse({"uri": "qemu:///system"}))
    yield made
    made.close()


def test_it_starts_with_the_first_view_and_ends_with_the_engine_if_nothing_is_left(guard: Guard) -> None:
    assert guard._fd == -1
    guard.view("machine", "asr-v1", held=False, places=[])
    (pid,) = pids(guard)
    assert os.getsid(pid) != os.getsid(0), "a signal of the terminal does not reach it"
    guard.view("machine", "asr-v2", held=False, places=[])
    assert pids(guard) == [pid]
    guard.ended("asr-v1")
    guard.ended("asr-v2")
    time.sleep(0.2)
    assert pids(guard) == [pid]
    guard.close()
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_it_imports_nothing_from_the_working_directory(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("syslog", "json", "socket"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # as where the engine was started by `python -c`
    guard.view("machine", "asr-v1", held=False, places=[])
    (pid,) = pids(guard)
    guard.ended("asr-v1")
    guard.close()
    until(lambda: not Path(f"/proc/{pid}").exists())
    assert not (tmp_path / "ran").exists()


def test_one_that_was_killed_is_started_again_and_knows_all_that_is_open(guard: Guard) -> None:
    guard.view("machine", "asr-v1", held=False, places=[])
    (pid,) = pids(guard)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists())
    guard.view("machine", "asr-v2", held=False, places=[])
    (again,) = pids(guard)
    assert again != pid
    guard.ended("asr-v2")
    guard.close()
    time.sleep(1.5)
    assert Path(f"/proc/{again}").exists(), "the first view is left"
    os.kill(again, signal.SIGKILL)


def test_one_that_does_not_read_is_killed_before_another_is_started(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asr_driver_libvirt.source.guard.WRITE_SECONDS", 0.5)
    guard.view("machine", "asr-v0", held=False, places=[])
    (pid,) = pids(guard)
    os.kill(pid, signal.SIGSTOP)
    first = Path(f"/proc/self/fd/{guard._fd}").readlink()
    fcntl.fcntl(guard._fd, fcntl.F_SETPIPE_SZ, 4096)
    names = [f"asr-v{number}" for number in range(100)]
    for name in names:
        guard.view("machine", name, held=False, places=[])
    assert Path(f"/proc/self/fd/{guard._fd}").readlink() != first
    (again,) = pids(guard)
    assert again != pid
    # If it continued later it would see the end of its pipe, and end what the engine still reads.
    until(lambda: not Path(f"/proc/{pid}").exists())
    for name in names:
        guard.ended(name)
    guard.close()
    until(lambda: not Path(f"/proc/{again}").exists())


def test_one_receives_more_views_than_fit_in_its_pipe(guard: Guard) -> None:
    """All are sent to a guard that is started again, and it may read them slowly."""
    names = [f"asr-v{number}" for number in range(600)]
    for name in names:
        guard._entries[name] = {"machine": "m" * 36, "view": name, "held": False, "starting": False, "places": ["/p"]}
    assert len(json.dumps(guard._entries)) > 1 << 16
    guard.view("machine", "asr-last", held=False, places=[])
    (pid,) = pids(guard)
    for name in [*names, "asr-last"]:
        guard.ended(name)
    assert pids(guard) == [pid]
    guard.close()
    until(lambda: not Path(f"/proc/{pid}").exists())


class NoMachine:
    """A host that answers, and does not have the machine."""

    def domain(self, machine: str) -> None:
        raise MachineNotFound(machine=machine, site="a")


def test_nothing_is_left_of_a_machine_that_was_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr("syslog.syslog", lambda _, text: logged.append(text))
    process = _Process({"site": "a", "settings": {}, "local": False, "reserve": None}, 60.0)
    monkeypatch.setattr(process, "_host", NoMachine())
    for key in ("asr-v1", "machine"):
        process._entries[key] = {"machine": "machine", "view": "", "held": True, "starting": True, "places": []}
    process._over = time.monotonic()
    process._look()
    assert not process._entries
    assert not logged


def test_readers_are_seen(tmp_path: Path) -> None:
    path = str(tmp_path / "nbd.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        assert _clients(NbdServer(socket=path)) == 0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            taken, _ = server.accept()
            assert _clients(NbdServer(socket=path)) == 1
            taken.close()
        assert _clients(NbdServer(socket=path)) == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_readers_over_tcp_are_seen(host: str) -> None:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        port = server.getsockname()[1]
        assert _clients(NbdServer(host=host, port=port)) == 0
        with socket.create_connection((host, port)):
            assert _clients(NbdServer(host=host, port=port)) > 0
            assert _clients(NbdServer(host="127.0.0.2", port=port)) == 0
        assert _clients(NbdServer(host=host, port=port)) == 0
