"""The engine is killed (SIGKILL) at its named steps, started again, and the contract's six invariants are checked."""
