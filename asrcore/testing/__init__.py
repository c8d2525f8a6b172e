"""For driver authors: the conformance kit, the memory driver as reference implementation, fault injection."""

from __future__ import annotations

try:
    import pytest
except ImportError:  # the memory driver and the faults work without it; the kit is in extra `asrcore[testing]`
    pass
else:
    # Before anything imports them, so that a failing assert of an inherited test shows its values.
    pytest.register_assert_rewrite("asrcore.testing.conformance")
