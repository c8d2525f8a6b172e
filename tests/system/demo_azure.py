"""A real guest is replicated to an emulated Azure, fails over to it, and fails back.

    python -m tests.system.demo_azure [--report build/demo-azure-report.json]

The guest and the engine run at one site of the lab. Azure is emulated by the driver's tests: Azurite behind a strict
proxy for storage, a management server, and QEMU for the machines. Every figure is measured in this run. Exits with
status 0 only if every claim holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.lab import Lab
from tests.lab._console import Audit, Console, parse_console
from tests.system.asr_cli import AsrCli
from tests.system.demo import Claim, claim, conclude

GUEST = "web1"
SITE = "b"
PROJECT = Path(__file__).parents[2]
REACTION_SECONDS = 240.0


class Peers:
    """Azurite, proxy and cloud, in a process inside a site; they listen on its loopback interface."""

    def __init__(self, lab: Lab, directory: Path, site: str = SITE) -> None:
        self._log = (directory / "peers.log").open("wb")
        self._directory = directory
        command = [sys.executable, "-m", "drivers.azure.tests.peers.serve", str(directory)]
        self._process = lab.popen_in(
            site,
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.fileno(),
            env=dict(os.environ) | {"PYTHONPATH": str(PROJECT)},
        )
        self.settings: dict[str, str] = self._line()

    def _line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the emulated Azure exited:\n{(self._directory / 'peers.log').read_text()[-3000:]}")
        return json.loads(line)

    def state(self) -> dict[str, Any]:
        """The state of the cloud, read without the driver."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        state: dict[str, Any] = self._line()
        return state

    def consoles(self) -> set[Path]:
        """The consoles of all machines that ran."""
        return set((self._directory / "machines").glob("*.console"))

    def close(self) -> None:
        """Stop them."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._process.wait()
            self._log.close()


class Demo:
    """Runs the scenario in order; `report` collects the figures."""

    def __init__(self, lab: Lab, kind: str, directory: Path) -> None:
        self.lab = lab
        self.kind = kind
        self.asr = AsrCli(lab, SITE)
        self.directory = directory
        self.report: dict[str, Any] = {"guest": kind}
        self.audits: list[Audit] = []
        self.begun = time.monotonic()

    def say(self, text: str) -> None:
        """A line of the timeline."""
        print(f"[{time.monotonic() - self.begun:6.1f} s] {text}", flush=True)

    def wait(self, true: Callable[[], bool], what: str, timeout: float = REACTION_SECONDS) -> None:
        """Wait for something. Raises Claim after `timeout` seconds."""
        end = time.monotonic() + timeout
        while not true():
            claim(time.monotonic() < end, f"{what} within {timeout:g} s")
            time.sleep(0.2)

    def run(self) -> None:
        """The whole scenario."""
        self.peers = Peers(self.lab, self.directory)
        self.say("the storage account and the management server answer")
        try:
            self.protect()
            self.prove_equality()
            self.test_failover()
            self.unplanned()
            self.way_back()
            self.go_home()
        finally:
            self.peers.close()

    # -- chapters --------------------------------------------------------------------------------------------------

    def protect(self) -> None:
        """The initial copy of a running guest to page blobs."""
        lab, asr = self.lab, self.asr
        lab.define_guest(SITE, self.kind, GUEST)
        lab.start(SITE, GUEST)
        lab.wait_row(SITE, GUEST, 30)
        asr.run("init").check_returncode()
        asr("site", "add", "home", "--driver", "libvirt", "--set=uri=qemu:///system", "--set=replica_dir=/srv/xfs")
        settings = [f"--set={key}={value}" for key, value in self.peers.settings.items()]
        asr("site", "add", "cloud", "--driver", "azure", *settings)
        asr("policy", "create", "gold", "--interval", "1min", "--keep", "24h", "--resync-window", "always")
        machine = next(item for item in asr("site", "machines", "home") if item["name"] == GUEST)
        self.report["disk_bytes"] = sum(disk["size"] for disk in machine["disks"])
        facts = asr.result("protect", GUEST, "--from", "home", "--to", "cloud", "--policy", "gold")
        self.report["initial_copy_bytes"] = facts["bytes_sent"]
        self.say(
            f"protected: {facts['bytes_sent'] / 2**20:.0f} MiB of {self.report['disk_bytes'] / 2**20:.0f} MiB sent"
        )

    def prove_equality(self) -> None:
        """A delta, then SHA-256 of the frozen source and of the blobs."""
        delta = self.asr.result("replicate", GUEST)
        self.report["delta_bytes"] = delta["bytes_sent"]
        facts = self.asr.result("verify", GUEST, "--sha256")
        equal = all(disk["source_sha256"] == disk["replica_sha256"] for disk in facts["disks"].values())
        self.report["replica_equals_source"] = bool(equal and facts["equal"])
        claim(self.report["replica_equals_source"], "the replica equals the frozen source")
        self.say(f"a delta of {delta['bytes_sent'] // 1024} KiB; blobs equal the frozen source by SHA-256")

    def test_failover(self) -> None:
        """A recovery point boots from a managed disk made from the blobs, in an isolated network."""
        before, consoles = self.peers.state()["resources"], self.peers.consoles()
        started = time.monotonic()
        self.asr.result("failover", "test", GUEST)
        console = self.booted(consoles)
        self.report["test_failover_boot_seconds"] = round(time.monotonic() - started, 1)
        self.audited(parse_console(console.read_text(errors="replace")).audits[-1], "test failover")
        state = self.peers.state()
        ours = [name for name in state["cards"] if name.startswith("asr-test")]
        claim(bool(ours), "the test machine has a network interface")
        for card in ours:
            network = state["cards"][card].partition("/")[0]
            claim(network.startswith("asr-test"), f"the interface is in a test network, not in {network}")
        rules = [rule for name, found in state["rules"].items() if name.startswith("asr-test") for rule in found]
        claim(rules == ["Deny", "Deny"], f"all traffic is denied: {rules}")
        self.asr("failover", "cleanup", GUEST)
        claim(self.peers.state()["resources"] == before, "clean-up deletes every resource of the test")
        self.say(f"test failover booted in {self.report['test_failover_boot_seconds']} s, isolated; cleaned up")

    def unplanned(self) -> None:
        """The guest is lost under load and fails over to the cloud."""
        lab, asr = self.lab, self.asr
        rows = self.home().last_ack
        assert rows is not None
        self.asr.result("replicate", GUEST)
        lab.wait_row(SITE, GUEST, rows.row + 20)
        consoles = self.peers.consoles()
        started = time.monotonic()
        asr.result("failover", "unplanned", GUEST, "--yes")
        self.console = self.booted(consoles)
        self.report["unplanned_rto_seconds"] = round(time.monotonic() - started, 1)
        last = self.home().last_ack
        assert last is not None
        audit = self.audited(self.cloud().audits[-1], "unplanned failover")
        self.report["unplanned_rows_lost"] = max(0, last.row - audit.last)
        asr("failover", "commit", GUEST, "--yes")
        self.wait(lambda: bool(self.cloud().acks) and self.cloud().acks[-1].row > audit.last + 20, "rows in the cloud")
        self.say(
            f"failed over; {self.report['unplanned_rows_lost']} rows lost; committed; the guest writes in the cloud"
        )

    def way_back(self) -> None:
        """Replication back to the first site: the differences, then deltas from snapshot diffs."""
        asr = self.asr
        before = self.peers.state()["read_bytes"]
        facts = asr.result("reprotect", GUEST)
        self.report["reprotect_bytes_sent"] = facts["bytes_sent"]
        self.grows(self.cloud().acks[-1].row + 20)
        delta = asr.result("replicate", GUEST)
        self.report["reverse_delta_bytes"] = delta["bytes_sent"]
        self.report["failback_bytes"] = self.peers.state()["read_bytes"] - before
        self.say(
            f"re-protected: {facts['bytes_sent'] // 1024} KiB written at the first site; then a delta of "
            f"{delta['bytes_sent'] // 1024} KiB from the diff of two snapshots"
        )

    def go_home(self) -> None:
        """Planned failover: no data may be lost."""
        lab, asr = self.lab, self.asr
        before = self.peers.state()["read_bytes"]
        boots = len(self.home().ready)
        facts = asr.result("failover", "planned", GUEST, "--yes")
        lab.wait_ready(SITE, GUEST, boots=boots + 1)
        self.report["failback_bytes"] += self.peers.state()["read_bytes"] - before
        down = self.cloud().down
        claim(bool(down), "the guest in the cloud shut down cleanly")
        audit = self.audited(self.home().audits[-1], "failback")
        lost = self.report["failback_rows_lost"] = down[-1].last - audit.last
        claim(lost == 0, f"a planned failback loses no data: row {audit.last} of {down[-1].last}")
        read, size = self.report["failback_bytes"], self.report["disk_bytes"]
        self.report["last_delta_bytes"] = facts["last_delta_bytes"]
        sent = sum(self.report[key] for key in ("reprotect_bytes_sent", "reverse_delta_bytes", "last_delta_bytes"))
        claim(read < 1.25 * sent, f"only differences are read from the cloud: {read} bytes for {sent} bytes sent back")
        claim(read < size / 4, f"that is less than a quarter of the disks: {read} bytes of {size}")
        asr("failover", "commit", GUEST, "--yes")
        self.say(f"failed back: all {audit.rows} rows are there; {read / 2**20:.1f} MiB were read from the cloud")

    # -- observing -------------------------------------------------------------------------------------------------

    def home(self) -> Console:
        """The guest's console at the first site."""
        return self.lab.console(SITE, GUEST)

    def cloud(self) -> Console:
        """Its console in the cloud."""
        return parse_console(self.console.read_text(errors="replace"))

    def grows(self, row: int) -> None:
        """Wait until the ledger in the cloud has reached this row."""
        self.wait(lambda: any(ack.row > row for ack in self.cloud().acks), f"row {row} in the cloud")

    def booted(self, before: set[Path]) -> Path:
        """The console of a machine that has booted since."""
        found: list[Path] = []

        def ready() -> bool:
            found[:] = [path for path in self.peers.consoles() - before if b"LAB-READY" in path.read_bytes()]
            return bool(found)

        self.wait(ready, "a machine boots in the cloud")
        return found[0]

    def audited(self, audit: Audit, when: str) -> Audit:
        """Claim that the ledger is intact."""
        self.audits.append(audit)
        self.report["ledger_intact"] = all(item.intact for item in self.audits)
        claim(audit.intact and audit.rows > 0, f"the ledger is intact after the {when}: {audit}")
        return audit


def main() -> int:
    """Run the demo; returns the exit code."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--kind", default="bios-disk", help="bios-disk or uefi")
    words.add_argument("--report", type=Path, default=Path("build/demo-azure-report.json"))
    words.add_argument("--lab", default="demo-azure", help="name of the lab")
    given = words.parse_args()
    given.report.parent.mkdir(parents=True, exist_ok=True)
    given.report.unlink(missing_ok=True)
    begun = time.monotonic()
    failed = ""
    with tempfile.TemporaryDirectory(prefix="demo-azure-") as directory, Lab(given.lab, print) as lab:
        demo = Demo(lab, given.kind, Path(directory))
        try:
            demo.run()
        except Claim as problem:
            failed = str(problem)
            print(f"\nDOES NOT HOLD: {failed}", file=sys.stderr)
    return conclude(demo.report, given.report, begun, failed)


if __name__ == "__main__":
    threading.current_thread().name = "demo"
    sys.exit(main())
