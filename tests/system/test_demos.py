"""Each demo runs without a network once its target's set-up is done, and sends no request.

The set-up and the command are read from the Makefile. The demo's network has a route that leads nowhere and counts the
packets: a download whose failure is ignored is also detected.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab._run import run

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

PROJECT = Path(__file__).resolve().parents[2]
DEMOS = ("demo", "demo-physical", "demo-azure", "demo-azure-physical")
START_SECONDS = 120.0
DEMO_SECONDS = 1200.0
SET_UP_SECONDS = 900.0
NETWORK = """\
echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
ip link set lo up
ip link add out type veth peer name void
ip link set void up
ip address add 192.0.2.1/24 dev out
ip link set out up
ip neighbour add 192.0.2.2 lladdr 02:00:00:00:00:02 dev out
ip route add default via 192.0.2.2
mount --bind "$0" /etc/resolv.conf
exec env --default-signal=INT "$@"
"""
"""Its name server is also beyond that route: otherwise a name lookup would not be counted."""


def recipe(target: str) -> tuple[list[str], list[str]]:
    """From the Makefile: what the target sets up in addition to .venv, and its command."""
    lines = run(["make", "-n", "--no-print-directory", target], cwd=PROJECT).stdout.splitlines()
    (words,) = (line.split()[1:] for line in lines[:-1] if line not in (".ci/setup packages", ".ci/setup venv"))
    return words, shlex.split(lines[-1])


class Isolated:
    """A command in a network, with a name server, from which no reply comes."""

    def __init__(self, command: Sequence[str], cwd: Path, work: Path) -> None:
        resolver = work / "resolv.conf"
        resolver.write_text("nameserver 192.0.2.53\n")
        self._output = work / "output"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                ["unshare", "--net", "--mount", "sh", "-ec", NETWORK, str(resolver), *command],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        while not self._devices() and self.process.poll() is None:
            time.sleep(0.05)
        self._network = os.open(f"/proc/{self.process.pid}/ns/net", os.O_RDONLY)

    def _devices(self) -> list[list[str]]:
        try:
            lines = Path(f"/proc/{self.process.pid}/net/dev").read_text().splitlines()
        except OSError:
            return []
        return [line.split() for line in lines if line.strip().startswith("out:")]

    def output(self) -> str:
        """Its output so far."""
        return self._output.read_text(errors="replace")

    def sent(self) -> int:
        """Packets that were sent; also available after its end."""
        inside = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._network}", "cat", "/proc/net/dev"]
        (line,) = (line for line in run(inside).stdout.splitlines() if line.strip().startswith("out:"))
        return int(line.split()[10])

    def wait(self, seconds: float, *, until: str = "") -> None:
        """Wait for its end, or for a line that starts with `until`; fail when it sends anything."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and not (until and f"\n{until}" in f"\n{self.output()}"):
            assert self.sent() == 0, f"something was asked of a network:\n{self.output()[-4000:]}"
            assert time.monotonic() < end, f"not done after {seconds:g} s:\n{self.output()[-4000:]}"
            time.sleep(0.25)
        assert self.sent() == 0, f"something was asked of a network:\n{self.output()[-4000:]}"

    def close(self) -> None:
        """End it as Ctrl-C does: it removes its lab."""
        os.close(self._network)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait(10)


@contextmanager
def isolated(command: Sequence[str], cwd: Path) -> Iterator[Isolated]:
    with tempfile.TemporaryDirectory(prefix="asr-demo-") as work:
        lab = f"demo{os.getpid()}-{threading.get_native_id()}"
        made = Isolated([*command, "--lab", lab, "--report", f"{work}/report.json"], cwd, Path(work))
        try:
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("target", DEMOS)
def test_demo_begins_without_a_network(target: str) -> None:
    """Until the first line of its timeline: by then its lab is up, and everything that was downloaded is in use."""
    with isolated(recipe(target)[1], PROJECT) as demo:
        demo.wait(START_SECONDS, until="[")
        assert demo.process.poll() is None, demo.output()


def test_what_is_asked_of_a_network_is_noticed() -> None:
    """A name lookup, and a connection to an address."""
    for asks in (
        "import socket; socket.getaddrinfo('example.org', 443)",
        "import socket; socket.create_connection(('203.0.113.1', 80))",
    ):
        with isolated([sys.executable, "-c", asks], PROJECT) as asking, pytest.raises(AssertionError, match="asked of"):
            asking.wait(START_SECONDS)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str], Path]]:
    """The sources in a directory without build results, an environment, and the calls of npm in it."""
    place = Path(tempfile.mkdtemp(prefix="asr-fresh-"))
    try:
        listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PROJECT).stdout
        for name in listed.rstrip("\0").split("\0"):
            if (PROJECT / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(PROJECT / name, place / name)
        (place / ".venv").symlink_to(sys.prefix)
        calls, npm = tmp_path / "npm-calls", tmp_path / "bin/npm"
        calls.touch()
        npm.parent.mkdir()
        npm.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {shutil.which("npm")} "$@"\n')
        npm.chmod(0o755)
        yield place, {**os.environ, "PATH": f"{npm.parent}:{os.environ['PATH']}"}, calls
    finally:
        shutil.rmtree(place)


@pytest.mark.long
@pytest.mark.timeout(SET_UP_SECONDS + DEMO_SECONDS)
@pytest.mark.parametrize("target", DEMOS)
def test_demo_on_a_machine_that_saw_no_other(target: str, machine: tuple[Path, dict[str, str], Path]) -> None:
    """Set up only by its own target's set-up, and run to its end."""
    place, environment, npm_calls = machine
    words, command = recipe(target)
    run([place / ".ci/setup", *words], cwd=place, timeout=SET_UP_SECONDS, env=environment)
    assert bool(npm_calls.read_text()) == ("azure" in target)
    with isolated(command, place) as demo:
        demo.wait(DEMO_SECONDS)
        assert demo.process.wait() == 0, demo.output()[-8000:]
