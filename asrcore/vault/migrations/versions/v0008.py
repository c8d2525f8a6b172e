"""The age of points by a count of time that no step of a clock moves."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column; existing points are as old as the clock says."""
    op.add_column("points", sa.Column("counted_at", sa.Float))
    op.execute("UPDATE points SET counted_at = taken_at")
    op.create_index("ix_points_protection_id_counted_at", "points", ["protection_id", "counted_at"])
    op.drop_index("ix_points_protection_id_taken_at", "points")
