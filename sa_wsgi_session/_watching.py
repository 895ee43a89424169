"""What SQLAlchemy tells a unit of work about its session.

Some questions are answered here, each by the cheapest events that can answer it:

* *Is a result still open, and was anything changed?*  A request asks that before it commits the
  transaction of a response that streams.  ``do_execute`` and its siblings hand over the execution
  context of every statement; a weak reference to it is dead as soon as its result was read to the
  end or dropped.  (Events of the dialect, unlike ``before_cursor_execute``, do not send
  SQLAlchemy's connections down their slow path.)
* *Which connections does the transaction use?*  ``after_begin`` says.
* *May it be committed?*  ``before_commit`` asks, whoever commits.
* *When has a transaction ended, and how?*  ``after_commit`` and ``after_transaction_end`` say.
* *What has the database refused?*  ``handle_error`` says, whoever swallows the exception.

Of an attempt that may be replayed (a unit with a ``Trial``) there is more to know:

* *Has it lost a race?*  ``handle_error`` tells what the database has found out, ``after_soft_rollback`` what SQLAlchemy
  itself finds out in a flush.
* *Is something of it durable?*  The statements tell which connections it changes something on, its session's or any
  other; some commit by themselves.  COMMIT is told by a wrapper around ``do_commit`` of the dialect: the event for that
  comes before it, and sends connections down their slow path.

These are listened to once there is a ``RetryPolicy``.  So is ``handle_error`` on SQLAlchemy 1.4, where it is an event
of the engine, with the slow path.

All listeners are functions of this module that look for the unit in ``here``: no state of a
request is ever attached to a session, a connection or an engine.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
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
    from ._routing import Route


class Watched(Unit):
    """A unit that is told what its session does: the base of ``SessionScope``."""

    __slots__ = ("callbacks", "connections", "trial", "watch", "watching")

    within: Watched | None
    #: Where it goes, if it may go to a replica; nothing for all others.
    route: Route | None = None
    #: What the transaction uses (and perhaps what earlier ones used and gave back).
    connections: Sequence[Connection]
    #: Whether somebody will want to know about open results and changes.
    watching: bool
    #: The statements of the current transaction, if so and if one has begun.
    watch: Watch | None
    #: What waits for the outcome; made with the first callback.
    callbacks: Callbacks | None
    #: What is known of this attempt, as long as it may be replayed.
    trial: Trial | None

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

    def failed(self, context: object) -> None:
        """The statement of that execution context has no result; the exception may keep the context alive."""
        self._contexts = [reference for reference in self._contexts if reference() is not context]

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
_UNDOABLE = frozenset(
    {"insert", "update", "delete", "merge", "replace", "copy", "notify", "listen", "unlisten", "prepare"}
)
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


def listen(binder: Binder, *, trials: bool) -> bool:
    """Listen to the sessions of *binder*; once for each class of sessions, however often called.

    :param trials: whether there will be attempts that may be replayed.
    :return: whether their engine is known, and listened to.

    To be called as early as may be: SQLAlchemy cannot add a listener while another thread is calling those that it has.
    """
    session_class = session_class_of(binder.factory)
    _TO_SESSION.register(session_class)
    if trials:
        _prepare_for_policies()
        _TO_SESSION_ON_TRIAL.register(session_class)
    binds = binds_of(binder.factory)
    for bind in binds:
        _listen_to_connections(bind, trials)
    return bool(binds)


def binds_of(factory: object) -> list[Engine | Connection]:
    """What the sessions of *factory* are known to be bound to."""
    options = getattr(factory, "kw", None)
    if not isinstance(options, dict):
        return []
    return [bind for bind in (options.get("bind"), *(options.get("binds") or {}).values()) if bind is not None]


def listen_to_replica(engine: Engine) -> None:
    """Listen to the statements of *engine*, on which nothing is ever committed."""
    _TO_REPLICA.register(engine.dialect)
    if not IS_EVENT_OF_DIALECT:
        _TO_ENGINE_ON_TRIAL.register(engine)


def _listen_to_connections(bind: Engine | Connection, trials: bool) -> bool:
    """Listen to all connections of *bind*; true: from now on only."""
    is_new = _TO_DIALECT.register(bind.dialect)
    if is_new and _there_are_policies:
        _tell_of_commits(bind.dialect)
    if trials and not IS_EVENT_OF_DIALECT:
        _TO_ENGINE_ON_TRIAL.register(bind.engine)
    return is_new


_there_are_policies = False


def _prepare_for_policies() -> None:
    """From now on there may be attempts: have them told of each COMMIT."""
    global _there_are_policies
    with lock:
        if _there_are_policies:
            return
        _there_are_policies = True
        for dialect in _TO_DIALECT.targets():
            _tell_of_commits(dialect)


def _tell_of_commits(dialect: Any) -> None:
    # Twice, if threads meet here, does no harm: an attempt is told the same thing twice.
    dialect.do_commit = partial(_do_commit, dialect.do_commit)
    dialect.do_commit_twophase = partial(_do_commit_twophase, dialect.do_commit_twophase)


_Functions = dict[str, Callable[..., None]]


class Listeners:
    """Listeners that are registered together, and once for each target."""

    def __init__(self, listeners: _Functions, *, insert: bool = False) -> None:
        self._listeners = listeners
        self._how = {"insert": True} if insert else {}
        # What is listened to already.  (SQLAlchemy's event.contains() would not do: it goes by id(), which a new class
        # may have inherited from a dead one.)
        self._targets: weakref.WeakSet[Any] = weakref.WeakSet()

    def targets(self) -> list[Any]:
        return list(self._targets)

    def register(self, target: object) -> bool:
        """Register them; false if they were before."""
        if target in self._targets:
            return False
        with lock:
            if target in self._targets:
                return False
            for name, listener in self._listeners.items():
                event.listen(target, name, listener, **self._how)
            self._targets.add(target)
            return True


# Reentrant: the garbage collector may close a dropped body in the middle, whose application uses a session.
lock = RLock()


def session_class_of(factory: Any) -> type[Session]:
    """The class whose instances *factory* makes; ``Session`` itself where that can't be told."""
    while isinstance(factory, partial):
        factory = factory.func
    if isinstance(factory, sessionmaker):
        return factory.class_
    if isinstance(factory, type) and issubclass(factory, Session):
        return factory
    return Session


