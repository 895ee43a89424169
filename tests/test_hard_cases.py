"""What goes wrong in applications, servers and databases, and what becomes of the request then."""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm import Session, SessionTransaction, scoped_session, sessionmaker

from sa_wsgi_session import NoActiveScope, RollbackOnlyError, SessionMiddleware, current_scope, session_scope
from tests.support import (
    PLAIN,
    REGISTRIES,
    Body,
    Exchange,
    Note,
    World,
    Worlds,
    is_in_a_scope,
    make_environ,
    request,
    respond,
    serve,
)

PSYCOPG = ["postgresql+psycopg2", *([] if sa.__version__.startswith("1.4.") else ["postgresql+psycopg"])]


@pytest.fixture(params=REGISTRIES)
def world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    """SQLite, with each kind of registry."""
    with worlds.use(request.getfixturevalue, "sqlite", request.param) as world:
        yield world


@pytest.fixture
def one_world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    """SQLite, with a contextual session: for what has little to do with the registry."""
    with worlds.use(request.getfixturevalue, "sqlite", "contextual") as world:
        yield world


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def any_world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    """Each database, with a thread-local session."""
    with worlds.use(request.getfixturevalue, request.param, "thread-local") as world:
        yield world


@pytest.fixture(params=PSYCOPG)
def postgresql_world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    """PostgreSQL, with each of its drivers."""
    with worlds.use(request.getfixturevalue, request.param, "contextual") as world:
        yield world


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package has logged, of any level."""
    with caplog.at_level(logging.DEBUG, "sa_wsgi_session"):
        yield caplog


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


def write(world: World, text: str) -> None:
    world.Session.add(Note(text=text))
    world.Session.flush()


class Refused:
    """A request that raises instead of being answered."""

    def __init__(self, app: Any, error: type[BaseException], match: str | None = None) -> None:
        self.told: list[str] = []
        with pytest.raises(error, match=match) as raised:
            Exchange(app, on_start=self.told.append)
        self.error = raised.value


# -- errors of the database that the application has swallowed --------------------------------------------------------


@pytest.mark.parametrize("commit_at", ["start", "end"])
@pytest.mark.parametrize("body", ["list", "stream"])
def test_a_swallowed_flush_error_is_an_error_and_not_a_success(any_world: World, body: str, commit_at: str) -> None:
    any_world.insert("taken")

    def view() -> Any:
        write(any_world, "lost")
        any_world.Session.add(Note(text="taken"))
        with suppress(IntegrityError):
            any_world.Session.flush()
        return [b"all is well"] if body == "list" else iter([b"all is well"])

    refused = Refused(serve(any_world, view, commit_at=commit_at), PendingRollbackError)
    assert refused.told == []
    assert any_world.checked_out == 0
    assert any_world.durable() == ["taken"]


def test_a_flush_error_that_the_application_rolls_back_is_none(any_world: World) -> None:
    any_world.insert("taken")

    def view() -> Any:
        any_world.Session.add(Note(text="taken"))
        with suppress(IntegrityError):
            any_world.Session.flush()
        any_world.Session.rollback()
        write(any_world, "kept")
        return [b"x"]

    request(serve(any_world, view))
    assert any_world.durable() == ["kept", "taken"]


def fail_and_swallow(world: World) -> None:
    with suppress(SQLAlchemyError):
        world.Session.execute(sa.text("SELECT no_such_column FROM note"))


@pytest.mark.parametrize("commit_at", ["start", "end"])
@pytest.mark.parametrize("body", ["list", "stream", "generator application"])
def test_a_swallowed_statement_error_on_postgresql_is_an_error_and_not_a_silent_rollback(
    postgresql_world: World, body: str, commit_at: str
) -> None:
    def view() -> Any:
        write(postgresql_world, "lost")
        fail_and_swallow(postgresql_world)
        return [b"all is well"] if body == "list" else iter([b"all is well"])

    def generator(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        yield from view()

    app: Any = generator if body == "generator application" else respond(view)
    app = SessionMiddleware(app, postgresql_world.Session, commit_at=commit_at)
    refused = Refused(app, RollbackOnlyError, "aborted")
    assert refused.told == []
    assert postgresql_world.checked_out == 0
    assert postgresql_world.durable() == []


@pytest.mark.parametrize("where", ["body", "close"])
def test_a_statement_error_on_postgresql_that_the_body_swallows_breaks_the_transfer_off(
    postgresql_world: World, where: str
) -> None:
    def fail() -> None:
        write(postgresql_world, "lost")
        fail_and_swallow(postgresql_world)

    def chunks() -> Any:
        yield b"1"
        if where == "body":
            fail()

    exchange = Exchange(serve(postgresql_world, lambda: Body(chunks(), fail if where == "close" else lambda: None)))
    assert exchange.next() == b"1"
    with pytest.raises(RollbackOnlyError):
        exchange.read()
    exchange.close()
    assert postgresql_world.checked_out == 0
    assert postgresql_world.durable() == []


def test_a_statement_error_on_postgresql_within_a_savepoint_costs_only_that(postgresql_world: World) -> None:
    def view() -> Any:
        write(postgresql_world, "kept")
        with suppress(SQLAlchemyError), postgresql_world.Session.begin_nested():
            postgresql_world.Session.execute(sa.text("SELECT no_such_column FROM note"))
        return [b"x"]

    request(serve(postgresql_world, view))
    assert postgresql_world.durable() == ["kept"]


def test_a_statement_error_on_postgresql_is_no_success_where_the_application_commits_itself(
    postgresql_world: World,
) -> None:
    def view() -> Any:
        write(postgresql_world, "lost")
        fail_and_swallow(postgresql_world)
        for _ in range(2):
            with pytest.raises(RollbackOnlyError, match="aborted"):
                postgresql_world.Session.commit()
        postgresql_world.Session.rollback()
        write(postgresql_world, "kept")
        postgresql_world.Session.commit()
        return [b"x"]

    request(serve(postgresql_world, view))
    assert postgresql_world.durable() == ["kept"]


def test_a_session_whose_commit_is_the_applications_own_and_does_nothing_is_asked_once(one_world: World) -> None:
    class Deaf(Session):
        commits = 0

        def commit(self) -> None:
            Deaf.commits += 1

    own = scoped_session(sessionmaker(one_world.engine, class_=Deaf, future=True))

    def view() -> Any:
        own.add(Note(text="lost"))
        own.flush()
        return [b"x"]

    request(SessionMiddleware(respond(view), own))
    assert Deaf.commits == 1
    assert one_world.durable() == []
    assert one_world.checked_out == 0


def test_a_statement_error_on_postgresql_that_the_application_rolls_back_is_none(postgresql_world: World) -> None:
    def view() -> Any:
        fail_and_swallow(postgresql_world)
        postgresql_world.Session.rollback()
        write(postgresql_world, "kept")
        return [b"x"]

    request(serve(postgresql_world, view))
    assert postgresql_world.durable() == ["kept"]


@pytest.mark.skipif(not hasattr(SessionTransaction, "connections"), reason="a session does not tell its connections")
def test_a_swallowed_statement_error_on_postgresql_in_a_thread_of_the_applications_is_an_error_too(
    postgresql_world: World,
) -> None:
    def fail(session: Session) -> None:
        session.execute(sa.insert(Note).values(text="lost"))
        with suppress(SQLAlchemyError):
            session.execute(sa.text("SELECT no_such_column FROM note"))

    def view() -> Any:
        # Which has no unit of work: nobody sees what connection the session takes.
        thread = threading.Thread(target=fail, args=[postgresql_world.Session()])
        thread.start()
        thread.join()
        return [b"all is well"]

    assert Refused(serve(postgresql_world, view), RollbackOnlyError, "aborted").told == []
    assert postgresql_world.checked_out == 0
    assert postgresql_world.durable() == []


@pytest.mark.parametrize("end", ["veto", "doom"])
def test_a_swallowed_statement_error_is_none_where_all_is_rolled_back_anyway(postgresql_world: World, end: str) -> None:
    def view() -> Any:
        write(postgresql_world, "lost")
        fail_and_swallow(postgresql_world)
        if end == "doom":
            current_scope().doom("a dry run")
        return [b"x"]

    assert request(serve(postgresql_world, view, "500 Oops" if end == "veto" else "200 OK")).content == b"x"
    assert postgresql_world.durable() == []


@pytest.mark.parametrize("database", ["sqlite", "mariadb"])
def test_a_statement_error_is_none_where_the_database_goes_on_after_it(
    request: pytest.FixtureRequest, worlds: Worlds, database: str
) -> None:
    with worlds.use(request.getfixturevalue, database, "thread-local") as world:

        def view() -> Any:
            write(world, "kept")
            fail_and_swallow(world)
            return [b"x"]

        Exchange(serve(world, view)).read()
        assert world.durable() == ["kept"]


@pytest.mark.parametrize("database", ["sqlite", *PSYCOPG])
@pytest.mark.parametrize("body", ["list", "stream"])
def test_a_constraint_that_fails_at_the_commit_reaches_the_server_before_any_status(
    request: pytest.FixtureRequest, worlds: Worlds, database: str, body: str
) -> None:
    with worlds.use(request.getfixturevalue, database, "contextual") as world:
        if database == "sqlite":
            event.listen(world.engine, "connect", enforce_foreign_keys)
            world.engine.dispose()
        with world.engine.begin() as connection:
            connection.execute(
                sa.text(
                    "CREATE TABLE reply (note_id INTEGER NOT NULL REFERENCES note (id) DEFERRABLE INITIALLY DEFERRED)"
                )
            )

        def view() -> Any:
            write(world, "lost")
            world.Session.execute(sa.text("INSERT INTO reply (note_id) VALUES (-1)"))
            return [b"x"] if body == "list" else iter([b"x"])

        try:
            refused = Refused(serve(world, view), IntegrityError)
            assert refused.told == []
            assert world.checked_out == 0
            assert world.durable() == []
            Refused(serve(world, view), IntegrityError)  # on a connection that is as good as new
        finally:
            with world.engine.begin() as connection:
                connection.execute(sa.text("DROP TABLE reply"))
            if database == "sqlite":
                event.remove(world.engine, "connect", enforce_foreign_keys)
                world.engine.dispose()


def enforce_foreign_keys(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA foreign_keys = ON")


# -- write() ----------------------------------------------------------------------------------------------------------


def writing(world: World, **options: Any) -> Callable[[Any], SessionMiddleware]:
    """Make a request of a function that is given ``write`` and returns the body."""

    def decorate(view: Any) -> SessionMiddleware:
        def app(environ: Any, start_response: Any) -> Any:
            return view(start_response("200 OK", PLAIN))

        return SessionMiddleware(app, world.Session, **options)

    return decorate


@pytest.mark.parametrize("streams", [False, True], ids=["returned", "streamed"])
@pytest.mark.parametrize("rest", [[], (), [b"3"]], ids=repr)
def test_what_was_done_before_write_is_durable_before_its_first_byte_leaves(
    any_world: World, rest: Any, streams: bool
) -> None:
    durable: list[Any] = []

    @writing(any_world)
    def app(send: Any) -> Any:
        write(any_world, "before")
        send(b"1")
        assert any_world.durable() == ["before"]
        write(any_world, "after")
        send(b"2")
        assert any_world.durable() == ["before"]
        return iter(rest) if streams else rest

    exchange = Exchange(app, on_start=lambda status: durable.append((status, any_world.durable())))
    assert exchange.read() == b"".join(rest)
    assert durable == [("200 OK", ["before"])]
    assert exchange.written == [b"1", b"2"]
    assert any_world.durable() == ["after", "before"]


def test_after_write_the_session_is_still_the_same(world: World) -> None:
    @writing(world)
    def app(send: Any) -> Any:
        note = Note(text="loaded")
        world.Session.add(note)
        session = world.Session()
        send(b"1")
        assert world.Session() is session
        assert current_scope().session is session
        assert note in session
        return [note.text.encode()]

    assert request(app).content == b"loaded"


def test_while_write_sends_nothing_is_bound(world: World) -> None:
    seen: list[Any] = []

    @writing(world)
    def app(send: Any) -> Any:
        world.Session()
        send(b"1")
        return []

    def on_start(status: str) -> None:
        with pytest.raises(NoActiveScope):
            current_scope()
        seen.append(world.Session.registry.has())

    Exchange(app, on_start=on_start).read()
    assert seen == [False]


@pytest.mark.parametrize("end", ["read", "cut", "error"])
def test_a_body_after_write_is_a_second_unit_of_work(any_world: World, end: str) -> None:
    @writing(any_world)
    def app(send: Any) -> Any:
        write(any_world, "before")
        send(b"1")
        write(any_world, "after")

        def body() -> Any:
            yield b"2"
            if end == "error":
                raise LookupError

        return body()

    exchange = Exchange(app)
    assert exchange.next() == b"2"
    assert any_world.durable() == ["before"]
    if end == "read":
        exchange.read()
    elif end == "error":
        with pytest.raises(LookupError):
            exchange.read()
    else:
        exchange.close()
    assert any_world.durable() == (["after", "before"] if end == "read" else ["before"])
    assert any_world.checked_out == 0


def test_a_generator_application_may_write_before_its_first_chunk(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        send = start_response("200 OK", PLAIN)
        write(world, "before")
        send(b"1")
        write(world, "after")
        yield b"2"
        send(b"3")
        yield b"4"

    durable: list[Any] = []
    exchange = Exchange(SessionMiddleware(app, world.Session), on_start=lambda status: durable.append(world.durable()))
    assert durable == [["before"]]
    assert exchange.read() == b"24"
    assert exchange.written == [b"1", b"3"]
    assert exchange.statuses == ["200 OK"]
    assert world.durable() == ["after", "before"]


def test_after_write_in_a_chunk_nothing_is_bound_between_the_chunks(world: World) -> None:
    @writing(world)
    def app(send: Any) -> Any:
        def body() -> Any:
            session = world.Session()
            yield b"1"
            send(b"2")
            assert world.Session() is session
            assert current_scope().session is session
            write(world, "kept")
            yield b"3"

        return body()

    exchange = Exchange(app)
    for chunk in (b"1", b"3"):
        assert exchange.next() == chunk
        assert not is_in_a_scope()
        assert not world.Session.registry.has()
    exchange.read()
    assert exchange.written == [b"2"]
    assert world.durable() == ["kept"]


def test_an_exception_after_write_rolls_back_what_came_after_it(world: World) -> None:
    failure = LookupError()

    @writing(world)
    def app(send: Any) -> Any:
        write(world, "before")
        send(b"1")
        write(world, "after")
        raise failure

    with pytest.raises(LookupError) as raised:
        Exchange(app)
    assert raised.value is failure
    assert world.durable() == ["before"]


@pytest.mark.parametrize("swallow", [False, True], ids=["and passes", "and is swallowed"])
def test_a_commit_that_fails_in_write_reaches_the_server_before_any_status(any_world: World, swallow: bool) -> None:
    any_world.insert("taken")

    @writing(any_world)
    def app(send: Any) -> Any:
        any_world.Session.add(Note(text="taken"))
        try:
            send(b"1")
        except IntegrityError:
            if not swallow:
                raise
        return [b"all is well"]

    refused = Refused(app, IntegrityError)
    assert refused.told == []
    assert any_world.checked_out == 0
    assert any_world.durable() == ["taken"]


@pytest.mark.parametrize("reads", [False, True], ids=["at the commit", "before it, because a result is open"])
def test_a_session_that_could_not_be_committed_in_write_can_be_used_at_once(any_world: World, reads: bool) -> None:
    any_world.insert("here", "taken")

    @writing(any_world)
    def app(send: Any) -> Any:
        session = any_world.Session()
        result = session.execute(sa.select(Note.text))
        if not reads:
            result.all()
        session.add(Note(text="taken"))
        with suppress(IntegrityError):
            send(b"1")
        assert any_world.checked_out == 0
        result.close()  # which SQLite waits for
        assert session.query(Note).count() == 2
        return [b"all is well"]

    assert Refused(app, IntegrityError).told == []
    assert any_world.durable() == ["here", "taken"]


@pytest.mark.parametrize("data", ["text", 1, None, bytearray(b"x")], ids=repr)
@pytest.mark.parametrize("swallow", [False, True], ids=["and passes", "and is swallowed"])
def test_what_write_is_given_must_be_bytes(one_world: World, data: Any, swallow: bool) -> None:
    @writing(one_world)
    def app(send: Any) -> Any:
        write(one_world, "lost")
        try:
            send(data)
        except TypeError:
            if not swallow:
                raise
        return []

    refused = Refused(app, TypeError, rf"write\(\).*type {type(data).__name__}.*PEP 3333")
    assert refused.told == []
    assert one_world.durable() == []


def test_an_error_status_is_decided_before_the_first_byte_of_write(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write(world, "before")
        send = start_response("500 Oops", PLAIN)
        send(b"1")
        write(world, "after")
        return []

    exchange = request(SessionMiddleware(app, world.Session))
    assert (exchange.statuses, exchange.written) == (["500 Oops"], [b"1"])
    assert world.durable() == []


def test_with_write_and_commit_at_the_end_all_is_one_transaction(world: World) -> None:
    @writing(world, commit_at="end")
    def app(send: Any) -> Any:
        write(world, "before")
        send(b"1")
        assert world.durable() == []
        write(world, "after")
        return iter([b"2"])

    exchange = Exchange(app)
    assert world.durable() == []
    exchange.read()
    assert world.durable() == ["after", "before"]


@pytest.mark.parametrize("swallow", [False, True], ids=["and passes", "and is swallowed"])
def test_a_server_that_fails_in_write_rolls_back_the_rest(world: World, swallow: bool) -> None:
    """As a server does whose client has gone away."""
    gone = BrokenPipeError()

    def server_write(data: bytes) -> None:
        raise gone

    @writing(world)
    def app(send: Any) -> Any:
        write(world, "before")
        try:
            send(b"1")
        except BrokenPipeError:
            write(world, "after")
            if not swallow:
                raise
        return []

    with pytest.raises(BrokenPipeError) as raised:
        app(make_environ(), lambda status, headers: server_write)
    assert raised.value is gone
    assert world.durable() == ["before"]


def test_whoever_writes_between_the_chunks_writes_to_the_server(world: World) -> None:
    sends: list[Any] = []

    @writing(world)
    def app(send: Any) -> Any:
        sends.append(send)
        return iter([b"1"])

    exchange = Exchange(app)
    sends[0](b"aside")
    assert exchange.written == [b"aside"]
    assert exchange.read() == b"1"


def test_nobody_may_write_while_the_transaction_is_being_settled(world: World, log: pytest.LogCaptureFixture) -> None:
    @writing(world)
    def app(send: Any) -> Any:
        write(world, "kept")
        current_scope().on_commit(lambda: send(b"too early"))
        return iter([b"1"])

    exchange = request(app)
    assert (exchange.content, exchange.written) == (b"1", [])
    (warning,) = warnings_of(log)
    assert "RuntimeError" in warning
    assert world.durable() == ["kept"]


def test_what_write_is_given_in_the_body_must_be_bytes_too(world: World) -> None:
    @writing(world)
    def app(send: Any) -> Any:
        def body() -> Any:
            yield b"1"
            write(world, "lost")
            with suppress(TypeError):
                send("text")
            yield b"2"

        return body()

    assert request(app).content == b"12"
    assert world.durable() == []


# -- start_response ---------------------------------------------------------------------------------------------------


def answer_again(start_response: Any, status: str) -> None:
    """What frameworks do in their outermost ``except``."""
    try:
        raise ZeroDivisionError("in the application")
    except ZeroDivisionError:
        start_response(status, [*PLAIN, ("X-Again", "yes")], sys.exc_info())


@pytest.mark.parametrize(("first", "last", "kept"), [("200 OK", "500 Oops", False), ("500 Oops", "200 OK", True)])
@pytest.mark.parametrize("body", ["list", "stream", "generator application"])
def test_the_last_status_before_the_first_byte_decides(
    world: World, first: str, last: str, kept: bool, body: str
) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write(world, "a note")
        start_response(first, PLAIN)
        answer_again(start_response, last)
        return [b"x"] if body == "list" else iter([b"x"])

    def generator(environ: Any, start_response: Any) -> Any:
        yield from app(environ, start_response)

    durable: list[Any] = []
    exchange = Exchange(
        SessionMiddleware(generator if body == "generator application" else app, world.Session),
        on_start=lambda status: durable.append((status, world.durable())),
    )
    assert exchange.read() == b"x"
    assert durable == [(last, ["a note"] if kept else [])]
    assert exchange.headers == [*PLAIN, ("X-Again", "yes")]


def test_the_server_is_told_the_exc_info_of_the_last_status(one_world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        answer_again(start_response, "500 Oops")
        return [b"x"]

    told: list[Any] = []

    def start_response(*arguments: Any) -> Any:
        told.append(arguments)
        return print

    SessionMiddleware(app, one_world.Session)(make_environ(), start_response)
    ((status, _, exc_info),) = told
    assert status == "500 Oops"
    assert exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("swallow", [False, True], ids=["and passes", "and is swallowed"])
@pytest.mark.parametrize("first_byte", ["chunk", "write"])
def test_a_status_after_the_first_byte_is_the_servers_to_refuse_and_the_rest_is_rolled_back(
    world: World, first_byte: str, swallow: bool
) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write(world, "before")
        send = start_response("200 OK", PLAIN)
        if first_byte == "chunk":
            yield b"1"
        else:
            send(b"1")
        write(world, "after")
        try:
            answer_again(start_response, "500 Oops")
        except ZeroDivisionError:
            if not swallow:
                raise
        yield b"2"

    expected: Any = pytest.raises(ZeroDivisionError, match="in the application")
    if swallow:
        # The client must not take the response for a complete one.
        expected = pytest.raises(RollbackOnlyError, match="start_response has failed after the response had begun")
    with expected, closing(Exchange(SessionMiddleware(app, world.Session))) as exchange:
        exchange.read()
    assert world.durable() == ["before"]


def test_a_status_that_fails_between_two_chunks_has_the_rest_rolled_back(world: World) -> None:
    given: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        given.append(start_response)
        write(world, "before")
        start_response("200 OK", PLAIN)
        yield b"1"
        write(world, "after")
        yield b"2"

    with closing(Exchange(SessionMiddleware(app, world.Session))) as exchange:
        exchange.next()
        with pytest.raises(RuntimeError, match="second time without exc_info"):
            given[0]("500 Oops", PLAIN)
        exchange.read()
    assert world.durable() == ["before"]


def test_a_status_after_the_start_but_before_the_first_byte_is_told_and_the_rest_is_rolled_back(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write(world, "before")
        start_response("200 OK", PLAIN)

        def body() -> Any:
            write(world, "after")
            answer_again(start_response, "500 Oops")
            yield b"an error page"

        return body()

    told: list[str] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        told.append(status)  # as long as no byte has left, the server may still take another one
        return print

    body: Any = SessionMiddleware(app, world.Session)(make_environ(), start_response)
    assert b"".join(body) == b"an error page"
    body.close()
    assert told == ["200 OK", "500 Oops"]
    assert world.durable() == ["before"]


@pytest.mark.parametrize(
    "make_body", [lambda: [b"x"], lambda: iter([b"x"]), lambda: iter(())], ids=["list", "stream", "nothing"]
)
def test_an_application_that_never_calls_start_response_is_told_so(one_world: World, make_body: Any) -> None:
    bodies: list[Body] = []

    def app(environ: Any, start_response: Any) -> Any:
        write(one_world, "lost")
        body = make_body()
        if isinstance(body, list):
            return body
        bodies.append(Body(body))
        return bodies[0]

    refused = Refused(
        SessionMiddleware(app, one_world.Session), RuntimeError, "without calling start_response: PEP 3333"
    )
    assert refused.told == []
    assert [body.closed for body in bodies] == [1] * len(bodies)
    assert one_world.durable() == []


@pytest.mark.parametrize("swallow", [False, True], ids=["and passes", "and is swallowed"])
def test_an_application_that_calls_start_response_twice_is_told_so(one_world: World, swallow: bool) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write(one_world, "lost")
        start_response("200 OK", PLAIN)
        try:
            start_response("200 OK", PLAIN)
        except RuntimeError:
            if not swallow:
                raise
        return [b"x"]

    refused = Refused(
        SessionMiddleware(app, one_world.Session), RuntimeError, "a second time without exc_info.*PEP 3333"
    )
    assert refused.told == []
    assert one_world.durable() == []


def test_a_second_start_response_in_the_middle_of_the_body_is_an_error_too(one_world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        yield b"1"
        write(one_world, "lost")
        start_response("200 OK", PLAIN)

    exchange = Exchange(SessionMiddleware(app, one_world.Session))
    assert exchange.next() == b"1"
    with pytest.raises(RuntimeError, match="a second time"):
        exchange.read()
    assert exchange.statuses == ["200 OK"]
    assert one_world.durable() == []


def test_an_application_that_calls_start_response_after_its_request_was_refused_is_told_what_is_wrong(
    one_world: World,
) -> None:
    kept: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        kept.append(start_response)
        raise LookupError

    Refused(SessionMiddleware(app, one_world.Session), LookupError)
    with pytest.raises(TypeError, match="PEP 3333"):
        kept[0](200, PLAIN)


MALFORMED = [200, None, b"200 OK", "", "OK", "99", "99 Low", "2000 High", "200OK", " 200 OK", "200\r\nX: y", "200 OK\n"]
MALFORMED += ["200 O\rK", "200 \x00", "20x OK", "²00 OK"]


@pytest.mark.parametrize("swallow", [False, True], ids=["and passes", "and is swallowed"])
@pytest.mark.parametrize("status", MALFORMED, ids=repr)
def test_a_status_that_is_none_is_an_error_that_says_so(one_world: World, status: Any, swallow: bool) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write(one_world, "lost")
        try:
            start_response(status, PLAIN)
        except (TypeError, ValueError):
            if not swallow:
                raise
        return body

    body = Body([b"x"])
    error = ValueError if isinstance(status, str) else TypeError
    refused = Refused(SessionMiddleware(app, one_world.Session), error, "status.*PEP 3333")
    assert refused.told == []
    assert "\n" not in str(refused.error)
    assert "\r" not in str(refused.error)
    assert body.closed == swallow
    assert one_world.durable() == []


@pytest.mark.parametrize("status", ["200 OK", "200 Très bien", "404 ", '299 Fine: (really) / "so"', "599 x"])
def test_a_status_that_is_one_is_forwarded_as_it_is(one_world: World, status: str) -> None:
    assert request(serve(one_world, lambda: [b"x"], status)).status == status


def test_an_error_page_for_a_status_that_was_none_is_an_ordinary_error_page(one_world: World) -> None:
    """A framework catches the error, as any of the application's, and answers with its page."""

    def app(environ: Any, start_response: Any) -> Any:
        write(one_world, "lost")
        try:
            start_response("nonsense", PLAIN)
        except ValueError:
            start_response("500 Internal Server Error", PLAIN, sys.exc_info())
        return [b"Oops"]

    exchange = request(SessionMiddleware(app, one_world.Session))
    assert (exchange.statuses, exchange.content) == (["500 Internal Server Error"], b"Oops")
    assert one_world.durable() == []


