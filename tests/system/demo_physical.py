"""A physical server: protected by push, replicated to another site, lost, and failed over to a virtual machine there.

    python -m tests.system.demo_physical [--report build/demo-physical-report.json]

Every figure is measured in this run. Exits with status 0 only if every claim holds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.lab import Audit, Lab
from tests.lab._run import LabError
from tests.lab._server import give_address
from tests.system.asr_cli import AsrFailed
from tests.system.demo import Claim, claim, conclude
from tests.system.physical import NAME, Scene

INTERVAL = 5.0
WATCHED_CYCLES = 8
PAGE = 4096

# Small synchronous writes, like those of a database's log: writes per second.
WORK = """\
import os, time
fd = os.open("/srv/data/work", os.O_RDWR | os.O_CREAT, 0o600)
page, end, done = os.urandom(4096), time.monotonic() + 6, 0
while time.monotonic() < end:
    os.pwrite(fd, page, done % 256 * 4096)
    os.fdatasync(fd)
    done += 1
print(done / 6)
"""
# The mobility service, with the granules of a larger disk.
COARSE = """\
import sys
sys.path.insert(0, "/opt/asr-mobility/asr-mobility.pyz")
from asr_mobility import tracker
from asr_mobility.__main__ import main
tracker.granule_shift = lambda size: 14
sys.exit(main())
"""
HOT = "while :; do dd if=/dev/urandom of=/srv/plain/hot bs=64k count=64 conv=notrunc,fdatasync; sleep 1; done"


class Demo:
    """Runs the scenario in order; `report` collects the figures."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.lab, self.asr, self.server = scene, scene.lab, scene.asr, scene.server
        self.report: dict[str, Any] = {"interval_seconds": INTERVAL}
        self.audits: list[Audit] = []
        self.equal = 0
        self.begun = time.monotonic()

    def say(self, text: str) -> None:
        """A line of the timeline."""
        print(f"[{time.monotonic() - self.begun:6.1f} s] {text}", flush=True)

    def run(self) -> None:
        """The whole scenario."""
        self.set_up()
        self.protect()
        self.replicate()
        self.costs()
        self.coarser()
        self.refuse()
        self.test_failover()
        self.lose_the_server()
        self.go_home()

    # -- chapters --------------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Two sites and a server."""
        self.say("site b: a master target; site a: a process server, its vault, policy (a cycle every 5 s)")
        self.scene.start_target()
        self.scene.set_up()
        self.say("site a: the server boots: GRUB on its own disk, a plain root, a volume on LVM; reached by SSH only")
        self.report["server_boot_seconds"] = round(self.server.start(timeout=400), 1)
        self.server.wait_row(30)
        self._alone = self._work()
        self.say(f"its ledger runs; without replication it writes {self._alone:.0f} small blocks a second")

    def protect(self) -> None:
        """Push, then the initial copy under load."""
        started = time.monotonic()
        said = self.scene.push()
        self.report["push_seconds"] = round(time.monotonic() - started, 1)
        self.say(f"the mobility service was pushed in {self.report['push_seconds']} s; {said.splitlines()[0]}")
        self.scene.place_witness()
        self.server.ssh(f"nohup sh -c '{HOT}' > /dev/null 2>&1 & echo $! > /run/hot.pid")
        started = time.monotonic()
        facts = self.scene.protected_with_witness()
        self.equal += 1
        self.server.ssh("kill $(cat /run/hot.pid)")
        self.report["disk_bytes"] = sum(path.stat().st_size for path in self.scene.heads().values())
        self.report["initial_copy_bytes"] = facts["bytes_sent"]
        self.report["initial_copy_seconds"] = round(time.monotonic() - started, 1)
        self.say(
            f"protected under load: {facts['bytes_sent'] / 2**20:.0f} MiB sent in "
            f"{self.report['initial_copy_seconds']} s; the replica equals the frozen disks, byte for byte"
        )
        for _ in range(2):
            self.scene.witnessed("replicate", NAME)
            self.equal += 1
        self.report["replica_equals_source"] = True
        self.say("after two deltas the replica equals the frozen disks again")

    def replicate(self) -> None:
        """Deltas at the policy's interval."""
        self.scene.remove_witness()
        self.asr.start_service()
        with self.asr.library() as library:
            machine = library.status()[0].protection.id
            before = len(library.vault.cycles(machine))
            samples: list[float] = []
            self._wait(lambda: len(library.vault.cycles(machine)) >= before + 2, "the first cycles", timeout=120)
            agent, since = self.scene.agent(), time.monotonic()
            frozen = len(agent["freezes"])

            def sampled() -> bool:
                samples.append(float(library.status()[0].rpo_seconds or 0))
                return len(library.vault.cycles(machine)) >= before + 2 + WATCHED_CYCLES

            self._wait(sampled, f"{WATCHED_CYCLES} cycles", timeout=WATCHED_CYCLES * INTERVAL * 6)
            now, passed = self.scene.agent(), time.monotonic() - since
            deltas = library.vault.cycles(machine)[before + 2 :]
        self.report["rpo_seconds_p95"] = round(statistics.quantiles(samples, n=20)[-1], 2)
        self.report["agent_cpu_percent"] = round(100 * (now["cpu_seconds"] - agent["cpu_seconds"]) / passed, 1)
        self.report["agent_memory_bytes"] = now["memory_bytes"]
        freezes = now["freezes"][frozen:]
        self.report["freeze_seconds"] = [round(item, 3) for item in freezes]
        self.report["freeze_seconds_max"] = round(max(freezes), 3)
        self.say(
            f"{len(deltas)} deltas; RPO p95 {self.report['rpo_seconds_p95']} s; the agent uses "
            f"{self.report['agent_cpu_percent']} % of the emulated processor and "
            f"{now['memory_bytes'] / 2**20:.0f} MiB; the longest freeze was {self.report['freeze_seconds_max']} s"
        )

    def costs(self) -> None:
        """The slowdown of the workload, and how much more is sent than changed."""
        beside = self._work()
        slower = round(100 * (1 - beside / self._alone), 1)
        self.report["workload_per_second"] = {"alone": round(self._alone, 1), "replicated": round(beside, 1)}
        self.report["workload_slowdown_percent"] = slower
        sent, changed, count = self._sent_and_changed()
        self.report["delta_bytes_changed"], self.report["delta_bytes_sent"] = changed, sent
        self.report["delta_sent_per_changed"] = round(sent / changed, 2)
        self.say(
            f"small synchronous writes during replication: {beside:.0f} a second ({slower} % fewer); "
            f"{count} deltas sent {self.report['delta_sent_per_changed']} x the bytes that differ in 4 KiB pages"
        )

    def coarser(self) -> None:
        """The same with granules of 16 KiB, which disks of more than 64 GiB have."""
        drop_in = "/run/systemd/system/asr-mobility.service.d"
        self.server.ssh(f"mkdir -p /run/coarse {drop_in} && cat > /run/coarse/agent.py", text=COARSE)
        line = "[Service]\nExecStart=\nExecStart=/usr/bin/python3 /run/coarse/agent.py run\n"
        self.server.ssh(f"cat > {drop_in}/coarse.conf && systemctl daemon-reload", text=line)
        self.server.ssh("systemctl restart asr-mobility", timeout=120)
        self.asr.result("resync", NAME, "--now", timeout=540)
        with self.asr.library() as library:
            machine = library.status()[0].protection.id
            before = len(library.vault.cycles(machine))
            cycles = WATCHED_CYCLES + 2
            self._wait(lambda: len(library.vault.cycles(machine)) >= before + cycles, "cycles", cycles * INTERVAL * 6)
        sent, changed, count = self._sent_and_changed()
        self.report["delta_sent_per_changed_16k"] = round(sent / changed, 2)
        self.say(
            f"with granules of 16 KiB {count} deltas sent {self.report['delta_sent_per_changed_16k']} x those bytes"
        )

    def refuse(self) -> None:
        """An operation that a physical server does not support is refused with the reason and the alternative."""
        done = self.asr.run("failover", "planned", NAME, "--yes", "--json")
        error = json.loads(done.stdout)["error"]
        claim(
            done.returncode == 5 and error["code"] == "no-planned-failover", f"a planned failover is refused: {error}"
        )
        self.say(f"a planned failover is refused: {error['action']}")

    def test_failover(self) -> None:
        """A recovery point boots in isolation while replication continues."""
        give_address(self.lab, "b")
        started = time.monotonic()
        self.asr.result("failover", "test", NAME)
        audit = self._audited(self.scene.wait_there(), "test failover")
        self.report["test_failover_boot_seconds"] = round(time.monotonic() - started, 1)
        silent = self.scene.there("systemctl show -p ActiveState,ExecMainStatus asr-mobility").stdout
        claim("ExecMainStatus=78" in silent, f"the copy's agent detects that it runs on a copy: {silent}")
        self.asr("failover", "cleanup", NAME)
        self.say(
            f"test failover: it booted in {self.report['test_failover_boot_seconds']} s, network up, ledger intact to "
            f"row {audit.last}; its agent detected that it runs on a copy and did not connect; cleaned up"
        )

    def lose_the_server(self) -> None:
        """The server loses power; the copy takes over."""
        with self.asr.library() as library:
            machine = library.status()[0].protection.id
            cycles = len(library.vault.cycles(machine))
            self._wait(lambda: len(library.vault.cycles(machine)) >= cycles + 2, "replication continues", timeout=120)
        self.server.cut_power()
        last = self.server.console().last_ack
        claim(last is not None, "the server acknowledged rows")
        assert last is not None
        self.say(f"the server loses power; last acknowledged row: {last.row}")
        started = time.monotonic()
        self.asr.result("failover", "unplanned", NAME, "--yes")
        audit = self._audited(self.scene.wait_there(), "unplanned failover")
        self.report["unplanned_rto_seconds"] = round(time.monotonic() - started, 1)
        self.report["unplanned_rows_lost"] = max(0, last.row - audit.last)
        self.report["unplanned_seconds_lost"] = round(max(0.0, last.time - audit.last_time), 2)
        self.say(
            f"failed over: it answers under its own address after {self.report['unplanned_rto_seconds']} s, ledger "
            f"intact to row {audit.last}; lost {self.report['unplanned_rows_lost']} rows "
            f"({self.report['unplanned_seconds_lost']} s)"
        )
        self.asr("failover", "commit", NAME, "--yes")
        rows = self.scene.audit_there()
        self._audited(rows, "commit")
        claim(rows.last > audit.last, "the server keeps writing at site b")
        self.say(f"committed; the server keeps writing at site b (row {rows.last})")
        done = self.asr.run("reprotect", NAME, "--json")
        error = json.loads(done.stdout)["error"]
        claim(
            done.returncode == 5 and error["code"] == "no-failback",
            f"failback to the physical server is refused: {error}",
        )
        self.say(f"failback to the physical server is refused: {error['action']}")

    def go_home(self) -> None:
        """The alternative: failback as a virtual machine to a libvirt site at the first location."""
        self.asr("unprotect", NAME, "--yes")
        home = ["--set", "uri=qemu:///system", "--set", "replica_dir=/srv/xfs"]
        self.asr("site", "add", "home", "--driver", "libvirt", *home)
        self.asr("site", "add", "away", "--driver", "libvirt", "--set", f"uri={self.lab.sites['b'].remote_uri}")
        started = time.monotonic()
        words = ["protect", NAME, "--from", "away", "--to", "home", "--policy", "gold", "--network", "lab=lab"]
        facts = self.asr.result(*words, timeout=540)
        self.say(
            f"unprotected, and protected from site b to libvirt at site a: {facts['bytes_sent'] / 2**20:.0f} MiB in "
            f"{time.monotonic() - started:.1f} s"
        )
        seen = [self.scene.audit_there()]
        stop = threading.Event()

        def look() -> None:
            while not stop.is_set():
                with contextlib.suppress(Exception):  # it is shut down meanwhile
                    seen.append(self.scene.audit_there())

        looking = threading.Thread(target=look)
        looking.start()
        # Its minimal Debian ignores the power button, so it is shut down from inside, as an operator would do it.
        button = threading.Timer(10, lambda: self.scene.there("systemctl --no-block poweroff", check=False))
        button.start()
        started = time.monotonic()
        try:
            self.asr.result("failover", "planned", NAME, "--yes", timeout=540)
        finally:
            button.join(90)
            stop.set()
            looking.join(90)
        audit = self._audited(self.scene.wait_there(site="a"), "failback")
        self.report["failback_rto_seconds"] = round(time.monotonic() - started, 1)
        last = max(item.last for item in seen)
        claim(last > seen[0].last, "its ledger grew until it was shut down")
        self.report["failback_rows_lost"] = max(0, last - audit.last)
        self.say(
            f"planned failover to site a: it answers there after {self.report['failback_rto_seconds']} s; row {last} "
            f"was the last one seen at site b, ledger intact to row {audit.last}: "
            f"{self.report['failback_rows_lost']} rows lost"
        )
        claim(self.report["failback_rows_lost"] == 0, "a planned failover loses no data")
        self.asr("failover", "commit", NAME, "--yes")

    # -- observing -------------------------------------------------------------------------------------------------

    def _sent_and_changed(self) -> tuple[int, int, int]:
        """Bytes sent by the newest deltas, bytes that differ between their points, and the number of deltas."""
        with self.asr.library() as library:
            machine = library.status()[0].protection.id
            sent = {point.id: point.bytes_sent for point in library.vault.points(machine)}
        changed = self._changed_pages()
        return sum(sent[point] for point in changed), sum(changed.values()), len(changed)

    def _wait(self, true: Callable[[], bool], what: str, timeout: float) -> None:
        end = time.monotonic() + timeout
        while not true():
            claim(time.monotonic() < end, f"{what} within {timeout:g} s")
            time.sleep(0.25)

    def _work(self) -> float:
        rounds = [float(self.server.ssh("python3 -", text=WORK).stdout) for _ in range(3)]
        return statistics.median(rounds)

    def _changed_pages(self) -> dict[str, int]:
        """Bytes of the pages that differ between each kept point and the one before it, by point."""
        points = self.scene.points()[-WATCHED_CYCLES:]
        result = {}
        for (_, before), (point_id, after) in itertools.pairwise(points):
            result[point_id] = sum(_different(before[disk], path) for disk, path in after.items())
        return result

    def _audited(self, audit: Audit, when: str) -> Audit:
        self.audits.append(audit)
        self.report["ledger_intact"] = all(item.intact for item in self.audits)
        claim(audit.intact, f"the ledger is intact after the {when}: {audit}")
        claim(audit.rows > 0, f"the ledger has rows after the {when}")
        return audit


