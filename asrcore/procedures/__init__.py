"""Test, planned and unplanned failover, undo, commit, re-protect."""
