"""Connecting to an export: what is asked of the server, and what it answers."""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from asr_storage.nbd._connection import Connection
from asr_storage.nbd.errors import NbdContextMissing, NbdError, NbdExportMissing
from asrcore.units import KiB

__all__ = ["Connect", "Export", "TlsFiles", "negotiate"]

_TLS_REQUIRE = 2
_SIZE_MINIMUM, _SIZE_PREFERRED, _SIZE_MAXIMUM = 0, 1, 2

Connect = Callable[[Any, Any], int]
"""Starts to connect, given libnbd's functions and the handle."""


@attrs.frozen
class TlsFiles:
    """Directory with ca-cert.pem, client-cert.pem and client-key.pem. The server's certificate must be signed by
    that CA and carry the host name (or IP address) connected to."""

    directory: Path


@attrs.frozen
class Export:
    """What the server says about an export. Sizes in bytes; `max_block` is 0 if it named none; `whole`: it can answer a
    read in one piece, holes as zeroes."""

    contexts: tuple[str, ...]
    size: int
    read_only: bool
    multi_conn: bool
    flush: bool
    zero: bool
    trim: bool
    whole: bool
    min_block: int
    preferred_block: int
    max_block: int


def negotiate(
    connection: Connection, contexts: Sequence[str], tls: TlsFiles | None, connect: Connect, what: str
) -> Export:
    """Connect and agree on the contexts. Raises NbdExportMissing, NbdContextMissing, NbdError."""
    lib, handle, check = connection.lib, connection.handle, connection.check
    _prepare(connection, contexts, tls)
    check(connect(lib, handle), what)
    try:
        while lib.nbd_aio_is_connecting(handle):
            connection.poll(what)
    except NbdError as error:
        # an unreachable server or a missing socket has failed above, or with another number
        if error.errno == errno.ENOENT:
            raise NbdExportMissing(what, error.detail, export=connection.export, errno=errno.ENOENT) from error
        raise
    if not lib.nbd_aio_is_ready(handle):
        raise connection.last_error(what)
    connection.established()
    missing = [c for c in contexts if not check(lib.nbd_can_meta_context(handle, c.encode()), c)]
    if missing:
        raise NbdContextMissing(missing, export=connection.export)

    def flag(question: Callable[[Any], int]) -> bool:
        return bool(check(question(handle), "get the export's flags"))

    def block_size(kind: int) -> int:
        return check(lib.nbd_get_block_size(handle, kind), "get the block size")  # 0 if the server named none

    return Export(
        contexts=tuple(contexts),
        size=check(lib.nbd_get_size(handle), "get the size"),
        read_only=flag(lib.nbd_is_read_only),
        multi_conn=flag(lib.nbd_can_multi_conn),
        flush=flag(lib.nbd_can_flush),
        zero=flag(lib.nbd_can_zero),
        trim=flag(lib.nbd_can_trim),
        whole=flag(lib.nbd_can_df),
        min_block=block_size(_SIZE_MINIMUM) or 1,
        preferred_block=block_size(_SIZE_PREFERRED) or 4 * KiB,
        max_block=block_size(_SIZE_MAXIMUM),
    )


def _prepare(connection: Connection, contexts: Sequence[str], tls: TlsFiles | None) -> None:
    lib, handle, check = connection.lib, connection.handle, connection.check
    check(lib.nbd_set_export_name(handle, connection.export.encode()), "set the export name")
    if connection.libnbd.has("nbd_set_pread_initialize"):
        # Zeroing each buffer before a read costs time and helps only who uses the buffer of a failed read.
        check(lib.nbd_set_pread_initialize(handle, False), "set up reads")
    if tls is not None:
        check(lib.nbd_set_tls(handle, _TLS_REQUIRE), "require TLS")
        check(lib.nbd_set_tls_certificates(handle, os.fsencode(tls.directory)), "set TLS certificates")
        check(lib.nbd_set_tls_verify_peer(handle, True), "verify the TLS peer")
    for context in contexts:
        check(lib.nbd_add_meta_context(handle, context.encode()), f"ask for {context}")
