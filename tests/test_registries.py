"""``contextual_session``, and what the units of work leave behind in any registry: nothing."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from contextvars import Context, copy_context
from typing import Any

import pytest
import sqlalchemy as sa
from greenlet import getcurrent, greenlet
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError

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
from tests.conftest import SQLALCHEMY_14
from tests.support import REGISTRIES, Exchange, Note, World, make_environ, note, request, serve


class Failure(Exception):
    """What goes wrong in these tests."""


@pytest.fixture(params=REGISTRIES)
def world(request: pytest.FixtureRequest, sqlite_url: URL) -> Iterator[World]:
    with closing(World(sqlite_url, request.param)) as world:
        yield world
        assert world.checked_out == 0


@pytest.fixture
def contextual(sqlite_url: URL) -> Iterator[World]:
    """A world with a contextual session."""
    with closing(World(sqlite_url, "contextual", pool_size=20)) as world:
        yield world
        assert world.checked_out == 0
        assert not world.Session.registry.has()


def write(session: Any, text: str) -> None:
    session.add(Note(text=text))
    session.flush()


def run_in_thread(function: Callable[[], object]) -> None:
    """Run it to its end in a thread of its own, and raise what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if errors:
        raise errors.pop()


# -- contextual_session is strict -------------------------------------------------------------------------------------


def assert_refused(Session: Any) -> None:
    for use in (Session, lambda: Session.execute(sa.text("SELECT 1")), lambda: Session.bind):
        with pytest.raises(NoActiveScope, match=r"session_scope\(\)"):
            use()
    assert not Session.registry.has()


def test_outside_of_a_unit_of_work_there_is_no_session(contextual: World) -> None:
    assert_refused(contextual.Session)
    with session_scope(contextual.Session):
        assert contextual.Session() is contextual.Session()
    assert_refused(contextual.Session)
    with suppress(Failure), session_scope(contextual.Session):
        raise Failure
    assert_refused(contextual.Session)


def test_in_a_unit_of_work_of_another_session_there_is_no_session(contextual: World) -> None:
    with session_scope(sessionmaker()):
        assert_refused(contextual.Session)


def test_the_error_tells_whether_there_was_a_unit_of_work(contextual: World) -> None:
    def use_it() -> None:
        for _ in range(2):
            with pytest.raises(NoActiveScope, match="no unit of work is active here, so"):
                contextual.Session()
            with session_scope(contextual.Session):
                inherited = copy_context()
            with pytest.raises(NoActiveScope, match=r"\(or was copied from\) has ended"):
                inherited.run(contextual.Session)

    Context().run(use_it)


