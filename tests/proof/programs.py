"""The language of the model: what an application, a server and a database may do, and how it is written down.

Hypothesis makes an :class:`Episode` of these (``strategies.py``).  It is played twice: by ``harness.py``, with the
package, SQLAlchemy and SQLite; and by ``oracle.py``, which knows only what ``docs/`` promise and how SQLAlchemy works.
Each writes a trace, and the two have to be equal.

**The database.**  A table of tokens, and one of three seeds.  Each DBAPI connection has an SQLite file of its own, with
the same seeds, so that no two transactions are ever in each other's way: what fails, fails on command (:class:`Arm`).
*Durable* is what another connection sees in any of the files.  Tokens are numbered in the order in which they are made,
over the whole episode: ``t1``, ``t2``, …

**The session** is made by a ``sessionmaker`` with its defaults (it autobegins, autoflushes, and expires on commit).
Each transaction of a session takes a connection when it needs one and gives it back at its end.

**The trace** is one list for all that happens in an episode, in the order in which it happens:

* ``("attempt", who, n)``: an application or a job is called; *n* is ``current_scope(Session).attempt``.
* ``("step", name of the class, outcome)``: a step is over.  The outcome is ``"ok"``, or the label of the exception that
  left it; for :class:`Drain` the number of rows, for :class:`Start` see there.  A step that holds other steps is told
  after them.
* ``("start", who, status, durable)``: the server's ``start_response`` is called.  Written before the server refuses.
* ``("written", who, data, durable)``: the server's ``write()`` is called.
* ``("chunk", who, data, durable)``: the server has received a chunk.  A list or a tuple, too, is told chunk by chunk.
* ``("end", who, durable)``: the server has read the body to its end.
* ``("closing", who)``: the ``close()`` of the application's body begins.
* ``("raised", who, where, label)``: an exception reached the server, *where* is ``"call"``, ``"next"`` or ``"close"``;
  or whoever has called the job, and *where* is ``"job"``.
* ``("closed", who, durable)``: the server's call of ``close()`` has returned.
* ``("dropped", who, durable)``: the server has let go of the body; all that it did not close is gone.
* ``("done", who, durable)``: a job has returned.
* ``("callback", name, durable)``: a callback begins.  They are named in the order in which they are registered, over
  the whole episode: ``c1``, ``c2``, …

*who* is the name of an exchange or job: ``x1``, ``x2``, … in the order in which they begin.  *durable* is a tuple of
tokens, in the order in which they were made.

The label of an exception that a step made (:class:`Raise`) is its kind and its number over the whole episode, as in
``"ValueError#3"``: the very same object.  Of all other exceptions it is the name of the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

#: Of what :class:`Raise` makes an exception.  ``Interrupt`` is a ``BaseException`` of the application's own.
KINDS = ("ValueError", "SystemExit", "KeyboardInterrupt", "GeneratorExit", "Interrupt")

#: Statuses that may be started with: committed by default, refused by default, worth a look under a retry policy, and
#: three that are none: :data:`NO_STATUS`.
STATUSES = ("200 OK", "303 See Other", "404 Not Found", "500 Internal Server Error")
#: For a ``str``, ``ValueError``; for anything else ``TypeError``.
NO_STATUS: tuple[object, ...] = ("", "20 OK", None)


# -- what an application does with its session ------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """Read all seeds: a result that is not left open.  Flushes first, as every query does."""


@dataclass(frozen=True)
class Open:
    """Query the seeds, fetch one row or none, and keep the result.  Flushes first."""

    rows: int


@dataclass(frozen=True)
class Drain:
    """Read the oldest kept result of this program to its end and let go of it; nothing where there is none (``0``).

    The outcome is the number of rows that it still had.  Where the transaction in which it was opened is over, or its
    session removed, the outcome is ``"lost"``: the harness then expects nothing of it, and lets no error out.
    """


@dataclass(frozen=True)
class Drop:
    """Let go of the oldest kept result of this program, unread; nothing where there is none."""


@dataclass(frozen=True)
class Add:
    """``Session.add()`` of a new token, which stays pending."""


@dataclass(frozen=True)
class Flush:
    """``Session.flush()``."""


@dataclass(frozen=True)
class Break:
    """``Session.add()`` of a row that the database refuses, and ``Session.flush()``: an ``IntegrityError``.

    All that is pending is flushed first, in the same flush.  (Where the session still has to be rolled back, or a fault
    comes first, it is that error.)
    """


@dataclass(frozen=True)
class Commit:
    """``Session.commit()``."""


@dataclass(frozen=True)
class Rollback:
    """``Session.rollback()``."""


@dataclass(frozen=True)
class Remove:
    """``Session.remove()`` of the scoped session."""


# -- what it says to its unit of work ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doom:
    """``current_scope(Session).doom()``."""


@dataclass(frozen=True)
class OnCommit:
    """``current_scope(Session).on_commit()``.

    *what* the callback does: ``"works"`` (nothing), ``"raises"`` a ``ValueError``, ``"writes"`` a token in a
    ``session_scope(Session, propagation="requires_new")``.
    """

    what: str


@dataclass(frozen=True)
class OnRollback:
    """``current_scope(Session).on_rollback()``; *what* as above."""

    what: str


@dataclass(frozen=True)
class SetCommitAt:
    """``current_scope(Session).commit_at = value``."""

    value: str


@dataclass(frozen=True)
class Scope:
    """``with session_scope(Session, propagation=propagation):`` around these steps."""

    propagation: Literal["required", "nested", "requires_new"]
    steps: Steps


# -- what goes wrong --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """The database fails: once, the next time that it is asked for *what*, on whichever connection.

    *what*:

    * ``"connect"``: a connection is made (each transaction makes one, as a pool without idle connections does);
    * ``"execute"``: a statement: a ``SELECT`` or an ``INSERT``, but not ``BEGIN``, ``SAVEPOINT`` and the like;
    * ``"commit"``: a ``COMMIT``; it has not been done;
    * ``"committed"``: a ``COMMIT``; it has been done, only its answer is lost;
    * ``"rollback"``: a ``ROLLBACK`` of a whole transaction that was asked for by the session, not by the pool.

    *error*: ``"plain"`` and ``"race"`` are an ``OperationalError``, the second one SQLite's BUSY; ``"disconnect"`` is a
    ``ProgrammingError`` that tells of a lost connection, and with it goes what the transaction has done.  For
    ``"rollback"`` it is always ``"plain"``, for ``"committed"`` always ``"disconnect"``, for ``"connect"`` always
    ``"plain"``.

    Under a retry policy only attempts up to *until* do this step (the exchange's or job's in whose program it stands).
    A fault that is armed a second time replaces the first one of the same *what*.  What is armed when the episode ends
    never happens.
    """

    what: str
    error: str
    until: int


@dataclass(frozen=True)
class Raise:
    """Raise a new exception of this kind."""

    kind: str


@dataclass(frozen=True)
class Try:
    """``try:`` these steps, ``except Exception: pass``."""

    steps: Steps


# -- what it says to the server ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """``start_response(status, [])``; with *exc_info*, that of the exception that is being handled or of a new one.

    The exception of *exc_info* is made for the purpose: a ``ValueError`` with a number and a label like that of
    :class:`Raise` (the number is taken when the step begins).  Only in the program of an exchange; anywhere else
    nothing is done.
    """

    status: object
    exc_info: bool


@dataclass(frozen=True)
class Write:
    """``write(b"w")`` with what the program's last :class:`Start` has returned; nothing where there is none."""


