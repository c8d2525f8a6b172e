"""The engine is killed (SIGKILL) at its crash points and restarted, and the contract's six invariants are checked."""
