"""A witness for the lab's physical server: from outside, it reports the content of its disks while the server is
frozen.

    python -m tests.system.disk_witness ADDRESS PORT NAME=IMAGE...

A request is a line of JSON, names of the server's block devices by any key; the answer is a line with their digests by
the same keys. QEMU caches nothing of a disk: everything the server has written is in the image's file.
"""

from __future__ import annotations

import hashlib
import json
import socketserver
import sys
from pathlib import Path

__all__ = ["PORT", "digest_of_file"]

PORT = 9400
PIECE = 1 << 20
ZEROES = bytes(PIECE)


def digest_of_file(path: Path) -> str:
    """The digest of an image's whole content."""
    whole = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            whole.update(b"\0" if piece == ZEROES[: len(piece)] else hashlib.blake2b(piece, digest_size=16).digest())
    return whole.hexdigest()


class _Request(socketserver.StreamRequestHandler):
    images: dict[str, Path]

    def handle(self) -> None:
        """Answer one request."""
        asked = json.loads(self.rfile.readline())
        found = {key: digest_of_file(self.images[name]) for key, name in asked.items()}
        self.wfile.write(json.dumps(found).encode() + b"\n")


def main() -> None:
    """Answer requests until the process is stopped."""
    address, port, *images = sys.argv[1:]
    _Request.images = {name: Path(path) for name, _, path in (item.partition("=") for item in images)}
    socketserver.TCPServer.allow_reuse_address = True
    with socketserver.TCPServer((address, int(port)), _Request) as server:
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