def _different(before: Path, after: Path) -> int:
    """Bytes in pages that differ."""
    found = 0
    with before.open("rb") as old, after.open("rb") as new:
        while piece := new.read(1 << 20):
            other = old.read(len(piece))
            if piece != other:
                pages = range(0, len(piece), PAGE)
                found += sum(PAGE for at in pages if piece[at : at + PAGE] != other[at : at + PAGE])
    return found


def main() -> int:
    """Run the demo; returns the exit code."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--report", type=Path, default=Path("build/demo-physical-report.json"))
    words.add_argument("--lab", default="demo-physical", help="name of the lab")
    given = words.parse_args()
    given.report.parent.mkdir(parents=True, exist_ok=True)
    given.report.unlink(missing_ok=True)
    begun = time.monotonic()
    failed = ""
    with Lab(given.lab, print) as lab, Scene(lab) as scene:
        demo = Demo(scene)
        try:
            demo.run()
        except (AssertionError, AsrFailed, Claim, LabError) as problem:
            failed = str(problem)
            print(
                f"\nDOES NOT HOLD: {failed}\n--- end of the service's log:\n{demo.asr.log()[-4000:]}", file=sys.stderr
            )
    return conclude(demo.report, given.report, begun, failed)


if __name__ == "__main__":
    sys.exit(main())
