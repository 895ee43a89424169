"""Plays an episode of ``programs.py`` with the package, SQLAlchemy and SQLite, and writes its trace.

What must hold after every call of a server, whatever the episode is, is checked here as well: :class:`Violated`.
"""

from __future__ import annotations

import gc
import io
import logging
import sqlite3
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias
from wsgiref.util import FileWrapper

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session as PlainSession
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from sa_wsgi_session import (
    NoActiveScope,
    RetryPolicy,
    SessionMiddleware,
    contextual_session,
    current_scope,
    session_scope,
    with_session,
)
from tests.proof.programs import (
    Add,
    Arm,
    Break,
    Commit,
    Doom,
    Drain,
    Drop,
    Episode,
    Exchange,
    Flush,
    Inner,
    Job,
    OnCommit,
    OnRollback,
    Open,
    Program,
    Raise,
    Read,
    Remove,
    Rollback,
    Scope,
    SetCommitAt,
    Start,
    Step,
    Steps,
    Try,
    Write,
)
from tests.support import make_environ

Trace: TypeAlias = "list[tuple[Any, ...]]"

SEEDS = 3

Base: Any = declarative_base()


class Token(Base):
    __tablename__ = "token"
    id = sa.Column(sa.Integer, primary_key=True)
    text = sa.Column(sa.String(20), nullable=False)


class Seed(Base):
    __tablename__ = "seed"
    id = sa.Column(sa.Integer, primary_key=True)


class Violated(AssertionError):
    """What must hold after every call does not."""


class Interrupt(BaseException):
    """An application's own; a timeout of gevent is of this sort."""


class Refusal(Exception):
    """A server does not like the headers."""


_CLASSES: dict[str, type[BaseException]] = {
    "ValueError": ValueError,
    "SystemExit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "Interrupt": Interrupt,
}


# -- the database -----------------------------------------------------------------------------------------------------


