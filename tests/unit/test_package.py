"""`import asrcore` is fast and provides the names that the README uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

import asrcore
from asrcore.engine import Engine
from asrcore.model.policy import Policy
from asrcore.plugins import load


def test_public_names_are_those_of_their_modules() -> None:
    assert (asrcore.Engine, asrcore.Policy, asrcore.load_plugins) == (Engine, Policy, load)
    assert set(asrcore.__all__) <= set(dir(asrcore))


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Enigne'"):
        asrcore.Enigne  # noqa: B018


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, asrcore; print(sorted({'sqlalchemy', 'dbos', 'pluggy', 'attrs'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
