"""What SQLAlchemy tells a unit of work about its session.

Three questions are answered here, each by the cheapest events that can answer it:

* *Is a result still open, and was anything changed?*  A request asks that before it commits the
  transaction of a response that streams.  ``do_execute`` and its siblings hand over the execution
  context of every statement; a weak reference to it is dead as soon as its result was read to the
  end or dropped.  (Events of the dialect, unlike ``before_cursor_execute``, do not send
  SQLAlchemy's connections down their slow path.)
* *Which connections does the transaction use?*  ``after_begin`` says.
* *When has a transaction ended, and how?*  ``after_commit`` and ``after_transaction_end`` say,
  and are listened to only once somebody has registered a callback.

All listeners are functions of this module that look for the unit in ``here``: no state of a
request is ever attached to a session, a connection or an engine.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from threading import RLock
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from ._binding import Binder, Unit, here
from ._callbacks import Callbacks

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection


class Watched(Unit):
    """A unit that is told what its session does: the base of ``SessionScope``."""

    __slots__ = ("callbacks", "connections", "watch", "watching")

    #: What the transaction uses (and perhaps what earlier ones used and gave back).
    connections: list[Connection]
    #: Whether somebody will want to know about open results and changes.
    watching: bool
    #: The statements of the current transaction, if so and if one has begun.
    watch: Watch | None
    #: What waits for the outcome; made with the first callback.
    callbacks: Callbacks | None


class Watch:
    """The statements that a transaction has sent, as far as streaming depends on them."""

    __slots__ = ("_contexts", "_limit", "changed", "pooled")

    def __init__(self) -> None:
        #: The pool's proxies of the connections.  (The Connection objects would not do: SQLAlchemy
        #: 1.4 makes another one for every change of execution options.)
        self.pooled: list[Any] = []
        self.changed = False
        self._contexts: list[weakref.ref[Any]] = []
        self._limit = 64

    def statement(self, statement: str, context: Any) -> None:
        contexts = self._contexts
        contexts.append(weakref.ref(context))
        if len(contexts) > self._limit:
            # Forget those that are read, so that a view of 100,000 statements does not keep
            # 100,000 references; a limit that grows with what is left keeps that linear.
            contexts[:] = [reference for reference in contexts if reference() is not None]
            self._limit = 2 * len(contexts) + 64
        if not self.changed and changes(statement):
            self.changed = True

    def has_open_result(self) -> bool:
        return any(_is_open(reference()) for reference in self._contexts)


def _is_open(context: Any) -> bool:
    """Whether the result of the execution *context*, if it is alive, still has the cursor."""
    if context is None or context.root_connection.closed:
        return False  # read or dropped; or the application itself has ended its transaction
    # Alive may also mean that somebody keeps a result that is read.  Such a result has let go of the DBAPI cursor, to
    # which then only the context refers (and the argument of getrefcount).
    return sys.getrefcount(context.cursor) > 2


# Quoted text and comments, in which words and semicolons mean nothing.
_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`|--[^\n]*|/\*.*?\*/|\A\s*\#[^\n]*""", re.DOTALL)
# Where a dialect may see the end of a quotation elsewhere.
_AMBIGUOUS = re.compile(r"""\\['"]|\$\w*\$""")
_VERB = re.compile(r"[\s(]*([a-z]*)", re.IGNORECASE)
_READS = frozenset(
    {"select", "values", "table", "with", "show", "explain", "desc", "describe", "pragma", "declare", "fetch", "close"}
    | {"set", "reset", "use", "lock", "begin", "start", "savepoint", "release", "rollback"}
)
_INTO = re.compile(r"\bINTO\b", re.IGNORECASE)
# Where a statement can begin within another; elsewhere these words are columns, or FOR UPDATE.
_INNER_CHANGE = re.compile(r"[()]\s*(?:INSERT|UPDATE|DELETE|MERGE|REPLACE)\b", re.IGNORECASE)
_ANALYZE = re.compile(r"\bANALY[SZ]E\b", re.IGNORECASE)

#: The length, in characters, up to which a statement is worth remembering, and to which it is worth taking apart.
_SHORT, _LONG = 4_000, 20_000


def changes(statement: str) -> bool:
    """Whether *statement* may change data: anything but a plain reading one.

    ``SELECT … INTO`` and data-modifying ``WITH`` change data; ``SELECT … FOR UPDATE`` does not.
    A function with side effects in a ``SELECT`` cannot be told from one without.
    """
    return _changes_cached(statement) if len(statement) <= _SHORT else _changes(statement)


def _changes(statement: str) -> bool:
    if len(statement) <= _LONG and not _AMBIGUOUS.search(statement):
        statement = _QUOTED.sub(" ", statement)
    return any(_part_changes(part) for part in statement.split(";") if part.strip())


_changes_cached = lru_cache(maxsize=1024)(_changes)


