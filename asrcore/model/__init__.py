"""Values the engine thinks in: machine, extent, policy, recovery point, protection. No I/O, no clock."""