def test_between_the_chunks_of_a_body_there_is_no_session(contextual: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        contextual.Session()
        start_response("200 OK", [])
        yield b"first"
        contextual.Session()
        yield b"last"

    exchange = Exchange(SessionMiddleware(app, contextual.Session))
    for step in (lambda: None, exchange.next, exchange.next, exchange.close):
        step()
        assert_refused(contextual.Session)


def test_to_remove_no_session_is_harmless(contextual: World) -> None:
    contextual.Session.remove()
    contextual.Session.registry.clear()
    with session_scope(contextual.Session):
        contextual.Session.remove()
    contextual.Session.remove()


def test_after_the_end_of_the_unit_that_was_inherited_there_is_no_session(contextual: World) -> None:
    with session_scope(contextual.Session) as session:
        context = copy_context()
        assert context.run(contextual.Session) is session
    context.run(assert_refused, contextual.Session)
    run_in_thread(lambda: context.run(assert_refused, contextual.Session))
    with session_scope(contextual.Session):
        context.run(assert_refused, contextual.Session)


def test_after_the_end_of_the_unit_that_was_inherited_an_error_is_just_an_error(contextual: World) -> None:
    with session_scope(contextual.Session) as session:
        session.execute(sa.select(Note.id))
        context = copy_context()

    def job() -> None:
        with contextual.engine.connect() as connection, pytest.raises(sa.exc.DBAPIError):
            connection.execute(sa.text("SELECT nonsense"))

    context.run(job)
    run_in_thread(lambda: context.run(job))


def test_after_the_end_of_the_unit_that_was_inherited_a_lost_race_is_replayed(contextual: World) -> None:
    attempts: list[int] = []

    @with_session(contextual.Session, retry=RetryPolicy(delay=0))
    def job(*, session: OrmSession) -> None:
        attempts.append(current_scope().attempt)
        session.execute(sa.select(Note.id))
        if len(attempts) == 1:
            raise StaleDataError

    with session_scope(contextual.Session):
        context = copy_context()
    context.run(job)
    assert attempts == [1, 2]


def test_after_the_end_of_the_unit_that_was_inherited_one_can_have_one_of_ones_own(contextual: World) -> None:
    with session_scope(contextual.Session):
        context = copy_context()

    def job() -> None:
        with session_scope(contextual.Session) as session:
            session.add(note("kept"))
        assert_refused(contextual.Session)

    context.run(job)
    assert contextual.durable() == ["kept"]


# -- contextual_session is a scoped_session ---------------------------------------------------------------------------


def test_a_contextual_session_is_a_scoped_session_that_stands_for_its_session(contextual: World) -> None:
    Session = contextual.Session
    assert isinstance(Session, scoped_session)
    with session_scope(Session) as session:
        kept = note("kept")
        Session.add(kept)
        assert kept in Session
        assert len(Session.new) == 1
        Session.flush()
        assert Session.execute(sa.select(Note.text)).scalars().all() == ["kept"]
        assert Session.is_active
        assert Session.no_autoflush is not None
        Session.autoflush = False
        assert session.autoflush is False
        assert list(Session) == [kept]
        Session.commit()
        assert contextual.durable() == ["kept"]
        Session.rollback()


def test_a_contextual_session_can_be_configured(sqlite_url: URL) -> None:
    with closing(World(sqlite_url)) as world:
        Session = contextual_session(sessionmaker())
        Session.configure(bind=world.engine, info={"configured": True})
        with session_scope(Session) as session:
            assert session.info == {"configured": True}
            session.add(note("kept"))
        assert world.durable() == ["kept"]


def test_a_contextual_session_has_a_query_property(contextual: World) -> None:
    contextual.insert("one", "two")

    class Model(Note):
        query = contextual.Session.query_property()

    with session_scope(contextual.Session):
        assert Model.query.count() == 2
    if SQLALCHEMY_14:
        with pytest.raises(NoActiveScope):
            _ = Model.query


def test_a_contextual_session_can_be_made_with_arguments_while_there_is_none(contextual: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        session = contextual.Session(autoflush=False)
        assert session.autoflush is False
        assert contextual.Session() is session
        with pytest.raises(sa.exc.InvalidRequestError, match="already present"):
            contextual.Session(autoflush=True)
        session.add(note("kept"))
        start_response("200 OK", [])
        return [b"done"]

    request(SessionMiddleware(app, contextual.Session))
    assert contextual.durable() == ["kept"]
    with pytest.raises(NoActiveScope):
        contextual.Session(autoflush=False)


def test_the_registry_of_a_contextual_session_can_be_asked_set_and_cleared(contextual: World) -> None:
    registry = contextual.Session.registry
    assert not registry.has()
    with pytest.raises(NoActiveScope):
        registry.set(OrmSession())
    registry.clear()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        assert not registry.has()
        own = OrmSession(contextual.engine)
        registry.set(own)
        assert registry.has()
        assert registry() is contextual.Session() is current_scope().session is own
        registry.clear()
        assert not registry.has()
        assert registry() is not own
        registry.set(own)
        own.add(note("kept"))
        start_response("200 OK", [])
        return [b"done"]

    request(SessionMiddleware(app, contextual.Session))
    assert contextual.durable() == ["kept"]


def test_the_session_can_be_removed_from_within_a_nested_part(contextual: World) -> None:
    registry = contextual.Session.registry
    with session_scope(contextual.Session) as session:
        with session_scope(contextual.Session, propagation="nested"):
            assert registry() is session
            contextual.Session.remove()
            assert not registry.has()
            another = registry()
            assert another is not session
            another.add(note("kept"))
        assert contextual.Session() is another
    assert contextual.durable() == ["kept"]


def test_all_contextual_sessions_of_one_factory_are_one(sqlite_url: URL) -> None:
    with closing(World(sqlite_url)) as world:
        factory = sessionmaker(world.engine)
        one, another = contextual_session(factory), contextual_session(factory)
        with session_scope(one) as session:
            assert one() is another() is session
            with session_scope(another) as joined:
                assert joined is session
        assert_refused(one)
        assert_refused(another)


def test_contextual_sessions_of_two_factories_are_two(sqlite_url: URL) -> None:
    with closing(World(sqlite_url)) as world:
        one, another = (contextual_session(sessionmaker(world.engine)) for _ in range(2))
        with session_scope(one) as session:
            assert_refused(another)
            with session_scope(another) as other_session:
                assert one() is session
                assert another() is other_session is not session


@pytest.mark.parametrize(
    "wrong", [None, "a string", scoped_session(sessionmaker()), AsyncSession, sessionmaker(class_=AsyncSession)]
)
def test_what_makes_no_sessions_is_told_at_once(wrong: Any) -> None:
    expected = "AsyncSession" if wrong is AsyncSession or isinstance(wrong, sessionmaker) else "factory must be"
    with pytest.raises(TypeError, match=expected):
        contextual_session(wrong)


def test_a_session_without_transactions_is_told_at_once() -> None:
    factory = sessionmaker(autocommit=True)  # a mode of SQLAlchemy 1.4
    with pytest.raises(ValueError, match="autocommit"):
        contextual_session(factory)
    with pytest.raises(ValueError, match="autocommit"):
        session_scope(factory)
    with pytest.raises(ValueError, match="autocommit"):
        session_scope(scoped_session(factory))


# -- contextual_session on threads, tasks and greenlets ---------------------------------------------------------------


def test_threads_do_not_share_a_session(contextual: World) -> None:
    with session_scope(contextual.Session) as session:

        def job() -> None:
            assert_refused(contextual.Session)
            with session_scope(contextual.Session) as another:
                assert another is not session
                another.add(note("of the thread"))

        run_in_thread(job)
        assert contextual.durable() == ["of the thread"]


def test_a_thread_that_was_given_the_context_shares_the_session_until_the_unit_ends(contextual: World) -> None:
    with session_scope(contextual.Session) as session:
        context = copy_context()

        def job() -> None:
            assert contextual.Session() is session
            contextual.Session.add(note("by the thread"))

        run_in_thread(lambda: context.run(job))
    assert contextual.durable() == ["by the thread"]
    run_in_thread(lambda: context.run(assert_refused, contextual.Session))


def test_a_body_may_be_iterated_and_closed_on_other_threads(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        session = world.Session()
        write(world.Session, "view")
        start_response("200 OK", [])
        for number in range(3):
            assert world.Session() is session
            write(world.Session, f"{number}")
            yield b"%d" % number

    exchange = Exchange(SessionMiddleware(app, world.Session))
    for _ in range(3):
        run_in_thread(exchange.next)
        assert not world.Session.registry.has()
    with suppress(StopIteration):
        run_in_thread(exchange.next)
    run_in_thread(exchange.close)
    assert world.durable() == ["0", "1", "2", "view"]


def test_tasks_with_units_of_their_own_never_share_a_session(contextual: World) -> None:
    sessions: list[Any] = []

    async def job(number: int) -> None:
        with suppress(Failure), session_scope(contextual.Session) as session:
            session.add(note(f"{number}"))
            sessions.append(session)
            for _ in range(3):
                await asyncio.sleep(0)
                assert contextual.Session() is session
                assert [each.text for each in session.new] == [f"{number}"]
            if number % 2:
                raise Failure
        assert_refused(contextual.Session)

    async def all_jobs() -> None:
        await asyncio.gather(*[job(number) for number in range(8)])

    asyncio.run(all_jobs())
    assert len(set(map(id, sessions))) == 8
    assert contextual.durable() == ["0", "2", "4", "6"]


def test_tasks_in_a_unit_of_work_share_it_or_have_their_own(contextual: World) -> None:
    with session_scope(contextual.Session) as outer:
        sessions: list[Any] = []

        async def joined() -> None:
            await asyncio.sleep(0)
            assert contextual.Session() is outer
            with session_scope(contextual.Session) as session:
                await asyncio.sleep(0)
                assert session is outer

        async def independent() -> None:
            with session_scope(contextual.Session, propagation="requires_new") as session:
                sessions.append(session)
                await asyncio.sleep(0)
                assert contextual.Session() is session
            await asyncio.sleep(0)
            assert contextual.Session() is outer

        async def all_jobs() -> None:
            await asyncio.gather(joined(), independent(), joined(), independent(), independent())
            assert contextual.Session() is outer

        asyncio.run(all_jobs())
        assert len({id(outer), *map(id, sessions)}) == 4
        assert contextual.Session() is outer


def test_a_task_that_outlives_the_unit_it_was_started_in_is_refused(contextual: World) -> None:
    async def main() -> None:
        proceed = asyncio.Event()

        async def job() -> None:
            assert contextual.Session() is session
            await proceed.wait()
            assert_refused(contextual.Session)
            with session_scope(contextual.Session) as own:
                own.add(note("kept"))

        with session_scope(contextual.Session) as session:
            task = asyncio.create_task(job())
            await asyncio.sleep(0)
        with session_scope(contextual.Session):
            proceed.set()
            await task

    asyncio.run(main())
    assert contextual.durable() == ["kept"]


def run_interleaved(greenlets: list[Any]) -> None:
    """Resume the greenlets in turn, until all have ended; each gives way by switching to its parent."""
    while greenlets:
        for each in list(greenlets):
            each.switch()
            if each.dead:
                greenlets.remove(each)


def give_way() -> None:
    getcurrent().parent.switch()


@pytest.mark.parametrize("context", ["own", "copied in no unit", "copied in a unit"])
def test_greenlets_that_switch_amid_their_requests_never_share_a_session(contextual: World, context: str) -> None:
    sessions: list[Any] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        text = environ["PATH_INFO"]
        session = contextual.Session()
        sessions.append(session)
        session.add(note(text))
        give_way()
        assert contextual.Session() is session
        assert [each.text for each in session.new] == [text]
        start_response("200 OK", [])
        yield b"first"
        give_way()
        assert contextual.Session() is session
        give_way()
        assert contextual.Session() is session
        yield b"last"

    application = SessionMiddleware(app, contextual.Session)

    def serve(path: str) -> None:
        exchange = Exchange(application, make_environ(path))
        give_way()
        assert exchange.next() == b"first"
        give_way()
        assert exchange.read() == b"last"

    def run() -> None:
        greenlets = [greenlet(lambda path=path: serve(path)) for path in ("/0", "/1", "/2")]
        if context != "own":
            for each in greenlets:
                each.gr_context = copy_context()
        run_interleaved(greenlets)

    if context == "copied in a unit":
        with session_scope(contextual.Session) as outer:
            run()
            assert contextual.Session() is outer
    else:
        run()
    assert len(set(map(id, sessions))) == 3
    assert contextual.durable() == ["/0", "/1", "/2"]
    assert_refused(contextual.Session)


def test_a_greenlet_that_is_killed_amid_its_job_leaves_nothing(contextual: World) -> None:
    def job() -> None:
        with session_scope(contextual.Session) as session:
            write(session, "lost")
            give_way()

    killed = greenlet(job)
    killed.switch()
    assert contextual.checked_out == 1
    killed.throw()
    assert killed.dead
    assert contextual.checked_out == 0
    assert contextual.durable() == []


# -- the registry is as it was before ---------------------------------------------------------------------------------


def fail() -> None:
    raise Failure


@contextmanager
def held_before(world: World) -> Iterator[Any]:
    """What the registry holds before: the thread's own session, or (contextual) that of a unit around."""
    if type(world.Session.registry).__name__ == "ContextRegistry":
        with session_scope(world.Session) as held:
            yield held
    else:
        yield world.Session()
        world.Session.remove()


@pytest.mark.parametrize("work", [None, fail])
def test_a_job_leaves_the_registry_as_it_was(world: World, work: Any) -> None:
    with held_before(world) as held:
        held.add(note("pending"))
        with suppress(Failure), session_scope(world.Session, propagation="requires_new") as session:
            assert session is not held
            if work:
                work()
        assert world.Session() is held
        assert [each.text for each in held.new] == ["pending"]
        held.expunge_all()


@pytest.mark.parametrize("touches", [False, True])
@pytest.mark.parametrize("status", ["200 OK", "500 Internal Server Error", None])
def test_a_request_leaves_the_registry_as_it_was(world: World, touches: bool, status: str | None) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        if touches:
            assert world.Session() is not held
        if status is None:
            raise Failure
        start_response(status, [])
        yield b"first"
        if touches:
            assert world.Session() is not held
        yield b"last"

    application = SessionMiddleware(app, world.Session)
    with held_before(world) as held:
        for steps in (0, 1, 2, 3):
            with suppress(Failure):
                exchange = Exchange(application)
                assert world.Session() is held
                for _ in range(steps):
                    with suppress(StopIteration):
                        exchange.next()
                    assert world.Session() is held
                exchange.close()
            assert world.Session() is held


def test_a_registry_that_held_nothing_holds_nothing_again(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        world.Session()
        start_response(environ["PATH_INFO"][1:], [])
        return [b"done"]

    for status in ("200 OK", "500 Oops", "no status"):
        with suppress(ValueError):
            request(SessionMiddleware(app, world.Session), f"/{status}")
        assert not world.Session.registry.has()
    for work in (world.Session, world.Session.remove, fail):
        with suppress(Failure), session_scope(world.Session):
            work()
        assert not world.Session.registry.has()


@pytest.mark.parametrize("propagation", ["nested", "requires_new"])
def test_a_job_and_a_request_leave_the_context_as_it_was(world: World, propagation: Any) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        work()
        start_response("200 OK", [])
        return [b"done"]

    def work() -> None:
        with suppress(Failure), session_scope(world.Session, propagation=propagation):
            raise Failure

    def do_all() -> None:
        work()  # the context variable is new in this context
        before = copy_context()
        work()
        request(SessionMiddleware(app, world.Session))
        with session_scope(world.Session):
            within = copy_context()
            work()
            assert copy_context() == within
        assert copy_context() == before

    Context().run(do_all)


def test_a_registry_with_a_scope_function_of_its_own_is_bound_as_it_says(sqlite_url: URL) -> None:
    with closing(World(sqlite_url)) as world:
        tenant = ["one"]
        Session = scoped_session(sessionmaker(world.engine), scopefunc=lambda: tenant[0])
        with session_scope(Session) as session:
            assert Session() is session
            tenant[0] = "two"
            assert Session() is not session
            Session.remove()
            tenant[0] = "one"
            session.add(note("kept"))
        assert world.durable() == ["kept"]
        assert Session.registry.registry == {}


@pytest.mark.parametrize("propagation", ["nested", "requires_new"])
def test_a_body_may_leave_a_part_open_while_its_chunks_leave(world: World, propagation: Any) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"first"
        with session_scope(world.Session, propagation=propagation) as session:
            session.add(note("one"))
            yield b"second"
            assert world.Session() is session
            session.add(note("two"))
            yield b"third"
            assert world.Session() is session
        yield b"last"

    exchange = Exchange(SessionMiddleware(app, world.Session))
    for chunk in (b"first", b"second", b"third", b"last"):
        assert exchange.next() == chunk
        assert not world.Session.registry.has()
        with pytest.raises(NoActiveScope):
            current_scope()
    assert exchange.read() == b""
    assert world.durable() == ["one", "two"]


# -- nothing is left in memory ----------------------------------------------------------------------------------------


@contextmanager
def nothing_is_left(world: World) -> Iterator[None]:
    """All that the block makes is gone at its end, with no help of the garbage collector.

    Sessions, their transactions' connections, and the scopes.
    """
    made: list[Any] = []

    def begun(session: OrmSession, transaction: Any, connection: Connection) -> None:
        made.extend([weakref.ref(session), weakref.ref(connection), weakref.ref(current_scope())])

    gc.disable()
    event.listen(OrmSession, "after_begin", begun)
    try:
        yield
        KEPT.clear()
        assert made
        left = [reference() for reference in made]
        assert [each for each in left if each is not None] == []
    finally:
        event.remove(OrmSession, "after_begin", begun)
        gc.enable()


def read(world: World) -> None:
    world.Session.execute(sa.select(Note)).all()


def leave_a_result_open(world: World) -> None:
    current_scope().on_commit(lambda: None)
    world.Session.execute(sa.select(Note)).fetchone()


def keep_a_result_open(world: World) -> None:
    KEPT.append(world.Session.execute(sa.select(Note)))


#: What the application has kept beyond the end of its units of work, for a while.
KEPT: list[Any] = []


def write_and_call_back(world: World) -> None:
    scope, session = current_scope(), world.Session()
    scope.on_commit(lambda: str((scope, session)))
    scope.on_rollback(lambda: str((scope, session)))
    write(session, "changed")


def break_a_callback(world: World) -> None:
    scope = current_scope()
    scope.on_commit(lambda: [scope][1])
    scope.on_rollback(lambda: [scope][1])
    read(world)


def write_and_fail(world: World) -> None:
    write(world.Session, "lost")
    raise Failure


def fail_to_commit(world: World) -> None:
    # A commit that fails while it flushes leaves reference cycles of SQLAlchemy's own.
    def refuse(session: OrmSession) -> None:
        raise Failure

    event.listen(world.Session(), "before_commit", refuse)
    write(world.Session, "lost")


def fail_in_a_joined_part(world: World) -> None:
    with suppress(Failure), session_scope(world.Session) as session:
        write(session, "half")
        raise Failure


def use_all_kinds_of_parts(world: World) -> None:
    read(world)
    with suppress(Failure), session_scope(world.Session, propagation="nested"):
        write_and_fail(world)
    world.Session.rollback()
    with suppress(Failure), session_scope(world.Session, propagation="requires_new"):
        write_and_fail(world)


def doom(world: World) -> None:
    current_scope().doom("a dry run")
    write(world.Session, "lost")


WORKS = [
    read,
    leave_a_result_open,
    keep_a_result_open,
    write_and_call_back,
    break_a_callback,
    write_and_fail,
    fail_to_commit,
    fail_in_a_joined_part,
    use_all_kinds_of_parts,
    doom,
]


@pytest.mark.parametrize("work", WORKS)
def test_a_job_leaves_nothing_in_memory(world: World, work: Callable[[World], object]) -> None:
    world.insert("here already")
    with nothing_is_left(world), suppress(Failure, RollbackOnlyError), session_scope(world.Session):
        work(world)


@pytest.mark.parametrize("work", WORKS)
def test_a_request_leaves_nothing_in_memory(world: World, work: Callable[[World], object]) -> None:
    world.insert("here already")

    def app(environ: Any, start_response: Any) -> list[bytes]:
        work(world)
        start_response("200 OK", [])
        return [b"done"]

    with nothing_is_left(world), suppress(Failure, RollbackOnlyError):
        request(SessionMiddleware(app, world.Session))


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("read_all", [False, True], ids=["hang up", "read all"])
def test_a_streamed_request_leaves_nothing_in_memory(
    world: World, work: Callable[[World], object], read_all: bool
) -> None:
    world.insert("here already")

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        read(world)
        start_response("200 OK", [])
        yield b"first"
        work(world)
        yield b"last"

    def serve() -> None:
        with closing(Exchange(SessionMiddleware(app, world.Session))) as exchange:
            assert exchange.next() == b"first"
            assert exchange.next() == b"last"
            if read_all:
                with suppress(StopIteration):
                    exchange.next()

    with nothing_is_left(world), suppress(Failure, RollbackOnlyError):
        serve()


@pytest.mark.parametrize(
    ("unit", "work"),
    [
        *itertools.product(["job", "request", "stream"], WORKS),
        *itertools.product(["nested", "attempt"], [read, write_and_call_back, write_and_fail, doom]),
        ("nested", fail_in_a_joined_part),
    ],
)
def test_who_keeps_the_scope_of_what_has_ended_keeps_nothing_else_of_it(
    world: World, unit: str, work: Callable[[World], object]
) -> None:
    kept: list[SessionScope] = []
    made: list[Any] = []

    def view() -> Any:
        kept.append(current_scope())
        session = world.Session()
        made.extend([weakref.ref(session), weakref.ref(session.connection())])
        del session
        work(world)
        return iter([b"x"]) if unit == "stream" else [b"x"]

    with suppress(Failure, RollbackOnlyError):
        if unit == "job":
            with session_scope(world.Session):
                view()
        elif unit == "nested":
            with session_scope(world.Session), session_scope(world.Session, propagation="nested"):
                view()
        else:
            request(serve(world, view, retry=RetryPolicy() if unit == "attempt" else None))
    KEPT.clear()
    gc.collect()
    assert [reference() for reference in made] == [None, None]
    assert len(kept) == 1


def test_who_keeps_the_scope_of_what_has_ended_does_not_keep_what_it_had_set_aside(world: World) -> None:
    with held_before(world) as held:
        reference = weakref.ref(held)
        with session_scope(world.Session, propagation="requires_new"):
            kept = current_scope()
    del held
    gc.collect()
    assert reference() is None
    assert str(kept) == "session_scope()"


def test_who_keeps_the_scope_of_an_attempt_that_was_replayed_keeps_nothing_else_of_it(world: World) -> None:
    kept: list[SessionScope] = []
    made: list[Any] = []

    def job(session: Any) -> None:
        scope = current_scope()
        kept.append(scope)
        made.extend([weakref.ref(session), weakref.ref(session.connection())])
        scope.on_rollback(lambda: pytest.fail(f"{session} had another attempt"))
        write(session, "changed")
        if scope.attempt == 1:
            raise Failure

    policy = RetryPolicy(delay=0, is_transient=lambda error: isinstance(error, Failure))
    with_session(world.Session, retry=policy)(job)()
    gc.collect()
    assert [reference() for reference in made] == [None] * 4
    assert [scope.attempt for scope in kept] == [1, 2]


def count_own_objects() -> int:
    """How many objects of the package's own classes there are."""
    gc.collect()
    return sum(str(type(each).__module__).startswith("sa_wsgi_session") for each in gc.get_objects())


def test_interleaved_streams_leave_no_growing_chain_behind(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        while True:
            world.Session()
            yield b"chunk"

    application = SessionMiddleware(app, world.Session)
    streams = [Exchange(application) for _ in range(3)]
    counts = []
    for _ in range(2):
        for stream in itertools.chain(streams, reversed(streams)):
            for _ in range(50):
                stream.next()
                streams[0].next()
        counts.append(count_own_objects())
    for stream in streams:
        stream.close()
    assert max(counts) - min(counts) <= 3


def test_streams_that_begin_while_others_run_leave_no_growing_chain_behind(world: World) -> None:
    """As on the one thread of an event loop: there's always some stream that has not ended."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        while True:
            world.Session()
            yield b"chunk"

    application = SessionMiddleware(app, world.Session)
    counts = []
    running = Exchange(application)
    for number in range(300):
        following = Exchange(application)
        running.next()
        following.next()
        running.close()
        running = following
        if number in (50, 299):
            counts.append(count_own_objects())
    running.close()
    assert max(counts) - min(counts) <= 3


def test_many_jobs_and_requests_on_one_thread_leave_nothing(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        read(world)
        start_response("200 OK", [])
        return [b"done"]

    application = SessionMiddleware(app, world.Session)
    counts = []
    for _ in range(2):
        for _ in range(30):
            request(application)
            with session_scope(world.Session), session_scope(world.Session, propagation="nested"):
                read(world)
        counts.append(count_own_objects())
    assert counts[0] == counts[-1]


def test_a_long_lived_context_does_not_keep_the_units_it_has_seen(contextual: World) -> None:
    scopes: list[weakref.ref[SessionScope]] = []
    contexts: list[Context] = []
    for _ in range(3):
        with session_scope(contextual.Session):
            scopes.append(weakref.ref(current_scope()))
            contexts.append(copy_context())
    assert [reference() for reference in scopes] == [None, None, None]
    assert len(contexts) == 3
