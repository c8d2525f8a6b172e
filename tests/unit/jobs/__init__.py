"""Jobs: order, locks, resuming, cancelling; on a real vault and real DBOS."""
