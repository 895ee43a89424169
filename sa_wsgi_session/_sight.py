"""Sight: what is seen of a unit of work that somebody wants to be told of.

A middleware, or a job, with an ``observer`` (or ``server_timing``, or ``warn_after``) has a :class:`Watcher`.  That
makes a :class:`Sight` for each unit of work, and an :class:`ObservedScope` for each attempt at it.  They are told

* *of each statement, and each COMMIT*, how long it took: by wrappers around ``do_execute`` and its siblings of the
  dialect.  (The events ``before_cursor_execute`` and ``after_cursor_execute`` send SQLAlchemy's connections down their
  slow path, and there is none after ``do_execute``.)
* *of each transaction*, from when to when its session has a connection, and how it ends: by events of the session.

A unit of work that nobody wants to be told of is a plain ``SessionScope``.  As long as there is no other one, nothing
of this file is imported, registered or wrapped.

The listeners find the unit in ``here``, as those of ``_watching`` do.  All times are in seconds.
"""

from __future__ import annotations

import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ._binding import Binder, here
from ._errors import callable_name, log, type_name, warn_of_error
from ._middleware import NOTHING, Stream
from ._scope import SessionScope
from ._transient import leaves_unknown
from ._watching import Listeners, binds_of, lock, session_class_of, unit_of
from .observers import FinishedUnit

if TYPE_CHECKING:
    from types import FrameType

    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import Session, SessionTransaction

    from ._middleware import Environ, Headers, StartResponse

    Observer = Callable[[FinishedUnit], object]


class Watcher:
    """What somebody wants to know of the units of work of a middleware, or of a job."""

    __slots__ = ("__weakref__", "_server_timing", "observer", "registry", "warn_after")

    def __init__(
        self,
        binder: Binder,
        observer: Observer | None,
        server_timing: Callable[[Environ], object] | bool = False,
        warn_after: float | None = None,
    ) -> None:
        self.observer = observer
        self.warn_after = warn_after
        self.registry = binder.registry
        self._server_timing = server_timing
        _TO_SESSION.register(session_class_of(binder.factory))
        for bind in binds_of(binder.factory):
            _measure(bind.dialect)
        if warn_after is not None:
            _warning.add(self)

    def job(self) -> Sight:
        """How to see this job."""
        return Sight(self)

    def request(self, environ: Environ, start_response: StartResponse) -> tuple[Sight, StartResponse]:
        """How to see this request, and the ``start_response`` by which its response is seen to begin."""
        timing = self._server_timing
        sight = Sight(self, adds_timing=timing if isinstance(timing, bool) else bool(timing(environ)))
        return sight, partial(sight.start_response, start_response)


