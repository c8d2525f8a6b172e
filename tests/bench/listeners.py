"""Listeners under connections that do nothing: `python -m tests.bench.listeners [--seconds N] [--only LISTENER]`.

For each listener and each kind of crowd: whether a good client is let in within 2 seconds each time, and by how much
the listener's memory and log grow. The listener is a process with 1,024 descriptors (systemd's default), its log has
level INFO. The crowd is another process on the same host and address; what is closed is opened again at once. Needs no
lab. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import select
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import attrs

from asrcore.pki import enrolment
from asrcore.pki.authority import Authority
from asrcore.pki.request import make_request
from asrcore.units import MiB
from asrcore.vault import Vault
from asrcore.wire import frames
from asrcore.wire.carrier import Address
from asrcore.wire.tls import Component, Identity, Role

DESCRIPTORS = 1024
WITHIN = 2.0
MEMORY = 64 * MiB
LOG = 1 * MiB
_EVERY = 0.25  # seconds between two attempts of the good client


@attrs.frozen
class Crowd:
    """What holds connections. `certificate`: whose, if any. `hello`: it begins as a good client does, and then waits;
    without a certificate, its handshake. `drip`: it sends one byte a second."""

    name: str
    count: int
    certificate: str = ""
    hello: bool = False
    drip: bool = False


CROWDS = (
    Crowd("silent", 2000),
    Crowd("a byte a second", 200, drip=True),
    Crowd("half a handshake", 200, hello=True),
    Crowd("idle, a certificate of another role", 200, "other"),
    Crowd("idle, the same certificate", 200, "good"),
    Crowd("idle after the hello", 200, "good", hello=True),
    Crowd("a byte a second, the same certificate", 200, "good", drip=True),
)


# -- the listeners, each in a process of its own -----------------------------------------------------------------------


def _office(folder: Path, stack: ExitStack, roles: Mapping[str, Role]) -> tuple[Authority, Vault]:
    """An authority, and an identity for each name."""
    vault = stack.enter_context(Vault.create(folder / "vault.db"))
    authority = Authority.create(folder / "ca", vault)
    for name, role in roles.items():
        directory = folder / name
        request = make_request(enrolment.key_in(directory))
        issued = authority.issue(Component(role, name), request, ["127.0.0.1"])
        enrolment.install(directory, issued, "https://127.0.0.1")
    return authority, vault


def _config_server(folder: Path, stack: ExitStack) -> Address:
    from asrcore.config_server.api import make_app
    from asrcore.config_server.web import WebServer

    roles = {"own": Role.CONFIG_SERVER, "good": Role.OPERATOR, "other": Role.AGENT}
    authority, vault = _office(folder, stack, roles)
    server = WebServer(make_app(vault, authority), Address("127.0.0.1", 0), Identity(folder / "own"))
    return stack.enter_context(server).address


def _master_target(folder: Path, stack: ExitStack) -> Address:
    from asrcore.remote.master_target import MasterTarget
    from asrcore.testing.memory import MemoryDriver, MemoryWorld

    _office(folder, stack, {"own": Role.MASTER_TARGET, "good": Role.PROCESS_SERVER, "other": Role.AGENT})
    MemoryWorld("away")
    site = stack.enter_context(MemoryDriver().connect("away", {"world": "away"}))
    return stack.enter_context(MasterTarget(site, Address("127.0.0.1", 0), Identity(folder / "own"))).address


def _hub(folder: Path, stack: ExitStack) -> Address:
    from asr_driver_physical.servers import identity as physical
    from asr_driver_physical.servers.hub import Gateway
    from asr_driver_physical.settings import SiteSettings

    with socket.create_server(("127.0.0.1", 0)) as free:
        address = Address("127.0.0.1", free.getsockname()[1])
    (folder / "spool").mkdir()
    settings = SiteSettings(address.host, address.port, folder / "identity", folder / "spool")
    identity = physical.Identity(settings.identity)
    for name in ("good", "other"):
        issued = identity.issue(name)
        identity.save(physical.ServerRecord(name, issued.fingerprint, "aa" * 16, {}))
        (folder / name).mkdir()
        for file, content in (("certificate", issued.certificate), ("key", issued.key)):
            (folder / name / f"{file}.pem").touch(0o600)
            (folder / name / f"{file}.pem").write_bytes(content)
        (folder / name / "ca.pem").write_bytes((identity.path / "ca.pem").read_bytes())
    stack.callback(Gateway("dc", settings, identity).close)
    return address


LISTENERS: Mapping[str, Callable[[Path, ExitStack], Address]] = {
    "config-server": _config_server,
    "master-target": _master_target,
    "physical-hub": _hub,
}


def _serve(kind: str, folder: Path) -> None:
    import asrcore.cli  # noqa: F401 - the settings of the garbage collector

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
    logging.basicConfig(level=logging.INFO, filename=folder / "log")
    with ExitStack() as stack:
        address = LISTENERS[kind](folder, stack)
        print(address.port, flush=True)
        sys.stdin.read()


# -- the clients -------------------------------------------------------------------------------------------------------


@attrs.frozen
class Client:
    """How a listener of a kind is spoken to."""

    kind: str
    folder: Path
    port: int

    def connect(self, name: str, seconds: float) -> ssl.SSLSocket:
        """With the certificate of that name."""
        context = Identity(self.folder / name).context(server=False)
        return context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), seconds))

    @property
    def first(self) -> bytes:
        """What a good client sends first."""
        if self.kind == "config-server":
            return b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"
        me = {"session": os.urandom(8).hex(), "silence": 600.0, "identity": "aa" * 16}
        return frames.Connection(dialled=True, me=me).hello()

    def is_let_in(self) -> bool:
        """One attempt of a good client."""
        try:
            with self.connect("good", WITHIN) as made:
                made.sendall(self.first)
                return made.recv(100).startswith((b"HTTP/1.1 200", b"ASRW"))
        except OSError:
            return False


def _hold(client: Client, crowd: Crowd) -> None:
    """Keep so many connections open until the end of the input."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    held: dict[int, tuple[socket.socket, Iterator[int]]] = {}
    opened = 0
    poll = select.poll()
    dripped = time.monotonic()
    drops = client.first if crowd.certificate else _client_hello()
    while not ended.is_set():
        for _ in range(min(50, crowd.count - len(held))):
            try:
                made = client.connect(crowd.certificate, 5) if crowd.certificate else _plain(client.port)
                rest = iter(drops)
                if crowd.hello:
                    made.sendall(client.first if crowd.certificate else drops)
                elif crowd.drip:
                    made.sendall(bytes([next(rest)]))
            except OSError:
                continue
            opened += 1
            held[made.fileno()] = made, rest
            poll.register(made, select.POLLIN | select.POLLRDHUP)
        if crowd.drip and time.monotonic() - dripped >= 1:
            dripped = time.monotonic()
            for made, rest in held.values():
                with contextlib.suppress(OSError):
                    made.sendall(bytes([next(rest, 0)]))
        for descriptor, event in poll.poll(20):
            made, _ = held[descriptor]
            if event == select.POLLIN and _has_more(made):
                continue
            poll.unregister(descriptor)
            del held[descriptor]
            made.close()
    print(opened, len(held), flush=True)


