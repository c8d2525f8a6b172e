"""Storage that fails: full, read-only. In a mount namespace of a child, so that nothing stays mounted."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from asrcore.vault import Vault


def can_mount() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None or os.geteuid() != 0:
        return False
    done = subprocess.run([unshare, "--mount", "true"], capture_output=True, timeout=20, check=False)
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not can_mount(), reason="needs root and mount namespaces")


def in_namespace(mount: str, code: str, *arguments: object) -> str:
    head = "import sys, os\nfrom asrcore.vault import Vault\nfrom tests.unit.vault import samples\n"
    head += "from asrcore.errors import VaultUnavailable\n"
    script = f'{mount} && exec {sys.executable} -W error -c "$CODE" "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *map(str, arguments)],
        env={**os.environ, "CODE": head + textwrap.dedent(code)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_read_only(path: Path) -> None:
    with Vault.open(path) as vault:
        vault.add_event(0, "", "x", "something in the journal")
    before = path.read_bytes()
    code = """
    for action, place in ((Vault.open, "vault.db"), (Vault.create, "new.db"), (Vault.create, "deep/er/new.db")):
        try:
            action(os.path.join(sys.argv[1], place))
        except VaultUnavailable as error:
            print(place, error)
    """
    directory = path.parent
    said = in_namespace(
        f"mount --bind {directory} {directory} && mount -o remount,ro,bind {directory}", code, directory
    )
    lines = said.splitlines()
    assert len(lines) == 3, said
    assert "mounted read-only" in lines[0]
    assert "read-only" in lines[1].lower()
    assert "read-only" in lines[2].lower()
    assert path.read_bytes() == before


def test_full(path: Path, tmp_path: Path) -> None:
    """A write to a full disk is refused as a whole; with free space it works again."""
    small = tmp_path / "small"
    small.mkdir()
    code = """
    import shutil
    path, small = sys.argv[1], sys.argv[2]
    shutil.copy(path, small)
    with Vault.open(small + "/vault.db") as vault:
        samples.record(vault, 1)
        ballast = open(small + "/ballast", "wb", buffering=0)
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass
        recorded, refused = 1, None
        while refused is None:
            try:
                vault.add_event(0, "", "x", "y" * 3000)
            except VaultUnavailable as error:
                refused = error
        print(refused)
        before = vault.protection("id-1")
        try:
            vault.begin_cycle("id-1", samples.cycle(2, "p1"))
        except VaultUnavailable as error:
            assert vault.protection("id-1") == before
        os.truncate(small + "/ballast", 0)
        samples.record(vault, 3) if vault.protection("id-1").pending is None else None
        events = len(vault.events())
    with Vault.open(small + "/vault.db") as vault:
        assert len(vault.events()) == events
        with vault._read() as connection:
            print(connection.exec_driver_sql("PRAGMA integrity_check").scalar())
    with open(small + "/ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError:
            pass
    for action, name in ((Vault.open, "vault.db"), (Vault.create, "new.db")):
        try:
            action(small + "/" + name).close()
            print(name, "works")
        except VaultUnavailable as error:
            print(name, error)
    print(sorted(os.listdir(small)))
    """
    said = in_namespace(f"mount -t tmpfs -o size=1m tmpfs {small}", code, path, small).splitlines()
    assert "cannot be used" in said[0], said
    assert "is full" in said[0], said
    assert said[1] == "ok"
    assert "is full" in said[2], said
    assert "is full" in said[3], said
    left = set(ast.literal_eval(said[4]))
    assert {"ballast", "vault.db"} <= left <= {"ballast", "vault.db", "vault.db-shm", "vault.db-wal", "vault.db.users"}
