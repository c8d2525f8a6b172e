"""Every crash point of the engine, on the memory driver with worlds that survive the process."""