def _client_hello() -> bytes:
    """How a client begins TLS."""
    sent = ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.check_hostname = False
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent).do_handshake()
    return sent.read()


def _plain(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 5)


def _has_more(made: socket.socket) -> bool:
    made.settimeout(0.1)
    try:
        return made.recv(65536) != b""
    except (TimeoutError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False


# -- measuring ---------------------------------------------------------------------------------------------------------


@attrs.frozen
class Figures:
    """What one crowd did to one listener. `memory` and `log`: growth in bytes."""

    listener: str
    crowd: Crowd
    opened: int
    let_in: int
    tried: int
    slowest: float
    memory: int
    log: int

    @property
    def good(self) -> bool:
        """Whether all bars are met."""
        in_time = self.let_in == self.tried and self.slowest <= WITHIN
        return in_time and self.memory <= MEMORY and self.log <= LOG

    def row(self) -> str:
        """Of a table in Markdown."""
        name = f"{self.crowd.count:,} {self.crowd.name}"
        figures = f"{self.opened:,} | {self.let_in} of {self.tried} | {self.slowest:.2f} s"
        verdict = "" if self.good else " **missed**"
        return f"| {self.listener} | {name} | {figures} | {self.memory / MiB:.1f} MiB | {self.log:,} B{verdict} |"


@contextlib.contextmanager
def _child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.bench.listeners", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _memory(pid: int, what: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise ValueError(what)


def measure(kind: str, crowd: Crowd, seconds: float) -> Figures:
    """One listener, fresh, under one crowd."""
    with tempfile.TemporaryDirectory() as temporary, _child("serve", kind, temporary) as server:
        folder = Path(temporary)
        assert server.stdout is not None
        client = Client(kind, folder, int(server.stdout.readline()))
        for _ in range(20):
            assert client.is_let_in(), "it is not let in, though nothing else is connected"
        Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the peak counts from now on
        memory, log = _memory(server.pid, "VmRSS"), (folder / "log").stat().st_size
        took, let_in = [], 0
        holding = _child("hold", kind, temporary, str(client.port), str(CROWDS.index(crowd)))
        with holding as holder:
            time.sleep(3)
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                begun = time.monotonic()
                let_in += client.is_let_in()
                took.append(time.monotonic() - begun)
                time.sleep(_EVERY)
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.close()
            opened = int(holder.stdout.readline().split()[0])
        grown = _memory(server.pid, "VmHWM") - memory
        return Figures(kind, crowd, opened, let_in, len(took), max(took), grown, (folder / "log").stat().st_size - log)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.listeners", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="for each crowd (default: 20)")
    parser.add_argument("--only", choices=LISTENERS, help="one listener")
    given = parser.parse_args()
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, {DESCRIPTORS:,} descriptors\n")
    print("| listener | connections | opened | good client let in | slowest | memory | log |")
    print("|---|---|---|---|---|---|---|", flush=True)
    missed = 0
    for kind in [given.only] if given.only else LISTENERS:
        for crowd in CROWDS:
            if crowd.hello and crowd.certificate and kind == "config-server":  # HTTP has none
                continue
            figures = measure(kind, crowd, given.seconds)
            missed += not figures.good
            print(figures.row(), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        _serve(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["hold"]:
        where = Client(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        _hold(where, CROWDS[int(sys.argv[5])])
    else:
        sys.exit(main())
