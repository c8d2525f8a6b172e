"""A vault with two machines, and the trace of their jobs."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.jobs import job_procedures


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jobs") / "vault.db"
    job_procedures.make_vault(path)
    return path


@pytest.fixture
def path(made_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made_once, tmp_path / "vault.db"))


@pytest.fixture
def trace(path: Path) -> job_procedures.Trace:
    return job_procedures.Trace(path)


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Waits until a condition is true."""

    def wait(true: Callable[[], bool]) -> None:
        ends, pause = time.monotonic() + 20, threading.Event()
        while not true():
            assert time.monotonic() < ends, "it never happened"
            pause.wait(0.01)

    return wait
