"""The mobility service with a witness, for tests: while the file systems are frozen and all changes have been read, it
asks a witness outside the server (`tests.system.disk_witness`) for digests of the disks, and stores them. The service
itself is the installed one, unchanged.

Run on the server in place of the service. It asks only while /run/witness/on exists; while /run/witness/hang exists, it
keeps the file systems frozen for the number of seconds in that file.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, "/opt/asr-mobility/asr-mobility.pyz")

from asr_mobility import service
from asr_mobility.__main__ import main

DISK_WITNESS = ("10.78.0.1", 9400)
DIRECTORY = Path("/run/witness")


def digests(names: dict[str, str]) -> dict[str, str]:
    """Digests of disks by the kernel's name, from the witness."""
    with socket.create_connection(DISK_WITNESS, 30) as witness:
        witness.sendall(json.dumps(names).encode() + b"\n")
        with witness.makefile() as answer:
            return dict(json.loads(answer.readline()))


def witnessed(take_in: Callable[..., bool]) -> Callable[..., bool]:
    """The service's own step, then the digests, before the file systems are thawed."""

    def step(this: Any, held: Any, watched: Any, *more: Any) -> bool:
        still = take_in(this, held, watched, *more)
        if (DIRECTORY / "on").exists():
            disks = digests({key: item.disk.name for key, item in watched.items()})
            late = sum(item.tracker.pending() for item in watched.values())
            (DIRECTORY / "seen.new").write_text(json.dumps({"disks": disks, "late": late, "still": still}))
            (DIRECTORY / "seen.new").replace(DIRECTORY / "seen")
        if (DIRECTORY / "hang").exists():
            (DIRECTORY / "hanging").write_text(str(os.getpid()))
            time.sleep(float((DIRECTORY / "hang").read_text()))
        return still

    return step


service.Service._take_in = witnessed(service.Service._take_in)  # type: ignore[method-assign]
sys.exit(main())
