"""Enrolment: a component makes its key, joins with a token, renews its certificate, fetches revocation lists.

An identity is a directory (see `tls.Identity`) with an additional file, `config-server`: the URL to renew at. The key
is made once and kept. `certificate.pem` is written last when joining, so that a directory that has it is complete. All
steps may be repeated: a token that was used for this key stays valid for this key until it expires.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import tempfile
import time
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from asrcore import codec
from asrcore.errors import (
    AlreadyExists,
    AsrError,
    IdentityUnusable,
    InvalidValue,
    PeerError,
    SiteUnreachable,
    catalogue,
)
from asrcore.files import write_private
from asrcore.pki.request import LIFETIME, Issued, Key, Token, make_request
from asrcore.units import DAY
from asrcore.wire.tls import Component, Identity, Role, check_role, refusal

__all__ = ["Renewed", "fetch_text", "install", "installed", "join", "key_in", "pack", "renew", "unpack", "write_public"]

_SECONDS = 30.0
_LARGEST = 1 << 20  # bytes of an answer
_URL = "config-server"


@attrs.frozen
class Renewed:
    """`certificate`: whether there is another one now. `expires_at` in seconds since the epoch."""

    component: Component
    certificate: bool
    expires_at: float


@attrs.frozen
class _Packed:
    """What the line of a token holds."""

    url: str
    certificate: str
    key: str = attrs.field(repr=False)
    authority: str


def pack(token: Token, url: str) -> str:
    """A token as one line of text, with the URL of the configuration server."""
    text = json.dumps({"url": url, **attrs.asdict(token)})
    return base64.b64encode(text.encode()).decode()


def unpack(text: str) -> tuple[Token, str]:
    """Raises InvalidValue; the message does not hold the text."""
    try:
        packed = codec.load(_Packed, base64.b64decode(text.strip(), validate=True))
        _place(packed.url)
        for pem in (packed.certificate, packed.key, packed.authority):
            pem.encode("ascii")
    except (ValueError, InvalidValue):  # also what is no base64, JSON or ASCII
        raise InvalidValue(
            what="join token", value="(not shown)", wanted="the line that `asr ca token` printed"
        ) from None
    return Token(packed.certificate, packed.key, packed.authority), packed.url


def key_in(directory: Path) -> Key:
    """The key of an identity; made when there is none. Raises IdentityUnusable."""
    path = directory / "key.pem"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            write_private(path, key.private_bytes(*form).decode())
        loaded = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as problem:
        raise IdentityUnusable(directory=str(directory), problem=f"key.pem: {problem}") from problem
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise IdentityUnusable(directory=str(directory), problem="key.pem is not a key on an elliptic curve")
    return loaded


def install(directory: Path, issued: Issued, url: str) -> None:
    """Store what the authority issued beside the key. Raises IdentityUnusable."""
    try:
        write_private(directory / _URL, url + "\n", mode=0o644)
        write_private(directory / "ca.pem", issued.authority, mode=0o644)
        write_private(directory / "crl.pem", issued.revoked, mode=0o644)
        write_private(directory / "certificate.pem", issued.certificate, mode=0o644)
    except OSError as problem:
        raise IdentityUnusable(directory=str(directory), problem=str(problem)) from problem


def join(token: Token, url: str, directory: str | Path) -> Component:
    """Get an identity. Raises AlreadyExists where there is one, TokenRefused, SiteUnreachable, and what TLS refuses."""
    directory = Path(directory)
    if (directory / "certificate.pem").exists():
        raise AlreadyExists(kind="identity", name=str(directory))
    request = make_request(key_in(directory))
    with tempfile.TemporaryDirectory(prefix=".join-", dir=directory) as folder:
        for name, text in (("certificate.pem", token.certificate), ("key.pem", token.key), ("ca.pem", token.authority)):
            write_private(Path(folder) / name, text)
        answer = _call(Identity(folder), url, "POST", "/v1/join", {"request": request})
    install(directory, _issued(answer, url), url)
    return Identity(directory).component()


def renew(directory: str | Path, *, force: bool = False, now: float | None = None) -> Renewed:
    """Fetch the newest revocation list, and another certificate when less than a third of its time is left, or more
    than there can be.

    Raises IdentityUnusable, SiteUnreachable, and what TLS or the authority refuses.
    """
    directory = Path(directory)
    identity = Identity(directory)
    component = identity.component()
    certificate, url = installed(directory)
    expires = certificate.not_valid_after_utc.timestamp()
    now = time.time() if now is None else now
    # One with more than its lifetime left was issued, or is looked at, with a wrong clock.
    due = force or not LIFETIME / 3 <= expires - now <= LIFETIME + DAY
    if due:
        request = make_request(key_in(directory))
        issued = _issued(_call(identity, url, "POST", "/v1/renew", {"request": request}, listed=False), url)
        install(directory, issued, url)
        expires = x509.load_pem_x509_certificate(issued.certificate.encode()).not_valid_after_utc.timestamp()
    else:
        answer = _call(identity, url, "GET", "/v1/revoked", listed=False)
        write_public(directory / "crl.pem", str(answer.get("revoked")))
    return Renewed(component, due, expires)


def installed(directory: Path) -> tuple[x509.Certificate, str]:
    """The certificate of an identity, and the URL to renew it at. Raises IdentityUnusable."""
    try:
        url = (directory / _URL).read_text("utf-8").strip()
        return x509.load_pem_x509_certificate((directory / "certificate.pem").read_bytes()), url
    except (OSError, ValueError) as problem:
        raise IdentityUnusable(directory=str(directory), problem=str(problem)) from problem


def write_public(path: Path, text: str) -> None:
    """Write a file of an identity that is no secret. Raises IdentityUnusable."""
    try:
        write_private(path, text, mode=0o644)
    except OSError as problem:
        raise IdentityUnusable(directory=str(path.parent), problem=str(problem)) from problem


def _issued(answer: dict[str, object], url: str) -> Issued:
    try:
        return Issued(str(answer["certificate"]), str(answer["authority"]), str(answer["revoked"]))
    except KeyError as problem:
        raise _strange(url, f"its answer lacks {problem}") from problem


def _call(
    identity: Identity,
    url: str,
    method: str,
    path: str,
    body: dict[str, object] | None = None,
    *,
    listed: bool = True,
) -> dict[str, object]:
    text = fetch_text(identity, url, method, path, body, listed=listed)
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise _strange(url, "its answer is not JSON") from problem
    if not isinstance(answer, dict):
        raise _strange(url, "its answer is not a JSON object")
    return answer


def fetch_text(
    identity: Identity,
    url: str,
    method: str,
    path: str,
    body: dict[str, object] | None = None,
    *,
    listed: bool = True,
) -> str:
    """One call of a configuration server. Its errors are raised here as the same errors.

    Not `listed`: the local revocation list is ignored, because it may be too old and a new one is being fetched.
    """
    parts = _place(url)
    context = identity.context(server=False)
    if not listed:
        context = ssl.create_default_context(cafile=str(identity.directory / "ca.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the role in the certificate identifies the server
        context.load_cert_chain(identity.directory / "certificate.pem", identity.directory / "key.pem")
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port or 443, timeout=_SECONDS, context=context)
    try:
        connection.connect()
        sock = connection.sock
        assert isinstance(sock, ssl.SSLSocket)
        check_role(sock.getpeercert(), url, {Role.CONFIG_SERVER})
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read(_LARGEST).decode("utf-8", "replace")
        if response.status >= 400:
            raise _error(url, response.status, text)
        return text
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, http.client.RemoteDisconnected) as problem:
        # what a refused handshake looks like from here
        raise SiteUnreachable(
            site=url, detail="it closed the connection; it may not accept this certificate"
        ) from problem
    except ssl.SSLError as problem:
        raise refusal(problem, url) from problem
    except (OSError, http.client.HTTPException) as problem:
        raise SiteUnreachable(site=url, detail=str(problem) or type(problem).__name__) from problem
    finally:
        connection.close()


def _place(url: str) -> SplitResult:
    """Raises InvalidValue."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "https" and parts.hostname and parts.port != 0 and url.isascii() and url.isprintable():
            return parts
    except ValueError:  # a port that is no number or too large, a bracket that is not closed
        pass
    raise InvalidValue(what="configuration server", value=ascii(url), wanted="https://HOST[:PORT]")


def _error(url: str, status: int, text: str) -> AsrError:
    try:
        error = json.loads(text)["error"]
        kind = catalogue().get(error["code"])
        if kind is not None and isinstance(error.get("attributes"), dict):
            return kind(**error["attributes"])
        return PeerError(peer=url, **{name: error[name] for name in ("code", "happened", "cause", "action")})
    except (ValueError, KeyError, TypeError, RecursionError):
        return _strange(url, f"it answered with status {status}")


def _strange(url: str, detail: str) -> AsrError:
    return SiteUnreachable(site=url, detail=detail)