def _part_changes(part: str) -> bool:
    verb = cast("re.Match[str]", _VERB.match(part)).group(1).lower()
    if verb not in _READS or _INTO.search(part):
        return True
    if verb == "pragma":
        return "=" in part
    if verb == "explain" and _ANALYZE.search(part):
        return True
    return verb not in ("select", "values", "table") and _INNER_CHANGE.search(part) is not None


def listen(binder: Binder) -> None:
    """Listen to the sessions of *binder*; once for each class of sessions, however often called.

    To be called as early as may be: SQLAlchemy cannot add a listener while another thread is calling those that it has.
    """
    # Before the application's own listeners, which may change data in after_begin, or raise in after_commit.
    _listen_once(_sessions, _session_class(binder.factory), _SESSION_LISTENERS, insert=True)
    options = getattr(binder.factory, "kw", None)
    if isinstance(options, dict):
        for bind in (options.get("bind"), *(options.get("binds") or {}).values()):
            if bind is not None:
                _listen_to_dialect(bind.dialect)


def _listen_to_dialect(dialect: Any) -> None:
    _listen_once(_dialects, dialect, _DIALECT_LISTENERS)


# What is listened to already.  (SQLAlchemy's event.contains() would not do: it goes by id(), which a new class may have
# inherited from a dead one.)
_sessions: weakref.WeakSet[type[Session]] = weakref.WeakSet()
_dialects: weakref.WeakSet[Any] = weakref.WeakSet()
# Reentrant: the garbage collector may close a dropped body in the middle, whose application uses a session.
_lock = RLock()


def _listen_once(
    known: weakref.WeakSet[Any], target: Any, listeners: dict[str, Callable[..., None]], **how: Any
) -> None:
    if target in known:
        return
    with _lock:
        if target not in known:
            for name, listener in listeners.items():
                event.listen(target, name, listener, **how)
            known.add(target)


def _session_class(factory: Any) -> type[Session]:
    """The class whose instances *factory* makes; ``Session`` itself where that can't be told."""
    while isinstance(factory, partial):
        factory = factory.func
    if isinstance(factory, sessionmaker):
        return factory.class_
    if isinstance(factory, type) and issubclass(factory, Session):
        return factory
    return Session


def _unit_of(session: Session) -> Watched | None:
    """The unit bound here whose session this is; none for a session that is not ours."""
    frame = here.get()
    while frame is not None:
        unit = frame.unit
        if unit is not None and unit.binder.peek(unit) is session:
            return cast(Watched, unit.within or unit)
        frame = frame.outer
    return None


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    if transaction.nested:
        return
    unit = _unit_of(session)
    if unit is None:
        return
    # More than one where a session has several binds.
    others = [known for known in unit.connections if known is not connection and not known.closed]
    unit.connections = [*others, connection]
    if unit.watching:
        if unit.watch is None or not others:
            unit.watch = Watch()
        unit.watch.pooled.append(connection.connection)
        _listen_to_dialect(connection.dialect)


def _do_execute(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
    _do_execute_no_params(cursor, statement, context)


def _do_execute_no_params(cursor: Any, statement: str, context: Any) -> None:
    frame = here.get()
    while frame is not None:
        unit = frame.unit
        watch = unit.watch if unit is not None else None
        if watch is not None and context.root_connection.connection in watch.pooled:
            watch.statement(statement, context)
            return
        frame = frame.outer


def _after_commit(session: Session) -> None:
    callbacks = _callbacks_of(session)
    if callbacks is not None:
        callbacks.committed(session.get_nested_transaction())


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is not None and not transaction.nested:
        return  # a subtransaction, such as a flush makes: no transaction of the database
    callbacks = _callbacks_of(session)
    if callbacks is not None:
        callbacks.ended(transaction if transaction.nested else None)


def _callbacks_of(session: Session) -> Callbacks | None:
    frame = here.get()
    while frame is not None:
        unit = frame.unit
        if unit is not None and unit.callbacks is not None and unit.binder.peek(unit) is session:
            return cast(Callbacks, unit.callbacks)
        frame = frame.outer
    return None


_SESSION_LISTENERS: dict[str, Callable[..., None]] = {
    "after_begin": _after_begin,
    "after_commit": _after_commit,
    "after_transaction_end": _after_transaction_end,
}
_DIALECT_LISTENERS: dict[str, Callable[..., None]] = {
    "do_execute": _do_execute,
    "do_executemany": _do_execute,
    "do_execute_no_params": _do_execute_no_params,
}


#: ``PQTRANS_INERROR`` of libpq: in a failed transaction block.
_IN_ERROR = 3


def is_aborted(connection: Connection) -> bool:
    """Whether the database has given up the transaction on *connection*, as PostgreSQL does.

    After any error PostgreSQL refuses every statement, and answers ``COMMIT`` by rolling back,
    which its drivers do not report.  psycopg and psycopg2 know the state without asking.
    """
    if connection.closed or connection.invalidated:
        return False
    info = getattr(connection.connection.dbapi_connection, "info", None)
    return getattr(info, "transaction_status", None) == _IN_ERROR
