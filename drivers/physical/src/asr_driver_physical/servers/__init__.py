"""The enrolled servers: their connections, identity, facts, spool."""
