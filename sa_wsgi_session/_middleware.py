"""The WSGI middleware: a unit of work for each request.

One request, from above (``SessionMiddleware._attempt``)::

    bind ─▶ call the app ─▶ decide by the status ─▶ settle ─▶ unbind ─▶ callbacks ─▶ forward the
    status to the server ─▶ hand on the body: as it is, or as a ``Stream``

and for a streamed body, around every chunk: bind ─▶ next ─▶ unbind.

Under a ``RetryPolicy`` the upper line may be run through several times (``SessionMiddleware._replay``), as long as it
ends before the status is forwarded.

This file knows WSGI (PEP 3333).  It does not know SQLAlchemy: what to do with the session it says
in the words of the scope: settle, conclude, end.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

from ._binding import (
    ContextBinder,
    Frame,
    ThreadBinder,
    Unit,
    as_scoped_session,
    binder_of,
    here,
    innermost,
    is_here,
    rewind,
    unwind,
)
from ._errors import type_name, warn_of_error, why_unusable
from ._retry import LostRace, RetryPolicy, Trial, check_number, check_retry
from ._scope import SessionScope, State, check_commit_at
from ._watching import listen
from .observers import check_observer

if TYPE_CHECKING:
    from typing import TypeAlias

    from sqlalchemy.orm import Session, scoped_session

    from ._binding import SessionSource
    from ._routing import Route, Router
    from ._sight import Sight, Watcher
    from .observers import Observer
    from .replicas import ReadReplicas

    Environ: TypeAlias = "dict[str, Any]"
    Headers: TypeAlias = "list[tuple[str, str]]"
    StartResponse: TypeAlias = Callable[..., Callable[[bytes], object]]
    # Each framework types what it expects of start_response in its own way, and of what write() returns too.
    Application: TypeAlias = Callable[[Environ, Any], Iterable[bytes]]
    CommitVeto: TypeAlias = Callable[[Environ, str, Headers], object]
    ActivateHook: TypeAlias = Callable[[Environ], object]


def default_commit_veto(environ: Environ, status: str, headers: Headers) -> bool:
    """The veto that is used where none is given: commit only what is no error.

    :return: true (do not commit) unless *status* is 1xx, 2xx or 3xx.
    """
    return not status.startswith(("1", "2", "3"))


def check_warn_after(value: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` where *value* is neither a number of seconds nor ``None``."""
    if value is not None:
        check_number("warn_after", value, "a number of seconds, 0 or more, or None")


