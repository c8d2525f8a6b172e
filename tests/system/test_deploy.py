"""The commands of `deploy two sites`, run literally, and the units' services, run as systemd would.

Site b of the lab is the recovery site: PostgreSQL, configuration server and master target; site a has a process server.
There is no systemd: `Host.enable` applies the units' user, capabilities, directories and environment.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs._markdown import PROJECT, blocks
from tests.lab import Kind, Lab
from tests.system.private_mounts import PRIVATE, keep_apart
from tests.system.rig import wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

PAGE = (PROJECT / "docs/how-to/deploy-two-sites.md").read_text("utf-8")
UNITS = PROJECT / "deploy/systemd"
GUEST = "web1"
PASSWORD = "Pa55word-of-the-vault"
SITE = {"vault": "b", "config": "b", "beta": "b", "ps1": "a"}
NAMES = {"b": ("vault.example", "config.example", "beta.example"), "a": ("alpha.example",)}
OWN = ("/etc", "/opt", "/root", "/usr/local", "/var/lib")
"""Directories of the machine that a host may change; its changes stay private."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READY = re.compile(rb"Ctrl-C")
POSTGRES = f"{PRIVATE}/postgres"


def indented(first: str) -> str:
    """The page's indented block that starts with `first`."""
    (found,) = [text for text in re.findall(r"(?:^    .+\n)+", PAGE, re.MULTILINE) if text.lstrip().startswith(first)]
    return "".join(line[4:] + "\n" for line in found.splitlines())


def commands() -> list[tuple[str, str]]:
    """Host and line of each command on the page."""
    found = []
    for block in blocks(PAGE):
        for line in block.text.splitlines() if block.info == "console" else ():
            prompt = re.fullmatch(r"root@(\w+)# (.+)", line)
            assert prompt, f"no host in {line!r}"
            found.append((prompt[1], prompt[2]))
    return found


def unreachable(path: Path) -> list[str]:
    """Directories above a path that only their owner may enter: on some machines Python is in root's home."""
    return [str(above) for above in reversed(path.parents) if not above.stat().st_mode & 0o001]


