"""Pieces of a disk given to a few threads, each with its own buffers and readers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import TypeVar

__all__ = ["in_parallel"]

_Piece = TypeVar("_Piece")


def in_parallel(
    pieces: Iterable[_Piece], workers: int, begin: Callable[[], AbstractContextManager[Callable[[_Piece], None]]]
) -> None:
    """Give the pieces to at most `workers` threads; each calls what its `begin()` yields for one piece after another.

    The first error stops all and is raised. Pieces are taken as they are needed, so they may be a long generator.
    """
    left = iter(pieces)
    lock = threading.Lock()
    stop = threading.Event()

    def next_piece() -> _Piece | None:
        with lock:
            return None if stop.is_set() else next(left, None)

    def run(piece: _Piece | None) -> None:
        try:
            with begin() as work:
                while piece is not None:
                    work(piece)
                    piece = next_piece()
        except BaseException:
            stop.set()
            raise

    first = [piece for _, piece in zip(range(workers), left, strict=False)]
    if not first:
        return
    if len(first) == 1:  # an idle cycle: no thread is worth its start
        run(first[0])
        return
    with ThreadPoolExecutor(len(first), thread_name_prefix="transfer") as pool:
        futures = [pool.submit(run, piece) for piece in first]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in (*finished, *futures):
            future.result()