class SessionMiddleware:
    """Give every request to a WSGI application a SQLAlchemy session of its own.

    ::

        Session = scoped_session(sessionmaker(engine))
        application = SessionMiddleware(application, Session)

    Inside *app*, ``Session`` then is the session of the request: committed before a success can
    be seen, rolled back if the response is none, alive while the body streams, removed at the end.

    :param app: the WSGI application.
    :param session: the ``scoped_session`` that the application uses, with any registry, or a
        ``sessionmaker``, of which a :func:`contextual_session` is made (:attr:`session`).
    :param commit_veto: called as ``commit_veto(environ, status, headers)`` when the status is
        known; true means: roll back.
    :param commit_at: when a streamed response commits.  ``"start"``: before the status leaves;
        ``"end"``: after the last chunk, in one transaction with the view.
    :param activate_hook: called as ``activate_hook(environ)``; false means: the request passes
        untouched.
    :param retry: how a request is replayed that has lost a race for the database; ``None``: it is not.
    :param replicas: reads go to these; see :class:`~sa_wsgi_session.replicas.ReadReplicas`.  ``None``: there are none.
    :param observer: is called with a :class:`~sa_wsgi_session.observers.FinishedUnit` for each request that has ended.
    :param server_timing: whether responses have a ``Server-Timing`` header, which the developer tools of browsers show:
        for how long the database was busy until the response began, with how many statements, with the commit, and
        how many attempts it took.  Or a callable that is asked ``server_timing(environ)``: what it tells is nobody
        else's business.
    :param warn_after: log a ``WARNING``, once for each place in the code, where a streamed body keeps a connection for
        longer than so many seconds; where the session is used outside of the requests, on a thread that serves them;
        and where a body is dropped without a call to its ``close``.  ``None``: do not.
    :param environ_key: the prefix of the two keys in the environ: ``<environ_key>.scope`` holds
        the :class:`SessionScope`, ``<environ_key>.session`` the scoped session.
    :raises TypeError: if an argument is of the wrong type.
    :raises ValueError: if it has a wrong value, or if *app* is a middleware for another session
        with the same *environ_key*.

    Exceptions of the application, and of the commit, go on to the server.
    """

    __slots__ = (
        "_activate_hook",
        "_app",
        "_binder",
        "_commit_at",
        "_commit_veto",
        "_is_listening",
        "_is_plain",
        "_keep_body",
        "_make_route",
        "_retry",
        "_router",
        "_scope_key",
        "_session_key",
        "_stream",
        "_watcher",
        "session",
    )

    #: The scoped session that the requests are given.
    session: scoped_session[Any]

    def __init__(
        self,
        app: Application,
        session: SessionSource,
        *,
        commit_veto: CommitVeto = default_commit_veto,
        commit_at: str = "start",
        activate_hook: ActivateHook | None = None,
        retry: RetryPolicy | None = None,
        replicas: ReadReplicas | None = None,
        observer: Observer | None = None,
        server_timing: bool | Callable[[Environ], object] = False,
        warn_after: float | None = None,
        environ_key: str = "sa_wsgi_session",
    ) -> None:
        if not callable(app):
            raise TypeError(
                f"app must be a WSGI application, a callable that takes environ and "
                f"start_response, not an object of type {type_name(app)}"
            )
        unusable = why_unusable(commit_veto)
        if unusable:
            raise TypeError(
                f"commit_veto must be a callable that takes environ, status and headers, not {unusable}; one that "
                f"returns False commits always"
            )
        unusable = why_unusable(activate_hook)
        if activate_hook is not None and unusable:
            raise TypeError(f"activate_hook must be a callable that takes the environ, or None, not {unusable}")
        if not isinstance(environ_key, str):
            raise TypeError(f"environ_key must be a str, not an object of type {type_name(environ_key)}")
        if not environ_key:
            raise ValueError(
                f"environ_key must be the beginning of a key in the environ, such as "
                f"'sa_wsgi_session', not {environ_key!r}"
            )
        self._app = app
        self.session = as_scoped_session(session)
        self._binder = binder_of(self.session)
        self._commit_veto = commit_veto
        self._commit_at = check_commit_at(commit_at)
        self._activate_hook = activate_hook
        self._retry = check_retry(retry)
        self._scope_key = f"{environ_key}.scope"
        self._session_key = f"{environ_key}.session"
        if (
            isinstance(app, SessionMiddleware)
            and app._scope_key == self._scope_key
            and app._binder.key is not self._binder.key
        ):
            raise ValueError(
                f"app is a SessionMiddleware for another session with the same "
                f"environ_key={environ_key!r}, so neither could be told from the other in the "
                f"environ: give one of them another environ_key"
            )
        self._router: Router | None = None
        if replicas is not None:
            from ._routing import Route
            from .replicas import check_replicas

            self._make_route = Route
            self._router = check_replicas(replicas)._attach(self._binder.factory)
        self._is_listening = listen(self._binder, trials=retry is not None or replicas is not None)
        if retry is not None or replicas is not None:
            from ._request_body import RequestBody

            self._keep_body = RequestBody
        check_observer(observer)
        unusable = why_unusable(server_timing)
        if not isinstance(server_timing, bool) and unusable:
            raise TypeError(f"server_timing must be True, False or a callable that takes the environ, not {unusable}")
        check_warn_after(warn_after)
        self._watcher: Watcher | None = None
        if observer is not None or server_timing is not False or warn_after is not None:
            from ._sight import ObservedStream, Watcher

            self._watcher = Watcher(self._binder, observer, server_timing, warn_after)
            self._stream: type[Stream] = ObservedStream
        self._is_plain = retry is None and self._watcher is None and replicas is None

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if self._activate_hook is not None and not self._activate_hook(environ):
            return self._app(environ, start_response)
        outer = environ.get(self._scope_key)
        if outer is not None and self._is_running(outer):
            return self._join(outer, environ, start_response)
        if self._is_plain:
            return self._attempt(environ, start_response)
        if self._watcher is not None:
            return self._observe(environ, start_response, self._watcher)
        return self._replay(environ, start_response)

    def _is_running(self, outer: object) -> bool:
        return isinstance(outer, SessionScope) and outer.binder.key is self._binder.key and is_here(outer)

    def _join(self, outer: SessionScope, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """A part of the request that *outer* is: wrapped twice, or a copy of its environ."""
        made_file = _find_file_wrapper(environ)
        try:
            body = self._app(environ, start_response)
        except BaseException as error:
            self._spoil(outer, error)
            raise
        if type(body) is list or type(body) is tuple or (made_file is not None and made_file(body)):
            return body
        return _JoinedBody(body, partial(self._spoil, outer))

    def _spoil(self, outer: SessionScope, error: BaseException) -> None:
        """*error* escapes from a part that has joined *outer*."""
        # A body may outlive the unit of work that it has joined.
        if self._is_running(outer):
            # The innermost: a SAVEPOINT within it, perhaps.
            cast(SessionScope, innermost(self._binder.key))._spoil(error, "a part that had joined it has failed")

    def _observe(self, environ: Environ, start_response: StartResponse, watcher: Watcher) -> Iterable[bytes]:
        """See what becomes of the request."""
        sight, start_response = watcher.request(environ, start_response)
        try:
            body = self._replay(environ, start_response, sight)
        except BaseException as error:
            sight.failed(error)
            sight.finish()
            raise
        if not isinstance(body, Stream):
            sight.finish()
        return body

    def _replay(self, environ: Environ, start_response: StartResponse, sight: Sight | None = None) -> Iterable[bytes]:
        """Attempts at the request, as long as they lose races and the policy, if there is one, allows another one."""
        policy = self._retry
        route: Route | None = None
        if self._router is not None:
            route = self._make_route(self._router, environ, start_response)
            start_response = route.start_response
            if policy is None and route.may_read:
                policy = _NO_POLICY
        if policy is None:
            return self._attempt(environ, start_response, None, sight, route)
        if not self._is_listening:
            # The session was bound since, perhaps.
            self._is_listening = listen(self._binder, trials=True)
        body = self._keep_body(environ, policy.max_body) if _may_have_body(environ) else None
        # From here on, not while a slow client sends.
        trial = Trial(policy)
        if body is not None:
            trial.rewind = body.rewind
        as_it_was = environ.copy()
        while True:
            try:
                return self._attempt(environ, start_response, trial, sight, route)
            except Exception:
                # Once more, because code of the application has run since: the close() of its body.
                if not (trial.again and trial.rewind()):
                    raise
            # Out here: what comes up in the next attempt does not come of this exception.
            trial = trial.next()
            environ.clear()
            environ.update(as_it_was)

    def _attempt(
        self,
        environ: Environ,
        start_response: StartResponse,
        trial: Trial | None = None,
        sight: Sight | None = None,
        route: Route | None = None,
    ) -> Iterable[bytes]:
        binder = self._binder
        if route is None:
            make_scope: Callable[..., SessionScope] = SessionScope if sight is None else sight.scope
        else:
            make_scope = route.attempt(sight, trial)
        scope = make_scope(
            binder,
            (environ.get("REQUEST_METHOD", "?"), environ.get("PATH_INFO", "")),
            self._commit_at,
        )
        if route is not None:
            cast(Any, scope).route = route
        if trial is None:
            scope.watching = True
        else:
            scope._try(trial)
        environ[self._scope_key] = scope
        environ[self._session_key] = self.session
        response = _Response(scope, self._commit_veto, environ, start_response)
        made_file = _find_file_wrapper(environ)
        body: Any = None
        stream: Stream | None = None
        binder.enter(scope)
        try:
            body = self._app(environ, response.start)
            if type(body) is list or type(body) is tuple:
                for chunk in body:
                    if type(chunk) is not bytes:
                        _check_chunk(chunk)
            elif made_file is None or not made_file(body):
                stream = (Stream if sight is None else self._stream)(scope, body)
                if response.status is None:
                    # A generator application calls start_response on its first next().
                    stream.pull()
            response.decide()
            if trial is not None and (
                trial.elsewhere is not None or (response.status is not None and response.status[0] == "5")
            ):
                response.check()
            if stream is None:
                # No code of the application can run any more.
                scope._end()
            else:
                if not response.forwarded:
                    scope._settle(body_is_over=stream.is_over)
                if scope.frame.covered:
                    stream.inside = unwind(scope.frame)
                binder.pause(scope)
                if scope.callbacks is not None:
                    scope._run_callbacks()
            response.forward()
        except BaseException as error:
            _abort(scope, body, error, [] if stream is None else stream.inside)
            raise
        finally:
            response.over()
        if stream is None:
            return body  # type: ignore[no-any-return]
        stream.handed_on = True
        return stream


#: For what is replayed where there is no policy: on another engine.
_NO_POLICY = RetryPolicy(attempts=1)


def _may_have_body(environ: Environ) -> bool:
    if "HTTP_TRANSFER_ENCODING" in environ:
        return True
    length = environ.get("CONTENT_LENGTH")
    if length:
        return bool(length != "0")
    # Without a length it ends where the server says so; but some servers say so of every request.
    return environ.get("wsgi.input_terminated", False) and environ.get("REQUEST_METHOD") not in _WITHOUT_BODY


_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


def _abort(scope: SessionScope, body: object, error: BaseException, inside: list[Unit]) -> None:
    """Roll back and remove; *body* reaches no server, so it is closed here.

    *error*, which brought us here, stays the one that is raised.

    :param inside: the units that the body has left open, if they were unbound already.
    """
    with scope._first_error_stays():
        if scope._state is State.ENDED:
            _close(body)
            return
        if not scope._is_bound:
            scope.bind()
        scope._fail(error)
        # At once, as in the middle of a stream: nothing is locked any more, and close() finds a session that works.
        inside = scope._unwind() or inside
        with scope._first_error_stays():
            scope._conclude()
        rewind(inside)
        with scope._first_error_stays():
            _close(body)
        scope._end()


def _close(body: object) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()


# What the application says: start_response and write()

#: In ISO-8859-1, as PEP 3333 demands of all its strings (A Note On String Types): no server can send another one.
_STATUS = re.compile(r"[1-9][0-9]{2}(?: [\x20-\x7e\x80-\xff]*)?")


@lru_cache(maxsize=64)
def _is_status(status: str) -> bool:
    return _STATUS.fullmatch(status) is not None


def _check_status(status: object) -> None:
    if not isinstance(status, str):
        raise TypeError(
            f"start_response was called with a status of type {type_name(status)}: PEP 3333 "
            f'demands a str such as "200 OK" (The start_response() Callable)'
        )
    if not _is_status(status):
        raise ValueError(
            f'start_response was called with the status {status[:100]!r}: PEP 3333 demands "a '
            f"status string of the form '999 Message here'\", in ISO-8859-1 and without control "
            f"characters (The start_response() Callable)"
        )


def _check_chunk(chunk: object) -> None:
    if isinstance(chunk, str):
        raise TypeError(
            "the body has a chunk of type str: PEP 3333 demands bytes (A Note On String Types); "
            "encode it, for example with .encode('utf-8')"
        )


class _Response:
    """What the application has said about its response, kept until it may be forwarded."""

    __slots__ = (
        "_answered",
        "_environ",
        "_error",
        "_exc_info",
        "_headers",
        "_keeps_errors",
        "_scope",
        "_start_response",
        "_veto",
        "_write",
        "forwarded",
        "status",
    )

    def __init__(self, scope: SessionScope, veto: CommitVeto, environ: Environ, start_response: StartResponse) -> None:
        self._scope = scope
        self._veto = veto
        self._environ = environ
        self._start_response = start_response
        self.status: str | None = None
        self._headers: Headers = []
        self._exc_info: Any = None
        #: What the application did wrong, or what failed while it wrote: it may have swallowed it.
        self._error: BaseException | None = None
        self._keeps_errors = True
        #: Whether it has answered that with a status since (its own error page).
        self._answered = False
        #: Whether the status was forwarded to the server.
        self.forwarded = False
        #: The server's own ``write`` from then on.  (Some servers return ``None`` instead, as long as nobody asks.)
        self._write: Callable[[bytes], object] | None = None

    def start(self, status: str, headers: Headers, exc_info: Any = None) -> Callable[[bytes], object]:
        """The ``start_response`` that the application is given."""
        try:
            if exc_info is None and (self.status is not None or self._error is not None):
                raise RuntimeError(
                    "start_response was called a second time without exc_info, which PEP 3333 "
                    "calls a fatal error (The start_response() Callable)"
                )
            _check_status(status)
            if self.forwarded:
                # The server refuses by raising exc_info if the first byte has left. Else this status decides.
                self._write = self._start_response(status, headers, exc_info)
                if self._veto(self._environ, status, headers):
                    self._scope._refuse()
            else:
                self.status, self._headers, self._exc_info = status, headers, exc_info
                self._answered = self._error is not None
        except BaseException as error:
            if self.forwarded:
                # What was done since may not be kept, and the client not be told that it was.
                if self._scope._is_bound:
                    self._scope._spoil(error, "start_response has failed after the response had begun")
                else:
                    self._scope._refuse()
            elif self._keeps_errors:
                self._error = error
            raise
        finally:
            exc_info = None  # the traceback refers to frames that refer to it
        return self.write

    def decide(self) -> None:
        """Refuse the commit where the status, or the veto, demands it."""
        if self._error is not None and not self._answered:
            self._raise_error()
        if self.status is None:
            raise RuntimeError(
                "the application has returned its body without calling start_response: PEP 3333 "
                "demands that it is called before the first chunk (The start_response() Callable)"
            )
        if not self.forwarded and self._veto(self._environ, self.status, self._headers):
            self._scope._refuse()
            self._error = None  # this status tells of it
        elif self._error is not None:
            self._raise_error()

    def check(self) -> None:
        """Leave an attempt whose error page tells of a lost race, if another one follows."""
        scope = self._scope
        if scope.trial is not None and scope.trial.answered(scope):
            raise LostRace(
                f"{scope} has answered {self.status!r} because of a lost race, and then committed something, or closed "
                f"wsgi.input, in the close() of its response or in a listener, so that it cannot be replayed"
            )

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        assert error is not None
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame, which must not refer to it

    def over(self) -> None:
        """The call of the application is over: its errors are the server's business from now on."""
        self._error = None
        self._keeps_errors = False

    def forward(self) -> None:
        """Tell the server, which may tell the client from now on."""
        if not self.forwarded:
            exc_info, self._exc_info = self._exc_info, None
            assert self.status is not None
            # Also where the server refuses it: nothing is to be settled, or told, once more.
            self.forwarded = True
            if exc_info is None:
                self._write = self._start_response(self.status, self._headers)
            else:
                try:
                    self._write = self._start_response(self.status, self._headers, exc_info)
                finally:
                    exc_info = None

    def _write_to_server(self, data: bytes) -> None:
        if self._write is None:
            raise RuntimeError(
                "write() cannot be forwarded: the server's start_response has raised an exception, or has returned "
                "None, where PEP 3333 demands a write(body_data) callable (The write() Callable)"
            )
        self._write(data)

    def write(self, data: bytes) -> None:
        """The legacy ``write`` that the application is given: settles before the first byte."""
        scope = self._scope
        try:
            if not isinstance(data, bytes):
                raise TypeError(
                    f"write() was called with data of type {type_name(data)}: PEP 3333 demands "
                    f"bytes (The write() Callable)"
                )
            if not scope._is_bound:
                # The server, or whoever was handed write(), calls it between our calls.
                if not self.forwarded:
                    raise RuntimeError(
                        "write() was called before the application had returned, but outside of "
                        "its call: PEP 3333 demands the contrary (The write() Callable)"
                    )
                self._write_to_server(data)
                return
            inside = scope._unwind()
            try:
                if not self.forwarded:
                    self.decide()
                    scope._settle()
                scope.unbind()
                try:
                    scope._run_callbacks()
                    self.forward()
                    self._write_to_server(data)
                finally:
                    scope.bind()
            finally:
                rewind(inside)
        except BaseException as error:
            scope._refuse()
            if self._keeps_errors:
                self._error, self._answered = error, False
            raise


def _find_file_wrapper(environ: Environ) -> Callable[[object], bool] | None:
    """How to tell what the server's ``wsgi.file_wrapper`` made, if it has one."""
    wrapper = environ.get("wsgi.file_wrapper")
    if wrapper is None:
        return None
    if isinstance(wrapper, type):
        # Not a subclass of the application's own, which may run any code.
        return lambda body: type(body) is wrapper
    # A function, as uWSGI's and mod_wsgi's are, says nothing about what it returns (uWSGI's
    # returns the file itself): it has to be seen returning it.
    made: list[object] = []

    def file_wrapper(*args: Any) -> Any:
        made.append(wrapper(*args))
        return made[-1]

    environ["wsgi.file_wrapper"] = file_wrapper
    return lambda body: any(body is known for known in made)


# The body

NOTHING = object()
#: Where generators come from, and other iterators of which __iter__() returns them and does nothing else.
_ITERATE_THEMSELVES = ("builtins", "itertools")


class _JoinedBody:
    """The body of a part that has joined the request around it: handed through, but what it raises is told."""

    __slots__ = ("_body", "_raises")

    def __init__(self, body: Any, raises: Callable[[BaseException], None]) -> None:
        self._body = body
        self._raises = raises

    def __iter__(self) -> Iterator[bytes]:
        # Not "yield from", which would close the body where the server only drops this.
        iterator = iter(self._body)
        while True:
            try:
                chunk = next(iterator, None)
            except BaseException as error:
                self._raises(error)
                raise
            if chunk is None:
                return
            yield chunk

    def close(self) -> None:
        try:
            _close(self._body)
        except BaseException as error:
            self._raises(error)
            raise


class Stream:
    """A body that is streamed: binds the scope around every ``next`` and around ``close``."""

    __slots__ = (
        "__weakref__",
        "_body",
        "_closed",
        "_complete",
        "_first",
        "_iterator",
        "_scope",
        "handed_on",
        "inside",
        "is_over",
    )

    def __init__(self, scope: SessionScope, body: Any) -> None:
        self.handed_on = False
        #: Whether it is known to have no chunk.
        self.is_over = False
        self._closed = False
        self._complete = False
        self._first: Any = NOTHING
        #: The units that the body has left open over a chunk, innermost first.
        self.inside: list[Unit] = []
        self._scope = scope
        self._body = body
        if isinstance(body, (str, bytes, bytearray)) or not (hasattr(body, "__iter__") or hasattr(body, "__getitem__")):
            raise TypeError(
                f"the application has returned a body of type {type_name(body)}: PEP 3333 demands "
                f"an iterable that yields bytes, such as [b'...'] (Specification Overview)"
            )
        iterator = iter(body)
        if type(iterator).__module__ not in _ITERATE_THEMSELVES:
            # "for" asks it once more for an iterator: it may do anything then.
            iterator = iter(iterator.__next__, NOTHING)
        self._iterator: Iterator[bytes] = iterator

    def pull(self) -> None:
        """Pull the first chunk, for what the application does on the way to it."""
        self._first = next(self._iterator, NOTHING)
        if self._first is NOTHING:
            self.is_over = True
        else:
            _check_chunk(self._first)

    def __iter__(self) -> Iterator[bytes]:
        # A generator, because the server then resumes it without a call in between; and a new one
        # each time, because one kept in an attribute would be a reference cycle.
        #
        # Binding is written out here, for the two kinds of registry that are worth it: calling
        # bind() and unbind() would double the cost of a chunk. And "for" resumes a generator of
        # the application faster than next().
        first, self._first = self._first, NOTHING
        if first is not NOTHING and not self._closed:
            yield first
        if self._closed:
            return
        scope = self._scope
        binder = scope.binder
        local = binder.local if isinstance(binder, ThreadBinder) else None
        direct = local is not None or isinstance(binder, ContextBinder)
        get_here = here.get
        binder.enter(scope)
        if self.inside:
            rewind(self.inside)
        # Where it is bound, and for a thread-local registry the values of that thread.
        frame = scope.frame
        values: dict[str, Any] = {} if local is None else local.__dict__
        # The session that was bound here before, should another thread close the body while the application is at work.
        aside = scope.set_aside
        runs = True
        try:
            for chunk in self._iterator:
                if type(chunk) is not bytes:
                    _check_chunk(chunk)
                if self._closed:  # by another thread, in the meantime
                    break  # type: ignore[unreachable]
                frame = scope.frame  # another one, if the application has called write()
                if frame.covered:
                    self.inside = unwind(frame)
                if direct:
                    frame.unit = None
                    if local is not None:
                        scope.held = values.pop("value", None) if values else None
                        if scope.set_aside is not None:
                            values["value"] = scope.set_aside
                            scope.set_aside = aside = None
                else:
                    binder.pause(scope)
                runs = False
                if scope.callbacks is not None:
                    scope._run_callbacks()
                yield chunk
                if self._closed:
                    return  # type: ignore[unreachable]
                if not direct:
                    binder.enter(scope)
                    frame, aside = scope.frame, scope.set_aside
                elif get_here() is frame and (local is None or local.__dict__ is values):
                    frame.unit = scope
                    if local is not None:
                        if values:
                            scope.set_aside = aside = values.pop("value", None)
                        if scope.held is not None:
                            values["value"] = scope.held
                else:
                    # The first one in this thread or context.
                    binder.enter(scope)
                    frame, aside = scope.frame, scope.set_aside
                    if local is not None:
                        values = local.__dict__
                runs = True
                if self.inside:
                    rewind(self.inside)
        except BaseException:
            if runs:
                scope._refuse()
                with scope._first_error_stays():
                    self._finish(frame, aside)
            raise
        self._finish(frame, aside)

    def _finish(self, frame: Frame, aside: Session | None) -> None:
        """The application has no more chunks, or failed: conclude, while the client waits."""
        scope = self._scope
        if self._closed:
            # By another thread, while the application was at work in this one, which still has the session.
            scope.frame, scope.set_aside = frame, aside
            scope._refuse()
            scope._end()
            return
        if scope.frame.covered:
            self.inside = unwind(scope.frame)
        try:
            scope._conclude()
            self._complete = not scope._refused
        except BaseException:
            scope.binder.pause(scope)
            with scope._first_error_stays():
                scope._run_callbacks()
            raise
        scope.binder.pause(scope)
        if scope.callbacks is not None:
            scope._run_callbacks()

    def close(self) -> None:
        """Call the application's ``close``, conclude what is left, remove the session."""
        if self._closed:
            return
        self._closed = True
        scope = self._scope
        if not self._complete:
            scope._refuse()  # the client went away, or something failed
        scope.binder.enter(scope)
        if self.inside:
            rewind(self.inside)
        try:
            _close(self._body)
        except BaseException as error:
            scope._end_after_error(error)
            raise
        scope._end()

    def __del__(self) -> None:
        if not self.handed_on or self._closed:
            return
        try:
            warnings.warn(
                f"{self._scope}: the body was dropped without a call to its close(), which "
                f"PEP 3333 demands of the server and of every middleware; its session is "
                f"removed now",
                ResourceWarning,
                stacklevel=1,
                source=self,
            )
        finally:
            try:
                self._scope._forget_what_is_gone()
                self.close()
            except BaseException as error:
                warn_of_error(error, "%s: closing the dropped body failed", self._scope)
