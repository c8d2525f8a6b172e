"""The data plane: cycle, copy and comparison, retention, retry."""
