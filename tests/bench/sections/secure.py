"""A copy across a link: hashed, compressed and encrypted, to another process, until durable there."""

from __future__ import annotations

import shlex
import time

import attrs

from tests.bench._cluster import ENGINE, PLACE, SOURCE, Cluster, synced
from tests.bench._stats import OURS, Measured, Result, ratio
from tests.lab._site import wait_until
from tests.system.rig import EngineProcess
from tests.system.two_sites import MasterTargetProcess, master_target, paired, sent_bytes

TITLE = "Copy across the link: zstd and TLS"
OUTPUT = f"{PLACE}/received"
PORT = 10999
KEYS = "/srv/tls"
PEER = "zstd | socat TLS | zstd"


def measure(field: Cluster) -> Result:
    """asrcore: an engine at the guest's site, a master target at the other. The peer: a pipe of programs."""
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=bench"
    field.peer(f"mkdir {KEYS}; cd {KEYS}; {make} -keyout key -out certificate; cat key certificate > both")
    with (
        field.guest("secure") as guest,
        master_target(field.lab, PLACE) as target,
        paired(field.lab, target, "tests.bench._worker") as engine,
    ):
        engine("profile", field.profiles)
        rounds = field.interleave(
            {OURS: lambda: _ours(field, engine, target, guest), PEER: lambda: _pipe(field, guest)}, rounds=field.few
        )
    field.remove(KEYS)
    return Result("secure", TITLE, rounds, {"secure_copy_vs_zstd_tls_pipe": ratio(rounds, PEER)})


def _ours(field: Cluster, engine: EngineProcess, target: MasterTargetProcess, guest: str) -> Measured:
    """The initial copy through the master target: from the frozen view until its point is in the vault."""
    cpu, sent = target.cpu_seconds, sent_bytes(field.lab)
    done = field.measured("measured", "protect", guest, source="a", target="there", policy="still", worker=engine)
    bytes_sent, cpu = sent_bytes(field.lab) - sent, target.cpu_seconds - cpu
    job = engine("unprotect", guest)
    engine("wait", job["id"], 60.0)
    more = {"link_bytes": float(bytes_sent), "target_peak_rss": float(target.peak_rss), "job_seconds": done.seconds}
    return attrs.evolve(
        done,
        seconds=done.more["from_view_seconds"],
        cpu_seconds=done.cpu_seconds + cpu,
        more={**done.more, **more},
    )


def _pipe(field: Cluster, guest: str) -> Measured:
    """nbdcopy at the guest's site into `zstd -1 -T2` into socat with TLS; `zstd -d` into a file at the other.

    Timed from the sender's start until the receiver has made its file durable.
    """
    uri = field.worker("open_export", SOURCE, guest)
    listen = f"OPENSSL-LISTEN:{PORT},reuseaddr,cert={KEYS}/both,verify=0"
    receive = synced(f"socat -u -b 262144 {listen} STDOUT | zstd -d -q -f --sparse -o {OUTPUT}")
    send = f"nbdcopy {shlex.quote(uri)} - | zstd -1 -T2 -q -c"
    send += f" | socat -u -b 262144 STDIN OPENSSL:{field.lab.sites[ENGINE].address}:{PORT},verify=0"
    with field.begun(receive, ENGINE) as receiver:
        listening = ["ss", "-Hltn", f"sport = :{PORT}"]
        wait_until(lambda: bool(field.lab.run_in(ENGINE, listening).stdout), "socat listens", 10)
        begun = time.monotonic()
        sent = field.peer(send, SOURCE)
        received = receiver()
        seconds = time.monotonic() - begun
    field.worker("close_export", SOURCE, guest)
    field.remove(OUTPUT)
    return Measured(seconds, sent.cpu_seconds + received.cpu_seconds)