class Database:
    """Real SQLite files, one for each connection, whose connections fail on command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shelf: list[sqlite3.Connection] = []
        #: Of each connection, another one to the same file.
        self._readers: dict[sqlite3.Connection, sqlite3.Connection] = {}
        self._made = count()
        self._unusable: list[sqlite3.Connection] = []
        #: What fails the next time: what → error.
        self.armed: dict[str, str] = {}
        #: How many connections the engine has and has not closed.
        self.lent = 0
        #: Whether a ROLLBACK has failed, on command.
        self.failed_to_roll_back = False

    def connect(self) -> LentConnection:
        if self.armed.pop("connect", None):
            raise sqlite3.OperationalError("unable to open database file")
        if not self._shelf:
            self._make()
        self.lent += 1
        return LentConnection(self, self._shelf.pop())

    def _make(self) -> None:
        name = str(self._folder / f"{next(self._made)}.sqlite")
        connection = sqlite3.connect(name, check_same_thread=False, isolation_level=None)
        connection.executescript(
            "PRAGMA synchronous = OFF; PRAGMA journal_mode = MEMORY;"
            "CREATE TABLE token (id INTEGER PRIMARY KEY, text TEXT NOT NULL);"
            f"CREATE TABLE seed (id INTEGER PRIMARY KEY); INSERT INTO seed VALUES {', '.join(['(NULL)'] * SEEDS)}"
        )
        self._readers[connection] = sqlite3.connect(name, check_same_thread=False, isolation_level=None)
        self._shelf.append(connection)

    def put_back(self, connection: sqlite3.Connection) -> None:
        if connection.in_transaction:
            connection.rollback()
        self.lent -= 1
        try:
            # What SQLAlchemy sets on each new connection.
            connection.create_function("regexp", 2, None)
        except sqlite3.OperationalError:
            # A cursor that is garbage already, so that nobody could close it, reads from it.
            self._unusable.append(connection)
        else:
            self._shelf.append(connection)

    def fault(self, what: str, done: Callable[[], object] = lambda: None) -> None:
        """Fail, if that was commanded; *done* is what a lost connection does to the transaction first."""
        error = self.armed.pop(what, None)
        if error == "plain":
            if what == "rollback":
                self.failed_to_roll_back = True
            raise sqlite3.OperationalError("disk I/O error")
        if error == "race":
            raise sqlite3.OperationalError("database is locked")
        if error == "disconnect":
            done()
            # What SQLAlchemy takes for a lost connection to SQLite.
            raise sqlite3.ProgrammingError("Cannot operate on a closed database.")

    def durable(self) -> tuple[str, ...]:
        """What other connections see."""
        found = [text for reader in self._readers.values() for (text,) in reader.execute("SELECT text FROM token")]
        return tuple(sorted(found, key=lambda text: int(text[1:])))

    def clear(self) -> None:
        self.armed.clear()
        self.failed_to_roll_back = False
        for connection in self._unusable:
            connection.close()
            self._readers.pop(connection).close()
        self._unusable.clear()
        for connection in self._shelf:
            connection.execute("DELETE FROM token")

    def close(self) -> None:
        self.clear()
        for connection in (*self._shelf, *self._readers.values()):
            connection.close()


class LentConnection:
    """What the engine takes for a DBAPI connection; it goes back to its database where that one would be closed."""

    def __init__(self, database: Database, connection: sqlite3.Connection) -> None:
        self._database = database
        self._connection = connection
        self._is_closed = False
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()
        self.is_reset_by_pool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def cursor(self) -> sqlite3.Cursor:
        cursor = self._connection.cursor(FailingCursor)
        cursor.fault = self._database.fault
        self._cursors.add(cursor)
        return cursor

    def commit(self) -> None:
        self._database.fault("commit", self._connection.rollback)
        was_in_transaction = self._connection.in_transaction
        self._connection.commit()
        if was_in_transaction:
            self._database.fault("committed")

    def rollback(self) -> None:
        if self._connection.in_transaction and not self.is_reset_by_pool:
            self._database.fault("rollback")
        self._connection.rollback()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            # With a connection that is closed, its statements end.
            for cursor in self._cursors:
                cursor.close()
            self._database.put_back(self._connection)


class FailingCursor(sqlite3.Cursor):
    fault: Callable[..., None]

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        if sql.startswith(("SELECT", "INSERT")):
            self.fault("execute", self.connection.rollback)
        return super().execute(sql, parameters)

    def executemany(self, sql: str, parameters: Any) -> Any:
        self.fault("execute", self.connection.rollback)
        return super().executemany(sql, parameters)


class Setting:
    """An engine, a session and the middleware, as an episode wants them; made once for all that want the same."""

    def __init__(self, database: Database, registry: str, commit_at: str, attempts: int) -> None:
        #: The sessions that were made and are not dead.
        self.sessions: weakref.WeakSet[Any] = weakref.WeakSet()
        sessions = self.sessions

        class Session(PlainSession):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                sessions.add(self)

        self.engine = sa.create_engine("sqlite://", creator=database.connect, poolclass=NullPool)
        event.listen(self.engine, "reset", _note_reset)
        event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
        # What only SQLAlchemy 1.4 has to be told.
        factory: Any = sessionmaker(self.engine, class_=Session, future=True)
        self.Session: Any = scoped_session(factory) if registry == "thread-local" else contextual_session(factory)
        self.make = factory
        self.retry = RetryPolicy(attempts, delay=0) if attempts > 1 else None
        self.middleware = SessionMiddleware(_application, self.Session, commit_at=commit_at, retry=self.retry)


def _note_reset(connection: Any, *args: Any) -> None:
    connection.is_reset_by_pool = True


def _application(environ: Any, start_response: Any) -> Any:
    return environ["proof.run"].called(environ, start_response)


# -- playing ----------------------------------------------------------------------------------------------------------


def label_of(error: BaseException) -> str:
    return getattr(error, "label", type(error).__name__)


class Harness:
    """Plays episodes, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder)
        self._settings: dict[tuple[str, str, int], Setting] = {}
        self._other_thread = ThreadPoolExecutor(1)

    def play(self, episode: Episode) -> Trace:
        """Return the trace of *episode*.

        :raises Violated: where something was left behind.
        """
        key = (episode.registry, episode.commit_at, episode.attempts)
        setting = self._settings.get(key)
        if setting is None:
            setting = self._settings[key] = Setting(self.database, *key)
        self.database.clear()
        return Stage(self, setting, episode).play()

    def on_other_thread(self, call: Callable[[], Any]) -> Any:
        return self._other_thread.submit(call).result()

    def close(self) -> None:
        self._other_thread.shutdown()
        for setting in self._settings.values():
            setting.engine.dispose()
        self.database.close()


