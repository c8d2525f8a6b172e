"""The version of each process server, for people."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the column; servers of an older version leave it empty."""
    op.add_column("servers", sa.Column("version", sa.String(64)))