class Sight:
    """What is seen of one unit of work, over all the attempts at it."""

    __slots__ = (
        "_adds_timing",
        "_began",
        "_commit_seconds",
        "_commits",
        "_connection_seconds",
        "_database_seconds",
        "_durable",
        "_error",
        "_held_since",
        "_outcome",
        "_rollbacks",
        "_scope",
        "_started",
        "_statements",
        "_status",
        "_streaming_connection_seconds",
        "_streaming_since",
        "_watcher",
        "warn_after",
    )

    #: Whether the current transaction has become durable; ``None``: nobody knows.
    _durable: bool | None
    _outcome: str

    def __init__(self, watcher: Watcher, *, adds_timing: bool = False) -> None:
        self._watcher = watcher
        self.warn_after = watcher.warn_after
        self._adds_timing = adds_timing
        self._scope: ObservedScope | None = None
        self._status: int | None = None
        #: The type of what has ended the attempt.
        self._error: str | None = None
        self._commits = self._rollbacks = self._statements = 0
        self._database_seconds = self._commit_seconds = 0.0
        self._connection_seconds = self._streaming_connection_seconds = 0.0
        self._held_since: float | None = None
        self._streaming_since: float | None = None
        self._started = time.time()
        self._began = perf_counter()

    def scope(
        self,
        binder: Binder,
        name: str | tuple[object, object],
        commit_at: str = "start",
        *,
        kind: type[ObservedScope] | None = None,
    ) -> ObservedScope:
        """Make the next attempt at it."""
        self._scope = scope = (ObservedScope if kind is None else kind)(binder, name, commit_at)
        scope.sight = self
        self._error, self._outcome = None, "nothing"
        return scope

    # What it is told

    def start_response(self, forward: StartResponse, status: str, headers: Headers, *exc_info: Any) -> Any:
        """The response begins."""
        self._status = int(status[:3])
        if self._adds_timing:
            headers = [*headers, ("Server-Timing", self._server_timing())]
        write = forward(status, headers, *exc_info)
        self._streaming_since = perf_counter()
        return write

    def _server_timing(self) -> str:
        # https://www.w3.org/TR/server-timing/: durations are in milliseconds.
        assert self._scope is not None
        route = self._scope.route
        engine = "" if route is None or route.engine is None else f', engine;desc="{route.engine}: {route.reason}"'
        return (
            f'db;dur={1000 * self._database_seconds:.3f};desc="statements: {self._statements}", '
            f"commit;dur={1000 * self._commit_seconds:.3f}, "
            f'attempts;desc="{self._scope.attempt}"{engine}'
        )

    def failed(self, error: BaseException) -> None:
        """*error* ends the attempt."""
        if self._error is None:
            self._error = type_name(error)

    def statement(self, seconds: float, *, counts: bool) -> None:
        self._statements += counts
        self._database_seconds += seconds

    def commit(self, seconds: float, *, is_unknown: bool) -> None:
        """COMMIT was sent; perhaps nobody knows what has come of it."""
        self._database_seconds += seconds
        self._commit_seconds += seconds
        if is_unknown:
            self._durable = None

    def begins(self) -> None:
        """The session has a connection."""
        if self._held_since is None:
            self._held_since = perf_counter()
            self._durable = False

    def committed(self) -> None:
        self._durable = True

    def ends(self) -> None:
        """The session has no connection any more."""
        if self._held_since is None:
            return
        self._connection_seconds += self._held(self._held_since)
        self._streaming_connection_seconds += self.held_while_streaming()
        self._held_since = None
        if self._durable:
            self._outcome = "committed"
            self._commits += 1
        else:
            self._outcome = "unknown" if self._durable is None else "rolled back"
            self._rollbacks += self._durable is not None

    @staticmethod
    def _held(since: float) -> float:
        return perf_counter() - since

    def held_while_streaming(self) -> float:
        """For how long the current transaction has had its connection since the response began."""
        if self._held_since is None or self._streaming_since is None:
            return 0.0
        return perf_counter() - max(self._held_since, self._streaming_since)

    def finish(self, *, streamed: bool = False, complete: bool = True, dropped: bool = False) -> None:
        """The unit of work has ended: tell the observer."""
        scope, observer = self._scope, self._watcher.observer
        if self.warn_after is not None:
            _thread.serves = True
        self.ends()
        if observer is None or scope is None:
            return
        reason = self._error
        if reason is None and scope._doomed is not None:
            reason = f"doomed: {scope._doomed}"
        elif reason is None and dropped:
            reason = "the body was dropped without close()"
        elif reason is None and not complete:
            reason = "the body was not read to its end"
        elif reason is None and scope._refused:
            reason = "commit_veto"
        method, path = (None, None) if isinstance(scope._name, str) else str(scope).split(" ", 1)
        record = FinishedUnit(
            name=str(scope),
            method=method,
            path=path,
            status=self._status,
            outcome=self._outcome,
            reason=reason,
            attempts=scope.attempt,
            commits=self._commits,
            rollbacks=self._rollbacks,
            statements=self._statements,
            database_seconds=self._database_seconds,
            commit_seconds=self._commit_seconds,
            connection_seconds=self._connection_seconds,
            streaming_connection_seconds=self._streaming_connection_seconds,
            started=self._started,
            seconds=perf_counter() - self._began,
            streamed=streamed,
            complete=complete,
            engine=None if scope.route is None else scope.route.engine,
            engine_reason=None if scope.route is None or scope.route.engine is None else scope.route.reason,
        )
        self._scope = None
        try:
            observer(record)
        except Exception as error:
            warn_of_error(error, "the observer %s failed", callable_name(observer))


class ObservedScope(SessionScope):
    """One attempt at a unit of work that somebody wants to be told of."""

    __slots__ = ("sight",)

    sight: Sight

    def _fail(self, error: BaseException) -> None:
        self.sight.failed(error)
        super()._fail(error)


class ObservedStream(Stream):
    """The body of a response that somebody wants to be told of."""

    __slots__ = ("_dropped", "_sight")

    def __init__(self, scope: SessionScope, body: Any) -> None:
        assert isinstance(scope, ObservedScope)
        self._sight = scope.sight
        self._dropped = False
        super().__init__(scope, body)

    def __iter__(self) -> Iterator[bytes]:
        sight, chunks, threshold = self._sight, super().__iter__(), self._sight.warn_after
        while True:
            try:
                chunk: Any = next(chunks, NOTHING)
            except BaseException as error:
                sight.failed(error)
                raise
            if threshold is not None and sight.held_while_streaming() > threshold:
                _warn_once(
                    _place_of_body(self._body),
                    "%s: the body that comes from %s has kept a connection for more than %s seconds while it streams; "
                    "that one serves nobody else: read what it needs before the response begins, or end the "
                    "transaction in between with Session.commit() or Session.rollback()",
                    *(self._scope, _place_of_body(self._body), threshold),
                )
                threshold = None
            if chunk is NOTHING:
                return
            yield chunk

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._sight.finish(streamed=True, complete=self._complete, dropped=self._dropped)

    def __del__(self) -> None:
        if self.handed_on and not self._closed:
            self._dropped = True
            if self._sight.warn_after is not None:
                place = _place_of_body(self._body)
                _warn_once(
                    f"{place}, dropped",
                    "%s: the body that comes from %s was dropped without a call to its close(), and what it had was "
                    "kept until now: the server, or a middleware around this one, breaks PEP 3333, which demands "
                    "that call",
                    *(self._scope, place),
                )
        super().__del__()