@dataclass(frozen=True)
class Inner:
    """A request from within: to the same application object, with a program and a server of its own, all at once.

    With *shares*, its environ is a copy of that of the exchange around it (nothing is shared within a job); else it is
    a new one.  What reaches the inner server (an exception too) is in the trace and goes no further, except what is no
    ``Exception``: the inner server lets the first of that out, when the body, if it has one, was closed as its plan
    says.
    """

    exchange: Exchange
    shares: bool


Step: TypeAlias = (
    "Read | Open | Drain | Drop | Add | Flush | Break | Commit | Rollback | Remove | Doom | OnCommit | OnRollback | "
    "SetCommitAt | Scope | Arm | Raise | Try | Start | Write | Inner"
)
Steps: TypeAlias = "tuple[Step, ...]"


# -- applications, servers, episodes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A WSGI application.

    *body*:

    * ``"list"``, ``"tuple"``: the *view*, then a list or a tuple of as many chunks as *chunks* has items; the steps of
      *chunks*, *last* and *close* are not used.
    * ``"file"``: the *view*, then what ``environ["wsgi.file_wrapper"]`` (a class) makes of a file with one chunk; its
      ``close()`` is not told in the trace.  The other steps are not used.
    * ``"iterable"``: the *view*, then an iterable (no generator: an exception does not end it, and ``close()`` is its
      own).  Before each chunk the steps of its item of *chunks* are done; after the last one, *last*; then it ends.
    * ``"generator"``: the application is a generator function: the *view* is done on the first ``next``, before the
      steps of the first chunk.  It has no ``close`` of its own and no results are shared between its attempts: its
      ``close()`` only ends it (nothing is told in the trace), and an exception that leaves it has ended it.

    *close* are the steps of the body's ``close()`` (``None``: the iterable has none).  They are done each time that it
    is called.  Chunk *n* is ``b"1"``, ``b"2"``, …
    """

    view: Steps
    body: str
    chunks: tuple[Steps, ...]
    last: Steps
    close: Steps | None


@dataclass(frozen=True)
class Server:
    """What a server does with a response.

    It calls the application and, where that returns, iterates over the body: all of it, or *reads* chunks and no more
    (``None``: all; with ``0`` it does not even begin).  Where ``next`` raises, it stops reading.  Then it calls
    ``close()``, if the body has one, *closes* times; then it lets go of the body.

    * *hops*: each call (of the application, ``next``, ``close``, and letting go) is made on the other one of two
      threads.
    * *refuses*: its ``start_response`` raises a ``Refusal`` (an ``Exception``) each time.

    Its ``start_response`` raises the exception of *exc_info* where the first chunk (or write) has already come.
    """

    reads: int | None
    closes: int
    hops: bool
    refuses: bool


@dataclass(frozen=True)
class Exchange:
    """One request and its response."""

    program: Program
    server: Server


@dataclass(frozen=True)
class Job:
    """A function, done at once: in ``session_scope(Session)`` or, with *decorated*, by ``with_session(Session)``.

    Decorated, it has the retry policy of the episode, if there is one.
    """

    steps: Steps
    decorated: bool


@dataclass(frozen=True)
class Episode:
    """Exchanges and jobs, on one thread and interleaved.

    *order*: whose turn it is, as an index into *parts* (modulo those that are not over): a turn is the next call that
    its server makes, or the whole job.  When *order* is at its end, what is left is played from the first to the last,
    each until it is over.

    * *registry*: ``"thread-local"`` or ``"contextual"``.
    * *ambient*: the thread (both threads, with *hops*) already has a session of its own in a thread-local registry,
      with a pending token named ``t0`` in it, which nobody else may see, flush or lose.
    * *commit_at*: that of the middleware.
    * *attempts*: of the ``RetryPolicy``; ``1``: there is none.
    """

    parts: tuple[Exchange | Job, ...]
    order: tuple[int, ...]
    registry: str
    ambient: bool
    commit_at: str
    attempts: int
