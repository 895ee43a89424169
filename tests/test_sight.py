"""Sight: the observer, the ``Server-Timing`` header, the warnings for what hurts in production."""

from __future__ import annotations

import gc
import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import scoped_session, sessionmaker

from sa_wsgi_session import (
    RetryPolicy,
    SessionMiddleware,
    _sight,
    current_scope,
    session_scope,
    with_session,
)
from sa_wsgi_session.observers import FinishedUnit
from tests.support import (
    PLAIN,
    Exchange,
    Note,
    World,
    Worlds,
    in_each_registry,
    make_environ,
    note,
    request,
    respond,
    serve,
)

pytestmark = pytest.mark.filterwarnings("ignore:<psycopg.ServerCursor:ResourceWarning")


class Failure(Exception):
    """What goes wrong in these tests."""


class Seen(list[FinishedUnit]):
    """An observer that keeps what it is told."""

    def __call__(self, unit: FinishedUnit) -> None:
        self.append(unit)

    @property
    def one(self) -> FinishedUnit:
        (unit,) = self
        return unit


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def postgresql_world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    with worlds.use(request.getfixturevalue, "postgresql", "thread-local") as world:
        yield world


@pytest.fixture
def told() -> Iterator[None]:
    """Without the places that other tests have been warned of."""
    before = set(_sight._told)
    _sight._told.clear()
    yield
    _sight._told.clear()
    _sight._told.update(before)


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def drop(exchange: Exchange) -> Any:
    """What is left of it when nobody closes its body."""
    exchange.body = exchange._iterator = None
    gc.collect()


# What an observer is told


@in_each_registry
def test_a_request_that_writes(world: World, seen: Seen) -> None:
    def view() -> list[bytes]:
        world.Session.add(note("one"))
        world.Session.flush()
        world.Session.scalars(sa.select(Note)).all()
        return [b"done"]

    request(serve(world, view, "201 Created", observer=seen), "/notes", "POST")
    unit = seen.one
    assert (unit.name, unit.method, unit.path, unit.status) == ("POST /notes", "POST", "/notes", 201)
    assert (unit.outcome, unit.reason, unit.attempts) == ("committed", None, 1)
    assert (unit.commits, unit.rollbacks, unit.statements) == (1, 0, 2)
    assert (unit.streamed, unit.complete) == (False, True)
    assert 0 < unit.commit_seconds < unit.database_seconds < unit.seconds
    assert unit.commit_seconds < unit.connection_seconds < unit.seconds
    assert unit.streaming_connection_seconds == 0
    assert world.durable() == ["one"]


def test_the_record_cannot_be_changed(world: World, seen: Seen) -> None:
    request(serve(world, lambda: [b""], observer=seen))
    with pytest.raises(AttributeError):
        seen.one.status = 500  # type: ignore[misc]


@in_each_registry
def test_a_request_without_a_transaction(world: World, seen: Seen) -> None:
    request(serve(world, lambda: [b"static"], observer=seen))
    unit = seen.one
    assert (unit.status, unit.outcome, unit.reason) == (200, "nothing", None)
    assert (unit.commits, unit.rollbacks, unit.statements) == (0, 0, 0)
    assert unit.database_seconds == unit.connection_seconds == 0


def test_a_session_that_has_sent_nothing_has_had_no_transaction(world: World, seen: Seen) -> None:
    def view() -> list[bytes]:
        world.Session.add(note("expunged"))
        world.Session.expunge_all()
        return [b""]

    request(serve(world, view, observer=seen))
    assert (seen.one.outcome, seen.one.commits, seen.one.rollbacks) == ("nothing", 0, 0)


def test_a_veto(world: World, seen: Seen) -> None:
    def view() -> list[bytes]:
        world.Session.add(note("one"))
        world.Session.flush()
        return [b"no"]

    request(serve(world, view, "404 Not Found", observer=seen))
    assert (seen.one.status, seen.one.outcome, seen.one.reason) == (404, "rolled back", "commit_veto")
    assert (seen.one.commits, seen.one.rollbacks) == (0, 1)


def test_a_dry_run(world: World, seen: Seen) -> None:
    def view() -> list[bytes]:
        world.Session.add(note("one"))
        world.Session.flush()
        current_scope().doom("a dry run")
        return [b""]

    request(serve(world, view, observer=seen))
    assert (seen.one.status, seen.one.outcome, seen.one.reason) == (200, "rolled back", "doomed: a dry run")


def test_an_exception(world: World, seen: Seen) -> None:
    def view() -> Any:
        world.Session.add(note("one"))
        world.Session.flush()
        raise Failure

    with pytest.raises(Failure):
        request(serve(world, view, observer=seen))
    assert (seen.one.status, seen.one.outcome) == (None, "rolled back")
    assert seen.one.reason == f"{__name__}.Failure"


