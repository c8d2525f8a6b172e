"""An earlier copy of a vault: taken while it is in use, put back later, as a person restores a backup."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

__all__ = ["put_back", "take_copy"]

_BESIDE = (".incarnation", ".jobs")  # what a copy of the whole directory brings back as well


def take_copy(vault: Path, copy: Path) -> Path:
    """Copy a vault in a file as `sqlite3 vault.db ".backup copy"` does, and the files beside it; returns `copy`."""
    with closing(sqlite3.connect(vault)) as there, closing(sqlite3.connect(copy)) as here:
        there.backup(here)
    for suffix in _BESIDE:
        beside = vault.with_name(vault.name + suffix)
        if beside.exists():
            shutil.copy(beside, copy.with_name(copy.name + suffix))
    return copy


def put_back(copy: Path, vault: Path, *, directory: bool = False) -> None:
    """Replace a vault that no process has open. `directory`: with the files beside it, as a snapshot of the file system
    or of the whole host does; then only the sites show that the vault is older."""
    for suffix in ("-wal", "-shm"):
        vault.with_name(vault.name + suffix).unlink(missing_ok=True)
    shutil.copy(copy, vault)
    for suffix in _BESIDE if directory else ():
        vault.with_name(vault.name + suffix).unlink(missing_ok=True)
        if (beside := copy.with_name(copy.name + suffix)).exists():
            shutil.copy(beside, vault.with_name(vault.name + suffix))
