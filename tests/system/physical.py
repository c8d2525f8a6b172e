"""A physical server and a process server at site a, a master target at site b: shared by the demo and the tests."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.certificates import Authority
from tests.lab import Lab, Server
from tests.lab._console import Audit
from tests.lab._kvm import kvm_boots
from tests.lab._run import LabError
from tests.lab._server import audit, boot_audit, ssh
from tests.lab._site import wait_until
from tests.system import disk_witness
from tests.system.asr_cli import ASR, AsrCli

__all__ = ["NAME", "Scene"]

NAME = "server1"
IDENTITY = "/srv/asr/dc"
CONNECT = f"""\
import json, sys
from asr_driver_physical.driver import PhysicalDriver
site = PhysicalDriver().connect("dc", {{"listen": "10.78.0.1", "identity": {IDENTITY!r}, "spool": "/srv/asr/spool"}})
"""
WITNESS = Path(__file__).parents[1] / "lab/server/witness.py"
DROP_IN = "[Service]\nExecStart=\nExecStart=/usr/bin/python3 /run/witness/witness.py run\n"


class Scene:
    """Made step by step; on exit it stops the parts that the lab does not manage."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.server = Server(lab, "a", NAME)
        self.asr = AsrCli(lab, "a")
        self._target: subprocess.Popen[bytes] | None = None
        self._disk_witness: subprocess.Popen[bytes] | None = None
        self._listener: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):
            self.asr.stop_service()
        self._stop_listening()
        self.stop_target()
        self.server.cut_power()
        self._stop_disk_witness()

    # -- the process server and the master target

    def start_target(self) -> None:
        """The master target at site b; its identity is created at the first start."""
        where = self.lab.host_path("b", "/srv/asr")
        where.mkdir(exist_ok=True)
        if not (where / "identity").exists():
            authority = Authority()
            authority.issue(where / "identity", "master-target", "b", addresses=(self.lab.sites["b"].address,))
            here = self.lab.host_path("a", "/srv/asr")
            here.mkdir(exist_ok=True)
            authority.issue(here / "identity", "process-server", "a", addresses=(self.lab.sites["a"].address,))
        log = (where / "master-target.log").open("ab")
        command = [str(ASR), "master-target", "--driver", "libvirt", "--identity", "/srv/asr/identity"]
        command += ["--listen", f"{self.lab.sites['b'].address}:9444"]
        command += ["--set", "uri=qemu:///system", "--set", "replica_dir=/srv/xfs"]
        command += ["--set", f"domain_type={'kvm' if kvm_boots(self.lab.images) else 'qemu'}"]
        self._target = self.lab.popen_in("b", command, stdout=log.fileno(), stderr=log.fileno())
        log.close()
        wait_until(lambda: b"serves libvirt" in (where / "master-target.log").read_bytes(), "the master target", 60)

    def stop_target(self) -> None:
        """Stop it."""
        if self._target is not None:
            self._target.send_signal(signal.SIGTERM)
            try:
                self._target.wait(30)
            except subprocess.TimeoutExpired:
                self._target.kill()
                self._target.wait(10)
            self._target = None

    def use_a_disk_of_its_own(self) -> None:
        """Put the process server's files, vault and spool, on a disk whose power can be cut. Must be called first."""
        self.lab.host_path("a", "/srv/xfs/asr").mkdir()
        self.lab.host_path("a", "/srv/asr").symlink_to("xfs/asr")

    def process_server_loses_power(self) -> None:
        """The machine on which it runs loses power, and comes back.

        No peer is notified: both cables are unplugged first. Its disk stops as described at `Site.disk_loses_power`:
        what was not durable is lost. All its processes are killed. Not covered: a disk that loses writes it has
        acknowledged as flushed.
        """
        site = self.lab.sites["a"]
        self.lab.cut()
        self.server.plug(out=True)
        self._stop_disk_witness()
        site.disk_loses_power("xfs")
        killed = {pid for pid in site.processes() if pid != site.anchor() and _is_python(pid)}
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: killed.isdisjoint(site.processes()), "its processes have ended", 30)
        site.disk_gets_power("xfs")
        self._stop_listening()
        self.server.plug(out=False)
        self.lab.restore()
        self._start_disk_witness()
        self.listen()

    def set_up(self, *, interval: str = "5s", freeze_limit: str = "60s", silence: str = "30s") -> None:
        """A vault at site a, both sites, a policy. `silence`: time after which a cut link to site b is detected."""
        asr = self.asr
        asr.run("init").check_returncode()
        asr("site", "add", "dc", "--driver", "physical", "--set", "listen=10.78.0.1", "--set", f"identity={IDENTITY}",
            "--set", "spool=/srv/asr/spool")  # fmt: skip
        asr("site", "add", "b", "--driver", "remote", "--set", f"address={self.lab.sites['b'].address}:9444",
            "--set", "identity=/srv/asr/identity", "--set", "peer=b", "--set", f"silence={silence}")  # fmt: skip
        asr("policy", "create", "gold", "--interval", interval, "--point-every", interval, "--keep", "24h",
            "--freeze-limit", freeze_limit, "--resync-window", "always", "--resync-threshold", "1")  # fmt: skip

    def listen(self) -> None:
        """Let a separate process listen for the server, as the service would: otherwise each verb listens on its own,
        and waits until the server dials again."""
        script = f"{CONNECT}print('ready', flush=True)\nsys.stdin.read()\n"
        self._listener = self.lab.popen_in("a", [sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=None)
        assert self._listener.stdout is not None
        assert self._listener.stdout.readline() == b"ready\n"

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.kill()
            self._listener.communicate(timeout=10)
            self._listener = None

    def enrol(
        self, verb: str, *words: str, timeout: float = 300, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`asr physical VERB` for the server, at site a."""
        image = self.server.image
        command = [str(ASR), "physical", verb, self.server.address]
        command += ["--key", str(image.key), "--known-hosts", str(image.known_hosts), *words]
        done = self.lab.run_in("a", command, timeout=timeout, check=False)
        if check and done.returncode:
            raise LabError(f"{verb}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def push(self, *words: str) -> str:
        """Install the mobility service; returns the output."""
        more = ["--identity", IDENTITY, "--name", NAME, "--server", "10.78.0.1", "--cpu", "100"]
        return self.enrol("push", *more, *words).stdout

    def protect(self) -> dict[str, Any]:
        """The initial copy; returns the job's facts."""
        words = ["protect", NAME, "--from", "dc", "--to", "b", "--policy", "gold", "--network", "ens3=lab"]
        return self.asr.result(*words, "--test-network", "lab", timeout=540)

    def begin(self, *words: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Run a verb in the background."""
        command = [str(ASR), "--vault", self.asr.vault, *words]
        environment = None if env is None else {**os.environ, **env}
        return self.lab.popen_in("a", command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)

    # -- the witness

    def place_witness(self) -> None:
        """Run the service with the witness from now on, until the server is restarted."""
        self._start_disk_witness()
        self.server.ssh("mkdir -p /run/witness && cat > /run/witness/witness.py", text=WITNESS.read_text())
        drop_in = "/run/systemd/system/asr-mobility.service.d"
        self.server.ssh(f"mkdir -p {drop_in} && cat > {drop_in}/witness.conf", text=DROP_IN)
        self.server.ssh("systemctl daemon-reload && systemctl restart asr-mobility", timeout=120)

    def _start_disk_witness(self) -> None:
        if self._disk_witness is None:
            command: list[str] = [
                sys.executable,
                "-m",
                "tests.system.disk_witness",
                "10.78.0.1",
                str(disk_witness.PORT),
            ]
            command += [f"{name}={path}" for name, path in self.server.images_inside.items()]
            self._disk_witness = self.lab.popen_in("a", command, stderr=None)
            assert self._disk_witness.stdout is not None
            assert self._disk_witness.stdout.readline() == b"ready\n"

    def _stop_disk_witness(self) -> None:
        if self._disk_witness is not None:
            self._disk_witness.kill()
            self._disk_witness.communicate(timeout=10)
            self._disk_witness = None

    def remove_witness(self) -> None:
        """Run the service without the witness again."""
        self.server.ssh("rm -rf /run/systemd/system/asr-mobility.service.d && systemctl daemon-reload")
        self.server.ssh("systemctl restart asr-mobility", timeout=120)

    def witnessed(self, *words: str, timeout: float = 540) -> dict[str, Any]:
        """Run a verb that makes a point, and prove that the point's disks equal the frozen ones."""
        return self._proved(lambda: self.asr.result(*words, timeout=timeout))

    def protected_with_witness(self) -> dict[str, Any]:
        """The initial copy, verified in the same way."""
        return self._proved(self.protect)

    def _proved(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self.server.ssh("rm -f /run/witness/seen; touch /run/witness/on")
        try:
            facts = work()
        finally:
            self.server.ssh("rm -f /run/witness/on")
        seen = json.loads(self.server.ssh("cat /run/witness/seen").stdout)
        assert seen["late"] == 0, f"the server wrote while it was frozen: {seen}"
        found = {disk: disk_witness.digest_of_file(path) for disk, path in self.heads().items()}
        assert found == seen["disks"], f"the replica differs from the frozen disks: {found} {seen}"
        return facts

    def heads(self) -> dict[str, Path]:
        """Images of the replica's newest point, by disk."""
        return self.points()[-1][1]

    def points(self) -> list[tuple[str, dict[str, Path]]]:
        """All points, oldest first, with their images by disk."""
        root = self.lab.host_path("b", "/srv/xfs/replicas")
        (record,) = root.glob("*/replica.json")
        points = json.loads(record.read_bytes())["points"]
        return [
            (point["stored"]["id"], {disk: record.parent / image for disk, image in point["images"].items()})
            for point in points
        ]

    def wait_connected(self, timeout: float = 120) -> None:
        """Wait until the server's agent has dialled in."""
        wait_until(lambda: "0 of" not in self.asr("site", "show", "dc")["status"]["version"], "the agent", timeout, 1)

    def agent(self) -> dict[str, Any]:
        """The status that the service on the server reports; requested by its own process."""
        script = (
            f"{CONNECT}print(json.dumps(dict(site.servers.gateway.call({NAME!r},'status',{{}})[0])))\nsite.close()\n"
        )
        said = self.lab.run_in("a", [sys.executable, "-c", script], timeout=120).stdout
        result: dict[str, Any] = json.loads(said)
        return result

    # -- the other end

    def there(
        self, command: str, *, check: bool = True, timeout: float = 60, site: str = "b"
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the machine that answers at the server's address at site b, or another."""
        return ssh(self.lab, site, self.server.image, command, check=check, timeout=timeout)

    def audit_there(self) -> Audit:
        """Audit the running ledger of the machine at site b."""
        return audit(self.there)

    def wait_there(self, timeout: float = 300, *, site: str = "b") -> Audit:
        """Wait until the failed-over machine answers at a site; returns the audit of its ledger at its boot."""
        end = time.monotonic() + timeout
        there = functools.partial(self.there, site=site)
        while True:
            with contextlib.suppress(LabError):
                if there("test -s /run/lab-audit", check=False, timeout=30).returncode == 0:
                    return boot_audit(there)
            if time.monotonic() > end:
                raise LabError(f"the machine does not answer at site {site} after {timeout:g} s")
            time.sleep(1)


def _is_python(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/exe").readlink().name.startswith("python")
    return False
