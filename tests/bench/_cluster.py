"""The environment of the measurements: the lab's two sites, guests that run from the bench's disk, asrcore's engine,
and the peers."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import libvirt
import libvirt_qemu

from asrcore.units import MiB
from tests.bench._change import Change, contents, plan_change, total
from tests.bench._disk import DATA_START, DISK_SIZE, BenchDisk
from tests.bench._stats import Measured, order
from tests.lab import Kind, Lab, LabError
from tests.lab._run import run
from tests.system.asr_cli import ASR
from tests.system.rig import EngineProcess, Rig

__all__ = ["BORG", "ENGINE", "PLACE", "SOURCE", "TARGET", "Cluster", "PeerFailed", "evict", "field", "synced"]

SOURCE, ENGINE = "a", "b"
"""Sites of the lab: guests run at the first, engine and replicas at the second."""
TARGET = "xfs"
VAULT = "/srv/asr-bench.db"
PLACE = "/srv/xfs"
"""The replicas' file system; the peers write to it as well."""
SHARED = "shared"
BORG = f"BORG_BASE_DIR={PLACE}/borg-own BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes borg"
BORG_CHUNKS = "--chunker-params fixed,1048576"
PEER_SECONDS = 600.0
REPLICA_BYTES = 18432 * MiB
MONITOR_COMMAND = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP


class PeerFailed(Exception):
    """A peer failed; its output is in the message."""


@attrs.define
class Cluster:
    """Made by `field`. `disk`: the initial content of every guest's disk. `few`: rounds of slow contenders. `quick`:
    only contenders that are part of a ratio of time."""

    lab: Lab
    rig: Rig
    disk: BenchDisk
    say: Callable[[str], None]
    rounds: int
    few: int
    quick: bool
    blocks: list[int]
    pool: bytes
    profiles: bool = False
    profile: dict[str, int] = attrs.field(factory=dict)
    """With --profile: samples of asrcore's engine by code location, summed over the rounds of a section."""
    _seed: int = 0
    _lent: bool = False

    @property
    def worker(self) -> EngineProcess:
        """asrcore's engine."""
        return self.rig.engine

    def path(self, name: str) -> Path:
        """The host's path to a file next to the replicas."""
        return self.lab.host_path(ENGINE, f"{PLACE}/{name}")

    # -- guests ----------------------------------------------------------------------------------------------------

    @contextmanager
    def guest(self, name: str) -> Iterator[str]:
        """A running guest at site a whose only disk is the bench's; its workload is paused. It is deleted afterwards.

        With `quick` the sections share one guest, in the state the previous section left it: a boot takes longer than a
        round.
        """
        lend = self.quick and not self._lent
        if lend:
            name, self._lent = SHARED, True
        if not self.rig.defined(SOURCE, name):
            self.say(f"guest {name} boots from its copy of the disk")
            self._define(name)
        if self.lab.state(SOURCE, name) != "running":
            self.rig.start(name)
            self.lab.command(SOURCE, name, "pause")
            self.lab.command(SOURCE, name, "sync")
        yield name
        # After an error or Ctrl-C the whole lab is deleted.
        if lend:
            self.rig.release(name)
            self._lent = False
        else:
            self.rig.forget(name)

    def _define(self, name: str) -> None:
        self.lab.define_guest(SOURCE, Kind.BIOS_DISK, name, rate=1)
        image = self.lab.host_path(SOURCE, f"/srv/images/{name}-vda.qcow2")
        convert = ["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", "-W"]
        run([*convert, self.disk.raw, image], timeout=PEER_SECONDS)

    def change(self, guests: Sequence[str], files: Sequence[Path], *, scattered: int, sequential: int = 0) -> int:
        """Make the same change in running guests' disks and in raw files; returns its bytes.

        QEMU itself writes it into the guest's disk, by `qemu-io` on its monitor, so its bitmaps and its backup see the
        same as for the guest's own writes. An emulated processor would need minutes for it.
        """
        self._seed += 1
        changes = plan_change(
            self.blocks, DISK_SIZE, self._seed, scattered=scattered, sequential=sequential, first=DATA_START
        )
        for file in files:
            _write_file(file, changes, self.pool)
        connection = libvirt.open(self.lab.uri(SOURCE))
        try:
            domains = [connection.lookupByName(guest) for guest in guests]
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda domain: self._write_guest(domain, changes), domains))
        finally:
            connection.close()
        return total(changes)

    def _write_guest(self, domain: libvirt.virDomain, changes: Sequence[Change]) -> None:
        device = "/machine/peripheral/virtio-disk0/virtio-backend"
        inside = f"/srv/images/{domain.name()}-change.bin"
        block = self.lab.host_path(SOURCE, inside)
        log = self.lab.sites[SOURCE].disk_dir / f"log/qemu/{domain.name()}.log"  # receives qemu-io's output
        before = log.stat().st_size
        for offset, data in contents(changes, self.pool):
            block.write_bytes(data)
            line = f'qemu-io -d {device} "write -s {inside} {offset} {len(data)}"'
            said = libvirt_qemu.qemuMonitorCommand(domain, line, MONITOR_COMMAND)
            if said.strip():
                raise LabError(f"the monitor of {domain.name()} does not write: {said.strip()}")
        block.unlink()
        wrote = log.read_bytes()[before:].count(b"\nwrote ")
        if wrote < len(changes) - 1:  # the first may stand at the start of the part
            raise LabError(f"QEMU of {domain.name()} wrote {wrote} of {len(changes)} blocks, see {log}")

    def asr(self, *words: str) -> subprocess.Popen[bytes]:
        """Start an `asr` command next to asrcore's engine, as an operator types it there."""
        return self.lab.popen_in(ENGINE, [ASR, "--vault", VAULT, *words, "--json"], stdout=subprocess.DEVNULL)

    # -- measuring -------------------------------------------------------------------------------------------------

    def ours(self, verb: str, *arguments: Any, **options: Any) -> Measured:
        """A verb of the engine that is a job, timed from the call to its end."""
        return self.measured("measured", verb, *arguments, **options)

    def measured(self, verb: str, *arguments: Any, worker: EngineProcess | None = None, **options: Any) -> Measured:
        """A verb of the worker (by default the engine at site b) that measures."""
        report = (worker or self.worker)(verb, *arguments, timeout=PEER_SECONDS, **options)
        for place, samples in report.get("profile", {}).items():
            self.profile[place] = self.profile.get(place, 0) + samples
        return _measured(report)

    def peer(self, script: str, site: str = ENGINE) -> Measured:
        """Run a shell script inside a site to its end; the script itself syncs what it writes. Raises PeerFailed."""
        with self.begun(script, site) as finish:
            return finish()

    @contextmanager
    def begun(self, script: str, site: str) -> Iterator[Callable[[], Measured]]:
        """A shell script that runs in the background; call the result to wait for its end."""
        with tempfile.TemporaryFile() as log:
            command = ["bash", "-eo", "pipefail", "-c", script]
            begun = time.monotonic()
            process = self.lab.popen_in(site, command, stdout=log.fileno(), stderr=subprocess.STDOUT)

            def finish() -> Measured:
                _, status, usage = os.wait4(process.pid, 0)
                seconds = time.monotonic() - begun
                process.returncode = os.waitstatus_to_exitcode(status)
                if process.returncode:
                    log.seek(0)
                    printed = log.read()[-3000:].decode(errors="replace")
                    raise PeerFailed(f"{script}: exit status {process.returncode}\n{printed}")
                return Measured(seconds, usage.ru_utime + usage.ru_stime)

            try:
                yield finish
            finally:
                if process.returncode is None:
                    process.kill()  # what it started is killed with the lab
                    process.wait()

    def reader(self, guest: str, script: str) -> Measured:
        """A peer's script that reads the guest's frozen disk at `$URI`, from the export that asrcore's cycles read."""
        uri = self.worker("open_export", SOURCE, guest)
        done = self.peer(f"URI={shlex.quote(uri)}; {script}")
        self.worker("close_export", SOURCE, guest)
        return done

    def remove(self, path: str, site: str = ENGINE) -> None:
        """Remove a file or directory of a site, if it is there."""
        self.lab.run_in(site, ["rm", "-rf", path])

    def interleave(
        self,
        contenders: dict[str, Callable[[], Measured]],
        *,
        before: Callable[[], object] = lambda: None,
        rounds: int | None = None,
    ) -> dict[str, list[Measured]]:
        """Each contender once a round, with a different one first each time; all dirty pages are written before one
        starts."""
        found: dict[str, list[Measured]] = {name: [] for name in contenders}
        total = rounds or self.rounds
        for number in range(total):
            before()
            for name in order(list(contenders), number):
                run(["sync"], timeout=PEER_SECONDS)
                item = contenders[name]()
                found[name].append(item)
                self.say(f"  round {number + 1} of {total}: {name} {item.seconds:.2f} s, CPU {item.cpu_seconds:.2f} s")
        return found