def test_a_commit_that_fails(world: World, seen: Seen) -> None:
    world.insert("one")

    def view() -> list[bytes]:
        world.Session.add(note("one"))
        return [b""]

    with pytest.raises(sa.exc.IntegrityError):
        request(serve(world, view, observer=seen))
    assert (seen.one.status, seen.one.outcome) == (None, "rolled back")
    assert seen.one.reason == "sqlalchemy.exc.IntegrityError"
    assert seen.one.statements == 1


def test_a_server_that_refuses_the_headers(world: World, seen: Seen) -> None:
    def view() -> list[bytes]:
        world.Session.add(note("one"))
        return [b""]

    def refuse(*args: Any) -> Any:
        raise Failure

    with pytest.raises(Failure):
        serve(world, view, observer=seen)(make_environ(), refuse)
    # It is durable: the server was told after the commit.
    assert (seen.one.status, seen.one.outcome, seen.one.reason) == (200, "committed", f"{__name__}.Failure")


def test_a_commit_is_told_before_the_applications_own_listener_can_fail(world: World, seen: Seen) -> None:
    def fail(session: Any) -> None:
        raise Failure

    event.listen(world.Session, "after_commit", fail)

    def view() -> list[bytes]:
        world.Session.add(note("one"))
        return [b""]

    with pytest.raises(Failure):
        request(serve(world, view, observer=seen))
    # It is durable all the same.
    assert (seen.one.outcome, seen.one.commits, seen.one.rollbacks) == ("committed", 1, 0)
    assert seen.one.reason == f"{__name__}.Failure"
    assert world.durable() == ["one"]


def test_the_outcome_of_a_commit_that_nobody_knows(world: World, seen: Seen) -> None:
    def view() -> list[bytes]:
        world.Session.add(note("one"))
        world.Session.flush()
        return [b""]

    app = serve(world, view, observer=seen)
    commit = world.engine.dialect.do_commit

    def fail(connection: Any) -> None:
        world.engine.dialect.do_commit = commit  # type: ignore[method-assign]
        raise OSError("the connection was lost")

    # Below the package's own wrapper.
    wrapper: Any = commit
    world.engine.dialect.do_commit = partial(wrapper.func, fail)  # type: ignore[method-assign]
    with pytest.raises(OSError, match="lost"):
        request(app)
    assert (seen.one.outcome, seen.one.reason) == ("unknown", "OSError")
    assert (seen.one.commits, seen.one.rollbacks) == (0, 0)


def test_the_applications_own_transactions_count(world: World, seen: Seen) -> None:
    def view() -> list[bytes]:
        world.Session.add(note("one"))
        world.Session.commit()
        world.Session.add(note("two"))
        world.Session.flush()
        world.Session.rollback()
        with world.Session.begin_nested():
            world.Session.add(note("three"))
        world.Session.commit()
        return [b""]

    request(serve(world, view, observer=seen))
    assert (seen.one.outcome, seen.one.commits, seen.one.rollbacks) == ("committed", 2, 1)
    assert world.durable() == ["one", "three"]


def test_the_path_is_safe_to_log(world: World, seen: Seen) -> None:
    request(serve(world, lambda: [b""], observer=seen), "/a\nb" + 300 * "x")
    assert seen.one.path == "/a%0Ab" + 196 * "x"
    assert seen.one.name == f"GET {seen.one.path}"


def test_no_session_is_bound_when_the_observer_is_called(world: World) -> None:
    found = []

    def observer(unit: FinishedUnit) -> None:
        found.append((world.checked_out, world.Session.registry.has()))

    def view() -> list[bytes]:
        world.Session.add(note("one"))
        return [b""]

    def stream() -> Iterator[bytes]:
        world.Session.scalars(sa.select(Note)).all()
        yield b""

    request(serve(world, view, observer=observer))
    request(serve(world, stream, observer=observer))
    assert found == [(0, False), (0, False)]


