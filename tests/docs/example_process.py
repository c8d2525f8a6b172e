"""Runs an example as its reader would: in a separate process, without the environment of these tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.docs import _markdown

__all__ = ["run"]


def run(*command: str | Path, cwd: Path) -> str:
    """Run Python with these arguments; returns its output."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("ASR", "PYTEST"))}
    variables["PYTHONPATH"] = str(_markdown.PROJECT)
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
