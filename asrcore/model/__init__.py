"""The engine's values: machine, extent, policy, recovery point, protection. No I/O, no clock."""
