"""The unit of work: one session, from its first use to its removal.

Its life::

              _settle()                       _end()
    OPEN ───────────────────▶ SETTLED ───────────────────▶ ENDED
      │    a response begins            the body is closed    ▲
      └───────────────────────────────────────────────────────┘
                             _end()
              a job, or a response without a streamed body

* OPEN: code of the application runs and nothing is decided.
* SETTLED (only a response that streams): the status is known.  What was done so far has been
  committed or rolled back, or waits for the end of the body (``commit_at="end"``, or because a
  result is still open).  What the body does is a second transaction, which ``_conclude()`` commits
  once the body was read to its end.
* ENDED: the session is removed and its connection is back in the pool.

In OPEN and SETTLED the unit is bound or not (see ``_binding``); every method here but
``_run_callbacks()`` is called while it is bound.  Three facts can turn a commit into a rollback,
from whichever state:

* *refused*: the veto said no, an exception passed, or the client did not read to the end;
* *doomed*: the application said so, and expects no error for it;
* *rollback-only*: a part that had joined failed, and the application went on regardless.  That is
  an error, also where the application itself commits, unless it has rolled back since.

This file knows SQLAlchemy.  It does not know HTTP: a request is a name to log.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, cast
from urllib.parse import quote

from sqlalchemy.orm import Session

from ._binding import NOWHERE, Binder, Unit, binder_of, innermost, is_here, unwind
from ._callbacks import Callbacks
from ._errors import NoActiveScope, RollbackOnlyError, log, shown, type_name, warn_of_error
from ._transient import classify
from ._watching import Watched, is_aborted, is_open, trials

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import SessionTransaction

    from ._binding import SessionSource
    from ._retry import Trial

COMMIT_AT = ("start", "end")


def check_commit_at(value: object) -> str:
    """Return *value*, or raise ``ValueError`` where it is no moment to commit at."""
    if isinstance(value, str) and value in COMMIT_AT:
        return value
    raise ValueError(f'commit_at must be "start" or "end", not {shown(value)}')


class State(Enum):
    OPEN = "open"
    SETTLED = "settled"
    ENDED = "ended"


class SessionScope(Watched):
    """One unit of work: a request, or a :func:`session_scope`.

    The application gets it from :func:`current_scope`, or from
    ``environ["sa_wsgi_session.scope"]``, and does not make it.
    """

    __slots__ = (
        "__weakref__",
        "_commit_at",
        "_doomed",
        "_name",
        "_parts",
        "_refused",
        "_rollback_only",
        "_savepoint",
        "_state",
        "attempt",
    )

    within: SessionScope | None
    #: Which attempt at this unit of work this is: 1, 2, …
    attempt: int

    def __init__(
        self,
        binder: Binder,
        name: str | tuple[object, object],
        commit_at: str = "start",
        *,
        within: SessionScope | None = None,
    ) -> None:
        # The state of the bases, too: this runs for every request, and a chain of three calls would double its cost.
        self.binder = binder
        self.within = within
        self.held = None
        self.set_aside = None
        self.frame = NOWHERE
        self.connections = ()
        self.watching = False
        self.watch = None
        self.callbacks = None
        self.trial = None
        self.attempt = 1 if within is None else within.attempt
        self._name = name
        self._commit_at = commit_at
        self._state = State.OPEN
        self._refused = False
        self._doomed: str | None = None
        self._rollback_only: tuple[SessionTransaction | None, BaseException, str] | None = None
        self._savepoint: SessionTransaction | None = None
        #: Those that are SAVEPOINTs, and open.
        self._parts: tuple[SessionScope, ...] = ()

    # What the application uses

    @property
    def session(self) -> Session:
        """The :class:`~sqlalchemy.orm.Session` of this unit of work; made on first use.

        :raises NoActiveScope: where the unit of work is not bound: after it has ended, between
            the chunks of its body, on a thread that does not share it.
        """
        self._check_running("session")
        if not is_here(self):
            raise NoActiveScope(
                f"the unit of work {self} is not running here (or its session belongs to another thread), so it has "
                f"no session to give: use session_scope() for work outside of it"
            )
        return self.binder.session(self)

    @property
    def commit_at(self) -> str:
        """When a streamed response commits: ``"start"`` or ``"end"``.

        May be set, for this request alone, until the response begins.

        :raises ValueError: if set to anything else.
        :raises RuntimeError: if set when the response has begun.
        """
        root = self._root
        return root._commit_at

    @commit_at.setter
    def commit_at(self, value: str) -> None:
        root = self._root
        if root._state is not State.OPEN:
            raise RuntimeError(
                f"commit_at of {self} was set to {value!r} after its response had begun: set it before the view returns"
            )
        root._commit_at = check_commit_at(value)

    def doom(self, reason: str) -> None:
        """Roll this unit of work back at its end, without an error: a dry run.

        :param reason: why, for the log.
        :raises NoActiveScope: if the unit of work has ended.

        In a ``"nested"`` part only the ``SAVEPOINT`` is rolled back.
        """
        self._check_running("doom()")
        self._doomed = reason

    def use_primary(self) -> None:
        """Have this request use the primary, although it might read from a replica; to be called before it reads.

        :raises RuntimeError: if a statement was sent to a replica before.
        :raises NoActiveScope: if the unit of work has ended.

        Where there are no replicas, and in a unit of work that does not use any, it does nothing.
        """
        self._check_running("use_primary()")
        if self.within is not None:
            self.within.use_primary()

    def on_commit(self, callback: Callable[[], object]) -> None:
        """Call *callback* when what is done in the present transaction is durable.

        :param callback: is called without arguments, after the commit, before the response
            leaves, with no session bound: work of its own on the database needs a
            :func:`session_scope`.  An exception that it raises is logged and has no other effect.
        :raises TypeError: if *callback* cannot be called.
        :raises NoActiveScope: if the unit of work has ended.

        Dropped when the transaction, or the ``SAVEPOINT`` in which it was registered, is rolled
        back.
        """
        self._add_callback("on_commit()", callback, on_commit=True)

    def on_rollback(self, callback: Callable[[], object]) -> None:
        """Call *callback* when what is done in the present transaction was rolled back.

        Otherwise like :meth:`on_commit`.
        """
        self._add_callback("on_rollback()", callback, on_commit=False)

    def __str__(self) -> str:
        """The request or the job, in a form that is safe to log."""
        if isinstance(self._name, str):
            return self._name
        # Both are the client's choice: quoted, so that they can't forge a line, and cut.  A server might let anything
        # through, hence str().
        method, path = (quote(str(part)[:200], encoding="latin-1", errors="replace") for part in self._name)
        return f"{method} {path}"

    def __repr__(self) -> str:
        return f"<SessionScope {self}, {self._state.value}>"

    # What the two front doors use: the life of the unit

    @property
    def _root(self) -> SessionScope:
        """The unit of work that owns the session: this one, unless it is a SAVEPOINT."""
        return self.within or self

    @property
    def _is_bound(self) -> bool:
        return self.frame.unit is self

    def _unwind(self) -> list[Unit]:
        """Unbind what code has left open within this unit, which is bound; see :func:`unwind`."""
        return unwind(self.frame) if self.frame.covered else []

    def _refuse(self) -> None:
        """From now on nothing of this unit may be committed."""
        self._refused = True

    def _try(self, trial: Trial) -> None:
        """This is an attempt that may be replayed."""
        self.trial = trial
        self.attempt = trial.number
        self.watching = True

    def _fail(self, error: BaseException) -> None:
        """*error* ends this unit, which is not rolled back yet."""
        self._refused = True
        if self.trial is not None:
            with self._first_error_stays():
                self.trial.failed(self, error)
        for trial in trials():
            if trial is not self.trial:
                trial.refuses(self, error)

    def _settle(self, *, body_is_over: bool = False) -> None:
        """The status of a streamed response is known: conclude the first half, unless it has to wait for the body."""
        try:
            waits = not body_is_over and self._waits_for_body()
        except BaseException as error:
            self._fail(error)
            self._conclude()
            raise
        finally:
            self._state = State.SETTLED
            self.watching = False
        if not waits:
            self._conclude()
        # The response begins.
        self.watch = None
        self.trial = None

    def _waits_for_body(self) -> bool:
        """Whether the transaction must outlive the start of the response."""
        session = self.binder.peek(self)
        commits = not self._refused and self._doomed is None
        if session is None or not session.in_transaction():
            # Nothing was done yet, but what the body does is waited for by what was registered in the view.
            return commits and self._commit_at == "end"
        if not session.is_active:
            return False
        if commits:
            # Better now, while an error is still an error page, than in the middle of the body.
            self._check_commit(session, session.get_transaction(), parts=())
            if self._commit_at == "end":
                return True
        watch = self.watch
        if watch is None or not watch.has_open_result():
            return False
        if not commits:
            # Rolling back now would take the rows of, say, an error page that streams.
            return not (watch.changed or session.new or session.dirty or session.deleted)
        session.flush()  # else what is merely pending would look like nothing
        if watch.changed:
            log.warning(
                "%s: committed with a result still open, whose unread rows may be lost to the "
                'body; set current_scope().commit_at = "end" to keep one transaction for the '
                "view and the body",
                self,
            )
        return not watch.changed

    def _conclude(self) -> None:
        """Commit what the session holds now, or roll it back, and tell the callbacks.

        A commit that fails is rolled back; then its exception goes on.
        """
        session = self.binder.peek(self)
        if session is None or not session.in_transaction():
            outcome = "nothing to commit or roll back"
        elif self._refused or self._doomed is not None:
            self._roll_back(session)
            outcome = "rolled back"
        else:
            try:
                self._commit(session)
            except BaseException as error:
                lost_nothing = self._has_lost_nothing(error)
                if not lost_nothing:
                    self._fail(error)
                with self._first_error_stays():
                    self._roll_back(session)
                if not lost_nothing:
                    if self.callbacks is not None:
                        self._tell_callbacks()
                    log.debug("%s: rolled back (the commit failed: %s)", self, type_name(error))
                    raise
            outcome = "committed"
        if self.callbacks is not None:
            self._tell_callbacks()
        if log.isEnabledFor(logging.DEBUG):
            why = "" if self._doomed is None else f" (doomed: {self._doomed!r})"
            log.debug("%s: %s%s", self, outcome, why)

    def _has_lost_nothing(self, error: BaseException) -> bool:
        """Whether there was nothing that a commit could have kept, so that it does not matter that it has failed."""
        return False

    def _forget_what_is_gone(self) -> None:
        """This unit is not bound, and what refers to it is about to be destroyed, perhaps.

        Where Python's garbage collector does that, because of a cycle, the weak references to all that goes are cleared
        before anybody is told, and their callbacks called.  Then the objects of the session have no values any more,
        and would be flushed like that; and its connection is back in the pool, or with somebody else.
        """
        session = self.held
        # SQLAlchemy itself has one to each session.
        if session is None or weakref.getweakrefcount(session):
            return
        log.warning(
            "%s: its session was destroyed together with the body that was dropped; what it had not committed is lost",
            self,
        )
        self.held = None
        self.connections = ()
        self._rollback_only = None

    def _end(self) -> None:
        """Conclude, remove the session whatever happens, unbind, and run what is due."""
        if self.frame.covered:
            unwind(self.frame)  # what is still open within it has lost its place
        if self.within is not None:
            self._end_savepoint()
            return
        try:
            # Most requests have nothing to conclude by now, and nobody to tell of it.
            peek = self.binder.peek
            if self.callbacks is not None or peek(self) is not None or log.isEnabledFor(logging.DEBUG):
                try:
                    self._conclude()
                finally:
                    session = peek(self)
                    if session is not None:
                        self._close(session)
        except BaseException:
            self._leave()
            with self._first_error_stays():
                self._run_callbacks()
            raise
        self._leave()
        if self.callbacks is not None:
            self._run_callbacks()
        self.trial = None

    def _end_after_error(self, error: BaseException) -> None:
        """The same, while *error* is on its way: nothing is committed, and it stays the one that is raised."""
        self._fail(error)
        with self._first_error_stays():
            self._end()

    @contextmanager
    def _first_error_stays(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            warn_of_error(error, "%s: failed once more while an earlier error was on its way", self)

    def _leave(self) -> None:
        self._state = State.ENDED
        self.binder.leave(self)
        self.held = None
        self.connections = ()
        self._rollback_only = None

    def _run_callbacks(self) -> bool:
        """Run the callbacks that are due.  The unit is not bound.

        :return: whether there were any.
        """
        if self.callbacks is None:
            return False
        # The transaction that they wait for may have gone without a word.
        self.callbacks.within(None if self.held is None else self.held.get_transaction())
        if not self.callbacks.due:
            return False
        if self.trial is not None and self.trial.again:
            self.callbacks = None  # what comes of this unit of work, the next attempt will tell
        else:
            self.callbacks.run()
        return True

    # A SAVEPOINT within the unit

    def _begin_savepoint(self) -> None:
        self._savepoint = self.session.begin_nested()
        self._root._parts += (self,)

    def _end_savepoint(self) -> None:
        """Release the SAVEPOINT, or roll back to it; the session stays."""
        try:
            session = self.binder.peek(self)
            savepoint = self._savepoint
            if session is not None and savepoint is not None:
                keeps = not self._refused and self._doomed is None
                if is_open(session, savepoint):
                    if keeps:
                        try:
                            self._check_commit(session, savepoint)
                            savepoint.commit()
                        except BaseException as error:
                            for trial in trials():
                                trial.refuses(self, error)
                            self._roll_back_savepoint(session, savepoint)
                            raise
                    else:
                        self._roll_back_savepoint(session, savepoint)
                elif session.in_transaction() and session.get_transaction() is not _root_of(savepoint):
                    # The application has ended it itself, with the whole transaction. All that is in this one was done
                    # since, in here.
                    if keeps:
                        try:
                            self._root._check_commit(session, session.get_transaction())
                        except BaseException:
                            self._roll_back(session)
                            raise
                    else:
                        self._roll_back(session)
        finally:
            self._root._parts = tuple(part for part in self._root._parts if part is not self)
            self._state = State.ENDED
            self._rollback_only = None
            self._savepoint = None
            self.binder.unnest(self)

    def _roll_back_savepoint(self, session: Session, savepoint: SessionTransaction) -> None:
        try:
            # Those within it first: SQLAlchemy 1.4 leaves it to us.
            inner = session.get_nested_transaction()
            while inner is not None and inner is not savepoint:
                inner.rollback()
                inner = session.get_nested_transaction()
            savepoint.rollback()
        except Exception as error:
            warn_of_error(error, "%s: rolling back to a SAVEPOINT failed; its connection is discarded", self)
            self._invalidate(session)
            # With the connection, what the whole unit had done is gone.
            self._root._spoil(error, "the rollback of a part of it has failed")

    # A part that has joined

    def _spoil(self, error: BaseException, what: str) -> None:
        """*error* escapes from a part of this unit, which may be half done: it can only be rolled back.

        Until the application itself rolls back, which is why the transaction is noted, and begun
        if it was not.

        :param what: has failed.
        """
        transaction: SessionTransaction | None = None
        try:
            session = self.binder.session(self)
            if self._savepoint is not None and is_open(session, self._savepoint):
                transaction = self._savepoint
            else:
                transaction = session.get_transaction() or session.begin()
        except Exception as second:
            warn_of_error(second, "%s: could not tell its transaction", self)
        if self._rollback_only is not None and self._rollback_only[0] is transaction:
            return  # what comes after it in that transaction comes of it
        self._rollback_only = (
            transaction,
            error,
            f"{what} ({type_name(error)}) and that was swallowed, so only half of the work is there; let the exception "
            f'pass, call Session.rollback() where you handle it, or run that part with propagation="nested"',
        )

    def _meets(self, error: BaseException, session: Session | None) -> None:
        """*error* has come up, in *session*, this unit's or another one, or elsewhere; it may be swallowed."""
        conflict = classify(error)
        if conflict is not None and conflict.undone and session is not None and session is self.binder.peek(self):
            # The next statement begins another transaction, which the database would commit without a word.
            self._rollback_only = (
                session.get_transaction(),
                error,
                f"the database has rolled back its transaction ({conflict.code}), which was swallowed, so only half of "
                f"the work is there; let the exception pass, or call Session.rollback() where you handle it",
            )
        if self.trial is not None:
            self.trial.meets(error, self, session)

    # Steps

    def _check_running(self, what: str) -> None:
        if self._state is State.ENDED:
            raise NoActiveScope(
                f"{what} of {self} was used after that unit of work had ended: "
                f"use session_scope() for work outside of it"
            )

    def _add_callback(self, what: str, callback: Callable[[], object], *, on_commit: bool) -> None:
        if not callable(callback):
            raise TypeError(f"{what} takes a callable without arguments, not an object of type {type_name(callback)}")
        self._check_running(what)
        root = self._root
        if root.callbacks is None:
            root.callbacks = Callbacks()
        session = root.binder.peek(root)
        savepoint = session.get_nested_transaction() if session is not None else None
        root.callbacks.within(None if session is None else session.get_transaction())
        root.callbacks.add(callback, on_commit=on_commit, savepoint=savepoint)

    def _tell_callbacks(self) -> None:
        """Settle the callbacks for which there was no transaction that could have told them."""
        assert self.callbacks is not None
        self.callbacks.within(None)
        if self._refused or self._doomed is not None:
            self.callbacks.ended(None)
        else:
            self.callbacks.committed(None)

    def _check_commit(
        self,
        session: Session,
        transaction: SessionTransaction | None = None,
        *,
        parts: tuple[SessionScope, ...] | None = None,
    ) -> None:
        """Raise ``RollbackOnlyError`` if *transaction* of *session* must not be committed, or released.

        :param transaction: ``None``: the innermost one.
        :param parts: those which forbid it as well; ``None``: all that are open.  The whole may be committed within
            one of them, by ``write()``, or between two chunks of a body.
        """
        if parts is None:
            parts = self._parts
        if (self._rollback_only is not None or parts) and transaction is None:
            transaction = session.get_nested_transaction() or session.get_transaction()
        for scope in (self, *parts):
            if scope._rollback_only is not None:
                failed, error, why = scope._rollback_only
                if failed is None or failed is transaction:
                    raise RollbackOnlyError(f"{scope} cannot be committed: {why}") from error
        connections: Iterable[Connection] = self._root.connections
        if not connections:
            # SQLAlchemy 2.1.7 and later can tell those of a session that was used where it is not bound.
            connections = getattr(session.get_transaction(), "connections", ())
        for connection in connections:
            if is_aborted(connection):
                raise RollbackOnlyError(
                    f"{self} cannot be committed: the database has aborted its transaction after "
                    f"an error that was swallowed, and would answer COMMIT with a rollback; let "
                    f"the exception pass, call Session.rollback() where you handle it, or run "
                    f"the statement in Session.begin_nested()"
                )

    def _commit(self, session: Session) -> None:
        transaction = session.get_transaction()
        if self._rollback_only is not None or self._parts:
            # First: whatever else the session has against it may merely come of that.
            self._check_commit(session, transaction)
        # What the view has loaded stays loaded, for the body to render: refreshing it would cost
        # a statement for each object and a transaction that idles behind a slow client.
        expire = session.expire_on_commit
        session.expire_on_commit = False
        try:
            session.commit()
            while _has_levels(session) and session.get_transaction() is transaction:
                session.commit()
        finally:
            session.expire_on_commit = expire

    def _roll_back(self, session: Session) -> None:
        # The error in it keeps the frames that it has passed, the body's among them.
        self._rollback_only = None
        try:
            transaction = session.get_transaction()
            session.rollback()
            while _has_levels(session) and session.get_transaction() is transaction:
                session.rollback()
        except BaseException as error:
            warn_of_error(error, "%s: the rollback failed; what it holds is discarded", self)
            self._invalidate(session)
            if not isinstance(error, Exception):
                raise

    def _close(self, session: Session) -> None:
        try:
            if not _is_pristine(session):
                session.close()
        except BaseException as error:
            warn_of_error(error, "%s: closing the session failed; its connection is discarded", self)
            self._invalidate(session)
            if not isinstance(error, Exception):
                raise

    def _invalidate(self, session: Session) -> None:
        """Close *session* without giving its connections back to the pool."""
        try:
            session.invalidate()
        except Exception as error:
            warn_of_error(error, "%s: discarding its connection failed", self)