def test_an_observer_that_fails_is_logged_and_has_no_other_effect(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "it is " + "secret"

    def observer(unit: FinishedUnit) -> None:
        raise Failure(secret)

    def view() -> list[bytes]:
        world.Session.add(note("one"))
        return [b"done"]

    assert request(serve(world, view, observer=observer)).content == b"done"
    assert world.durable() == ["one"]
    (message,) = messages(caplog)
    assert "observer" in message
    assert "Failure" in message
    assert secret not in message


# Streams


@in_each_registry
def test_a_body_that_streams(world: World, seen: Seen) -> None:
    world.insert("one", "two")

    def view() -> Iterator[bytes]:
        world.Session.add(note("three"))
        world.Session.flush()
        return stream()

    def stream() -> Iterator[bytes]:
        for found in world.Session.scalars(sa.select(Note)).all():
            yield found.text.encode()

    exchange = Exchange(serve(world, view, observer=seen))
    assert not seen
    assert exchange.read() == b"onetwothree"
    unit = seen.one
    assert (unit.status, unit.outcome, unit.reason, unit.streamed, unit.complete) == (
        200,
        "committed",
        None,
        True,
        True,
    )
    assert (unit.commits, unit.statements) == (2, 2)
    assert 0 < unit.streaming_connection_seconds < unit.connection_seconds < unit.seconds
    exchange.close()
    assert len(seen) == 1


def test_a_client_that_hangs_up(world: World, seen: Seen) -> None:
    def stream() -> Iterator[bytes]:
        world.Session.add(note("one"))
        world.Session.flush()
        yield b"one"
        yield b"two"

    exchange = Exchange(serve(world, stream, observer=seen))
    exchange.next()
    exchange.close()
    unit = seen.one
    assert (unit.status, unit.outcome, unit.complete) == (200, "rolled back", False)
    assert unit.reason == "the body was not read to its end"


def test_a_body_that_fails(world: World, seen: Seen) -> None:
    def stream() -> Iterator[bytes]:
        world.Session.add(note("one"))
        world.Session.flush()
        yield b"one"
        raise Failure

    exchange = Exchange(serve(world, stream, observer=seen))
    exchange.next()
    with pytest.raises(Failure):
        exchange.next()
    exchange.close()
    assert (seen.one.outcome, seen.one.reason, seen.one.complete) == ("rolled back", f"{__name__}.Failure", False)


def test_a_close_that_fails(world: World, seen: Seen) -> None:
    class Body:
        def __iter__(self) -> Iterator[bytes]:
            return iter([b"one"])

        def close(self) -> None:
            raise Failure

    exchange = Exchange(serve(world, Body, observer=seen))
    with pytest.raises(Failure):
        exchange.read()
    assert seen.one.reason == f"{__name__}.Failure"


def test_a_body_that_is_dropped(world: World, seen: Seen) -> None:
    exchange = Exchange(serve(world, lambda: (chunk for chunk in [b"one", b"two"]), observer=seen))
    exchange.next()
    with pytest.warns(ResourceWarning, match="dropped"):
        exchange = drop(exchange)
    assert (seen.one.reason, seen.one.complete) == ("the body was dropped without close()", False)


def test_what_a_stream_holds_open(world: World, seen: Seen) -> None:
    """The connection that the body keeps from the view on."""
    world.insert("one", "two")

    def view() -> Iterator[bytes]:
        result = world.Session.execute(sa.select(Note.text))
        return (text.encode() for (text,) in result)

    exchange = Exchange(serve(world, view, observer=seen))
    assert exchange.read() == b"onetwo"
    assert 0 < seen.one.streaming_connection_seconds < seen.one.connection_seconds


def test_what_others_do_between_the_chunks_is_not_the_requests(world: World, seen: Seen) -> None:
    def stream() -> Iterator[bytes]:
        yield b"one"
        world.Session.execute(sa.text("SELECT 1"))
        yield b"two"

    exchange = Exchange(serve(world, stream, observer=seen))
    exchange.next()
    exchange.next()
    with world.engine.begin() as connection:
        connection.execute(sa.text("SELECT 2"))
    exchange.read()
    assert (seen.one.statements, seen.one.commits) == (1, 1)


# Replays, parts, jobs


def test_what_all_attempts_have_cost(world: World, seen: Seen) -> None:
    def view() -> list[bytes]:
        world.Session.add(note("one"))
        world.Session.flush()
        if current_scope().attempt < 3:
            raise OperationalError("UPDATE", {}, Exception("database is locked"))
        return [b""]

    def is_transient(error: BaseException) -> bool:
        return isinstance(error, OperationalError)

    policy = RetryPolicy(3, delay=0, is_transient=is_transient)
    request(serve(world, view, observer=seen, retry=policy))
    unit = seen.one
    assert (unit.attempts, unit.outcome, unit.reason, unit.status) == (3, "committed", None, 200)
    assert (unit.commits, unit.rollbacks, unit.statements) == (1, 2, 3)


def test_the_outcome_is_that_of_the_last_attempt(world: World, seen: Seen) -> None:
    def view() -> list[bytes]:
        if current_scope().attempt == 1:
            world.Session.execute(sa.text("SELECT 1"))
            raise OperationalError("UPDATE", {}, Exception())
        return [b"nothing to do any more"]

    policy = RetryPolicy(delay=0, is_transient=lambda error: True)
    request(serve(world, view, observer=seen, retry=policy))
    assert (seen.one.attempts, seen.one.outcome, seen.one.rollbacks) == (2, "nothing", 1)


def test_a_request_that_ends_before_its_unit_of_work_begins_is_nothing_to_tell_of(world: World, seen: Seen) -> None:
    class Gone:
        def read(self, size: int = -1) -> bytes:
            raise OSError("the client has gone")

    app = serve(world, lambda: [b""], observer=seen, retry=RetryPolicy())
    with pytest.raises(OSError, match="has gone"):
        Exchange(app, {**make_environ(method="POST"), "wsgi.input": Gone(), "CONTENT_LENGTH": "9"})
    assert seen == []


def test_attempts_that_are_used_up(world: World, seen: Seen) -> None:
    def view() -> Any:
        raise OperationalError("UPDATE", {}, Exception())

    policy = RetryPolicy(2, delay=0, is_transient=lambda error: True)
    with pytest.raises(OperationalError):
        request(serve(world, view, observer=seen, retry=policy))
    assert (seen.one.attempts, seen.one.reason) == (2, "sqlalchemy.exc.OperationalError")


def test_parts_belong_to_the_unit_around_them(world: World, seen: Seen) -> None:
    inner = Seen()

    def view() -> list[bytes]:
        with session_scope(world.Session, observer=inner) as session:
            session.add(note("joined"))
            session.flush()
        with session_scope(world.Session, propagation="nested", observer=inner) as session:
            session.add(note("nested"))
        world.Session.commit()
        with session_scope(world.Session, propagation="requires_new") as session:
            session.add(note("independent"))
        return [b""]

    request(serve(world, view, observer=seen))
    assert not inner
    # The independent part has none of its own; SAVEPOINTs are not counted.
    assert (seen.one.commits, seen.one.statements) == (1, 3)


def test_an_independent_part_with_an_observer_of_its_own(world: World, seen: Seen) -> None:
    inner = Seen()

    def view() -> list[bytes]:
        with session_scope(world.Session, propagation="requires_new", name="audit", observer=inner) as session:
            session.add(note("independent"))
        return [b""]

    request(serve(world, view, observer=seen))
    assert (inner.one.name, inner.one.statements, inner.one.commits) == ("audit", 1, 1)
    assert (seen.one.statements, seen.one.commits, seen.one.outcome) == (0, 0, "nothing")


@in_each_registry
def test_a_block(world: World, seen: Seen) -> None:
    with session_scope(world.Session, name="nightly purge", observer=seen) as session:
        session.add(note("one"))
    unit = seen.one
    assert (unit.name, unit.method, unit.path, unit.status) == ("nightly purge", None, None, None)
    assert (unit.outcome, unit.reason, unit.commits, unit.statements) == ("committed", None, 1, 1)
    assert (unit.streamed, unit.complete) == (False, True)


def test_a_block_that_is_used_again(world: World, seen: Seen) -> None:
    block = session_scope(world.Session, observer=seen)
    for text in "one", "two":
        with block as session:
            session.add(note(text))
    assert [(unit.name, unit.statements) for unit in seen] == [("session_scope()", 1), ("session_scope()", 1)]


def test_a_block_that_fails(world: World, seen: Seen) -> None:
    with pytest.raises(Failure), session_scope(world.Session, observer=seen) as session:
        session.add(note("one"))
        session.flush()
        raise Failure
    assert (seen.one.outcome, seen.one.reason) == ("rolled back", f"{__name__}.Failure")


def test_a_block_whose_session_cannot_be_made(seen: Seen) -> None:
    def fail() -> Any:
        raise Failure

    with pytest.raises(Failure), session_scope(scoped_session(fail), observer=seen):  # type: ignore[arg-type]
        pass
    assert (seen.one.outcome, seen.one.reason) == ("nothing", f"{__name__}.Failure")


def test_a_job(world: World, seen: Seen) -> None:
    @with_session(world.Session, observer=seen)
    def purge(days: int, *, session: Any) -> int:
        session.add(note("one"))
        return days

    assert purge(30) == 30
    assert seen.one.name == f"{__name__}.test_a_job.<locals>.purge"
    assert (seen.one.outcome, seen.one.statements) == ("committed", 1)


def test_a_job_that_fails_where_there_is_no_policy(world: World, seen: Seen, caplog: pytest.LogCaptureFixture) -> None:
    @with_session(world.Session, observer=seen)
    def purge(*, session: Any) -> None:
        raise Failure

    with pytest.raises(Failure):
        purge()
    assert (seen.one.outcome, seen.one.attempts) == ("nothing", 1)
    assert caplog.messages == []


def test_a_job_that_is_replayed(world: World, seen: Seen) -> None:
    attempts = []

    @with_session(world.Session, observer=seen, retry=RetryPolicy(3, delay=0, is_transient=lambda error: True))
    def purge(*, session: Any) -> None:
        attempts.append(session.execute(sa.text("SELECT 1")).scalar())
        if len(attempts) == 1:
            raise OperationalError("UPDATE", {}, Exception())

    purge()
    assert (seen.one.attempts, seen.one.outcome, seen.one.statements) == (2, "committed", 2)
    assert (seen.one.commits, seen.one.rollbacks) == (1, 1)


def test_a_job_within_a_job_is_a_part_of_it(world: World, seen: Seen) -> None:
    @with_session(world.Session, observer=seen)
    def inner(*, session: Any) -> None:
        session.add(note("one"))

    @with_session(world.Session, observer=seen)
    def outer(*, session: Any) -> None:
        inner()

    outer()
    assert seen.one.name.endswith(".outer")


def test_two_units_at_once_on_two_threads(world: World, seen: Seen) -> None:
    meet = threading.Barrier(2, timeout=30)

    def work(number: int) -> None:
        with session_scope(world.Session, name=str(number), observer=seen) as session:
            for _ in range(number):
                session.execute(sa.text("SELECT 1"))
                meet.wait() if _ == 0 else None

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((unit.name, unit.statements) for unit in seen) == [("1", 1), ("4", 4)]


def test_each_way_to_send_a_statement_is_counted(world: World, seen: Seen) -> None:
    with session_scope(world.Session, observer=seen) as session:
        session.execute(sa.insert(Note), [{"text": "one"}, {"text": "two"}])
        session.connection().exec_driver_sql("INSERT INTO note (text) VALUES (?)", [("three",), ("four",)])
        session.connection().execution_options(no_parameters=True).exec_driver_sql("SELECT 1")
        with pytest.raises(OperationalError):
            session.execute(sa.text("SELECT 1 FROM nothing"))
    assert seen.one.statements == 4
    assert world.durable() == ["four", "one", "three", "two"]


def test_an_engine_that_is_bound_later(world: World, seen: Seen) -> None:
    Session = scoped_session(sessionmaker())
    app = SessionMiddleware(
        respond(lambda: [str(Session.execute(sa.text("SELECT 'x'")).scalar()).encode()]), Session, observer=seen
    )
    Session.configure(bind=world.engine)
    assert request(app).content == b"x"
    assert seen.one.statements == 1


def test_a_factory_that_says_nothing_of_its_engine(world: World, seen: Seen) -> None:
    Session: Any = scoped_session(lambda: OrmSession(world.engine))  # type: ignore[arg-type]
    with session_scope(Session, observer=seen) as session:
        session.execute(sa.text("SELECT 1"))
    assert seen.one.statements == 1


@pytest.mark.parametrize("shape", ["list", "stream"])
def test_on_each_database(database_url: URL, seen: Seen, shape: str) -> None:
    world = World(database_url)

    def view() -> Any:
        world.Session.add(note("one"))
        world.Session.flush()
        body = (found.text.encode() for found in world.Session.query(Note))
        return list(body) if shape == "list" else body

    try:
        request(serve(world, view, observer=Seen()))  # the engine's first questions
        with session_scope(world.Session) as session:
            session.execute(sa.delete(Note))
        request(serve(world, view, observer=seen))
        assert (seen.one.outcome, seen.one.statements, seen.one.commits) == ("committed", 2, 1 + (shape == "stream"))
    finally:
        world.close()


@pytest.mark.parametrize("observer", [3, Seen, "observer"])
def test_what_is_no_observer(world: World, observer: Any) -> None:
    with pytest.raises(TypeError, match=r"^observer must be a callable that takes a FinishedUnit, or None, not"):
        SessionMiddleware(respond(lambda: []), world.Session, observer=observer)
    with pytest.raises(TypeError, match=r"^observer must be"):
        session_scope(world.Session, observer=observer)
    with pytest.raises(TypeError, match=r"^observer must be"):
        with_session(world.Session, observer=observer)


def test_a_name_that_is_none(world: World) -> None:
    with pytest.raises(TypeError, match=r"^name must be a str, not an object of type int"):
        session_scope(world.Session, name=3)  # type: ignore[arg-type]


# Server-Timing

_TIMING = re.compile(r'db;dur=(\d+\.\d{3});desc="statements: (\d+)", commit;dur=(\d+\.\d{3}), attempts;desc="(\d+)"')


def timing_of(exchange: Exchange) -> tuple[float, int, float, int]:
    (value,) = [value for name, value in exchange.headers if name == "Server-Timing"]
    match = _TIMING.fullmatch(value)
    assert match is not None, value
    database, statements, commit, attempts = match.groups()
    return float(database), int(statements), float(commit), int(attempts)


@in_each_registry
def test_the_header(world: World) -> None:
    def view() -> list[bytes]:
        world.Session.add(note("one"))
        world.Session.flush()
        return [b"done"]

    exchange = request(serve(world, view, server_timing=True))
    database, statements, commit, attempts = timing_of(exchange)
    assert (statements, attempts) == (1, 1)
    assert 0 < commit < database
    assert exchange.headers[:1] == PLAIN
    # The application's own list is as it was.
    assert PLAIN == [("Content-Type", "text/plain")]


def test_the_header_says_what_the_observer_is_told(world: World, seen: Seen, clock: Callable[[float], None]) -> None:
    """In milliseconds, as the W3C demands."""

    def slowly(send: Callable[..., None]) -> Any:
        def slow(*args: Any) -> None:
            clock(2)
            send(*args)

        return slow

    dialect: Any = world.engine.dialect
    dialect.do_execute, dialect.do_commit = slowly(dialect.do_execute), slowly(dialect.do_commit)

    def view() -> list[bytes]:
        world.Session.add(note("one"))
        return [b""]

    exchange = request(serve(world, view, server_timing=True, observer=seen))
    unit = seen.one
    database, statements, commit, attempts = timing_of(exchange)
    assert f"{database:.3f}" == f"{1000 * unit.database_seconds:.3f}"
    assert f"{commit:.3f}" == f"{1000 * unit.commit_seconds:.3f}"
    # BEGIN, INSERT and COMMIT.
    assert 6000 < database < 7000
    assert 2000 < commit < 3000
    assert (statements, attempts) == (unit.statements, unit.attempts) == (1, 1)


def test_a_header_of_the_applications_own_stays(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Server-Timing", "cache;desc=hit")])
        return [b""]

    exchange = request(SessionMiddleware(app, world.Session, server_timing=True))
    assert [name for name, _ in exchange.headers] == ["Server-Timing", "Server-Timing"]
    assert exchange.headers[0][1] == "cache;desc=hit"


def test_of_a_stream_what_is_known_when_it_begins(world: World) -> None:
    def view() -> Iterator[bytes]:
        world.Session.add(note("one"))
        world.Session.flush()
        return (found.text.encode() for found in world.Session.scalars(sa.select(Note)))

    assert timing_of(request(serve(world, view, server_timing=True)))[1] == 2

    def generator() -> Iterator[bytes]:
        world.Session.execute(sa.text("SELECT 1"))
        yield b"one"
        world.Session.execute(sa.text("SELECT 1"))
        yield b"two"

    assert timing_of(request(serve(world, generator, server_timing=True)))[1] == 0


def test_of_all_attempts(world: World) -> None:
    def view() -> list[bytes]:
        world.Session.execute(sa.text("SELECT 1"))
        if current_scope().attempt == 1:
            raise OperationalError("UPDATE", {}, Exception())
        return [b""]

    policy = RetryPolicy(delay=0, is_transient=lambda error: True)
    _, statements, _, attempts = timing_of(request(serve(world, view, server_timing=True, retry=policy)))
    assert (statements, attempts) == (2, 2)


def test_an_error_page_that_comes_by_exc_info(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/html")])
        try:
            raise Failure
        except Failure:
            start_response("500 Internal Server Error", PLAIN, sys.exc_info())
        return [b"an error page"]

    exchange = request(SessionMiddleware(app, world.Session, server_timing=True))
    assert exchange.status == "500 Internal Server Error"
    assert timing_of(exchange)[3] == 1


@pytest.mark.parametrize("commits", [True, False])
def test_another_commit_says_nothing_of_the_transaction_of_the_session(
    postgresql_world: World, seen: Seen, commits: bool
) -> None:
    def view() -> list[bytes]:
        postgresql_world.Session.execute(sa.select(Note)).all()
        with postgresql_world.engine.begin() as connection:
            connection.execute(sa.insert(Note), {"text": "by itself"})
        return [b""]

    request(serve(postgresql_world, view, "200 OK" if commits else "404 Not Found", observer=seen))
    assert (seen.one.outcome, seen.one.commits) == (("committed", 1) if commits else ("rolled back", 0))
    assert postgresql_world.durable() == ["by itself"]


def test_a_transaction_that_goes_without_a_word(world: World, seen: Seen) -> None:
    def view() -> list[bytes]:
        world.Session.execute(sa.select(Note)).all()
        # SQLAlchemy tells nobody of a transaction whose ROLLBACK fails.
        world.Session.connection().connection.dbapi_connection.close()
        with pytest.raises(sa.exc.ProgrammingError):
            world.Session.remove()
        return [b""]

    request(serve(world, view, observer=seen))
    assert (seen.one.outcome, seen.one.rollbacks) == ("rolled back", 1)
    assert seen.one.connection_seconds > 0


def test_the_legacy_write(world: World, seen: Seen) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        write = start_response("200 OK", PLAIN)
        write(b"written, ")
        return [b"returned"]

    exchange = request(SessionMiddleware(app, world.Session, observer=seen))
    assert exchange.written == [b"written, "]
    assert exchange.content == b"returned"


def test_for_whom_the_header_is(world: World) -> None:
    app = serve(world, lambda: [b""], server_timing=lambda environ: environ.get("REMOTE_USER") == "operator")
    assert [name for name, _ in request(app).headers] == ["Content-Type"]
    assert timing_of(request(app, REMOTE_USER="operator"))


def test_no_header_by_default(world: World, seen: Seen) -> None:
    for options in {}, {"observer": seen}, {"warn_after": 5}:
        assert request(serve(world, lambda: [b""], **options)).headers == PLAIN


@pytest.mark.parametrize("value", [3, None, "yes", Seen])
def test_what_is_no_server_timing(world: World, value: Any) -> None:
    with pytest.raises(
        TypeError, match=r"^server_timing must be True, False or a callable that takes the environ, not"
    ):
        SessionMiddleware(respond(lambda: []), world.Session, server_timing=value)


# Warnings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass, as far as the package sees it."""
    passed = 0.0
    real = time.perf_counter

    def let_pass(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    monkeypatch.setattr(_sight, "perf_counter", lambda: real() + passed)
    return let_pass


@pytest.mark.usefixtures("told")
@in_each_registry
def test_a_body_that_keeps_a_connection(
    world: World, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    def stream() -> Iterator[bytes]:
        yield b"nothing yet"
        clock(60)
        yield b"nor now"
        world.Session.execute(sa.text("SELECT 1"))
        for _ in range(3):
            yield b"now it has one"
            clock(3)

    app = serve(world, stream, warn_after=5)
    for _ in range(2):
        request(app, "/export")
    (message,) = messages(caplog)
    assert message.startswith("GET /export: the body that comes from stream() at ")
    assert f"{__file__}:{stream.__code__.co_firstlineno}" in message
    assert "more than 5 seconds" in message
    assert "Session.commit()" in message


@pytest.mark.usefixtures("told")
def test_a_body_that_does_not_keep_it_for_long(
    world: World, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    def stream() -> Iterator[bytes]:
        for _ in range(3):
            world.Session.execute(sa.text("SELECT 1"))
            clock(4)
            world.Session.rollback()
            yield b"chunk"

    request(serve(world, stream, warn_after=5))
    assert messages(caplog) == []


@pytest.mark.usefixtures("told")
def test_a_body_is_warned_of_where_it_comes_from(
    world: World, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    class Body:
        def __iter__(self) -> Iterator[bytes]:
            world.Session.execute(sa.text("SELECT 1"))
            clock(9)
            return iter([b"one"])

        def __next__(self) -> bytes:
            raise NotImplementedError

    class Chunks:
        def __iter__(self) -> Chunks:
            return self

        def __next__(self) -> bytes:
            world.Session.execute(sa.text("SELECT 1"))
            clock(9)
            self.ends = hasattr(self, "ends")
            if self.ends:
                raise StopIteration
            return b"one"

    for body in Body, Chunks:
        request(serve(world, body, warn_after=5))
    # The first one has done so before its response began.
    (message,) = messages(caplog)
    assert f"comes from {__name__}." in message
    assert ".Chunks has kept" in message


@pytest.mark.usefixtures("told")
def test_a_body_that_is_dropped_is_warned_of_once_for_each_place(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def stream() -> Iterator[bytes]:
        yield b"one"
        yield b"two"

    app = serve(world, stream, warn_after=5)
    for _ in range(2):
        exchange = Exchange(app)
        exchange.next()
        with pytest.warns(ResourceWarning):
            exchange = drop(exchange)
    (message,) = messages(caplog)
    assert "stream() at " in message
    assert "was dropped without a call to its close()" in message


@pytest.mark.usefixtures("told")
def test_a_session_that_is_used_after_the_response(world: World, caplog: pytest.LogCaptureFixture, worlds: Any) -> None:
    app = serve(world, lambda: [b""], warn_after=5)
    for _ in range(2):
        request(app)
        world.Session.execute(sa.text("SELECT 1"))
        world.Session.remove()
    (message,) = messages(caplog)
    assert f"is used at {__file__}:" in message
    assert "session_scope()" in message


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("warns", [True, False])
def test_only_a_thread_that_serves_whoever_wants_to_be_warned_is_told(
    world: World, seen: Seen, caplog: pytest.LogCaptureFixture, warns: bool
) -> None:
    apps = [serve(world, lambda: [b""], warn_after=5), serve(world, lambda: [b""], observer=seen)]

    def work() -> None:
        request(apps[0 if warns else 1])
        world.Session.execute(sa.text("SELECT 1"))
        world.Session.remove()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(messages(caplog)) == warns


@pytest.mark.usefixtures("told")
def test_what_else_is_no_use_after_the_response(world: World, caplog: pytest.LogCaptureFixture) -> None:
    # Neither on a thread that serves nobody…
    def work() -> None:
        world.Session.execute(sa.text("SELECT 1"))
        world.Session.remove()

    app = serve(world, lambda: [b""], warn_after=5)
    request(app)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    # …nor with a session that no registry holds, nor in a unit of work that nobody observes.
    with OrmSession(world.engine) as session:
        session.execute(sa.text("SELECT 1"))
    with session_scope(world.Session) as session:
        session.execute(sa.text("SELECT 1"))
    assert messages(caplog) == []


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("has_one", [True, False])
def test_another_session_from_the_same_factory_is_not_that_of_the_registry(
    world: World, caplog: pytest.LogCaptureFixture, has_one: bool
) -> None:
    request(serve(world, lambda: [b""], warn_after=5))
    if has_one:
        world.Session()
    with world.Session.session_factory() as session:
        session.execute(sa.text("SELECT 1"))
    assert messages(caplog) == []
    # Nor does it become one by being looked at.
    assert world.Session.registry.has() == has_one
    world.Session.remove()


@pytest.mark.usefixtures("told")
def test_code_that_is_made_up_cannot_make_the_places_more_and_more(
    world: World, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand are enough."""
    _sight._told.update(f"made before: {number}" for number in range(998))
    for number in range(4):
        names: dict[str, Any] = {"session": world.Session, "text": sa.text, "clock": clock}
        code = "def stream():\n session.execute(text('SELECT 1'))\n yield b''\n clock(9)\n yield b''"
        exec(compile(code, f"made {number}", "exec"), names)
        request(serve(world, names["stream"], warn_after=5))
    assert len(messages(caplog)) == 2
    assert len(_sight._told) == 1000


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_what_is_no_number_of_seconds(world: World, value: float) -> None:
    with pytest.raises(ValueError, match=r"^warn_after must be a number of seconds, 0 or more, or None, not"):
        SessionMiddleware(respond(lambda: []), world.Session, warn_after=value)
    with pytest.raises(TypeError, match=r"^warn_after must be"):
        SessionMiddleware(respond(lambda: []), world.Session, warn_after="5")  # type: ignore[arg-type]


# What it costs nobody else


def test_nothing_is_wrapped_as_long_as_nobody_wants_to_know(tmp_path: Any) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/plain.sqlite")
    before = dict(vars(engine.dialect))
    Session = scoped_session(sessionmaker(engine))
    SessionMiddleware(respond(lambda: []), Session)
    assert "do_execute" not in set(vars(engine.dialect)) - set(before)
    SessionMiddleware(respond(lambda: []), Session, observer=print)
    wrapped = engine.dialect.do_execute
    assert vars(engine.dialect)["do_execute"] is wrapped
    SessionMiddleware(respond(lambda: []), Session, observer=print)
    assert engine.dialect.do_execute is wrapped


def test_a_listener_that_executes_by_itself_is_not_in_the_way(world: World, seen: Seen) -> None:
    """An application's own ``do_execute``, which says that it has done so, sends what it sends past the dialect."""
    app = serve(world, lambda: [str(world.Session.execute(sa.text("SELECT 7")).scalar()).encode()], observer=seen)

    def do_execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        cursor.execute(statement, parameters)
        return True

    event.listen(world.engine, "do_execute", do_execute)
    try:
        assert request(app).content == b"7"
    finally:
        event.remove(world.engine, "do_execute", do_execute)
    assert seen.one.statements == 0


def test_warnings_are_as_they_were(world: World, seen: Seen) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        request(serve(world, lambda: (chunk for chunk in [b"one"]), observer=seen, warn_after=1))
    assert caught == []
