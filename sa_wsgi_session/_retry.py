"""Lost races: when a unit of work is attempted once more, and what is known of the attempt until then.

A unit of work under a :class:`RetryPolicy` has a :class:`Trial` for each attempt at it.  The listeners of ``_watching``
tell that what the attempt meets and does.  When the attempt has failed, it decides whether another one follows: only
where it failed *because of* a lost race, where nothing of it is durable, and as long as the policy allows it.

This file knows errors and transactions.  It does not know HTTP: to begin anew is the business of the front doors.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from random import uniform
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING

from ._binding import frames_around
from ._errors import log, shown, type_name, warn_of_error, why_unusable
from ._transient import Conflict, classify, leaves_unknown
from ._watching import is_open

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection
    from sqlalchemy.orm import Session, SessionTransaction

    from ._watching import Watch, Watched


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and how fast, a unit of work is replayed that has lost a race for the database.

    ::

        application = SessionMiddleware(application, Session, retry=RetryPolicy(attempts=5))

    :param attempts: how many there may be, the first one included.
    :param delay: the bound, in seconds, of the pause before the second attempt.  It doubles with each attempt.  The
        pause is random, from nothing to that bound, so that those who collided do not collide again.
    :param max_delay: what the bound does not exceed, in seconds.
    :param deadline: no attempt begins later than so many seconds after the first one; ``None``: there is no deadline.
    :param max_body: the largest body of a request, in bytes, that is kept to be read once more.  A request with a
        larger one has a single attempt.
    :param is_transient: called as ``is_transient(error)`` with an exception that is none of the known ones, perhaps
        more than once; true means: a race was lost, and the unit of work may be replayed.
    :raises TypeError: if an argument is of the wrong type.
    :raises ValueError: if it has a wrong value.

    What is replayed, and what never is: see *Lost races* in the guide.
    """

    attempts: int = 3
    _: KW_ONLY
    delay: float = 0.05
    max_delay: float = 1.0
    deadline: float | None = 10.0
    max_body: int = 1024 * 1024
    is_transient: Callable[[BaseException], object] | None = None

    def __post_init__(self) -> None:
        check_number("attempts", self.attempts, "a whole number, 1 or more", whole=True, least=1)
        check_number("delay", self.delay, "a number of seconds, 0 or more")
        check_number("max_delay", self.max_delay, "a number of seconds, 0 or more")
        if self.deadline is not None:
            check_number("deadline", self.deadline, "a number of seconds, 0 or more, or None")
        check_number("max_body", self.max_body, "a whole number of bytes, 0 or more", whole=True)
        unusable = why_unusable(self.is_transient)
        if self.is_transient is not None and unusable:
            raise TypeError(f"is_transient must be a callable that takes an exception, or None, not {unusable}")

    def _classify(self, error: BaseException) -> Conflict | None:
        conflict = classify(error)
        if conflict is None and self.is_transient is not None:
            try:
                if self.is_transient(error):
                    return Conflict(type_name(error))
            except Exception as second:
                warn_of_error(second, "is_transient failed; %s is taken for an error like any other", type_name(error))
        return conflict


