"""The main scenario on a real guest: protect, test failover, unplanned failover, re-protect and failback.

    python -m tests.system.demo [--kind bios-disk] [--report build/demo-report.json]

Every figure is measured in this run. Exits with status 0 only if every claim holds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.lab import Lab
from tests.lab._console import Audit
from tests.system.asr_cli import AsrCli

GUEST = "web1"
INTERVAL = 5.0
WATCHED_CYCLES = 10


class Claim(Exception):
    """A claim of the demo does not hold."""


def claim(holds: bool, what: str) -> None:
    """Raise Claim unless it holds."""
    if not holds:
        raise Claim(what)


class Demo:
    """Runs the scenario in order; `report` collects the figures."""

    def __init__(self, lab: Lab, kind: str) -> None:
        self.lab = lab
        self.kind = kind
        self.asr = AsrCli(lab, "b")
        self.report: dict[str, Any] = {"guest": kind, "interval_seconds": INTERVAL}
        self.audits: list[Audit] = []
        self.begun = time.monotonic()

    def say(self, text: str) -> None:
        """A line of the timeline."""
        print(f"[{time.monotonic() - self.begun:6.1f} s] {text}", flush=True)

    def wait(self, true: Callable[[], bool], what: str, timeout: float = 60, poll: float = 0.1) -> float:
        """Wait for something; returns the seconds it took. Raises Claim after `timeout`."""
        started = time.monotonic()
        while not true():
            claim(time.monotonic() - started < timeout, f"{what} within {timeout:g} s")
            time.sleep(poll)
        return time.monotonic() - started

    def run(self) -> None:
        """The whole scenario."""
        try:
            self.protect()
            self.replicate()
            self.test_failover()
            self.prove_equality()
            self.lose_the_site()
            self.first_site_returns()
            self.reprotect()
            self.go_home()
            self.protect_again()
        finally:
            self.asr.stop_service()

    # -- chapters --------------------------------------------------------------------------------------------------

    def protect(self) -> None:
        """A running guest gets its replica."""
        lab, asr = self.lab, self.asr
        self.say(f"site a: guest {GUEST} ({self.kind}) boots and starts writing its ledger")
        lab.define_guest("a", self.kind, GUEST, autostart=True)
        lab.start("a", GUEST)
        lab.wait_row("a", GUEST, 30)
        self.say("site b: vault, sites, policy (a cycle every 5 s)")
        asr.init()
        asr("policy", "create", "gold", "--interval", "5s", "--keep", "24h", "--point-every", "20s",
            "--resync-window", "always")  # fmt: skip
        machine = next(item for item in asr("site", "machines", "a") if item["name"] == GUEST)
        self.report["disk_bytes"] = sum(disk["size"] for disk in machine["disks"])
        started = time.monotonic()
        facts = asr.result("protect", GUEST, "--from", "a", "--to", "b", "--policy", "gold")
        self.report["initial_copy_bytes"] = facts["bytes_sent"]
        self.report["initial_copy_seconds"] = round(time.monotonic() - started, 2)
        self.say(
            f"protected: initial copy sent {facts['bytes_sent'] / 2**20:.0f} MiB of "
            f"{self.report['disk_bytes'] / 2**20:.0f} MiB in {self.report['initial_copy_seconds']} s"
        )

    def replicate(self) -> None:
        """Deltas at the policy's interval, with the actual RPO sampled continuously."""
        self.asr.start_service()
        with self.asr.library() as library:
            self.wait(lambda: library.status()[0].protection.state.value == "protected", "protected")
            machine = library.status()[0].protection.id
            before = len(library.vault.cycles(machine))
            samples: list[float] = []

            def sampled() -> bool:
                age = library.status()[0].rpo_seconds
                claim(age is not None, "a protected machine has a recovery point")
                samples.append(float(age or 0))
                return len(library.vault.cycles(machine)) >= before + WATCHED_CYCLES

            self.wait(sampled, f"{WATCHED_CYCLES} cycles", timeout=WATCHED_CYCLES * INTERVAL * 3, poll=0.25)
            deltas = library.vault.cycles(machine)[before:]
        self.report["delta_cycles"] = len(deltas)
        self.report["delta_bytes_median"] = int(statistics.median(item.bytes_sent for item in deltas))
        self.report["delta_seconds_median"] = round(
            statistics.median(item.sealed_at - item.started_at for item in deltas), 3
        )
        self.report["rpo_seconds_p95"] = round(statistics.quantiles(samples, n=20)[-1], 2)
        self.say(
            f"{len(deltas)} deltas, {self.report['delta_bytes_median'] // 1024} KiB and "
            f"{self.report['delta_seconds_median']} s each (median); RPO p95 {self.report['rpo_seconds_p95']} s"
        )

    def test_failover(self) -> None:
        """A recovery point boots in isolation while replication continues."""
        lab, asr = self.lab, self.asr
        cycles = self._cycles()
        consoles = set(self._consoles("b"))
        started = time.monotonic()
        facts = asr.result("failover", "test", GUEST)
        name = facts["machine"]
        fresh: list[Path] = []

        def booted() -> bool:
            fresh[:] = [path for path in self._consoles("b") if path not in consoles]
            return any(b"LAB-READY" in path.read_bytes() for path in fresh)

        self.wait(booted, "the test machine boots")
        self.report["test_failover_boot_seconds"] = round(time.monotonic() - started, 2)
        self._audited(self._console_of(fresh[0]), "test failover")
        networks = lab.run_in("b", ["virsh", "domiflist", name]).stdout
        claim("asr-test" in networks and " lab " not in networks, f"the test is isolated:\n{networks}")
        self.wait(lambda: self._cycles() >= cycles + 2, "replication continues during the test")
        asr("failover", "cleanup", GUEST)
        left = lab.run_in("b", ["virsh", "list", "--all", "--name"]).stdout.split()
        claim(name not in left, "clean-up deletes the test machine")
        self.say(
            f"test failover booted in {self.report['test_failover_boot_seconds']} s on an isolated network, "
            "ledger intact, replication continued; cleaned up"
        )

    def prove_equality(self) -> None:
        """SHA-256 of frozen source and replica, disk by disk."""
        facts = self.asr.result("verify", GUEST, "--sha256")
        equal = all(disk["source_sha256"] == disk["replica_sha256"] for disk in facts["disks"].values())
        self.report["replica_equals_source"] = bool(equal and facts["equal"])
        self.report["sha256"] = {name: disk["replica_sha256"] for name, disk in facts["disks"].items()}
        claim(equal, "the replica equals the frozen source")
        self.say(f"verified: {len(facts['disks'])} disks equal the frozen source by SHA-256")

    def lose_the_site(self) -> None:
        """The source fails under load."""
        lab, asr = self.lab, self.asr
        lab.cut()
        lab.site_down("a")
        last = lab.console("a", GUEST).last_ack
        claim(last is not None, "the guest acknowledged rows")
        assert last is not None
        self.say(f"site a fails: QEMU killed, link cut; last acknowledged row: {last.row}")
        started = time.monotonic()
        facts = asr.result("failover", "unplanned", GUEST, "--yes")
        lab.wait_ready("b", GUEST)
        self.report["unplanned_rto_seconds"] = round(time.monotonic() - started, 2)
        audit = self._audited_at("b", "unplanned failover")
        self.report["unplanned_rows_lost"] = max(0, last.row - audit.last)
        self.report["unplanned_seconds_lost"] = round(max(0.0, last.time - audit.last_time), 2)
        self.say(
            f"failed over to point {facts['point']}: ready after {self.report['unplanned_rto_seconds']} s, ledger "
            f"intact to row {audit.last}; lost {self.report['unplanned_rows_lost']} rows "
            f"({self.report['unplanned_seconds_lost']} s)"
        )
        asr("failover", "commit", GUEST, "--yes")
        lab.wait_row("b", GUEST, audit.last + 20)
        self.say("committed; the guest keeps writing at site b")

    def first_site_returns(self) -> None:
        """The failed host comes back and starts its guest, which must be quarantined."""
        lab, asr = self.lab, self.asr
        claim(asr.status(GUEST)["quarantine_owed"], "the quarantine is pending while the site is down")
        lab.site_up("a")
        lab.restore()
        self.say("site a is back, and its guest was started with the host")
        self.wait(lambda: not asr.status(GUEST)["quarantine_owed"], "the old guest is quarantined", timeout=120, poll=1)
        claim(lab.state("a", GUEST) == "shut off", "the old guest is off")
        self.say("the old guest at site a is quarantined: shut off, and no longer started with its host")

    def reprotect(self) -> None:
        """Reverse direction: the engine moves to the new recovery site, and only differences are sent."""
        asr = self.asr
        asr.stop_service()
        asr.move_to("a")
        started = time.monotonic()
        facts = asr.result("reprotect", GUEST)
        self.report["reprotect_bytes_sent"] = facts["bytes_sent"]
        self.report["reprotect_seconds"] = round(time.monotonic() - started, 2)
        claim(facts["bytes_sent"] < self.report["initial_copy_bytes"], "re-protect sends less than a full copy")
        self.say(
            f"re-protected b > a: {facts['bytes_sent'] / 2**20:.1f} MiB sent, "
            f"{facts['bytes_same'] / 2**20:.0f} MiB were already equal"
        )
        asr.start_service()
        cycles = self._cycles()
        self.wait(lambda: self._cycles() >= cycles + 2, "deltas in the reverse direction")

    def go_home(self) -> None:
        """Planned failover: no data may be lost."""
        lab, asr = self.lab, self.asr
        boots = len(lab.console("a", GUEST).ready)
        started = time.monotonic()
        asr.result("failover", "planned", GUEST, "--yes")
        lab.wait_ready("a", GUEST, boots=boots + 1)
        self.report["planned_rto_seconds"] = round(time.monotonic() - started, 2)
        console = lab.console("b", GUEST)
        claim(bool(console.down), "the guest at site b shut down cleanly")
        last = console.down[-1].last
        audit = self._audited_at("a", "planned failover")
        self.report["planned_rows_lost"] = last - audit.last
        claim(audit.last == last, f"a planned failover loses no data: row {audit.last} of {last}")
        self.say(
            f"planned failback to site a in {self.report['planned_rto_seconds']} s: all {audit.rows} rows are there"
        )
        asr("failover", "commit", GUEST, "--yes")

    def protect_again(self) -> None:
        """Re-protect in the first direction, as at the start."""
        asr = self.asr
        asr.stop_service()
        asr.move_to("b")
        facts = asr.result("reprotect", GUEST)
        self.report["second_reprotect_bytes_sent"] = facts["bytes_sent"]
        asr.start_service()
        cycles = self._cycles()
        self.wait(lambda: self._cycles() >= cycles + 2, "deltas in the first direction")
        status = asr.status(GUEST)
        claim(status["state"] == "protected" and status["direction"] == "forward", f"protected again: {status}")
        self.say(
            f"re-protected a > b with {facts['bytes_sent'] / 2**20:.1f} MiB; epoch {status['epoch']}; initial state"
        )

    # -- observing -------------------------------------------------------------------------------------------------

    def _cycles(self) -> int:
        with self.asr.library() as library:
            return len(library.vault.cycles(library.status()[0].protection.id))

    def _consoles(self, site: str) -> list[Path]:
        return sorted(self.lab.host_path(site, "/srv/console").glob("*"))

    def _console_of(self, path: Path) -> Audit:
        from tests.lab._console import parse_console

        return parse_console(path.read_bytes().decode(errors="replace")).audits[-1]

    def _audited_at(self, site: str, when: str) -> Audit:
        return self._audited(self.lab.console(site, GUEST).audits[-1], when)

    def _audited(self, audit: Audit, when: str) -> Audit:
        self.audits.append(audit)
        self.report["ledger_intact"] = all(item.intact for item in self.audits)
        claim(audit.intact, f"the ledger is intact after the {when}: {audit}")
        claim(audit.rows > 0, f"the ledger has rows after the {when}")
        return audit


