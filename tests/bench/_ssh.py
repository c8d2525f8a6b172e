"""Debian's sshd for a peer that sends through ssh: unpacked, not installed, since an installed one starts
automatically."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.bench._cluster import ENGINE, SOURCE, Cluster
from tests.lab import _places
from tests.lab._run import run

__all__ = ["PORT", "client", "server", "unpacked"]

PORT = 10022
HOME = "/srv/sshd"
DOWNLOAD_SECONDS = 300.0
CONFIG = f"""\
Port {PORT}
HostKey {HOME}/host
AuthorizedKeysFile {HOME}/user.pub
AuthenticationMethods publickey
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""


def unpacked() -> Path:
    """sshd of the package, unpacked in build/bench and kept there."""
    place = _places.PROJECT / "build/bench/openssh-server"
    if not place.exists():
        work = place.with_name("openssh-server.new")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        run(["sh", "-ec", f"cd {work} && apt-get -q download openssh-server"], timeout=DOWNLOAD_SECONDS)
        (package,) = work.glob("*.deb")
        run(["dpkg-deb", "-x", package, work])
        package.unlink()
        work.rename(place)
    return place / "usr/sbin/sshd"


def server(field: Cluster) -> str:
    """Make keys and accounts at site b, and copy the client's key to site a. Returns the command of a server that exits
    after one connection, so that its cost can be measured."""
    here = field.lab.host_path(ENGINE, HOME)
    if not here.exists():
        here.mkdir()
        for key in ("host", "user"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", here / key])
        (here / "config").write_text(CONFIG)
        # sshd needs an account to drop its privileges to, and an unlocked root account; only this site sees them.
        (here / "passwd").write_text(
            Path("/etc/passwd").read_text() + f"sshd:x:65533:65534::{HOME}:/usr/sbin/nologin\n"
        )
        (here / "shadow").write_text("root:*:19000::::::\n")
        (here / "shadow").chmod(0o600)
        for name in ("passwd", "shadow"):
            field.lab.run_in(ENGINE, ["mount", "--bind", f"{HOME}/{name}", f"/etc/{name}"])
        field.lab.run_in(ENGINE, ["mkdir", "-p", "/run/sshd"])
        there = field.lab.host_path(SOURCE, HOME)
        there.mkdir()
        shutil.copy(here / "user", there)
        address, key = field.lab.sites[ENGINE].address, (here / "host.pub").read_text()
        (there / "known").write_text(f"[{address}]:{PORT} {key}")
    # It exits with status 255 when its client hangs up; the client reports errors.
    return f"{unpacked()} -d -f {HOME}/config || test $? = 255"


def client(field: Cluster, command: str) -> str:
    """The command that runs a shell command at site b from site a, with its standard input."""
    options = f"-F none -q -i {HOME}/user -p {PORT} -o BatchMode=yes -o UserKnownHostsFile={HOME}/known"
    return f"ssh {options} root@{field.lab.sites[ENGINE].address} '{command}'"