def test_no_success_follows_a_status_that_was_none(one_world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write(one_world, "lost")
        try:
            start_response("nonsense", PLAIN)
        except ValueError:
            start_response("200 OK", PLAIN, sys.exc_info())
        return [b"all is well"]

    Refused(SessionMiddleware(app, one_world.Session), ValueError, "nonsense")
    assert one_world.durable() == []


@pytest.mark.parametrize("body", ["list", "tuple", "stream", "with write"])
def test_what_the_servers_start_response_raises_goes_on_and_the_request_is_ended(one_world: World, body: str) -> None:
    failure = AssertionError("of the server")
    bodies: list[Body] = []

    def app(environ: Any, start_response: Any) -> Any:
        one_world.Session()
        send = start_response("200 OK", PLAIN)
        if body == "with write":
            send(b"x")
        if body == "list":
            return [b"x"]
        if body == "tuple":
            return (b"x",)
        bodies.append(Body([b"x"], lambda: write(one_world, "too late")))
        return bodies[0]

    def start_response(status: str, headers: Any) -> Any:
        raise failure

    with pytest.raises(AssertionError) as raised:
        SessionMiddleware(app, one_world.Session)(make_environ(), start_response)
    assert raised.value is failure
    assert [body.closed for body in bodies] == [1] * len(bodies)
    assert one_world.checked_out == 0
    assert one_world.durable() == []


# -- bodies that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    ["text", b"bytes", bytearray(b"bytes"), None, 1, object(), ["text"], [b"bytes", "text"], ("text",)],
    ids=lambda body: "object" if type(body) is object else repr(body),
)
def test_a_body_that_is_none_is_an_error_that_says_so(one_world: World, body: Any) -> None:
    def view() -> Any:
        write(one_world, "lost")
        return body

    wrong = "str" if isinstance(body, (list, tuple)) else type(body).__name__
    refused = Refused(serve(one_world, view), TypeError, f"body.*type {wrong}: PEP 3333")
    assert refused.told == []
    assert one_world.durable() == []


