"""Secret settings of sites, encrypted in the vault: AES-256-GCM, with a key that is kept apart from it.

The key is in a file that only its owner reads, or in the system's keyring; `ASR_KEY` names another place than the
default. It is made when the first secret is recorded.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path

from asrcore.errors import HostIncomplete, SecretKeyUnusable
from asrcore.vault._place import Place

__all__ = ["Secrets", "key_file"]

_ENVIRONMENT = "ASR_KEY"
_KEYRING = "keyring:"
_KEY_SIZE = 32
_NONCE_SIZE = 12


def key_file(place: Place) -> Path:
    """Where the key is by default: beside the file, or for a database server in the directory of the default vault."""
    if place.path is not None:
        return place.beside(".key")
    if os.geteuid() == 0:
        return Path("/var/lib/asrcore/vault.key")
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "asrcore" / "vault.key"


class Secrets:
    """Seals and opens texts. `what`, the site and the setting, is bound to each: none can take another's place."""

    def __init__(self, place: Place) -> None:
        """Reads nothing yet."""
        self.where = os.environ.get(_ENVIRONMENT) or str(key_file(place))
        self._key: bytes | None = None

    def seal(self, text: str, what: str) -> str:
        """Raises SecretKeyUnusable, HostIncomplete."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - 60 ms, where there are secrets

        nonce = os.urandom(_NONCE_SIZE)
        sealed = AESGCM(self._load(make=True)).encrypt(nonce, text.encode(), what.encode())
        return base64.b64encode(nonce + sealed).decode()

    def open(self, sealed: str, what: str) -> str:
        """Raises SecretKeyUnusable, HostIncomplete; ValueError when the text was damaged."""
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

        data = base64.b64decode(sealed, validate=True)
        try:
            opened = AESGCM(self._load(make=False)).decrypt(data[:_NONCE_SIZE], data[_NONCE_SIZE:], what.encode())
        except InvalidTag as problem:
            raise self._unusable(f"it does not open {what}, which was sealed with another key") from problem
        return opened.decode()

    def _load(self, *, make: bool) -> bytes:
        if self._key is None:
            text = self._from_keyring(make) if self.where.startswith(_KEYRING) else self._from_file(make)
            try:
                key = base64.b64decode(text.strip(), validate=True)
            except (ValueError, binascii.Error):
                key = b""
            if len(key) != _KEY_SIZE:
                raise self._unusable("it is no key of 32 bytes in base64")
            self._key = key
        return self._key

    def _from_file(self, make: bool) -> str:
        path = Path(self.where)
        try:
            if make and not path.exists():
                _make_file(path)
            if path.stat().st_mode & 0o077:
                raise self._unusable("it can be read by others than its owner")
            return path.read_text("ascii")
        except (OSError, UnicodeDecodeError) as problem:
            detail = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
            raise self._unusable(detail) from problem

    def _from_keyring(self, make: bool) -> str:
        try:
            import keyring  # noqa: PLC0415 - an extra
            from keyring.errors import KeyringError  # noqa: PLC0415
        except ImportError as problem:
            raise HostIncomplete(what="keyring", detail="Install asrcore[keyring].") from problem
        service, _, user = self.where.removeprefix(_KEYRING).partition("/")
        try:
            found = keyring.get_password(service, user or "vault")
            if found is None and make:
                found = _new_key()
                keyring.set_password(service, user or "vault", found)
        except KeyringError as problem:
            raise self._unusable(str(problem) or type(problem).__name__) from problem
        if found is None:
            raise self._unusable("it is not there")
        return found

    def _unusable(self, problem: str) -> SecretKeyUnusable:
        return SecretKeyUnusable(where=self.where, problem=problem)


def _new_key() -> str:
    return base64.b64encode(os.urandom(_KEY_SIZE)).decode()


def _make_file(path: Path) -> None:
    """Whole and durable under its name at once; of two who make it one wins. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.urandom(4).hex()}.new")
    try:
        with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
            file.write(_new_key() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(new, path)
        except FileExistsError:
            return
    finally:
        new.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