def _place_of_body(body: Any) -> str:
    """Where in the code a body comes from, as far as that can be told."""
    code = getattr(body, "gi_code", None)
    if code is None:
        return type_name(body)
    return f"{code.co_name}() at {code.co_filename}:{code.co_firstlineno}"


# The warnings

#: The places that were told of.  They are places in code, of which there are not many; but code can be made, too.
_told: set[str] = set()
_MOST_PLACES = 1000


def _warn_once(place: str, message: str, *args: object) -> None:
    if place not in _told and len(_told) < _MOST_PLACES:
        _told.add(place)
        log.warning(message, *args)


#: Those who want to be warned where a session is used outside of units of work.
_warning: weakref.WeakSet[Watcher] = weakref.WeakSet()
#: Whether this thread, or greenlet, has served a request of theirs.
_thread = threading.local()


def _warn_of_use_outside(session: Session) -> None:
    """*session* begins a transaction, and is not that of a unit of work."""
    if not hasattr(_thread, "serves"):
        return  # a script, or a thread that removes its session itself
    for registry in {watcher.registry for watcher in _warning}:
        if registry.has() and registry() is session:
            place = _place_of_use(sys._getframe(1))
            _warn_once(
                place,
                "the session is used at %s, on a thread that serves requests and outside of any of them: nobody ends "
                "the transaction, or gives its connection back, which that begins; use session_scope() there",
                place,
            )


def _place_of_use(frame: FrameType | None) -> str:
    """Where in the code of the application that is."""
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_APPLICATION:
        frame = frame.f_back
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


_NOT_THE_APPLICATION = ("sa_wsgi_session", "sqlalchemy")


# The listeners


def _sight() -> Sight | None:
    """That of the innermost unit here that has one."""
    frame = here.get()
    while frame is not None:
        unit = frame.unit
        if unit is not None:
            root = unit.within or unit
            if isinstance(root, ObservedScope):
                return root.sight
        frame = frame.outer
    return None


def _sight_of(session: Session) -> Sight | None:
    """That of the unit here whose session this is."""
    unit = unit_of(session)
    return unit.sight if isinstance(unit, ObservedScope) else None


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    unit = unit_of(session)
    if isinstance(unit, ObservedScope):
        _measure(connection.dialect)
        unit.sight.begins()
    elif unit is None and _warning:
        _warn_of_use_outside(session)


def _after_commit(session: Session) -> None:
    if session.get_nested_transaction() is None:
        sight = _sight_of(session)
        if sight is not None:
            sight.committed()


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        sight = _sight_of(session)
        if sight is not None:
            sight.ends()


_TO_SESSION = Listeners(
    {
        "after_begin": _after_begin,
        "after_commit": _after_commit,
        "after_transaction_end": _after_transaction_end,
    },
    insert=True,
)

_measured: weakref.WeakSet[Any] = weakref.WeakSet()


def _measure(dialect: Any) -> None:
    """From now on measure what the database takes, on the connections of *dialect*."""
    with lock:
        if dialect in _measured:
            return
        _measured.add(dialect)
        for name in "do_execute", "do_executemany", "do_execute_no_params":
            setattr(dialect, name, partial(_execute, getattr(dialect, name)))
        for name in "do_commit", "do_commit_twophase":
            setattr(dialect, name, partial(_commit, getattr(dialect, name)))


#: What begins and ends transactions, and SAVEPOINTs: with most databases the driver does that unseen.
_TRANSACTION_CONTROL = re.compile(r"\s*(?:BEGIN|START|COMMIT|ROLLBACK|SAVEPOINT|RELEASE)\b", re.IGNORECASE)


def _execute(execute: Callable[..., None], cursor: Any, statement: str, *args: Any, **options: Any) -> None:
    sight = _sight()
    if sight is None:
        execute(cursor, statement, *args, **options)
        return
    began = perf_counter()
    try:
        execute(cursor, statement, *args, **options)
    finally:
        sight.statement(perf_counter() - began, counts=not _TRANSACTION_CONTROL.match(statement))


def _commit(commit: Callable[..., None], *args: Any, **options: Any) -> None:
    sight = _sight()
    if sight is None:
        commit(*args, **options)
        return
    began, is_unknown = perf_counter(), False
    try:
        commit(*args, **options)
    except BaseException as error:
        is_unknown = leaves_unknown(error)
        raise
    finally:
        sight.commit(perf_counter() - began, is_unknown=is_unknown)
