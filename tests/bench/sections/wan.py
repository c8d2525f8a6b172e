"""A change sent over a slow link: bytes on the wire, the time it takes, and what an interrupted copy sends again."""

from __future__ import annotations

import time
from collections.abc import Callable

import attrs

from asrcore.units import MiB
from tests.bench import _ssh as ssh
from tests.bench._cluster import ENGINE, PLACE, SOURCE, Cluster, synced
from tests.bench._stats import OURS, Measured, Result, median, ratio
from tests.lab._site import wait_until
from tests.system.rig import EngineProcess
from tests.system.two_sites import copied_with_cuts, master_target, paired, sent_bytes

TITLE = "A change of 60 MiB over 100 Mbit/s"
MBIT = 100
COPY, MIRROR = "/srv/wan.raw", "mirror.raw"
RSYNC_PORT = 10873
RSYNC, PIPE = "rsync -z", "zstd -3 of the disk | ssh"


def measure(field: Cluster) -> Result:
    """Against rsync -z of a raw file with the same change, and the whole disk through ssh (once: it is slow)."""
    lab = field.lab
    config = "[bench]\npath = /srv/xfs\nread only = no\nuse chroot = no\nuid = root\ngid = root\n"
    lab.host_path(ENGINE, "/srv/rsyncd.conf").write_text(config)
    with (
        field.guest("wan") as guest,
        master_target(lab, PLACE) as target,
        paired(lab, target, "tests.bench._worker") as engine,
        field.begun(f"exec rsync --daemon --no-detach --port {RSYNC_PORT} --config /srv/rsyncd.conf", ENGINE),
    ):
        job = engine("protect", guest, source="a", target="there", policy="still")
        engine("wait", job["id"], 120.0, timeout=130)
        for site, path in ((SOURCE, COPY), (ENGINE, f"{PLACE}/{MIRROR}")):
            lab.run_in(site, ["cp", "--sparse=always", str(field.disk.raw), path], timeout=600)
        address = lab.sites[ENGINE].address
        mirror = f"rsync://{address}:{RSYNC_PORT}/bench/{MIRROR}"
        rsync = f"rsync -z --inplace --no-whole-file --ignore-times {COPY} {mirror}"
        lab.slow(MBIT)
        try:
            contenders: dict[str, Callable[[], Measured]] = {
                OURS: lambda: _counted(field, lambda: field.measured("cycle", guest, worker=engine)),
                RSYNC: lambda: _counted(field, lambda: field.peer(rsync, SOURCE)),
            }
            rounds = field.interleave(
                contenders,
                before=lambda: field.change(
                    [guest], [lab.host_path(SOURCE, COPY)], scattered=40 * MiB, sequential=20 * MiB
                ),
                rounds=min(field.rounds, 3),
            )
            if not field.quick:
                rounds[PIPE] = [_counted(field, lambda: _pipe(field))]
        finally:
            lab.restore()
        job = engine("unprotect", guest)
        engine("wait", job["id"], 60.0)
        figures = {} if field.quick else {"wan_resent_ratio": _resent(field, engine)}
    field.remove(COPY, SOURCE)
    field.remove(f"{PLACE}/{MIRROR}")
    bytes_of = {name: median(rounds[name], "link_bytes") for name in rounds}
    figures["wan_delta_vs_rsync"] = ratio(rounds, RSYNC)
    figures["wan_bytes_vs_rsync"] = bytes_of[RSYNC] / bytes_of[OURS]
    if field.quick:
        return Result("wan", TITLE, rounds, figures, [f"{PIPE}, and an interrupted copy: too slow for --quick"])
    figures["wan_bytes_vs_zstd_ssh"] = bytes_of[PIPE] / bytes_of[OURS]
    return Result("wan", TITLE, rounds, figures)


def _counted(field: Cluster, work: Callable[[], Measured]) -> Measured:
    """Bytes sent over the link, recorded in `link_bytes`."""
    before = sent_bytes(field.lab)
    done = work()
    sent = float(sent_bytes(field.lab) - before)
    field.say(f"    {sent / MiB:.1f} MiB on the wire")
    return attrs.evolve(done, more={**done.more, "link_bytes": sent})


def _pipe(field: Cluster) -> Measured:
    send = f"zstd -3 -T2 -q -c {COPY} | {ssh.client(field, synced(f'zstd -d -q -f --sparse -o {PLACE}/{MIRROR}'))}"
    with field.begun(ssh.server(field), ENGINE) as receiver:
        listening = ["ss", "-Hltn", f"sport = :{ssh.PORT}"]
        wait_until(lambda: bool(field.lab.run_in(ENGINE, listening).stdout), "sshd listens", 10)
        begun = time.monotonic()
        sent = field.peer(send, SOURCE)
        seconds, received = time.monotonic() - begun, receiver()
        return Measured(seconds, sent.cpu_seconds + received.cpu_seconds)


def _resent(field: Cluster, engine: EngineProcess) -> float:
    """A copy that is interrupted ten times, against an uninterrupted one."""
    uncut, cut = copied_with_cuts(field.rig, engine, name := "cut-often")
    field.say(f"    {uncut / MiB:.1f} MiB on the wire, {cut / MiB:.1f} MiB with ten cuts")
    job = engine("unprotect", name)
    engine("wait", job["id"], 60.0)
    field.lab.remove_guest(SOURCE, name)
    return cut / uncut
