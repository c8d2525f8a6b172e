"""How to recognise a vault and its version without a database library."""

__all__ = ["APPLICATION_ID", "HEADER_SIZE", "REVISIONS", "VERSION_TABLE", "application_id"]

APPLICATION_ID = 0x41735256
"""In the header of every SQLite file that is a vault: others are recognised without SQLite touching them."""

HEADER_SIZE = 100
"""Bytes at the beginning of a SQLite file, https://www.sqlite.org/fileformat2.html."""
_MAGIC = b"SQLite format 3\0"
_APPLICATION_ID_AT = 68

VERSION_TABLE = "asr_version"

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0010", "0011")
"""Known schema versions, oldest first; the same as in migrations/versions, without importing Alembic to know."""


def application_id(header: bytes) -> int | None:
    """The application id in the header of a SQLite file; None if it is not a SQLite file."""
    if len(header) < HEADER_SIZE or not header.startswith(_MAGIC):
        return None
    return int.from_bytes(header[_APPLICATION_ID_AT : _APPLICATION_ID_AT + 4], "big")
