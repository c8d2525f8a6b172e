"""The mobility service as one file: a zip archive that runs on Python 3.9 and newer."""

from __future__ import annotations

import io
import zipfile
from importlib import resources

from asrcore.wire import frames

__all__ = ["mobility_service"]

_START = "import sys\n\nfrom asr_mobility.__main__ import main\n\nsys.exit(main())\n"
_SHEBANG = b"#!/usr/bin/env python3\n"
_THEN = (1980, 1, 1, 0, 0, 0)  # the same content makes the same file


def mobility_service() -> bytes:
    """The program, with this version of the wire protocol's codec."""
    files = {"__main__.py": _START, "asrcore/__init__.py": "", "asrcore/wire/__init__.py": ""}
    wire_file = resources.files("asrcore.wire").joinpath(frames.__file__.rpartition("/")[2])
    files["asrcore/wire/frames.py"] = wire_file.read_text()
    for item in resources.files("asr_mobility").iterdir():
        if item.name.endswith(".py"):
            files[f"asr_mobility/{item.name}"] = item.read_text()
    packed = io.BytesIO()
    packed.write(_SHEBANG)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _THEN), files[name], zipfile.ZIP_DEFLATED)
    return packed.getvalue()
