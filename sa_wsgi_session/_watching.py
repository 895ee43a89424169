"""What SQLAlchemy tells a unit of work about its session.

Some questions are answered here, each by the cheapest events that can answer it:

* *Is a result still open, and was anything changed?*  A request asks that before it commits the
  transaction of a response that streams.  ``do_execute`` and its siblings hand over the execution
  context of every statement; a weak reference to it is dead as soon as its result was read to the
  end or dropped.  (Events of the dialect, unlike ``before_cursor_execute``, do not send
  SQLAlchemy's connections down their slow path.)
* *Which connections does the transaction use?*  ``after_begin`` says.
* *When has a transaction ended, and how?*  ``after_commit`` and ``after_transaction_end`` say,
  and are listened to only once somebody has registered a callback.
* *What has the database refused?*  ``handle_error`` says, whoever swallows the exception.
* *Has an attempt that may be replayed* (a unit with a ``Trial``) *lost a race?*  ``handle_error`` tells what the
  database has found out, ``after_soft_rollback`` what SQLAlchemy itself finds out in a flush.
* *Is something of it durable already?*  A session says ``after_commit``.  Another connection is found when it is sent
  a statement that changes data, and tells of its ``commit`` from then on: that one alone, because to listen to them all
  would cost every request.  And some statements commit by themselves.

In SQLAlchemy 1.4 ``handle_error`` is an event of the engine, and sends its connections down their slow path: there it
is listened to only where there is a ``RetryPolicy``.

All listeners are functions of this module that look for the unit in ``here``: no state of a
request is ever attached to a session, a connection or an engine.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache, partial
from threading import RLock
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import __version__ as sqlalchemy_version
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from ._binding import Binder, Unit, here
from ._callbacks import Callbacks

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import ExceptionContext

    from ._retry import Trial


class Watched(Unit):
    """A unit that is told what its session does: the base of ``SessionScope``."""

    __slots__ = ("callbacks", "connections", "trial", "watch", "watching")

    #: What the transaction uses (and perhaps what earlier ones used and gave back).
    connections: list[Connection]
    #: Whether somebody will want to know about open results and changes.
    watching: bool
    #: The statements of the current transaction, if so and if one has begun.
    watch: Watch | None
    #: What waits for the outcome; made with the first callback.
    callbacks: Callbacks | None
    #: What is known of this attempt, as long as it may be replayed.
    trial: Trial | None

    def meets(self, error: BaseException, *, own: bool) -> None:
        """*error* has come up, from the session of this unit or from elsewhere; whoever called may swallow it."""
        raise NotImplementedError

    def uses(self, connection: Connection) -> bool:
        """Whether the session has begun a transaction on *connection*."""
        if connection in self.connections:
            return True
        # SQLAlchemy 1.4 makes another Connection for every change of execution options.
        transaction = connection.get_transaction()
        return transaction is not None and any(known.get_transaction() is transaction for known in self.connections)


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
        if not self.changed and effect_of(statement):
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
# What can be undone, on every database. After anything else it may be durable at once: DDL is on MySQL and Oracle, a
# procedure may COMMIT, and COMMIT does.
_UNDOABLE = frozenset({"insert", "update", "delete", "merge", "replace"})
_INTO = re.compile(r"\bINTO\b", re.IGNORECASE)
# Where a statement can begin within another; elsewhere these words are columns, or FOR UPDATE.
_INNER_CHANGE = re.compile(r"[()]\s*(?:INSERT|UPDATE|DELETE|MERGE|REPLACE)\b", re.IGNORECASE)
_ANALYZE = re.compile(r"\bANALY[SZ]E\b", re.IGNORECASE)

#: The length, in characters, up to which a statement is worth remembering, and to which it is worth taking apart.
_SHORT, _LONG = 4_000, 20_000


class Effect(IntEnum):
    """What a statement may do to the data."""

    READS = 0
    CHANGES = 1
    #: A change that may be durable when the statement is done.
    MAY_COMMIT = 2


def effect_of(statement: str) -> Effect:
    """What *statement* may do: anything but a plain reading one may change data.

    ``SELECT … INTO`` and data-modifying ``WITH`` change data; ``SELECT … FOR UPDATE`` does not.
    A function with side effects in a ``SELECT`` cannot be told from one without.
    """
    return _effect_cached(statement) if len(statement) <= _SHORT else _effect(statement)


def _effect(statement: str) -> Effect:
    if len(statement) <= _LONG and not _AMBIGUOUS.search(statement):
        statement = _QUOTED.sub(" ", statement)
    return max((_effect_of_part(part) for part in statement.split(";") if part.strip()), default=Effect.READS)


_effect_cached = lru_cache(maxsize=1024)(_effect)


def _effect_of_part(part: str) -> Effect:
    verb = cast("re.Match[str]", _VERB.match(part)).group(1).lower()
    if verb not in _READS:
        return Effect.CHANGES if verb in _UNDOABLE else Effect.MAY_COMMIT
    if (
        _INTO.search(part)
        or (verb == "pragma" and "=" in part)
        or (verb == "explain" and _ANALYZE.search(part))
        or (verb not in ("select", "values", "table") and _INNER_CHANGE.search(part))
    ):
        return Effect.CHANGES
    return Effect.READS


def listen(binder: Binder, *, trials: bool = False) -> bool:
    """Listen to the sessions of *binder*; once for each class of sessions, however often called.

    :param trials: whether there will be attempts that may be replayed.
    :return: whether their engine is known, and listened to.

    To be called as early as may be: SQLAlchemy cannot add a listener while another thread is calling those that it has.
    """
    session_class = _session_class(binder.factory)
    _TO_SESSION.register(session_class)
    if trials:
        _TO_SESSION_ON_TRIAL.register(session_class)
    options = getattr(binder.factory, "kw", None)
    if not isinstance(options, dict):
        return False
    binds = [bind for bind in (options.get("bind"), *(options.get("binds") or {}).values()) if bind is not None]
    for bind in binds:
        _listen_to_connections(bind, trials)
    return bool(binds)


def _listen_to_connections(bind: Engine | Connection, trials: bool) -> bool:
    """Listen to all connections of *bind*; true: from now on only."""
    is_new = _TO_DIALECT.register(bind.dialect)
    if trials and not _IS_EVENT_OF_DIALECT:
        is_new = _TO_ENGINE_ON_TRIAL.register(bind.engine) or is_new
    return is_new


_Functions = dict[str, Callable[..., None]]


class _Listeners:
    """Listeners that are registered together, and once for each target."""

    def __init__(self, listeners: _Functions, *, insert: bool = False) -> None:
        self._listeners = listeners
        self._how = {"insert": True} if insert else {}
        # What is listened to already.  (SQLAlchemy's event.contains() would not do: it goes by id(), which a new class
        # may have inherited from a dead one.)
        self._targets: weakref.WeakSet[Any] = weakref.WeakSet()

    def register(self, target: object) -> bool:
        """Register them; false if they were before."""
        if target in self._targets:
            return False
        with _lock:
            if target in self._targets:
                return False
            for name, listener in self._listeners.items():
                event.listen(target, name, listener, **self._how)
            self._targets.add(target)
            return True


# Reentrant: the garbage collector may close a dropped body in the middle, whose application uses a session.
_lock = RLock()


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
        if _listen_to_connections(connection, unit.trial is not None) and unit.trial is not None:
            # Nobody has listened to this engine yet: nobody knows what the attempt has done there before.
            unit.trial.has_committed()


def _do_execute(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
    _do_execute_no_params(cursor, statement, context)


def _do_execute_no_params(cursor: Any, statement: str, context: Any) -> None:
    frame = here.get()
    while frame is not None:
        unit = frame.unit
        if unit is not None:
            watch, trial = unit.watch, unit.trial
            own = watch is not None and context.root_connection.connection in watch.pooled
            if own:
                watch.statement(statement, context)
            if trial is not None and (watch.changed if own else effect_of(statement)):
                _note_change(trial, statement, context.root_connection, own)
        frame = frame.outer


def _note_change(trial: Trial, statement: str, connection: Connection, own: bool) -> None:
    """Tell an attempt of a statement that perhaps can't be undone."""
    effect = effect_of(statement)
    if effect is Effect.MAY_COMMIT or (effect is Effect.CHANGES and connection._is_autocommit_isolation()):
        trial.has_committed()
    elif not own:
        # SQLAlchemy 1.4 makes another Connection for every change of execution options.
        transaction = connection.get_transaction()
        begun = connection if transaction is None else transaction.connection
        if trial.changes_elsewhere(begun):
            event.listen(begun, "commit", _commit_elsewhere)
            event.listen(begun, "commit_twophase", _commit_elsewhere)