def unit_of(session: Session) -> Watched | None:
    """The unit bound here whose session this is; none for a session that is not ours."""
    frame = here.get()
    while frame is not None:
        unit: Watched | None = frame.unit
        if unit is not None and unit.binder.peek(unit) is session:
            return unit.within or unit
        frame = frame.outer
    return None


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    if transaction.nested:
        return
    unit = unit_of(session)
    watching = unit is not None and unit.watching
    if unit is not None:
        if unit.callbacks is not None:
            unit.callbacks.within(session.get_transaction())
        # More than one where a session has several binds.
        others = [known for known in unit.connections if known is not connection and not known.closed]
        unit.connections = [*others, connection]
        if watching:
            if unit.watch is None or not others:
                unit.watch = Watch()
            unit.watch.pooled.append(connection.connection)
        if unit.route is not None and unit.route.begins(connection):
            return  # to a replica, which is listened to, and where nothing can be done that is durable
    attempts = list(trials()) if _there_are_policies else []
    # Within an attempt, other sessions as well.
    if attempts or (unit is not None and watching and unit.binder.dialect is not connection.dialect):
        if _listen_to_connections(connection, bool(attempts)):
            for trial in attempts:
                # Nobody knows what it has done on this engine before.
                trial.has_committed()
        if unit is not None:
            unit.binder.dialect = connection.dialect


def trials() -> Iterator[Trial]:
    """The attempts that the running code is part of."""
    frame = here.get()
    while frame is not None:
        if frame.unit is not None and frame.unit.trial is not None:
            yield frame.unit.trial
        frame = frame.outer


def _do_execute(cursor: Any, statement: str, *parameters_and_context: Any) -> None:
    context = parameters_and_context[-1]
    frame = here.get()
    while frame is not None:
        unit = frame.unit
        if unit is not None:
            watch, trial = unit.watch, unit.trial
            connection = context.root_connection
            own = watch is not None and (connection in unit.connections or connection.connection in watch.pooled)
            if own:
                watch.statement(statement, context)
            if (
                trial is not None
                and (watch.changed if own else effect_of(statement))
                and not _on_replica(unit, context)
            ):
                _note_change(trial, statement, connection)
        frame = frame.outer


def _on_replica(unit: Watched, context: Any) -> bool:
    """Whether the statement goes to the replica that the unit reads from, which will refuse to change anything."""
    route = unit.route
    return route is not None and route.replica is not None and context.dialect is route.replica.engine.dialect


def _note_change(trial: Trial, statement: str, connection: Connection) -> None:
    """Tell an attempt of a statement that changes something, or comes after one that has."""
    effect = effect_of(statement)
    if effect is Effect.MAY_COMMIT or (connection.dialect.name in _MYSQL and _ENDS_BEFORE.match(statement)):
        trial.has_committed()
    elif effect is Effect.CHANGES and not trial.has_changed(connection.connection):
        if _is_in_autocommit(connection):
            trial.has_committed()
        else:
            trial.changes(connection)


_MYSQL = ("mysql", "mariadb")
# What commits the transaction before it does anything else, and does not look like it: MySQL's manual, "Statements That
# Cause an Implicit Commit".
_ENDS_BEFORE = re.compile(r"\s*(?:BEGIN|START|LOCK|SET\b.*\bAUTOCOMMIT)\b", re.IGNORECASE)


