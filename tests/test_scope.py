"""``SessionScope`` and ``current_scope``: the unit of work as the application sees it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker

from sa_wsgi_session import (
    NoActiveScope,
    RetryPolicy,
    RollbackOnlyError,
    SessionMiddleware,
    SessionScope,
    contextual_session,
    current_scope,
    session_scope,
    with_session,
)
from tests.servers import DatabaseServer
from tests.support import Exchange, Note, World, in_each_registry, make_environ, note, request


class Failure(Exception):
    """What goes wrong in these tests."""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[World]:
    """A second world, with a database of its own."""
    with closing(World(URL.create("sqlite", database=str(tmp_path / "other.sqlite")), "contextual")) as other:
        yield other
        assert other.checked_out == 0
        assert not other.Session.registry.has()


def write(session: Any, text: str) -> None:
    session.add(Note(text=text))
    session.flush()


# -- current_scope ----------------------------------------------------------------------------------------------------


@in_each_registry
def test_where_no_unit_of_work_is_active_there_is_no_scope(world: World) -> None:
    for arguments in [(), (None,), (world.Session,), (sessionmaker(),)]:
        with pytest.raises(NoActiveScope, match="session_scope"):
            current_scope(*arguments)
    with session_scope(world.Session):
        pass
    with pytest.raises(NoActiveScope):
        current_scope()


def test_no_active_scope_and_rollback_only_are_runtime_errors() -> None:
    assert issubclass(NoActiveScope, RuntimeError)
    assert issubclass(RollbackOnlyError, RuntimeError)


@in_each_registry
def test_in_a_job_there_is_the_scope_of_the_job(world: World) -> None:
    with session_scope(world.Session) as session:
        scope = current_scope()
        assert isinstance(scope, SessionScope)
        assert scope is current_scope(world.Session)
        assert scope.session is session
        assert scope.attempt == 1


@in_each_registry
def test_in_a_request_there_is_the_scope_that_the_environ_holds(world: World) -> None:
    scopes = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        scopes.append((current_scope(), environ["sa_wsgi_session.scope"]))
        start_response("200 OK", [])
        yield b"first"
        scopes.append((current_scope(world.Session), environ["sa_wsgi_session.scope"]))
        yield b"last"

    exchange = Exchange(SessionMiddleware(app, world.Session))
    assert [exchange.next(), exchange.next()] == [b"first", b"last"]
    assert {id(scope) for pair in scopes for scope in pair} == {id(exchange.environ["sa_wsgi_session.scope"])}
    exchange.close()


@in_each_registry
def test_between_the_chunks_of_a_body_there_is_none(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"first"
        yield b"last"

    exchange = Exchange(SessionMiddleware(app, world.Session))
    scope = exchange.environ["sa_wsgi_session.scope"]
    for step in (lambda: None, exchange.next, exchange.next, exchange.close):
        step()
        with pytest.raises(NoActiveScope):
            current_scope()
        with pytest.raises(NoActiveScope):
            _ = scope.session


@in_each_registry
def test_between_the_chunks_of_its_body_a_scope_refuses_whatever_else_is_running(world: World, other: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        world.Session()
        start_response("200 OK", [])
        yield b"first"

    with closing(Exchange(SessionMiddleware(app, world.Session))) as exchange:
        exchange.next()
        scope = exchange.environ["sa_wsgi_session.scope"]
        for running in (world, other):
            with session_scope(running.Session), pytest.raises(NoActiveScope, match="is not running here"):
                _ = scope.session


@in_each_registry
def test_a_joined_part_is_no_scope_of_its_own_and_the_others_are(world: World) -> None:
    with session_scope(world.Session) as session:
        scope = current_scope()
        with session_scope(world.Session):
            assert current_scope() is scope
        with session_scope(world.Session, propagation="nested"):
            assert current_scope() is not scope
            assert current_scope().session is session
            assert scope.session is session
        with session_scope(world.Session, propagation="requires_new") as independent:
            assert current_scope() is not scope
            assert current_scope().session is independent
        assert current_scope() is scope


@in_each_registry
def test_of_two_sessions_the_innermost_is_meant_unless_one_is_named(world: World, other: World) -> None:
    with session_scope(world.Session) as session, session_scope(other.Session) as other_session:
        assert current_scope().session is other_session
        assert current_scope(other.Session).session is other_session
        assert current_scope(world.Session).session is session
        with session_scope(world.Session, propagation="nested"):
            assert current_scope().session is session
            assert current_scope(other.Session).session is other_session
        assert current_scope().session is other_session
        with pytest.raises(NoActiveScope, match="for that session"):
            current_scope(sessionmaker())


def test_a_sessionmaker_names_its_contextual_session(sqlite_url: URL) -> None:
    with closing(World(sqlite_url)) as world:
        factory = sessionmaker(world.engine)
        with session_scope(contextual_session(factory)) as session:
            assert current_scope(factory).session is session
        with session_scope(factory):
            assert current_scope(contextual_session(factory)) is current_scope(factory)


@pytest.mark.parametrize("wrong", ["a string", 1, OrmSession, OrmSession()])
def test_what_is_no_session_source_is_told(wrong: Any) -> None:
    with pytest.raises(TypeError, match="session must be a scoped_session"):
        current_scope(wrong)


@pytest.mark.parametrize("registry", ["thread-local", "contextual"])
def test_another_thread_has_no_scope(sqlite_url: URL, registry: str) -> None:
    with closing(World(sqlite_url, registry)) as world, session_scope(world.Session):
        scope = current_scope()
        outcomes: list[str] = []

        def elsewhere() -> None:
            for access in (current_scope, lambda: scope.session):
                try:
                    access()
                except NoActiveScope:
                    outcomes.append("refused")

        run_in_thread(elsewhere)
        assert outcomes == ["refused", "refused"]


def test_a_thread_that_was_given_the_context_has_the_scope(sqlite_url: URL) -> None:
    with closing(World(sqlite_url, "contextual")) as world, session_scope(world.Session) as session:
        found: list[Any] = []
        context = copy_context()
        run_in_thread(lambda: context.run(lambda: found.append(current_scope().session)))
        assert found == [session]


def test_a_thread_that_was_given_the_context_of_a_thread_local_session_has_no_scope(sqlite_url: URL) -> None:
    with closing(World(sqlite_url, "thread-local")) as world, session_scope(world.Session) as session:
        scope = current_scope()
        done: list[str] = []

        def elsewhere() -> None:
            with pytest.raises(NoActiveScope):
                current_scope()
            with pytest.raises(NoActiveScope):
                _ = scope.session
            assert not world.Session.registry.has()
            with session_scope(world.Session) as own:
                own.add(note("of the thread"))
                assert own is not session
                assert current_scope() is not scope
            done.append("all of it")

        context = copy_context()
        run_in_thread(lambda: context.run(elsewhere))
        assert done == ["all of it"]
        assert world.durable() == ["of the thread"]
        assert world.Session() is session


def run_in_thread(function: Any) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(30)


# -- SessionScope -----------------------------------------------------------------------------------------------------


@in_each_registry
def test_the_session_of_a_scope_is_that_of_the_registry(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        scope = environ["sa_wsgi_session.scope"]
        assert not world.Session.registry.has()
        assert scope.session is world.Session()
        assert environ["sa_wsgi_session.session"] is world.Session
        world.Session.remove()
        assert scope.session is world.Session()
        start_response("200 OK", [])
        return [b"done"]

    request(SessionMiddleware(app, world.Session))


@in_each_registry
def test_the_session_of_a_scope_can_be_had_from_within_an_independent_part(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        whole = current_scope()
        with session_scope(world.Session, propagation="requires_new") as session:
            made_from_within = whole.session
            assert made_from_within is whole.session is not session
            with session_scope(world.Session, propagation="requires_new") as inner:
                assert whole.session is made_from_within
                assert current_scope().session is inner
            whole.on_commit(lambda: None)
            assert world.Session() is session
        assert world.Session() is made_from_within
        world.Session.add(note("kept"))
        start_response("200 OK", [])
        return [b"done"]

    request(SessionMiddleware(app, world.Session))
    assert world.durable() == ["kept"]


@in_each_registry
def test_after_its_end_a_scope_refuses_everything(world: World) -> None:
    with session_scope(world.Session) as session:
        whole = current_scope()
        with session_scope(world.Session, propagation="nested"):
            part = current_scope()
        with pytest.raises(NoActiveScope, match="had ended"):
            _ = part.session
        assert whole.session is session
    for scope in (part, whole):
        with pytest.raises(NoActiveScope, match="had ended"):
            _ = scope.session
        with pytest.raises(NoActiveScope, match="had ended"):
            scope.doom("too late")
        with pytest.raises(NoActiveScope, match="had ended"):
            scope.on_commit(lambda: None)
        with pytest.raises(NoActiveScope, match="had ended"):
            scope.on_rollback(lambda: None)
        with pytest.raises(NoActiveScope, match="had ended"):
            scope.use_primary()


@in_each_registry
def test_doom_answers_a_success_and_keeps_nothing(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        write(world.Session, "tried")
        environ["sa_wsgi_session.scope"].doom("a dry run")
        start_response("200 OK", [])
        return [b"it would work"]

    assert request(SessionMiddleware(app, world.Session)).status == "200 OK"
    assert world.durable() == []


def test_doom_in_a_body_keeps_what_is_durable_already(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        write(world.Session, "view")
        start_response("200 OK", [])
        yield b"first"
        write(world.Session, "body")
        current_scope().doom("a dry run")
        yield b"last"

    assert request(SessionMiddleware(app, world.Session)).statuses == ["200 OK"]
    assert world.durable() == ["view"]


def test_doom_in_a_view_counts_for_its_body_too(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        write(world.Session, "view")
        current_scope().doom("a dry run")
        start_response("200 OK", [])
        yield b"first"
        write(world.Session, "body")
        yield b"last"

    request(SessionMiddleware(app, world.Session))
    assert world.durable() == []


def test_the_reason_of_doom_is_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "sa_wsgi_session"), session_scope(world.Session) as session:
        write(session, "tried")
        current_scope().doom("a dry run")
    (record,) = caplog.records
    assert record.levelname == "DEBUG"
    assert "rolled back" in record.getMessage()
    assert "a dry run" in record.getMessage()


@pytest.mark.parametrize("default", ["start", "end"])
@pytest.mark.parametrize("chosen", ["start", "end"])
def test_commit_at_can_be_set_for_one_request_alone(world: World, default: Any, chosen: str) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        scope = current_scope()
        assert scope.commit_at == default
        if environ["PATH_INFO"] == "/chosen":
            scope.commit_at = chosen
            assert scope.commit_at == chosen
        write(world.Session, environ["PATH_INFO"])
        start_response("200 OK", [])
        yield b"first"

    application = SessionMiddleware(app, world.Session, commit_at=default)
    for path, commit_at in [("/chosen", chosen), ("/default", default)]:
        with closing(Exchange(application, make_environ(path))) as exchange:
            assert exchange.next() == b"first"
            assert (path in world.durable()) is (commit_at == "start")
            with pytest.raises(StopIteration):
                exchange.next()
        assert path in world.durable()


def test_commit_at_can_be_set_from_within_a_part(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        with session_scope(world.Session, propagation="nested") as session:
            write(session, "kept")
            current_scope().commit_at = "end"
        assert current_scope().commit_at == "end"
        start_response("200 OK", [])
        yield b"first"

    with closing(Exchange(SessionMiddleware(app, world.Session))) as exchange:
        assert exchange.next() == b"first"
        assert world.durable() == []
        with pytest.raises(StopIteration):
            exchange.next()
    assert world.durable() == ["kept"]


@pytest.mark.parametrize("wrong", ["START", "never", "", None, 1, True, ["start"]])
def test_a_commit_at_that_there_is_not_is_told_at_once(wrong: Any) -> None:
    with session_scope(sessionmaker()):
        before = current_scope().commit_at
        with pytest.raises(ValueError, match='commit_at must be "start" or "end"'):
            current_scope().commit_at = wrong
        assert current_scope().commit_at == before


def test_commit_at_is_too_late_when_the_response_has_begun(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"first"
        with pytest.raises(RuntimeError, match="after its response had begun"):
            current_scope().commit_at = "end"
        yield b"last"

    exchange = request(SessionMiddleware(app, world.Session))
    with pytest.raises(RuntimeError, match="after its response had begun"):
        exchange.environ["sa_wsgi_session.scope"].commit_at = "end"


def test_a_scope_is_named_after_its_request_or_its_job(world: World) -> None:
    names = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        names.append(str(current_scope()))
        start_response("200 OK", [])
        return [b"done"]

    request(SessionMiddleware(app, world.Session), "/orders/7", "POST")
    with session_scope(world.Session):
        names.append(str(current_scope()))
    with_session(world.Session)(job)(names)
    assert names == ["POST /orders/7", "session_scope()", f"{__name__}.job"]


def job(names: list[str], session: Any) -> None:
    names.append(str(current_scope()))


def test_the_name_of_a_scope_can_be_logged_whatever_the_client_has_sent(world: World) -> None:
    names = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        names.append(str(current_scope()))
        start_response("200 OK", [])
        return [b"done"]

    application = SessionMiddleware(app, world.Session)
    request(application, "/a\r\nERROR forged\x1b[2J/\xc3\xa4", "GET\n")
    request(application, "/" + "x" * 100_000, "Y" * 100_000)
    request(application, "/not latin-1: \u20ac \ud800")
    Exchange(application, {})
    for name in names:
        assert name.isascii()
        assert name.isprintable()
        assert len(name) < 2_000
    assert names[0].startswith("GET%0A /a%0D%0AERROR%20forged%1B")
    assert names[0].endswith("/%C3%A4")


def test_the_repr_of_a_scope_tells_where_in_its_life_it_is(world: World) -> None:
    seen = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        seen.append(repr(current_scope()))
        start_response("200 OK", [])
        yield b"first"
        seen.append(repr(current_scope()))

    exchange = request(SessionMiddleware(app, world.Session), "/orders")
    seen.append(repr(exchange.environ["sa_wsgi_session.scope"]))
    states = ["open", "settled", "ended"]
    assert seen == [f"<SessionScope GET /orders, {state}>" for state in states]


def test_the_public_names_are_where_they_are_imported_from() -> None:
    for public in (SessionScope, NoActiveScope, RollbackOnlyError, SessionMiddleware):
        assert public.__module__ == "sa_wsgi_session"


def test_what_can_only_be_rolled_back_is_told_before_a_response_streams(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        current_scope().commit_at = "end"
        try:
            with session_scope(world.Session) as session:
                write(session, "half")
                raise Failure
        except Failure:
            start_response("200 OK", [])
        yield b"first"

    statuses: list[str] = []
    with pytest.raises(RollbackOnlyError):
        Exchange(SessionMiddleware(app, world.Session), on_start=statuses.append)
    assert statuses == []
    assert world.durable() == []


def test_a_connection_with_options_of_its_own_is_still_that_of_the_session(world: World) -> None:
    """A race that is lost on it is lost by the session, whatever is raised in the end."""
    attempts = []

    @with_session(world.Session, retry=RetryPolicy(delay=0, is_transient=lambda error: isinstance(error, DBAPIError)))
    def job(*, session: Any) -> None:
        attempts.append(current_scope().attempt)
        write(session, "written")
        if attempts == [1]:
            connection = session.connection().execution_options(of_its_own=True)
            with suppress(DBAPIError):
                connection.execute(sa.text("SELECT 1 FROM what_is_not_there_this_time"))
            raise Failure

    job()
    assert attempts == [1, 2]
    assert world.durable() == ["written"]


def test_however_many_attempts_there_are_a_commit_passes_through_as_much_as_at_the_first(world: World) -> None:
    @with_session(world.Session, retry=RetryPolicy())
    def job(*, session: Any) -> Any:
        write(session, f"{len(world.durable())}")
        return world.engine.dialect.do_commit

    assert job() is job() is job()


def test_what_a_statement_quotes_is_no_change_unless_it_is_too_long_to_be_taken_apart() -> None:
    from sa_wsgi_session._watching import Effect, effect_of

    def quoting(length: int) -> str:
        return f"SELECT '{' INTO '.ljust(length - 9, '.')}'"

    assert [len(quoting(length)) for length in (100, 20_000)] == [100, 20_000]
    assert [effect_of(quoting(length)) for length in (100, 20_000)] == [Effect.READS] * 2
    assert effect_of(quoting(20_001)) is Effect.CHANGES


# -- two databases ----------------------------------------------------------------------------------------------------


def two_databases(app: Any, first: World, second: World) -> Any:
    inner = SessionMiddleware(app, second.Session, environ_key="second")
    return SessionMiddleware(inner, first.Session, environ_key="first")


@in_each_registry
def test_nested_middlewares_give_a_request_two_sessions(world: World, other: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        assert environ["first.session"] is world.Session
        assert environ["second.session"] is other.Session
        assert environ["first.scope"] is current_scope(world.Session)
        assert environ["second.scope"] is current_scope(other.Session)
        assert "sa_wsgi_session.scope" not in environ
        world.Session.add(note("first"))
        other.Session.add(note("second"))
        start_response("200 OK", [])
        return [b"done"]

    assert request(two_databases(app, world, other)).status == "200 OK"
    assert (world.durable(), other.durable()) == (["first"], ["second"])


@pytest.mark.parametrize("how", ["status", "exception"])
def test_nested_middlewares_roll_both_back(world: World, other: World, how: str) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        write(world.Session, "first")
        write(other.Session, "second")
        if how == "exception":
            raise Failure
        start_response("503 Service Unavailable", [])
        return [b"sorry"]

    application = two_databases(app, world, other)
    if how == "exception":
        with pytest.raises(Failure):
            request(application)
    else:
        request(application)
    assert (world.durable(), other.durable()) == ([], [])


@in_each_registry
def test_nested_middlewares_keep_both_sessions_usable_while_the_body_streams(world: World, other: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        for number in range(3):
            write(world.Session, f"{environ['PATH_INFO']} {number}")
            write(other.Session, f"{environ['PATH_INFO']} {number}")
            yield b"%d" % number

    application = two_databases(app, world, other)
    assert request(application, "/read").statuses == ["200 OK"]
    assert world.durable() == other.durable() == ["/read 0", "/read 1", "/read 2"]

    cut_off = Exchange(application, make_environ("/cut off"))
    assert [cut_off.next(), cut_off.next()] == [b"0", b"1"]
    cut_off.close()
    # Only what was done before the first chunk left was durable by then.
    assert world.durable() == other.durable() == ["/cut off 0", "/read 0", "/read 1", "/read 2"]


# -- one transaction across two databases -----------------------------------------------------------------------------


OtherBase: Any = declarative_base()


class Copy(OtherBase):
    """What the second database keeps; its number is checked by that database only when it commits."""

    __tablename__ = "copy"
    id = sa.Column(sa.Integer, primary_key=True)
    number = sa.Column(sa.Integer)
    __table_args__ = (sa.UniqueConstraint("number", deferrable=True, initially="DEFERRED"),)


class Original(OtherBase):
    """What the first database keeps, likewise."""

    __tablename__ = "original"
    id = sa.Column(sa.Integer, primary_key=True)
    number = sa.Column(sa.Integer)
    __table_args__ = (sa.UniqueConstraint("number", deferrable=True, initially="DEFERRED"),)


class Pair:
    """Two PostgreSQL databases and one session for both."""

    def __init__(self, urls: list[URL]) -> None:
        self.engines = [sa.create_engine(url) for url in urls]
        self.tables = [Original.__table__, Copy.__table__]
        for engine, table in zip(self.engines, self.tables, strict=True):
            table.create(engine)
        binds = dict(zip([Original, Copy], self.engines, strict=True))
        self.Session: Any = scoped_session(sessionmaker(twophase=True, binds=binds))

    def durable(self) -> tuple[list[int], list[int]]:
        with ExitStack() as stack:
            originals, copies = (
                list(stack.enter_context(engine.connect()).execute(sa.select(table.c.number)).scalars())
                for engine, table in zip(self.engines, self.tables, strict=True)
            )
        return originals, copies

    def close(self) -> None:
        for engine in self.engines:
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            engine.dispose()


@pytest.fixture
def pair(postgresql: DatabaseServer, postgresql_url: URL, other_postgresql_url: URL) -> Iterator[Pair]:
    with closing(Pair([postgresql_url, other_postgresql_url])) as pair:
        yield pair
        names = f"'{postgresql_url.database}', '{other_postgresql_url.database}'"
        left = postgresql.execute(f"SELECT gid FROM pg_prepared_xacts WHERE database IN ({names})")
        assert left == [], "a prepared transaction was left over"


def test_a_two_phase_session_commits_to_both_databases_or_to_none(pair: Pair) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        pair.Session.add_all([Original(number=1), Copy(number=1)])
        status = environ["PATH_INFO"][1:]
        start_response(f"{status} Whatever", [])
        return [b"done"]

    application = SessionMiddleware(app, pair.Session)
    request(application, "/500")
    assert pair.durable() == ([], [])
    request(application, "/200")
    assert pair.durable() == ([1], [1])


@pytest.mark.parametrize("refuses", [Original, Copy])
def test_a_database_that_refuses_to_prepare_rolls_both_back(pair: Pair, refuses: Any) -> None:
    outcomes: list[str] = []

    def work() -> None:
        pair.Session.add_all([Original(number=1), Copy(number=1), refuses(number=1)])
        pair.Session.flush()
        current_scope().on_commit(lambda: outcomes.append("committed"))
        current_scope().on_rollback(lambda: outcomes.append("rolled back"))

    def app(environ: Any, start_response: Any) -> list[bytes]:
        work()
        start_response("200 OK", [])
        return [b"done"]

    statuses: list[str] = []
    with pytest.raises(DBAPIError):
        Exchange(SessionMiddleware(app, pair.Session), on_start=statuses.append)
    assert statuses == []
    with pytest.raises(DBAPIError), session_scope(pair.Session):
        work()
    assert outcomes == ["rolled back", "rolled back"]
    assert pair.durable() == ([], [])


@pytest.mark.parametrize("aborted", [Original, Copy])
def test_a_database_that_has_aborted_its_transaction_rolls_both_back(pair: Pair, aborted: Any) -> None:
    with pytest.raises((RollbackOnlyError, DBAPIError)), session_scope(pair.Session) as session:
        session.add_all([Original(number=1), Copy(number=1)])
        session.flush()
        with pytest.raises(DBAPIError):
            session.execute(sa.select(sa.literal(1) / aborted.number * 0 / 0).select_from(aborted), **bind(aborted))
    assert pair.durable() == ([], [])


def bind(mapped: Any) -> dict[str, Any]:
    return {"bind_arguments": {"mapper": sa.inspect(mapped)}}


def test_a_two_phase_session_commits_at_the_end_of_a_body(pair: Pair) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        pair.Session.add(Original(number=1))
        start_response("200 OK", [])
        yield b"first"
        pair.Session.add(Copy(number=1))
        yield b"last"

    application = SessionMiddleware(app, pair.Session, commit_at="end")
    cut_off = Exchange(application)
    assert [cut_off.next(), cut_off.next()] == [b"first", b"last"]
    cut_off.close()
    assert pair.durable() == ([], [])
    request(application)
    assert pair.durable() == ([1], [1])


def test_a_nested_part_of_a_two_phase_session_is_lost_alone(pair: Pair) -> None:
    with session_scope(pair.Session) as session:
        session.add_all([Original(number=1), Copy(number=1)])
        with pytest.raises(Failure), session_scope(pair.Session, propagation="nested"):
            session.add_all([Original(number=2), Copy(number=2)])
            session.flush()
            raise Failure
    assert pair.durable() == ([1], [1])
