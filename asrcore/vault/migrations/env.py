"""Run by Alembic: applies migrations on the connection it was handed, inside the transaction that it has open."""

from alembic import context

from asrcore.vault._versions import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
