"""The `asr` command inside a site of the lab, as an operator there would use it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asrcore.engine import Engine
from tests.lab import Lab

__all__ = ["AsrCli", "AsrFailed"]

VAULT = "/srv/asr/vault.db"
ASR = Path(sys.executable).with_name("asr")


class AsrFailed(Exception):
    """`asr` ended with an error; `error` is the catalogue's entry, None if none was printed."""

    def __init__(self, words: tuple[str, ...], done: subprocess.CompletedProcess[str]) -> None:
        super().__init__(f"asr {' '.join(words)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        self.exit_code = done.returncode
        try:
            self.error: Mapping[str, Any] | None = json.loads(done.stdout)["error"]
        except (ValueError, KeyError, TypeError):
            self.error = None


class AsrCli:
    """One vault, at one site at a time; `site` is where the engine runs."""

    def __init__(
        self, lab: Lab, site: str = "b", environment: Mapping[str, str] | None = None, vault: str = VAULT
    ) -> None:
        self.lab = lab
        self.site = site
        self.vault = vault
        self.environment = dict(environment or {})
        self._service: subprocess.Popen[bytes] | None = None

    # -- verbs -----------------------------------------------------------------------------------------------------

    def __call__(self, *words: str, timeout: float = 300) -> Any:
        """Run a verb with --json; returns its document. Raises AsrFailed."""
        done = self.run(*words, "--json", timeout=timeout)
        if done.returncode:
            raise AsrFailed(words, done)
        return json.loads(done.stdout)

    def run(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a verb without --json."""
        command = [str(ASR), "--vault", self.vault, *words]
        return self.lab.run_in(self.site, command, timeout=timeout, check=False, env=self.environment or None)

    def result(self, *words: str, timeout: float = 300) -> dict[str, Any]:
        """Run a verb that is a job; returns its facts."""
        facts = self(*words, timeout=timeout)["result"]
        assert isinstance(facts, dict)
        return facts

    def status(self, machine: str) -> dict[str, Any]:
        """The machine's entry of `asr status`."""
        return next(item for item in self("status") if item["machine"] == machine)

    # -- set-up ----------------------------------------------------------------------------------------------------

    def init(self, replica_dir: str = "/srv/xfs") -> None:
        """A vault here, and both sites, as seen from here."""
        self.run("init").check_returncode()
        for name in ("a", "b"):
            settings = [f"--set={key}={value}" for key, value in self._settings(name, replica_dir).items() if value]
            self("site", "add", name, "--driver", "libvirt", *settings)

    def _settings(self, name: str, replica_dir: str) -> dict[str, str]:
        if name == self.site:
            return {"uri": "qemu:///system", "replica_dir": replica_dir}
        return {"uri": self.lab.sites[name].remote_uri, "replica_dir": ""}

    def move_to(self, site: str, replica_dir: str = "/srv/xfs") -> None:
        """Move the vault to the other site and set how the sites are reached from there."""
        parcel = "/srv/asr/parcel.db"
        self("vault", "move", parcel)
        there = self.lab.host_path(site, self.vault)
        there.parent.mkdir(exist_ok=True)
        shutil.copy(self.lab.host_path(self.site, parcel), there)  # instead of scp
        self.lab.host_path(self.site, parcel).unlink()
        self.site = site
        for name in ("a", "b"):
            settings = [f"--set={key}={value}" for key, value in self._settings(name, replica_dir).items()]
            self("site", "update", name, *settings)

    # -- the service -----------------------------------------------------------------------------------------------

    def start_service(self) -> None:
        """`asr run` in the background; its log is a file at the site."""
        with self._log_path.open("ab") as log:
            self._service = self.lab.popen_in(
                self.site,
                [str(ASR), "--vault", self.vault, "run"],
                stdout=log.fileno(),
                stderr=log.fileno(),
                env=self.environment or None,
            )

    def stop_service(self, number: int = signal.SIGTERM) -> None:
        """SIGTERM, or another signal, and wait."""
        if self._service is not None:
            self._service.send_signal(number)
            try:
                self._service.wait(60)
            except subprocess.TimeoutExpired:
                self._service.kill()
                self._service.wait(10)
                raise
            finally:
                self._service = None

    def kill_service(self) -> None:
        """SIGKILL."""
        if self._service is not None:
            self._service.kill()
            self._service.wait(10)
            self._service = None

    @property
    def _log_path(self) -> Path:
        return self.lab.host_path(self.site, self.vault).with_name("run.log")

    def log(self) -> str:
        """The service's log."""
        path = self._log_path
        return path.read_text(errors="replace") if path.exists() else ""

    def library(self) -> Engine:
        """The vault through the library, for reading without starting a process."""
        # Not through host_path, which uses /proc: the vault resolves links in its path.
        return Engine.open(str(self.lab.sites[self.site].disk_dir / self.vault.lstrip("/")))
