"""Two sites with a process each: `asr master-target` at site b, an engine at site a that uses it by driver `remote`."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from tests.certificates import Authority
from tests.lab import Lab
from tests.lab._lab import ADDRESSES
from tests.system.cockpit import ASR
from tests.system.rig import Pilot, wait_for

__all__ = ["PORT", "MasterTargetProcess", "master_target", "paired", "sent_bytes"]

PORT = 9444
_IDENTITY = "/srv/identity"


@attrs.define
class MasterTargetProcess:
    """The process at site b. `settings`: of the driver `remote` at site a."""

    lab: Lab
    settings: dict[str, str]
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def cpu_seconds(self) -> float:
        """Of all its threads until now."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100  # USER_HZ

    @property
    def peak_rss(self) -> int:
        """Bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10


def sent_bytes(lab: Lab) -> int:
    """That left site a by the link."""
    return int(lab.run_in("a", ["cat", "/sys/class/net/wan0/statistics/tx_bytes"]).stdout)


@contextmanager
def master_target(lab: Lab, replica_dir: str = "/srv/xfs", silence: str = "30s") -> Iterator[MasterTargetProcess]:
    """Identities at both sites, and the process at site b; it listens, and ends in good order."""
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
    lab: Lab, target: MasterTargetProcess, module: str = "tests.system.pilot", nbd: str = "unix"
) -> Iterator[Pilot]:
    """An engine at site a with sites `a`, here, and `there`, the master target; policy `still`."""
    pilot = Pilot(lab, f"/srv/apart-{time.monotonic_ns()}.db", module, "a")
    try:
        pilot("add_site", "a", "libvirt", {"uri": "qemu:///system", "nbd": nbd})
        pilot("add_site", "there", "remote", target.settings)
        pilot("add_policy", "still")
        yield pilot
    finally:
        pilot.close()