def conclude(report: dict[str, Any], path: Path, begun: float, failed: str) -> int:
    """Write a demo's report atomically and print it; returns the exit code. `failed`: the claim that does not hold."""
    report["seconds"] = round(time.monotonic() - begun, 1)
    report["holds"] = not failed
    text = json.dumps(report, indent=2)
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    os.replace(part, path)  # noqa: PTH105 - atomic
    print(f"\n{text}\n{'every claim holds' if not failed else 'FAILED: ' + failed}")
    return 1 if failed else 0


def main() -> int:
    """Run the demo; returns the exit code."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--kind", default="bios-disk", help="bios-direct, bios-disk or uefi")
    words.add_argument("--report", type=Path, default=Path("build/demo-report.json"))
    words.add_argument("--lab", default="demo", help="name of the lab")
    given = words.parse_args()
    given.report.parent.mkdir(parents=True, exist_ok=True)
    given.report.unlink(missing_ok=True)
    begun = time.monotonic()
    failed = ""
    with Lab(given.lab, print) as lab:
        demo = Demo(lab, given.kind)
        try:
            demo.run()
        except Claim as problem:
            failed = str(problem)
            print(
                f"\nDOES NOT HOLD: {failed}\n--- end of the service's log:\n{demo.asr.log()[-4000:]}", file=sys.stderr
            )
    return conclude(demo.report, given.report, begun, failed)


if __name__ == "__main__":
    threading.current_thread().name = "demo"
    sys.exit(main())
