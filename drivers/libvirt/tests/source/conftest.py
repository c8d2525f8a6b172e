"""A lab and guests for the source's tests, and engines: in this process, or in processes inside the sites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asr_driver_libvirt.driver import LibvirtDriver
from asr_driver_libvirt.site import LibvirtSite
from tests.lab import Lab

ANSWER_SECONDS = 120


class EngineError(Exception):
    """A catalogued error in the other process."""

    def __init__(self, code: str, text: str, seconds: float) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.seconds = seconds


class EngineProcess:
    """An engine inside a site: see engine_process.py."""

    def __init__(self, lab: Lab, site: str, settings: dict[str, str]) -> None:
        program = Path(__file__).with_name("engine_process.py")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process: subprocess.Popen[bytes] = lab.popen_in(
            site,
            [sys.executable, program, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stderr=self._errors.fileno(),
        )
        assert self.answer() == "ready"

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(**arguments: object) -> object:
            self.send(name, **arguments)
            return self.answer()

        return call

    def send(self, name: str, **arguments: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, arguments]).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> object:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise AssertionError(f"the engine died:\n{self._errors.read().decode()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"], answer["text"], answer["seconds"])
        return answer["result"]

    def kill(self) -> None:
        self._process.kill()
        self._end()

    def stop(self) -> None:
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._end()

    def _end(self) -> None:
        self._process.wait(60)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._errors.close()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.skip("the lab needs root")
    with Lab(f"src-{os.getpid()}") as made:
        yield made


@pytest.fixture(scope="session")
def start(lab: Lab) -> Callable[[str], None]:
    """Starts a guest at site a and waits for its agent: a channel that opens while a backup runs stalls libvirt 9.0
    for 30 s (see _jobs.END_SECONDS)."""

    def begin(name: str) -> None:
        lab.start("a", name)
        ping = ("qemu-agent-command", name, '{"execute":"guest-ping"}')
        end = time.monotonic() + 60
        while lab.sites["a"].virsh(*ping, check=False).returncode:
            assert time.monotonic() < end, f"the agent of {name} does not answer"
            time.sleep(0.1)

    return begin


@pytest.fixture(scope="session")
def restart_libvirtd(lab: Lab) -> Callable[[], None]:
    """Restarts the daemon of site a; its guests keep running."""

    def restart() -> None:
        names = {path.stem for path in (lab.sites["a"].run_dir / "libvirt/qemu").glob("*.pid")} - {"driver"}
        running = {lab.qemu_pid("a", name) for name in names}
        daemons = [pid for pid in lab.sites["a"].hypervisor_processes() if pid not in running]
        assert daemons
        subprocess.run(["kill", *map(str, daemons)], check=True)
        waits = [f"--pid={pid}" for pid in daemons]
        subprocess.run(["tail", *waits, "-f", "/dev/null"], check=True, timeout=20)
        lab.site_up("a")

    return restart


@pytest.fixture(scope="session")
def nbd_directory() -> Iterator[Path]:
    """A directory that the host and the sites see at the same path."""
    with tempfile.TemporaryDirectory(prefix="asr-src-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def site(lab: Lab, nbd_directory: Path) -> Iterator[LibvirtSite]:
    """Site a, for this process. Its files are not visible here, so it counts as remote."""
    settings = {"uri": lab.uri("a"), "nbd": f"unix:{nbd_directory}"}
    with LibvirtDriver().connect("a", settings) as found:
        yield found


@pytest.fixture
def engines(lab: Lab) -> Iterator[Callable[..., EngineProcess]]:
    """Makes engines inside a site: `engines("b", uri=...)`."""
    started: list[EngineProcess] = []

    def start(where: str, **settings: str) -> EngineProcess:
        started.append(EngineProcess(lab, where, settings))
        return started[-1]

    yield start
    for engine in started:
        engine.stop()