def _is_in_autocommit(connection: Connection) -> bool:
    """Whether a change on *connection* is durable at once, be it SQLAlchemy or the driver that was told so."""
    if connection._is_autocommit_isolation():
        return True
    driver: Any = connection.connection.dbapi_connection
    if connection.dialect.name == "sqlite":
        # Unless the application begins its transactions itself.
        return getattr(driver, "isolation_level", "") is None and not driver.in_transaction
    asked = getattr(driver, "get_autocommit", None)  # MySQL's drivers
    return bool(asked()) if asked is not None else getattr(driver, "autocommit", False) is True


def _do_commit(commit: Callable[..., None], pooled: Any) -> None:
    try:
        commit(pooled)
    except BaseException as error:
        for trial in trials():
            trial.commits(pooled, error)
        raise
    for trial in trials():
        trial.commits(pooled, None)


def _do_commit_twophase(commit: Callable[..., None], connection: Connection, *args: Any, **options: Any) -> None:
    pooled = connection.connection
    _do_commit(lambda _: commit(connection, *args, **options), pooled)


def _before_commit(session: Session) -> None:
    # Whoever commits it, or releases a SAVEPOINT in it.
    frame = here.get()
    while frame is not None:
        unit = frame.unit
        if unit is not None and unit.binder.peek(unit) is session:
            unit._check_commit(session)
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
        unit: Watched | None = frame.unit
        if unit is not None and unit.callbacks is not None and unit.binder.peek(unit) is session:
            return unit.callbacks
        frame = frame.outer
    return None


def _handle_error(context: ExceptionContext) -> None:
    error = context.sqlalchemy_exception
    if error is None or getattr(context, "is_pre_ping", False):
        return  # an interruption; or a connection that the pool replaces, and nobody hears of it
    connection = context.connection
    in_transaction = connection is not None and not connection._is_autocommit_isolation()
    session: Session | None = None
    frame = here.get()
    while frame is not None:
        unit = frame.unit
        if unit is not None and unit.within is None:
            if unit.watch is not None:
                unit.watch.failed(context.execution_context)
            if session is None and in_transaction and unit.uses(connection):
                session = unit.binder.peek(unit)
            unit._meets(error, session)
        frame = frame.outer


def _after_soft_rollback(session: Session, transaction: SessionTransaction) -> None:
    if transaction.nested:
        return  # to a SAVEPOINT, which deals with what it was for
    error = sys.exc_info()[1]
    frame = here.get() if error is not None and unit_of(session) is not None else None
    while frame is not None:
        if frame.unit is not None and frame.unit.trial is not None:
            frame.unit._meets(error, session)
        frame = frame.outer


IS_EVENT_OF_DIALECT = not sqlalchemy_version.startswith("1.")
_ERRORS: _Functions = {"handle_error": _handle_error}

_TO_SESSION = Listeners(
    {
        "after_begin": _after_begin,
        "before_commit": _before_commit,
        "after_commit": _after_commit,
        "after_transaction_end": _after_transaction_end,
    },
    # Before the application's own, which may change data in after_begin, or raise in after_commit.
    insert=True,
)
_STATEMENTS: _Functions = {
    "do_execute": _do_execute,
    "do_executemany": _do_execute,
    "do_execute_no_params": _do_execute,
}
_TO_REPLICA = Listeners(_STATEMENTS | _ERRORS if IS_EVENT_OF_DIALECT else _STATEMENTS)
_TO_DIALECT = Listeners(_STATEMENTS | _ERRORS if IS_EVENT_OF_DIALECT else _STATEMENTS)
# For attempts that may be replayed, in addition.
_TO_SESSION_ON_TRIAL = Listeners({"after_soft_rollback": _after_soft_rollback})
_TO_ENGINE_ON_TRIAL = Listeners({} if IS_EVENT_OF_DIALECT else _ERRORS)


def is_open(session: Session, savepoint: SessionTransaction) -> bool:
    """Whether *session* is still within *savepoint*."""
    transaction = session.get_nested_transaction()
    while transaction is not None and transaction is not savepoint:
        transaction = transaction.parent
    return transaction is not None


#: ``PQTRANS_INERROR`` of libpq: in a failed transaction block.
_IN_ERROR = 3


#: To spare the common ones the questions.
_GO_ON_AFTER_ERRORS = ("sqlite", "mysql", "mariadb")


def is_aborted(connection: Connection) -> bool:
    """Whether the database has given up the transaction on *connection*, as PostgreSQL does.

    After any error PostgreSQL refuses every statement, and answers ``COMMIT`` by rolling back,
    which its drivers do not report.  psycopg and psycopg2 know the state without asking.
    """
    if connection.dialect.name in _GO_ON_AFTER_ERRORS or connection.closed or connection.invalidated:
        return False
    info = getattr(connection.connection.dbapi_connection, "info", None)
    return getattr(info, "transaction_status", None) == _IN_ERROR
