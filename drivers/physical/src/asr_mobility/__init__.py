"""The mobility service: tracks a server's changed blocks and serves them. Standard library only, Python >= 3.9."""

__version__ = "0.1.0"
