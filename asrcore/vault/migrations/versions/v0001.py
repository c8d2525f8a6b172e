"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "sites",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("driver", sa.String(64), nullable=False),
        sa.Column("settings", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_sites"),
    )
    op.create_table(
        "policies",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_policies"),
    )
    _protections()
    _points_and_cycles()
    _jobs_and_events()


def _protections() -> None:
    op.create_table(
        "protections",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("policy", sa.String(64), nullable=False),
        sa.Column("home_site", sa.String(64), nullable=False),
        sa.Column("source_site", sa.String(64), nullable=False),
        sa.Column("source_machine", sa.Text, nullable=False),
        sa.Column("target_site", sa.String(64), nullable=False),
        sa.Column("replica_id", sa.Text, nullable=False),
        sa.Column("networks", sa.Text, nullable=False),
        sa.Column("test_network", sa.Text, nullable=False),
        sa.Column("replica_kind", sa.Text, nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("mark", sa.Text),
        sa.Column("head_point", sa.String(64)),
        sa.Column("target_machine", sa.Text),
        sa.Column("failover_point", sa.String(64)),
        sa.Column("planned", sa.Boolean, nullable=False),
        sa.Column("fence_due", sa.Boolean, nullable=False),
        sa.Column("seed_machine", sa.Text),
        sa.Column("test", sa.Text),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("last_cycle_at", sa.Float),
        sa.Column("last_test_at", sa.Float),
        sa.Column("resync_reason", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("retry_at", sa.Float),
        sa.Column("error", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_protections"),
        sa.UniqueConstraint("name", name="uq_protections_name"),
        sa.UniqueConstraint("source_site", "source_machine", name="uq_protections_source_site_source_machine"),
        sa.ForeignKeyConstraint(["policy"], ["policies.name"], name="fk_protections_policy"),
        sa.ForeignKeyConstraint(["home_site"], ["sites.name"], name="fk_protections_home_site"),
        sa.ForeignKeyConstraint(["source_site"], ["sites.name"], name="fk_protections_source_site"),
        sa.ForeignKeyConstraint(["target_site"], ["sites.name"], name="fk_protections_target_site"),
    )


def _of_protection(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["protection_id"], ["protections.id"], name=f"fk_{table}_protection_id", ondelete="CASCADE"
    )


def _points_and_cycles() -> None:
    op.create_table(
        "pending_cycles",
        sa.Column("protection_id", sa.String(64), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("point_id", sa.String(64), nullable=False),
        sa.Column("mode", sa.String(32), nullable=False),
        sa.Column("base_point", sa.String(64)),
        sa.Column("taken_at", sa.Float, nullable=False),
        sa.Column("view_mark", sa.Text),
        sa.Column("plan", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("protection_id", name="pk_pending_cycles"),
        _of_protection("pending_cycles"),
    )
    op.create_table(
        "points",
        sa.Column("number", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("protection_id", sa.String(64), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("taken_at", sa.Float, nullable=False),
        sa.Column("sealed_at", sa.Float, nullable=False),
        sa.Column("consistency", sa.String(32), nullable=False),
        sa.Column("kept", sa.Boolean, nullable=False),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("bytes_sent", sa.BigInteger, nullable=False),
        sa.Column("dropping", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_points"),
        sa.UniqueConstraint("protection_id", "id", name="uq_points_protection_id_id"),
        _of_protection("points"),
    )
    op.create_table(
        "cycles",
        sa.Column("protection_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("mode", sa.String(32), nullable=False),
        sa.Column("taken_at", sa.Float, nullable=False),
        sa.Column("started_at", sa.Float, nullable=False),
        sa.Column("sealed_at", sa.Float, nullable=False),
        sa.Column("bytes_read", sa.BigInteger, nullable=False),
        sa.Column("bytes_sent", sa.BigInteger, nullable=False),
        sa.Column("bytes_zeroed", sa.BigInteger, nullable=False),
        sa.Column("bytes_same", sa.BigInteger, nullable=False),
        sa.Column("extents", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("protection_id", "number", name="pk_cycles"),
        _of_protection("cycles"),
    )


def _jobs_and_events() -> None:
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("machine", sa.Text, nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("step", sa.Text, nullable=False),
        sa.Column("progress_done", sa.BigInteger, nullable=False),
        sa.Column("progress_total", sa.BigInteger, nullable=False),
        sa.Column("progress_work", sa.Text, nullable=False),
        sa.Column("arguments", sa.Text, nullable=False),
        sa.Column("result", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("started_at", sa.Float),
        sa.Column("ended_at", sa.Float),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_jobs"),
        sa.UniqueConstraint("id", name="uq_jobs_id"),
    )
    op.create_index("ix_jobs_machine_number", "jobs", ["machine", "number"])
    op.create_table(
        "events",
        sa.Column("number", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("machine", sa.Text, nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_events"),
    )
    op.create_index("ix_events_machine_number", "events", ["machine", "number"])
