"""Policies limit the bandwidth."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Existing policies have no limit."""
    policies = sa.table("policies", sa.column("name", sa.String), sa.column("body", sa.Text))
    connection = op.get_bind()
    for name, body in connection.execute(sa.select(policies.c.name, policies.c.body)).all():
        changed = json.dumps({**json.loads(body), "bandwidth": []}, ensure_ascii=False, separators=(",", ":"))
        connection.execute(sa.update(policies).where(policies.c.name == name).values(body=changed))