@pytest.mark.parametrize("position", [0, 1])
def test_a_chunk_of_str_in_a_stream_breaks_it_off(world: World, position: int) -> None:
    def chunks() -> Any:
        if position:
            yield b"bytes"
        write(world, "lost")
        yield "text"
        write(world, "lost too")

    body = Body(chunks())
    exchange = Exchange(serve(world, lambda: body))
    if position:
        assert exchange.next() == b"bytes"
    with pytest.raises(TypeError, match="type str: PEP 3333"):
        exchange.next()
    assert world.checked_out == 0
    exchange.close()
    assert body.closed == 1
    assert world.durable() == []


def test_a_generator_application_whose_first_chunk_is_str_has_sent_no_status(one_world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write(one_world, "lost")
        start_response("200 OK", PLAIN)
        yield "text"

    refused = Refused(SessionMiddleware(app, one_world.Session), TypeError, "type str: PEP 3333")
    assert refused.told == []
    assert one_world.durable() == []


@pytest.mark.parametrize("status", ["200 OK", None])
def test_a_body_whose_iteration_fails_at_once_is_closed(one_world: World, status: str | None) -> None:
    class Broken(Body):
        def __iter__(self) -> Iterator[bytes]:
            write(one_world, "lost")
            raise failure

    def app(environ: Any, start_response: Any) -> Any:
        if status is not None:
            start_response(status, PLAIN)
        return body

    found: list[int] = []
    failure, body = LookupError(), Broken([], lambda: found.append(one_world.Session.query(Note).count()))
    refused = Refused(SessionMiddleware(app, one_world.Session), LookupError)
    assert refused.error is failure
    assert refused.told == []
    assert body.closed == 1
    assert found == [0]  # what has failed is rolled back by then
    assert one_world.durable() == []


# -- exceptions of any kind -------------------------------------------------------------------------------------------


class Timeout(BaseException):
    """As gevent's is: raised anywhere, and not an ``Exception``."""


EXCEPTIONS = [LookupError, SystemExit, KeyboardInterrupt, GeneratorExit, Timeout, StopIteration]


@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_an_exception_of_the_view_goes_on_as_the_same_object(world: World, kind: Any) -> None:
    failure = kind("of the view")

    def view() -> Any:
        write(world, "lost")
        raise failure

    refused = Refused(serve(world, view), kind)
    assert refused.error is failure
    assert refused.told == []
    assert failure.__cause__ is None
    assert failure.__context__ is None
    assert world.checked_out == 0
    assert world.durable() == []


@pytest.mark.parametrize("kind", [kind for kind in EXCEPTIONS if kind is not StopIteration])
def test_an_exception_before_the_first_chunk_goes_on_as_the_same_object(world: World, kind: Any) -> None:
    failure = kind("of the generator")

    def app(environ: Any, start_response: Any) -> Any:
        write(world, "lost")
        start_response("200 OK", PLAIN)
        if failure:
            raise failure
        yield b""

    refused = Refused(SessionMiddleware(app, world.Session), kind)
    assert refused.error is failure
    assert refused.told == []
    assert world.durable() == []


@pytest.mark.parametrize("kind", [kind for kind in EXCEPTIONS if kind is not StopIteration])
def test_an_exception_of_the_body_goes_on_as_the_same_object(world: World, kind: Any) -> None:
    failure = kind("of the body")

    def chunks() -> Any:
        yield b"1"
        write(world, "lost")
        raise failure

    body = Body(chunks())
    exchange = Exchange(serve(world, lambda: body))
    assert exchange.next() == b"1"
    with pytest.raises(kind) as raised:
        exchange.next()
    assert raised.value is failure
    assert world.checked_out == 0
    exchange.close()
    assert body.closed == 1
    assert world.durable() == []


@pytest.mark.parametrize("read", [True, False], ids=["read", "cut"])
@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_an_exception_of_close_goes_on_as_the_same_object(world: World, kind: Any, read: bool) -> None:
    failure = kind("of close")

    def close() -> None:
        write(world, "lost")
        raise failure

    body = Body([b"1"], close)
    exchange = Exchange(serve(world, lambda: body))
    with pytest.raises(kind) as raised:
        exchange.read() if read else exchange.close()
    assert raised.value is failure
    assert world.checked_out == 0
    exchange.close()
    assert body.closed == 1
    assert world.durable() == []


def test_an_exception_of_close_takes_nothing_that_was_durable_before_it(world: World) -> None:
    def chunks() -> Any:
        yield b"1"
        write(world, "by the body")

    def close() -> None:
        write(world, "by close")
        raise LookupError

    def view() -> Any:
        write(world, "by the view")
        return Body(chunks(), close)

    with pytest.raises(LookupError):
        request(serve(world, view))
    assert world.durable() == ["by the body", "by the view"]


def test_an_exception_of_close_comes_after_the_one_that_brought_it(world: World, log: pytest.LogCaptureFixture) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        return Body([b"x"], lambda: 1 / 0)  # start_response is never called

    Refused(SessionMiddleware(app, world.Session), RuntimeError, "without calling start_response")
    (warning,) = warnings_of(log)
    assert "ZeroDivisionError" in warning


def test_an_exception_of_the_veto_goes_on_and_all_is_rolled_back(world: World) -> None:
    failure = LookupError()

    def veto(environ: Any, status: str, headers: Any) -> bool:
        raise failure

    def view() -> Any:
        write(world, "lost")
        return body

    body = Body([b"x"])
    refused = Refused(serve(world, view, commit_veto=veto), LookupError)
    assert refused.error is failure
    assert refused.told == []
    assert body.closed == 1
    assert world.durable() == []


def test_an_exception_of_the_hook_goes_on(one_world: World) -> None:
    failure = LookupError()

    def hook(environ: Any) -> bool:
        raise failure

    assert Refused(serve(one_world, lambda: [b"x"], activate_hook=hook), LookupError).error is failure


# -- rollbacks and closes that fail themselves ------------------------------------------------------------------------

SECRET = "a secret of the client"


def lose_the_connection(world: World) -> None:
    """Cut the connection of the session, behind the back of SQLAlchemy."""
    connection = world.Session.connection()
    name = connection.dialect.name
    if name == "sqlite":
        connection.connection.dbapi_connection.close()
        return
    own, kill = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        "mysql": ("SELECT connection_id()", "KILL {}"),
    }[name]
    ident = connection.execute(sa.text(own)).scalar()
    with sa.create_engine(world.engine.url, poolclass=sa.pool.NullPool).connect() as other:
        other.execute(sa.text(kill.format(ident)))