def check_number(name: str, value: object, accepted: str, *, whole: bool = False, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise TypeError(f"{name} must be {accepted}, not an object of type {type_name(value)}")
    if not (least <= value and (whole or value <= sys.float_info.max)):
        raise ValueError(f"{name} must be {accepted}, not {shown(value)}")


def check_retry(value: object) -> RetryPolicy | None:
    """Return *value*, or raise ``TypeError`` where it is no policy."""
    if value is None or isinstance(value, RetryPolicy):
        return value
    raise TypeError(f"retry must be a RetryPolicy, or None, not an object of type {type_name(value)}")


class LostRace(Exception):
    """An attempt is left although it has an answer, which tells of a lost race: another attempt follows."""


def _nothing_to_rewind() -> bool:
    return True


def _nothing() -> None:
    return None


def _itself(error: BaseException) -> BaseException:
    return error


class Trial:
    """One attempt at a unit of work under a policy: what it meets and does, and whether another one follows."""

    # Most attempts meet nothing: only where there is something to know is it written to the instance.

    #: The last lost race that it has met.
    _conflict: Conflict | None = None
    #: The transaction of a session in which that was, and the SAVEPOINT in it; none if it was on another connection.
    _transaction: SessionTransaction | None = None
    _savepoint: SessionTransaction | None = None
    #: What has come of it, in the session of a part; as long as anybody else keeps that.
    _refusal: Callable[[], BaseException | None] = staticmethod(_nothing)
    #: What the session had sent by then.
    _watch: Watch | None = None
    #: Whether something that it did is durable, so that it can't be undone.
    _committed = False
    #: Whether nobody knows if a COMMIT has reached the database.
    _unknown = False
    #: The connections on which it has changed something, as the pool and as SQLAlchemy knows them.
    _changed: tuple[tuple[object, Connection], ...] = ()
    _decided = False
    _pause = 0.0
    _again = False
    #: Why the engine that the attempt uses cannot serve it, and another one can; nothing if it can.
    elsewhere: Conflict | None = None
    #: How many attempts before this one have ended for that reason: the policy does not count them.
    _moves = 0
    #: The exception, if any, that is handled where the unit of work is called: no attempt comes of it.
    _outside: BaseException | None = None
    number = 1
    #: Gives back what the attempt has consumed; false if that can't be done.
    rewind: Callable[[], bool] = staticmethod(_nothing_to_rewind)

    def __init__(self, policy: RetryPolicy) -> None:
        """The first attempt."""
        self._policy = policy
        self._began = time.monotonic()
        outside = sys.exc_info()[1]
        if outside is not None:
            self._outside = outside

    def next(self) -> Trial:
        """Pause; then this is the attempt that follows."""
        time.sleep(self._pause)
        trial = Trial(self._policy)
        trial._began, trial.number, trial.rewind = self._began, self.number + 1, self.rewind
        if self._moves or self.elsewhere is not None:
            trial._moves = self._moves + (self.elsewhere is not None)
        return trial

    # What it is told by the listeners of ``_watching``

    def has_committed(self) -> None:
        """Something that it did is durable."""
        self._committed = True

    def changes(self, connection: Connection) -> None:
        """It changes something on *connection*, its session's or any other, for the first time."""
        # SQLAlchemy 1.4 makes another Connection for every change of execution options.
        transaction = connection.get_transaction()
        self._changed += ((connection.connection, connection if transaction is None else transaction.connection),)

    def commits(self, pooled: object, error: BaseException | None) -> None:
        """COMMIT was sent on a connection of the pool, and has raised *error* if there is one."""
        if not self.has_changed(pooled):
            return
        if error is None:
            self._committed = True
        else:
            self._unknown |= leaves_unknown(error)

    def has_changed(self, pooled: object) -> bool:
        """Whether it has changed something on that connection of the pool."""
        return any(changed is pooled for changed, _connection in self._changed)

    def meets(self, error: BaseException, unit: Watched, session: Session | None) -> Conflict | None:
        """*error* has come up, in *session*, its own or that of a part, or elsewhere; perhaps nobody minds."""
        conflict = self._policy._classify(error)
        if conflict is None:
            return None
        self._unknown |= conflict.unknown
        own = session is not None and session is unit.binder.peek(unit)
        if not own and self._is_pending(unit):
            return conflict  # an earlier one is still the matter with its own session
        self._conflict, self._watch = conflict, unit.watch
        self._transaction = self._savepoint = None
        if session is not None:
            self._transaction, self._savepoint = session.get_transaction(), session.get_nested_transaction()
        return conflict

    def refuses(self, part: Watched, error: BaseException) -> None:
        """*error* ends a part of it that is not rolled back yet."""
        if self._is_pending(part):
            # Its traceback refers to the frames that it has passed, a body's among them.
            try:
                self._refusal = weakref.ref(error)
            except TypeError:  # one of Python's own
                self._refusal = partial(_itself, error)

    @property
    def again(self) -> bool:
        """Whether another attempt follows: that is decided, and nothing has become durable since."""
        return self._again and not self._committed and not self._unknown

    # What it is asked, once, when the unit has failed and is not rolled back yet

    def failed(self, unit: Watched, error: BaseException) -> None:
        """*error* ends the attempt: decide whether another one follows."""
        if self._decided or not isinstance(error, Exception):
            return
        if self.elsewhere is not None:
            self._decide(unit, self.elsewhere)
            return
        # PostgreSQL refuses all that comes after a lost race, and so does a Session: with another error.
        lost = self._conflict if self._is_pending(unit) else None
        for link in _chain(error, self._outside, implicit=not self._has_gone_on(unit)):
            if link is self._refusal():
                lost = self._conflict
            lost = self.meets(link, unit, None) or lost
        self._refusal = _nothing
        self._decide(unit, lost)

    def answered(self, unit: Watched) -> bool:
        """The application has answered with an error of its own: decide whether another attempt follows."""
        if self.elsewhere is not None:
            # Whatever it has made of that: it was told of an engine's trouble, and not of what it has asked for.
            self._decide(unit, self.elsewhere)
        elif not self._has_gone_on(unit):
            self._decide(unit, self._conflict)
        return self.again

    def _has_gone_on(self, unit: Watched) -> bool:
        """Whether it has rolled back since it lost a race, and then done other work: errors come of that."""
        watch = unit.watch
        return self._conflict is not None and watch is not None and watch is not self._watch and watch.changed

    def _is_pending(self, unit: Watched) -> bool:
        """Whether the session is still in the transaction, and the SAVEPOINT, that a lost race has broken."""
        session = unit.binder.peek(unit)
        if session is None or self._transaction is None or self._transaction is not session.get_transaction():
            return False
        conflict = self._conflict
        if conflict is not None and conflict.survived and session.is_active:
            return False
        if conflict is not None and (conflict.undone or conflict.disconnect):
            return True  # the whole transaction, whatever becomes of the SAVEPOINT
        return self._savepoint is None or is_open(session, self._savepoint)

    def _is_open_elsewhere(self, unit: Watched) -> bool:
        """Whether it has begun something that goes on without it, and would be done twice."""
        if any(connection.in_transaction() and not unit.uses(connection) for _pooled, connection in self._changed):
            return True
        # In a unit around this one, whose session has not been flushed yet.
        around = [frame.unit for frame in frames_around(unit) if frame.unit is not None]
        sessions = [outer.binder.peek(outer) for outer in around]
        return any(session is not None and (session.new or session.dirty or session.deleted) for session in sessions)

    def _decide(self, unit: Watched, lost: Conflict | None) -> None:
        if lost is None:
            return
        self._decided = True
        number, policy = self.number - self._moves, self._policy
        if self._unknown:
            log.warning(
                "%s: the connection was lost during COMMIT, or the database could not tell its outcome (%s): whether "
                "attempt %d is committed is unknown, so it is not replayed",
                *(unit, lost.code, number),
            )
        elif self._committed or self._is_open_elsewhere(unit):
            log.debug("%s: attempt %d lost a race (%s) but has done what can't be undone", unit, number, lost.code)
        elif lost is self.elsewhere:
            self._again = self.rewind()
            log.debug("%s: attempt %d cannot go on where it is (%s)", unit, self.number, lost.code)
        elif number < policy.attempts:
            self._pause = uniform(0, min(TIMEOUT_MAX, policy.max_delay, policy.delay * 2.0 ** min(number - 1, 64)))
            elapsed = time.monotonic() - self._began + self._pause
            self._again = (policy.deadline is None or elapsed <= policy.deadline) and self.rewind()
            if self._again:
                log.warning(
                    "%s: attempt %d of %d lost a race (%s) and is replayed in %.3f seconds",
                    *(unit, number, policy.attempts, lost.code, self._pause),
                )


def _chain(error: BaseException, outside: BaseException | None, *, implicit: bool) -> Iterator[BaseException]:
    """*error*, and the ones that it comes from, up to *outside*; the innermost first.

    :param implicit: also those that were merely being handled when it came up.
    """
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link is not outside and all(link is not known for known in found):
        found.append(link)
        link = link.__cause__ or (link.__context__ if implicit else None)
    return reversed(found)
