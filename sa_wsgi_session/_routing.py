"""Where a request goes: to a replica, or to the primary.

Each request has a :class:`Route`.  The session asks it for its engine (``get_bind``) when it sends its first statement,
and not before: by then the application may have said ``use_primary()``, and a request that sends none costs nothing.
The answer is for the whole of an attempt.  When the headers leave, the route adds to them what the visitor has to
bring back the next time (``_tokens``).

A replica may fail, or refuse a change.  Then the route tells the ``Trial`` of the attempt, and another attempt follows,
which goes elsewhere.

A unit of work without a route, be it a job or a part that is independent of its request, goes to the primary.

This file knows sessions and headers.  What is known of the servers is in ``_cluster``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from ._binding import here
from ._cluster import Cluster, Replica, monotonic
from ._errors import log, type_name
from ._scope import SessionScope
from ._tokens import NOTHING_SEEN, Tokens
from ._transient import Conflict
from ._watching import IS_EVENT_OF_DIALECT, Effect, Listeners, effect_of, listen_to_connections, lock, unit_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import ExceptionContext
    from sqlalchemy.orm import SessionTransaction

    from ._middleware import Environ, Headers, StartResponse
    from ._retry import Trial
    from ._sight import Sight


class ReplicaError(RuntimeError):
    """A replica cannot serve this unit of work any more, and it is too late to replay that elsewhere.

    Its server was started anew in the middle of a response; or, with a database that does not refuse it itself, the
    body of a response that a replica serves has sent a change.
    """


#: RFC 9110, section 9.2.1.  (TRACE has no business with a database.)
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


def is_safe(environ: Environ) -> bool:
    """Whether the method of the request promises not to change anything."""
    return environ.get("REQUEST_METHOD") in _SAFE


class Router:
    """What the routes of one middleware have in common."""

    __slots__ = ("cluster", "primary", "read_only", "sticky", "tokens")

    def __init__(self, cluster: Cluster, tokens: Tokens, read_only: Callable[[Environ], object], sticky: float) -> None:
        self.cluster = cluster
        self.primary = cluster.primary.engine
        self.tokens = tokens
        self.read_only = read_only
        self.sticky = max(1, round(sticky + 0.5))

    def route(self, environ: Environ) -> Route:
        return Route(self, environ)

    def listen(self, session_class: type[Session]) -> None:
        """Listen to its engines, and have the sessions of that class ask for theirs."""
        _TO_PRIMARY.register(self.primary.dialect)
        for replica in self.cluster.replicas:
            # Now: of one that is listened to from its first statement on nobody knows what was done there before.
            listen_to_connections(replica.engine, True)
            _listen_to_replica(replica, positions=self.cluster.positions)
        self.cluster.listen()
        _TO_SESSION.register(session_class)
        _divert(session_class)


class Route:
    """Where one request goes, over all the attempts at it."""

    __slots__ = (
        "_begun",
        "_cookies",
        "_decided",
        "_excluded",
        "_header",
        "_incarnation",
        "_late",
        "_needed",
        "_pins",
        "_router",
        "_secure",
        "_seen",
        "_sent",
        "_trial",
        "_used_primary",
        "may_read",
        "reason",
        "replica",
    )

    def __init__(self, router: Router, environ: Environ) -> None:
        self._router = router
        get = environ.get
        self._cookies: str | None = get("HTTP_COOKIE")
        self._header: str | None = get(router.tokens.header_key)
        self._secure = get("wsgi.url_scheme") == "https"
        self._seen = NOTHING_SEEN
        #: Whether a replica may serve it.
        self.may_read = bool(router.read_only(environ))
        #: Why it goes where it goes.
        self.reason: str = "" if self.may_read else "not a safe request"
        self._excluded: set[Replica] = set()
        #: Whether anything in this request has used the primary, before its headers have left; and after.
        self._used_primary = self._late = False
        #: Whether what it does on the primary ends after the headers have left.
        self._pins = False
        #: Whether the headers have left.
        self._begun = False
        self.replica: Replica | None = None
        self._decided = self._sent = False
        self._needed = 0
        self._incarnation: int | None = None
        self._trial: Trial | None = None

    def attempt(self, sight: Sight | None, trial: Trial | None) -> Callable[..., SessionScope]:
        """What makes the scope of the next attempt."""
        self._trial = trial
        self.replica, self._incarnation = None, None
        self._decided = self._sent = False
        if sight is None:
            return partial(_routed_scope, self)
        return partial(sight.scope, route=self)

    @property
    def engine(self) -> str | None:
        """Which engine serves it, for people; none if it has sent nothing."""
        if not self._sent:
            return None
        return "primary" if self.replica is None else self.replica.name

    # Decisions

    def use_primary(self, scope: SessionScope) -> None:
        if self.replica is not None:
            if self._sent:
                raise RuntimeError(
                    f"use_primary() of {scope} was called after a statement had been sent to {self.replica.name}: call "
                    f"it before the first one, or let read_only(environ) of ReadReplicas say so"
                )
            self.release()
            self.replica = None
        self.may_read, self.reason, self._decided = False, "use_primary()", True

    def bind(self, bind: Any) -> Any:
        """The engine that a session gets which would get *bind* otherwise."""
        if bind is not self._router.primary:
            return bind
        if not self._decided:
            self._decide()
        self._sent = True
        return bind if self.replica is None else self.replica.engine

    def _decide(self) -> None:
        self._decided = True
        if not self.may_read:
            return
        router = self._router
        cluster, now = router.cluster, monotonic()
        primary = cluster.primary
        primary.check(now)
        if self._cookies is not None or self._header is not None:
            self._seen = router.tokens.seen(self._cookies, self._header)
        seen = self._seen
        if self._begun and not seen.fresh:
            self.reason = "too late to tell the visitor where"
            return
        if seen.pinned:
            self.reason = "this visitor has just used the primary"
            return
        needed = max(seen.position, primary.floor)
        if seen.homes:
            home = cluster.find(seen.homes[0]) if len(seen.homes) == 1 else None
            if (
                home is not None
                and home not in self._excluded
                and home.is_up(now, primary.floor)
                and home.has(needed, now)
                and home.home == seen.homes[0]
            ):
                self._take(home, needed, "where this visitor reads")
                return
            if self._begun:
                self.reason = "too late to tell the visitor where"
                return
            # What they have seen there is not newer than what the primary has now.
            bound = primary.ask_or_none()
            if bound is None:
                self.reason = "the replica where this visitor reads cannot be used"
                return
            needed = max(needed, bound)
        replica = cluster.choose(needed, self._excluded, now)
        if replica is None and seen.position > primary.latest:
            # Perhaps it is nobody's: of a primary that was replaced, or of another database.
            bound = primary.ask_or_none()
            if bound is not None and seen.position > bound:
                needed = bound if seen.homes else primary.floor
                replica = cluster.choose(needed, self._excluded, now)
        if replica is not None:
            self._take(replica, needed, "least busy")
        else:
            self.reason = self.reason or "no replica is fresh enough"

    def _take(self, replica: Replica, needed: int, reason: str) -> None:
        replica.serving.add(self)
        self.replica, self._needed, self.reason = replica, needed, reason

    def release(self) -> None:
        """The attempt is over."""
        if self.replica is not None:
            self.replica.serving.discard(self)

    # What it is told

    def begins(self, connection: Connection) -> None:
        """The session begins a transaction on *connection*."""
        replica = self.replica
        if replica is None or connection.dialect is not replica.engine.dialect:
            return
        # Once more: the connection may be a new one, to a server that was started anew.
        known = replica.known
        if known.position < self._needed or self._incarnation not in (None, known.incarnation):
            self.leaves(replica, Conflict("the replica has gone back"))
            raise ReplicaError(f"{replica.name} was started anew, and has not replayed yet what this visitor has seen")
        self._incarnation = known.incarnation
        if _READ_ONLY not in connection.info:
            # That of the driver, which does not send anything, or only once.
            with suppress(Exception):
                dialect: Any = connection.dialect
                dialect.set_readonly(connection.connection.dbapi_connection, True)
            connection.info[_READ_ONLY] = True

    def only_reads_too_late(self, scope: SessionScope) -> bool:
        """Whether the response has begun, and its transaction has done nothing but read from the replica.

        Where that is lost then, after the last row, nothing is lost.
        """
        replica = self.replica
        return (
            self._begun
            and replica is not None
            and all(connection.dialect is replica.engine.dialect for connection in scope.connections)
        )

    def uses_primary(self) -> None:
        if self._begun:
            self._late = True
        else:
            self._used_primary = True

    def leaves(self, replica: Replica, conflict: Conflict) -> None:
        """The replica cannot serve this attempt."""
        self._excluded.add(replica)
        if self._trial is not None:
            self._trial.elsewhere = conflict

    def writes(self, scope: SessionScope, conflict: Conflict) -> None:
        """A replica was asked for a change."""
        if self._trial is not None:
            _warn_of_write(scope)
            self._trial.elsewhere = conflict
        self.may_read, self.reason = False, "a change in a safe request"

    def settled(self, *, waits: bool) -> None:
        """The view is done.

        :param waits: whether its transaction goes on.
        """
        self._trial = None
        if waits and self.replica is None:
            self._pins = self._used_primary or not self.may_read

    def ends(self) -> None:
        """The unit of work has ended."""
        if self._late or self._pins:
            # The visitor can't be told any more, so that it is for all of them.
            self._router.cluster.primary.raise_floor()
            self._late = self._pins = False

    # What the visitor is told

    def start_response(self, forward: StartResponse, status: str, headers: Headers, *exc_info: Any) -> Any:
        """The headers leave."""
        added = self._headers()
        self._begun = True
        return forward(status, [*headers, *added] if added else headers, *exc_info)

    def _headers(self) -> Headers:
        router = self._router
        if self._used_primary or self._pins:
            position = None if self._pins else router.cluster.primary.ask_or_none()
            return router.tokens.position_headers(
                position or 0,
                0 if position is not None else router.sticky,
                secure=self._secure,
                forget_home=self._cookies is not None,
            )
        replica = self.replica
        if replica is None:
            return []
        home = replica.home
        if self._seen.fresh and self._seen.homes == (home,):
            return []
        return router.tokens.home_headers(home, router.tokens.rounded_now(), self._secure)


_READ_ONLY = "sa_wsgi_session.read_only"


# The scopes that have one


class _Routed(SessionScope):
    """A scope whose session may read from a replica: what is added to a plain one, and to an observed one."""

    __slots__ = ()

    def use_primary(self) -> None:
        self._check_running("use_primary()")
        assert self.route is not None
        self.route.use_primary(self)

    def _settle(self, *, body_is_over: bool = False) -> None:
        super()._settle(body_is_over=body_is_over)
        assert self.route is not None
        session = self.binder.peek(self)
        waits = session is not None and session.in_transaction()
        self.route.settled(waits=waits or (self._commit_at == "end" and not body_is_over))

    def _run_callbacks(self) -> None:
        assert self.route is not None
        if self.callbacks is not None and self.callbacks.due:
            self.route.uses_primary()  # perhaps
        super()._run_callbacks()

    def _commit(self, session: Session) -> None:
        assert self.route is not None
        try:
            super()._commit(session)
        except DBAPIError as error:
            if not (error.connection_invalidated and self.route.only_reads_too_late(self)):
                raise
            self._roll_back(session)

    def _leave(self) -> None:
        assert self.route is not None
        self.route.release()
        super()._leave()

    def _end(self) -> None:
        assert self.route is not None
        try:
            super()._end()
        finally:
            self.route.ends()


@cache
def with_route(cls: type[SessionScope]) -> Any:
    """That kind of scope, with a route."""
    return type(cls.__name__, (_Routed, cls), {"__slots__": ("route",), "__doc__": cls.__doc__})


_RoutedScope = with_route(SessionScope)


def _routed_scope(route: Route, *args: Any, **options: Any) -> Any:
    scope = _RoutedScope(*args, **options)
    scope.route = route
    return scope


# A change in a safe request

#: Patterns of paths that were told of.  The paths are the clients' choice, hence a bound.
_told: set[str] = set()
_MOST_PATTERNS = 200
# What looks like an identifier, and not like a word of the application's.
_VARIABLE = re.compile(r"(?<=/)(?:[^/]*\d[^/]*|[^/]{25,})")


def _warn_of_write(scope: SessionScope) -> None:
    pattern = _VARIABLE.sub("*", str(scope))
    with lock:
        if pattern in _told or len(_told) >= _MOST_PATTERNS:
            return
        _told.add(pattern)
    log.warning(
        "%s: it changes something, although its method is safe, so that it is done a second time, on the primary; call "
        "current_scope().use_primary() there, or give ReadReplicas a read_only(environ) that knows it",
        pattern,
    )


# The listeners


def _route_here(replica: Replica | None = None) -> SessionScope | None:
    """The innermost unit of work here that has a route, to that replica."""
    frame = here.get()
    while frame is not None:
        unit = frame.unit
        if unit is not None and unit.route is not None and (replica is None or unit.route.replica is replica):
            return cast(SessionScope, unit)
        frame = frame.outer
    return None


def _on_primary(*args: Any) -> None:
    frame = here.get()
    while frame is not None:
        unit = frame.unit
        if unit is not None and unit.route is not None:
            unit.route.uses_primary()
        frame = frame.outer


_TO_PRIMARY = Listeners({"do_execute": _on_primary, "do_executemany": _on_primary, "do_execute_no_params": _on_primary})


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    unit = unit_of(session)
    if unit is not None and unit.route is not None:
        unit.route.begins(connection)


_TO_SESSION = Listeners({"after_begin": _after_begin}, insert=True)


def _divert(session_class: Any) -> None:
    """Have the sessions of that class, which a sessionmaker has made for itself, ask for their engine."""
    with lock:
        if "get_bind" in session_class.__dict__ and hasattr(session_class.get_bind, "_is_diverted"):
            return
        original = session_class.get_bind

        def get_bind(self: Session, *args: Any, **options: Any) -> Engine | Connection:
            bind: Engine | Connection = original(self, *args, **options)
            # A bind that was asked for by name stays what it is.
            if here.get() is not None and options.get("bind") is None:
                unit = unit_of(self)
                if unit is not None and unit.route is not None:
                    return unit.route.bind(bind)  # type: ignore[no-any-return]
            return bind

        get_bind._is_diverted = True  # type: ignore[attr-defined]
        session_class.get_bind = get_bind


def _listen_to_replica(replica: Replica, *, positions: bool) -> None:
    engine = replica.engine
    if IS_EVENT_OF_DIALECT:
        event.listen(engine.dialect, "handle_error", partial(_on_error, replica))
    else:
        event.listen(engine, "handle_error", partial(_on_error, replica))
        event.listen(engine, "do_connect", partial(_connect, replica))
    if not positions:
        for name in "do_execute", "do_executemany", "do_execute_no_params":
            event.listen(engine, name, partial(_refuse_change, replica))


def _refuse_change(replica: Replica, _cursor: object, statement: str, *args: Any) -> None:
    """Databases that are no standbys might do it."""
    if effect_of(statement) is Effect.READS:
        return
    scope = _route_here(replica)
    if scope is not None and scope.route is not None:
        scope.route.writes(scope, Conflict("a change"))
        raise ReplicaError(
            f"{scope} was about to change something on {replica.name}: call current_scope().use_primary() before the "
            f"first statement, or give ReadReplicas a read_only(environ) that knows it"
        )


def _connect(replica: Replica, dialect: Any, _record: object, args: Any, options: Any) -> Any:
    # Of a connection that cannot be made SQLAlchemy 1.4 tells nobody.
    try:
        return dialect.connect(*args, **options)
    except Exception as error:
        _cannot_serve(replica, Conflict(type_name(error)))
        raise


def _cannot_serve(replica: Replica, conflict: Conflict) -> None:
    replica.fails(conflict.code)
    scope = _route_here(replica)
    if scope is not None and scope.route is not None:
        scope.route.leaves(replica, conflict)


# PostgreSQL's manual, appendix "PostgreSQL Error Codes": connection exceptions, insufficient resources (too many
# connections), operator intervention.
_DOWN = ("08", "53", "57P")
#: What a standby does to a query that is in the way of what it has to replay.
_IN_THE_WAY = ("40001", "40P01")
_READ_ONLY_TRANSACTION = "25006"


def sqlstate_of(error: BaseException | None) -> str:
    """What the database has called it; empty where it, or its driver, has not."""
    for name in "sqlstate", "pgcode":
        code = getattr(error, name, None)
        if isinstance(code, str):
            return code
    return ""


def _on_error(replica: Replica, context: ExceptionContext) -> None:
    error = context.sqlalchemy_exception
    if error is None or getattr(context, "is_pre_ping", False):
        return
    code = sqlstate_of(cast("BaseException | None", context.original_exception))
    conflict = Conflict(f"SQLSTATE {code}" if code else type_name(context.original_exception))
    if context.is_disconnect or context.connection is None or code.startswith(_DOWN):
        _cannot_serve(replica, conflict)
        return
    scope = _route_here(replica)
    if scope is None or scope.route is None:
        return
    if code in _IN_THE_WAY:
        scope.route.leaves(replica, conflict)
    elif code == _READ_ONLY_TRANSACTION:
        scope.route.writes(scope, conflict)