@pytest.mark.parametrize("where", ["view", "body", "close"])
def test_where_the_rollback_fails_too_the_first_exception_stays_and_the_connection_goes(
    any_world: World, where: str, log: pytest.LogCaptureFixture
) -> None:
    failure = LookupError("the first")

    def fail() -> None:
        write(any_world, SECRET)
        lose_the_connection(any_world)
        raise failure

    def chunks() -> Any:
        yield b"1"
        if where == "body":
            fail()

    def view() -> Any:
        if where == "view":
            fail()
        return Body(chunks(), fail if where == "close" else lambda: None)

    with pytest.raises(LookupError) as raised:
        request(serve(any_world, view), "/transfer")
    assert raised.value is failure
    assert any_world.checked_out == 0
    assert warnings_of(log)
    assert all("GET /transfer" in warning and "rollback" in warning for warning in warnings_of(log))
    assert SECRET not in log.text

    def next_view() -> Any:
        write(any_world, "the next request is served")
        return [b"x"]

    request(serve(any_world, next_view))
    assert any_world.durable() == ["the next request is served"]


def test_where_the_rollback_of_a_vetoed_request_fails_its_response_leaves_all_the_same(
    any_world: World, log: pytest.LogCaptureFixture
) -> None:
    def view() -> Any:
        write(any_world, SECRET)
        lose_the_connection(any_world)
        return [b"not found"]

    exchange = request(serve(any_world, view, "404 Not Found"), "/transfer")
    assert (exchange.status, exchange.content) == ("404 Not Found", b"not found")
    assert any_world.checked_out == 0
    assert len(warnings_of(log)) == 1
    assert SECRET not in log.text
    assert any_world.durable() == []