class Host:
    """A site of the lab, prepared as the page requires of a host."""

    def __init__(self, lab: Lab, site: str) -> None:
        self.lab = lab
        self.site = site
        self.services: dict[str, subprocess.Popen[bytes]] = {}
        self.started: set[str] = set()

    def run(self, line: str, *, text: str | None = None) -> str:
        """Run a line in a root shell; returns its output."""
        environment = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", "PGHOST": POSTGRES}
        if not line.startswith("runuser -u postgres"):
            del environment["PGHOST"]
        words = ["setsid", "--wait", "sh", "-c", f"cd /root; {line}"]
        done = self.lab.run_in(self.site, words, timeout=240, text=text, env=environment)
        return done.stdout + done.stderr

    def prepare(self) -> None:
        """Private directories, host names, and asrcore at the page's path; discarded with the lab."""
        needed = Path(sys.executable).resolve(), PROJECT / "pyproject.toml", Path(sys.prefix) / "pyvenv.cfg"
        hidden = list(dict.fromkeys(directory for path in needed for directory in unreachable(path)))
        keep_apart(self.run, [*OWN, *hidden])
        for path in hidden:
            self.run(f"chmod o+x {path}")
        hosts = "127.0.0.1 localhost\n"
        for site, names in NAMES.items():
            hosts += f"{self.lab.sites[site].address} {' '.join(names)}\n"
        self.run("cat > /etc/hosts", text=hosts)
        self.run(f"mkdir -p /opt/asrcore && ln -s {Path(sys.executable).parent} /opt/asrcore/bin")
        self.run("mkdir -m 711 /srv/asr && mount --bind /srv/xfs /srv/asr && chmod 711 /srv/asr")
        self.run(
            "mkdir /etc/asrcore && install -m 600 /dev/null /etc/asrcore/asr.env && cat > /etc/asrcore/asr.env",
            text=indented("ASR_VAULT").replace("the password", PASSWORD),
        )

    def start_postgres(self) -> None:
        """As Debian's package does it, changed as described on the page."""
        binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self.run(f"install -d -o postgres {POSTGRES}")
        self.run(
            f"cd {POSTGRES} && openssl req -x509 -newkey rsa:2048 -noenc -keyout key.pem -out cert.pem "
            "-subj /CN=vault.example -addext subjectAltName=DNS:vault.example && chown postgres key.pem"
        )
        as_postgres = f"cd {POSTGRES} && runuser -u postgres -- {binaries}"
        self.run(f"{as_postgres}/initdb -D data -A peer --no-sync")
        self.run(f"cat >> {POSTGRES}/data/pg_hba.conf", text=indented("hostssl"))
        settings = {"listen_addresses": "*", "unix_socket_directories": POSTGRES, "fsync": "off", "ssl": "on"}
        settings |= {"ssl_cert_file": f"{POSTGRES}/cert.pem", "ssl_key_file": f"{POSTGRES}/key.pem"}
        lines = "".join(f"{name} = '{value}'\n" for name, value in settings.items())
        self.run(f"cat >> {POSTGRES}/data/postgresql.conf", text=lines)
        self.run(f"{as_postgres}/pg_ctl start -w -s -D data -l log")

    def stop_postgres(self) -> None:
        """Stop it immediately."""
        binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self.run(f"cd {POSTGRES} && runuser -u postgres -- {binaries}/pg_ctl stop -m immediate -s -D data")

    def enable(self, name: str) -> None:
        """What systemd does for a unit, until the service is ready; a timer's service runs once."""
        name, instance = re.fullmatch(r"([^@]+)(?:@([^.]+)\.timer)?", name).groups()  # type: ignore[union-attr]
        self.started.add(name)
        unit = configparser.ConfigParser(interpolation=None, strict=False)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read_string((UNITS / f"{name}{'@' if instance else ''}.service").read_text("utf-8"))
        service = unit["Service"]
        user = service.get("User", "root")
        environment = {"PATH": PATH, "LC_ALL": "C.UTF-8"}
        if "EnvironmentFile" in service:
            given = self.run(f"cat {service['EnvironmentFile']}")
            environment |= dict(line.split("=", 1) for line in shlex.split(given))
        before = self._directory(service, user)
        rights = ["--no-new-privs"] if service.getboolean("NoNewPrivileges", False) else []
        if user != "root":
            environment |= {"HOME": self.run(f"getent passwd {user}").split(":")[5], "USER": user}
            kept = service.get("AmbientCapabilities", "").lower().replace("cap_", "+")
            rights += [f"--reuid={user}", f"--regid={user}", "--init-groups"]
            rights += ["--bounding-set=-all," + kept, f"--inh-caps=-all,{kept}", f"--ambient-caps=-all,{kept}"]
        words = " ".join(["exec", "setpriv", *rights, service["ExecStart"].replace("%i", instance or "")])
        enter = ["unshare", "--mount", "sh", "-c", f"cd /; {before}{words}"]
        if service["Type"] == "oneshot":
            self.lab.run_in(self.site, enter, env=environment, timeout=60)
            return
        log = self.lab.host_path(self.site, f"{PRIVATE}/{name}.log")
        with log.open("wb") as file:
            process = self.lab.popen_in(self.site, enter, stdout=file.fileno(), stderr=file.fileno(), env=environment)
        self.services[name] = process
        wait_for(lambda: READY.search(log.read_bytes()) or process.poll() is not None, f"{name} is ready", timeout=60)
        assert process.poll() is None, log.read_text()

    def _directory(self, service: configparser.SectionProxy, user: str) -> str:
        """Make the state directory; if it belongs to another user, all of it is given to the service's user
        (systemd.exec). Returns what else must be run inside the service's own mounts."""
        path = f"/var/lib/{service['StateDirectory']}" if "StateDirectory" in service else ""
        if path:
            self.run(f"mkdir -p {path} && test $(stat -c %U {path}) = {user} || chown -R {user}:{user} {path}")
            self.run(f"chmod {service['StateDirectoryMode']} {path}")
        if service.get("ProtectSystem") != "strict":
            return ""
        return f"mount --bind {path} {path}; for at in / {' '.join(OWN)}; do mount -o remount,bind,ro $at; done; "

    def close(self) -> None:
        """Stop the services cleanly."""
        for name, process in reversed(self.services.items()):
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(60) == 0, name
            finally:
                process.kill()
                process.wait(10)


