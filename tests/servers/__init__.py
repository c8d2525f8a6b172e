"""Several process servers under many machines, as processes that are killed and paused."""
