"""Several process servers with many machines, as processes that are killed and paused."""
