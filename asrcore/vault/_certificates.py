"""What the certificate authority has issued: certificates of components, and the one-use tokens they join with."""

from __future__ import annotations

from sqlalchemy import insert, select, update

from asrcore.errors import CertificateNotFound, TokenRefused
from asrcore.vault import _rows, _schema
from asrcore.vault._store import Store, row_of
from asrcore.vault._values import Certificate

__all__ = ["Certificates"]


class Certificates(Store):
    """The part of the vault that knows certificates. It holds no key."""

    def add_certificate(self, certificate: Certificate) -> None:
        """Record one before it is issued."""
        with self._write("add-certificate") as connection:
            connection.execute(insert(_schema.certificates).values(_rows.certificate_row(certificate)))

    def certificate(self, serial: str) -> Certificate:
        """Raises CertificateNotFound."""
        with self._read() as connection:
            row = row_of(connection, _schema.certificates, serial=serial)
        if row is None:
            raise CertificateNotFound(what=f"serial number {serial}")
        return self._value(_rows.certificate_of, row, f"certificate {serial}")

    def certificates(self) -> list[Certificate]:
        """All, the oldest first."""
        table = _schema.certificates
        with self._read() as connection:
            rows = connection.execute(select(table).order_by(table.c.issued_at, table.c.serial)).mappings().all()
        return [self._value(_rows.certificate_of, row, f"certificate {row['serial']}") for row in rows]

    def use_token(self, serial: str, key: str, now: float) -> Certificate:
        """Use a token for the public key with that digest. The same key may be sent again: a reply may get lost.

        Raises TokenRefused: unknown, revoked, expired, or used for another key.
        """
        table = _schema.certificates
        with self._write("use-token") as connection:
            row = row_of(connection, table, serial=serial)
            if row is None or row["grants"] is None:
                raise TokenRefused(reason="the authority did not issue it")
            token = self._value(_rows.certificate_of, row, f"certificate {serial}")
            if token.revoked_at is not None:
                raise TokenRefused(reason="it was revoked")
            if now >= token.expires_at:
                raise TokenRefused(reason="it has expired")
            if token.used_by not in (None, key):
                raise TokenRefused(reason="it was already used")
            connection.execute(update(table).where(table.c.serial == serial).values(used_by=key))
        return token

    def revoke_certificates(self, role: str, name: str, now: float) -> list[str]:
        """Revoke all valid certificates of a component, and unused tokens for it; returns their serial numbers.

        Raises CertificateNotFound when there is none.
        """
        table = _schema.certificates
        its = (
            table.c.name == name,
            (table.c.role == role) | (table.c.grants == role),
            table.c.revoked_at.is_(None),
            table.c.expires_at > now,
        )
        with self._write("revoke-certificates") as connection:
            serials = list(connection.execute(select(table.c.serial).where(*its)).scalars())
            if not serials:
                raise CertificateNotFound(what=f"{role} {name!r}")
            connection.execute(update(table).where(table.c.serial.in_(serials)).values(revoked_at=now))
        return serials
