"""Generates docs/images/status.svg: python -m tests.docs.status_picture.

The picture shows the output of `asr status` in a terminal, from a real run: the replication service with three machines
on sites in memory, one in test failover and one whose site is disconnected.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

import asrcore
from asrcore.plugins import Plugins
from asrcore.testing import memory
from asrcore.testing.memory import MemoryWorld
from asrcore.units import MiB
from tests.docs._markdown import PROJECT

PICTURE = PROJECT / "docs" / "images" / "status.svg"
COLUMNS = 122
CELL = 12.2  # width of a character in Rich's picture
SECONDS = 35  # by then the RPO of the lost machine exceeds the limit of its policy


def run(vault: str) -> str:
    """Protect three machines, let time pass, and return what `asr status` shows."""
    worlds = [MemoryWorld(name) for name in ("alpha", "gamma", "beta")]
    plugins = Plugins()
    plugins.register("memory", memory)
    stop = threading.Event()
    with asrcore.Engine.create(vault, plugins) as engine:
        engine.start()
        service = threading.Thread(target=engine.run, args=(stop,))
        for world in worlds:
            world.configure(networks={"lan"})
            engine.add_site(world.name, "memory", {"world": world.name})
        engine.vault.add_policy(asrcore.Policy("gold", interval=5.0, point_interval=5.0))
        for site, name, size in (("alpha", "db1", 96), ("alpha", "web1", 48), ("gamma", "mail1", 32)):
            machine = MemoryWorld.find(site).add_machine(name, {"vda": 2 * size * MiB})  # type: ignore[union-attr]
            machine.write("vda", 0, os.urandom(size * MiB))
            engine.wait(engine.protect(name, source=site, target="beta", policy="gold"))
        service.start()
        try:
            stop.wait(8)
            worlds[1].cut()
            engine.wait(engine.failover_test("web1"))
            stop.wait(SECONDS)
            return shown(vault)
        finally:
            stop.set()
            service.join()


def shown(vault: str) -> str:
    """What `asr status` prints in a terminal of `COLUMNS`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    command = [sys.executable, "-c", "from asrcore.cli import main; main()", "--vault", vault, "status"]
    with subprocess.Popen(command, stdout=theirs, env={**os.environ, "TERM": "xterm-256color"}) as process:
        os.close(theirs)
        printed = b""
        try:
            while piece := os.read(ours, 65536):
                printed += piece
        except OSError:  # Linux reports a closed other end like this
            pass
        finally:
            os.close(ours)
        assert process.wait(60) == 0
    return printed.decode().replace("\r\n", "\n")


def picture(text: str) -> str:
    """The text as an SVG that needs no external font."""
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"))  # noqa: SIM115 - until the end
    console.print(Text.from_ansi(f"$ asr status\n{text.rstrip()}"))
    svg = console.export_svg(title="asr status", theme=MONOKAI)
    svg = re.sub(r'x="0" (y="[\d.]+") textLength="([\d.]+)"( [^>]+>)((?:&#160;)+)', _indented, svg)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code,", "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas,")
    return "".join(f"{line.rstrip()}\n" for line in svg.splitlines())


def _indented(line: re.Match[str]) -> str:
    """A line that starts further right instead of with spaces, which some programs omit (librsvg 2.54)."""
    place, length, rest, spaces = line.groups()
    width = spaces.count(";") * CELL
    return f'x="{width:g}" {place} textLength="{float(length) - width:g}"{rest}'


def main() -> None:
    # The first line of the status names the engine: this process stands for `asr run` on a host of the documentation.
    sys.argv = ["asr", "run"]
    socket.gethostname = lambda: "beta"
    with tempfile.TemporaryDirectory() as folder:
        text = run(f"{folder}/vault.db")
    print(text)
    PICTURE.write_text(picture(text), encoding="utf-8")


if __name__ == "__main__":
    main()