def test_where_the_connection_is_lost_before_the_commit_the_server_sees_no_status(any_world: World) -> None:
    def view() -> Any:
        write(any_world, "lost")
        lose_the_connection(any_world)
        return [b"x"]

    refused = Refused(serve(any_world, view), SQLAlchemyError)
    assert refused.told == []
    assert any_world.checked_out == 0
    assert any_world.durable() == []


class Stubborn(Session):
    """A session of the application's, one of whose methods fails."""

    fails: tuple[str, BaseException] | None = None

    def rollback(self) -> None:
        super().rollback()
        self._fail("rollback")

    def close(self) -> None:
        super().close()
        self._fail("close")

    def invalidate(self) -> None:
        super().invalidate()
        self._fail("invalidate")

    def _fail(self, method: str) -> None:
        if self.fails is not None and self.fails[0] == method:
            raise self.fails[1]


@pytest.mark.parametrize(
    ("where", "method", "kind"),
    [
        (where, method, kind)
        for where in ("view", "veto", "body", "close")
        for method in ("rollback", "close")
        for kind in (LookupError, KeyboardInterrupt)
        # After a body that has failed, it is in a call of its own, the server's to close(), that the session is closed.
        if (where, method, kind) != ("body", "close", KeyboardInterrupt)
    ],
)
def test_whatever_fails_on_the_way_out_the_first_exception_stays(
    world: World, where: str, method: str, kind: type[BaseException], log: pytest.LogCaptureFixture
) -> None:
    session = scoped_session(sessionmaker(world.engine, class_=Stubborn))
    failure = ValueError("the first")

    def fail(here: str) -> None:
        if here == where:
            session.add(Note(text=SECRET))
            session.flush()
            session().fails = (method, kind(SECRET))
            raise failure

    def chunks() -> Any:
        yield b"1"
        fail("body")

    def view() -> Any:
        fail("view")
        return Body(chunks(), lambda: fail("close"))

    def veto(environ: Any, status: str, headers: Any) -> bool:
        fail("veto")
        return False

    with pytest.raises(ValueError, match="the first") as raised:
        request(SessionMiddleware(respond(view), session, commit_veto=veto))
    assert raised.value is failure
    assert world.checked_out == 0
    assert not session.registry.has()
    assert warnings_of(log)
    assert all(kind.__name__ in warning for warning in warnings_of(log))
    assert SECRET not in log.text
    assert world.durable() == []


