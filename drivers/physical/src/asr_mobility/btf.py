"""What the kernel tells about its own types (BTF): where the fields of a request lie, by the names of its source."""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = ["KERNEL", "Types"]

KERNEL = Path("/sys/kernel/btf/vmlinux")
_MAGIC = 0xEB9F
_STRUCT, _TYPEDEF = 4, 8
# Bytes that follow a type's twelve, by its kind: fixed ones, and ones for each member.
_FIXED = {1: 4, 3: 12, 14: 4, 17: 4}
_EACH = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}


class Types:
    """The structures and type definitions of the given names. Format: Documentation/bpf/btf.rst of the kernel."""

    def __init__(self, content: bytes, names: set[str]) -> None:
        """Raises ValueError if the content is not BTF."""
        self.structs: dict[str, dict[str, int]] = {}
        """Byte offsets of a structure's direct members."""
        self.typedefs: dict[str, int] = {}
        """Numbers of the type definitions."""
        try:
            self._read(content, {name.encode() for name in names})
        except (struct.error, IndexError) as problem:
            raise ValueError(f"the kernel's type information cannot be read: {problem}") from problem

    def _read(self, content: bytes, names: set[bytes]) -> None:
        magic, _, _, header, types, length, strings, _ = struct.unpack_from("<HBBIIIII", content)
        if magic != _MAGIC:
            raise ValueError("the kernel's type information has an unknown format")
        text = header + strings
        at, end, number = header + types, header + types + length, 0

        def word(offset: int) -> bytes:
            return content[text + offset : content.index(b"\0", text + offset)]

        while at < end:
            number += 1
            name, info, _ = struct.unpack_from("<III", content, at)
            count, kind = info & 0xFFFF, info >> 24 & 0x1F
            at += 12
            if kind in (_STRUCT, _TYPEDEF) and name and word(name) in names:
                if kind == _TYPEDEF:
                    self.typedefs[word(name).decode()] = number
                else:
                    members = (struct.unpack_from("<III", content, at + 12 * index) for index in range(count))
                    found = {word(member).decode(): (bits & 0xFFFFFF) // 8 for member, _, bits in members}
                    self.structs.setdefault(word(name).decode(), found)
            at += _FIXED.get(kind, 0) + _EACH.get(kind, 0) * count
