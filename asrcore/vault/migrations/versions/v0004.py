"""Process servers that share a vault, and the machines assigned to each."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the tables; nothing is assigned yet."""
    op.create_table(
        "servers",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("session", sa.String(64), nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("sites", sa.Text),
        sa.Column("lease", sa.Float, nullable=False),
        sa.Column("beat_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_servers"),
        sa.UniqueConstraint("session", name="uq_servers_session"),
    )
    op.create_table(
        "assignments",
        sa.Column("protection_id", sa.String(64), nullable=False),
        sa.Column("session", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("protection_id", name="pk_assignments"),
        sa.ForeignKeyConstraint(
            ["protection_id"], ["protections.id"], name="fk_assignments_protection_id", ondelete="CASCADE"
        ),
    )
