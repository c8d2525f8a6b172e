"""The `asr` command: verbs for people and scripts, over `asrcore.engine`."""

from __future__ import annotations

from asrcore.cli._main import main

__all__ = ["main"]
