"""A separate small file system for a test, which is unmounted even when the test is killed."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.lab._run import COMMAND_SECONDS, LabError, run

_MKFS = {"xfs": ["mkfs.xfs", "-q"], "ext4": ["mkfs.ext4", "-q", "-F", "-m", "0"]}

# A separate process unmounts when its input ends: on request, or when the process that mounted ends for any reason. A
# leftover mount would prevent any later clean-up of the temporary directory.
_UNMOUNT = 'cat >/dev/null; umount "$1" || { umount --lazy "$1"; exit 1; }'


@contextlib.contextmanager
def mounted(directory: Path, file_system: str, size: int) -> Iterator[Path]:
    """An empty file system, `xfs` or `ext4`, of `size` bytes on a loop device, in a new directory of this directory.

    Its image is sparse and is deleted at the end. Raises LabError if it cannot be made, or is still in use at the end.
    """
    image, mount = directory / f"{file_system}.img", directory / file_system
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    run([*_MKFS[file_system], image])
    run(["mount", "-o", "loop", image, mount])
    guard = subprocess.Popen(["sh", "-c", _UNMOUNT, "sh", mount], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield mount
    finally:
        guard.communicate(timeout=COMMAND_SECONDS)
        image.unlink()
    if guard.returncode:
        raise LabError(f"{mount} was in use at the end")