@pytest.fixture
def hosts() -> Iterator[dict[str, Host]]:
    with Lab(f"deploy-{os.getpid()}") as lab:
        found = {site: Host(lab, site) for site in NAMES}
        for host in found.values():
            host.prepare()
        found["b"].start_postgres()
        try:
            for host in found.values():
                host.run("cat > /etc/asrcore/postgresql.pem", text=found["b"].run(f"cat {POSTGRES}/cert.pem"))
            try:
                yield found
            finally:
                found["a"].close()
                found["b"].close()
        finally:
            found["b"].stop_postgres()


class Typist:
    """Runs the commands. A shell of each host keeps its settings: `kept`."""

    def __init__(self, hosts: dict[str, Host]) -> None:
        self.hosts = hosts
        self.kept = dict.fromkeys(SITE, "")
        addresses = hosts["a"].lab.sites
        # The lab's hosts have no SSH: libvirt is reached by TCP there.
        self.words = {"qemu+ssh://root@alpha.example/system": f"qemu+tcp://{addresses['a'].address}/system"}
        self.words["tcp:10.1.0.1"] = f"tcp:{addresses['a'].address}"

    def type(self, name: str, line: str) -> str:
        host = self.hosts[SITE[name]]
        if line.startswith("systemctl enable --now "):
            for unit in line.split()[3:]:
                host.enable(unit)
            return ""
        if line.startswith(("set -a", "umask")):
            self.kept[name] += line + "; "
            return ""
        for word, mine in self.words.items():
            line = line.replace(word, mine)
        if line.startswith("runuser -u postgres"):
            return host.run(line, text=f"{PASSWORD}\n{PASSWORD}\n")
        printed = host.run(self.kept[name] + line)
        if made := re.search(r"> (\S+\.token)$", line):
            assert host.run(f"stat -c %a /root/{made[1]}").strip() == "600"
            for other in self.hosts.values():  # copied to the other host
                other.run(f"umask 077; cat > /root/{made[1]}", text=host.run(f"cat /root/{made[1]}"))
        return printed


@pytest.mark.long
def test_the_page_to_the_letter(hosts: dict[str, Host]) -> None:
    lab = hosts["a"].lab
    lab.define_guest("a", Kind.BIOS_DIRECT, GUEST)
    lab.start("a", GUEST)
    typist = Typist(hosts)
    hosts["a"].run("ln -s /opt/asrcore/bin/asr /usr/local/bin/asr")  # "on each host"
    shown = ""
    for name, line in commands():
        shown = typist.type(name, line)
        assert PASSWORD not in shown
    assert f'"machine":"{GUEST}"' in shown, "curl shows the machine"

    listed = typist.type("ps1", "asr server list")
    assert re.search(r"process-server\s.*up", listed), listed
    assert re.search(r"master-target\s.*up", listed), listed
    seen = typist.type("ps1", "asr status --json")
    assert '"state": "protected"' in seen, seen
    # Several on one host: a restart of one does not take away another one's files.
    for again in ("asr-config-server", "asr-master-target"):
        hosts["b"].services[again].send_signal(signal.SIGTERM)
        assert hosts["b"].services.pop(again).wait(60) == 0
        hosts["b"].enable(again)
    typist.type(*next(item for item in commands() if "token operator" in item[1]))
    assert GUEST in typist.type(*commands()[-1])

    # The page's alternative for small set-ups.
    hosts["a"].run("/opt/asrcore/bin/asr init")
    hosts["a"].enable("asr-run")
    started = {name for host in hosts.values() for name in host.started}
    assert started == {re.sub(r"@?\.service", "", unit.name) for unit in UNITS.glob("*.service")}