class SessionHasGone(Exception):
    """The garbage collector was the first to find a body that was dropped: its session is gone with it.

    Who finds it first is up to the references that exceptions keep, of which the oracle knows nothing.
    """


class _Log(logging.Handler):
    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage

    def emit(self, record: logging.LogRecord) -> None:
        if "was destroyed together with the body" in str(record.msg):
            self._stage.session_has_gone = True


class Stage:
    """One episode, while it is played."""

    def __init__(self, harness: Harness, setting: Setting, episode: Episode) -> None:
        self.database = harness.database
        self.setting = setting
        self.trace: Trace = []
        self._harness = harness
        self._episode = episode
        self._numbers = {"x": 0, "t": 0, "c": 0, "#": 0}
        self._ambient: dict[bool, Any] = {}
        #: Bodies of which nobody will be told that they are over.
        self.unclosed = 0
        self.session_has_gone = False

    def play(self) -> Trace:
        with self._watched() as told:
            with self._with_ambient_sessions():
                self._take_turns()
            self._expect_nothing_left()
        unclosed = sum("was dropped without a call to its close()" in message for message in told)
        self._expect(unclosed == self.unclosed, f"{self.unclosed} bodies were not closed, told of {unclosed}")
        self._expect(len(told) == unclosed, f"warned of something else: {told}")
        if self.session_has_gone:
            raise SessionHasGone
        return self.trace

    def _take_turns(self) -> None:
        waiting = [self._turns(part) for part in self._episode.parts]
        for turn in self._episode.order:
            if not waiting:
                break
            turns = waiting[turn % len(waiting)]
            if next(turns, "over") == "over":
                waiting.remove(turns)
        for turns in waiting:
            for _ in turns:
                pass

    def _turns(self, part: Exchange | Job) -> Iterator[None]:
        """Each ``next`` is a turn: a call that the server makes, or the whole job."""
        if isinstance(part, Job):
            self._do_job(part)
            self._check_thread(False)
            return
        run = Run(self, part, self.number("x"))
        elsewhere = False
        for call in run.calls():
            elsewhere = part.server.hops and not elsewhere
            if elsewhere:
                self._harness.on_other_thread(call)
                self._harness.on_other_thread(lambda: self._check_thread(True))
            else:
                call()
            del call
            self._check_thread(False)
            if run.is_over:
                return
            yield

    def _do_job(self, job: Job) -> None:
        play = Play(self, self.number("x"))
        try:
            if job.decorated:
                with_session(self.setting.Session, retry=self.setting.retry)(
                    lambda *, session: play.attempt(lambda: play.do_all(job.steps))
                )()
            else:
                with session_scope(self.setting.Session):
                    play.attempt(lambda: play.do_all(job.steps))
        except BaseException as error:
            self.trace.append(("raised", play.who, "job", label_of(error)))
        else:
            self.trace.append(("done", play.who, self.database.durable()))

    # What must hold

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise Violated("\n".join([otherwise, "the trace so far:", *map(str, self.trace)]))

    def _check_thread(self, elsewhere: bool) -> None:
        """Between the calls of the server a thread is as it was before."""
        registry = self.setting.Session.registry
        ambient = self._ambient.get(elsewhere)
        self._expect(registry.has() == (ambient is not None), f"the registry has a session: {registry.has()}")
        if ambient is not None:
            self._expect(registry() is ambient, "the session that the thread had is not there any more")
            self._expect([token.text for token in ambient.new] == ["t0"], "somebody has used the session of the thread")
        try:
            scope = current_scope()
        except NoActiveScope:
            return
        self._expect(False, f"a scope is still active: {scope!r}")

    def _expect_nothing_left(self) -> None:
        # A session whose own close() or rollback() has failed may keep its connection until it dies; so does a body
        # that nobody closes.
        if not (self.database.failed_to_roll_back or self.unclosed):
            self._expect(self.database.lent == 0, f"{self.database.lent} connections are still out")
        # Exceptions and their frames refer to each other.  Nearly always the young objects are enough, which is fast.
        for generation in (1, 2):
            if self.setting.sessions or self.unclosed:
                gc.collect(generation)
        self._expect(self.database.lent == 0, f"{self.database.lent} connections are still out")
        self._expect(not self.setting.sessions, f"sessions are still alive: {list(self.setting.sessions)}")

    @contextmanager
    def _with_ambient_sessions(self) -> Iterator[None]:
        if not self._episode.ambient:
            yield
            return

        def put() -> Any:
            session = self.setting.Session()
            session.add(Token(text="t0"))
            return session

        remove = self.setting.Session.remove
        self._ambient = {False: put(), True: self._harness.on_other_thread(put)}
        try:
            yield
        finally:
            self._ambient.clear()
            remove()
            self._harness.on_other_thread(remove)

    @contextmanager
    def _watched(self) -> Iterator[list[str]]:
        """Nothing is logged; what is warned of is kept as text, for a warning refers to the body that it is about."""
        told: list[str] = []
        logger = logging.getLogger("sa_wsgi_session")
        propagates, logger.propagate = logger.propagate, False
        handler = _Log(self)
        logger.addHandler(handler)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                # About what an application does after a flush that has failed: its own business.
                warnings.simplefilter("ignore", sa.exc.SAWarning)
                warnings.showwarning = lambda message, *where: told.append(str(message))
                yield told
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagates

    def number(self, what: str) -> str:
        self._numbers[what] += 1
        return f"{what}{self._numbers[what]}"