def _root_of(savepoint: SessionTransaction) -> SessionTransaction:
    transaction = savepoint
    while transaction.parent is not None:
        transaction = transaction.parent
    return transaction


def _has_levels(session: Session) -> bool:
    """Whether *session* is in a transaction that it commits, and rolls back, one level at a time.

    That is one of SQLAlchemy 1.4 without ``future=True``.  Elsewhere a ``commit()`` that was overridden, and does not
    end the transaction, must not be called again and again.
    """
    return not getattr(session, "future", True) and session.in_transaction()


def _is_pristine(session: Session) -> bool:
    """Whether *session* holds nothing that closing it would release.

    Closing one costs more than all the rest of a request that only made one.
    """
    return not session.in_transaction() and not session.identity_map and type(session).close is _CLOSE


#: An application's own ``close`` is called in any case.
_CLOSE = Session.close


def current_scope(session: SessionSource | None = None) -> SessionScope:
    """The innermost :class:`SessionScope` that is active here.

    :param session: the ``scoped_session``, or the ``sessionmaker``, whose unit of work is meant;
        needed only where several databases are in use.
    :raises NoActiveScope: where no unit of work (of that session) is active.
    :raises TypeError: if *session* is neither.
    """
    scope = innermost(None if session is None else binder_of(session).key)
    if scope is None:
        raise NoActiveScope(
            "no unit of work is active here"
            + ("" if session is None else " for that session")
            + ": wrap the code in session_scope() or with_session(), or run it within a request "
            "to SessionMiddleware"
        )
    return cast("SessionScope", scope)
