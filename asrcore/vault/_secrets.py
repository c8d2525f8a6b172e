"""Secret settings of sites, encrypted in the vault: AES-256-GCM, with a key that is stored outside of it.

`ASR_KEY` names a place for the key other than the default. The key is made when the first secret is recorded.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path

from asrcore.sealkey import SealKey
from asrcore.vault._place import Place

__all__ = ["Secrets", "key_file"]

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
    """Encrypts and decrypts texts. Each is bound to `what`, its site and setting, so that they cannot be swapped."""

    def __init__(self, place: Place) -> None:
        """Reads nothing yet."""
        self._key = SealKey.named("ASR_KEY", key_file(place), what="the vault's secrets")

    def seal(self, text: str, what: str) -> str:
        """Raises SecretKeyUnusable, HostIncomplete."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - 60 ms, where there are secrets

        nonce = os.urandom(_NONCE_SIZE)
        sealed = AESGCM(self._key.raw(make=True)).encrypt(nonce, text.encode(), what.encode())
        return base64.b64encode(nonce + sealed).decode()

    def open(self, sealed: str, what: str) -> str:
        """Raises SecretKeyUnusable, HostIncomplete; ValueError when the text was damaged."""
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

        data = base64.b64decode(sealed, validate=True)
        try:
            opened = AESGCM(self._key.raw()).decrypt(data[:_NONCE_SIZE], data[_NONCE_SIZE:], what.encode())
        except InvalidTag as problem:
            raise self._key.unusable(f"it does not open {what}, which was encrypted with another key") from problem
        return opened.decode()
