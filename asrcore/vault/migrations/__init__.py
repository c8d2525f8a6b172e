"""Schema versions of the vault, applied by Alembic from `asrcore.vault._upgrade`."""
