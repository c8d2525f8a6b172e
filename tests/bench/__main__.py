"""The bench: python -m tests.bench [--only SECTION,...] [--quick]."""

from __future__ import annotations

import argparse
import compileall
import importlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import asrcore
from tests.bench._report import machine_facts, show, show_profile, write
from tests.bench._stats import Result
from tests.lab._images import build_images
from tests.lab._packages import install_packages, missing_packages
from tests.lab._run import LabError

PACKAGES = ("virtnbdbackup", "borgbackup", "nbdkit", "libnbd-bin", "rsync", "socat", "zstd", "qemu-utils")
SSHD_NEEDS = ("openssh-client", "libwrap0", "libgssapi-krb5-2")
"""In addition to what every Debian has; sshd itself is not installed (see `_ssh`)."""
SECTIONS = ("initial", "delta", "resync", "verify", "idle", "secure", "points", "status", "far", "wan")
QUICK_SECTIONS = SECTIONS[:-1]
"""A slow link makes `wan` slow."""
ROUNDS = 5
QUICK_ROUNDS = 3


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _names(text: str) -> list[str]:
    """Section names separated by commas or blanks. Raises ArgumentTypeError for an unknown one."""
    names = text.replace(",", " ").split()
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]!r}; there are: {', '.join(SECTIONS)}")
    return names


def measure(names: Sequence[str], rounds: int, few: int, *, quick: bool, profile: bool) -> list[Result]:
    """Run the sections. Everything they made is deleted afterwards, also after Ctrl-C, except the disk's template."""
    from tests.bench._cluster import field
    from tests.bench._disk import build_disk

    disk = build_disk(build_images(_say), _say)
    results = []
    with field(disk, rounds, few, _say, quick=quick, profile=profile) as place:
        for name in names:
            section = importlib.import_module(f"tests.bench.sections.{name}")
            _say(f"{name}: {section.TITLE}")
            results.append(section.measure(place))
            show(results[-1])
            if profile:
                show_profile(place.profile)
                place.profile.clear()
    return results


def prepare() -> int:
    """Install and build everything that a measurement needs, while the package archive can be reached."""
    from tests.bench._disk import build_disk
    from tests.bench._ssh import unpacked

    if missing := missing_packages([*PACKAGES, *SSHD_NEEDS]):
        _say(f"installing the peers: {' '.join(missing)}")
        install_packages(missing)
    unpacked()
    build_disk(build_images(_say), _say)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", default=[], type=_names, help=f"comma-separated sections: {', '.join(SECTIONS)}")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, peers and points, shared guests, no wan section: 3 minutes"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=0,
        help=f"default {ROUNDS}; with --quick {QUICK_ROUNDS}, and 1 for slow contenders",
    )
    parser.add_argument(
        "--profile", action="store_true", help="also sample where asrcore spends its time, which slows it down"
    )
    parser.add_argument("--prepare", action="store_true", help="install the peers and make the disk, without measuring")
    arguments = parser.parse_args()
    if arguments.prepare:
        return prepare()
    compileall.compile_dir(Path(asrcore.__file__).parent, quiet=1)  # as pip does; PYTHONDONTWRITEBYTECODE may be set
    names = arguments.only or (QUICK_SECTIONS if arguments.quick else SECTIONS)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    few = arguments.rounds or (1 if arguments.quick else ROUNDS)
    begun = time.monotonic()
    try:
        results = measure(names, rounds, few, quick=arguments.quick, profile=arguments.profile)
    except LabError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; nothing is left running", file=sys.stderr)
        return 130
    if names is QUICK_SECTIONS:
        results.append(Result("wan", "A slow link", {}, missing=["all of it: too slow for --quick"]))
    for path in write(results, machine_facts(quick=arguments.quick)):
        _say(f"written: {path}")
    _say(f"done after {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
