"""asrcore driver for Microsoft Azure."""
