"""The application of the long run: one view for each shape of a request, from which :func:`make_stacks` makes four.

What each of them has to answer and to leave in the database is told in ``soak_shapes.py``.
"""

# The model is declared in the way that SQLAlchemy 1.4 and 2.x share, which tells mypy little.
# mypy: allow-subclassing-any, no-warn-unreachable

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper

from sqlalchemy import Column, ForeignKey, Integer, String, create_engine, event, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.pool import QueuePool

from sa_wsgi_session import RetryPolicy, SessionMiddleware, contextual_session, session_scope, with_session
from tests.proof.soak_shapes import DONE, FIRST, REST, SEEDS, receipt

#: How many chunks an answer without an end has, in case that a server never learns that its client has gone: 32 MB are
#: more than all the buffers on the way hold.
NEVER = 2000
CHUNK = b"." * 16_384
DATABASE, SMALL_FILE, LARGE_FILE = "soak.sqlite", "small", "large"

Base: Any = declarative_base()


class Row(Base):
    __tablename__ = "row"
    id: Any = Column(Integer, primary_key=True)
    label: Any = Column(String(60), unique=True, nullable=False)


class Child(Base):
    """Its row need not be there before the transaction is committed."""

    __tablename__ = "child"
    id = Column(Integer, primary_key=True)
    row_id: Any = Column(ForeignKey(Row.id, deferrable=True, initially="DEFERRED"), nullable=False)


class Number(Base):
    """What those who race add to."""

    __tablename__ = "number"
    id = Column(Integer, primary_key=True)
    value: Any = Column(Integer, nullable=False)