@pytest.mark.parametrize("method", ["rollback", "close"])
@pytest.mark.parametrize("body", ["list", "stream"])
def test_an_interrupt_on_the_way_out_is_not_lost_where_it_is_the_first(world: World, body: str, method: str) -> None:
    session = scoped_session(sessionmaker(world.engine, class_=Stubborn))
    interrupt = KeyboardInterrupt()

    def view() -> Any:
        session.add(Note(text="lost"))
        session.flush()
        session().fails = (method, interrupt)
        return [b"x"] if body == "list" else iter([b"x"])

    with pytest.raises(KeyboardInterrupt) as raised:
        request(SessionMiddleware(respond(view, "500 Oops"), session))
    assert raised.value is interrupt
    assert world.checked_out == 0
    assert not session.registry.has()


class Hopeless(Stubborn):
    def rollback(self) -> None:
        raise LookupError


def test_where_even_discarding_the_connection_fails_the_first_exception_stays(
    one_world: World, log: pytest.LogCaptureFixture
) -> None:
    session = scoped_session(sessionmaker(one_world.engine, class_=Hopeless))
    failure = ValueError("the first")

    def view() -> Any:
        session.add(Note(text="lost"))
        session.flush()
        session().fails = ("invalidate", LookupError())
        raise failure

    assert Refused(SessionMiddleware(respond(view), session), ValueError).error is failure
    assert len(warnings_of(log)) == 2
    assert one_world.checked_out == 0


# -- bodies that are dropped ------------------------------------------------------------------------------------------


def drop(exchanges: list[Exchange]) -> None:
    exchanges.clear()
    gc.collect()


@pytest.mark.parametrize("read", [0, 1, 3], ids=["unread", "begun", "read"])
def test_a_body_that_is_dropped_is_closed_with_a_warning_that_names_the_request(world: World, read: int) -> None:
    def chunks() -> Any:
        yield b"1"
        write(world, "by the body")
        yield b"2"

    body = Body(chunks())
    exchanges = [Exchange(serve(world, lambda: body), make_environ("/export", "POST"))]
    for _ in range(read):
        with suppress(StopIteration):
            exchanges[0].next()
    with pytest.warns(ResourceWarning, match=r"POST /export.*close\(\).*PEP 3333"):
        drop(exchanges)
    assert body.closed == 1
    assert world.checked_out == 0
    assert world.durable() == (["by the body"] if read == 3 else [])


def test_a_body_that_is_dropped_with_an_open_result_gives_its_connection_back(any_world: World) -> None:
    any_world.insert("a", "b", "c")

    def view() -> Any:
        rows = any_world.Session.execute(sa.select(Note.__table__))
        return (row.text.encode() for row in rows)

    exchanges = [Exchange(serve(any_world, view))]
    exchanges[0].next()
    assert any_world.checked_out == 1
    with pytest.warns(ResourceWarning, match="GET /"):
        drop(exchanges)
    assert any_world.checked_out == 0


def test_a_body_that_is_dropped_while_another_request_runs_leaves_that_alone(world: World) -> None:
    def chunks() -> Any:
        write(world, "by the dropped one")
        yield b"1"

    def view() -> Any:
        mine = world.Session()
        world.Session.add(Note(text="by the other one"))
        with pytest.warns(ResourceWarning, match="GET /dropped"):
            drop(dropped)
        assert world.Session() is mine
        return [b"x"]

    dropped = [Exchange(serve(world, chunks), make_environ("/dropped"))]
    dropped[0].next()
    request(serve(world, view))
    assert world.durable() == ["by the other one"]


@pytest.mark.parametrize("change", ["a new object", "an object that is loaded", "nothing else"])
def test_a_body_that_is_dropped_in_a_cycle_has_no_session_any_more(
    world: World, change: str, log: pytest.LogCaptureFixture
) -> None:
    world.insert("loaded")
    told: list[str] = []

    def view() -> Any:
        current_scope().on_commit(lambda: told.append("committed"))
        current_scope().on_rollback(lambda: told.append("rolled back"))
        write(world, "flushed")
        world.Session.flush()
        if change == "a new object":
            world.Session.add(Note(text="pending"))
        elif change == "an object that is loaded":
            world.Session.execute(sa.select(Note).filter_by(text="loaded")).scalar_one().text = "changed"
        return Body([b"1", b"2"], close)

    def close() -> None:
        # Its connection is in the pool again: what is done here must not be done on that.
        assert world.checked_out == 0
        world.Session.add(Note(text="by close()"))
        world.Session.commit()

    exchanges: list[Any] = [Exchange(serve(world, view, commit_at="end"), make_environ("/dropped"))]
    exchanges[0].next()
    # It is only the garbage collector who finds this one.
    exchanges.append(exchanges)
    del exchanges
    with pytest.warns(ResourceWarning, match="GET /dropped"):
        gc.collect()
    (warning,) = warnings_of(log)
    assert "GET /dropped: its session was destroyed together with the body" in warning
    assert world.durable() == ["by close()", "loaded"]
    assert world.checked_out == 0
    assert told == ["rolled back"]


