"""Sites, policies and protected machines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, TypeVar, Unpack

import attrs
from sqlalchemy import ColumnElement, Connection, Table, bindparam, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from asrcore.errors import AlreadyExists, AlreadyProtected, InvalidValue, NotFound, StillInUse
from asrcore.logline import report
from asrcore.model.policy import Policy
from asrcore.model.protection import Protection, Site
from asrcore.model.state import Event, allowed
from asrcore.vault import _rows, _schema
from asrcore.vault._servers import Servers
from asrcore.vault._store import row_of
from asrcore.vault._values import Changes

__all__ = ["Registry"]

_log = logging.getLogger(__name__)

_CHANGEABLE = frozenset(Changes.__annotations__)
_UPDATE_MACHINE = update(_schema.protections).where(_schema.protections.c.id == bindparam("machine"))
_LISTINGS = {"site": "asr site list", "policy": "asr policy list", "machine": "asr status"}

T = TypeVar("T")


class Registry(Servers):
    """The part of the vault that knows sites, policies and protected machines."""

    # -- sites -----------------------------------------------------------------------------------------------------

    def add_site(self, site: Site, *, secret: Collection[str] = ()) -> None:
        """Settings named in `secret` are encrypted. Raises InvalidValue (name), AlreadyExists, SecretKeyUnusable."""
        _check_own_name("site name", site.name)
        self._add("site", _schema.sites, site.name, _rows.site_row(site, secret, self._secrets.seal))

    def update_site(self, site: Site, *, secret: Collection[str] = ()) -> None:
        """Replace driver and settings of a site; see `add_site`. Raises NotFound."""
        self._replace("site", _schema.sites, site.name, _rows.site_row(site, secret, self._secrets.seal))

    def seal_site(self, name: str, secret: Collection[str]) -> bool:
        """Encrypt settings that an earlier version recorded in clear; returns whether there were any. In a SQLite file
        the unencrypted values are overwritten."""
        table = _schema.sites
        with self._read() as connection:
            row = row_of(connection, table, name=name)
        if row is None or not _rows.plain_settings(row) & set(secret):
            return False
        with self._write("seal-site") as connection:
            row = row_of(connection, table, name=name)
            if row is None:
                return False
            site = self._value(lambda found: _rows.site_of(found, self._secrets.open), row, f"site {name!r}")
            values = _rows.site_row(site, secret, self._secrets.seal)
            connection.execute(update(table).where(table.c.name == name).values(values))
        if self._place.path is not None:
            with self._translated(), self._engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").close()
        return True

    def remove_site(self, name: str) -> None:
        """Raises NotFound, StillInUse while a machine is protected from or to it."""
        table = _schema.protections
        self._remove("site", _schema.sites, name, (table.c.home_site, table.c.source_site, table.c.target_site))

    def site(self, name: str, *, without: Collection[str] = ()) -> Site:
        """`without`: settings to leave out, so that their key is not needed. Raises NotFound, SecretKeyUnusable."""
        return self._one("site", _schema.sites, name, lambda row: _rows.site_of(row, self._secrets.open, without))

    def sites(self) -> list[Site]:
        """All, by name. Settings that are encrypted stay so: their value is "(secret)"."""
        return self._all("site", _schema.sites, lambda row: _rows.site_of(row, lambda *_: "(secret)"))

    # -- policies --------------------------------------------------------------------------------------------------

    def add_policy(self, policy: Policy) -> None:
        """Raises InvalidValue (name), AlreadyExists."""
        _check_own_name("policy name", policy.name)
        self._add("policy", _schema.policies, policy.name, _rows.policy_row(policy))

    def update_policy(self, policy: Policy) -> None:
        """Replace the policy of that name. Raises NotFound."""
        self._replace("policy", _schema.policies, policy.name, _rows.policy_row(policy))

    def remove_policy(self, name: str) -> None:
        """Raises NotFound, StillInUse while a machine is protected by it."""
        self._remove("policy", _schema.policies, name, (_schema.protections.c.policy,))

    def policy(self, name: str) -> Policy:
        """Raises NotFound."""
        return self._one("policy", _schema.policies, name, _rows.policy_of)

    def policies(self) -> list[Policy]:
        """All, by name."""
        return self._all("policy", _schema.policies, _rows.policy_of)

    # -- protections -----------------------------------------------------------------------------------------------

    def add_protection(self, protection: Protection) -> Protection:
        """Record a machine to be protected; returns it as recorded. The same id again changes nothing.

        Raises AlreadyProtected (the name, or the machine), NotFound (policy, site), InvalidValue (name).
        """
        _check_name("machine name", protection.name, most=255)
        if protection.mark is not None or protection.head_point is not None or protection.pending is not None:
            raise ValueError("a new protection has no mark, head point or pending cycle: they come with points")
        with self._write("add-protection") as connection:
            if row_of(connection, _schema.protections, id=protection.id) is not None:
                return self._protection(connection, protection.id)
            self._check_references(connection, protection)
            self._check_free(connection, protection)
            try:
                connection.execute(insert(_schema.protections).values(_rows.protection_row(protection)))
            except IntegrityError as problem:  # PostgreSQL: another process came between the check and this
                raise AlreadyProtected(what=f"{protection.name!r}", name=protection.name) from problem
        return protection

    def protection(self, name_or_id: str) -> Protection:
        """By id or name. Raises NotFound."""
        with self._read() as connection:
            return self._protection(connection, name_or_id, by_name=True)

    def protections(self) -> list[Protection]:
        """All, by name."""
        return self._protections(None)

    def _protections(self, which: ColumnElement[bool] | None) -> list[Protection]:
        table, pending = _schema.protections, _schema.pending_cycles
        statement = select(table).order_by(table.c.name)
        if which is not None:
            statement = statement.where(which)
        with self._read() as connection:
            rows = connection.execute(statement).mappings().all()
            cycles = {row["protection_id"]: row for row in connection.execute(select(pending)).mappings()}
        return [self._protection_of(row, cycles.get(row["id"])) for row in rows]

    def my_protections(self) -> list[Protection]:
        """Those that this handle works on, by name: all, or a process server's own."""
        return self._protections(self._mine())

    def update(self, protection_id: str, **changes: Unpack[Changes]) -> Protection:
        """Change fields in one transaction; returns the whole as it is now. State, mark, head point and pending
        cycle change only by separate methods.

        Raises NotFound (also of a policy), AlreadyProtected (name taken), TypeError for other fields.
        """
        with self._write("update") as connection:
            return self._change(connection, self._protection(connection, protection_id), changes)

    def transition(self, protection_id: str, event: Event, **changes: Unpack[Changes]) -> Protection:
        """Let an event happen to a machine, with changes of other fields, in one transaction. Raises WrongState."""
        with self._write("transition") as connection:
            protection = self._protection(connection, protection_id)
            row = allowed(protection.name, protection.state, event)
            changed = self._change(connection, protection, changes, state=row.target)
        return self._reported(protection, changed)

    def forget_mark(self, protection_id: str, reason: str) -> Protection:
        """Discard the source's mark: the next cycle compares (invariant 2 in docs/explanation/architecture.md)."""
        with self._write("forget-mark") as connection:
            protection = self._protection(connection, protection_id)
            return self._store(connection, protection, mark=None, resync_reason=reason)

    def remove_protection(self, protection_id: str) -> None:
        """Delete the records of a machine, its points and statistics; an unknown one is ignored. Jobs and log stay."""
        with self._write("remove-protection") as connection:
            row = row_of(connection, _schema.protections, id=protection_id)
            if row is None:
                return
            self._check_mine(connection, protection_id, row["name"])
            connection.execute(delete(_schema.protections).where(_schema.protections.c.id == protection_id))

    def _reported(self, before: Protection, after: Protection) -> Protection:
        """Log a recorded change of the state; returns the machine as it is now."""
        if after.state is not before.state:
            facts = {"machine": after.name, "state": after.state.value, "before": before.state.value}
            report(_log, logging.INFO, "state changed", **facts, epoch=after.epoch)
        return after

    # -- used by the other parts -------------------------------------------------------------------------------------

    def _protection(self, connection: Connection, name_or_id: str, *, by_name: bool = False) -> Protection:
        row = row_of(connection, _schema.protections, id=name_or_id)
        if row is None and by_name:
            row = row_of(connection, _schema.protections, name=name_or_id)
        if row is None:
            raise _not_found("machine", name_or_id)
        self._check_mine(connection, row["id"], row["name"])
        return self._protection_of(row, row_of(connection, _schema.pending_cycles, protection_id=row["id"]))

    def _protection_of(self, row: _rows.Row, pending_row: _rows.Row | None) -> Protection:
        what = f"machine {row['name']!r}"
        pending = None
        if pending_row is not None:
            pending = self._value(
                lambda found: _rows.pending_of(found, lambda detail: self._damaged(f"{what}: {detail}")),
                pending_row,
                what,
            )
        return self._value(lambda found: _rows.protection_of(found, pending), row, what)

    def _change(self, connection: Connection, protection: Protection, changes: Changes, **more: Any) -> Protection:
        """Store changes of a caller, after checks."""
        refused = sorted(set(changes) - _CHANGEABLE)
        if refused:
            raise TypeError(f"{', '.join(refused)}: not changed this way, see the vault's other methods")
        if changes.get("epoch", protection.epoch) < protection.epoch:
            raise ValueError(f"epoch {changes['epoch']} is older than {protection.epoch}: ownership never goes back")
        changed = attrs.evolve(protection, **changes)
        if changed.name != protection.name:
            _check_name("machine name", changed.name, most=255)
            self._check_free(connection, changed)
        if changed.policy != protection.policy:
            self._check_references(connection, changed)
        return self._store(connection, protection, **changes, **more)

    def _store(self, connection: Connection, protection: Protection, **changes: Any) -> Protection:
        """Store fields of a protection, without checks; the pending cycle is stored by its own methods."""
        changed = attrs.evolve(protection, **changes)
        row = _rows.protection_row(changed)
        values = {name: row[name] for name in changes if name in row}
        if values:
            connection.execute(_UPDATE_MACHINE, {"machine": protection.id, **values})
        return changed

    def _check_references(self, connection: Connection, protection: Protection) -> None:
        for kind, table, name in (
            ("policy", _schema.policies, protection.policy),
            ("site", _schema.sites, protection.home_site),
            ("site", _schema.sites, protection.source_site),
            ("site", _schema.sites, protection.target_site),
        ):
            if row_of(connection, table, name=name) is None:
                raise _not_found(kind, name)

    def _check_free(self, connection: Connection, protection: Protection) -> None:
        """No *other* protection has the name or the machine."""
        table = _schema.protections
        others = select(table.c.name).where(table.c.id != protection.id)
        if connection.execute(others.where(table.c.name == protection.name)).scalar() is not None:
            raise AlreadyProtected(what=f"a machine named {protection.name!r}", name=protection.name)
        same = (table.c.source_site == protection.source_site, table.c.source_machine == protection.source_machine)
        name = connection.execute(others.where(*same)).scalar()
        if name is not None:
            what = f"{protection.source_machine!r} of site {protection.source_site!r}"
            raise AlreadyProtected(what=what, name=name)

    # -- tables with a name ------------------------------------------------------------------------------------------

    def _add(self, kind: str, table: Table, name: str, row: dict[str, Any]) -> None:
        with self._write(f"add-{kind}") as connection:
            if row_of(connection, table, name=name) is not None:
                raise AlreadyExists(kind=kind, name=name)
            try:
                connection.execute(insert(table).values(row))
            except IntegrityError as problem:  # PostgreSQL: another process came between the check and this
                raise AlreadyExists(kind=kind, name=name) from problem

    def _replace(self, kind: str, table: Table, name: str, row: dict[str, Any]) -> None:
        with self._write(f"update-{kind}") as connection:
            if connection.execute(update(table).where(table.c.name == name).values(row)).rowcount == 0:
                raise _not_found(kind, name)

    def _remove(self, kind: str, table: Table, name: str, uses: tuple[Any, ...]) -> None:
        with self._write(f"remove-{kind}") as connection:
            protections = _schema.protections
            users = connection.execute(
                select(protections.c.name).where(or_(*(column == name for column in uses))).order_by("name")
            ).scalars()
            if names := users.all():
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise StillInUse(kind=kind, name=name, users=shown)
            if connection.execute(delete(table).where(table.c.name == name)).rowcount == 0:
                raise _not_found(kind, name)

    def _one(self, kind: str, table: Table, name: str, make: Callable[[_rows.Row], T]) -> T:
        with self._read() as connection:
            row = row_of(connection, table, name=name)
        if row is None:
            raise _not_found(kind, name)
        return self._value(make, row, f"{kind} {name!r}")

    def _all(self, kind: str, table: Table, make: Callable[[_rows.Row], T]) -> list[T]:
        with self._read() as connection:
            rows = connection.execute(select(table).order_by(table.c.name)).mappings().all()
        return [self._value(make, row, f"{kind} {row['name']!r}") for row in rows]


def _not_found(kind: str, name: str) -> NotFound:
    return NotFound(kind=kind, name=name, listing=_LISTINGS[kind])


def _check_own_name(what: str, name: str) -> None:
    """Of what an operator names: also fit for a command line, and no path."""
    _check_name(what, name)
    if name.startswith(("-", ".")) or "/" in name:
        raise InvalidValue(what=what, value=name, wanted="a name without / that does not begin with - or a dot")


def _check_name(what: str, name: str, most: int = 64) -> None:
    if not (name and name.isprintable() and name == name.strip() and len(name) <= most):
        raise InvalidValue(what=what, value=name, wanted=f"1 to {most} printable characters without spaces around")
