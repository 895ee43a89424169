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
from functools import cache, partial
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sqlalchemy import event

from ._binding import here
from ._cluster import Cluster, Replica, monotonic
from ._errors import log, type_name
from ._scope import SessionScope, State
from ._tokens import NOTHING_SEEN, Tokens
from ._transient import Conflict
from ._watching import IS_EVENT_OF_DIALECT, Effect, Listeners, effect_of, listen_to_replica, lock, unit_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine
    from sqlalchemy.engine.interfaces import ExceptionContext

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


class Router:
    """What the routes of one middleware have in common."""

    __slots__ = ("cluster", "header_key", "primary", "read_only", "sticky", "tokens")

    def __init__(
        self, cluster: Cluster, tokens: Tokens, read_only: Callable[[Environ], object] | None, sticky: float
    ) -> None:
        self.cluster = cluster
        self.primary = cluster.primary.engine
        self.tokens = tokens
        self.header_key = tokens.header_key
        self.read_only = read_only
        # A token tells when it was issued in whole seconds: up to one less.
        self.sticky = ceil(sticky) + 1

    def listen(self) -> None:
        """Listen to its engines; once."""
        _TO_PRIMARY.register(self.primary.dialect)
        for replica in self.cluster.replicas:
            listen_to_replica(replica.engine)
            _listen_to_replica(replica, positions=self.cluster.positions)
        self.cluster.listen()