@pytest.mark.parametrize("propagation", ["requires_new", "nested"])
def test_a_block_in_a_body_that_is_dropped_in_a_cycle_leaves_the_connection_alone_that_somebody_else_has(
    one_world: World, propagation: Any
) -> None:
    somebody_else: list[Any] = []

    def chunks() -> Any:
        with session_scope(one_world.Session, propagation=propagation) as session:
            session.add(Note(text="lost"))
            session.flush()
            try:
                yield b"1"
            finally:
                somebody_else.append(one_world.engine.connect())
                transaction = somebody_else[0].begin()
                somebody_else[0].execute(sa.insert(Note), {"text": "somebody else's"})
        somebody_else.append(transaction)

    exchanges: list[Any] = [Exchange(serve(one_world, chunks), make_environ("/dropped"))]
    exchanges[0].next()
    exchanges.append(exchanges)
    del exchanges
    with pytest.warns(ResourceWarning, match="GET /dropped"):
        gc.collect()
    connection = somebody_else.pop(0)
    connection.get_transaction().commit()
    connection.close()
    assert one_world.durable() == ["somebody else's"]
    assert one_world.checked_out == 0


def test_what_fails_in_a_body_that_is_dropped_is_logged(one_world: World, log: pytest.LogCaptureFixture) -> None:
    def close() -> None:
        one_world.Session.add(Note(text="lost"))
        raise LookupError(SECRET)

    exchanges = [Exchange(serve(one_world, lambda: Body([b"x"], close)), make_environ("/dropped"))]
    with pytest.warns(ResourceWarning, match="GET /dropped"):
        drop(exchanges)
    (warning,) = warnings_of(log)
    assert "GET /dropped" in warning
    assert "LookupError" in warning
    assert SECRET not in log.text
    assert one_world.checked_out == 0
    assert one_world.durable() == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_body_that_is_dropped_is_closed_also_where_warnings_are_errors(one_world: World) -> None:
    body = Body(iter([b"x"]), lambda: write(one_world, "lost"))
    drop([Exchange(serve(one_world, lambda: body))])
    assert body.closed == 1
    assert one_world.checked_out == 0


def test_a_stream_that_never_reached_the_server_does_not_warn(one_world: World, recwarn: Any) -> None:
    def view() -> Any:
        return iter([b"x"])

    def veto(environ: Any, status: str, headers: Any) -> bool:
        raise LookupError

    Refused(serve(one_world, view, commit_veto=veto), LookupError)
    gc.collect()
    assert [warning for warning in recwarn if warning.category is ResourceWarning] == []


# -- applications that end their transactions themselves --------------------------------------------------------------


def test_what_the_application_committed_itself_stays_whatever_follows(any_world: World) -> None:
    def view() -> Any:
        write(any_world, "committed")
        any_world.Session.commit()
        write(any_world, "not committed")
        return [b"x"]

    request(serve(any_world, view, "500 Oops"))
    assert any_world.durable() == ["committed"]


def test_what_the_application_rolled_back_itself_is_gone_and_the_rest_is_kept(any_world: World) -> None:
    def view() -> Any:
        write(any_world, "rolled back")
        any_world.Session.rollback()
        write(any_world, "kept")
        return [b"x"]

    request(serve(any_world, view))
    assert any_world.durable() == ["kept"]


@pytest.mark.parametrize("end", ["commit", "rollback", "close", "remove"])
@pytest.mark.parametrize("body", ["list", "stream"])
def test_an_application_that_ends_its_session_last_leaves_nothing_to_do(world: World, end: str, body: str) -> None:
    def view() -> Any:
        write(world, "a note")
        getattr(world.Session, end)()
        return [b"x"] if body == "list" else iter([b"x"])

    assert request(serve(world, view)).content == b"x"
    assert world.durable() == (["a note"] if end == "commit" else [])


def test_after_the_application_removed_its_session_the_next_one_is_the_requests(world: World) -> None:
    def view() -> Any:
        write(world, "removed")
        first = world.Session()
        world.Session.remove()
        assert world.Session() is not first
        write(world, "kept")
        return [b"x"]

    request(serve(world, view))
    assert world.durable() == ["kept"]


def test_a_body_may_remove_the_session_and_go_on_with_another(world: World) -> None:
    def chunks() -> Any:
        yield b"1"
        world.Session.remove()
        yield b"2"
        write(world, "by the body")
        yield b"3"

    def view() -> Any:
        write(world, "by the view")
        return chunks()

    assert request(serve(world, view)).content == b"123"
    assert world.durable() == ["by the body", "by the view"]


def test_a_framework_may_remove_the_session_in_close(world: World) -> None:
    def view() -> Any:
        write(world, "kept")
        return Body([b"1"], world.Session.remove)

    request(serve(world, view))
    assert world.durable() == ["kept"]


def test_a_savepoint_that_the_application_left_open_is_committed_with_the_rest(any_world: World) -> None:
    def view() -> Any:
        write(any_world, "outside")
        any_world.Session.begin_nested()
        write(any_world, "inside")
        return [b"x"]

    request(serve(any_world, view))
    assert any_world.durable() == ["inside", "outside"]


def test_a_savepoint_that_the_application_left_open_is_rolled_back_with_the_rest(any_world: World) -> None:
    def view() -> Any:
        write(any_world, "outside")
        any_world.Session.begin_nested()
        write(any_world, "inside")
        return [b"x"]

    request(serve(any_world, view, "500 Oops"))
    assert any_world.durable() == []
    assert any_world.checked_out == 0


# -- callbacks: their place in the response ---------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["list", "stream"])
def test_callbacks_run_after_the_commit_with_nothing_bound_and_before_the_response_leaves(
    world: World, body: str
) -> None:
    events: list[Any] = []

    def callback() -> None:
        with pytest.raises(NoActiveScope):
            current_scope()
        events.append(("callback", world.durable(), world.Session.registry.has()))

    def view() -> Any:
        write(world, "kept")
        current_scope().on_commit(callback)
        return [b"x"] if body == "list" else iter([b"x"])

    Exchange(serve(world, view), on_start=lambda status: events.append("start_response")).read()
    assert events == [("callback", ["kept"], False), "start_response"]


def test_callbacks_of_write_run_before_its_first_byte(world: World) -> None:
    events: list[Any] = []

    @writing(world)
    def app(send: Any) -> Any:
        write(world, "kept")
        current_scope().on_commit(lambda: events.append(world.durable()))
        send(b"1")
        return []

    Exchange(app, on_start=lambda status: events.append("start_response")).read()
    assert events == [["kept"], "start_response"]


@pytest.mark.parametrize("where", ["chunk", "end", "close"])
def test_callbacks_of_the_body_run_when_its_work_is_durable(world: World, where: str) -> None:
    events: list[Any] = []

    def work() -> None:
        write(world, "kept")
        current_scope().on_commit(lambda: events.append((world.durable(), world.Session.registry.has())))

    def chunks() -> Any:
        yield b"1"
        if where == "chunk":
            work()
            world.Session.commit()
        yield b"2"
        if where == "end":
            work()

    exchange = Exchange(serve(world, lambda: Body(chunks(), work if where == "close" else lambda: None)))
    exchange.next()
    exchange.next()
    assert bool(events) == (where == "chunk")
    exchange.read()
    assert events == [(["kept"], False)]


def test_callbacks_of_a_request_that_fails_are_dropped(world: World) -> None:
    events: list[str] = []

    def view() -> Any:
        write(world, "lost")
        current_scope().on_commit(lambda: events.append("committed"))
        current_scope().on_rollback(lambda: events.append("rolled back"))
        raise LookupError

    Refused(serve(world, view), LookupError)
    assert events == ["rolled back"]