def _commit_elsewhere(connection: Connection, *_: object) -> None:
    frame = here.get()
    while frame is not None:
        if frame.unit is not None and frame.unit.trial is not None:
            frame.unit.trial.has_committed()
        frame = frame.outer


def _after_commit(session: Session) -> None:
    frame = here.get()
    while frame is not None:
        unit = frame.unit
        if unit is not None and (unit.trial is not None or unit.callbacks is not None):
            own = unit.binder.peek(unit) is session
            savepoint = session.get_nested_transaction()
            if own and unit.callbacks is not None:
                unit.callbacks.committed(savepoint)
            if unit.trial is not None and savepoint is None and (unit.watch.changed if own and unit.watch else not own):
                unit.trial.has_committed()
        frame = frame.outer


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


def _handle_error(context: ExceptionContext) -> None:
    error = context.sqlalchemy_exception
    if error is None or getattr(context, "is_pre_ping", False):
        return  # an interruption; or a connection that the pool replaces, and nobody hears of it
    frame = here.get()
    while frame is not None:
        unit = cast("Watched | None", frame.unit)
        if unit is not None and unit.within is None:
            unit.meets(error, own=context.connection is not None and unit.uses(context.connection))
        frame = frame.outer


def _after_soft_rollback(session: Session, transaction: SessionTransaction) -> None:
    if transaction.nested:
        return  # to a SAVEPOINT, which deals with what it was for
    error = sys.exc_info()[1]
    frame = here.get()
    while error is not None and frame is not None:
        unit = cast("Watched | None", frame.unit)
        if unit is not None and unit.trial is not None and unit.binder.peek(unit) is session:
            unit.meets(error, own=True)
        frame = frame.outer


_IS_EVENT_OF_DIALECT = not sqlalchemy_version.startswith("1.")
_ERRORS: _Functions = {"handle_error": _handle_error}

_TO_SESSION = _Listeners(
    {"after_begin": _after_begin, "after_commit": _after_commit, "after_transaction_end": _after_transaction_end},
    # Before the application's own, which may change data in after_begin, or raise in after_commit.
    insert=True,
)
_STATEMENTS: _Functions = {
    "do_execute": _do_execute,
    "do_executemany": _do_execute,
    "do_execute_no_params": _do_execute_no_params,
}
_TO_DIALECT = _Listeners(_STATEMENTS | _ERRORS if _IS_EVENT_OF_DIALECT else _STATEMENTS)
# For attempts that may be replayed, in addition.
_TO_SESSION_ON_TRIAL = _Listeners({"after_soft_rollback": _after_soft_rollback})
_TO_ENGINE_ON_TRIAL = _Listeners({} if _IS_EVENT_OF_DIALECT else _ERRORS)


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
