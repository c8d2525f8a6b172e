"""What this host needs for the driver, for `asr doctor`."""

from __future__ import annotations

import ctypes.util
import shutil

from asrcore.model.finding import Finding, Severity

__all__ = ["findings"]


def findings() -> list[Finding]:
    """Missing programs and libraries, each with the command that installs it on Debian."""
    found = []
    for program, package, why in (
        ("qemu-img", "qemu-utils", "reads and merges disk images"),
        ("qemu-nbd", "qemu-utils", "reads the disks of machines that are off, and writes replicas"),
    ):
        if shutil.which(program) is None:
            found.append(_missing(f"{program}-missing", program, why, package))
    if ctypes.util.find_library("nbd") is None:
        found.append(_missing("libnbd-missing", "libnbd.so.0", "reads the disks of running machines", "libnbd0"))
    return found


def _missing(code: str, what: str, why: str, package: str) -> Finding:
    return Finding(
        code=code,
        severity=Severity.ERROR,
        what=f"{what} is not installed",
        cause=f"The libvirt driver needs it: it {why}.",
        action=f"apt-get install {package}",
    )
