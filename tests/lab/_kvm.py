"""Checks whether KVM really boots a guest on this machine; the result is cached for this kernel."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path

from tests.lab import _places
from tests.lab._disks import COMMAND_LINE
from tests.lab._images import Images

PROBE_SECONDS = 10.0


def _boots(images: Images) -> bool:
    command = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "Nehalem", "-m", "128", "-nodefaults", "-display", "none"]
    command += ["-no-reboot", "-serial", "stdio", "-kernel", str(images.kernel), "-initrd", str(images.initrd)]
    command += ["-append", COMMAND_LINE]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as guest:
        limit = threading.Timer(PROBE_SECONDS, guest.kill)
        limit.start()
        try:
            return any(b"LAB-READY" in line for line in guest.stdout or ())
        finally:
            limit.cancel()
            guest.kill()


def kvm_boots(images: Images) -> bool:
    """Whether guests can be of type kvm. Checked by booting one, once for each host kernel."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    answer = _places.CACHE / "kvm.json"
    try:
        known = json.loads(answer.read_text())
    except (OSError, ValueError):
        known = {}
    release = os.uname().release
    if release not in known:
        known[release] = _boots(images)
        fresh = Path(f"{answer}.{os.getpid()}")
        fresh.write_text(json.dumps(known))
        fresh.replace(answer)
    return bool(known[release])
