"""Indices for frequent queries of the service, so that they cost the same however much the vault holds."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """For a machine's points by time, and for the jobs that have not ended."""
    op.create_index("ix_points_protection_id_taken_at", "points", ["protection_id", "taken_at"])
    op.create_index("ix_jobs_state", "jobs", ["state"])
