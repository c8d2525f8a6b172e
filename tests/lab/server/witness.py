"""The mobility service with a witness, for tests: while the file systems are frozen, and nothing is left to be taken,
it writes down a digest of each disk. The service itself is the one that was installed, unchanged.

Run on the server in the place of the service. It looks only while /run/witness/on is there; while /run/witness/hang is,
it stays in the freeze for as many seconds as that file says.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, "/opt/asr-mobility/asr-mobility.pyz")

from asr_mobility import service
from asr_mobility.__main__ import main
from asr_mobility.disks import Reader

PIECE = 1 << 20
DIRECTORY = Path("/run/witness")


def digest(path: str, size: int) -> str:
    """As `tests.system.physical.digest_of_file` computes it of an image."""
    whole = hashlib.blake2b(digest_size=16)
    reader = Reader(path, size, PIECE)
    for at in range(0, size, PIECE):
        piece = bytes(reader.read(at, min(PIECE, size - at)))
        whole.update(b"\0" if piece.count(0) == len(piece) else hashlib.blake2b(piece, digest_size=16).digest())
    reader.close()
    return whole.hexdigest()


def witnessed(take_in: Callable[..., bool]) -> Callable[..., bool]:
    """The service's own step, then the digests, before anything is thawed."""

    def step(this: Any, held: Any, watched: Any, *more: Any) -> bool:
        still = take_in(this, held, watched, *more)
        if (DIRECTORY / "on").exists():
            disks = {key: digest(item.disk.path, item.disk.size) for key, item in watched.items()}
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
