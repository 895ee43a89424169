"""Lost races: which requests are replayed, which never are, and what a replay is.

The races are real ones. ``lose`` alone has PostgreSQL raise what it raises where a race is lost; where the *way* to a
lost race matters, there is a rival who gets in between.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, PendingRollbackError
from sqlalchemy.orm import Session, declarative_base, scoped_session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError
from webob.request import DisconnectionError

from sa_wsgi_session import (
    NoActiveScope,
    RetryPolicy,
    RollbackOnlyError,
    SessionMiddleware,
    _watching,
    current_scope,
    session_scope,
    with_session,
)
from sa_wsgi_session._retry import LostRace
from tests.conftest import SQLALCHEMY_14
from tests.support import (
    PLAIN,
    Base,
    Body,
    Exchange,
    Note,
    World,
    Worlds,
    in_each_registry,
    is_in_a_scope,
    make_environ,
    request,
    respond,
)

#: Without pauses.
POLICY = RetryPolicy(delay=0)

CountersBase: Any = declarative_base()


class Counter(CountersBase):
    """A row that two change at the same time; SQLAlchemy notices by its version."""

    __tablename__ = "counter"
    id = sa.Column(sa.Integer, primary_key=True, autoincrement=False)
    value = sa.Column(sa.Integer, nullable=False, default=0)
    version = sa.Column(sa.Integer, nullable=False)
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


# -- the databases ----------------------------------------------------------------------------------------------------

POSTGRESQL = [
    """
    CREATE FUNCTION fail(code text) RETURNS integer LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'secret' USING ERRCODE = code; END $$
    """,
    """
    CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER die AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.text = 'fatal') EXECUTE FUNCTION die()
    """,
    """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'secret'; END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.text = 'refused') EXECUTE FUNCTION refuse()
    """,
]


def set_up(engine: Engine) -> None:
    """Two counters, and on PostgreSQL what fails when it is told to."""
    new = not sa.inspect(engine).has_table("counter")
    CountersBase.metadata.create_all(engine)
    with engine.begin() as connection:
        if new and engine.dialect.name == "postgresql":
            for statement in POSTGRESQL:
                connection.execute(sa.text(statement))
        connection.execute(sa.delete(Counter))
        connection.execute(sa.insert(Counter), [{"id": number, "value": 0, "version": 1} for number in (1, 2)])


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture) -> None:
    """Of whatever level, what is logged is kept."""
    caplog.set_level(logging.DEBUG, "sa_wsgi_session")


def world_of(database: str, registry: str = "thread-local") -> Any:
    """The fixture of a world on that database."""

    @pytest.fixture
    def world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
        with worlds.use(request.getfixturevalue, database, registry) as world:
            set_up(world.engine)
            yield world

    return world


sqlite_world = world_of("sqlite")
postgresql_world = world_of("postgresql")
mariadb_world = world_of("mariadb")


@pytest.fixture
def new_engine() -> Iterator[Callable[..., Engine]]:
    """Call it with a declarative base, and what ``create_engine`` takes: a new database in memory, with its tables."""
    engines: list[Engine] = []

    def create(base: Any, **options: Any) -> Engine:
        engines.append(sa.create_engine("sqlite://", **options))
        base.metadata.create_all(engines[-1])
        return engines[-1]

    yield create
    for engine in engines:
        engine.dispose()


@contextmanager
def rival(world: World, **options: Any) -> Iterator[Connection]:
    """Another user of the same database, whose transaction ends with the block. The middleware knows nothing of it."""
    engine = world._observer.execution_options(**options) if options else world._observer
    with engine.begin() as connection:
        yield connection


def count(connection: Any, counter: int) -> None:
    connection.execute(sa.text(f"UPDATE counter SET value = value + 1, version = version + 1 WHERE id = {counter}"))


def write(world: World, text: str) -> None:
    world.Session.add(Note(text=text))
    world.Session.flush()


# -- how a race is lost -----------------------------------------------------------------------------------------------


def lose(world: World, code: str = "40001") -> None:
    """PostgreSQL refuses the transaction."""
    world.Session.execute(sa.text("SELECT fail(:code)"), {"code": code})


def isolate(world: World, level: str) -> None:
    world.Session.connection(execution_options={"isolation_level": level})


def update_what_is_newer(world: World) -> None:
    """PostgreSQL, REPEATABLE READ: a row has changed since the transaction began."""
    isolate(world, "REPEATABLE READ")
    write(world, "lost")
    counter = world.Session.get(Counter, 1)
    with rival(world) as connection:
        count(connection, 1)
    counter.value += 1
    world.Session.flush()


def find_it_stale(world: World) -> None:
    """Any database: SQLAlchemy finds the version of a row gone."""
    write(world, "lost")
    counter = world.Session.get(Counter, 1)
    if world.engine.dialect.name == "sqlite":  # where two can't be in this at once
        count(world.Session.connection(), 1)
    else:
        with rival(world) as connection:
            count(connection, 1)
    counter.value += 1
    world.Session.flush()


def deadlock(world: World) -> None:
    """PostgreSQL and MariaDB: two lock two rows in opposite order; the other one wins."""
    session = world.Session
    is_postgresql = world.engine.dialect.name == "postgresql"
    write(world, "lost")
    count(session, 1)
    locked = threading.Event()

    def win() -> None:
        try:
            with rival(world) as connection:
                if is_postgresql:
                    connection.execute(sa.text("SET LOCAL deadlock_timeout = '1h'"))
                # To MariaDB, who has changed less is the victim.
                connection.execute(sa.text("DELETE FROM counter WHERE id >= 100"))
                connection.execute(sa.insert(Counter), [{"id": number, "version": 1} for number in range(100, 120)])
                count(connection, 2)
                locked.set()
                count(connection, 1)
        finally:
            locked.set()

    thread = threading.Thread(target=win)
    thread.start()
    try:
        locked.wait()
        if is_postgresql:
            # Whose time is up looks for a deadlock once: the other one must be waiting by then.
            while not session.execute(sa.text("SELECT 1 FROM pg_locks WHERE NOT granted")).all():
                pass
            session.execute(sa.text("SET LOCAL deadlock_timeout = '1ms'"))
        count(session, 2)
    finally:
        if sys.exc_info()[1] is None:
            session.rollback()
        thread.join()


def lose_the_connection(world: World) -> None:
    """PostgreSQL: noticed by the next statement."""
    write(world, "lost")
    kill(world)
    world.Session.execute(sa.text("SELECT 1"))


def kill(world: World, session: Any = None) -> None:
    """Have the connection of the session ended by PostgreSQL."""
    session = session or world.Session
    pid = session.execute(sa.text("SELECT pg_backend_pid()")).scalar()
    with rival(world) as connection:
        assert connection.execute(sa.text(f"SELECT pg_terminate_backend({pid}, 60000)")).scalar()


def find_it_locked(world: World) -> None:
    """MariaDB: somebody else has the lock."""
    write(world, "lost")
    with rival(world) as connection:
        count(connection, 1)
        world.Session.execute(sa.text("SELECT value FROM counter WHERE id = 1 FOR UPDATE NOWAIT"))


def find_it_busy(world: World) -> None:
    """SQLite: somebody else is writing."""
    world.Session.execute(sa.text("PRAGMA busy_timeout = 0"))
    with rival(world) as connection:
        count(connection, 1)
        write(world, "lost")


def lose_at_commit(world: World) -> None:
    """PostgreSQL, SERIALIZABLE: nobody knows of the conflict until the transaction is committed."""
    everything = sa.select(sa.func.count()).select_from(Note)
    isolate(world, "SERIALIZABLE")
    world.Session.execute(everything)
    write(world, "lost")
    with rival(world, isolation_level="SERIALIZABLE") as connection:
        connection.execute(everything)
        connection.execute(sa.insert(Note).values(text="rival"))


#: By database.
RACES: dict[str, list[Callable[[World], None]]] = {
    "sqlite": [find_it_busy, find_it_stale],
    "postgresql": [lose, update_what_is_newer, find_it_stale, deadlock, lose_the_connection, lose_at_commit],
    "mariadb": [find_it_stale, deadlock, find_it_locked],
}


@pytest.fixture(
    params=[(database, race) for database, races in RACES.items() for race in races],
    ids=[f"{database}-{race.__name__}" for database, races in RACES.items() for race in races],
)
def lost_race(request: pytest.FixtureRequest) -> tuple[World, Callable[[World], None]]:
    """A race that is lost, and where."""
    database, race = request.param
    return request.getfixturevalue(f"{database}_world"), race


# -- applications -----------------------------------------------------------------------------------------------------


class Tried:
    """An application under a policy, and which attempts there were at its view.

    :param view: returns the body.
    """

    def __init__(
        self, world: World, view: Callable[[], Any], make_app: Callable[[Any], Any] = respond, **options: Any
    ) -> None:
        self.attempts: list[int] = []

        def counted() -> Any:
            self.attempts.append(current_scope().attempt)
            return view()

        self.app = SessionMiddleware(make_app(counted), world.Session, **{"retry": POLICY, **options})

    def answers(self, **environ: Any) -> Exchange:
        """The answer, which is the first and only one that the server is told."""
        exchange = request(self.app, **environ)
        assert len(exchange.statuses) == 1
        return exchange

    def raises(self, kind: type[BaseException], match: str | None = None) -> BaseException:
        """What it raises instead of an answer."""
        told: list[str] = []
        with pytest.raises(kind, match=match) as raised:
            Exchange(self.app, on_start=told.append)
        assert told == []
        return raised.value


def first(world: World, lose: Callable[[World], object]) -> Callable[[], list[bytes]]:
    """A view whose first attempt loses a race, and whose others do not."""

    def view() -> list[bytes]:
        attempt = current_scope().attempt
        if attempt == 1:
            lose(world)
        else:
            write(world, f"attempt {attempt}")
        return [b"done"]

    return view


def framework(view: Callable[[], Any], handle: Callable[[], object] = lambda: None, status: str = "500 Oops") -> Any:
    """An application that makes a page of each exception, as those of frameworks do."""

    def app(environ: Any, start_response: Any) -> Any:
        try:
            body = view()
        except Exception:
            handle()
            start_response(status, PLAIN, sys.exc_info())
            return [b"sorry"]
        start_response("200 OK", PLAIN)
        return body

    return app


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- what is replayed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
def test_who_has_lost_a_race_gets_the_answer_of_the_second_attempt(
    lost_race: tuple[World, Callable[[World], None]], make_app: Any
) -> None:
    world, lose = lost_race
    tried = Tried(world, first(world, lose), make_app)
    exchange = tried.answers()
    assert (exchange.status, exchange.content) == ("200 OK", b"done")
    assert tried.attempts == [1, 2]
    assert [text for text in world.durable() if text != "rival"] == ["attempt 2"]


@in_each_registry
@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
def test_a_race_is_replayed_with_every_registry(world: World, make_app: Any) -> None:
    set_up(world.engine)
    tried = Tried(world, first(world, find_it_stale), make_app)
    assert tried.answers().content == b"done"
    assert tried.attempts == [1, 2]
    assert world.durable() == ["attempt 2"]


def test_a_third_attempt_follows_where_the_second_has_lost_too(postgresql_world: World) -> None:
    def view() -> list[bytes]:
        attempt = current_scope().attempt
        write(postgresql_world, f"attempt {attempt}")
        if attempt < 3:
            lose(postgresql_world)
        return [b"done"]

    tried = Tried(postgresql_world, view)
    assert tried.answers().content == b"done"
    assert tried.attempts == [1, 2, 3]
    assert postgresql_world.durable() == ["attempt 3"]


class Failure(Exception):
    """The application's own."""


def give_up() -> NoReturn:
    """Raise it, with what is being handled as its context, and no cause."""
    raise Failure


def wrap(world: World) -> None:
    try:
        lose(world)
    except DBAPIError as error:
        raise Failure from error


def wrap_and_hide(world: World) -> None:
    try:
        lose(world)
    except DBAPIError:
        raise Failure from None


def swallow(world: World) -> None:
    with suppress(DBAPIError):
        lose(world)


