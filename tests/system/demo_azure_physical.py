"""A physical server is replicated to an emulated Azure through a process server, and fails over to it.

    python -m tests.system.demo_azure_physical [--report build/demo-azure-physical-report.json]

Once it is protected, the server's boot menu and fstab are changed to name its root by a device name that exists on this
server only, and its serial console is removed: without repairs it would not boot in Azure. Azure is emulated by the
driver's tests, as in `demo_azure`. Every figure is measured in this run. Exits with status 0 only if every claim holds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.lab import Audit, Lab
from tests.lab._console import Console, parse_console
from tests.lab._site import wait_until
from tests.system.demo import Claim, claim, conclude
from tests.system.demo_azure import Peers
from tests.system.physical import IDENTITY, NAME, Scene

SITE = "a"
BOOT_SECONDS = 420.0
HOT = "while :; do dd if=/dev/urandom of=/srv/plain/hot bs=64k count=32 conv=notrunc,fdatasync; sleep 1; done"
NAMED = r"""
set -e
grub=/boot/grub/grub.cfg
sed -i 's,root=UUID=[^ ]*,root=/dev/nvme0n1p2,; s, console=ttyS0,,; s, quiet,,' $grub
sed -i 's,^UUID=[^ ]* / ,/dev/nvme0n1p2 / ,' /etc/fstab
grep -q 'root=/dev/nvme0n1p2 ro fsck' $grub
grep -q '^/dev/nvme0n1p2 / ' /etc/fstab
sync
"""

# The content of each point, read without the driver: SHA-256 of all pieces of its snapshots that contain a page, by
# blob and snapshot.
POINTS = """
import hashlib, json, sys
from azure.storage.blob import BlobServiceClient
PIECE = 4 << 20
given = json.loads(sys.argv[1])
service = BlobServiceClient(given["account_url"], credential=given["account_key"], api_version="2026-06-06")
container = service.get_container_client(given["container"])
found = {}
for item in container.list_blobs(include=["snapshots"]):
    if item.snapshot and item.name.endswith(".vhd"):
        blob, digest = container.get_blob_client(item.name, snapshot=item.snapshot), hashlib.sha256()
        pages = [range(part.start // PIECE, part.end // PIECE + 1) for part in blob.list_page_ranges()]
        for number in sorted({number for part in pages for number in part}):
            start, length = number * PIECE, min(PIECE, item.size - number * PIECE)
            digest.update(f"{number}:".encode() + blob.download_blob(offset=start, length=length).readall())
        found[f"{item.name} {item.snapshot}"] = digest.hexdigest()
print(json.dumps(found))
"""


class Demo:
    """Runs the scenario in order; `report` collects the figures."""

    def __init__(self, scene: Scene, directory: Path) -> None:
        self.scene, self.lab, self.asr, self.server = scene, scene.lab, scene.asr, scene.server
        self.directory = directory
        self.report: dict[str, Any] = {}
        self.begun = time.monotonic()

    def say(self, text: str) -> None:
        """A line of the timeline."""
        print(f"[{time.monotonic() - self.begun:6.1f} s] {text}", flush=True)

    def run(self) -> None:
        """The whole scenario."""
        self.peers = Peers(self.lab, self.directory, SITE)
        self.say("the storage account and the management server answer")
        try:
            self.set_up()
            self.protect()
            self.lose_the_server()
        finally:
            self.peers.close()

    # -- chapters --------------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """A process server next to the server, with the cloud as its target."""
        asr = self.asr
        asr.run("init").check_returncode()
        listening = ["--set=listen=10.78.0.1", f"--set=identity={IDENTITY}", "--set=spool=/srv/asr/spool"]
        asr("site", "add", "dc", "--driver", "physical", *listening)
        settings = [f"--set={key}={value}" for key, value in self.peers.settings.items()]
        asr("site", "add", "cloud", "--driver", "azure", *settings)
        words = ["--interval", "1min", "--keep", "24h", "--freeze-limit", "60s", "--resync-window", "always"]
        asr("policy", "create", "gold", *words)
        self.report["server_boot_seconds"] = round(self.server.start(timeout=BOOT_SECONDS), 1)
        self.server.wait_row(30)
        self.say("the server runs; the cloud is added as a site of its process server")

    def protect(self) -> None:
        """Push, initial copy, one delta under load."""
        self.scene.push()
        self.server.ssh(f"nohup sh -c '{HOT}' > /dev/null 2>&1 & echo $! > /run/hot.pid")
        started = time.monotonic()
        words = ["--from", "dc", "--to", "cloud", "--policy", "gold", "--network", "ens3=lab"]
        facts = self.asr.result("protect", NAME, *words, timeout=540)
        self.report["initial_copy_bytes"] = facts["bytes_sent"]
        self.report["initial_copy_seconds"] = round(time.monotonic() - started, 1)
        self.say(f"pushed; protected under load: {facts['bytes_sent'] / 2**20:.0f} MiB copied to page blobs")
        self.server.ssh(NAMED)
        self.say(
            "changed on the server: boot loader and fstab name the root /dev/nvme0n1p2, the serial console is removed"
        )
        row = self._last_row()
        self.server.wait_row(row + 20)
        delta = self.asr.result("replicate", NAME)
        claim(delta["mode"] == "delta", f"the second cycle is a delta: {delta}")
        self.report["delta_bytes"] = delta["bytes_sent"]
        self.report["delta_consistency"] = delta["consistency"]
        claim(0 < delta["bytes_sent"] < facts["bytes_sent"] / 4, "a delta sends only what changed")
        self.say(f"a delta of {delta['bytes_sent'] // 1024} KiB, consistency {delta['consistency']}")

    def lose_the_server(self) -> None:
        """The server loses power; the repaired copy boots; the recovery point is unchanged."""
        self.server.cut_power()
        before = self._points()
        last = self.server.console().last_ack
        assert last is not None
        consoles, started = self.peers.consoles(), time.monotonic()
        facts = self.asr.result("failover", "unplanned", NAME, "--yes", timeout=540)
        self.report["repairs"] = facts["repairs"]
        self.say("failed over; " + "; ".join(facts["repairs"]))
        reported = [item["text"] for item in self.asr("event", "list", NAME) if item["kind"] == "repair"]
        claim(sorted(reported) == sorted(facts["repairs"]), f"the log reports each repair: {reported}")
        console = self._booted(consoles)
        self.report["unplanned_rto_seconds"] = round(time.monotonic() - started, 1)
        audit = self._audited(console.audits[-1])
        self.report["unplanned_rows_lost"] = max(0, last.row - audit.last)
        claim("Command line:" in console.text, "the kernel writes to the serial port")
        claim("root=UUID=" in console.text, "its root is named by UUID")
        self.report["points_unchanged"] = self._points() == before
        claim(self.report["points_unchanged"], "the recovery points are unchanged, byte for byte")
        self.say(
            f"it booted after {self.report['unplanned_rto_seconds']} s, ledger intact to row {audit.last}; lost "
            f"{self.report['unplanned_rows_lost']} rows; {len(before)} snapshots of the points are unchanged"
        )
        self.asr("failover", "commit", NAME, "--yes")
        wait_until(lambda: self._row_there() > audit.last + 20, "rows in the cloud", BOOT_SECONDS, 0.5)
        self.say(f"committed; the server keeps writing in the cloud (row {self._row_there()})")

    # -- observing -------------------------------------------------------------------------------------------------

    def _last_row(self) -> int:
        last = self.server.console().last_ack
        return last.row if last else 0

    def _points(self) -> dict[str, str]:
        words = [sys.executable, "-c", POINTS, json.dumps(self.peers.settings)]
        points: dict[str, str] = json.loads(self.lab.run_in(SITE, words, timeout=300).stdout)
        claim(bool(points), "there are points")
        return points

    def _booted(self, before: set[Path]) -> Console:
        def ready() -> bool:
            return any(b"LAB-READY" in path.read_bytes() for path in self.peers.consoles() - before)

        wait_until(ready, "the server boots in the cloud", BOOT_SECONDS, 0.5)
        (self._console,) = self.peers.consoles() - before
        return self._there()

    def _there(self) -> Console:
        return parse_console(self._console.read_text(errors="replace"))

    def _row_there(self) -> int:
        acks = self._there().acks
        return acks[-1].row if acks else 0

    def _audited(self, audit: Audit) -> Audit:
        self.report["ledger_intact"] = audit.intact
        claim(audit.intact and audit.rows > 0, f"the ledger is intact: {audit}")
        return audit


def main() -> int:
    """Run the demo; returns the exit code."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--report", type=Path, default=Path("build/demo-azure-physical-report.json"))
    words.add_argument("--lab", default="azure-physical", help="name of the lab")
    given = words.parse_args()
    given.report.parent.mkdir(parents=True, exist_ok=True)
    given.report.unlink(missing_ok=True)
    begun = time.monotonic()
    failed = ""
    with (
        tempfile.TemporaryDirectory(prefix="azure-physical-") as directory,
        Lab(given.lab, print) as lab,
        Scene(lab) as scene,
    ):
        demo = Demo(scene, Path(directory))
        try:
            demo.run()
        except (Claim, AssertionError) as problem:
            failed = str(problem)
            print(f"\nDOES NOT HOLD: {failed}", file=sys.stderr)
    return conclude(demo.report, given.report, begun, failed)


if __name__ == "__main__":
    sys.exit(main())
