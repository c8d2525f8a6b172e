"""Shared by the system tests: guests at site a, replicas at site b, an engine at site b controlled through
`engine_process.py`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.lab import BlankDisk, Console, Kind, Lab
from tests.lab._console import parse_console
from tests.lab._run import run
from tests.system.engine_process import content_of, disk_digest_of

__all__ = ["MIB", "TARGETS", "EngineError", "EngineProcess", "Rig", "wait_for"]

MIB = 1 << 20
TARGETS = {"xfs": "/srv/xfs", "ext4": "/srv/ext4", "small": "/srv/small", "small-xfs": "/srv/small-xfs"}
"""Sites of the vault that are all site b of the lab, by replica directory: `xfs` clones files, `ext4` makes chains."""

ANSWER_SECONDS = 90.0


class EngineError(Exception):
    """The engine refused or failed: `code` of the catalogue, `exit_code` of its class, `seconds` it took."""

    def __init__(self, verb: str, answer: Mapping[str, Any], seconds: float) -> None:
        self.document = answer["error"]
        self.code = str(self.document["code"])
        self.exit_code = int(answer["exit_code"])
        self.seconds = seconds
        super().__init__(f"{verb}: [{self.code}] {self.document['happened']} ({self.document['cause']})")


def wait_for(true: Callable[[], Any], what: str, timeout: float = 60, poll: float = 0.1) -> Any:
    """Wait until it is true; returns it."""
    end = time.monotonic() + timeout
    while not (found := true()):
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not true after {timeout:g} s")
        time.sleep(poll)
    return found


class EngineProcess:
    """The engine at a site. `module`: the program, `tests.system.engine_process` or one with more verbs."""

    def __init__(
        self, lab: Lab, vault: str = "/srv/asr-engine.db", module: str = "tests.system.engine_process", site: str = "b"
    ) -> None:
        self.log = lab.host_path(site, f"{vault}.log")
        with self.log.open("ab") as log:
            command = [sys.executable, "-W", "error", "-m", module, vault]
            self._process = lab.popen_in(site, command, stdin=subprocess.PIPE, stderr=log.fileno())
        self._received = b""
        assert self._read("start", 30)["answer"] == "ready"

    def __call__(self, verb: str, *arguments: Any, timeout: float = ANSWER_SECONDS, **options: Any) -> Any:
        """Call a verb; returns its answer. Raises EngineError."""
        begun = time.monotonic()
        request = json.dumps({"verb": verb, "arguments": arguments, "options": options})
        assert self._process.stdin is not None
        self._process.stdin.write(request.encode() + b"\n")
        self._process.stdin.flush()
        answer = self._read(verb, timeout)
        if "error" in answer:
            raise EngineError(verb, answer, time.monotonic() - begun)
        return answer["answer"]

    def _read(self, verb: str, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        fd, end = self._process.stdout.fileno(), time.monotonic() + timeout
        while b"\n" not in self._received:
            ready, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
            more = os.read(fd, 1 << 20) if ready else b""
            if not more:
                why = "ended" if ready else f"no answer within {timeout:g} s"
                raise AssertionError(f"engine process, {verb}: {why}\n{self.log.read_text()[-4000:]}")
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return dict(json.loads(line))

    def close(self) -> None:
        """Stop the engine cleanly."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait(10)
            assert self._process.stdout is not None
            self._process.stdout.close()


