"""Moving a vault to a file that is taken to the other site, so that there is never a second live one."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import attrs

from asrcore.crashpoint import reach
from asrcore.errors import InvalidValue, VaultExists, VaultInUse, VaultMoved, VaultNotFound
from asrcore.files import write_private
from asrcore.vault._incarnation import BESIDE
from asrcore.vault._place import Place
from asrcore.vault._secrets import key_file
from asrcore.vault._vault import Vault

__all__ = ["move"]

MOVED = ".moved"


def move(url_or_path: str | os.PathLike[str], destination: str | os.PathLike[str], holder: str) -> Path:
    """Move a SQLite vault to the file `destination`; returns that path. What stays behind is renamed to `*.moved`.

    The old name is removed before the new one appears: a crash between the two leaves no live vault, never two, and
    calling again completes the move. Raises VaultInUse while an engine works on it or a job is not finished,
    VaultExists, VaultNotFound, VaultMoved (to another place), InvalidValue for a database server.
    """
    place, target = Place.of(url_or_path), Path(os.path.realpath(destination))
    if place.path is None:
        raise InvalidValue(
            what="vault", value=place.shown, wanted="a file: a server's vault is reached from both sites"
        )
    if target.exists():
        raise VaultExists(url=str(target))
    old = place.beside(MOVED)
    part = target.with_name(f".{target.name}.part")
    try:
        with Vault.open(url_or_path) as vault, vault.kept_from_others(holder):
            unfinished = vault.jobs(limit=1, active=True)
            if unfinished:
                raise VaultInUse(holder=f"job {unfinished[0].id} ({unfinished[0].kind}) is not finished")
            _copy(place.path, part)
            _carry_key(place, target)
            _carry_incarnation(place, target)
            reach("vault.move.copied")
            vault.fold()
            place.path.rename(old)
            _sync(place.path.parent)
            reach("vault.move.renamed")
    except (VaultNotFound, VaultMoved):
        if not (old.exists() and part.exists()):
            raise
    except OSError as problem:
        raise place.unavailable(problem) from problem
    part.rename(target)
    _sync(target.parent)
    with suppress(FileNotFoundError):
        place.beside(".jobs").unlink()  # all jobs are finished; their records are in the vault
    return target


def _carry_key(place: Place, target: Path) -> None:
    """Move the key of the secrets too, if it is in its default place."""
    key = key_file(place)
    if key.exists():
        write_private(key_file(attrs.evolve(place, path=target)), key.read_text("ascii"))


def _carry_incarnation(place: Place, target: Path) -> None:
    """Else the moved vault would look like a copy that was put back."""
    beside = place.beside(BESIDE)
    if beside.exists():
        write_private(attrs.evolve(place, path=target).beside(BESIDE), beside.read_text("ascii"))


def _copy(source: Path, destination: Path) -> None:
    with suppress(FileNotFoundError):
        destination.unlink()
    os.close(os.open(destination, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with closing(sqlite3.connect(source)) as ours, closing(sqlite3.connect(destination)) as theirs:
        ours.backup(theirs)
    with destination.open("rb+") as file:
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
