"""What a component asks the authority with, and what it gets: no vault, and no authority, is needed for it."""

from __future__ import annotations

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from asrcore.units import DAY

__all__ = ["LIFETIME", "Issued", "Key", "Token", "make_request"]

LIFETIME = 90 * DAY
"""Lifetime of a component's certificate; it is renewed when a third is left."""

Key = ec.EllipticCurvePrivateKey


@attrs.frozen
class Issued:
    """What a component gets: PEM texts."""

    certificate: str
    authority: str
    revoked: str


@attrs.frozen
class Token:
    """What a component joins with: a separate key and certificate, as PEM. Whoever has it can join once."""

    certificate: str
    key: str = attrs.field(repr=False)
    authority: str


def make_request(key: Key) -> str:
    """A component's certificate request, PEM. It has no subject: the token or certificate says who the component is."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