def synced(script: str) -> str:
    """The script, followed by a sync of what it wrote."""
    return f"{script} && sync -f {PLACE}"


def _measured(report: dict[str, Any]) -> Measured:
    """The worker's measurement."""
    facts = {key: float(value) for key, value in report.get("facts", {}).items() if "bytes" in key}
    return Measured(
        report["seconds"],
        report["cpu_seconds"],
        report["peak_rss"],
        {
            **{
                key: float(report[key])
                for key in ("link_bytes", "from_view_seconds", "sealed_seconds")
                if key in report
            },
            **facts,
        },
    )


def evict(path: Path) -> None:
    """Drop a file from the page cache: the next reader reads from disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_file(path: Path, changes: Sequence[Change], pool: bytes) -> None:
    with path.open("r+b") as file:
        for offset, data in contents(changes, pool):
            os.pwrite(file.fileno(), data, offset)


def _make_room(lab: Lab, site: str) -> None:
    """Grow the replicas' file system, which is a file, and allocate all of it, so that no round pays for the file's
    growth. The loop device then passes writes on, as a disk does. Otherwise all writes would be copied into the host's
    page cache as well, and the cache would be measured instead of the disk: the first use of a page is several times
    slower.
    """
    backing = lab.sites[site].disk_dir / f"{TARGET}.img"
    run(["fallocate", "-l", str(REPLICA_BYTES), backing], timeout=PEER_SECONDS)
    device = run(["losetup", "--noheadings", "--output", "NAME", "--associated", backing]).stdout.strip()
    run(["losetup", "--set-capacity", device])
    run(["losetup", "--direct-io=on", device])
    lab.run_in(site, ["xfs_growfs", PLACE])


@contextmanager
def field(
    disk: BenchDisk, rounds: int, few: int, say: Callable[[str], None], *, quick: bool, profile: bool
) -> Iterator[Cluster]:
    """The lab with asrcore's engine at site b."""
    with Lab(f"bench-{os.getpid()}", say) as lab:
        for site in lab.sites:
            _make_room(lab, site)
        engine = EngineProcess(lab, VAULT, "tests.bench._worker")
        try:
            rig = Rig(lab, engine)
            rig.set_up()
            engine("profile", profile)
            yield Cluster(lab, rig, disk, say, rounds, few, quick, disk.blocks(), disk.pool(), profile)
        finally:
            engine.close()
