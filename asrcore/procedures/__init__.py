"""Moving the work: test, planned and unplanned failover, undo, commit, re-protect."""