# -- what is logged ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "touches", "outcome"),
    [
        ("200 OK", True, "committed"),
        ("404 Not Found", True, "rolled back"),
        ("200 OK", False, "nothing to commit"),
    ],
)
def test_each_outcome_is_logged_for_who_debugs(
    world: World, log: pytest.LogCaptureFixture, status: str, touches: bool, outcome: str
) -> None:
    def view() -> Any:
        if touches:
            write(world, SECRET)
        return [b"x"]

    request(serve(world, view, status), "/transfer", "POST", QUERY_STRING="secret", HTTP_COOKIE="secret")
    (record,) = log.records
    assert (record.name, record.levelname) == ("sa_wsgi_session", "DEBUG")
    assert "POST /transfer" in record.getMessage()
    assert outcome in record.getMessage()
    assert "secret" not in record.getMessage()


def test_a_commit_that_fails_is_logged_with_the_type_of_its_error_for_who_debugs(
    world: World, log: pytest.LogCaptureFixture
) -> None:
    world.insert(SECRET)

    def view() -> Any:
        world.Session.add(Note(text=SECRET))
        return iter([b"x"])

    Refused(serve(world, view), IntegrityError)
    assert log.messages[0] == "GET /: rolled back (the commit failed: sqlalchemy.exc.IntegrityError)"
    assert SECRET not in log.text


def test_the_reason_of_a_doomed_request_is_logged(world: World, log: pytest.LogCaptureFixture) -> None:
    def view() -> Any:
        write(world, "lost")
        current_scope().doom("a dry run")
        return [b"x"]

    request(serve(world, view))
    (record,) = log.records
    assert record.levelname == "DEBUG"
    assert "rolled back" in record.getMessage()
    assert "a dry run" in record.getMessage()


def test_what_belongs_to_everyday_life_is_no_warning(world: World, log: pytest.LogCaptureFixture) -> None:
    def view() -> Any:
        write(world, SECRET)
        yield b"1"
        write(world, SECRET + "!")
        yield b"2"

    def fail() -> Any:
        write(world, SECRET)
        raise LookupError(SECRET)

    request(serve(world, view, "500 Oops"))
    Exchange(serve(world, view)).close()
    Refused(serve(world, fail), LookupError)
    Refused(serve(world, lambda: [SECRET]), TypeError)
    assert log.records
    assert warnings_of(log) == []
    assert SECRET not in log.text


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("GET", "/two\nlines\r", "GET /two%0Alines%0D"),
        ("GET", "/a b\x1b[2J\x00", "GET /a%20b%1B%5B2J%00"),
        ("GET\nX", "/", "GET%0AX /"),
        ("GET", "/caf\xc3\xa9", "GET /caf%C3%A9"),
        ("GET", "/not \u2028 latin-1", "GET /not%20%3F%20latin-1"),
        ("GET", "", "GET "),
    ],
)
def test_what_a_client_may_choose_is_quoted_in_the_log(
    one_world: World, log: pytest.LogCaptureFixture, method: str, path: str, name: str
) -> None:
    request(serve(one_world, lambda: [b"x"]), path, method)
    (record,) = log.records
    assert record.getMessage().startswith(f"{name}: ")
    assert record.getMessage().isprintable()


def test_a_path_without_end_does_not_fill_the_log(one_world: World, log: pytest.LogCaptureFixture) -> None:
    request(serve(one_world, lambda: [b"x"]), "/" + "\n" * 100_000, "M" * 100_000)
    (record,) = log.records
    assert len(record.getMessage()) < 1000


def test_a_path_is_logged_up_to_its_two_hundredth_character(one_world: World, log: pytest.LogCaptureFixture) -> None:
    request(serve(one_world, lambda: [b"x"]), "/" + "a" * 198 + "bc")
    assert log.messages == ["GET /" + "a" * 198 + "b: nothing to commit or roll back"]


def test_an_environ_without_path_or_method_is_served_all_the_same(
    one_world: World, log: pytest.LogCaptureFixture
) -> None:
    environ = make_environ()
    del environ["PATH_INFO"], environ["REQUEST_METHOD"]
    assert Exchange(serve(one_world, lambda: [b"x"]), environ).read() == b"x"
    assert len(log.records) == 1


def test_no_password_of_the_database_reaches_the_log(postgresql_url: Any, log: pytest.LogCaptureFixture) -> None:
    world = World(postgresql_url.set(password="s3cret"))

    def view() -> Any:
        write(world, SECRET)
        lose_the_connection(world)
        raise LookupError

    Refused(serve(world, view), LookupError)
    assert len(warnings_of(log)) == 1
    assert "s3cret" not in log.text
    assert SECRET not in log.text
    assert world.checked_out == 0
    world.close()


def test_an_error_of_the_driver_is_named_by_its_type(any_world: World, log: pytest.LogCaptureFixture) -> None:
    def view() -> Any:
        write(any_world, SECRET)
        lose_the_connection(any_world)
        return [b"x"]

    request(serve(any_world, view, "500 Oops"))
    (warning,) = warnings_of(log)
    assert "sqlalchemy.exc." in warning
    assert " from " in warning


# -- servers that take liberties --------------------------------------------------------------------------------------


def start_nothing(told: list[str]) -> Any:
    """The ``start_response`` of many a test client: it returns ``None`` instead of a ``write()``."""

    def start_response(status: str, headers: Any, exc_info: Any = None) -> None:
        told.append(status)

    return start_response


def test_a_server_without_write_is_told_of_a_later_status_and_keeps_nothing_of_the_rest(world: World) -> None:
    def body(start_response: Any) -> Iterator[bytes]:
        yield b""
        world.Session.add(Note(text="the rest"))
        try:
            raise ValueError
        except ValueError:
            start_response("500 Oops", PLAIN, sys.exc_info())
        yield b"sorry"

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", PLAIN)
        return body(start_response)

    told: list[str] = []
    stream: Any = SessionMiddleware(app, world.Session)(make_environ(), start_nothing(told))
    with closing(stream):
        assert list(stream) == [b"", b"sorry"]
    assert told == ["200 OK", "500 Oops"]
    assert world.durable() == []


def test_a_server_without_write_is_named_when_the_application_writes(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", PLAIN)(b"written")
        return []

    with pytest.raises(RuntimeError, match="or has returned None, where PEP 3333 demands"):
        SessionMiddleware(app, world.Session)(make_environ(), start_nothing([]))


def test_the_body_of_a_request_that_has_joined_may_outlive_the_one_around_it(world: World) -> None:
    def fail() -> Iterator[bytes]:
        yield b"first"
        raise ValueError("too late")

    kept = []

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        if "inner" in environ:
            return fail()
        kept.append(Exchange(middleware, {**environ, "inner": True}))
        Session.add(Note(text="the request's"))
        return [b"done"]

    Session = world.Session
    middleware = SessionMiddleware(app, Session)
    request(middleware)
    assert world.durable() == ["the request's"]

    with pytest.raises(ValueError, match="too late"), session_scope(Session):
        # Of which it knows nothing.
        kept[0].read()


@pytest.mark.skipif(sa.__version__.startswith("1.4."), reason="there, errors are listened to under a retry policy only")
def test_a_statement_that_has_failed_in_a_savepoint_leaves_no_result_open(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    kept = []

    def view() -> Any:
        world.Session.add(Note(text="kept"))
        try:
            with world.Session.begin_nested():
                world.Session.execute(sa.text("SELECT nonsense"))
        except SQLAlchemyError as error:
            kept.append(error)  # and with it the frames of SQLAlchemy
        return (chunk for chunk in [b"chunk"])

    request(serve(world, view))
    assert world.durable() == ["kept"]
    assert not caplog.records