class Rig:
    """The lab with its engine, and the operations and observations of the tests."""

    def __init__(self, lab: Lab, engine: EngineProcess) -> None:
        self.lab = lab
        self.engine = engine

    def set_up(self) -> None:
        """Sites and the usual policy."""
        self.engine("add_site", "a", "libvirt", {"uri": self.lab.sites["a"].remote_uri})
        for name, directory in TARGETS.items():
            self.engine("add_site", name, "libvirt", {"uri": "qemu:///system", "replica_dir": directory})
        self.engine("add_policy", "still")

    # -- guests ----------------------------------------------------------------------------------------------------

    def guest(
        self, name: str, kind: Kind = Kind.BIOS_DIRECT, *, rate: float = 10, extra_disks: Sequence[BlankDisk] = ()
    ) -> str:
        """A running guest at site a whose workload has started."""
        self.lab.define_guest("a", kind, name, rate=rate, extra_disks=extra_disks)
        self.start(name)
        return name

    def start(self, name: str) -> None:
        """Start a guest at site a, and wait until its workload and its agent run."""
        self.lab.start("a", name)
        self.settled(name)

    def settled(self, name: str) -> None:
        """Wait for the guest's agent: an agent that connects while a backup runs blocks libvirt 9 for 30 seconds."""
        site, agent = self.lab.sites["a"], "devices/channel/target[@name='org.qemu.guest_agent.0']"

        def connected() -> bool:
            channel = ElementTree.fromstring(site.virsh("dumpxml", name).stdout).find(agent)
            return channel is not None and channel.get("state") == "connected"

        wait_for(connected, f"the agent of {name} answers")

    def forget(self, *names: str) -> None:
        """Delete guests at both sites, with their records in the vault and their replicas."""
        for name in names:
            self.release(name)
            for site in ("a", "b"):
                if self.defined(site, name):
                    self.lab.remove_guest(site, name)

    def release(self, name: str) -> None:
        """Delete a guest's record in the vault and its replica, if there are any."""
        known = [item["protection"] for item in self.engine("status") if item["protection"]["name"] == name]
        if known and known[0]["state"] in ("failed-over", "failing-over"):
            self.job("failover_undo", name)
        if known:
            self.job("unprotect", name)

    def defined(self, site: str, name: str) -> bool:
        """Whether the machine is defined at the site."""
        return name in self.lab.sites[site].virsh("list", "--all", "--name").stdout.split()

    def rows(self, name: str, more: int) -> None:
        """Wait until the guest has written that many more rows."""
        last = self.lab.console("a", name).last_ack
        self.lab.wait_row("a", name, (last.row if last else 0) + more)

    def paused(self, name: str) -> int:
        """Pause the workload; returns the last row."""
        self.lab.command("a", name, "pause")
        self.lab.command("a", name, "sync")
        last = self.lab.console("a", name).last_ack
        assert last is not None
        return last.row

    def sources(self, name: str) -> dict[str, tuple[Path, str]]:
        """Image and format of each disk at site a."""
        xml = ElementTree.fromstring(self.lab.sites["a"].virsh("dumpxml", name).stdout)
        found = {}
        for disk in xml.findall("devices/disk[@device='disk']"):
            target, driver, source = disk.find("target"), disk.find("driver"), disk.find("source")
            assert target is not None
            assert driver is not None
            assert source is not None
            path = self.lab.host_path("a", source.get("file", ""))
            found[target.get("dev", "")] = (path, driver.get("type", ""))
        return found

    def source_content(self, name: str) -> dict[str, str]:
        """Content of each disk of a guest that is off (see `engine_process.content_of`)."""
        assert self.lab.state("a", name) == "shut off"
        return {disk: content_of(str(path), fmt) for disk, (path, fmt) in self.sources(name).items()}

    def allocated(self, name: str) -> int:
        """Bytes allocated to the guest's images at site a."""
        return sum(path.stat().st_blocks * 512 for path, _ in self.sources(name).values())

    # -- verbs -----------------------------------------------------------------------------------------------------

    def job(self, verb: str, *arguments: Any, timeout: float = ANSWER_SECONDS, **options: Any) -> dict[str, Any]:
        """Run a verb that is a job to its end; returns its facts. Raises EngineError."""
        job = self.engine(verb, *arguments, **options)
        facts = self.engine("wait", job["id"], timeout, timeout=timeout + 10)
        assert isinstance(facts, dict)
        return facts

    def protect(self, name: str, target: str = "xfs", policy: str = "still") -> dict[str, Any]:
        """The initial copy; returns its facts."""
        return self.job("protect", name, source="a", target=target, policy=policy)

    def replicate(self, name: str, *, keep: bool = True) -> dict[str, Any]:
        """One cycle; returns its facts."""
        return self.job("replicate", name, keep=keep)

    def protection(self, name: str) -> dict[str, Any]:
        """The vault's record of the machine."""
        return dict(self.engine("protection", name))

    def state(self, name: str) -> str:
        """The machine's state in the vault."""
        return str(self.protection(name)["state"])

    def points(self, name: str) -> list[str]:
        """Ids of its points, oldest first."""
        return [point["id"] for point in self.engine("points", name)]

    # -- replicas --------------------------------------------------------------------------------------------------

    def home(self, name: str) -> Path:
        """The host's path to the replica's directory."""
        known = self.protection(name)
        return self.lab.host_path("b", f"{TARGETS[known['target_site']]}/replicas/{known['replica_id']}")

    def point_images(self, name: str) -> dict[str, dict[str, Path]]:
        """The image that the replica's record names, by point and disk."""
        home = self.home(name)
        record = json.loads((home / "replica.json").read_text())
        return {
            point["stored"]["id"]: {disk: home / image for disk, image in point["images"].items()}
            for point in record["points"]
        }

    def content(self, name: str, point: str | None = None) -> dict[str, str]:
        """Content of each disk of a point (the newest), as qemu-img reads the replica's files."""
        images = self.point_images(name)[point or self.points(name)[-1]]
        return {disk: content_of(str(path), _format(path)) for disk, path in images.items()}

    def disk_digest(self, name: str, disk: str) -> str:
        """The digest of a disk of the newest point, as `asr verify` computes it."""
        path = self.point_images(name)[self.points(name)[-1]][disk]
        return disk_digest_of(str(path), _format(path))

    def damage(self, name: str, disk: str, offset: int) -> None:
        """Change a sector of the replica's newest content, by qemu-io."""
        home = self.home(name)
        image = home / json.loads((home / "replica.json").read_text())["heads"][disk]
        run(["qemu-io", "-f", _format(image), "-c", f"write -P 33 {offset} 512", image])

    def used(self, target: str) -> int:
        """Bytes in use in a target's file system, which counts blocks shared by clones once."""
        path = self.lab.host_path("b", TARGETS[target])
        subprocess.run(["sync", "-f", path], check=True, timeout=30)
        status = os.statvfs(path)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    # -- test failovers --------------------------------------------------------------------------------------------

    @contextmanager
    def tested(self, name: str, point: str = "latest") -> Iterator[Console]:
        """A test failover whose machine has booted; cleaned up afterwards."""
        place = self.lab.host_path("b", "/srv/console")
        before = set(place.glob("*"))
        self.job("failover_test", name, point=point)
        try:

            def ready() -> Console | None:
                for path in set(place.glob(f"{name}*")) - before:
                    console = parse_console(path.read_bytes().decode(errors="replace"))
                    if console.ready:
                        return console
                return None

            yield wait_for(ready, f"the test of {name} is up", timeout=90)
        finally:
            self.job("failover_cleanup", name)
        assert not self.defined("b", f"{name}-test")


def _format(image: Path) -> str:
    return "qcow2" if image.suffix == ".qcow2" else "raw"