class Run:
    """One exchange, from the server's side."""

    def __init__(self, stage: Stage, exchange: Exchange, who: str) -> None:
        self.who = who
        self.is_over = False
        self._stage = stage
        self._server = exchange.server
        self._program = exchange.program
        self._environ = make_environ()
        self._environ.update({"proof.run": self, "wsgi.file_wrapper": FileWrapper})
        self._body: Any = None
        self._iterator: Any = None
        self._has_sent = False
        self._received = 0
        self._raised = False

    def share(self, environ: dict[str, Any]) -> None:
        # That of a body that is dropped has nothing in it any more.
        self._environ = {"wsgi.file_wrapper": FileWrapper, **environ, "proof.run": self}

    def calls(self) -> Iterator[Callable[[], None]]:
        """The calls that the server makes, one after the other."""
        yield self._call
        if self.is_over:
            return
        while self._server.reads is None or self._received < self._server.reads:
            yield self._next
            if self._raised or self._iterator is None:
                break
        if hasattr(self._body, "close"):
            for _ in range(self._server.closes):
                yield self._close
        yield self._let_go

    def _call(self) -> None:
        try:
            self._body = self._stage.setting.middleware(self._environ, self._start_response)
        except BaseException as error:
            self._tell_of(error, "call")
            self.is_over = True
        else:
            if type(self._body).__name__ == "Stream" and not self._server.closes:
                self._stage.unclosed += 1

    def _next(self) -> None:
        try:
            if self._iterator is None:
                self._iterator = iter(self._body)
            chunk = next(self._iterator)
        except StopIteration:
            self._iterator = None
            self._tell("end")
        except BaseException as error:
            self._raised = True
            self._tell_of(error, "next")
        else:
            self._received += 1
            self._has_sent = True
            self._tell("chunk", chunk)

    def _close(self) -> None:
        try:
            self._body.close()
        except BaseException as error:
            self._tell_of(error, "close")
        else:
            self._tell("closed")

    def _let_go(self) -> None:
        stream = weakref.ref(self._body) if type(self._body).__name__ == "Stream" else None
        # First: a failed flush, which the session keeps, may keep the body.
        self._environ.clear()
        self._iterator = self._body = None
        if self._server.closes == 0 and stream is not None and stream() is not None:
            gc.collect()  # an exception has kept it
            gc.collect()  # what its close() has left
        self.is_over = True
        self._tell("dropped")

    def _tell(self, what: str, *data: object) -> None:
        self._stage.trace.append((what, self.who, *data, self._stage.database.durable()))

    def _tell_of(self, error: BaseException, where: str) -> None:
        self._stage.trace.append(("raised", self.who, where, label_of(error)))
        if self.leaves is None and not isinstance(error, Exception):
            # Without its traceback, which would keep what has raised it.
            self.leaves = error.with_traceback(None)

    #: What the server of an inner exchange lets out: the first that is no Exception.
    leaves: BaseException | None = None

    def _start_response(self, status: Any, headers: Any, exc_info: Any = None) -> Callable[[bytes], None]:
        try:
            self._tell("start", status)
            if self._server.refuses:
                raise Refusal
            if exc_info is not None and self._has_sent:
                raise exc_info[1].with_traceback(exc_info[2])
        finally:
            exc_info = None
        return self._write

    def _write(self, data: bytes) -> None:
        self._has_sent = True
        self._tell("written", data)

    # The application's side

    def called(self, environ: dict[str, Any], start_response: Any) -> Any:
        play = Play(self._stage, self.who, environ, start_response)
        return play.attempt(lambda: _answer(play, self._program))


