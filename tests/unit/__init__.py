"""Unit tests: mirrors asrcore/; no lab, no root."""
