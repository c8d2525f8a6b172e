"""The lab on the command line: python -m tests.lab packages|images|up|down|status."""

from __future__ import annotations

import argparse
import signal
import sys
import time

from tests.lab._images import build_images
from tests.lab._kvm import kvm_boots
from tests.lab._lab import Lab, lab_names
from tests.lab._packages import GROUPS, install_packages, missing_packages
from tests.lab._run import LabError
from tests.lab._server_image import build_server_image

DEFAULT_NAME = "lab"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _group(name: str) -> str:
    if name not in GROUPS:
        raise argparse.ArgumentTypeError(f"no group {name!r}; the groups are: {', '.join(GROUPS)}")
    return name


def _packages(arguments: argparse.Namespace) -> int:
    names = [name for group in arguments.group or GROUPS for name in GROUPS[group]]
    missing = missing_packages(names)
    if arguments.install and missing:
        _say(f"installing {' '.join(missing)}")
        install_packages(missing)
        missing = missing_packages(names)
    print(" ".join(missing) or "nothing is missing")
    return 1 if missing else 0


def _images(arguments: argparse.Namespace) -> int:
    images = build_images(_say)
    if arguments.server:
        print(build_server_image(_say).directory)
    print(images.directory)
    print(
        "guests run on KVM"
        if kvm_boots(images)
        else "guests are emulated (TCG): KVM does not boot a guest on this machine"
    )
    return 0


def _up(arguments: argparse.Namespace) -> int:
    lab = Lab(arguments.name, _say)
    if not lab.up_by_hand:
        lab.up(stay=True)
    for site in lab.sites.values():
        print(f"site {site.name}: {site.uri}")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    for name in lab_names() if arguments.all or arguments.dead else [arguments.name]:
        lab = Lab(name, _say)
        if arguments.dead and not lab.abandoned:
            continue
        if (owner := lab.owner()) is not None:
            raise LabError(f"lab {name} is in use by process {owner}")
        lab.down()
    return 0


def _status(arguments: argparse.Namespace) -> int:
    for name in lab_names():
        lab = Lab(name)
        owner = lab.owner()
        print(f"{name}: {'started on the command line' if owner is None else f'in use by process {owner}'}")
        for site in lab.sites.values():
            listed = site.virsh("list", "--all", check=False)
            print(f"  site {site.name}: {site.uri}")
            for line in (listed.stdout if listed.returncode == 0 else f"libvirtd: {listed.stderr}").splitlines():
                if line.strip():
                    print(f"    {line.strip()}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    packages = verbs.add_parser("packages", help="print the missing Debian packages")
    packages.add_argument("group", nargs="*", type=_group, help=f"{', '.join(GROUPS)}; default: all")
    packages.add_argument("--install", action="store_true", help="install them with apt")
    packages.set_defaults(call=_packages)
    images = verbs.add_parser("images", help="build the guests' images")
    images.add_argument("--server", action="store_true", help="also those of the physical server")
    images.set_defaults(call=_images)
    up = verbs.add_parser("up", help="start a lab that stays up until `down`; does nothing if it is up")
    up.set_defaults(call=_up)
    down = verbs.add_parser("down", help="remove a lab and everything that belongs to it")
    down.add_argument("--all", action="store_true", help="every lab that no process uses")
    down.add_argument("--dead", action="store_true", help="labs whose processes ended without removing them")
    down.set_defaults(call=_down)
    for verb in (up, down):
        verb.add_argument("--name", default=DEFAULT_NAME)
    verbs.add_parser("status", help="print the labs that are up").set_defaults(call=_status)
    arguments = parser.parse_args()
    try:
        code: int = arguments.call(arguments)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `up` removes what it has started
    sys.exit(main())
