"""Tables of the vault. Plain types only, so that SQLite and PostgreSQL hold the same; migrations make them.

What is compared, joined or listed is a column; everything else is JSON text (`_rows`).
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

__all__ = [
    "assignments",
    "certificates",
    "cycles",
    "events",
    "incarnation",
    "jobs",
    "metadata",
    "pending_cycles",
    "points",
    "policies",
    "protections",
    "servers",
    "sites",
]

# Constraints that have names can be altered by a later migration on both databases.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

sites = Table(
    "sites",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("driver", String(64), nullable=False),
    Column("settings", Text, nullable=False),
)

policies = Table(
    "policies",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("body", Text, nullable=False),
)

protections = Table(
    "protections",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("policy", String(64), ForeignKey("policies.name"), nullable=False),
    Column("home_site", String(64), ForeignKey("sites.name"), nullable=False),
    Column("source_site", String(64), ForeignKey("sites.name"), nullable=False),
    Column("source_machine", Text, nullable=False),
    Column("target_site", String(64), ForeignKey("sites.name"), nullable=False),
    Column("replica_id", Text, nullable=False),
    Column("networks", Text, nullable=False),
    Column("test_network", Text, nullable=False),
    Column("replica_kind", Text, nullable=False),
    Column("state", String(32), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("mark", Text),
    Column("head_point", String(64)),
    Column("target_machine", Text),
    Column("failover_point", String(64)),
    Column("planned", Boolean, nullable=False),
    Column("fence_due", Boolean, nullable=False),
    Column("seed_machine", Text),
    Column("test", Text),
    Column("created_at", Float, nullable=False),
    Column("last_cycle_at", Float),
    Column("last_test_at", Float),
    Column("last_scrub_at", Float),
    Column("resync_reason", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("retry_at", Float),
    Column("error", Text),
    Column("notices", Text),
    Column("restored", Boolean),
    UniqueConstraint("source_site", "source_machine"),
)

# Separate from `protections`, because a plan may be large and is written about twice per cycle.
pending_cycles = Table(
    "pending_cycles",
    metadata,
    Column("protection_id", String(64), ForeignKey("protections.id", ondelete="CASCADE"), primary_key=True),
    Column("id", String(64), nullable=False),
    Column("point_id", String(64), nullable=False),
    Column("mode", String(32), nullable=False),
    Column("base_point", String(64)),
    Column("taken_at", Float, nullable=False),
    Column("view_mark", Text),
    Column("plan", LargeBinary, nullable=False),
)

points = Table(
    "points",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("protection_id", String(64), ForeignKey("protections.id", ondelete="CASCADE"), nullable=False),
    Column("id", String(64), nullable=False),
    Column("taken_at", Float, nullable=False),
    Column("sealed_at", Float, nullable=False),
    Column("consistency", String(32), nullable=False),
    Column("kept", Boolean, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("bytes_sent", BigInteger, nullable=False),
    Column("dropping", Boolean, nullable=False),
    Column("held", BigInteger),
    Column("counted_at", Float),
    Column("damaged", Text),
    Column("proved_at", Float),
    Column("proved_to", BigInteger),
    UniqueConstraint("protection_id", "id"),
    Index("ix_points_protection_id_counted_at", "protection_id", "counted_at"),
)

cycles = Table(
    "cycles",
    metadata,
    Column("protection_id", String(64), ForeignKey("protections.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("id", String(64), nullable=False),
    Column("mode", String(32), nullable=False),
    Column("taken_at", Float, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("sealed_at", Float, nullable=False),
    Column("bytes_read", BigInteger, nullable=False),
    Column("bytes_sent", BigInteger, nullable=False),
    Column("bytes_zeroed", BigInteger, nullable=False),
    Column("bytes_same", BigInteger, nullable=False),
    Column("extents", Integer, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("kind", String(64), nullable=False),
    Column("machine", Text, nullable=False),
    Column("state", String(32), nullable=False),
    Column("step", Text, nullable=False),
    Column("progress_done", BigInteger, nullable=False),
    Column("progress_total", BigInteger, nullable=False),
    Column("progress_work", Text, nullable=False),
    Column("arguments", Text, nullable=False),
    Column("result", Text),
    Column("error", Text),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("cancel_requested", Boolean, nullable=False),
    Index(None, "machine", "number"),
    Index("ix_jobs_state", "state"),
)

events = Table(
    "events",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("machine", Text, nullable=False),
    Column("kind", String(64), nullable=False),
    Column("text", Text, nullable=False),
    Column("data", Text, nullable=False),
    Index(None, "machine", "number"),
)

# `session` changes each time a server starts. `sites` is JSON text, NULL for all; times are the database's own.
servers = Table(
    "servers",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("session", String(64), nullable=False, unique=True),
    Column("host", Text, nullable=False),
    Column("sites", Text),
    Column("lease", Float, nullable=False),
    Column("beat_at", Float, nullable=False),
    Column("version", String(64)),
)

# No reference to `servers`: the session of a removed server still says that a server worked on the machine.
assignments = Table(
    "assignments",
    metadata,
    Column("protection_id", String(64), ForeignKey("protections.id", ondelete="CASCADE"), primary_key=True),
    Column("session", String(64), nullable=False),
)

# One row. `written_by`: the transaction of PostgreSQL that wrote it; `place`: the database's, see `_incarnation`.
incarnation = Table(
    "incarnation",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("token", String(64), nullable=False),
    Column("place", Text, nullable=False),
    Column("written_by", BigInteger),
)

# `grants`: the role with which a token lets a component of that name join.
certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(64), primary_key=True),
    Column("role", String(32), nullable=False),
    Column("name", Text, nullable=False),
    Column("grants", String(32)),
    Column("addresses", Text, nullable=False),
    Column("issued_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("used_by", Text),
)
