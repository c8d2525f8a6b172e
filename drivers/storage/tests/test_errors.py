"""Errors of storage say what is really short."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from asr_storage.files.errors import missing_space, storage_errors
from asrcore.errors import TargetFull


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    """A file system with space and without inodes."""
    place = tmp_path / "few"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=4,size=8m", "asr", place], check=False)
    if done.returncode:
        pytest.skip("mounting needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_inodes_that_are_used_up_are_named(few_inodes: Path) -> None:
    def fill() -> None:
        with storage_errors("b", few_inodes, "writing"):
            for number in range(10):
                (few_inodes / str(number)).touch()

    with pytest.raises(TargetFull, match="no space left") as caught:
        fill()
    assert "inodes" in caught.value.cause_text


def test_a_full_file_system_is_not_one_without_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"f_bavail": 50, "f_frsize": 4096, "f_files": 100, "f_favail": 0}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**short))
    assert "204800 bytes" in missing_space(tmp_path, 10**12)


def test_a_quota_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetFull) as caught, storage_errors("b", tmp_path, "writing"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "quota" in caught.value.cause_text