def _answer(play: Play, program: Program) -> Any:
    if program.body == "generator":
        return _generator(play, program)
    play.do_all(program.view)
    if program.body == "iterable":
        return Body(play, program) if program.close is None else BodyWithClose(play, program)
    chunks = [b"%d" % (number + 1) for number in range(len(program.chunks))]
    if program.body == "file":
        assert play.environ is not None
        return play.environ["wsgi.file_wrapper"](io.BytesIO(b"1"))
    return tuple(chunks) if program.body == "tuple" else chunks


def _generator(play: Play, program: Program) -> Iterator[bytes]:
    play.do_all(program.view)
    for number, steps in enumerate(program.chunks, 1):
        play.do_all(steps)
        yield b"%d" % number
    play.do_all(program.last)


class Body:
    def __init__(self, play: Play, program: Program) -> None:
        self._play = play
        self._program = program
        self._number = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        number = self._number
        self._number += 1
        if number < len(self._program.chunks):
            self._play.do_all(self._program.chunks[number])
            return b"%d" % (number + 1)
        if number == len(self._program.chunks):
            self._play.do_all(self._program.last)
        raise StopIteration


class BodyWithClose(Body):
    def close(self) -> None:
        assert self._program.close is not None
        self._play.closes(self._program.close)


class Play:
    """One attempt at a program: what it does step by step."""

    def __init__(
        self, stage: Stage, who: str, environ: dict[str, Any] | None = None, start_response: Any = None
    ) -> None:
        self.who = who
        self.environ = environ
        self._stage = stage
        self._database = stage.database
        self._Session = stage.setting.Session
        self._start_response = start_response
        self._write: Callable[[bytes], object] | None = None
        self._results: list[tuple[Any, Any]] = []
        self._attempt = 1

    def attempt(self, call: Callable[[], Any]) -> Any:
        self._attempt = current_scope(self._Session).attempt
        self._results.clear()
        self._stage.trace.append(("attempt", self.who, self._attempt))
        return call()

    def closes(self, steps: Steps) -> None:
        self._stage.trace.append(("closing", self.who))
        self.do_all(steps)

    def do_all(self, steps: Steps) -> None:
        for step in steps:
            self._do(step)

    def _do(self, step: Step) -> None:
        outcome: object = "ok"
        try:
            answer = self._does(step)
            if answer is not None:
                outcome = answer
        except BaseException as error:
            outcome = label_of(error)
            raise
        finally:
            self._stage.trace.append(("step", type(step).__name__, outcome))

    def _does(self, step: Step) -> object:
        match step:
            case Read():
                self._Session.execute(sa.select(Seed.id)).all()
            case Open(rows):
                # Of the table: the ORM would fetch all rows with the first one.
                result = self._Session.execute(sa.select(Seed.__table__))
                self._results.append((result, self._Session().get_transaction()))
                result.fetchmany(rows) if rows else None
            case Drain():
                return self._drain()
            case Drop():
                del self._results[:1]
            case Add():
                self._Session.add(Token(text=self._stage.number("t")))
            case Flush():
                self._Session.flush()
            case Break():
                self._Session.add(Token(text=None))
                self._Session.flush()
            case Commit():
                self._Session.commit()
            case Rollback():
                self._Session.rollback()
            case Remove():
                self._remove()
            case Doom():
                current_scope(self._Session).doom("a dry run")
            case OnCommit(what):
                current_scope(self._Session).on_commit(self._callback(what))
            case OnRollback(what):
                current_scope(self._Session).on_rollback(self._callback(what))
            case SetCommitAt(value):
                current_scope(self._Session).commit_at = value
            case Scope(propagation, steps):
                with session_scope(self._Session, propagation=propagation):
                    self.do_all(steps)
            case Arm(what, error, until):
                if self._attempt <= until:
                    self._database.armed[what] = error
            case Raise(kind):
                raise self._new_error(kind)
            case Try(steps):
                with suppress(Exception):
                    self.do_all(steps)
            case Start(status, exc_info):
                self._start(status, exc_info)
            case Write():
                if self._write is not None:
                    self._write(b"w")
            case Inner(exchange, shares):
                self._request(exchange, shares)
        return None

    def _drain(self) -> object:
        if not self._results:
            return 0
        result, transaction = self._results.pop(0)
        if transaction is None or not _goes_on(transaction):
            return "lost"
        return len(result.all())

    def _remove(self) -> None:
        session = self._Session.registry() if self._Session.registry.has() else None
        try:
            self._Session.remove()
        except BaseException:
            # SQLAlchemy leaves the transaction as if it went on.
            self._results = [
                (result, None if transaction is not None and transaction.session is session else transaction)
                for result, transaction in self._results
            ]
            raise

    def _callback(self, what: str) -> Callable[[], None]:
        name, stage, Session = self._stage.number("c"), self._stage, self._Session

        def callback() -> None:
            stage.trace.append(("callback", name, stage.database.durable()))
            if what == "raises":
                raise ValueError(name)
            if what == "writes":
                with session_scope(Session, propagation="requires_new") as session:
                    session.add(Token(text=stage.number("t")))

        return callback

    def _new_error(self, kind: str) -> BaseException:
        error = _CLASSES[kind]()
        error.label = f"{kind}{self._stage.number('#')}"  # type: ignore[attr-defined]
        return error

    def _start(self, status: Any, exc_info: bool) -> None:
        if self._start_response is None:
            return
        if not exc_info:
            self._write = self._start_response(status, [])
            return
        try:
            raise self._new_error("ValueError")
        except ValueError:
            self._write = self._start_response(status, [], sys.exc_info())

    def _request(self, exchange: Exchange, shares: bool) -> None:
        run = Run(self._stage, exchange, self._stage.number("x"))
        if shares and self.environ is not None:
            run.share(self.environ)
        for call in run.calls():
            call()
            del call
        if run.leaves is not None:
            raise run.leaves


def _goes_on(transaction: Any) -> bool:
    if transaction.session is None or not transaction.is_active:
        return False
    # The transaction of a connection that was lost looks as if it went on.
    return not transaction.session.connection().invalidated