class Route:
    """Where one request goes, over all the attempts at it."""

    # Most requests need little of it: only where there is something to know is it written to the instance.

    _seen = NOTHING_SEEN
    #: Why it goes where it goes.
    reason = ""
    #: Those that could not serve it.
    _excluded: frozenset[Replica] = frozenset()
    #: Whether anything in this request has used the primary, before its headers have left; and after.
    _used_primary = _late = False
    #: Whether what it does on the primary ends after the headers have left.
    _pins = False
    #: Whether the headers have left.
    _begun = False
    #: Whether there is nothing to tell: the visitor is where they have been.
    _at_home = False
    #: Whether an engine was chosen for the present attempt, and which; and whether it was used.
    _decided = _sent = False
    replica: Replica | None = None
    #: What the replica must have replayed, and its incarnation once that is known.
    _needed: int
    _incarnation: int | None = None
    #: What the visitor is told who has read there.
    _home = ""
    _trial: Trial | None = None

    def __init__(self, router: Router, environ: Environ, forward: StartResponse) -> None:
        self._router = router
        #: The ``start_response`` of the server, or of whoever is before it.
        self.forward = forward
        self._environ = environ
        # Now: they are the application's to change.
        self._cookies: str | None = environ.get("HTTP_COOKIE")
        self._header: str | None = environ.get(router.header_key)
        #: Whether a replica may serve it.
        read_only = router.read_only
        self.may_read = environ.get("REQUEST_METHOD") in _SAFE if read_only is None else read_only(environ)
        if not self.may_read:
            self.reason = "not a safe request"

    def attempt(self, sight: Sight | None, trial: Trial | None) -> Callable[..., SessionScope]:
        """What makes the scope of the next attempt."""
        self._trial = trial
        if self._decided:
            self._decided = self._sent = self._at_home = False
            self.replica = self._incarnation = None
            self._home = ""
        return RoutedScope if sight is None else partial(sight.scope, kind=_observed_kind())

    @property
    def engine(self) -> str | None:
        """Which engine serves it, for people; none if it has sent nothing."""
        if not self._sent:
            return None
        return "primary" if self.replica is None else self.replica.name

    # Decisions

    def use_primary(self, scope: SessionScope) -> None:
        if self.replica is not None:
            raise RuntimeError(
                f"use_primary() of {scope} was called after a statement had been sent to {self.replica.name}: call "
                f"it before the first one, or let read_only(environ) of ReadReplicas say so"
            )
        self.may_read, self.reason = False, "use_primary()"

    def bind(self, bind: Engine | Connection) -> Engine | Connection:
        """The engine that a session gets which would get *bind* otherwise."""
        if bind is not self._router.primary:
            return bind
        if not self._decided:
            self._decide()
        if not self._sent:
            self._sent = True
            if self.replica is None:
                self._catch_up()
        return bind if self.replica is None else self.replica.engine

    def _decide(self) -> None:
        self._decided = True
        if not self.may_read:
            return
        router = self._router
        cluster, now = router.cluster, monotonic()
        primary = cluster.primary
        if now >= primary.due:
            primary.check(now)
        if self._cookies is not None and self._header is None:
            # Nearly always: a visitor who is at home somewhere, and has nothing else to tell.
            home_cookie = router.tokens.fresh_home(self._cookies)
            at_home = None if home_cookie is None else cluster.homes.get(home_cookie)
            if at_home is not None and not at_home.failures and at_home not in self._excluded:
                floor, known = primary.floor, at_home.known
                if known.home == home_cookie and known.position >= floor:
                    self._take(at_home, floor, _AT_HOME, known.incarnation)
                    self._at_home = True
                    return
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
            ):
                known = home.known
                if known.home == seen.homes[0]:
                    self._take(home, needed, _AT_HOME, known.incarnation)
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

    def _catch_up(self) -> None:
        """The primary is about to serve a visitor who has, perhaps, read from a replica."""
        router = self._router
        if not router.cluster.positions or (self._cookies is None and self._header is None):
            return
        homes = router.tokens.seen(self._cookies, self._header).homes
        if homes:
            router.cluster.catch_up(homes)

    def _take(self, replica: Replica, needed: int, reason: str, incarnation: int | None = None) -> None:
        replica.serving.add(self)
        self.replica, self._needed, self.reason, self._incarnation = replica, needed, reason, incarnation

    # What it is told

    def begins(self, connection: Connection) -> bool:
        """The session begins a transaction on *connection*; whether that is to the replica."""
        replica = self.replica
        if replica is None or connection.dialect is not replica.dialect:
            return False
        # Once more: the connection may be a new one, to a server that was started anew.
        known = replica.known
        if known.position < self._needed or self._incarnation not in (None, known.incarnation):
            self.leaves(replica, Conflict("the replica has gone back"))
            raise ReplicaError(f"{replica.name} was started anew, and has not replayed yet what this visitor has seen")
        self._incarnation, self._home = known.incarnation, known.home
        return True

    def only_reads_too_late(self, scope: SessionScope) -> bool:
        """Whether the response has begun, and its transaction has done nothing but read from the replica.

        Where that is lost then, after the last row, nothing is lost.
        """
        replica = self.replica
        return (
            self._begun
            and replica is not None
            and all(connection.dialect is replica.dialect for connection in scope.connections)
        )

    def uses_primary(self) -> None:
        if self._begun:
            self._late = True
        else:
            self._used_primary = True

    def leaves(self, replica: Replica, conflict: Conflict) -> None:
        """The replica cannot serve this attempt."""
        self._excluded |= {replica}
        if self._trial is not None:
            self._trial.elsewhere = conflict

    def refuses(self, scope: SessionScope, what: _Refused, conflict: Conflict) -> None:
        """No replica does what this attempt has asked for."""
        if self._trial is not None:
            _warn_once(scope, what.warning)
            self._trial.elsewhere = conflict
        self.may_read, self.reason = False, what.reason

    def settled(self, *, waits: bool) -> None:
        """The view is done.

        :param waits: whether its transaction goes on.
        """
        self._trial = None
        if waits and self.replica is None:
            self._pins = self._used_primary or not self.may_read

    def ends(self) -> None:
        """The attempt has ended, and its transaction."""
        if self.replica is not None:
            self.replica.serving.discard(self)
        if self._late or self._pins:
            self.raise_floor()

    def raise_floor(self) -> None:
        """The visitor can't be told any more what was done on the primary: so that it is for all of them."""
        self._router.cluster.primary.raise_floor()
        self._late = self._pins = False

    # What the visitor is told

    def start_response(self, status: str, headers: Headers, exc_info: Any = None) -> Any:
        """The headers leave."""
        self._begun = True
        if not self._at_home or self._used_primary:
            headers = [*headers, *self._headers()]
        if exc_info is None:
            return self.forward(status, headers)
        try:
            return self.forward(status, headers, exc_info)
        finally:
            exc_info = None  # its traceback refers to frames that refer to it

    def _headers(self) -> Headers:
        router = self._router
        if self._used_primary or self._pins:
            position = None if self._pins else router.cluster.primary.ask_or_none()
            return router.tokens.position_headers(
                position or 0,
                0 if position is not None else router.sticky,
                secure=self._is_secure,
                forget_home=self._cookies is not None,
            )
        home = self._home
        if not home:
            return []  # nothing was read from a replica
        if self._seen.fresh and self._seen.homes == (home,):
            return []
        return router.tokens.home_headers(home, router.tokens.rounded_now(), self._is_secure)

    @property
    def _is_secure(self) -> bool:
        return bool(self._environ.get("wsgi.url_scheme") == "https")


