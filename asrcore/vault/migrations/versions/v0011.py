"""What the source's newest view reported of a machine."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Add the column; of existing machines nothing is reported."""
    op.add_column("protections", sa.Column("notices", sa.Text))