def swallow_and_fail(world: World) -> None:
    swallow(world)
    raise Failure


def swallow_and_go_on(world: World) -> None:
    """What PostgreSQL answers then is InFailedSqlTransaction."""
    swallow(world)
    world.Session.execute(sa.text("SELECT 1"))


def swallow_a_flush_and_go_on(world: World) -> None:
    """What SQLAlchemy answers then is PendingRollbackError."""
    with suppress(DBAPIError):
        update_what_is_newer(world)
    with pytest.raises(PendingRollbackError):
        world.Session.execute(sa.text("SELECT 1"))
    world.Session.execute(sa.text("SELECT 1"))


def swallow_stale_data(world: World) -> None:
    with suppress(StaleDataError):
        find_it_stale(world)


def swallow_stale_data_and_fail(world: World) -> None:
    swallow_stale_data(world)
    raise Failure


def swallow_a_deadlock_of_a_flush(world: World) -> None:
    with suppress(DBAPIError):
        update_what_is_newer(world)


def roll_back_and_raise(world: World) -> None:
    try:
        lose(world)
    except DBAPIError:
        world.Session.rollback()
        raise


def roll_back_and_wrap(world: World) -> None:
    try:
        lose(world)
    except DBAPIError as error:
        world.Session.rollback()
        raise Failure from error


def roll_back_and_wrap_twice(world: World) -> None:
    try:
        roll_back_and_wrap(world)
    except Failure:
        raise LookupError from None


def commit_and_lose(world: World) -> None:
    lose_at_commit(world)
    world.Session.commit()


def lose_within_a_joined_block(world: World) -> None:
    with session_scope(world.Session):
        lose(world)


def lose_within_a_savepoint(world: World) -> None:
    with session_scope(world.Session, propagation="nested"):
        lose(world)


def lose_in_a_unit_of_its_own(world: World) -> None:
    with session_scope(world.Session, propagation="requires_new"):
        lose(world)


def swallow_in_a_unit_of_its_own(world: World) -> None:
    """What that commits then is refused, with another error."""
    with session_scope(world.Session, propagation="requires_new"):
        swallow(world)


def swallow_stale_data_in_a_unit_of_its_own(world: World) -> None:
    with session_scope(world.Session, propagation="requires_new"):
        swallow_stale_data(world)


def swallow_and_fail_in_a_unit_of_its_own(world: World) -> None:
    """With an exception of Python's own, which nobody can refer to weakly."""
    with session_scope(world.Session, propagation="requires_new"):
        swallow(world)
        raise ValueError


def lose_within_a_savepoint_and_then_the_connection(world: World) -> None:
    """Of which nobody hears; but what had been done before the SAVEPOINT is gone with the connection."""
    write(world, "lost")
    pid = world.Session.execute(sa.text("SELECT pg_backend_pid()")).scalar()
    with suppress(DBAPIError), world.Session.begin_nested():
        swallow(world)
        with rival(world) as connection:
            connection.execute(sa.text(f"SELECT pg_terminate_backend({pid}, 60000)"))
        world.Session.execute(sa.text("SELECT 1"))
    raise Failure


def lose_on_a_second_connection(world: World) -> None:
    with world.engine.connect() as connection:
        connection.execute(sa.text("SELECT fail('40P01')"))


@pytest.mark.parametrize(
    "lose_somehow",
    [
        wrap,
        wrap_and_hide,
        swallow,
        swallow_and_fail,
        swallow_and_go_on,
        swallow_a_flush_and_go_on,
        swallow_stale_data,
        swallow_stale_data_and_fail,
        swallow_a_deadlock_of_a_flush,
        roll_back_and_raise,
        roll_back_and_wrap,
        roll_back_and_wrap_twice,
        commit_and_lose,
        lose_within_a_joined_block,
        lose_within_a_savepoint,
        lose_in_a_unit_of_its_own,
        swallow_in_a_unit_of_its_own,
        swallow_stale_data_in_a_unit_of_its_own,
        swallow_and_fail_in_a_unit_of_its_own,
        lose_within_a_savepoint_and_then_the_connection,
        lose_on_a_second_connection,
    ],
)
def test_a_lost_race_is_noticed_whatever_the_application_makes_of_it(
    postgresql_world: World, lose_somehow: Callable[[World], None]
) -> None:
    tried = Tried(postgresql_world, first(postgresql_world, lose_somehow))
    assert tried.answers().content == b"done"
    assert tried.attempts == [1, 2]
    assert set(postgresql_world.durable()) - {"rival"} == {"attempt 2"}


@pytest.mark.parametrize("again", [False, True])
def test_a_part_that_has_lost_a_race_and_is_dealt_with_is_no_lost_race(postgresql_world: World, again: bool) -> None:
    def view() -> list[bytes]:
        write(postgresql_world, "view")
        with suppress(RollbackOnlyError):
            swallow_in_a_unit_of_its_own(postgresql_world)
        if again:  # what fails later has nothing to do with it
            raise Failure
        return [b"done"]

    tried = Tried(postgresql_world, view)
    if again:
        with pytest.raises(Failure):
            tried.answers()
    else:
        assert tried.answers().content == b"done"
    assert tried.attempts == [1]
    assert postgresql_world.durable() == ([] if again else ["view"])


@pytest.mark.parametrize(
    "handle",
    [
        lambda Session: None,
        lambda Session: Session.rollback(),
        lambda Session: (Session.rollback(), Session.get(Counter, 1)),
        lambda Session: Session.remove(),
        lambda Session: (Session.remove(), Session.get(Counter, 1)),
        lambda Session: Session.close(),
    ],
    ids=["nothing", "rollback", "rollback and query", "remove", "remove and query", "close"],
)
@pytest.mark.parametrize(
    "lose_somehow",
    [lose, find_it_stale, lose_the_connection, commit_and_lose, swallow_and_go_on, lose_within_a_savepoint],
)
def test_a_lost_race_is_noticed_by_the_error_page_whatever_is_done_for_that(
    postgresql_world: World, lose_somehow: Callable[[World], None], handle: Callable[[Any], object]
) -> None:
    world = postgresql_world
    tried = Tried(world, first(world, lose_somehow), lambda view: framework(view, lambda: handle(world.Session)))
    assert tried.answers().status == "200 OK"
    assert tried.attempts == [1, 2]
    assert set(world.durable()) - {"rival"} == {"attempt 2"}


def test_a_lost_race_is_noticed_by_an_error_page_that_streams(postgresql_world: World) -> None:
    bodies: list[Body] = []

    def app(environ: Any, start_response: Any) -> Any:
        if current_scope().attempt == 1:
            swallow(postgresql_world)
        bodies.append(Body([b"page"], lambda: postgresql_world.Session.rollback()))
        start_response("503 Oops" if current_scope().attempt == 1 else "200 OK", PLAIN)
        return bodies[-1]

    exchange = request(SessionMiddleware(app, postgresql_world.Session, retry=POLICY))
    assert exchange.statuses == ["200 OK"]
    assert [body.closed for body in bodies] == [1, 1]


@pytest.mark.parametrize("lose_somehow", [lose, swallow, lose_at_commit, lose_the_connection, find_it_stale])
@pytest.mark.parametrize("started", [False, True])
def test_a_generator_application_that_loses_before_its_first_chunk_begins_anew(
    postgresql_world: World, lose_somehow: Callable[[World], None], started: bool
) -> None:
    view = first(postgresql_world, lose_somehow)

    def app(environ: Any, start_response: Any) -> Any:
        if started:
            start_response("200 OK", PLAIN)
        chunks = view()
        if not started:
            start_response("200 OK", PLAIN)
        yield from chunks

    exchange = request(SessionMiddleware(app, postgresql_world.Session, retry=POLICY))
    assert (exchange.statuses, exchange.content) == (["200 OK"], b"done")
    assert set(postgresql_world.durable()) - {"rival"} == {"attempt 2"}


def test_a_race_that_is_lost_in_the_last_flush_before_a_stream_is_replayed(sqlite_world: World) -> None:
    def view() -> Any:
        session = sqlite_world.Session()
        counter = session.get(Counter, 1)
        if current_scope().attempt == 1:
            count(session, 1)
        rows = session.execute(sa.text("SELECT 1 UNION SELECT 2"))
        # After the query, which would flush it; with a result open, the middleware does so before the commit.
        counter.value += 1
        return (b"%d" % row[0] for row in rows)

    tried = Tried(sqlite_world, view)
    tried.answers()
    assert tried.attempts == [1, 2]


@pytest.mark.parametrize("lose_somehow", [swallow, lose_at_commit, swallow_stale_data])
def test_a_body_that_would_stream_is_closed_and_made_anew_where_the_commit_before_it_loses(
    postgresql_world: World, lose_somehow: Callable[[World], None]
) -> None:
    view = first(postgresql_world, lose_somehow)
    bodies: list[Body] = []
    sessions: list[Any] = []

    def streaming() -> Body:
        sessions.append(postgresql_world.Session())
        bodies.append(Body(view(), lambda: sessions.append(postgresql_world.Session())))
        return bodies[-1]

    tried = Tried(postgresql_world, streaming)
    assert tried.answers().content == b"done"
    assert [body.closed for body in bodies] == [1, 1]
    # Each was closed with the session of its own attempt.
    assert sessions[0] is sessions[1] is not sessions[2] is sessions[3]
    assert set(postgresql_world.durable()) - {"rival"} == {"attempt 2"}


def test_what_a_swallowed_deadlock_has_undone_is_done_anew_and_never_half(mariadb_world: World) -> None:
    """MariaDB has rolled all back, and would commit what came after the deadlock."""

    def view() -> list[bytes]:
        attempt = current_scope().attempt
        write(mariadb_world, f"first half of {attempt}")
        if attempt == 1:
            with suppress(DBAPIError):
                deadlock(mariadb_world)
        write(mariadb_world, f"second half of {attempt}")
        return [b"done"]

    tried = Tried(mariadb_world, view)
    assert tried.answers().content == b"done"
    assert tried.attempts == [1, 2]
    assert mariadb_world.durable() == ["first half of 2", "second half of 2"]

    with mariadb_world.engine.begin() as connection:
        connection.execute(sa.delete(Note))
    without = Tried(mariadb_world, view, retry=None)
    without.raises(RollbackOnlyError, "1213")
    assert without.attempts == [1]
    assert mariadb_world.durable() == []


def test_a_connection_that_was_lost_between_two_requests_is_replaced(postgresql_world: World) -> None:
    """The pool has not noticed; the first statement does."""

    def view() -> list[bytes]:
        if not killed:
            killed.append(True)
            return [b"%d" % postgresql_world.Session.execute(sa.text("SELECT pg_backend_pid()")).scalar()]
        write(postgresql_world, f"attempt {current_scope().attempt}")
        return [b"done"]

    killed: list[bool] = []
    tried = Tried(postgresql_world, view)
    postgresql_world.engine.dispose()  # so that the pool has no other connection to give
    pid = int(tried.answers().content)
    with rival(postgresql_world) as connection:
        connection.execute(sa.text(f"SELECT pg_terminate_backend({pid}, 60000)"))
    assert tried.answers().content == b"done"
    assert tried.attempts == [1, 1, 2]
    assert postgresql_world.durable() == ["attempt 2"]


def roll_back_on_a_second_connection(world: World) -> None:
    with world.engine.connect() as connection:
        transaction = connection.begin()
        connection.execute(sa.insert(Note).values(text="undone"))
        connection.execute(sa.insert(Note).values(text="undone too"))
        transaction.rollback()


def read_on_a_second_connection(world: World) -> None:
    with world.engine.begin() as connection:
        connection.execute(sa.select(Note.text)).all()
        connection.execute(sa.text("SELECT value FROM counter FOR UPDATE"))


def commit_what_was_read(world: World) -> None:
    world.Session.get(Counter, 1)
    world.Session.commit()


def roll_back(world: World) -> None:
    write(world, "undone")
    world.Session.rollback()


def release_a_savepoint(world: World) -> None:
    with session_scope(world.Session, propagation="nested"):
        write(world, "undone")
    with world.Session.begin_nested():
        write(world, "undone too")


