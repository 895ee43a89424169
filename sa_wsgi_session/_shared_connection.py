"""One connection that all sessions of a test share, and the transactions that they believe to have on it.

Theory of operation
-------------------

:class:`SharedConnection` takes one connection out of an engine's pool, begins a transaction on it that is never
committed, and puts a :class:`SharedPool` in the place of the pool.  Whoever checks a connection out of that is a
:class:`Tenant` of the one connection, and holds a :class:`Lease`: what SQLAlchemy takes for the pool's proxy of a
connection.  Its first statement sets a SAVEPOINT, ``commit()`` releases it, ``rollback()`` rolls back to it.

::

    the pool's connection   BEGIN ─────────────────────────────────────────────────────────────▶ ROLLBACK
    a session                      SAVEPOINT 1 … RELEASE 1
    a request                                                SAVEPOINT 2 … ROLLBACK TO 2

It is done on the level of the driver's connection, below engines, sessions, binds and events: these work as ever.

Several tenants may be in the midst of a transaction.  SAVEPOINTs are a stack, independent transactions are not, so:

* A SAVEPOINT within which nothing was changed *floats*: it is released when another tenant is about to send something,
  and set again, on top, before its tenant's next statement.  Hence a transaction that merely reads never stands in the
  way of any other.
* A tenant that commits while a later one is in the midst of changes *leaves its SAVEPOINT behind*; it is released when
  that one is done.
* What remains is where a rollback would undo the work of others.  That is *told*: an error at the end of the block.
* Tenants of different threads take turns: whoever wants to do something waits while a tenant of another thread has
  changed something and has not ended its transaction, for ``timeout`` seconds at most; and for a second while the code
  of another unit of work is running, even if that has only read so far.

This file knows SQLAlchemy's engines and pools, and drivers.  It does not know sessions.
"""

from __future__ import annotations

import os
import re
import sqlite3
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import sqlalchemy
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DontWrapMixin

from ._binding import Unit, innermost
from ._errors import log
from ._shared_pool import Hooks, SharedPool
from ._watching import Effect, effect_of


class IsolationError(DontWrapMixin, RuntimeError):
    """Something was done within :class:`~sa_wsgi_session.testing.isolated` that it cannot do as production would.

    Raised where it happens if that is possible, and at the end of the block in any case, so that nobody swallows it.
    """


_MYSQL = ("mysql", "mariadb")
#: Those that tell whether PostgreSQL has aborted a transaction.
_POSTGRESQL_DRIVERS = ("psycopg", "psycopg2")
#: ``PQTRANS_IDLE`` and ``PQTRANS_INERROR`` of libpq: in no transaction block, and in a failed one.
_IDLE, _IN_ERROR = 0, 3
#: MySQL's ``ER_WARNING_NOT_COMPLETE_ROLLBACK``.
_NOT_ROLLED_BACK = 1196

#: How long, in seconds, a thread waits for a unit of work that has changed nothing so far.
_PATIENCE = 1.0

_ON_ITS_OWN = "test this case on a database of its own, without isolated()"


# -- statements that begin and end transactions -----------------------------------------------------------------------


class _Control(NamedTuple):
    verb: Literal["begin", "commit", "rollback", "savepoint", "release", "rollback to"]
    name: str = ""


