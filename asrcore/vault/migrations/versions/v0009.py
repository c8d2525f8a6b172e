"""Epochs of two parts, and how a vault that was put back to an earlier copy is recognised."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Existing epochs are of generation 0, and no machine's record is in doubt."""
    with op.batch_alter_table("protections") as table:  # SQLite: the table is rebuilt
        table.alter_column("epoch", existing_type=sa.Integer, type_=sa.BigInteger, existing_nullable=False)
        table.add_column(sa.Column("restored", sa.Boolean))
    op.create_table(
        "incarnation",
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("token", sa.String(64), nullable=False),
        sa.Column("place", sa.Text, nullable=False),
        sa.Column("written_by", sa.BigInteger),
        sa.PrimaryKeyConstraint("number", name="pk_incarnation"),
    )