def make_engine(database: Path, connections: int) -> Engine:
    """An SQLite file, and a pool of so many connections."""
    engine = create_engine(
        f"sqlite:///{database}",
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
        # Seconds: for a connection of the pool, for the lock that lets one write.
        pool_timeout=60,
        connect_args={"check_same_thread": False, "timeout": 60},
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy begins the transactions
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA foreign_keys = ON")
        # In pages. Each connection would grow by 2 MB of cache, as the database grows, and hide what others keep.
        connection.execute("PRAGMA cache_size = 20")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def make_database(engine: Engine) -> None:
    """The tables, and what is in them before the first request."""
    Base.metadata.create_all(engine)
    with sessionmaker(engine)() as session:
        session.add(Number(id=1, value=0))
        session.add_all([Row(id=number, label=f"seed {number}") for number in range(1, SEEDS + 1)])
        session.commit()


class Failed(Exception):
    """A view fails with it on purpose."""


class Again(Exception):
    """A lost race that only the application knows."""


class Tally:
    """What the application counts, on whichever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


TALLY = Tally()

View = Callable[["Call"], Iterable[bytes]]
VIEWS: dict[str, View] = {}


def view(function: View) -> View:
    VIEWS[function.__name__] = function
    return function


class Call:
    """What a view is given."""

    def __init__(self, environ: dict[str, Any], start_response: Callable[..., Any], folder: Path, itself: Any) -> None:
        self.environ = environ
        self.folder = folder
        #: The middleware that this is a request to.
        self.itself = itself
        self.session: Any = environ["sa_wsgi_session.session"]
        self.scope: Any = environ["sa_wsgi_session.scope"]
        self.number = environ["QUERY_STRING"]
        self._start_response = start_response

    def row(self, name: str = "") -> Row:
        return Row(label=self.number + name)

    def add(self, name: str = "") -> None:
        self.session.add(self.row(name))

    def start(self, status: str = "200 OK", *headers: tuple[str, str], exc_info: Any = None) -> Any:
        return self._start_response(status, [("Content-Type", "text/plain"), *headers], exc_info)

    def answer(self, body: bytes = DONE, status: str = "200 OK") -> list[bytes]:
        self.start(status, ("Content-Length", str(len(body))))
        return [body]


# -- a list is answered -----------------------------------------------------------------------------------------------


@view
def nothing(call: Call) -> Iterable[bytes]:
    return call.answer()


@view
def reads(call: Call) -> Iterable[bytes]:
    rows = call.session.execute(select(Row).where(Row.id <= SEEDS)).scalars().all()
    return call.answer(str(len(rows)).encode())


@view
def writes(call: Call) -> Iterable[bytes]:
    call.add()
    return call.answer(status="201 Created")


@view
def refused(call: Call) -> Iterable[bytes]:
    call.add()
    call.session.flush()
    return call.answer(status="409 Conflict")


@view
def swallows_an_error(call: Call) -> Iterable[bytes]:
    call.add()
    call.session.flush()
    call.session.add(Row(label="seed 1"))
    try:
        call.session.flush()
    except IntegrityError:
        return call.answer()  # a lie
    return call.answer(b"nothing was raised")


@view
def fails(call: Call) -> Iterable[bytes]:
    call.add()
    call.session.flush()
    raise Failed(call.number)


@view
def fails_to_commit(call: Call) -> Iterable[bytes]:
    call.add()
    call.session.add(Child(row_id=-1))
    call.session.flush()
    return call.answer()


@view
def answers_again(call: Call) -> Iterable[bytes]:
    call.add()
    call.start()
    try:
        call.session.flush()
        raise Failed(call.number)
    except Failed as error:
        call.start("500 Internal Server Error", exc_info=(type(error), error, error.__traceback__))
    return [b"an error page"]


# -- the answer is streamed -------------------------------------------------------------------------------------------


@view
def streams_a_result(call: Call) -> Iterable[bytes]:
    labels = call.session.execute(select(Row.label).where(Row.id <= SEEDS))
    call.start()
    return (label.partition(" ")[0].encode() + b"\n" for (label,) in labels)


@view
def writes_and_streams_a_result(call: Call) -> Iterable[bytes]:
    """It is warned of: with the commit the rest of the result may be lost."""
    call.add()
    # Of no table: as long as a result of one is open, even after the commit, SQLite shows its connection the database
    # of back then, and refuses to write to that of today, whoever the pool has given the connection to by then.
    numbers = call.session.execute(text("SELECT 1"))
    call.start()

    def body() -> Iterator[bytes]:
        yield FIRST
        numbers.close()
        yield REST

    return body()


def _two_chunks(call: Call) -> Iterator[bytes]:
    yield FIRST
    call.add("-body")
    yield REST


def _two_chunks_and_a_failure(call: Call) -> Iterator[bytes]:
    yield FIRST
    call.add("-body")
    call.session.flush()
    raise Failed(call.number)


@view
def streams_and_writes(call: Call) -> Iterable[bytes]:
    call.add()
    call.start()
    return _two_chunks(call)


@view
def breaks_in_the_body(call: Call) -> Iterable[bytes]:
    call.add()
    call.start()
    return _two_chunks_and_a_failure(call)


@view
def commits_at_the_end(call: Call) -> Iterable[bytes]:
    call.scope.commit_at = "end"
    return streams_and_writes(call)


@view
def breaks_before_the_end(call: Call) -> Iterable[bytes]:
    call.scope.commit_at = "end"
    return breaks_in_the_body(call)


@view
def uses_write(call: Call) -> Iterable[bytes]:
    call.add()
    write = call.start()
    write(FIRST)
    call.add("-later")
    return [REST]


@view
def sends_a_file(call: Call) -> Iterable[bytes]:
    call.add()
    return _file(call, SMALL_FILE)


def _file(call: Call, name: str) -> Iterable[bytes]:
    path = call.folder / name
    call.start("200 OK", ("Content-Length", str(path.stat().st_size)))
    wrapper = call.environ.get("wsgi.file_wrapper", FileWrapper)
    # The server closes it.
    return wrapper(path.open("rb"), 65536)


@view
def answers_a_head(call: Call) -> Iterable[bytes]:
    call.add()
    call.start()
    return iter([FIRST, REST])


# -- the client sends something, races are lost -----------------------------------------------------------------------


@view
def receives(call: Call) -> Iterable[bytes]:
    call.add()
    call.session.flush()
    length = int(call.environ["CONTENT_LENGTH"])
    content = call.environ["wsgi.input"].read(length)
    if len(content) < length:
        raise Failed("the client has left")
    return call.answer(receipt(content))


@view
def receives_again(call: Call) -> Iterable[bytes]:
    answer = receives(call)
    if call.scope.attempt == 1:
        raise Again
    return answer


@view
def loses_a_race(call: Call) -> Iterable[bytes]:
    call.add()
    call.session.flush()
    if call.scope.attempt < 3:
        raise StaleDataError("provoked")
    return call.answer()


@view
def runs_a_race(call: Call) -> Iterable[bytes]:
    _add_one(call)
    return call.answer()


@view
def answers_a_lost_race(call: Call) -> Iterable[bytes]:
    try:
        _add_one(call)
    except DBAPIError:
        # An application, or its framework, that has a page for everything.
        return call.answer(status="503 Service Unavailable")
    return call.answer()


def _add_one(call: Call) -> None:
    """Whoever has read before another one writes has lost: SQLite refuses it."""
    number = call.session.get(Number, 1)
    if call.scope.attempt == 1:
        time.sleep(0.002)  # for others to come in between
    number.value += 1
    call.add()
    call.session.flush()


# -- units of work within it ------------------------------------------------------------------------------------------


@view
def nests(call: Call) -> Iterable[bytes]:
    call.add()
    with session_scope(call.session, propagation="nested"):
        call.add("-kept")
    try:
        with session_scope(call.session, propagation="nested"):
            call.add("-undone")
            call.session.flush()
            raise Failed(call.number)
    except Failed:
        pass
    return call.answer()


def _independent(call: Call) -> None:
    # First: the other transaction could not write as long as this one has.
    with session_scope(call.session, propagation="requires_new") as session:
        session.add(call.row("-independent"))


@view
def is_independent(call: Call) -> Iterable[bytes]:
    _independent(call)
    call.add()
    return call.answer()


@view
def is_independent_and_fails(call: Call) -> Iterable[bytes]:
    _independent(call)
    return refused(call)


@view
def joins(call: Call) -> Iterable[bytes]:
    call.add()

    @with_session(call.session)
    def job(*, session: Any) -> None:
        session.add(call.row("-joined"))

    job()
    return call.answer()


@view
def calls_back(call: Call) -> Iterable[bytes]:
    call.add()
    call.scope.on_commit(lambda: _call_back(call))
    call.scope.on_rollback(lambda: TALLY.add("wrong callbacks"))
    return call.answer()


def _call_back(call: Call) -> None:
    with session_scope(call.session) as session:
        session.add(call.row("-callback"))


@view
def calls_back_and_fails(call: Call) -> Iterable[bytes]:
    """What a callback raises is logged, and that is all."""
    call.add()
    call.scope.on_commit(fail_in_a_callback)
    return call.answer()


def fail_in_a_callback() -> None:
    TALLY.add("failed callbacks")
    raise Failed("in a callback")


@view
def calls_back_a_rollback(call: Call) -> Iterable[bytes]:
    call.scope.on_rollback(lambda: _call_back(call))
    call.scope.on_commit(lambda: TALLY.add("wrong callbacks"))
    return refused(call)


@view
def dooms(call: Call) -> Iterable[bytes]:
    call.add()
    call.session.flush()
    call.scope.doom("a dry run")
    return call.answer()


@view
def asks_itself(call: Call) -> Iterable[bytes]:
    """The request inside has a transaction of its own."""
    environ = call.environ.copy()
    del environ["sa_wsgi_session.scope"]
    return _ask(call, environ)


@view
def asks_a_copy(call: Call) -> Iterable[bytes]:
    """The request inside joins."""
    return _ask(call, call.environ.copy())


def _ask(call: Call, environ: dict[str, Any]) -> Iterable[bytes]:
    environ["PATH_INFO"] = "/streams_and_writes_inside"
    body = call.itself(environ, lambda status, headers, exc_info=None: None)
    try:
        content = b"".join(body)
    finally:
        body.close()
    call.add()
    return call.answer(DONE if content == FIRST else content)


@view
def streams_and_writes_inside(call: Call) -> Iterable[bytes]:
    call.start()

    def body() -> Iterator[bytes]:
        call.add("-inside")
        call.session.flush()
        yield FIRST

    return body()


@view
def commits_itself(call: Call) -> Iterable[bytes]:
    call.add("-before")
    call.session.commit()
    call.add("-undone")
    call.session.flush()
    call.session.rollback()
    call.add()
    return call.answer()


@view
def removes(call: Call) -> Iterable[bytes]:
    call.add("-before")
    call.session.commit()
    call.add("-undone")
    call.session.flush()
    call.session.remove()
    call.add()
    return call.answer()


# -- the client will hang up ------------------------------------------------------------------------------------------


def _without_an_end(then: Callable[[], object]) -> Iterator[bytes]:
    try:
        yield FIRST
        then()
        for _ in range(NEVER):
            yield CHUNK
    except GeneratorExit:
        TALLY.add("cut off")
        raise
    TALLY.add("endless ones read to their end")


def _write_to_body(call: Call) -> None:
    call.add("-body")
    call.session.flush()


@view
def is_endless(call: Call) -> Iterable[bytes]:
    call.add()
    call.start()
    return _without_an_end(lambda: _write_to_body(call))


@view
def reads_without_an_end(call: Call) -> Iterable[bytes]:
    """The result stays open as long as the answer is streamed, and then is forgotten."""
    labels = call.session.execute(select(Row.label))
    call.start()
    return _without_an_end(lambda: next(labels))


@view
def never_commits_at_the_end(call: Call) -> Iterable[bytes]:
    call.scope.commit_at = "end"
    return is_endless(call)


@view
def writes_without_an_end(call: Call) -> Iterable[bytes]:
    call.add()
    write = call.start()
    write(FIRST)
    call.add("-later")
    call.session.flush()
    try:
        for _ in range(NEVER):
            write(CHUNK)
    except Exception:
        TALLY.add("cut off")
        raise
    TALLY.add("endless ones read to their end")
    return []


@view
def sends_a_large_file(call: Call) -> Iterable[bytes]:
    call.add()
    return _file(call, LARGE_FILE)


def make_stacks(engine: Engine, folder: Path) -> dict[str, SessionMiddleware]:
    """The application behind a middleware, for each registry, with and without a retry policy."""
    # Whatever is lost, it is won in the end: all attempts of a request would have to lose.
    policy = RetryPolicy(
        50, delay=0.001, max_delay=0.02, deadline=60, is_transient=lambda error: isinstance(error, Again)
    )
    stacks: dict[str, SessionMiddleware] = {}
    for name, session in (
        ("thread-local", scoped_session(sessionmaker(engine))),
        ("contextual", contextual_session(sessionmaker(engine))),
    ):
        stacks[name] = _stack(session, folder)
        stacks[f"{name}-retried"] = _stack(session, folder, retry=policy)
    return stacks


def _stack(session: Any, folder: Path, **options: Any) -> SessionMiddleware:
    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return VIEWS[environ["PATH_INFO"][1:]](Call(environ, start_response, folder, middleware))

    middleware = SessionMiddleware(application, session, **options)
    return middleware
