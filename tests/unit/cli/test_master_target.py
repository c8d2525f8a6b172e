"""`asr master-target` as a process: it prints where it listens, serves, stops cleanly, and reports refusals."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from asrcore.remote import RemoteDriver
from asrcore.testing.memory import MemoryWorld
from tests.certificates import Authority
from tests.unit.remote.serving import Served

ASR = Path(sys.executable).with_name("asr")


@pytest.fixture
def authority() -> Authority:
    return Authority()


@contextmanager
def running(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its first line."""
    process = subprocess.Popen(
        [ASR, "master-target", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_serves_until_it_is_asked_to_end(tmp_path: Path, authority: Authority, number: int) -> None:
    """The site that it serves is itself a remote one: a gateway, with the only driver that is always installed."""
    identity = authority.issue(tmp_path / "target", "master-target", "beta")
    gateway = authority.issue(tmp_path / "gateway", "process-server")
    MemoryWorld("far", path=tmp_path / "far").add_machine("web", {"vda": 1 << 20})
    served = Served("far", tmp_path / "far", identity)
    try:
        settings = ["--set", f"address={served.address}", "--set", f"identity={gateway}"]
        words = ["--driver", "remote", *settings, "--identity", str(identity), "--listen", "127.0.0.1:0"]
        with running(*words) as (process, said):
            assert said.startswith("master-target beta serves remote (1) at 127.0.0.1:")
            address = said.split(" at ")[1].partition(";")[0]
            with RemoteDriver().connect("near", {"address": address, "identity": str(gateway)}) as site:
                assert [machine.id for machine in site.inventory.machines()] == ["web"]
            process.send_signal(number)
            assert process.wait(30) == 0
    finally:
        served.stop()


def refused(*words: str) -> tuple[int, str]:
    """Its exit code and output."""
    done = subprocess.run([ASR, "master-target", *words], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def test_refuses_what_it_cannot_use(tmp_path: Path, authority: Authority) -> None:
    identity = authority.issue(tmp_path / "target", "master-target", "beta")
    gateway = authority.issue(tmp_path / "gateway", "process-server")
    MemoryWorld("far", path=tmp_path / "far")
    served = Served("far", tmp_path / "far", identity)
    try:
        site = ["--driver", "remote", "--set", f"address={served.address}", "--set", f"identity={gateway}"]
        with socket.create_server(("127.0.0.1", 0)) as taken:
            listen = ["--listen", f"127.0.0.1:{taken.getsockname()[1]}"]
            code, said = refused(*site, "--identity", str(identity), *listen)
        assert (code, "cannot-listen" in said) == (2, True), said
        code, said = refused(*site, "--identity", str(tmp_path / "nowhere"), "--listen", "127.0.0.1:0")
        assert (code, "identity-unusable" in said) == (7, True), said
        code, said = refused(*site, "--identity", str(identity), "--listen", "nonsense")
        assert (code, "invalid-value" in said) == (2, True), said
        code, said = refused("--driver", "remote", "--set", "nothing=1", "--identity", str(identity))
        assert (code, "invalid-setting" in said) == (2, True), said
        code, said = refused("--driver", "none", "--identity", str(identity))
        assert (code, "driver-not-found" in said) == (3, True), said
    finally:
        served.stop()


def test_settings_of_the_driver_are_checked(tmp_path: Path, authority: Authority) -> None:
    from asrcore.errors import InvalidSetting

    identity = str(authority.issue(tmp_path, "process-server"))
    good = {"address": "127.0.0.1:1", "identity": identity}
    for wrong in (
        {"address": "nowhere"},
        {"role": "king"},
        {"silence": "0s"},
        {"silence": "soon"},
        {"connections": "0"},
        {"connections": "many"},
    ):
        with pytest.raises(InvalidSetting) as problem:
            RemoteDriver().connect("there", good | wrong)
        assert problem.value.attributes["setting"] == next(iter(wrong))