_TRAILING = r"\s*;?\s*\Z"
_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
#: In which words and semicolons mean nothing.
_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`|--[^\n]*|/\*.*?\*/|\$(\w*)\$.*?\$\1\$""", re.DOTALL)
_CONTROLS: tuple[tuple[Any, re.Pattern[str]], ...] = tuple(
    (verb, re.compile(r"\s*" + pattern + _TRAILING, re.IGNORECASE))
    for verb, pattern in (
        ("begin", r"(?:BEGIN|START\s+TRANSACTION)\b[^;]*()"),
        ("commit", r"(?:COMMIT|END)(?:\s+(?:WORK|TRANSACTION))?()"),
        ("rollback", r"(?:ROLLBACK|ABORT)(?:\s+(?:WORK|TRANSACTION))?()"),
        ("savepoint", r"SAVEPOINT\s+([^\s;]+)"),
        ("release", r"RELEASE\s+(?:SAVEPOINT\s+)?([^\s;]+)"),
        ("rollback to", r"ROLLBACK\s+(?:WORK\s+|TRANSACTION\s+)?TO\s+(?:SAVEPOINT\s+)?([^\s;]+)"),
    )
)
# What would end the one transaction, in a form that is not taken apart above.
_ENDS_IT = re.compile(
    r"\s*(?:COMMIT|END|ROLLBACK|ABORT|BEGIN|START\s+TRANSACTION|PREPARE\s+TRANSACTION|XA)\b", re.IGNORECASE
)
# The manuals of MySQL and MariaDB, "Statements That Cause an Implicit Commit".
_COMMITS_IMPLICITLY = re.compile(
    r"\s*(?:ALTER|CREATE(?!\s+(?:OR\s+REPLACE\s+)?TEMPORARY)|DROP(?!\s+TEMPORARY)|RENAME|TRUNCATE|GRANT|REVOKE|FLUSH|RESET"
    r"|(?:UN)?LOCK\s+TABLES?|(?:UN)?INSTALL|(?:ANALYZE|CHECK|OPTIMIZE|REPAIR)\s+(?:\w+\s+)?TABLES?|CACHE\s+INDEX"
    r"|LOAD\s+INDEX|SET\s+PASSWORD|SET\b.*\bAUTOCOMMIT)\b",
    re.IGNORECASE,
)
_TEMPORARY = re.compile(r"\s*(?:CREATE|DROP)\s+(?:OR\s+REPLACE\s+)?TEMPORARY\b", re.IGNORECASE)
_LOCKS = re.compile(r"\bFOR\s+(?:NO\s+KEY\s+|KEY\s+)?(?:UPDATE|SHARE)\b|\bLOCK\s+IN\s+SHARE\s+MODE\b", re.IGNORECASE)
#: The length, in characters, up to which a statement may be one of these.
_SHORT = 1_000


def control_of(statement: str) -> _Control | None:
    """What *statement* does with transactions, if that is all that it does."""
    if len(statement) > _SHORT:
        return None
    statement = _COMMENT.sub(" ", statement)
    for verb, pattern in _CONTROLS:
        match = pattern.match(statement)
        if match:
            return _Control(verb, match.group(1))
    return None


def is_control(statement: str) -> bool:
    """Whether *statement* begins or ends a transaction or a SAVEPOINT, and does nothing else."""
    return control_of(statement) is not None


# -- cursors -----------------------------------------------------------------------------------------------------------


class _BufferedCursor(sqlite3.Cursor):
    """Reads all rows at once, as other drivers do: later ones would show what other tenants have changed since.

    It is an iterator, as any of SQLite's.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._rows: deque[Any] = deque()

    def execute(self, *args: Any) -> Any:
        self._rows.clear()
        super().execute(*args)
        self._rows.extend(super().fetchall())
        return self

    def fetchone(self) -> Any:
        return self._rows.popleft() if self._rows else None

    def fetchmany(self, size: int | None = None) -> list[Any]:
        number = self.arraysize if size is None else size
        return [self._rows.popleft() for _ in range(min(number, len(self._rows)))]

    def fetchall(self) -> list[Any]:
        rows = list(self._rows)
        self._rows.clear()
        return rows

    def executescript(self, *args: Any) -> Any:
        raise IsolationError("executescript() commits first, which would end the transaction of isolated()")

    def __next__(self) -> Any:
        if not self._rows:
            raise StopIteration
        return self._rows.popleft()


# -- tenants ----------------------------------------------------------------------------------------------------------


class Savepoint:
    """A SAVEPOINT of a tenant: the first one is its transaction, the others are SAVEPOINTs that it asked for."""

    __slots__ = ("asked", "changed", "holds", "is_set", "name", "tenant")

    def __init__(self, tenant: Tenant, name: str, asked: str = "") -> None:
        #: Whose it is; ``None``: that one has committed, and only what is above it keeps it from being released.
        self.tenant: Tenant | None = tenant
        #: Its name in the database.
        self.name = name
        #: The name that the application gave it, if any.
        self.asked = asked
        #: Whether it is there; else it floats.
        self.is_set = False
        #: Whether its tenant has changed something in it, and not in one above it.
        self.changed = False
        #: Whether there is work of others in it, which a rollback would undo.
        self.holds = False

    @property
    def guards(self) -> bool:
        return self.tenant is not None and (self.changed or self.holds)


class Tenant:
    """Whoever has checked the connection out, and the transaction that it is in."""

    __slots__ = (
        "aborted",
        "cursors",
        "explicit",
        "locks",
        "lost",
        "passed",
        "raw",
        "read_only",
        "savepoints",
        "thread",
        "unit",
    )

    def __init__(self) -> None:
        self.savepoints: list[Savepoint] = []
        #: The thread that has used it last.
        self.thread = threading.get_ident()
        #: The unit of work that its transaction is part of, if it is.
        self.unit: Unit | None = None
        #: Somebody has waited for the end of its transaction, in vain.
        self.passed = False
        #: It reads what others must not change (SELECT … FOR UPDATE).
        self.locks = False
        #: The cursors that it has asked for, and may use past SQLAlchemy.
        self.cursors: list[Any] = []
        #: It has used a cursor past SQLAlchemy, and may do so again.
        self.raw = False
        #: It has sent a BEGIN of its own.
        self.explicit = False
        self.read_only = False
        #: A statement in it has failed, after which PostgreSQL wants it rolled back, while others go on.
        self.aborted = False
        #: Why its transaction is gone, if it is.
        self.lost = ""

    @property
    def has_changed(self) -> bool:
        return bool(self.cursors) or any(savepoint.changed for savepoint in self.savepoints)

    @property
    def holds_up(self) -> bool:
        """Whether other threads have to wait for the end of its transaction."""
        return self.has_changed or self.locks

    @property
    def is_running(self) -> bool:
        """Whether it is in a transaction of a unit of work whose code is running, which will end soon."""
        unit = self.unit
        return bool(self.savepoints) and unit is not None and unit.frame.unit is unit and not self.passed


# -- the connection ---------------------------------------------------------------------------------------------------


class SharedConnection:
    """The one connection of an engine, from the beginning of a block to its end."""

    def __init__(self, engine: Engine, timeout: float) -> None:
        """Begin.

        :raises ValueError: if the engine is of a database, or a driver, that is not supported.
        :raises IsolationError: if its connection is in a transaction already.
        """
        self.engine = engine
        self.dialect: Any = engine.dialect
        self.is_mysql = self.dialect.name in _MYSQL
        known = self.is_mysql or self.dialect.name == "sqlite"
        if self.dialect.is_async or not (
            known or (self.dialect.name == "postgresql" and self.dialect.driver in _POSTGRESQL_DRIVERS)
        ):
            raise ValueError(
                f"isolated() knows SQLite, PostgreSQL with psycopg or psycopg2, MariaDB and MySQL, all of them with "
                f"synchronous drivers, not {self.dialect.name}+{self.dialect.driver}"
            )
        self.timeout = timeout
        self.tenants: list[Tenant] = []
        #: Those whose lease was dropped, which have to be left.
        self.dropped: deque[Tenant] = deque()
        #: What went wrong, or differs from production: to be raised at the end.
        self.told: list[IsolationError] = []
        #: What was left open is closed, in any order.
        self.is_clearing_up = False
        self._stack: list[Savepoint] = []
        self._names = map("isolated_{}".format, count())
        #: The SAVEPOINTs of the blocks, the innermost last.
        self._bases: list[str] = []
        #: Who has sent the last statement.
        self._last = Tenant()
        #: Why the connection is of no use any more, if it is not.
        self._lost: IsolationError | None = None
        self.has_ended = False
        self._has_temporary_tables = False
        self._turn = threading.Condition(threading.RLock())
        self._busy = False
        self._pool = engine.pool
        self._original: Any = engine.raw_connection()
        self.driver: Any = self._original.dbapi_connection
        #: The pool's record of it.
        self.record: Any = self._original._connection_record
        try:
            self._begin()
        except BaseException:
            self._original.close()
            raise
        self._hooks = Hooks(self)
        self.pool = SharedPool(self, self._pool)
        engine.pool = self.pool

    # The beginning and the end

    def _begin(self) -> None:
        name, driver = self.dialect.name, self.driver
        #: Whether the transaction was begun by a statement, so that it takes one to end it.
        self._began = True
        #: Whether what is sent without a BEGIN is durable at once.
        self.autocommits: bool
        self._cursor_class: tuple[type, ...] = ()
        if name == "sqlite":
            # Python 3.12's attribute: True, False, or "legacy", as it always was.
            mode = getattr(driver, "autocommit", -1)
            self.autocommits = bool(mode) if mode in (True, False) else driver.isolation_level is None
            self._began = not driver.in_transaction
            if mode and not self._began:
                raise IsolationError(
                    "the connection of the pool is in a transaction already, which somebody has begun before "
                    "isolated(): end that one first"
                )
            self._cursor_class = (_BufferedCursor,) if isinstance(driver, sqlite3.Connection) else ()
            self._violations = self._broken_references()
        elif name == "postgresql":
            # Else the driver begins by itself.
            self._began = self.autocommits = driver.autocommit
        else:
            asked = getattr(driver, "get_autocommit", None)
            self.autocommits = bool(asked() if asked is not None else driver.autocommit)
        if self._began:
            self._send("START TRANSACTION" if self.is_mysql else "BEGIN")
        self._begin_block()

    def _begin_block(self) -> None:
        base = next(self._names)
        self._send(f"SAVEPOINT {base}")
        self._bases.append(base)

    def end(self) -> None:
        """Roll everything back, and give the connection and the pool back as they were."""
        with self._turn:
            self.has_ended = True
            self.engine.pool = self._pool
            self._hooks.remove()
            try:
                if self._lost is None:
                    self._roll_back_all()
            finally:
                if self._lost is not None:
                    if not self.told:
                        self._lose(None)  # an inner block has told it, of itself
                    self._original.invalidate()
                self._original.close()

    def _roll_back_all(self) -> None:
        with suppress(IsolationError):  # which is told
            self._send(f"ROLLBACK TO SAVEPOINT {self._bases[0]}")
            if not self._began:
                self.driver.rollback()
            else:
                self._send("ROLLBACK")
                if self.is_mysql and not self._has_temporary_tables:
                    self._look_for_remains()

    def _look_for_remains(self) -> None:
        with closing(self.driver.cursor()) as cursor:
            cursor.execute("SHOW WARNINGS")
            codes = {row[1] for row in cursor.fetchall()}
        # (MariaDB says so of temporary tables, too.)
        if _NOT_ROLLED_BACK in codes:
            self.tell(
                "a table was changed whose storage engine knows no transactions (MyISAM, Aria, …), so the change "
                "stays: make it an InnoDB table"
            )

    def push(self) -> None:
        """A block begins within the block.

        :raises IsolationError: if somebody is in the midst of a change.
        """
        with self._operation():
            self._await_turn(None)
            self._settle()
            if any(savepoint.guards for savepoint in self._stack):
                raise IsolationError(
                    "a transaction is open that has changed something: commit it, or roll it back, before an inner "
                    "isolated() begins"
                )
            self._heal(None)
            self._float(None)
            self._begin_block()

    def pop(self) -> None:
        """It ends: roll back what was done in it."""
        with self._operation():
            base = self._bases.pop()
            self._note_aborted(None)
            for tenant in self.tenants:
                if tenant.has_changed:
                    tenant.lost = "the isolated() in which it has changed something has ended"
                    tenant.savepoints = []
                tenant.cursors = []
                for savepoint in tenant.savepoints:
                    savepoint.is_set = savepoint.holds = False
            self._stack.clear()
            if self._lost is None:
                self._send(f"ROLLBACK TO SAVEPOINT {base}", f"RELEASE SAVEPOINT {base}")

    def await_others(self) -> None:
        """Wait until no other thread is in the midst of a change; tell if it takes too long."""
        with suppress(IsolationError), self._operation():
            self._await_turn(None)

    # What tenants do

    def admit(self) -> Tenant:
        with self._turn:
            self._check_alive()
            tenant = Tenant()
            self.tenants.append(tenant)
            return tenant

    def cursor(self, tenant: Tenant, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """*tenant* asks for a cursor, and may do anything with it."""
        with self._operation():
            self._enter(tenant)
            self._last = tenant
            if self.is_mysql:
                # An unbuffered one would have to be read to its end before anybody else sends a statement.  (PyMySQL
                # and mysqlclient take a class for that, others "buffered=False".)
                args = tuple(_buffered(value) for value in args)
                options = {name: name == "buffered" or _buffered(value) for name, value in options.items()}
            cursor = self.driver.cursor(*(args or self._cursor_class), **options)
            if tenant.savepoints:
                tenant.cursors.append(cursor)
            return cursor

    def execute(self, tenant: Tenant, cursor: Any, run: Callable[[], None], statement: str, options: Any) -> None:
        """*tenant* executes *statement* on *cursor*, by ``run()``.

        :param options: the execution options of its ``Connection``.
        """
        with self._operation():
            tenant.cursors = [other for other in tenant.cursors if other is not cursor]
            control = control_of(statement)
            if control is not None:
                self._control(tenant, control, run)
                return
            self._check_statement(statement)
            self._enter(tenant)
            self._check_usable(tenant)
            if options.get("postgresql_readonly") and not tenant.read_only and not self._is_aborted():
                tenant.read_only = True
                self._send("SET TRANSACTION READ ONLY")
            if effect_of(statement) is not Effect.READS:
                self._changes(tenant)
            elif _LOCKS.search(statement):
                tenant.locks = True
            self._last = tenant
            self._has_temporary_tables |= _TEMPORARY.match(statement) is not None
            level = options.get("isolation_level")
            autocommits = not tenant.explicit and (self.autocommits if level is None else level == "AUTOCOMMIT")
            try:
                run()
            except BaseException:
                if autocommits:
                    self._roll_back(tenant)
                raise
            if autocommits:
                try:
                    self._commit(tenant)
                except BaseException:
                    self._roll_back(tenant)
                    raise

    def commit(self, tenant: Tenant) -> None:
        with self._operation():
            self._conclude(tenant, self._commit)

    def roll_back(self, tenant: Tenant) -> None:
        with self._turn:
            if self._busy:
                # The garbage collector closes a session, in the midst of something else.
                self.dropped.append(tenant)
                return
        with self._operation():
            self._conclude(tenant, self._roll_back)

    def leave(self, tenant: Tenant) -> None:
        """*tenant* gives its connection back."""
        with self._turn:
            self.dropped.append(tenant)
            if not self._busy:
                with self._operation():
                    self._settle()

    def prepare(self, tenant: Tenant) -> None:
        """The first phase of a two-phase commit: what could be refused is refused now."""
        with self._operation():
            self._settle()
            self._check_deferred(tenant)

    def tell(self, what: str) -> IsolationError:
        """An error that is raised at the end of the block, too, whoever swallows it."""
        error = IsolationError(what + _place())
        self.told.append(error)
        return error

    # Steps

    @contextmanager
    def _operation(self) -> Iterator[None]:
        with self._turn:
            if self._busy:
                raise self.tell("a statement was sent while another one was being executed, on the same thread")
            self._busy = True
            try:
                yield
            finally:
                self._busy = False
                self._turn.notify_all()

    def _check_alive(self) -> None:
        if self.has_ended:
            raise IsolationError(
                "a connection of a block of isolated() was used after the block had ended: end what uses it within the "
                "block, or ask the engine for another connection"
            )
        if self._lost is not None:
            raise IsolationError(
                "the connection of isolated() is of no use any more: see its first error"
            ) from self._lost

    def _enter(self, tenant: Tenant) -> None:
        """*tenant* is about to send a statement: it is its turn, and its SAVEPOINTs are set."""
        self._await_turn(tenant)
        if self._is_over():
            raise self._lose(None)
        tenant.thread = threading.get_ident()
        self._settle(but=tenant)
        self._heal(tenant)
        if tenant.lost:
            return
        if not tenant.savepoints:
            tenant.unit = innermost()
            tenant.savepoints.append(self._new(tenant))
        self._float(tenant)
        self._set(tenant)

    def _check_usable(self, tenant: Tenant) -> None:
        if tenant.lost:
            raise IsolationError(f"this transaction is gone: {tenant.lost}")
        if tenant.aborted:
            raise IsolationError(
                "current transaction is aborted: an earlier statement in it has failed, so PostgreSQL would refuse "
                "this one (InFailedSqlTransaction); roll back, or run the statement that may fail in begin_nested()"
            )

    def _await_turn(self, tenant: Tenant | None) -> None:
        """Wait until no other thread is in the midst of something."""
        if not self._wait(
            lambda: not any(other.is_running for other in self._others(tenant)), min(self.timeout, _PATIENCE)
        ):
            # It may wait for this one, and perhaps has only read: go on, and do not ask again.
            for other in self._others(tenant):
                other.passed = True
        if not self._wait(lambda: not any(other.holds_up for other in self._others(tenant)), self.timeout):
            raise self.tell(
                f"another thread has changed something and has not ended its transaction for {self.timeout:g} seconds; "
                f"within isolated() all share one connection, so they take turns: commit (or roll back) before another "
                f"thread goes on, in a test before it sends its request"
            )
        self._check_alive()

    def _others(self, tenant: Tenant | None) -> list[Tenant]:
        """The other tenants, of other threads; without those that are about to be rolled back."""
        me = threading.get_ident()
        others = [other for other in self.tenants if other is not tenant and other.thread != me]
        return [other for other in others if other not in self.dropped]

    def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        # Others may do something meanwhile.
        self._busy = False
        try:
            return self._turn.wait_for(lambda: self.has_ended or self._lost is not None or condition(), seconds)
        finally:
            self._busy = True

    def _settle(self, *, but: Tenant | None = None) -> None:
        """Make up for what could not be done, or known, when it happened.

        :param but: whose cursors are about to be used.
        """
        me = threading.get_ident()
        for tenant in self.tenants:
            if tenant.cursors and tenant is not but and tenant.thread == me:
                # SQLAlchemy has not used them: somebody else has.
                tenant.cursors, tenant.raw = [], True
                self._changes(tenant)
                if self.autocommits and not tenant.explicit:
                    self._commit(tenant)
        while self.dropped:
            tenant = self.dropped.popleft()
            self._roll_back(tenant)
            if tenant in self.tenants:
                self.tenants.remove(tenant)

    def _heal(self, tenant: Tenant | None) -> None:
        """If PostgreSQL has aborted the transaction of another one, get out of that."""
        if self._note_aborted(tenant):
            self._undo(self._last, self._last.savepoints[-1], keep=True)

    def _note_aborted(self, tenant: Tenant | None) -> bool:
        """Whether PostgreSQL has aborted the transaction of another one, which can only be rolled back then."""
        last = self._last
        if last is tenant or not last.savepoints or not self._is_aborted():
            return False
        last.aborted = True
        return True

    def _is_over(self) -> bool:
        """Whether the driver knows that the transaction has ended: what comes now would be durable."""
        if self.dialect.name == "sqlite":
            return not self.driver.in_transaction
        return self.dialect.name == "postgresql" and bool(self.driver.info.transaction_status == _IDLE)

    def _is_aborted(self) -> bool:
        if self.dialect.name != "postgresql":
            return False
        return bool(self.driver.info.transaction_status == _IN_ERROR)

    def _new(self, tenant: Tenant, asked: str = "") -> Savepoint:
        return Savepoint(tenant, next(self._names), asked)

    def _set(self, tenant: Tenant) -> None:
        for savepoint in tenant.savepoints:
            if not savepoint.is_set:
                self._send(f"SAVEPOINT {savepoint.name}")
                savepoint.is_set = True
                self._stack.append(savepoint)
                if tenant.read_only:
                    self._send("SET TRANSACTION READ ONLY")

    def _float(self, tenant: Tenant | None) -> None:
        """Release what guards nothing, on top of the stack, unless it is all *tenant*'s."""
        position = len(self._stack)
        while position and not self._stack[position - 1].guards:
            position -= 1
        if any(savepoint.tenant is not tenant for savepoint in self._stack[position:]):
            self._release(position)

    def _release(self, position: int) -> None:
        """Release the SAVEPOINT there, and with it all above; those of others float."""
        released = self._stack[position:]
        del self._stack[position:]
        for savepoint in released:
            savepoint.is_set = False
        self._send(f"RELEASE SAVEPOINT {released[0].name}")

    def _changes(self, tenant: Tenant) -> None:
        """What *tenant* changes lies within whatever is set above."""
        savepoint = tenant.savepoints[-1]
        savepoint.changed = True
        for above in self._stack[self._stack.index(savepoint) :]:
            if above.tenant is not None and above.tenant is not tenant:
                above.holds = True

    def _control(self, tenant: Tenant, control: _Control, run: Callable[[], None]) -> None:
        if control.verb == "commit":
            self._conclude(tenant, self._commit)
            return
        if control.verb == "rollback":
            self._conclude(tenant, self._roll_back)
            return
        if control.verb == "begin" and self.is_mysql:
            self._conclude(tenant, self._commit)  # implicitly
        self._enter(tenant)
        if control.verb == "begin":
            tenant.explicit = True
            return
        if control.verb != "rollback to":
            self._check_usable(tenant)
        elif tenant.lost:
            return  # there is nothing left to be rolled back
        known = next((known for known in reversed(tenant.savepoints) if known.asked == control.name), None)
        if self._is_aborted() and control.verb != "rollback to":
            run()  # to be refused
        elif control.verb == "savepoint":
            tenant.savepoints.append(self._new(tenant, control.name))
            self._set(tenant)
        elif known is None:
            run()  # to be refused
        elif control.verb == "release":
            self._release_savepoint(tenant, known)
        else:
            self._roll_back_to(tenant, known)

    def _conclude(self, tenant: Tenant, end: Callable[[Tenant], None]) -> None:
        """End the transaction of *tenant*: ``end()`` commits it, or rolls it back."""
        self._settle()
        end(tenant)
        if tenant.raw and self._lost is None and not self.has_ended:
            # The next statement of a cursor that it has kept can't be seen: be ready for it.
            tenant.savepoints.append(self._new(tenant))
            self._set(tenant)

    def _check_statement(self, statement: str) -> None:
        parts = [statement]
        if ";" in statement and self.dialect.name != "sqlite":  # whose drivers take one statement at a time
            parts = _QUOTED.sub(" ", statement).split(";")
        if any(_ENDS_IT.match(part) for part in parts):
            raise self.tell(
                "a statement would end the transaction of isolated() in a way that it cannot undo: use the methods of "
                "the session or the connection"
            )
        if self.is_mysql and any(_COMMITS_IMPLICITLY.match(part) for part in parts):
            words = " ".join(statement.split()[:2]).upper()
            raise self.tell(
                f"{words} commits implicitly on MariaDB and MySQL, which would end the transaction of isolated(): do "
                f"it before the block, or {_ON_ITS_OWN}"
            )

    def _commit(self, tenant: Tenant) -> None:
        if not tenant.savepoints and not tenant.lost:
            return
        self._check_alive()
        if tenant.lost:
            raise IsolationError(f"this transaction cannot be committed, it is gone: {tenant.lost}")
        if tenant.aborted:
            raise IsolationError(
                "this transaction cannot be committed: a statement in it has failed, so PostgreSQL would answer COMMIT "
                "by rolling it back"
            )
        self._heal(tenant)
        if self._is_aborted():
            self._roll_back(tenant)  # as PostgreSQL does
            return
        self._check_deferred(tenant)
        first = tenant.savepoints[0]
        if first.is_set:
            position = self._stack.index(first)
            kept = [known for known in self._stack if known.tenant is tenant and (known.changed or known.holds)]
            if kept:
                for below in self._stack[: self._stack.index(kept[-1])]:
                    below.holds |= below.tenant is not tenant
            if any(above.guards and above.tenant is not tenant for above in self._stack[position:]):
                # One that has begun later is not finished.
                for savepoint in tenant.savepoints:
                    savepoint.tenant = None
            else:
                self._release(position)
        self._over(tenant)
        while self._stack and self._stack[-1].tenant is None:
            self._release(len(self._stack) - 1)

    def _over(self, tenant: Tenant) -> None:
        """The transaction of *tenant* has ended."""
        tenant.savepoints, tenant.cursors = [], []
        tenant.explicit = tenant.read_only = tenant.locks = tenant.passed = False
        tenant.aborted = False
        tenant.unit = None
        tenant.lost = ""

    def _roll_back(self, tenant: Tenant) -> None:
        if tenant.savepoints and self._lost is None and not self.has_ended:
            self._note_aborted(tenant)
            self._undo(tenant, tenant.savepoints[0], keep=False)
        self._over(tenant)
        while self._stack and self._stack[-1].tenant is None and self._lost is None:
            self._release(len(self._stack) - 1)

    def _roll_back_to(self, tenant: Tenant, savepoint: Savepoint) -> None:
        self._undo(tenant, savepoint, keep=True)
        tenant.aborted = False

    def _undo(self, tenant: Tenant, first: Savepoint, *, keep: bool) -> None:
        """Roll back to the SAVEPOINT *first*.

        :param keep: whether that one remains.
        """
        index = tenant.savepoints.index(first)
        tenant.savepoints[index:] = [first] if keep else []
        if not first.is_set:
            return
        position = self._stack.index(first)
        above = self._stack[position:]
        others = {
            known.tenant
            for known in above
            if known.changed and known.tenant not in (None, tenant) and not known.tenant.aborted
        }
        committed = any(known.holds or (known.tenant is None and known.changed) for known in above)
        if (others or committed) and not self.is_clearing_up:
            self.tell(
                "a transaction was rolled back around the work of another one, which began later on the connection "
                "that all share within isolated(): that work is undone, too, where production would "
                + ("let it go on; " if others else "keep it; ")
                + _ON_ITS_OWN
            )
        for other in others:
            other.savepoints, other.cursors = [], []
            other.lost = "another transaction was rolled back around it, which isolated() has told of"
        del self._stack[position:]
        for known in above:
            known.is_set = False
        first.changed = first.holds = False
        with suppress(IsolationError):  # which is told: the connection was lost, and with it what had to be rolled back
            self._send(f"ROLLBACK TO SAVEPOINT {first.name}")
            if keep:
                first.is_set = True
                self._stack.append(first)
            else:
                self._send(f"RELEASE SAVEPOINT {first.name}")

    def _release_savepoint(self, tenant: Tenant, savepoint: Savepoint) -> None:
        index = tenant.savepoints.index(savepoint)
        released = tenant.savepoints[index:]
        position = self._stack.index(savepoint)
        if any(above.tenant is not tenant for above in self._stack[position:]):
            for known in released:
                known.asked = ""  # it stays where it is, for nobody to find
            return
        self._release(position)
        del tenant.savepoints[index:]
        if any(known.changed for known in released):
            self._changes(tenant)

    # What a COMMIT checks, and a RELEASE does not

    def _check_deferred(self, tenant: Tenant) -> None:
        """Check the constraints that are deferred to the commit.

        :raises IntegrityError: the driver's, if one is broken.
        """
        if not any(savepoint.changed for savepoint in tenant.savepoints):
            return
        if any(below.tenant is not tenant and below.changed for below in self._stack):
            return  # what another one has broken, and will mend, can't be told from this one's
        if self.dialect.name == "postgresql":
            self._last = tenant
            self._fire_deferred_constraints()
        elif self.dialect.name == "sqlite" and self._broken_references() - self._violations:
            raise self.dialect.dbapi.IntegrityError("FOREIGN KEY constraint failed")

    def _fire_deferred_constraints(self) -> None:
        cursor = self.driver.cursor()
        try:
            cursor.execute(
                "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.conname), c.condeferred FROM pg_constraint c "
                "JOIN pg_namespace n ON n.oid = c.connamespace WHERE c.condeferrable"
            )
            constraints = cursor.fetchall()
            if constraints:
                cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
                # As the next transaction finds them.
                cursor.execute("SET CONSTRAINTS ALL DEFERRED")
                immediate = ", ".join(sorted({name for name, deferred in constraints if not deferred}))
                if immediate:
                    cursor.execute(f"SET CONSTRAINTS {immediate} IMMEDIATE")
        finally:
            cursor.close()

    def _broken_references(self) -> set[Any]:
        cursor = self.driver.cursor()
        try:
            if not cursor.execute("PRAGMA foreign_keys").fetchone()[0]:
                return set()
            deferred = (
                cursor.execute("PRAGMA defer_foreign_keys").fetchone()[0]
                or cursor.execute("SELECT 1 FROM sqlite_master WHERE sql LIKE '%DEFERRED%'").fetchone()
            )
            return set(cursor.execute("PRAGMA foreign_key_check").fetchall()) if deferred else set()
        finally:
            cursor.close()

    # The database

    def _send(self, *statements: str) -> None:
        try:
            cursor = self.driver.cursor()
            try:
                for statement in statements:
                    log.debug("isolated(): %s", statement)
                    cursor.execute(statement)
            finally:
                with suppress(Exception):
                    cursor.close()
        except self.dialect.dbapi.Error as error:
            raise self._lose(error) from error

    def _lose(self, error: BaseException | None) -> IsolationError:
        self._lost = self.tell(
            "the transaction of isolated() is gone: the connection was lost, or something has committed or rolled back "
            "past SQLAlchemy, so what was done until then may have been kept"
        )
        self._lost.__cause__ = error
        return self._lost


def _buffered(value: Any) -> Any:
    """Instead of a class of cursors that leave their rows on the server: the one like it that does not.

    (Those of PyMySQL and mysqlclient have names that begin with SS.)
    """
    if isinstance(value, type) and any(cls.__name__.startswith("SS") for cls in value.__mro__):
        return getattr(sys.modules[value.__module__], value.__name__.removeprefix("SS"), None)
    return value


#: Frames that are not the user's.  (SQLAlchemy makes some functions of strings.)
_INSIDE = (
    os.path.join(os.path.dirname(__file__), ""),
    os.path.join(os.path.dirname(str(sqlalchemy.__file__)), ""),
    "<",
)


def _place() -> str:
    """Where in the code of the user that happens."""
    frame: Any = sys._getframe()
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_INSIDE)
        or Path(frame.f_code.co_filename).name in ("contextlib.py", "threading.py")
    ):
        frame = frame.f_back
    return f" (at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}, in {frame.f_code.co_name})"