def roll_back_a_unit_of_its_own(world: World) -> None:
    with suppress(Failure), session_scope(world.Session, propagation="requires_new"):
        write(world, "undone")
        raise Failure


def read_in_a_unit_of_its_own(world: World) -> None:
    with session_scope(world.Session, propagation="requires_new"):
        world.Session.get(Counter, 1)


def read_in_another_session(world: World) -> None:
    with Session(world.engine) as session:
        session.get(Counter, 1)
        session.commit()


def roll_back_another_session(world: World) -> None:
    with Session(world.engine) as session:
        session.add(Note(text="undone"))
        session.flush()


@pytest.mark.parametrize(
    "do",
    [
        roll_back_on_a_second_connection,
        read_on_a_second_connection,
        commit_what_was_read,
        roll_back,
        release_a_savepoint,
        roll_back_a_unit_of_its_own,
        roll_back_another_session,
        read_in_a_unit_of_its_own,
        read_in_another_session,
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["before", "within"])
def test_an_attempt_of_which_nothing_is_durable_is_replayed(
    postgresql_world: World, do: Callable[[World], None], before: bool
) -> None:
    def view() -> list[bytes]:
        if not before:
            postgresql_world.Session.execute(sa.text("SELECT 1"))
        if current_scope().attempt == 1:
            do(postgresql_world)
            lose(postgresql_world)
        return [b"done"]

    tried = Tried(postgresql_world, view)
    assert tried.answers().content == b"done"
    assert tried.attempts == [1, 2]
    assert postgresql_world.durable() == []


# -- what is never replayed: an unknown outcome -----------------------------------------------------------------------


def is_unknown(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether that, and nothing else, was the warning."""
    (warning,) = warnings_of(caplog)
    return "unknown" in warning and "not replayed" in warning


def test_a_connection_that_is_lost_between_flush_and_commit_is_no_reason_to_begin_anew(
    postgresql_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the COMMIT that notices; and what becomes of a COMMIT without an answer, nobody knows."""

    def view() -> list[bytes]:
        write(postgresql_world, "lost")
        kill(postgresql_world)
        return [b"done"]

    tried = Tried(postgresql_world, view)
    error = tried.raises(OperationalError)
    assert getattr(error, "connection_invalidated", False)
    assert tried.attempts == [1]
    assert is_unknown(caplog)
    assert postgresql_world.durable() == []


@pytest.mark.parametrize("body", ["list", "stream"])
def test_a_connection_that_is_lost_at_commit_is_no_reason_to_begin_anew(
    postgresql_world: World, caplog: pytest.LogCaptureFixture, body: str
) -> None:
    def view() -> Any:
        write(postgresql_world, "fatal")
        return [b"done"] if body == "list" else iter([b"done"])

    tried = Tried(postgresql_world, view)
    tried.raises(OperationalError)
    assert tried.attempts == [1]
    assert is_unknown(caplog)
    assert postgresql_world.durable() == []


@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
@pytest.mark.parametrize("handle", ["nothing", "rollback", "rollback and work"])
def test_a_connection_that_is_lost_at_the_commit_of_the_application_is_no_reason_to_begin_anew(
    postgresql_world: World, caplog: pytest.LogCaptureFixture, make_app: Any, handle: str
) -> None:
    def view() -> Any:
        write(postgresql_world, "fatal")
        try:
            postgresql_world.Session.commit()
        except DBAPIError:
            if handle != "nothing":
                postgresql_world.Session.rollback()
            if handle == "rollback and work":
                write(postgresql_world, "more")
            raise

    tried = Tried(postgresql_world, view, make_app)
    if make_app is respond:
        tried.raises(OperationalError)
    else:
        assert tried.answers().status == "500 Oops"
    assert tried.attempts == [1]
    assert postgresql_world.durable() == []
    if handle != "rollback and work":
        assert is_unknown(caplog)


def test_a_connection_that_is_lost_at_a_commit_is_unknown_even_if_a_lost_race_follows(
    postgresql_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def view() -> Any:
        write(postgresql_world, "fatal")
        with suppress(DBAPIError):
            postgresql_world.Session.commit()
        postgresql_world.Session.rollback()
        lose(postgresql_world)

    tried = Tried(postgresql_world, view)
    tried.raises(OperationalError)
    assert tried.attempts == [1]
    assert is_unknown(caplog)


@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
def test_what_the_database_itself_does_not_know_is_not_replayed(
    postgresql_world: World, caplog: pytest.LogCaptureFixture, make_app: Any
) -> None:
    """SQLSTATE 40003, statement_completion_unknown."""
    tried = Tried(postgresql_world, lambda: lose(postgresql_world, "40003"), make_app)
    if make_app is respond:
        tried.raises(DBAPIError)
    else:
        assert tried.answers().status == "500 Oops"
    assert tried.attempts == [1]
    assert is_unknown(caplog)


class Wire:
    """A wire to a database, which can be made to break when COMMIT is sent: before the answer comes back."""

    def __init__(self, url: URL) -> None:
        self._address: Any = (url.host, url.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = url.set(host="127.0.0.1", port=self._listener.getsockname()[1])
        self.breaks = False
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._connect, args=(client,)))
                self._threads[-1].start()

    def _connect(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._address) as server, suppress(ConnectionError):
            while True:
                for sender in select.select([client, server], [], [])[0]:
                    data = sender.recv(65536)
                    if not data:
                        return
                    (server if sender is client else client).sendall(data)
                    if self.breaks and sender is client and b"COMMIT" in data:
                        self.breaks = False
                        server.recv(65536)  # it has answered
                        return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_a_commit_whose_answer_is_lost_is_not_done_twice(
    request: pytest.FixtureRequest, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Wire(request.getfixturevalue(f"{database}_url"))) as wire, closing(World(wire.url)) as world:

        def view() -> list[bytes]:
            attempt = current_scope().attempt
            write(world, f"attempt {attempt}")
            wire.breaks = attempt == 1
            return [b"done"]

        tried = Tried(world, view)
        tried.raises(OperationalError)
        assert tried.attempts == [1]
        assert is_unknown(caplog)
        assert world.checked_out == 0
        assert world.durable() == ["attempt 1"]


# -- what is never replayed: what is durable already ------------------------------------------------------------------


def commit(world: World) -> None:
    write(world, "durable")
    world.Session.commit()


def commit_without_a_flush(world: World) -> None:
    world.Session.add(Note(text="durable"))
    world.Session.commit()


def commit_in_a_unit_of_its_own(world: World) -> None:
    with session_scope(world.Session, propagation="requires_new"):
        write(world, "durable")


def commit_in_a_job(world: World) -> None:
    @with_session(world.Session, propagation="requires_new", retry=POLICY)
    def job(*, session: Any) -> None:
        session.add(Note(text="durable"))

    job()


def commit_in_another_session(world: World) -> None:
    with Session(world.engine) as session:
        session.add(Note(text="durable"))
        session.commit()


INSERT = sa.insert(Note).values(text="durable")


def commit_on_a_second_connection(world: World) -> None:
    with world.engine.begin() as connection:
        connection.execute(INSERT)


def commit_many_on_a_second_connection(world: World) -> None:
    with world.engine.begin() as connection:
        connection.execute(sa.insert(Note), [{"text": "durable"}, {"text": "durable too"}])


def commit_by_autocommit(world: World) -> None:
    with world.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(INSERT)


def commit_by_an_autocommit_engine(world: World) -> None:
    with world.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(INSERT)


def commit_by_an_autocommit_session(world: World) -> None:
    isolate(world, "AUTOCOMMIT")
    write(world, "durable")


def commit_in_two_phases(world: World) -> None:
    with world.engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(INSERT)
        transaction.prepare()
        transaction.commit()


def commit_a_savepoint_and_all(world: World) -> None:
    with world.engine.begin() as connection, connection.begin_nested():
        connection.execute(INSERT)


def commit_the_connection_of_the_session(world: World) -> None:
    write(world, "durable")
    transaction = world.Session.connection().get_transaction()
    assert transaction is not None
    transaction.commit()


def commit_by_hand(world: World) -> None:
    world.Session.execute(INSERT)
    world.Session.execute(sa.text("COMMIT"))


def commit_by_sqlalchemy_14(world: World) -> None:
    """Its connections commit by themselves, unless they are told to be those of the future."""
    with world.engine.connect() as connection:
        connection.execute(INSERT)


COMMITS: list[Any] = [
    commit,
    commit_without_a_flush,
    commit_in_a_unit_of_its_own,
    commit_in_a_job,
    commit_in_another_session,
    commit_on_a_second_connection,
    commit_many_on_a_second_connection,
    commit_by_autocommit,
    commit_by_an_autocommit_engine,
    commit_by_an_autocommit_session,
    commit_in_two_phases,
    commit_a_savepoint_and_all,
    pytest.param(
        commit_the_connection_of_the_session,
        marks=pytest.mark.filterwarnings("ignore:transaction already deassociated from connection"),
    ),
    commit_by_hand,
    *(
        [pytest.param(commit_by_sqlalchemy_14, marks=pytest.mark.filterwarnings("ignore:Deprecated API features"))]
        if SQLALCHEMY_14
        else []
    ),
]


@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
def test_an_attempt_that_has_committed_something_is_not_replayed(
    postgresql_world: World, caplog: pytest.LogCaptureFixture, commit: Callable[[World], None], make_app: Any
) -> None:
    def view() -> None:
        commit(postgresql_world)
        postgresql_world.Session.rollback()
        lose(postgresql_world)

    tried = Tried(postgresql_world, view, make_app)
    if make_app is respond:
        tried.raises(DBAPIError)
    else:
        assert tried.answers().content == b"sorry"
    assert tried.attempts == [1]
    assert warnings_of(caplog) == []
    assert postgresql_world.durable()[0] == "durable"


def test_an_attempt_that_has_committed_something_within_its_transaction_is_not_replayed(
    postgresql_world: World,
) -> None:
    """On another connection, while its own is in use."""

    def view() -> None:
        write(postgresql_world, "lost")
        commit_on_a_second_connection(postgresql_world)
        lose(postgresql_world)

    tried = Tried(postgresql_world, view)
    tried.raises(DBAPIError)
    assert tried.attempts == [1]
    assert postgresql_world.durable() == ["durable"]


@pytest.mark.parametrize("commit", [commit, commit_in_a_unit_of_its_own])
def test_what_an_earlier_attempt_had_not_committed_a_later_one_may(
    postgresql_world: World, commit: Callable[[World], None]
) -> None:
    """And then it is the last one."""

    def view() -> None:
        if current_scope().attempt == 2:
            commit(postgresql_world)
        lose(postgresql_world)

    tried = Tried(postgresql_world, view)
    tried.raises(DBAPIError)
    assert tried.attempts == [1, 2]
    assert postgresql_world.durable() == ["durable"]


@pytest.mark.parametrize(
    "statement",
    ["CREATE TABLE IF NOT EXISTS made_by_the_way (id INTEGER)", "START TRANSACTION", "BEGIN", "SET autocommit = 1"],
)
def test_a_statement_that_commits_by_itself_is_not_replayed(mariadb_world: World, statement: str) -> None:
    """In MariaDB, DDL does, and what begins a transaction ends the last one."""

    def view() -> None:
        write(mariadb_world, "durable")
        mariadb_world.Session.execute(sa.text(statement))
        raise StaleDataError

    tried = Tried(mariadb_world, view)
    tried.raises(StaleDataError)
    assert tried.attempts == [1]
    assert mariadb_world.durable() == ["durable"]
    # The pool would give a connection that stays in autocommit mode to the next test.
    mariadb_world.engine.dispose()


@pytest.mark.parametrize(
    ("database", "arguments"), [("sqlite", {"isolation_level": None}), ("mariadb", {"autocommit": True})]
)
def test_an_attempt_on_a_driver_in_autocommit_is_not_replayed(
    request: pytest.FixtureRequest, database: str, arguments: dict[str, Any]
) -> None:
    """Of which SQLAlchemy knows nothing."""
    engine = sa.create_engine(request.getfixturevalue(f"{database}_url"), connect_args=arguments)
    try:
        Base.metadata.create_all(engine)
        SomeSession: Any = scoped_session(sessionmaker(engine))
        attempts = []

        def view() -> None:
            attempts.append(current_scope().attempt)
            SomeSession.execute(INSERT)
            raise StaleDataError

        with pytest.raises(StaleDataError):
            Exchange(SessionMiddleware(respond(view), SomeSession, retry=POLICY))
        assert attempts == [1]
        with engine.connect() as connection:
            assert connection.execute(sa.select(Note.text)).scalars().all() == ["durable"]
    finally:
        engine.dispose()


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_a_listener_that_loses_a_race_after_the_commit_does_not_undo_it(postgresql_world: World, kind: str) -> None:
    def view() -> Any:
        write(postgresql_world, "durable")
        return [b"done"] if kind == "list" else iter([b"done"])

    def after_commit(session: Any) -> None:
        with postgresql_world.engine.connect() as connection:
            connection.execute(sa.text("SELECT fail('40001')"))

    factory = postgresql_world.Session.session_factory
    sa.event.listen(factory, "after_commit", after_commit)
    try:
        tried = Tried(postgresql_world, view)
        tried.raises(DBAPIError)
    finally:
        sa.event.remove(factory, "after_commit", after_commit)
    assert tried.attempts == [1]
    assert postgresql_world.durable() == ["durable"]


def test_a_listener_that_commits_while_the_attempt_is_rolled_back_ends_it(postgresql_world: World) -> None:
    """An audit trail, say."""

    def view() -> None:
        write(postgresql_world, "lost")
        lose(postgresql_world)

    def after_rollback(session: Any) -> None:
        commit_on_a_second_connection(postgresql_world)

    factory = postgresql_world.Session.session_factory
    sa.event.listen(factory, "after_rollback", after_rollback)
    try:
        tried = Tried(postgresql_world, view)
        tried.raises(DBAPIError)
    finally:
        sa.event.remove(factory, "after_rollback", after_rollback)
    assert tried.attempts == [1]
    assert postgresql_world.durable() == ["durable"]


def test_an_error_page_that_commits_while_it_is_closed_is_not_replayed(postgresql_world: World) -> None:
    def view() -> Body:
        with suppress(DBAPIError):
            lose(postgresql_world)
        return Body([b"sorry"], lambda: commit_on_a_second_connection(postgresql_world))

    tried = Tried(postgresql_world, view, lambda view: respond(view, "500 Oops"))
    tried.raises(LostRace, match="committed something")
    assert tried.attempts == [1]
    assert postgresql_world.durable() == ["durable"]


def test_an_error_at_commit_that_nobody_knows_is_no_lost_race(
    postgresql_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the policy says of it: by then it may be durable."""

    def view() -> list[bytes]:
        write(postgresql_world, "refused")
        return [b"done"]

    tried = Tried(postgresql_world, view, retry=RetryPolicy(delay=0, is_transient=lambda error: True))
    tried.raises(DBAPIError)
    assert tried.attempts == [1]
    assert any("unknown" in warning for warning in warnings_of(caplog))


def test_after_a_commit_in_two_phases_nothing_is_replayed(postgresql_world: World) -> None:
    Session: Any = scoped_session(sessionmaker(postgresql_world.engine, twophase=True))
    attempts: list[int] = []

    @with_session(Session, retry=RetryPolicy(delay=0, is_transient=lambda error: True))
    def job(*, session: Any) -> None:
        attempts.append(1)
        session.add(Note(text="durable"))
        session.commit()
        raise LookupError

    with pytest.raises(LookupError):
        job()
    assert attempts == [1]
    assert postgresql_world.durable() == ["durable"]


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_a_commit_that_is_refused_is_replayed(sqlite_world: World, kind: str) -> None:
    """SQLite cannot commit while somebody reads."""

    def view() -> Any:
        sqlite_world.Session.execute(sa.text("PRAGMA busy_timeout = 0"))
        sqlite_world.Session.add(Note(text="kept"))
        if current_scope().attempt == 1:
            reader.exec_driver_sql("BEGIN")
            reader.exec_driver_sql("SELECT * FROM note")
        else:
            reader.exec_driver_sql("ROLLBACK")
        return [b"done"] if kind == "list" else iter([b"done"])

    with sqlite_world._observer.connect() as reader:
        tried = Tried(sqlite_world, view)
        assert tried.answers().content == b"done"
    assert tried.attempts == [1, 2]
    assert sqlite_world.durable() == ["kept"]


def test_an_error_after_a_statement_that_was_merely_refused_does_not_come_of_it(sqlite_world: World) -> None:
    """The transaction goes on without it, and fails of something else."""

    def view() -> None:
        sqlite_world.Session.execute(sa.text("PRAGMA busy_timeout = 0"))
        with rival(sqlite_world) as connection:
            count(connection, 1)
            with pytest.raises(DBAPIError, match="locked"):
                sqlite_world.Session.execute(INSERT)
        raise Failure

    tried = Tried(sqlite_world, view)
    tried.raises(Failure)
    assert tried.attempts == [1]


def test_a_lost_race_that_no_engine_has_told_of_is_noticed_all_the_same(sqlite_world: World) -> None:
    """A database of which SQLAlchemy knows nothing, say, whose error is hidden by another one."""

    def view() -> list[bytes]:
        write(sqlite_world, f"attempt {current_scope().attempt}")
        if current_scope().attempt == 1:
            try:
                raise StaleDataError
            except StaleDataError:
                give_up()
        return [b"done"]

    tried = Tried(sqlite_world, view)
    assert tried.answers().content == b"done"
    assert sqlite_world.durable() == ["attempt 2"]


def test_other_work_that_fails_while_a_lost_race_is_dealt_with_does_not_come_of_it(postgresql_world: World) -> None:
    def view() -> None:
        try:
            lose(postgresql_world)
        except DBAPIError:
            postgresql_world.Session.rollback()
            write(postgresql_world, "instead")
            give_up()

    tried = Tried(postgresql_world, view)
    tried.raises(Failure)
    assert tried.attempts == [1]


def test_a_connection_that_the_pool_has_replaced_is_no_lost_race(postgresql_url: URL) -> None:
    engine = sa.create_engine(postgresql_url, pool_pre_ping=True, pool_size=1)
    observer = sa.create_engine(postgresql_url)
    try:
        with engine.connect() as connection:
            pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar()
        with observer.connect() as connection:
            assert connection.execute(sa.text(f"SELECT pg_terminate_backend({pid}, 60000)")).scalar()
        SomeSession: Any = scoped_session(sessionmaker(engine))

        def view() -> list[bytes]:
            return [b"%d %d" % (SomeSession.execute(sa.text("SELECT 7")).scalar(), current_scope().attempt)]

        middleware = SessionMiddleware(respond(view, "500 Oops"), SomeSession, retry=POLICY)
        assert request(middleware).content == b"7 1"
    finally:
        engine.dispose()
        observer.dispose()


def test_a_deadlock_in_autocommit_has_undone_nothing_else(mariadb_world: World) -> None:
    """So what comes after it is kept, with or without a policy."""

    def view() -> list[bytes]:
        isolate(mariadb_world, "AUTOCOMMIT")
        with suppress(DBAPIError):
            mariadb_world.Session.execute(sa.text("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213"))
        write(mariadb_world, "kept")
        return [b"done"]

    assert Tried(mariadb_world, view, retry=None).answers().content == b"done"
    assert mariadb_world.durable() == ["kept"]


@pytest.mark.parametrize("bind", ["configured", "chosen"])
def test_what_is_done_on_an_engine_before_it_is_known_may_be_durable(postgresql_url: URL, bind: str) -> None:
    """Where the session chooses its engine by itself, the first attempt ever is not replayed; later ones are."""
    with closing(World(postgresql_url)) as world:
        set_up(world.engine)

        class Choosing(Session):
            def get_bind(self, *args: Any, **options: Any) -> Any:
                return world.engine

        factory: Any = sessionmaker(class_=Choosing) if bind == "chosen" else sessionmaker()
        engine, world.Session = world.engine, scoped_session(factory)
        tried = Tried(world, first(world, lose))
        if bind == "configured":
            factory.configure(bind=engine)
        else:
            tried.raises(DBAPIError)
        assert tried.answers().content == b"done"
        assert tried.attempts == ([1, 2] if bind == "configured" else [1, 1, 2])


def test_a_race_that_is_lost_while_the_body_is_closed_is_an_error_and_no_attempt(
    sqlite_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    def on_close() -> None:
        current_scope().on_rollback(lambda: told.append("rolled back"))
        find_it_stale(sqlite_world)

    tried = Tried(sqlite_world, lambda: Body([b"chunk"], on_close))
    exchange = Exchange(tried.app)
    with pytest.raises(StaleDataError):
        exchange.read()
    assert tried.attempts == [1]
    assert told == ["rolled back"]
    assert "replayed" not in caplog.text


def test_an_error_page_is_replaced_on_an_engine_that_was_told_of_late(postgresql_url: URL) -> None:
    """Whether that is a session's or, as here, anybody's."""
    with closing(World(postgresql_url)) as world:
        set_up(world.engine)
        factory: Any = sessionmaker()
        engine, world.Session = world.engine, scoped_session(factory)

        def lose_in_core(world: World) -> None:
            with engine.begin() as connection:
                connection.execute(sa.text("SELECT fail('40001')"))

        tried = Tried(world, first(world, lose_in_core), framework)
        factory.configure(bind=engine)
        assert tried.answers().content == b"done"
        assert tried.attempts == [1, 2]


class Interruption(BaseException):
    """A timeout of gevent, say."""


def test_an_interruption_of_the_decision_leaves_nothing_behind(sqlite_world: World) -> None:
    def interrupt(error: BaseException) -> bool:
        raise Interruption

    def view() -> None:
        write(sqlite_world, "lost")
        raise Failure

    tried = Tried(sqlite_world, view, retry=RetryPolicy(is_transient=interrupt))
    tried.raises(Failure)
    assert tried.attempts == [1]
    assert sqlite_world.checked_out == 0
    assert not is_in_a_scope()


@pytest.mark.parametrize("commit", [commit_in_another_session, commit_on_a_second_connection])
def test_what_is_committed_before_the_engine_is_known_counts_as_well(
    postgresql_url: URL, commit: Callable[[World], None]
) -> None:
    """A sessionmaker may be told of its engine late, or choose one for each statement."""
    with closing(World(postgresql_url)) as world:
        set_up(world.engine)
        bind = world.engine
        world.Session = scoped_session(sessionmaker())

        def view() -> None:
            commit(world)
            lose(world)

        tried = Tried(world, view)
        world.Session.session_factory.configure(bind=bind)
        tried.raises(DBAPIError)
        assert tried.attempts == [1]
        assert world.durable() == ["durable"]


def test_what_a_session_of_another_engine_commits_counts_as_well(
    postgresql_world: World, new_engine: Callable[..., Engine]
) -> None:
    """Nobody knows of that engine before the session begins a transaction there; from then on it is known."""
    world, engine = postgresql_world, new_engine(Base)

    def work(*texts: str) -> Callable[[], list[bytes]]:
        def do(world: World) -> None:
            with world.Session.session_factory(bind=engine) as session:
                session.add_all([Note(text=text) for text in texts])
                session.commit()
            lose(world)

        return first(world, do)

    tried = Tried(world, work("durable"))
    tried.raises(DBAPIError)
    assert tried.attempts == [1]
    tried = Tried(world, work())
    assert tried.answers().content == b"done"
    assert tried.attempts == [1, 2]
    tried = Tried(world, work("durable, too"))
    tried.raises(DBAPIError)
    assert tried.attempts == [1]


@pytest.fixture
def two_worlds(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[list[World]]:
    with ExitStack() as stack:
        both = []
        for registry in ("thread-local", "contextual"):
            both.append(stack.enter_context(worlds.use(request.getfixturevalue, "postgresql", registry)))
            set_up(both[-1].engine)
        yield both


@pytest.mark.parametrize("own", [False, True], ids=["middleware", "application"])
@pytest.mark.parametrize("what", ["conflict", "disconnect"])
def test_of_two_databases_the_first_has_committed_when_the_second_loses(
    two_worlds: list[World], what: str, own: bool
) -> None:
    counters = sa.table("counter", sa.column("id"), sa.column("value"), sa.column("version"))
    everything = sa.select(sa.func.count()).select_from(counters)
    Session: Any = scoped_session(
        sessionmaker(binds={Note: two_worlds[0].engine, Counter: two_worlds[1].engine}, twophase=False)
    )
    commits: list[Engine] = []

    def spoil_the_second(connection: Connection) -> None:
        """Which of them is the second one is SQLAlchemy's choice."""
        commits.append(connection.engine)
        if len(commits) != 2:
            return
        (world,) = (world for world in two_worlds if world.engine is connection.engine)
        if what == "disconnect":
            kill(world, connection)
        else:
            with rival(world, isolation_level="SERIALIZABLE") as other:
                other.execute(everything)
                other.execute(sa.insert(counters).values(id=7, value=0, version=1))

    attempts: list[int] = []

    def view() -> list[bytes]:
        attempts.append(current_scope().attempt)
        for mapped in (Note, Counter):
            serializable = {"isolation_level": "SERIALIZABLE"}
            Session.connection(bind_arguments={"mapper": mapped}, execution_options=serializable)
            Session.execute(everything, bind_arguments={"mapper": mapped})
            Session.execute(sa.insert(counters).values(id=3, value=0, version=1), bind_arguments={"mapper": mapped})
        if own:
            Session.commit()
        return [b"done"]

    for world in two_worlds:
        event.listen(world.engine, "commit", spoil_the_second)
    try:
        with pytest.raises(OperationalError):
            request(SessionMiddleware(respond(view), Session, retry=POLICY))
    finally:
        for world in two_worlds:
            event.remove(world.engine, "commit", spoil_the_second)
    assert attempts == [1]
    assert len(commits) == 2
    durable: list[int] = []
    for world in two_worlds:
        with rival(world) as connection:
            durable += connection.execute(sa.select(Counter.id).where(Counter.id == 3)).scalars()
    assert durable == [3]


# -- what is never replayed: a response that has begun ----------------------------------------------------------------


def test_a_conflict_midway_through_a_stream_breaks_the_transfer_off(
    postgresql_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"1"
        lose(postgresql_world)

    def view() -> Iterator[bytes]:
        write(postgresql_world, "durable")
        return chunks()

    tried = Tried(postgresql_world, view)
    exchange = Exchange(tried.app)
    assert exchange.next() == b"1"
    with pytest.raises(DBAPIError):
        exchange.read()
    exchange.close()
    assert tried.attempts == [1]
    assert warnings_of(caplog) == []
    assert postgresql_world.durable() == ["durable"]


def test_a_generator_application_that_loses_after_its_first_chunk_breaks_the_transfer_off(
    postgresql_world: World,
) -> None:
    calls: list[None] = []

    def app(environ: Any, start_response: Any) -> Any:
        calls.append(None)
        start_response("200 OK", PLAIN)
        yield b"1"
        lose(postgresql_world)

    exchange = Exchange(SessionMiddleware(app, postgresql_world.Session, retry=POLICY))
    assert exchange.next() == b"1"
    with pytest.raises(DBAPIError):
        exchange.read()
    exchange.close()
    assert calls == [None]


def test_what_is_committed_at_the_end_of_the_body_is_not_replayed(postgresql_world: World) -> None:
    def view() -> Any:
        lose_at_commit(postgresql_world)
        return iter([b"1"])

    tried = Tried(postgresql_world, view, commit_at="end")
    exchange = Exchange(tried.app)
    assert exchange.next() == b"1"
    with pytest.raises(OperationalError):
        exchange.read()
    exchange.close()
    assert tried.attempts == [1]
    assert postgresql_world.durable() == ["rival"]


def test_what_would_be_committed_at_the_end_of_the_body_is_replayed_as_long_as_that_has_not_begun(
    postgresql_world: World,
) -> None:
    tried = Tried(postgresql_world, first(postgresql_world, lose), commit_at="end")
    assert tried.answers().content == b"done"
    assert tried.attempts == [1, 2]


@pytest.mark.parametrize(("lose_somehow", "when"), [(lose, "after"), (lose_at_commit, "before")])
def test_after_write_nothing_is_replayed(
    postgresql_world: World, lose_somehow: Callable[[World], None], when: str
) -> None:
    """But what the commit before it loses is."""
    attempts: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        attempts.append(current_scope().attempt)
        send = start_response("200 OK", PLAIN)
        if when == "before" and attempts == [1]:
            lose_somehow(postgresql_world)
        send(b"written")
        if when == "after":
            lose_somehow(postgresql_world)
        return []

    application = SessionMiddleware(app, postgresql_world.Session, retry=POLICY)
    if when == "before":
        exchange = request(application)
        assert exchange.written == [b"written"]
        assert attempts == [1, 2]
    else:
        with pytest.raises(DBAPIError):
            request(application)
        assert attempts == [1]


# -- what is never replayed: other errors -----------------------------------------------------------------------------


def violate(world: World) -> None:
    world.Session.add_all([Note(text="twice"), Note(text="twice")])
    world.Session.flush()


def fail(world: World) -> None:
    raise ValueError


def fail_in_sql(world: World) -> None:
    lose(world, "22012")


def lose_alike(world: World) -> None:
    """No error of the database, and none of SQLAlchemy's."""
    raise RuntimeError("SQLSTATE 40001: database is locked")


@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
@pytest.mark.parametrize(
    ("fail", "kind"),
    [(violate, IntegrityError), (fail, ValueError), (fail_in_sql, DBAPIError), (lose_alike, RuntimeError)],
)
def test_any_other_error_is_not_replayed(
    postgresql_world: World,
    caplog: pytest.LogCaptureFixture,
    fail: Callable[[World], None],
    kind: type[Exception],
    make_app: Any,
) -> None:
    tried = Tried(postgresql_world, lambda: fail(postgresql_world), make_app)
    if make_app is respond:
        tried.raises(kind)
    else:
        assert tried.answers().content == b"sorry"
    assert tried.attempts == [1]
    assert warnings_of(caplog) == []


def lose_and_recover(world: World) -> None:
    swallow(world)
    world.Session.rollback()
    write(world, "instead")


def lose_a_savepoint(world: World) -> None:
    write(world, "instead")
    with suppress(DBAPIError), world.Session.begin_nested():
        lose(world)


def lose_a_nested_part(world: World) -> None:
    write(world, "instead")
    with suppress(DBAPIError), session_scope(world.Session, propagation="nested"):
        lose(world)


def lose_a_flush_in_a_savepoint(world: World) -> None:
    write(world, "instead")
    with suppress(StaleDataError), world.Session.begin_nested():
        counter = world.Session.get(Counter, 1)
        with rival(world) as connection:
            count(connection, 1)
        counter.value += 1
        world.Session.flush()


def lose_a_second_connection(world: World) -> None:
    with suppress(DBAPIError):
        lose_on_a_second_connection(world)
    write(world, "instead")


def retry_by_hand(world: World) -> None:
    for lost in (True, True, False):
        try:
            if lost:
                lose(world)
            write(world, "instead")
        except DBAPIError:
            world.Session.rollback()


OWN_ROLLBACKS = [lose_and_recover, lose_a_second_connection, retry_by_hand]
OWN_SAVEPOINTS = [lose_a_savepoint, lose_a_nested_part, lose_a_flush_in_a_savepoint]
RECOVERIES = [*OWN_ROLLBACKS, *OWN_SAVEPOINTS]


@pytest.mark.parametrize("recover", RECOVERIES)
@pytest.mark.parametrize("body", ["list", "stream"])
def test_a_lost_race_that_the_application_has_dealt_with_is_none(
    postgresql_world: World, caplog: pytest.LogCaptureFixture, recover: Callable[[World], None], body: str
) -> None:
    def view() -> Any:
        recover(postgresql_world)
        return [b"done"] if body == "list" else iter([b"done"])

    tried = Tried(postgresql_world, view)
    assert tried.answers().content == b"done"
    assert tried.attempts == [1]
    assert not any("attempt" in warning for warning in warnings_of(caplog))
    assert postgresql_world.durable() == ["instead"]


@pytest.mark.parametrize("recover", [*OWN_SAVEPOINTS, *OWN_ROLLBACKS])
def test_an_error_after_a_lost_race_that_the_application_has_dealt_with_does_not_come_of_it(
    postgresql_world: World, recover: Callable[[World], None]
) -> None:
    def view() -> None:
        recover(postgresql_world)
        raise ValueError

    tried = Tried(postgresql_world, view)
    tried.raises(ValueError)
    assert tried.attempts == [1]


@pytest.mark.parametrize("recover", OWN_ROLLBACKS)
def test_an_error_page_after_a_lost_race_that_the_application_has_dealt_with_does_not_come_of_it(
    postgresql_world: World, recover: Callable[[World], None]
) -> None:
    def view() -> None:
        recover(postgresql_world)
        raise ValueError

    tried = Tried(postgresql_world, view, framework)
    assert tried.answers().status == "500 Oops"
    assert tried.attempts == [1]


@pytest.mark.parametrize("status", ["404 Not Found", "409 Conflict", "302 Found"])
def test_an_answer_that_is_no_server_error_is_the_answer(postgresql_world: World, status: str) -> None:
    """A 409 may be what the application makes of a lost race on purpose."""

    def view() -> Any:
        swallow(postgresql_world)
        postgresql_world.Session.rollback()
        raise Failure

    tried = Tried(postgresql_world, view, lambda view: framework(view, status=status))
    assert tried.answers().status == status
    assert tried.attempts == [1]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("when", ["while it is handled", "when it is swallowed", "as its cause"])
def test_an_interruption_is_not_replayed_whatever_is_pending(
    postgresql_world: World, caplog: pytest.LogCaptureFixture, kind: type[BaseException], when: str
) -> None:
    interruption = kind()

    def view() -> None:
        try:
            lose(postgresql_world)
        except DBAPIError as error:
            if when == "as its cause":
                raise interruption from error
            if when == "while it is handled":
                raise interruption  # noqa: B904
        raise interruption

    tried = Tried(postgresql_world, view)
    assert tried.raises(kind) is interruption
    assert tried.attempts == [1]
    assert warnings_of(caplog) == []


def test_an_interruption_between_the_attempts_goes_on(sqlite_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sa_wsgi_session._retry.time.sleep", interrupt)
    tried = Tried(sqlite_world, first(sqlite_world, find_it_stale))
    tried.raises(KeyboardInterrupt)
    assert tried.attempts == [1]


# -- what a replay is -------------------------------------------------------------------------------------------------


def test_an_attempt_finds_the_environ_as_the_first_one_has_found_it(sqlite_world: World) -> None:
    seen: list[dict[str, Any]] = []
    environs: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        environs.append(environ)
        seen.append({key: value for key, value in environ.items() if key != "sa_wsgi_session.scope"})
        environ["added"] = "x"
        environ["SCRIPT_NAME"], environ["PATH_INFO"] = "/mount", "/below"
        environ["wsgi.input"] = io.BytesIO(b"another")
        del environ["QUERY_STRING"]
        if current_scope().attempt < 3:
            find_it_stale(sqlite_world)
        start_response("200 OK", PLAIN)
        return []

    environ = make_environ("/path", QUERY_STRING="a=b", REMOTE_USER="me")
    Exchange(SessionMiddleware(app, sqlite_world.Session, retry=POLICY), environ).read()
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["PATH_INFO"] == "/path"
    assert all(one is environ for one in environs)
    assert environ["added"] == "x"


def test_an_attempt_is_not_told_of_what_another_middleware_has_left(sqlite_world: World) -> None:
    """Not even of its scope, by the one around the application."""
    scopes: list[Any] = []

    def view() -> list[bytes]:
        scopes.append(current_scope())
        return first(sqlite_world, find_it_stale)()

    def app(environ: Any, start_response: Any) -> Any:
        assert environ["sa_wsgi_session.scope"] is current_scope()
        assert environ["sa_wsgi_session.session"] is sqlite_world.Session
        return respond(view)(environ, start_response)

    request(SessionMiddleware(app, sqlite_world.Session, retry=POLICY))
    assert scopes[0] is not scopes[1]
    with pytest.raises(NoActiveScope):
        scopes[0].on_commit(print)


class Unseekable:
    """The body of a request as a socket gives it: once."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)
        self.read = self._file.read
        self.readline = self._file.readline
        self.readlines = self._file.readlines
        self.__iter__ = self._file.__iter__  # type: ignore[method-assign]

    def __iter__(self) -> Iterator[bytes]:
        raise NotImplementedError


def post(app: Any, content: bytes, length: str | None = None, given: Any = None) -> Exchange:
    environ = {
        "CONTENT_LENGTH": str(len(content)) if length is None else length,
        "wsgi.input": given or Unseekable(content),
    }
    return request(app, "/", "POST", **environ)


class Reading:
    """An application that reads so much of the body, and loses its first races."""

    def __init__(self, world: World, size: int = -1, *, wins: int = 2, **policy: Any) -> None:
        self.read: list[bytes] = []
        self.inputs: list[Any] = []

        def app(environ: Any, start_response: Any) -> Any:
            self.inputs.append(environ["wsgi.input"])
            self.read.append(environ["wsgi.input"].read(*[size][: size >= 0]))
            if current_scope().attempt < wins:
                find_it_stale(world)
            start_response("200 OK", PLAIN)
            return [self.read[-1]]

        self.app = SessionMiddleware(app, world.Session, retry=RetryPolicy(delay=0, **policy))


@pytest.mark.parametrize("length", [1, 10 * 1024, 10 * 1024 + 1, 200_000])
@pytest.mark.parametrize("part", [1, 0.5, 0], ids=["all", "half", "nothing"])
def test_each_attempt_reads_the_whole_body(sqlite_world: World, length: int, part: float) -> None:
    content = bytes(number % 251 for number in range(length))
    reading = Reading(sqlite_world, int(length * part), wins=3)
    post(reading.app, content)
    assert reading.read == [content[: int(length * part)]] * 3


def test_a_body_that_ends_where_it_ends_can_be_read_to_its_end(sqlite_world: World) -> None:
    """Beyond CONTENT_LENGTH a server's input may hold the next request."""
    reading = Reading(sqlite_world)
    post(reading.app, b"body and more", "4")
    assert reading.read == [b"body", b"body"]


@pytest.mark.parametrize(("more", "attempts"), [(0, 2), (1, 1)])
@pytest.mark.parametrize("limit", [0, 10, 20_000])
def test_a_larger_body_than_max_body_is_not_kept(sqlite_world: World, limit: int, more: int, attempts: int) -> None:
    content = b"x" * (limit + more)
    reading = Reading(sqlite_world, max_body=limit)
    given = Unseekable(content)
    if attempts == 1:
        with pytest.raises(StaleDataError):
            post(reading.app, content, given=given)
        assert reading.inputs == [given]
    else:
        assert post(reading.app, content, given=given).content == content
    assert reading.read == [content] * attempts


@pytest.mark.parametrize(
    "environ",
    [
        {"CONTENT_LENGTH": "-1"},
        {"CONTENT_LENGTH": "+4"},
        {"CONTENT_LENGTH": "1e3"},
        {"CONTENT_LENGTH": " 4"},
        {"CONTENT_LENGTH": "4_0"},
        {"CONTENT_LENGTH": "٣"},
        {"CONTENT_LENGTH": "²"},
        {"CONTENT_LENGTH": "9" * 30},
        {"CONTENT_LENGTH": "9" * 5000},
        {"CONTENT_LENGTH": "4, 4"},
        {"HTTP_TRANSFER_ENCODING": "chunked"},
        {"HTTP_TRANSFER_ENCODING": "chunked", "CONTENT_LENGTH": ""},
        {"HTTP_TRANSFER_ENCODING": "chunked", "CONTENT_LENGTH": "0"},
    ],
    ids=lambda environ: ", ".join(f"{value}"[:31] for value in environ.values()),
)
def test_a_body_of_which_nobody_knows_the_length_passes_untouched_and_is_not_replayed(
    sqlite_world: World, environ: dict[str, Any]
) -> None:
    reading = Reading(sqlite_world)
    given = Unseekable(b"body")
    with pytest.raises(StaleDataError):
        request(reading.app, "/", "POST", **{"wsgi.input": given, **environ})
    assert reading.inputs == [given]
    assert reading.read == [b"body"]


@pytest.mark.parametrize(
    ("method", "environ"),
    [
        ("GET", {}),
        ("GET", {"wsgi.input_terminated": True}),
        ("HEAD", {"CONTENT_LENGTH": "", "wsgi.input_terminated": True}),
        ("POST", {}),
        ("POST", {"CONTENT_LENGTH": ""}),
        ("POST", {"CONTENT_LENGTH": "0"}),
        ("POST", {"CONTENT_LENGTH": "0", "wsgi.input_terminated": True}),
        ("DELETE", {"wsgi.input_terminated": False}),
    ],
)
def test_a_request_without_a_body_is_replayed_and_its_input_left_alone(
    sqlite_world: World, method: str, environ: dict[str, Any]
) -> None:
    given = Unseekable(b"")
    reading = Reading(sqlite_world)
    request(reading.app, "/", method, **{"wsgi.input": given, **environ})
    assert reading.inputs == [given, given]


@pytest.mark.parametrize("length", [100, 50_000])
def test_of_a_client_that_hangs_up_within_the_body_the_application_hears_nothing(
    sqlite_world: World, length: int
) -> None:
    reading = Reading(sqlite_world)
    with pytest.raises(DisconnectionError):
        post(reading.app, b"x" * (length // 2), str(length))
    assert reading.read == []
    assert not is_in_a_scope()
    assert not sqlite_world.Session.registry.has()


def test_the_body_is_there_before_a_session_is_bound(sqlite_world: World) -> None:
    """A slow client holds no connection while it sends."""
    bound: list[bool] = []

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            bound.append(is_in_a_scope())
            return super().read(size)

    reading = Reading(sqlite_world)
    post(reading.app, b"body", given=Slow(b"body"))
    assert bound
    assert not any(bound)


@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
@pytest.mark.parametrize("length", [4, 20_000])
def test_an_application_that_closes_its_input_cannot_be_replayed(
    sqlite_world: World, caplog: pytest.LogCaptureFixture, make_app: Any, length: int
) -> None:
    calls: list[None] = []
    told: list[str] = []

    def view() -> None:
        calls.append(None)
        current_scope().on_rollback(lambda: told.append("rolled back"))
        find_it_stale(sqlite_world)

    def app(environ: Any, start_response: Any) -> Any:
        environ["wsgi.input"].close()
        return make_app(view)(environ, start_response)

    application = SessionMiddleware(app, sqlite_world.Session, retry=POLICY)
    if make_app is respond:
        with pytest.raises(StaleDataError):
            post(application, b"x" * length)
    else:
        assert post(application, b"x" * length).content == b"sorry"
    assert calls == [None]
    assert warnings_of(caplog) == []
    assert told == ["rolled back"]


def test_a_request_that_the_hook_lets_pass_is_none_of_ours(sqlite_world: World) -> None:
    given = Unseekable(b"body")
    inputs: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        inputs.append(environ["wsgi.input"])
        raise StaleDataError

    application = SessionMiddleware(app, sqlite_world.Session, retry=POLICY, activate_hook=lambda environ: False)
    with pytest.raises(StaleDataError):
        post(application, b"body", given=given)
    assert inputs == [given]


def test_each_attempt_has_a_session_and_a_scope_of_its_own(postgresql_world: World) -> None:
    sessions: list[Any] = []
    scopes: list[Any] = []
    attempts: list[list[int]] = []

    def view() -> list[bytes]:
        scope = current_scope()
        sessions.append(scope.session)
        scopes.append(scope)
        numbers = [scope.attempt, current_scope(postgresql_world.Session).attempt]
        with session_scope(postgresql_world.Session):
            numbers.append(current_scope().attempt)
        with session_scope(postgresql_world.Session, propagation="nested"):
            assert current_scope() is not scope
            numbers.append(current_scope().attempt)
        attempts.append(numbers)
        if scope.attempt < 3:
            lose(postgresql_world)
        return []

    Tried(postgresql_world, view).answers()
    assert attempts == [[1] * 4, [2] * 4, [3] * 4]
    assert len({id(session) for session in sessions}) == 3
    assert len({id(scope) for scope in scopes}) == 3


def test_without_a_policy_there_is_one_attempt(sqlite_world: World) -> None:
    tried = Tried(sqlite_world, first(sqlite_world, find_it_stale), retry=None)
    tried.raises(StaleDataError)
    assert tried.attempts == [1]


@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
def test_what_waits_for_the_outcome_waits_for_that_of_the_last_attempt(postgresql_world: World, make_app: Any) -> None:
    told: list[str] = []

    def tell() -> None:
        scope, attempt = current_scope(), current_scope().attempt
        scope.on_commit(lambda: told.append(f"committed {attempt}"))
        scope.on_rollback(lambda: told.append(f"rolled back {attempt}"))

    def view() -> Any:
        tell()
        write(postgresql_world, f"attempt {current_scope().attempt}")
        if current_scope().attempt < wins:
            lose(postgresql_world)
        return Body([b"done"], tell)

    wins = 3
    tried = Tried(postgresql_world, view, make_app)
    assert tried.answers().content == b"done"
    # The one of the body is in a transaction of its own, which is over when that is.
    assert set(told) == {"committed 3"}
    told.clear()

    wins = 4
    if make_app is respond:
        tried.raises(DBAPIError)
    else:
        assert tried.answers().status == "500 Oops"
    assert told == ["rolled back 3"]


def test_what_a_body_registers_while_it_is_closed_is_dropped_with_its_attempt(postgresql_world: World) -> None:
    told: list[str] = []

    def tell() -> None:
        attempt = current_scope().attempt
        current_scope().on_commit(lambda: told.append(f"committed {attempt}"))
        current_scope().on_rollback(lambda: told.append(f"rolled back {attempt}"))
        postgresql_world.Session.execute(sa.text("SELECT 1"))

    def view() -> Any:
        if current_scope().attempt == 1:
            swallow(postgresql_world)
            return Body([b"lost"], tell)
        return [b"done"]

    assert Tried(postgresql_world, view).answers().content == b"done"
    assert told == []


def test_what_the_application_has_rolled_back_itself_is_dropped_with_its_attempt(postgresql_world: World) -> None:
    told: list[str] = []

    def view() -> Any:
        if current_scope().attempt == 1:
            current_scope().on_rollback(lambda: told.append("rolled back"))
            lose(postgresql_world)
        return [b"done"]

    tried = Tried(postgresql_world, view, lambda view: framework(view, postgresql_world.Session.rollback))
    assert tried.answers().content == b"done"
    assert told == []


@pytest.mark.parametrize("body", ["list", "stream"])
def test_what_was_registered_before_a_commit_of_its_own_is_told_although_the_attempt_fails(
    postgresql_world: World, body: str
) -> None:
    told: list[str] = []

    def view() -> None:
        current_scope().on_commit(lambda: told.append("committed"))
        commit(postgresql_world)
        current_scope().on_rollback(lambda: told.append("rolled back"))
        lose(postgresql_world)

    Tried(postgresql_world, view).raises(DBAPIError)
    assert told == ["committed", "rolled back"]


# -- the pauses -------------------------------------------------------------------------------------------------------


def pausing(world: World, monkeypatch: pytest.MonkeyPatch, **policy: Any) -> tuple[Tried, list[float]]:
    """A request that always loses; and how long it would have paused."""
    pauses: list[float] = []
    monkeypatch.setattr("sa_wsgi_session._retry.time.sleep", pauses.append)
    return Tried(world, lambda: find_it_stale(world), retry=RetryPolicy(**policy)), pauses


def test_each_pause_is_a_random_part_of_a_bound_that_doubles(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, pauses = pausing(sqlite_world, monkeypatch, attempts=9, delay=8, max_delay=100, deadline=None)
    tried.raises(StaleDataError)
    bounds = [8, 16, 32, 64, 100, 100, 100, 100]
    assert len(pauses) == len(bounds)
    assert all(0 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
    assert len({pause / bound for pause, bound in zip(pauses, bounds, strict=True)}) == len(bounds)


def test_the_bounds_begin_with_the_delay_of_the_policy(sqlite_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa_wsgi_session._retry.uniform", lambda least, most: most)
    tried, pauses = pausing(sqlite_world, monkeypatch, attempts=7, delay=8, max_delay=100, deadline=None)
    tried.raises(StaleDataError)
    assert pauses == [8, 16, 32, 64, 100, 100]


def test_who_debugs_is_told_why_nothing_is_replayed(sqlite_world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "sa_wsgi_session")

    def view() -> None:
        write(sqlite_world, "kept")
        sqlite_world.Session.commit()
        find_it_stale(sqlite_world)

    Tried(sqlite_world, view).raises(StaleDataError)
    assert "GET /: attempt 1 lost a race (StaleDataError) but has done what can't be undone" in caplog.messages


def test_a_thousand_attempts_have_pauses_too(sqlite_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although no number is as large as their bound would be."""
    pauses: list[float] = []
    monkeypatch.setattr("sa_wsgi_session._retry.time.sleep", pauses.append)
    attempts = 1100
    policy = RetryPolicy(attempts=attempts, delay=1e-300, is_transient=lambda error: isinstance(error, Failure))

    def view() -> None:
        raise Failure

    tried = Tried(sqlite_world, view, retry=policy)
    tried.raises(Failure)
    assert len(tried.attempts) == attempts
    assert len(pauses) == attempts - 1
    assert max(pauses) <= 1


@pytest.mark.parametrize(("deadline", "attempts"), [(0, [1]), (None, [1, 2, 3]), (1e6, [1, 2, 3])])
def test_no_attempt_begins_after_the_deadline(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, deadline: Any, attempts: Any
) -> None:
    tried, pauses = pausing(sqlite_world, monkeypatch, delay=1, deadline=deadline)
    tried.raises(StaleDataError)
    assert tried.attempts == attempts
    assert len(warnings_of(caplog)) == len(pauses) == len(attempts) - 1


def test_a_pause_that_would_end_after_the_deadline_is_not_begun(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, pauses = pausing(sqlite_world, monkeypatch, attempts=60, delay=100, max_delay=100, deadline=50)
    tried.raises(StaleDataError)
    assert all(pause <= 50 for pause in pauses)


@in_each_registry
@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
def test_nothing_is_held_during_a_pause(world: World, monkeypatch: pytest.MonkeyPatch, make_app: Any) -> None:
    set_up(world.engine)
    seen: list[Any] = []
    monkeypatch.setattr(
        "sa_wsgi_session._retry.time.sleep",
        lambda seconds: seen.append((world.checked_out, is_in_a_scope(), world.Session.registry.has())),
    )
    Tried(world, first(world, find_it_stale), make_app).answers()
    assert seen == [(0, False, False)]


# -- the log ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
def test_each_replay_is_one_warning_without_a_secret(
    postgresql_world: World, caplog: pytest.LogCaptureFixture, make_app: Any
) -> None:
    def view() -> Any:
        if current_scope().attempt < 3:
            write(postgresql_world, "secret")
            postgresql_world.Session.execute(
                sa.text("SELECT fail('40001') WHERE :value != 'secret' OR 'secret' = 'secret'"), {"value": "secret"}
            )
        return [b"done"]

    tried = Tried(postgresql_world, view, make_app)
    tried.answers(
        path="/transfer",
        method="PUT",
        QUERY_STRING="token=secret",
        HTTP_COOKIE="secret",
        REMOTE_USER="secret",
        CONTENT_LENGTH="6",
        **{"wsgi.input": io.BytesIO(b"secret")},
    )
    warnings = warnings_of(caplog)
    assert len(warnings) == 2
    for number, warning in enumerate(warnings, 1):
        assert re.match(rf"PUT /transfer\b.*\b{number} of 3\b.*\(SQLSTATE 40001\)", warning)
    assert "secret" not in caplog.text
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
def test_the_last_attempt_is_no_replay_and_no_warning(
    postgresql_world: World, caplog: pytest.LogCaptureFixture, make_app: Any
) -> None:
    tried = Tried(postgresql_world, lambda: lose(postgresql_world), make_app, retry=RetryPolicy(attempts=2, delay=0))
    if make_app is respond:
        tried.raises(DBAPIError)
    else:
        tried.answers()
    assert tried.attempts == [1, 2]
    assert len(warnings_of(caplog)) == 1


def test_the_code_of_each_race_is_logged(
    lost_race: tuple[World, Callable[[World], None]], caplog: pytest.LogCaptureFixture
) -> None:
    world, lose = lost_race
    Tried(world, first(world, lose)).answers()
    (warning,) = warnings_of(caplog)
    assert re.search(r"\((SQLSTATE 40\w{3}|MySQL \d{4}|SQLite BUSY|StaleDataError|connection lost)\)", warning)


# -- the last attempt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempts", [1, 2])
def test_the_exception_of_the_last_attempt_is_raised_as_it_is(postgresql_world: World, attempts: int) -> None:
    errors: list[BaseException] = []

    def view() -> None:
        try:
            lose(postgresql_world)
        except DBAPIError as error:
            errors.append(error)
            raise

    tried = Tried(postgresql_world, view, retry=RetryPolicy(attempts=attempts, delay=0))
    error = tried.raises(DBAPIError)
    assert error is errors[-1]
    assert len(errors) == attempts
    # It does not come of the earlier ones.
    while error.__context__ is not None:
        error = error.__context__
        assert error not in errors


def test_the_error_page_of_the_last_attempt_is_served_as_it_is(postgresql_world: World) -> None:
    bodies: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        swallow(postgresql_world)
        start_response(f"50{len(bodies)} Oops", [("X-Attempt", str(current_scope().attempt))])
        bodies.append([b"page"])
        return bodies[-1]

    exchange = Exchange(SessionMiddleware(app, postgresql_world.Session, retry=POLICY))
    assert exchange.statuses == ["502 Oops"]
    assert exchange.headers == [("X-Attempt", "3")]
    assert exchange.body is bodies[2]
    assert exchange.read() == b"page"


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_commit_that_loses_the_last_race_is_raised(postgresql_world: World, attempts: int) -> None:
    def view() -> list[bytes]:
        lose_at_commit(postgresql_world)
        with rival(postgresql_world) as connection:
            connection.execute(sa.delete(Note))
        return [b"done"]

    tried = Tried(postgresql_world, view, retry=RetryPolicy(attempts=attempts, delay=0))
    tried.raises(OperationalError)
    assert len(tried.attempts) == attempts


# -- middlewares around middlewares -----------------------------------------------------------------------------------


def test_wrapped_twice_is_tried_as_often_as_wrapped_once(postgresql_world: World) -> None:
    tried = Tried(
        postgresql_world,
        lambda: lose(postgresql_world),
        lambda view: SessionMiddleware(respond(view), postgresql_world.Session, retry=POLICY),
    )
    tried.raises(DBAPIError)
    assert tried.attempts == [1, 2, 3]


@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
def test_wrapped_twice_it_is_the_outer_policy_that_counts(postgresql_world: World, make_app: Any) -> None:
    world = postgresql_world
    inner = Tried(
        world,
        first(world, lose),
        lambda view: SessionMiddleware(make_app(view), world.Session),
    )
    assert inner.answers().content == b"done"
    assert inner.attempts == [1, 2]

    outer = Tried(
        world,
        first(world, lose),
        lambda view: SessionMiddleware(make_app(view), world.Session, retry=POLICY),
        retry=None,
    )
    if make_app is respond:
        outer.raises(DBAPIError)
    else:
        assert outer.answers().content == b"sorry"
    assert outer.attempts == [1]


@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
def test_a_request_within_a_request_is_replayed_by_itself(postgresql_world: World, make_app: Any) -> None:
    inner = Tried(postgresql_world, first(postgresql_world, lose), make_app)

    def view() -> list[bytes]:
        write(postgresql_world, "outer")
        assert inner.answers().content == b"done"
        return [b"outer"]

    outer = Tried(postgresql_world, view)
    assert outer.answers().content == b"outer"
    assert (outer.attempts, inner.attempts) == ([1], [1, 2])
    assert postgresql_world.durable() == ["attempt 2", "outer"]


def test_a_request_within_a_request_that_is_over_is_no_reason_to_begin_anew(postgresql_world: World) -> None:
    """It has committed."""
    inner = Tried(postgresql_world, first(postgresql_world, lose))

    def view() -> None:
        inner.answers()
        lose(postgresql_world)

    outer = Tried(postgresql_world, view)
    outer.raises(DBAPIError)
    assert (outer.attempts, inner.attempts) == ([1], [1, 2])


def test_a_request_within_an_error_handler_does_not_come_of_that_error(postgresql_world: World) -> None:
    """What it raises itself has the error that is being handled around it for a context."""

    def fail() -> None:
        raise ValueError

    inner = Tried(postgresql_world, fail)
    try:
        with postgresql_world.engine.connect() as connection:
            connection.execute(sa.text("SELECT fail('40001')"))
    except DBAPIError:
        inner.raises(ValueError)
    assert inner.attempts == [1]


@pytest.mark.parametrize("work", ["pending", "flushed", "a row is changed", "a row is deleted"])
def test_work_in_another_unit_of_work_that_goes_on_is_not_done_twice(two_worlds: list[World], work: str) -> None:
    """A middleware for each of two databases: the inner one can undo nothing that was done in the outer one."""
    world, other = two_worlds
    other.insert("there")
    tried: list[int] = []

    def view() -> list[bytes]:
        tried.append(current_scope(world.Session).attempt)
        session = other.Session()
        if work in ("pending", "flushed"):
            session.add(Note(text=f"attempt {tried[-1]}"))
            if work == "flushed":
                session.flush()
        else:
            there = session.query(Note).one()
            if work == "a row is changed":
                there.text = f"attempt {tried[-1]}"
            else:
                session.delete(there)
        return first(world, lose)()

    inner = Tried(world, view)
    outer = SessionMiddleware(inner.app, other.Session, environ_key="other")
    with suppress(DBAPIError):
        request(outer)
    assert tried == [1]
    assert other.durable() in (["attempt 1", "there"], ["attempt 1"], [], ["there"])


@pytest.mark.parametrize("retry", [None, POLICY], ids=["plain", "under a policy"])
def test_under_two_policies_the_whole_request_is_replayed(two_worlds: list[World], retry: RetryPolicy | None) -> None:
    """And so it is where only the outer one has a policy."""
    world, other = two_worlds

    def view() -> list[bytes]:
        write(world, f"attempt {current_scope(other.Session).attempt}")
        if current_scope(other.Session).attempt == 1:
            lose(other)
        return [b"done"]

    inner = SessionMiddleware(respond(view), world.Session, retry=retry)
    outer = SessionMiddleware(inner, other.Session, environ_key="other", retry=POLICY)
    assert request(outer).content == b"done"
    assert world.durable() == ["attempt 2"]


# -- errors of the application's own choice ---------------------------------------------------------------------------


def test_a_policy_may_know_of_more_lost_races(sqlite_world: World, caplog: pytest.LogCaptureFixture) -> None:
    class OutOfDate(Exception):
        pass

    def view() -> list[bytes]:
        write(sqlite_world, f"attempt {current_scope().attempt}")
        if current_scope().attempt == 1:
            raise OutOfDate("secret")
        return [b"done"]

    policy = RetryPolicy(delay=0, is_transient=lambda error: isinstance(error, OutOfDate))
    tried = Tried(sqlite_world, view, retry=policy)
    assert tried.answers().content == b"done"
    assert tried.attempts == [1, 2]
    assert sqlite_world.durable() == ["attempt 2"]
    (warning,) = warnings_of(caplog)
    assert "OutOfDate" in warning
    assert "secret" not in warning


def test_a_policy_may_know_of_more_errors_of_the_database(postgresql_world: World) -> None:
    """Also of those that the application makes an error page of."""

    def view() -> list[bytes]:
        if current_scope().attempt == 1:
            lose(postgresql_world, "55P03")
        return [b"done"]

    def is_transient(error: BaseException) -> bool:
        orig = getattr(error, "orig", None)
        return "55P03" in (getattr(orig, "sqlstate", None), getattr(orig, "pgcode", None))

    for make_app in (respond, framework):
        tried = Tried(postgresql_world, view, make_app, retry=RetryPolicy(delay=0, is_transient=is_transient))
        assert tried.answers().content == b"done"
        assert tried.attempts == [1, 2]


def test_a_race_that_is_lost_after_the_unit_around_it_has_ended_is_an_error_like_any_other(sqlite_url: URL) -> None:
    async def main(world: World) -> None:
        proceed = asyncio.Event()

        async def job() -> None:
            with pytest.raises(StaleDataError), session_scope(world.Session, propagation="requires_new"):
                await proceed.wait()
                find_it_stale(world)

        with session_scope(world.Session):
            task = asyncio.create_task(job())
            await asyncio.sleep(0)
        proceed.set()
        await task

    with closing(World(sqlite_url, "contextual")) as world:
        set_up(world.engine)
        with_session(world.Session, retry=POLICY)
        asyncio.run(main(world))
        assert world.checked_out == 0
        assert world.durable() == []


def test_is_transient_is_asked_about_errors_and_about_those_of_the_request_alone(sqlite_world: World) -> None:
    asked: list[BaseException] = []

    def is_transient(error: BaseException) -> bool:
        asked.append(error)
        return False

    def view() -> None:
        write(sqlite_world, "lost")
        sqlite_world.Session.rollback()
        with closing(sqlite_world.Session.session_factory()) as private:
            private.get(Counter, 1)
            try:
                raise LookupError
            except LookupError:
                private.rollback()
        raise Failure

    tried = Tried(sqlite_world, view, retry=RetryPolicy(delay=0, is_transient=is_transient))
    assert asked == [tried.raises(Failure)]


@pytest.mark.parametrize("make_app", [respond, framework], ids=["raised", "error page"])
@pytest.mark.parametrize("fail", [fail, fail_in_sql])
def test_an_is_transient_that_fails_changes_nothing(
    postgresql_world: World, caplog: pytest.LogCaptureFixture, make_app: Any, fail: Callable[[World], None]
) -> None:
    def is_transient(error: BaseException) -> bool:
        raise LookupError("".join(["se", "cret"]))

    policy = RetryPolicy(delay=0, is_transient=is_transient)
    tried = Tried(postgresql_world, lambda: fail(postgresql_world), make_app, retry=policy)
    if make_app is respond:
        tried.raises((ValueError, DBAPIError))  # type: ignore[arg-type]
    else:
        assert tried.answers().content == b"sorry"
    assert tried.attempts == [1]
    told = warnings_of(caplog)
    assert told or make_app is not respond
    assert all("is_transient failed" in warning and "secret" not in warning for warning in told)


def test_an_is_transient_that_fails_does_not_hide_the_races_that_are_known(postgresql_world: World) -> None:
    policy = RetryPolicy(delay=0, is_transient=lambda error: 1 / 0)
    tried = Tried(postgresql_world, first(postgresql_world, lose), retry=policy)
    assert tried.answers().content == b"done"
    assert tried.attempts == [1, 2]


# -- what it costs where it is not wanted -----------------------------------------------------------------------------


def test_without_a_policy_nothing_is_listened_to_for_its_sake() -> None:
    def listeners(**options: Any) -> tuple[int, ...]:
        engine = sa.create_engine("sqlite://")
        maker = sessionmaker(engine)
        SessionMiddleware(respond(lambda: []), scoped_session(maker), **options)
        with_session(maker, **options)
        dispatch: Any = maker().dispatch
        return (
            len(list(dispatch.after_soft_rollback)),
            len(list(engine.dispatch.handle_error if SQLALCHEMY_14 else engine.dialect.dispatch.handle_error)),
        )

    assert listeners() == (0, 0 if SQLALCHEMY_14 else 1)
    assert listeners(retry=None) == listeners()
    assert listeners(retry=POLICY) == (1, 1)


def test_without_a_policy_the_body_is_left_alone(sqlite_world: World) -> None:
    given = Unseekable(b"body")
    inputs: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        inputs.append(environ["wsgi.input"])
        start_response("200 OK", PLAIN)
        return []

    post(SessionMiddleware(app, sqlite_world.Session), b"body", given=given)
    assert inputs == [given]


def test_engines_from_before_and_from_after_the_first_policy_of_a_process_tell_of_their_commits(
    monkeypatch: pytest.MonkeyPatch, new_engine: Callable[..., Engine]
) -> None:
    monkeypatch.setattr("sa_wsgi_session._watching._there_are_policies", False)
    attempts: list[int] = []

    def work(maker: Any, **options: Any) -> None:
        @with_session(maker, **options)
        def job(*, session: Any) -> None:
            attempts.append(1)
            session.add(Note(text=str(len(attempts))))
            session.commit()
            raise LookupError

        with pytest.raises(LookupError):
            job()

    policy = RetryPolicy(delay=0, is_transient=lambda error: True)
    engines = [new_engine(Base) for _ in range(3)]
    # Of the engine of the last one nobody knows before it is used.
    secretive = type("Secretive", (Session,), {"get_bind": lambda *args, **options: engines[2]})
    makers: list[Any] = [sessionmaker(engines[0]), sessionmaker(engines[1]), sessionmaker(class_=secretive)]
    work(makers[0])
    for maker in makers:
        work(maker, retry=policy)
    assert len(attempts) == 4


def test_without_a_policy_nobody_listens_to_what_only_a_policy_needs() -> None:
    factories = [sessionmaker(sa.create_engine("sqlite://")) for _ in range(2)]
    SessionMiddleware(respond(list), scoped_session(factories[0]))
    SessionMiddleware(respond(list), scoped_session(factories[1]), retry=POLICY)
    listened_to = _watching._TO_SESSION_ON_TRIAL.targets()
    assert [factory.class_ in listened_to for factory in factories] == [False, True]


def test_a_driver_that_knows_of_no_autocommit_has_none() -> None:
    driver = SimpleNamespace()
    connection: Any = SimpleNamespace(
        _is_autocommit_isolation=lambda: False,
        dialect=SimpleNamespace(name="firebird"),
        connection=SimpleNamespace(dbapi_connection=driver),
    )
    assert not _watching._is_in_autocommit(connection)
    driver.autocommit = True
    assert _watching._is_in_autocommit(connection)


def test_what_was_read_from_a_database_in_autocommit_is_no_reason_not_to_replay(
    new_engine: Callable[..., Engine],
) -> None:
    engine, reports = new_engine(Base), new_engine(CountersBase, isolation_level="AUTOCOMMIT")
    session: Any = scoped_session(sessionmaker(binds={Note: engine, Counter: reports}))
    attempts: list[int] = []

    def view() -> list[bytes]:
        attempts.append(current_scope().attempt)
        session.add(Note(text="new"))
        session.flush()
        session.execute(sa.select(Counter.id)).all()
        if len(attempts) == 1:
            raise StaleDataError
        return [b"done"]

    assert request(SessionMiddleware(respond(view), session, retry=POLICY)).content == b"done"
    assert attempts == [1, 2]
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count(Note.id))) == 1


def test_without_a_policy_webob_is_not_imported() -> None:
    program = (
        "import sys; from sqlalchemy.orm import sessionmaker; from sa_wsgi_session import *;"
        "SessionMiddleware(print, sessionmaker()); with_session(sessionmaker());"
        "print('webob' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"False\n"


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "kind", "words"),
    [
        ("attempts", 0, ValueError, ["whole number", "1 or more", "not 0"]),
        ("attempts", -1, ValueError, ["not -1"]),
        ("attempts", 2.0, TypeError, ["whole number", "float"]),
        ("attempts", "3", TypeError, ["str"]),
        ("attempts", None, TypeError, ["NoneType"]),
        ("attempts", True, TypeError, ["bool"]),
        ("delay", -0.1, ValueError, ["seconds", "0 or more", "not -0.1"]),
        ("delay", float("nan"), ValueError, ["not nan"]),
        ("delay", float("inf"), ValueError, ["not inf"]),
        ("delay", "1", TypeError, ["seconds", "str"]),
        ("delay", None, TypeError, ["NoneType"]),
        ("max_delay", -1, ValueError, ["not -1"]),
        ("max_delay", float("inf"), ValueError, ["not inf"]),
        ("max_delay", [], TypeError, ["list"]),
        ("deadline", -1, ValueError, ["seconds", "or None", "not -1"]),
        ("deadline", float("nan"), ValueError, ["not nan"]),
        ("deadline", "10", TypeError, ["or None", "str"]),
        ("deadline", False, TypeError, ["bool"]),
        ("max_body", -1, ValueError, ["bytes", "not -1"]),
        ("max_body", 1.5, TypeError, ["whole number of bytes", "float"]),
        ("max_body", None, TypeError, ["NoneType"]),
        ("is_transient", 1, TypeError, ["callable", "exception", "None", "int"]),
        ("is_transient", OSError, TypeError, ["the class builtins.OSError"]),
        ("is_transient", (OSError,), TypeError, ["tuple"]),
    ],
)
def test_a_bad_policy_is_refused_by_an_error_that_names_what_is_wrong(
    argument: str, value: Any, kind: type[Exception], words: list[str]
) -> None:
    with pytest.raises(kind, match=f"^{argument} must be .*" + ".*".join(map(re.escape, words))):
        RetryPolicy(**{argument: value})


@pytest.mark.parametrize(
    "policy",
    [
        RetryPolicy(),
        RetryPolicy(1, delay=0, max_delay=0, deadline=None, max_body=0, is_transient=None),
        RetryPolicy(attempts=1000, delay=1, max_delay=0.5, deadline=0, max_body=10**9, is_transient=print),
        RetryPolicy(deadline=1.5, is_transient=lambda error: True),
        RetryPolicy(delay=sys.float_info.max),
    ],
    ids=["defaults", "one attempt", "whole numbers", "fractions", "the largest number"],
)
def test_a_good_policy_is_taken(policy: RetryPolicy) -> None:
    SessionMiddleware(respond(lambda: []), sessionmaker(), retry=policy)
    with_session(sessionmaker(), retry=policy)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(3, "int"), (True, "bool"), (False, "bool"), ("3", "str"), (RetryPolicy, "type"), ({"attempts": 3}, "dict")],
)
@pytest.mark.parametrize(
    "take",
    [
        lambda retry: SessionMiddleware(respond(lambda: []), sessionmaker(), retry=retry),
        lambda retry: with_session(sessionmaker(), retry=retry),
    ],
    ids=["SessionMiddleware", "with_session"],
)
def test_what_is_no_policy_is_refused(take: Callable[[Any], Any], value: Any, shown: str) -> None:
    with pytest.raises(TypeError, match=f"^retry must be a RetryPolicy, or None, not an object of type {shown}$"):
        take(value)


def test_a_policy_can_be_shared_because_it_does_not_change() -> None:
    policy = RetryPolicy()
    # Of the documentation.
    assert policy == RetryPolicy(3, delay=0.05, max_delay=1, deadline=10, max_body=2**20, is_transient=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.attempts = 4  # type: ignore[misc]
    assert policy == RetryPolicy()
    assert hash(policy) == hash(RetryPolicy())
    assert dataclasses.replace(policy, attempts=4) == RetryPolicy(attempts=4)
    with pytest.raises(ValueError, match="attempts"):
        dataclasses.replace(policy, attempts=0)


def test_a_policy_shows_what_it_is() -> None:
    assert repr(RetryPolicy(attempts=5)) == (
        "RetryPolicy(attempts=5, delay=0.05, max_delay=1.0, deadline=10.0, max_body=1048576, is_transient=None)"
    )


def test_a_value_that_cannot_be_written_is_told_by_its_type():
    # Python refuses to write integers of more than 4,300 digits.
    with pytest.raises(ValueError, match=r"^attempts must be a whole number, 1 or more, not an object of type int$"):
        RetryPolicy(attempts=-(10**5000))