_AT_HOME = "where this visitor reads"


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

    def _run_callbacks(self) -> bool:
        have_run = super()._run_callbacks()
        if have_run and self.route is not None:
            # They may have used the primary, in units of work of their own.
            self.route.uses_primary()
            if self._state is State.ENDED:
                self.route.ends()
        return have_run

    def _has_lost_nothing(self, error: BaseException) -> bool:
        assert self.route is not None
        return getattr(error, "connection_invalidated", False) and self.route.only_reads_too_late(self)

    def _leave(self) -> None:
        super()._leave()
        assert self.route is not None
        self.route.ends()


def with_route(cls: type[SessionScope]) -> Any:
    """That kind of scope, with a route."""
    return type(cls.__name__, (_Routed, cls), {"__slots__": ("route",), "__doc__": cls.__doc__})


RoutedScope = with_route(SessionScope)


@cache
def _observed_kind() -> Any:
    from ._sight import ObservedScope

    return with_route(ObservedScope)


# What only the primary does


class _Refused(NamedTuple):
    #: Why the request goes to the primary.
    reason: str
    #: What the log says, once.
    warning: str


_CHANGE = _Refused(
    "a change in a safe request",
    "%s: it changes something, although its method is safe, so that it is done a second time, on the primary; call "
    "current_scope().use_primary() there, or give ReadReplicas a read_only(environ) that knows it",
)
_NOT_SUPPORTED = _Refused(
    "not supported by a replica",
    "%s: it asks for something that a replica does not support, such as the isolation level SERIALIZABLE, so that it "
    "is done a second time, on the primary; call current_scope().use_primary() there, or give ReadReplicas a "
    "read_only(environ) that knows it",
)

#: Patterns of paths that were told of.  The paths are the clients' choice, hence a bound.
_told: set[str] = set()
_MOST_PATTERNS = 200
# What looks like an identifier, and not like a word of the application's.
_VARIABLE = re.compile(r"(?<=/)(?:[^/]*\d[^/]*|[^/]{25,})")


def _warn_once(scope: SessionScope, warning: str) -> None:
    pattern = _VARIABLE.sub("*", str(scope))
    with lock:
        if pattern in _told or len(_told) >= _MOST_PATTERNS:
            return
        _told.add(pattern)
    log.warning(warning, pattern)


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


def divert(session_class: Any) -> None:
    """Have the sessions of that class, which a sessionmaker has made for itself, ask for their engine."""
    with lock:
        if hasattr(session_class.get_bind, "_is_diverted"):
            return
        original = session_class.get_bind

        def get_bind(self: Any, *args: Any, **options: Any) -> Engine | Connection:
            bind: Engine | Connection = original(self, *args, **options)
            frame = here.get()
            if frame is None:
                return bind
            unit = frame.unit
            # Nearly always the innermost one is that of this session.
            if unit is None or unit.binder.peek(unit) is not self:
                unit = unit_of(self)
            route = None if unit is None else (unit.within or unit).route
            # A bind that was asked for by name stays what it is.
            return bind if route is None or options.get("bind") is not None else route.bind(bind)

        get_bind._is_diverted = True  # type: ignore[attr-defined]
        session_class.get_bind = get_bind


def _listen_to_replica(replica: Replica, *, positions: bool) -> None:
    engine = replica.engine
    event.listen(engine.dialect if IS_EVENT_OF_DIALECT else engine, "handle_error", partial(_on_error, replica))
    if not positions:
        for name in "do_execute", "do_executemany", "do_execute_no_params":
            event.listen(engine, name, partial(_refuse_change, replica))


def _refuse_change(replica: Replica, _cursor: object, statement: str, *args: Any) -> None:
    """Databases that are no standbys might do it."""
    if effect_of(statement) is Effect.READS:
        return
    scope = _route_here(replica)
    if scope is not None and scope.route is not None:
        scope.route.refuses(scope, _CHANGE, Conflict("a change"))
        raise ReplicaError(
            f"{scope} was about to change something on {replica.name}: call current_scope().use_primary() before the "
            f"first statement, or give ReadReplicas a read_only(environ) that knows it"
        )


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
#: A change, in a read-only transaction; and what a standby does not support (nor, perhaps, the primary).
_ONLY_ON_PRIMARY = {"25006": _CHANGE, "0A000": _NOT_SUPPORTED}


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
    elif code in _ONLY_ON_PRIMARY:
        scope.route.refuses(scope, _ONLY_ON_PRIMARY[code], conflict)
