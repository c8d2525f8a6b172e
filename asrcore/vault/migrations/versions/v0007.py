"""What the target keeps for a point."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the column; it is unknown for existing points."""
    op.add_column("points", sa.Column("held", sa.BigInteger()))
