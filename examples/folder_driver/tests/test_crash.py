"""The driver is killed at each of its crash points; the killed step is repeated, and the end is the same."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import asr_driver_folder
import pytest
import worker
from rig import make_machine

from asrcore.model.machine import Firmware, Machine
from asrcore.units import MiB

SOURCE = Path(asr_driver_folder.__file__).parent
PLACES = sorted({name for file in SOURCE.glob("*.py") for name in re.findall(r'reach\("(.+?)"\)', file.read_text())})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for site in ("home", "away"):
        (tmp_path / site).mkdir()
        make_machine(tmp_path / site, Machine("web1", "web1", 1, 0, Firmware.BIOS, ()), {"vda": MiB, "vdb": MiB})
    shutil.copytree(tmp_path / "away" / "web1", tmp_path / "twin")
    return tmp_path


def run(folder: Path, **environment: str) -> int:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, worker.__file__, folder], env=variables, timeout=60, check=False).returncode


def check_end(folder: Path) -> None:
    away = folder / "away"
    assert worker.content(away / "web1") == worker.content(folder / "home" / "web1"), "the machine holds its point"
    assert (away / "web1" / "made-of").read_text() == "r1"
    assert worker.content(away / ".asr" / "aside" / "web1@r1") == worker.content(folder / "twin")
    for gone in ("replicas", "new", "trash"):
        assert list((away / ".asr" / gone).iterdir()) == [], gone
    assert sorted(path.name for path in away.iterdir()) == [".asr", "web1"]
    assert len(list((folder / "home" / ".asr" / "snapshots" / "web1").iterdir())) == 1, "one mark"


def test_it_reaches_every_crash_point(folder: Path) -> None:
    log = folder / "log"
    assert run(folder, ASRCORE_CRASH_LOG=str(log)) == 0
    assert sorted({*log.read_text().split()}) == PLACES
    check_end(folder)


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_step_is_repeated(place: str, folder: Path) -> None:
    assert run(folder, ASRCORE_CRASH_AT=place) == -signal.SIGKILL
    assert run(folder) == 0
    check_end(folder)
