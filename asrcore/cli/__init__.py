"""The `asr` command: verbs for people and scripts, over `asrcore.engine`."""

from __future__ import annotations

import atexit
import gc

# What is imported stays: looking through it for garbage, again and again and once more at the end, cost a quarter of
# the 0.4 s that `asr status` took. Said before the first import; `asr status` loads 80,000 objects.
gc.set_threshold(100_000)
atexit.register(gc.freeze)

from asrcore.cli._main import main  # noqa: E402

__all__ = ["main"]
