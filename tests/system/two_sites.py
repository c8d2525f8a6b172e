"""Two sites with one process each: `asr master-target` at site b, an engine at site a that uses it with the driver
`remote`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from tests.certificates import Authority
from tests.lab import BlankDisk, Kind, Lab
from tests.lab._lab import ADDRESSES
from tests.system.asr_cli import ASR
from tests.system.rig import MIB, EngineError, EngineProcess, Rig, wait_for

__all__ = [
    "CUTS",
    "PORT",
    "MasterTargetProcess",
    "copied_with_cuts",
    "master_target",
    "paired",
    "sent_bytes",
]

PORT = 9444
CUTS = 10
_IDENTITY = "/srv/identity"


@attrs.define
class MasterTargetProcess:
    """The process at site b. `settings`: those of the driver `remote` at site a."""

    lab: Lab
    settings: dict[str, str]
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all its threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100  # USER_HZ

    @property
    def peak_rss(self) -> int:
        """Bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10


def sent_bytes(lab: Lab) -> int:
    """Bytes that left site a over the link."""
    return int(lab.run_in("a", ["cat", "/sys/class/net/wan0/statistics/tx_bytes"]).stdout)


@contextmanager
def master_target(lab: Lab, replica_dir: str = "/srv/xfs", silence: str = "30s") -> Iterator[MasterTargetProcess]:
    """Identities at both sites, and the process at site b; it listens, and stops cleanly at the end."""
    authority = Authority()
    authority.issue(lab.host_path("b", _IDENTITY), "master-target", "beta", addresses=(ADDRESSES["b"],))
    authority.issue(lab.host_path("a", _IDENTITY), "process-server", "alpha", addresses=(ADDRESSES["a"],))
    log = lab.host_path("b", "/srv/master-target.log")
    address = f"{ADDRESSES['b']}:{PORT}"
    words = ["--driver", "libvirt", "--set", "uri=qemu:///system", "--set", f"replica_dir={replica_dir}"]
    words += ["--listen", address, "--identity", _IDENTITY, "--silence", silence]
    with log.open("wb") as file:
        process = lab.popen_in("b", [str(ASR), "master-target", *words], stdout=file.fileno(), stderr=file.fileno())
    settings = {"address": address, "identity": _IDENTITY, "silence": silence}
    found = MasterTargetProcess(lab, settings, process, log)
    try:
        wait_for(lambda: b"serves" in log.read_bytes() or process.poll() is not None, "the master target listens")
        assert process.poll() is None, log.read_text()
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()
            process.wait(10)


@contextmanager
def paired(
    lab: Lab, target: MasterTargetProcess, module: str = "tests.system.engine_process", nbd: str = "unix"
) -> Iterator[EngineProcess]:
    """An engine at site a with sites `a`, here, and `there`, the master target; policy `still`."""
    engine = EngineProcess(lab, f"/srv/apart-{time.monotonic_ns()}.db", module, "a")
    try:
        engine("add_site", "a", "libvirt", {"uri": "qemu:///system", "nbd": nbd})
        engine("add_site", "there", "remote", target.settings)
        engine("add_policy", "still")
        yield engine
    finally:
        engine.close()


def _reset_connections(lab: Lab) -> None:
    """Reset all connections of site a with the master target. Unsent data are lost; the other side is notified."""
    words = ["ss", "--kill", "--tcp", "--numeric", "state", "established", "dport", "=", f":{PORT}"]
    killed = lab.run_in("a", words).stdout
    assert f":{PORT}" in killed, "there was no connection to cut"


def _copied(lab: Lab, engine: EngineProcess, guest: str, size: int, cuts: int) -> int:
    """Protect a guest whose disks have this many incompressible bytes, and cut the copy's connections `cuts` times,
    evenly. Returns the bytes that left site a over the link, including retransmissions."""
    begun = sent_bytes(lab)
    marks = deque(begun + number * size // (cuts + 1) for number in range(1, cuts + 1))
    job = engine("protect", guest, source="a", target="there", policy="still")
    while marks:
        wait_for(lambda: sent_bytes(lab) > marks[0], "the copy continues", timeout=120, poll=0.02)
        marks.popleft()
        _reset_connections(lab)
        with pytest.raises(EngineError) as failed:
            engine("wait", job["id"], 120.0, timeout=130)
        assert failed.value.exit_code == 6
        job = engine("replicate", guest, keep=True)
    engine("wait", job["id"], 180.0, timeout=190)
    return sent_bytes(lab) - begun


def copied_with_cuts(rig: Rig, engine: EngineProcess, name: str) -> tuple[int, int]:
    """Copy a guest's incompressible disk of 256 MiB at 100 Mbit/s, first uninterrupted, then cut ten times.

    Returns the bytes on the wire of each copy. The guest, whose workload is paused, stays and is protected.
    """
    lab, size = rig.lab, 256 * MIB
    lab.define_guest("a", Kind.BIOS_DIRECT, name, rate=1, extra_disks=[BlankDisk("vdc", size, "raw")])
    with lab.host_path("a", f"/srv/images/{name}-vdc.raw").open("r+b") as disk:
        for _ in range(0, size, MIB):
            disk.write(os.urandom(MIB))
    rig.start(name)
    rig.paused(name)
    lab.slow(100)
    try:
        uncut = _copied(lab, engine, name, size, cuts=0)
        job = engine("unprotect", name)
        engine("wait", job["id"], 60.0)
        return uncut, _copied(lab, engine, name, size, CUTS)
    finally:
        lab.restore()
