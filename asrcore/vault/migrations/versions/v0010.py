"""What was found wrong with a recovery point, and when it was last proved."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the columns; of existing points nothing is known."""
    op.add_column("points", sa.Column("damaged", sa.Text))
    op.add_column("points", sa.Column("proved_at", sa.Float))
    op.add_column("points", sa.Column("proved_to", sa.BigInteger))
    op.add_column("protections", sa.Column("last_scrub_at", sa.Float))
