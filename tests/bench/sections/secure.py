"""The copy across a link: hashed, compressed, encrypted, to another process, durable there."""

from __future__ import annotations

import shlex
import time

from tests.bench._field import ENGINE, PLACE, SOURCE, Field, synced
from tests.bench._stats import Measured, Result
from tests.lab._site import wait_until

TITLE = "Copy across the link: zstd and TLS"
OUTPUT = f"{PLACE}/received"
PORT = 10999
KEYS = "/srv/tls"


def measure(field: Field) -> Result:
    """The peer is a pipe; ours is measured when the wire between processes is there."""
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=bench"
    field.peer(f"mkdir {KEYS}; cd {KEYS}; {make} -keyout key -out certificate; cat key certificate > both")
    with field.guest("secure") as guest:
        rounds = field.interleave({"zstd | socat TLS | zstd": lambda: _pipe(field, guest)})
    field.remove(KEYS)
    return Result("secure", TITLE, rounds, missing=["ours: compression and encryption in the pipeline are not built"])


def _pipe(field: Field, guest: str) -> Measured:
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
