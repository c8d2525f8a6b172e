"""asrcore driver for physical servers, protected by an agent that they run."""
