"""libnbd's C functions, found at run time with cffi in ABI mode: nothing is compiled and no headers are needed.

The only place where untyped values (`Any`) come from. Every call through `lib` releases the GIL.
"""

import functools
import importlib
import os
from typing import Any

__all__ = ["LIBRARY", "Libnbd", "last_error", "load", "version"]

LIBRARY = "libnbd.so.0"

# Signatures as in libnbd 1.14's libnbd.h; the ABI behind the soname has only grown since 1.0.
_CDEF = """
struct nbd_handle;
typedef struct { int (*callback)(void *, int *); void *user_data; void (*free)(void *); } nbd_completion_callback;
typedef struct {
  int (*callback)(void *, const char *, uint64_t, uint32_t *, size_t, int *);
  void *user_data; void (*free)(void *);
} nbd_extent_callback;
typedef struct {
  int (*callback)(void *, const void *, size_t, uint64_t, unsigned, int *);
  void *user_data; void (*free)(void *);
} nbd_chunk_callback;

struct nbd_handle *nbd_create(void);
void nbd_close(struct nbd_handle *);
const char *nbd_get_error(void);
int nbd_get_errno(void);
const char *nbd_get_version(struct nbd_handle *);

int nbd_set_export_name(struct nbd_handle *, const char *);
int nbd_set_tls(struct nbd_handle *, int);
int nbd_set_tls_certificates(struct nbd_handle *, const char *);
int nbd_set_tls_verify_peer(struct nbd_handle *, bool);
int nbd_set_pread_initialize(struct nbd_handle *, bool);
int nbd_add_meta_context(struct nbd_handle *, const char *);

int nbd_aio_connect_unix(struct nbd_handle *, const char *);
int nbd_aio_connect_tcp(struct nbd_handle *, const char *, const char *);
int nbd_aio_disconnect(struct nbd_handle *, uint32_t);
int nbd_aio_get_fd(struct nbd_handle *);
int nbd_aio_is_connecting(struct nbd_handle *);
int nbd_aio_is_ready(struct nbd_handle *);
int nbd_aio_is_dead(struct nbd_handle *);
int nbd_aio_is_closed(struct nbd_handle *);
int nbd_poll(struct nbd_handle *, int);

int nbd_is_read_only(struct nbd_handle *);
int nbd_can_multi_conn(struct nbd_handle *);
int nbd_can_flush(struct nbd_handle *);
int nbd_can_zero(struct nbd_handle *);
int nbd_can_trim(struct nbd_handle *);
int nbd_can_df(struct nbd_handle *);
int nbd_can_meta_context(struct nbd_handle *, const char *);
int64_t nbd_get_size(struct nbd_handle *);
int64_t nbd_get_block_size(struct nbd_handle *, int);

int nbd_pread_structured(struct nbd_handle *, void *, size_t, uint64_t, nbd_chunk_callback, uint32_t);
int64_t nbd_aio_pread(struct nbd_handle *, void *, size_t, uint64_t, nbd_completion_callback, uint32_t);
int64_t nbd_aio_pwrite(struct nbd_handle *, const void *, size_t, uint64_t, nbd_completion_callback, uint32_t);
int64_t nbd_aio_zero(struct nbd_handle *, uint64_t, uint64_t, nbd_completion_callback, uint32_t);
int64_t nbd_aio_trim(struct nbd_handle *, uint64_t, uint64_t, nbd_completion_callback, uint32_t);
int64_t nbd_aio_flush(struct nbd_handle *, nbd_completion_callback, uint32_t);
int64_t nbd_aio_block_status(struct nbd_handle *, uint64_t, uint64_t, nbd_extent_callback,
                             nbd_completion_callback, uint32_t);
int nbd_aio_command_completed(struct nbd_handle *, uint64_t);
int nbd_aio_in_flight(struct nbd_handle *);
"""


class Libnbd:
    """The loaded library: `ffi` (cffi) and `lib` (the functions). `any_chunk`: for a read's parts."""

    def __init__(self) -> None:
        # cffi ships no types; importing it by name keeps mypy's result the same with and without third-party stubs
        ffi: Any = importlib.import_module("cffi").FFI()
        ffi.cdef(_CDEF)
        self.ffi: Any = ffi
        self.lib: Any = ffi.dlopen(LIBRARY)
        self.no_completion: Any = ffi.new("nbd_completion_callback *")[0]  # all NULL: completion is polled for
        self._on_chunk = ffi.callback("int(void *, const void *, size_t, uint64_t, unsigned, int *)", lambda *_: 0)
        self.any_chunk: Any = ffi.new("nbd_chunk_callback *", {"callback": self._on_chunk})[0]

    def has(self, function: str) -> bool:
        """Whether this version of the library has FUNCTION (the newer ones are optional)."""
        return hasattr(self.lib, function)


@functools.cache
def load() -> Libnbd:
    """The library, loaded once for each process. Raises OSError if it is not installed."""
    return Libnbd()


def version() -> str:
    """The version of the library, such as "1.14.2". Raises OSError if it is not installed."""
    libnbd = load()
    handle = libnbd.lib.nbd_create()
    try:
        text: bytes = libnbd.ffi.string(libnbd.lib.nbd_get_version(handle))
        return text.decode()
    finally:
        libnbd.lib.nbd_close(handle)


def last_error(libnbd: Libnbd) -> tuple[int | None, str]:
    """errno (None where libnbd gives none, as for TLS) and message of this thread's last failed call."""
    pointer = libnbd.lib.nbd_get_error()
    number = int(libnbd.lib.nbd_get_errno()) or None
    if pointer == libnbd.ffi.NULL:
        return number, os.strerror(number) if number else "no message"
    text: bytes = libnbd.ffi.string(pointer)
    return number, text.decode(errors="replace")
