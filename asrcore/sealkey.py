"""Keys that encrypt secrets stored on disk: settings of sites in the vault, private keys of authorities.

Such a key has 32 bytes, stored as base64 in a file that only its owner can read, or in the system's keyring.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING

from asrcore.errors import HostIncomplete, SecretKeyUnusable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

__all__ = ["SealKey", "authority_key", "open_private_key", "seal_private_key"]

_KEYRING = "keyring:"
_KEY_SIZE = 32


class SealKey:
    """`where`: a path, or `keyring:SERVICE/NAME`. `what` it decrypts, and the environment `variable` that names another
    place, are for messages. Nothing is read yet."""

    def __init__(self, where: str, *, what: str, variable: str) -> None:
        self.where = where
        self._what = what
        self._variable = variable
        self._key: bytes | None = None

    @classmethod
    def named(cls, variable: str, default: Path, *, what: str) -> SealKey:
        """Where the environment says, else the default file."""
        return cls(os.environ.get(variable) or str(default), what=what, variable=variable)

    def raw(self, *, make: bool = False) -> bytes:
        """All 32 bytes; with `make` a missing key is created. Raises SecretKeyUnusable, HostIncomplete."""
        if self._key is None:
            text = self._from_keyring(make) if self.where.startswith(_KEYRING) else self._from_file(make)
            try:
                key = base64.b64decode(text.strip(), validate=True)
            except (ValueError, binascii.Error):
                key = b""
            if len(key) != _KEY_SIZE:
                raise self.unusable("it is not a key of 32 bytes in base64")
            self._key = key
        return self._key

    def password(self, *, make: bool = False) -> bytes:
        """The same as text, as it is in the file: `openssl pkey -passin file:` takes it. Raises as `raw`."""
        return base64.b64encode(self.raw(make=make))

    def unusable(self, problem: str) -> SecretKeyUnusable:
        """The error that says why the key cannot be used."""
        return SecretKeyUnusable(what=self._what, where=self.where, problem=problem, variable=self._variable)

    def _from_file(self, make: bool) -> str:
        path = Path(self.where)
        try:
            if make and not path.exists():
                _make_file(path)
            if path.stat().st_mode & 0o077:
                raise self.unusable("it can be read by users other than its owner")
            return path.read_text("ascii")
        except (OSError, UnicodeDecodeError) as problem:
            detail = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
            raise self.unusable(detail) from problem

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
            raise self.unusable(str(problem) or type(problem).__name__) from problem
        if found is None:
            raise self.unusable("it is not there")
        return found


def authority_key(directory: Path) -> SealKey:
    """The key of the authority in a directory: `ASR_CA_KEY`, else a file beside the directory, so that a copy of the
    directory alone is useless."""
    beside = Path(f"{directory.absolute()}.key")
    return SealKey.named("ASR_CA_KEY", beside, what=f"the authority in {directory}")


def seal_private_key(key: EllipticCurvePrivateKey, seal: SealKey) -> bytes:
    """As encrypted PEM; a missing seal key is created. Raises SecretKeyUnusable, HostIncomplete."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - 60 ms, where there is an authority

    encryption = serialization.BestAvailableEncryption(seal.password(make=True))
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def open_private_key(pem: bytes, seal: SealKey) -> object:
    """An authority's private key. An unencrypted one is accepted too: an earlier version wrote it so, or it was put
    there by hand. Raises ValueError, UnsupportedAlgorithm, SecretKeyUnusable, HostIncomplete."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415 - 60 ms

    if b"ENCRYPTED" not in pem:
        return load_pem_private_key(pem, None)
    password = seal.password()
    try:
        return load_pem_private_key(pem, password)
    except ValueError as problem:
        raise seal.unusable("it does not open ca-key.pem, which was encrypted with another key") from problem


def _new_key() -> str:
    return base64.b64encode(os.urandom(_KEY_SIZE)).decode()


def _make_file(path: Path) -> None:
    """Create the file atomically and durably; if two processes make it, one wins. Raises OSError."""
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
