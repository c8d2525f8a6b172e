"""Every named step of the engine, on the memory driver with worlds that outlive a process."""
