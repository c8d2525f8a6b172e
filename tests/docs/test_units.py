"""The systemd units are well-formed, and their commands exist in `asr`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from asrcore.wire.gate import Places
from tests.docs._markdown import PROJECT

UNITS = sorted((PROJECT / "deploy" / "systemd").iterdir())
INSTALLED = "/opt/asrcore/bin/asr"


def command_of(unit: Path) -> list[str]:
    found = re.search(r"^ExecStart=(.*)$", unit.read_text("utf-8"), re.MULTILINE)
    return found[1].split() if found else []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    asr = tmp_path / "asr"
    asr.write_text("#!/bin/sh\n")
    asr.chmod(0o755)
    copies = []
    for unit in UNITS:
        copy = tmp_path / unit.name.replace("@", "@process-server")
        copy.write_text(unit.read_text("utf-8").replace(INSTALLED, str(asr)))
        copies.append(str(copy))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *copies],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", [unit for unit in UNITS if command_of(unit)], ids=lambda unit: str(unit.name))
def test_the_command_is_one_that_asr_knows(unit: Path) -> None:
    program, verb, *words = command_of(unit)
    assert program == INSTALLED
    code = "from asrcore.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", code, verb, "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    for word in words:
        if word.startswith("--"):
            assert word in shown, word


@pytest.mark.parametrize(
    "unit", [unit for unit in UNITS if "Restart=always" in unit.read_text("utf-8")], ids=lambda unit: str(unit.name)
)
def test_every_service_may_open_files_for_all_places_of_its_listeners(unit: Path) -> None:
    (limit,) = re.findall(r"^LimitNOFILE=(\d+)$", unit.read_text("utf-8"), re.MULTILINE)
    places = Places(most=10_000)
    assert places.within(int(limit)) == places


def test_no_two_users_share_a_directory() -> None:
    """systemd gives a whole StateDirectory to the user of the service that starts, and denies access to others."""
    users: dict[str, set[str]] = {}
    for unit in UNITS:
        text = unit.read_text("utf-8")
        user = re.findall(r"^User=(.*)$", text, re.MULTILINE) or ["root"]
        used = set(re.findall(r"/var/lib/([\w-]+)", "\n".join(command_of(unit))))
        used |= set(re.findall(r"^StateDirectory=(.*)$", text, re.MULTILINE))
        for directory in used:
            users.setdefault(directory, set()).update(user)
    assert users == {"asrcore": {"root"}, "asrcore-config": {"asrcore"}}


def test_every_unit_is_in_the_documentation() -> None:
    page = (PROJECT / "docs" / "how-to" / "deploy-two-sites.md").read_text("utf-8")
    for unit in UNITS:
        assert unit.name in page


@pytest.mark.parametrize("name", ["asr-run", "asr-process-server", "asr-master-target"])
def test_views_are_closed_before_machines_are_suspended_at_the_shutdown_of_a_host(name: str) -> None:
    """Units stop in the reverse order; libvirt refuses `managedsave` while a view is open."""
    (unit,) = (unit for unit in UNITS if unit.name == f"{name}.service")
    after = re.search(r"^After=(.*)$", unit.read_text("utf-8"), re.MULTILINE)
    assert after is not None
    assert {"libvirt-guests.service", "libvirtd.service", "virtqemud.service"} <= set(after[1].split())
