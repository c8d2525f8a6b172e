"""The mobility service as a program: `run` by systemd; `probe`, `remove` and `thaw` when it is pushed, or manually."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from asr_mobility import __version__, facts
from asr_mobility.channel import Channel, ChannelClosed
from asr_mobility.disks import find_disks
from asr_mobility.freeze import thaw_all
from asr_mobility.service import Service
from asr_mobility.tracker import remove_pins

HOME = Path("/opt/asr-mobility")
UNIT = Path("/etc/systemd/system/asr-mobility.service")
LINKS = Path("/etc/systemd/network")
CONNECT_SECONDS = 20.0
RETRY_SECONDS = (0.5, 1, 2, 5)
NOT_THIS_MACHINE = 78  # EX_CONFIG: systemd does not start it again


def say(text: str) -> None:
    """One line for the journal."""
    print(text, file=sys.stderr, flush=True)


def _settings(home: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((home / "config.json").read_text())
    return settings


def _context(home: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate names a role, and is signed by the site's authority
    context.load_verify_locations(str(home / "ca.pem"))
    context.load_cert_chain(str(home / "agent.pem"))  # one file for both, so that they are renewed at once
    return context


def _dial(server: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    host, _, port = server.rpartition(":")
    plain = socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        carrier = context.wrap_socket(plain)
    except BaseException:
        plain.close()
        raise
    shown: Any = carrier.getpeercert() or {}
    names = [str(value) for kind, value in shown.get("subjectAltName", ()) if kind == "URI"]
    if not any(name.startswith("asr://process-server/") for name in names):
        carrier.close()
        raise ssl.SSLError("the peer's certificate is not a process server's: {}".format(", ".join(names)))
    return carrier


def _run(home: Path) -> int:
    settings = _settings(home)
    if settings["identity"] != facts.identity():
        say(
            "this machine is not the one enrolled as {}, but a copy of its disks. The service stops.".format(
                settings["name"]
            )
        )
        return NOT_THIS_MACHINE
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    service = Service(home, capture_memory=int(settings["capture_memory"]), bandwidth=float(settings["bandwidth"]))
    me = {"name": settings["name"], "identity": settings["identity"], "version": __version__}
    servers = [str(server) for server in settings["servers"]]
    attempt = turn = 0
    while not stop.is_set():
        server = servers[turn % len(servers)]
        try:
            carrier = _dial(server, _context(home))
            channel = Channel(carrier, dialled=True, me={**me, "boot": facts.boot_id()}, serve=service.serve)
        except (OSError, ValueError, ChannelClosed) as problem:
            if attempt < len(RETRY_SECONDS):
                say(f"{server}: {problem}")
            turn += 1
            if turn % len(servers) == 0:  # none has answered
                stop.wait(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
                attempt += 1
            continue
        say(f"connected to {server}")
        since = time.monotonic()
        while not stop.is_set() and not channel.wait_ended(0.5):
            pass
        if stop.is_set():
            channel.close()
        else:
            say(f"disconnected: {channel.reason}")
        if time.monotonic() - since > 10:
            attempt = 0
        else:  # it may refuse this server; another may accept it
            attempt += 1
            turn += 1
        stop.wait(RETRY_SECONDS[0])
    return 0


def _remove(home: Path) -> int:
    """Delete everything: service, files, names in bpffs. The kernel drops the program with its last name."""
    if UNIT.exists():
        subprocess.run(["systemctl", "disable", "--quiet", "--now", UNIT.name], check=False, timeout=60)
        UNIT.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=False, timeout=60)
    thaw_all([disk.name for disk in find_disks()])
    remove_pins()
    for path in LINKS.glob("10-asr-*.link"):
        path.unlink()
    shutil.rmtree(home, ignore_errors=True)
    return 0


def main(words: list[str] | None = None) -> int:
    """The program; gives its exit status."""
    parser = argparse.ArgumentParser(prog="asr-mobility", description=__doc__)
    parser.add_argument("--home", type=Path, default=HOME, help="directory with config.json and certificates")
    parser.add_argument("do", choices=("run", "probe", "remove", "thaw", "version"))
    given = parser.parse_args(words)
    if given.do == "version":
        print(__version__)
        return 0
    if given.do == "probe":
        print(json.dumps(facts.readiness()))
        return 0
    if os.geteuid() != 0:
        say("this needs root")
        return 1
    if given.do == "remove":
        return _remove(given.home)
    if given.do == "thaw":
        thaw_all([disk.name for disk in find_disks()])
        return 0
    with suppress(KeyboardInterrupt):
        return _run(given.home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
