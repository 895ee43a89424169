"""For the tests of an application: they run it as it is, commits and all, and leave no trace in the database.

::

    from sa_wsgi_session.testing import count_statements, isolated

    with isolated(Session):
        client.post("/guests", {"name": "Ada"})  # commits
        with count_statements(Session) as statements:
            client.get("/guests")
        statements.at_most(2)
    # Ada was never here

:func:`isolated` lets everything that happens in a database happen in one transaction, which is rolled back in the end.
:func:`count_statements` tells what was sent.  Not needed in production, and not imported there.

This file knows sessions and blocks; ``_shared_connection`` knows connections and transactions.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Generic, TypeVar, cast, overload

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from ._binding import binder_of, refuse_async
from ._errors import shown, type_name, warn_of_error
from ._shared_connection import IsolationError, SharedConnection, is_control
from ._shared_pool import SharedPool
from ._watching import Listeners, binds_of, session_class_of

__all__ = ["IsolationError", "Statements", "count_statements", "isolated"]

_T = TypeVar("_T")


# -- whose engines ----------------------------------------------------------------------------------------------------


def _root(engine: Engine) -> Engine:
    """The engine whose pool, and dialect, those of ``engine.execution_options(…)`` use."""
    while hasattr(engine, "_proxied"):
        engine = engine._proxied
    return engine


def _engines_of_factory(factory: Any) -> list[Engine]:
    """The engines that the sessions of *factory* use, as far as they can be told."""
    binds: Sequence[Any] = binds_of(factory)
    if not binds:
        session = factory()
        try:
            binds = _binds_of_session(session)
        finally:
            session.close()
    return _engines_of_binds(binds)


def _binds_of_session(session: Session) -> list[Any]:
    flask_sqlalchemy = getattr(session, "_db", None)
    if flask_sqlalchemy is not None:
        return list(flask_sqlalchemy.engines.values())
    try:
        return [session.get_bind()]
    except UnboundExecutionError:
        return []


def _engines_of_binds(binds: Sequence[Any]) -> list[Engine]:
    engines = []
    for bind in binds:
        if isinstance(bind, Connection):
            raise ValueError(
                "session must not be bound to a Connection, whose transaction is somebody else's: bind it to the Engine"
            )
        engines.append(_root(bind))
    return engines


def _engines_of(source: object) -> tuple[list[Engine], Any]:
    """The engines of what a user has given, and the factory of sessions that it is, if it is one."""
    refuse_async(source, "session")
    if isinstance(source, Engine):
        return [_root(source)], None
    if not isinstance(source, (scoped_session, sessionmaker)):
        raise TypeError(
            f"session must be a scoped_session (with any registry), a sessionmaker or an Engine, not "
            f"{'None' if source is None else f'an object of type {type_name(source)}'}"
        )
    factory = binder_of(source).factory
    return _engines_of_factory(factory), factory


# -- isolated() -------------------------------------------------------------------------------------------------------


class isolated(Generic[_T]):
    """Within this block, every commit lands in one transaction, which is rolled back at its end.

    ::

        with isolated(Session):
            ...

    :param session: the ``scoped_session`` that the application uses, with any registry, a ``sessionmaker``, or an
        :class:`~sqlalchemy.engine.Engine`.  The block yields it.
    :param more: others of them; and engines that sessions use, but that can't be told from them: those of a
        ``get_bind()`` of your own.
    :param timeout: how long, in seconds, a thread waits for its turn, while another one is in the midst of a
        transaction that has changed something.
    :raises TypeError: at once, if it is none of them.
    :raises ValueError: if the engines of a session can't be told; if they are of a database, or a driver, that is not
        supported; if *timeout* is negative.
    :raises IsolationError: at the beginning of the block, if the session is in a transaction already; where something
        is tried that would leave a trace; and at its end, if something has happened that differs from production.

    Blocks may be within each other: what the inner one has done is rolled back at its end.

    Sessions that are in use at the end are closed.  The one that was there before is kept, with its objects, which are
    read anew when they are next used.
    """

    def __init__(self, session: _T, *more: object, timeout: float = 10.0) -> None:
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(
                f"timeout must be a number of seconds, 0 or more, not an object of type {type_name(timeout)}"
            )
        if not 0 <= timeout <= 1_000_000:
            raise ValueError(f"timeout must be a number of seconds, 0 or more, not {shown(timeout)}")
        self._given = session
        self._sources: list[object] = [session, *more]
        self._timeout = timeout
        for source in self._sources:
            # Without its engines: those of Flask-SQLAlchemy, for example, may not be there yet.
            refuse_async(source, "session")
            if not isinstance(source, Engine):
                _check_source(source)
        self._exit: ExitStack | None = None
        self._told: list[IsolationError] = []
        self._shared: list[SharedConnection] = []
        #: Whose sessions may use nothing else.
        self._classes: tuple[type[Session], ...] = ()
        #: The sessions that have begun a transaction in here.
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        #: Those that were there before.
        self._before: list[Session] = []

    def __enter__(self) -> _T:
        if self._exit is not None:
            raise RuntimeError("this isolated() is in use already: call isolated() for each block")
        _TO_SESSION.register(Session)
        engines: list[Engine] = []
        factories: list[Any] = []
        for source in self._sources:
            found, factory = _engines_of(source)
            engines += [engine for engine in found if all(engine is not known for known in engines)]
            factories += [] if factory is None else [factory]
        if not engines:
            raise ValueError(
                "the engine of the session cannot be told (it has neither a bind nor binds): pass its engines, too, as "
                "in isolated(Session, engine)"
            )
        self._told, self._shared, self._sessions = [], [], weakref.WeakSet()
        classes = [session_class_of(factory) for factory in factories]
        self._classes = tuple(cls for cls in classes if cls is not Session)
        self._before = self._sessions_here()
        with ExitStack() as stack:
            for engine in engines:
                self._share(engine, stack)
            _active.append(self)
            stack.callback(_active.remove, self)
            stack.callback(self._close_sessions)
            self._exit = stack.pop_all()
        return self._given

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stack, self._exit = self._exit, None
        if stack is None:
            raise RuntimeError("this isolated() is not in use")
        stack.close()
        self._before = []
        if self._told and (error is None or isinstance(error, Exception)) and error not in self._told:
            # What the test has found may come of it.
            raise self._told[0] from (error or self._told[0].__cause__)

    def _share(self, engine: Engine, stack: ExitStack) -> None:
        """Let all use one connection of *engine*, until *stack* is left."""
        pool = engine.pool
        outer = isinstance(pool, SharedPool)
        for session in self._before:
            if session.in_transaction() and not (outer and session.is_active):
                raise IsolationError(
                    "the session is in a transaction already, which isolated() would not roll back: commit it, roll it "
                    "back or remove it before"
                )
        if outer:
            shared = cast(SharedPool, pool).shared
            shared.push()
            end = shared.pop
        else:
            shared = SharedConnection(engine, self._timeout)
            end = shared.end
        self._shared.append(shared)
        already = len(shared.told)

        def leave() -> None:
            try:
                end()
            finally:
                shared.is_clearing_up = False
                self._told += shared.told[already:]
                del shared.told[already:]

        stack.callback(leave)

    def _sessions_here(self) -> list[Session]:
        """The sessions that the registries hold here."""
        binders = [binder_of(source) for source in self._sources if isinstance(source, scoped_session)]
        return [binder.registry() for binder in binders if binder.registry.has()]

    def _close_sessions(self) -> None:
        for shared in self._shared:
            shared.await_others()
            shared.is_clearing_up = True
        for session in list(self._sessions):
            try:
                if any(session is known for known in self._before):
                    _roll_back(session)
                    session.expire_all()
                else:
                    session.close()
            except Exception as error:
                warn_of_error(error, "isolated(): closing a session failed; its connection is discarded")
                with suppress(Exception):
                    session.invalidate()
        for source in self._sources:
            if isinstance(source, scoped_session):
                registry = binder_of(source).registry
                try:
                    if registry.has() and not any(registry() is known for known in self._before):
                        source.remove()
                except Exception as error:  # a scope function may have nothing to go by any more
                    warn_of_error(error, "isolated(): removing the session failed")

    def _notice(self, session: Session, connection: Connection) -> None:
        """*session* has begun a transaction on *connection*."""
        pool = connection.engine.pool
        if isinstance(pool, SharedPool):
            if any(pool.shared is shared for shared in self._shared):
                self._sessions.add(session)
        elif isinstance(session, self._classes):
            raise self._shared[0].tell(
                f"the session has begun a transaction on an engine that is not isolated, of {connection.dialect.name}: "
                f"pass that, too, as in isolated(Session, engine)"
            )


def _check_source(source: object) -> None:
    if isinstance(source, (scoped_session, sessionmaker)):
        binder_of(source)
    else:
        _engines_of(source)  # raises


def _roll_back(session: Session) -> None:
    """Roll *session* back, all levels of it: SQLAlchemy 1.4 may take several calls."""
    transaction = session.get_transaction()
    while transaction is not None and session.get_transaction() is transaction:
        session.rollback()


#: The blocks that are active, the innermost last.
_active: list[isolated[Any]] = []


def _after_begin(session: Session, transaction: object, connection: Connection) -> None:
    for block in list(_active):
        block._notice(session, connection)


# For good: it does nothing where no block is active, and SQLAlchemy cannot remove a listener while another thread, such
# as a server's that is not quite done with its request, may be calling it.
_TO_SESSION = Listeners({"after_begin": _after_begin})


# -- count_statements() -----------------------------------------------------------------------------------------------


class Statements(Sequence[str]):
    """The statements that were sent, as SQL text, in their order: what :func:`count_statements` yields.

    Its ``len()`` is their number.
    """

    def __init__(self, *, parameters: bool) -> None:
        self._statements: list[str] = []
        self._parameters: list[str] | None = [] if parameters else None

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._statements[index]

    def __len__(self) -> int:
        return len(self._statements)

    def exactly(self, number: int) -> None:
        """Fail unless so many statements were sent.

        :raises AssertionError: with the list of them.
        """
        __tracebackhide__ = True
        if len(self) != number:
            raise AssertionError(f"expected exactly {_count(number)}, but there {self._were_sent()}")

    def at_most(self, number: int) -> None:
        """Fail if more statements were sent.

        :raises AssertionError: with the list of them.
        """
        __tracebackhide__ = True
        if len(self) > number:
            raise AssertionError(f"expected at most {_count(number)}, but there {self._were_sent()}")

    def _were_sent(self) -> str:
        if not self._statements:
            return "was none"
        return f"{'was' if len(self) == 1 else 'were'} {len(self)}:\n{self}"

    def __str__(self) -> str:
        """The numbered list of them.  Those that are repeated are shown once, with all their numbers."""
        numbers: dict[str, list[int]] = {}
        for number, statement in enumerate(self._statements, 1):
            numbers.setdefault(_in_one_line(statement), []).append(number)
        lines = []
        for statement, which in numbers.items():
            if len(which) == 1:
                lines.append(f"  {which[0]}. {statement}")
            else:
                listed = ", ".join(map(str, which[:10])) + (", …" if len(which) > 10 else "")
                lines.append(f"  {len(which)} times ({listed}): {statement}")
            if self._parameters is not None:
                lines += [f"       {number}: {self._parameters[number - 1]}" for number in which]
        return "\n".join(lines)

    def __repr__(self) -> str:
        # In one line, the repeated ones first: pytest shows it, shortened, where "assert len(statements) <= 2" fails.
        counted = Counter(_in_one_line(statement) for statement in self._statements).most_common()
        parts = [(f"{number}x " if number > 1 else "") + _shortened(statement) for statement, number in counted]
        return f"<{_count(len(self))}{': ' if parts else ''}{'; '.join(parts)}>"


def _count(number: int) -> str:
    return f"{number} statement{'' if number == 1 else 's'}"


def _in_one_line(statement: str) -> str:
    return " ".join(statement.split())


_COLUMNS = re.compile(r"\ASELECT .+? FROM ", re.IGNORECASE)


def _shortened(statement: str) -> str:
    """Enough of *statement* to know it by."""
    statement = _COLUMNS.sub("SELECT … FROM ", statement)
    return statement if len(statement) <= 80 else statement[:79] + "…"


class count_statements:
    """Within this block, the statements that are sent are noted down, to be counted: a guard against N+1 queries.

    ::

        with count_statements(engine) as statements:
            client.get("/guests")
        assert len(statements) == 2

    :param engine: an :class:`~sqlalchemy.engine.Engine`; or a ``scoped_session``, a ``sessionmaker`` or a ``Session``,
        whose engines are meant.
    :param parameters: whether the parameters are noted, too, and shown where a guard fails.  They are not by default:
        they may be passwords, and what is shown may be published.
    :raises TypeError: if *engine* is none of them.
    :raises ValueError: if the engines of a session can't be told.

    The block yields a :class:`Statements`.  Those of all connections of the engine are noted, of connections that are
    open already, too, and whichever thread uses them.  An ``executemany`` is one statement; ``BEGIN``, ``COMMIT``, and
    what sets and releases SAVEPOINTs, is none.
    """

    def __init__(self, engine: object, *, parameters: bool = False) -> None:
        engines: list[Engine]
        if isinstance(engine, Session):
            engines = _engines_of_binds([engine.bind] if engine.bind is not None else _binds_of_session(engine))
        else:
            engines, _factory = _engines_of(engine)
        if not engines:
            raise ValueError(
                "the engine of the session cannot be told (it has neither a bind nor binds): pass its engine"
            )
        self._engines = engines
        self._parameters = parameters
        self._statements: Statements | None = None

    def __enter__(self) -> Statements:
        if self._statements is not None:
            raise RuntimeError("this count_statements() is in use already: call count_statements() for each block")
        for engine in self._engines:
            if "default_schema_name" not in vars(engine.dialect):
                # The first connection of an engine asks the database who it is: that is not the application's.
                engine.connect().close()
            _TO_DIALECT.register(engine.dialect)
        self._statements = Statements(parameters=self._parameters)
        _counting.append(self)
        return self._statements

    def __exit__(self, *error: object) -> None:
        _counting.remove(self)
        self._statements = None

    def _note(self, dialect: object, statement: str, parameters: object) -> None:
        if any(engine.dialect is dialect for engine in self._engines):
            statements = cast(Statements, self._statements)
            statements._statements.append(statement)
            if statements._parameters is not None:
                statements._parameters.append(shown(parameters))


#: The blocks that are active.
_counting: list[count_statements] = []


def _do_execute(cursor: object, statement: str, *parameters_and_context: Any) -> None:
    if _counting and not is_control(statement):
        dialect = parameters_and_context[-1].dialect
        parameters = parameters_and_context[0] if len(parameters_and_context) > 1 else ()
        for block in list(_counting):
            block._note(dialect, statement, parameters)


# For good, as above.
_TO_DIALECT = Listeners({"do_execute": _do_execute, "do_executemany": _do_execute, "do_execute_no_params": _do_execute})

for _public in (IsolationError, Statements, count_statements, isolated):
    # One name for each, also in tracebacks: where it is imported from.
    _public.__module__ = __name__
