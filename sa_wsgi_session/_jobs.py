"""The unit of work outside of requests: scheduled jobs, threads, scripts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from ._binding import binder_of, innermost
from ._errors import NoActiveScope, callable_name, shown, type_name
from ._retry import RetryPolicy, Trial, check_retry
from ._scope import SessionScope, State
from ._watching import listen
from .observers import check_observer

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy.orm import Session

    from ._binding import Binder, SessionSource
    from ._sight import Sight, Watcher
    from .observers import Observer

_P = ParamSpec("_P")
_R = TypeVar("_R")

PROPAGATION = ("required", "nested", "requires_new")


class session_scope:
    """A unit of work for code outside of requests: a context manager that yields the ``Session``.

    It commits when the block ends, rolls back when an exception leaves it, and removes the
    session in any case::

        with session_scope(Session) as session:
            session.add(Reading(value=21.5))

    :param session: the ``scoped_session`` that the application uses, with any registry, or a
        ``sessionmaker``.  Inside the block it yields the session of the block.
    :param propagation: what happens inside an active unit of work of the same session, in the
        terms of the Spring framework:

        ``"required"``
            joins it: there is one transaction, and the outer block commits.  If an exception
            escapes from this part, the whole can only be rolled back.
        ``"nested"``
            is a ``SAVEPOINT`` in it, which an exception rolls back alone.
        ``"requires_new"``
            is independent of it, with a session and a connection of its own.

        Outside of one, all three begin a unit of work.

    :param name: what the unit of work is called, in the log and by *observer*.
    :param observer: is called with a :class:`~sa_wsgi_session.observers.FinishedUnit` when the unit of work has ended.
        What joins another one, or is ``"nested"`` in it, belongs to that one.
    :raises TypeError: if *session* is neither; if *name* or *observer* is of the wrong type.
    :raises ValueError: if *propagation* is none of the three.
    :raises RollbackOnlyError: at the end of the block, if it can only be rolled back.

    The commit does not expire objects: what the block has loaded can be read after it.
    """

    __slots__ = ("_binder", "_name", "_propagation", "_scope", "_session", "_sight", "_trial", "_watcher", "_within")

    def __init__(
        self,
        session: SessionSource,
        *,
        propagation: Literal["required", "nested", "requires_new"] = "required",
        name: str = "session_scope()",
        observer: Observer | None = None,
    ) -> None:
        self._binder = binder_of(session)
        self._propagation = check_propagation(propagation)
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not an object of type {type_name(name)}")
        self._name = name
        self._watcher = _watcher(self._binder, observer)
        #: What is seen of the block, if somebody wants to be told of it.
        self._sight: Sight | None = None
        #: Which attempt at the block this is, if there may be several.
        self._trial: Trial | None = None
        self._scope: SessionScope | None = None
        #: The unit that this block has joined, and its session.
        self._within: SessionScope | None = None
        self._session: Session | None = None

    def __enter__(self) -> Session:
        if self._scope is not None or self._within is not None:
            raise RuntimeError("this session_scope() is in use already: call session_scope() for each block")
        binder = self._binder
        around = innermost(binder.key)
        assert around is None or isinstance(around, SessionScope)
        if around is not None and self._propagation == "required":
            self._session = around.session
            self._within = around
            return self._session
        if around is not None and self._propagation == "nested":
            scope = SessionScope(binder, self._name, within=around._root)
        else:
            if self._watcher is not None:
                self._sight = self._watcher.job()
            scope = (SessionScope if self._sight is None else self._sight.scope)(binder, self._name)
            if self._trial is not None:
                scope._try(self._trial)
            listen(binder, trials=self._trial is not None)
        scope.bind()
        try:
            if scope.within is not None:
                scope._begin_savepoint()
            session = scope.session
        except BaseException as error:
            scope._end_after_error(error)
            self._tell()
            raise
        self._scope = scope
        return session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        within, scope = self._within, self._scope
        self._within = self._scope = None
        if within is not None:
            self._leave(within, error)
            return
        assert scope is not None
        if not scope._is_bound:  # a generator's block, which outlives the unit around it
            scope._root._forget_what_is_gone()
            scope.bind()
        try:
            if error is None:
                scope._end()
            else:
                scope._end_after_error(error)
        finally:
            self._tell()

    def _tell(self) -> None:
        """The unit of work of this block, if it is one of its own, has ended."""
        if self._watcher is not None and self._sight is not None:
            self._sight.finish()

    def _leave(self, within: SessionScope, error: BaseException | None) -> None:
        """Leave a unit that this block has joined; others end it, or have done so."""
        session, self._session = self._session, None
        if within._state is not State.ENDED:
            if error is not None:
                within._spoil(error, "a part that had joined it has failed")
            return
        assert session is not None
        # It was removed, but whoever used it since has begun anew, and nobody else will end that.
        session.close()
        if error is None:
            raise NoActiveScope(
                f"the unit of work {within}, which this session_scope() had joined, ended before the block did; what "
                f'the block has done since is not committed: use propagation="requires_new" in a thread, task or '
                f"generator that may outlive the unit of work that it was started in"
            )


def with_session(
    session: SessionSource,
    *,
    argument: str = "session",
    propagation: Literal["required", "nested", "requires_new"] = "required",
    retry: RetryPolicy | None = None,
    observer: Observer | None = None,
) -> Callable[[Callable[_P, _R]], Callable[..., _R]]:
    """Run the decorated function in a :class:`session_scope` and pass it the session.

    ::

        @with_session(Session)
        def purge(days, *, session):
            session.execute(delete(Log).where(Log.age > days))

        scheduler.every().hour.do(purge, 30)

    :param session: as for :class:`session_scope`.
    :param argument: the name of the keyword argument that receives the ``Session``.
    :param propagation: as for :class:`session_scope`.
    :param retry: how the function is replayed, with the same arguments, when it has lost a race for the database;
        ``None``: it is not.  Within an active unit of work it is not either, unless *propagation* is
        ``"requires_new"``: the whole of that has to be replayed.
    :param observer: as for :class:`session_scope`.
    :raises TypeError: at once, if *session* is neither a ``scoped_session`` nor a
        ``sessionmaker``, if the function does not take the argument, or if calling it only makes
        a coroutine or a generator, whose body would run when the unit of work is over.
    :raises ValueError: at once, if *propagation* is none of the three, or *argument* cannot be
        the name of an argument.
    """
    binder = binder_of(session)
    check_propagation(propagation)
    listen(binder, trials=check_retry(retry) is not None)
    watcher = _watcher(binder, observer)
    if not isinstance(argument, str):
        raise TypeError(f"argument must be a str, not an object of type {type_name(argument)}")
    if not argument.isidentifier():
        raise ValueError(f"argument must be the name of a keyword argument, not {argument!r}")

    def decorate(function: Callable[_P, _R]) -> Callable[..., _R]:
        _check_function(function, argument)
        name = callable_name(function)

        @wraps(function)
        def in_scope(*args: Any, **kwargs: Any) -> _R:
            if (retry is None and watcher is None) or (
                propagation != "requires_new" and innermost(binder.key) is not None
            ):
                return attempt(None, None, args, kwargs)
            sight = None if watcher is None else watcher.job()
            try:
                return in_attempts(sight, args, kwargs)
            finally:
                if sight is not None:
                    sight.finish()

        def in_attempts(sight: Sight | None, args: Any, kwargs: Any) -> _R:
            if retry is None:
                return attempt(None, sight, args, kwargs)
            trial = Trial(retry)
            while True:
                try:
                    return attempt(trial, sight, args, kwargs)
                except Exception:
                    if not trial.again:
                        raise
                # Out here: what comes up in the next attempt does not come of this exception.
                trial = trial.next()

        def attempt(trial: Trial | None, sight: Sight | None, args: Any, kwargs: Any) -> _R:
            unit = session_scope(session, propagation=propagation, name=name)
            unit._trial, unit._sight = trial, sight
            with unit as given:
                return function(*args, **kwargs, **{argument: given})  # type: ignore[arg-type]

        return in_scope

    return decorate


def _watcher(binder: Binder, observer: Observer | None) -> Watcher | None:
    check_observer(observer)
    if observer is None:
        return None
    from ._sight import Watcher

    return Watcher(binder, observer)


def check_propagation(value: object) -> str:
    if isinstance(value, str) and value in PROPAGATION:
        return value
    raise ValueError(f'propagation must be "required", "nested" or "requires_new", not {shown(value)}')


def _check_function(function: Callable[..., object], argument: str) -> None:
    if not callable(function):
        raise TypeError(f"with_session(...) decorates a function, not an object of type {type_name(function)}")
    name = callable_name(function)
    if any(
        inspect.iscoroutinefunction(called) or inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called)
        for called in (function, type(function).__call__)
    ):
        raise TypeError(
            f"with_session(...) cannot decorate {name}: calling a coroutine or generator function "
            f"runs none of it, so its unit of work would be over before it begins; "
            f"use session_scope() inside it"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return  # some callables written in C have no signature to check
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD or (
            parameter.name == argument and parameter.kind is not parameter.POSITIONAL_ONLY
        ):
            return
    raise TypeError(
        f"with_session(...) passes the session as {argument}=, which {name} does not take: "
        f"add that argument, or name another with with_session(..., argument=...)"
    )
