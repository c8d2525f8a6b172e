"""A few seconds of `tests.fuzz.wire`; more by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="atheris is installed for one Python only")


def test_no_bytes_break_the_protocol(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.wire", "-max_total_time=5", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done " in done.stderr
