"""The tutorial's commands, run literally, on two hosts that reach each other over SSH.

A host is a site of the lab with an SSH server, its own `/root/.ssh`, `/etc/hosts` and vault directory. Steps 1 to 4
(packages, keys, firewall, file systems) are done differently here; from step 5 on every command is run. `Typist`
replaces what cannot be literal: addresses, and the service manager that a lab does not have.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from tests.docs._markdown import PROJECT, blocks
from tests.lab import Kind, Lab
from tests.system.private_mounts import PRIVATE, keep_apart
from tests.system.rig import wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

TUTORIAL = PROJECT / "docs/tutorial/two-hosts.md"
SITES = {"alpha": "a", "beta": "b"}
GUEST = "web1"
PATH = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
OWN = ("/root", "/var/lib")
"""Directories of the machine that each host changes privately."""


@attrs.frozen
class Typed:
    """A command and its host."""

    step: int
    host: str
    line: str


def commands() -> list[Typed]:
    """The tutorial's commands, from step 5 on."""
    found = []
    parts = re.split(r"^## (\d+)\. ", TUTORIAL.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        for block in blocks(text):
            if block.info != "console" or int(number) < 5:
                continue
            for line in block.text.splitlines():
                prompt = re.match(r"root@(alpha|beta)# (.+)", line)
                assert prompt, f"step {number}: no host in {line!r}"
                found.append(Typed(int(number), prompt[1], prompt[2]))
    return found


class Host:
    """One of the two hosts."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.name = name
        self.site = SITES[name]
        self.service: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        # A command that does not end in time is aborted, and prints the stack of each of its threads.
        self.environment = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", "PYTHONFAULTHANDLER": "1"}

    def run(self, line: str, *, check: bool = True, timeout: float = 240) -> str:
        """Run a line in the shell; returns its output."""
        limited = ["timeout", "--signal=ABRT", "--kill-after=10", f"{timeout}", "sh", "-c", line]
        done = self.lab.run_in(self.site, limited, timeout=timeout + 30, check=check, env=self.environment)
        return done.stdout + done.stderr

    def prepare(self) -> None:
        """Private directories, names, a replica directory, a key."""
        keep_apart(self.run, OWN)
        self.run("rm -rf /root/.ssh /var/lib/asrcore && mkdir -m 700 /root/.ssh /var/lib/asrcore")
        hosts = "".join(f"{self.lab.sites[site].address} {name}\n" for name, site in SITES.items())
        self.run(f"printf '127.0.0.1 localhost\n{hosts}' > {PRIVATE}/hosts")
        self.run(f"mount --bind {PRIVATE}/hosts /etc/hosts")
        self.run("mkdir -m 711 /srv/asr && mount --bind /srv/xfs /srv/asr && chmod 711 /srv/asr")
        self.run("ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519")
        self.run(f"dropbearkey -t ed25519 -f {PRIVATE}/host-key")

    def trust(self, other: Host) -> None:
        """As ssh-copy-id does: allow the other host to log in, and add its host key."""
        key = other.run("cat /root/.ssh/id_ed25519.pub").strip()
        self.run(f"echo '{key}' >> /root/.ssh/authorized_keys && chmod 600 /root/.ssh/authorized_keys")
        reported = other.run(f"dropbearkey -y -f {PRIVATE}/host-key")
        host_key = next(line for line in reported.splitlines() if line.startswith("ssh-"))
        self.run(f"echo '{other.name} {host_key}' >> /root/.ssh/known_hosts")

    def serve(self) -> None:
        """Start an SSH server for the other host."""
        address = self.lab.sites[self.site].address
        log = self.lab.host_path(self.site, f"{PRIVATE}/ssh.log")
        with log.open("wb") as output:
            self._server = self.lab.popen_in(
                self.site,
                ["dropbear", "-F", "-E", "-s", "-r", f"{PRIVATE}/host-key", "-P", "", "-p", f"{address}:22"],
                stdout=output.fileno(),
                stderr=output.fileno(),
                env=self.environment,
            )

    def start_service(self) -> None:
        """Run the unit's ExecStart."""
        with self.lab.host_path(self.site, f"{PRIVATE}/service.log").open("ab") as log:
            self.service = self.lab.popen_in(
                self.site, ["asr", "run"], stdout=log.fileno(), stderr=log.fileno(), env=self.environment
            )

    def stop_service(self) -> None:
        """Stop the service as systemd does."""
        if self.service is not None:
            self.service.send_signal(signal.SIGTERM)
            try:
                assert self.service.wait(60) == 0
            finally:
                self._end(self.service)
                self.service = None

    def close(self) -> None:
        """Stop the service and the SSH server."""
        for process in (self.service, self._server):
            if process is not None:
                self._end(process)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait(10)


@pytest.fixture
def hosts() -> Iterator[dict[str, Host]]:
    with Lab(f"tutorial-{os.getpid()}") as lab:
        found = {name: Host(lab, name) for name in SITES}
        alpha, beta = found.values()
        try:
            for host in found.values():
                host.prepare()
            alpha.trust(beta)
            beta.trust(alpha)
            for host in found.values():
                host.serve()
            yield found
        finally:
            for host in found.values():
                host.close()


class Typist:
    """Runs the commands, and the events at the hosts in between."""

    def __init__(self, hosts: dict[str, Host]) -> None:
        self.hosts = hosts
        self.lab = hosts["beta"].lab
        self.printed: list[tuple[Typed, str]] = []
        addresses = {f"10.1.0.{number}": self.lab.sites[site].address for number, site in ((1, "a"), (2, "b"))}
        self.instead: dict[str, Callable[[Host], str]] = {
            "systemctl daemon-reload": lambda _: "",
            "systemctl enable --now asr-run": self._enable,
            "systemctl disable --now asr-run": self._disable,
            "asr status --watch": lambda host: host.run("timeout --signal=INT 5 asr status --watch", check=False),
            f"virsh console {GUEST}-test": lambda host: host.run(f"virsh domstate {GUEST}-test"),
            f"asr event list {GUEST}": self._quarantined,
        }
        self.words = addresses

    def type(self, typed: Typed) -> None:
        """Run a command; it must not fail."""
        host = self.hosts[typed.host]
        if typed.line == f"asr failover unplanned {GUEST} --yes":
            self._lose_alpha()
        if typed.line in self.instead:
            self.printed.append((typed, self.instead[typed.line](host)))
            return
        line = re.sub(r"--point \S+", lambda _: f"--point {self._older_point(host)}", typed.line)
        for word, mine in self.words.items():
            line = line.replace(word, mine)
        self.printed.append((typed, host.run(line)))

    def _enable(self, host: Host) -> str:
        host.start_service()
        wait_for(lambda: "protected" in host.run("asr status"), "the service replicates", timeout=90, poll=0.5)
        time.sleep(6)  # seconds, for a cycle of the service
        return ""

    def _disable(self, host: Host) -> str:
        host.stop_service()
        return ""

    def _lose_alpha(self) -> None:
        if not self.lab.sites["a"].hypervisor_processes():
            return
        self.lab.cut()
        self.lab.site_down("a")

    def _older_point(self, host: Host) -> str:
        """The time of the oldest point, as people write it."""
        times: list[str] = re.findall(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*Z", host.run(f"asr point list {GUEST} --json")
        )
        return min(times)

    def _quarantined(self, host: Host) -> str:
        self.lab.site_up("a")
        self.lab.restore()

        def reported() -> str:
            events = host.run(f"asr event list {GUEST}")
            return events if "the machine came back at alpha and was quarantined" in events else ""

        wait_for(reported, "alpha's machine is quarantined", timeout=120, poll=1)
        return reported()


@pytest.mark.long
def test_the_tutorial_to_the_letter(hosts: dict[str, Host]) -> None:
    lab = hosts["alpha"].lab
    lab.define_guest("a", Kind.BIOS_DIRECT, GUEST, autostart=True)
    lab.start("a", GUEST)
    lab.wait_row("a", GUEST, 10)
    listed = hosts["beta"].run("virsh -c qemu+ssh://root@alpha/system list --all")
    assert GUEST in listed
    assert hosts["beta"].run("asr doctor").strip() == "nothing is missing"
    typist = Typist(hosts)
    typed = commands()
    assert {item.step for item in typed} == set(range(5, 13))
    for item in typed:
        typist.type(item)

    shown = [text for item, text in typist.printed if (item.step, item.line) == (5, "asr site show beta")]
    assert "replica kind: reflink" in shown[0]
    tested = [text for item, text in typist.printed if item.line.startswith("virsh console")]
    assert "running" in tested[0]
    status = hosts["beta"].run("asr status")
    assert re.search(rf"{GUEST}\s.*protected.*alpha.*beta", status), status
    home = lab.console("a", GUEST)
    away = lab.console("b", GUEST)
    assert home.audits[-1].intact
    assert away.audits[-1].intact
    assert home.audits[-1].last >= away.down[-1].last, "the planned failback lost no data"
    lab.wait_row("a", GUEST, home.audits[-1].last + 5)


def test_readme_names_no_command_that_the_tutorial_does_not() -> None:
    """So that the README's commands are also run."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    block = next(item.text for item in blocks(text) if "asr init" in item.text)
    short = {re.split(r"\s+#|\s+&", line[2:])[0].strip() for line in block.splitlines() if line.startswith("$ ")}
    tried = {item.line for item in commands()}
    assert short - tried == {"asr run"}, "the tutorial's unit starts the service"
