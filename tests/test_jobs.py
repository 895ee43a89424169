"""``session_scope`` and ``with_session``: the unit of work of scheduled jobs, threads and scripts."""

from __future__ import annotations

import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import scoped_session, sessionmaker

from sa_wsgi_session import (
    NoActiveScope,
    RollbackOnlyError,
    SessionMiddleware,
    contextual_session,
    current_scope,
    session_scope,
    with_session,
)
from tests.conftest import SQLALCHEMY_14
from tests.support import REGISTRIES, Exchange, Note, World, in_each_registry, note, request

PROPAGATIONS = ("required", "nested", "requires_new")

#: The sessions of SQLAlchemy 1.4 without ``future=True`` commit and roll back one SAVEPOINT at a time.
FUTURES: list[dict[str, Any]] = [{}, {"future": True}] if SQLALCHEMY_14 else [{}]


class Failure(Exception):
    """What goes wrong in these tests."""


@pytest.fixture
def postgresql_world(postgresql_url: URL) -> Iterator[World]:
    """For units of work that write at the same time, which SQLite lets nobody do."""
    with closing(World(postgresql_url, "contextual")) as world:
        yield world
        assert world.checked_out == 0


@pytest.fixture
def world_on_each_database(database_url: URL) -> Iterator[World]:
    with closing(World(database_url)) as world:
        yield world
        assert world.checked_out == 0


#: Where no database is asked.
FACTORY = sessionmaker()


def write(session: Any, text: str) -> None:
    session.add(Note(text=text))
    session.flush()


# -- one block --------------------------------------------------------------------------------------------------------


@in_each_registry
def test_a_block_that_ends_is_committed(world: World) -> None:
    with session_scope(world.Session) as session:
        session.add(note("kept"))
        assert world.durable() == []
    assert world.durable() == ["kept"]


@in_each_registry
def test_a_block_yields_the_session_that_the_registry_yields(world: World) -> None:
    with session_scope(world.Session) as session:
        assert isinstance(session, OrmSession)
        assert world.Session() is session
        assert current_scope(world.Session).session is session


@in_each_registry
def test_a_block_removes_its_session_and_returns_its_connection(world: World) -> None:
    with session_scope(world.Session) as session:
        loaded = note("kept")
        session.add(loaded)
        session.flush()
        assert world.checked_out == 1
    assert world.checked_out == 0
    assert not session.in_transaction()
    assert loaded not in session
    with session_scope(world.Session) as another:
        assert another is not session


@in_each_registry
def test_a_block_that_does_nothing_takes_no_connection(world: World) -> None:
    with session_scope(world.Session):
        assert world.checked_out == 0


@pytest.mark.parametrize("kind", [Failure, KeyboardInterrupt, SystemExit, GeneratorExit, BaseException])
def test_an_exception_of_any_kind_rolls_back_and_goes_on_as_the_same_object(
    world: World, kind: type[BaseException]
) -> None:
    failure = kind("as it was")
    with pytest.raises(kind) as caught, session_scope(world.Session) as session:
        write(session, "lost")
        raise failure
    assert caught.value is failure
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert world.durable() == []
    assert world.checked_out == 0


def test_a_commit_that_the_database_refuses_raises_and_keeps_nothing(world: World) -> None:
    world.insert("taken")
    with pytest.raises(IntegrityError), session_scope(world.Session) as session:
        session.add_all([note("new"), note("taken")])
    assert world.durable() == ["taken"]
    assert world.checked_out == 0


def test_a_swallowed_flush_error_is_no_success(world: World) -> None:
    world.insert("taken")
    with pytest.raises(PendingRollbackError), session_scope(world.Session) as session:
        write(session, "before")
        with suppress(IntegrityError):
            write(session, "taken")
    assert world.durable() == ["taken"]
    assert world.checked_out == 0


def test_a_swallowed_flush_error_is_forgiven_after_a_rollback_of_ones_own(world: World) -> None:
    world.insert("taken")
    with session_scope(world.Session) as session:
        try:
            write(session, "taken")
        except IntegrityError:
            session.rollback()
        session.add(note("instead"))
    assert world.durable() == ["instead", "taken"]


def test_what_a_block_has_loaded_can_be_read_after_it(world: World) -> None:
    with session_scope(world.Session) as session:
        loaded = note("readable")
        session.add(loaded)
    assert loaded.text == "readable"
    assert loaded.id is not None
    assert world.checked_out == 0


def test_the_commits_of_the_block_itself_expire_as_the_session_is_set_to(world: World) -> None:
    with session_scope(world.Session) as session:
        loaded = note("first")
        session.add(loaded)
        session.commit()
        assert "text" not in loaded.__dict__
    with session_scope(world.Session) as session:
        assert session.expire_on_commit is True


@in_each_registry
def test_the_block_may_commit_roll_back_and_remove_by_itself(world: World) -> None:
    with session_scope(world.Session) as session:
        write(session, "committed by itself")
        session.commit()
        write(session, "rolled back by itself")
        session.rollback()
        write(session, "removed by itself")
        world.Session.remove()
        another = world.Session()
        assert another is not session
        another.add(note("in the next session"))
    assert world.durable() == ["committed by itself", "in the next session"]


def test_a_block_can_be_left_by_return_break_and_continue(world: World) -> None:
    def job() -> str:
        for number in range(4):
            with session_scope(world.Session) as session:
                session.add(note(f"{number}"))
                if number == 0:
                    continue
                if number == 1:
                    break
        with session_scope(world.Session) as session:
            session.add(note("returned"))
            return "result"

    assert job() == "result"
    assert world.durable() == ["0", "1", "returned"]


def test_a_sessionmaker_will_do(sqlite_url: URL) -> None:
    with closing(World(sqlite_url)) as world:
        factory = sessionmaker(world.engine)
        with session_scope(factory) as session:
            session.add(note("kept"))
            assert contextual_session(factory)() is session
            with session_scope(factory) as joined:
                assert joined is session
        assert world.durable() == ["kept"]


def test_a_session_that_the_thread_already_held_is_set_aside_and_comes_back(sqlite_url: URL) -> None:
    with closing(World(sqlite_url, "thread-local")) as world:
        held = world.Session()
        held.add(note("pending in the thread's own"))
        for failure in (None, Failure()):
            with suppress(Failure), session_scope(world.Session) as session:
                assert session is not held
                session.add(note(f"{failure!r}"))
                if failure is not None:
                    raise failure
            assert world.Session() is held
            assert len(held.new) == 1
        assert world.durable() == ["None"]
        world.Session.remove()


@pytest.mark.parametrize("registry", REGISTRIES)
def test_one_object_serves_one_block_after_another(sqlite_url: URL, registry: str) -> None:
    with closing(World(sqlite_url, registry)) as world:
        unit = session_scope(world.Session)
        for text in ("first", "second"):
            with unit as session:
                session.add(note(text))
        with pytest.raises(Failure), unit as session:
            write(session, "lost")
            raise Failure
        with unit as session:
            session.add(note("third"))
        assert world.durable() == ["first", "second", "third"]


@in_each_registry
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_one_object_does_not_serve_two_blocks_at_once(world: World, propagation: Any) -> None:
    unit = session_scope(world.Session, propagation=propagation)
    with unit as session:
        write(session, "kept")
        with pytest.raises(RuntimeError, match="in use already"), unit:
            pytest.fail("not reached")
        assert world.Session() is session
    assert world.durable() == ["kept"]
    with session_scope(world.Session), unit, pytest.raises(RuntimeError, match="in use already"), unit:
        pytest.fail("not reached")


@pytest.mark.parametrize("future", FUTURES)
@pytest.mark.parametrize("failure", [None, Failure])
def test_savepoints_left_open_end_as_the_block_does(
    sqlite_url: URL, future: dict[str, Any], failure: type[Failure] | None
) -> None:
    with closing(World(sqlite_url, **future)) as world:
        with suppress(Failure), session_scope(world.Session) as session:
            session.add(note("before"))
            session.begin_nested()
            session.add(note("in the first SAVEPOINT"))
            session.begin_nested()
            session.add(note("in the second SAVEPOINT"))
            if failure is not None:
                raise failure
        kept = ["before", "in the first SAVEPOINT", "in the second SAVEPOINT"]
        assert world.durable() == ([] if failure else kept)
        assert world.checked_out == 0


@pytest.mark.parametrize("future", FUTURES)
@pytest.mark.parametrize("failure", [None, Failure])
def test_savepoints_left_open_in_a_nested_part_end_as_the_part_does(
    sqlite_url: URL, future: dict[str, Any], failure: type[Failure] | None
) -> None:
    with closing(World(sqlite_url, **future)) as world:
        with session_scope(world.Session) as session:
            session.add(note("before"))
            with suppress(Failure), session_scope(world.Session, propagation="nested"):
                session.add(note("in the part"))
                session.begin_nested()
                session.add(note("in a SAVEPOINT of its own"))
                session.flush()
                if failure is not None:
                    raise failure
            assert not session.in_nested_transaction()
            session.add(note("z: after"))
        kept = [] if failure else ["in a SAVEPOINT of its own", "in the part"]
        assert world.durable() == ["before", *kept, "z: after"]


@pytest.mark.parametrize("future", FUTURES)
def test_savepoints_left_open_in_a_view_are_gone_before_its_error_page_streams(
    sqlite_url: URL, future: dict[str, Any]
) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        world.Session.add(note("lost"))
        world.Session.begin_nested()
        write(world.Session, "in a SAVEPOINT")
        start_response("500 Oops", [])
        yield b"first"
        assert world.Session.execute(sa.select(Note.text)).all() == []
        yield b"last"

    with closing(World(sqlite_url, **future)) as world:
        with closing(Exchange(SessionMiddleware(app, world.Session))) as exchange:
            assert exchange.next() == b"first"
            assert world.checked_out == 0
            assert exchange.next() == b"last"
        assert world.durable() == []


class UnableToClose(OrmSession):
    """A session of the application's own, whose ``close`` is broken."""

    failure: BaseException

    def close(self) -> None:
        raise self.failure


class UnableToInvalidate(UnableToClose):
    def invalidate(self) -> None:
        super().invalidate()
        raise self.failure


@pytest.mark.parametrize("kind", [UnableToClose, UnableToInvalidate])
def test_a_session_that_cannot_be_closed_is_discarded_and_logged(
    sqlite_url: URL, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    with closing(World(sqlite_url, class_=kind)) as world:
        kind.failure = ValueError("not for the log")
        with session_scope(world.Session) as session:
            session.add(note("kept"))
        assert world.durable() == ["kept"]
        assert not world.Session.registry.has()
        assert "ValueError" in caplog.text
        first = Failure()
        with pytest.raises(Failure) as caught, session_scope(world.Session) as session:
            write(session, "lost")
            raise first
        assert caught.value is first
        kind.failure = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt), session_scope(world.Session) as session:
            write(session, "kept too")
        assert world.durable() == ["kept", "kept too"]
        assert not world.Session.registry.has()
        assert world.checked_out == 0


class UnableToRollBack(OrmSession):
    """A session of the application's own, whose ``rollback`` is broken."""

    def rollback(self) -> None:
        raise ValueError


@pytest.mark.parametrize("of", ["session", "SAVEPOINT"])
def test_a_connection_that_cannot_be_rolled_back_is_discarded(
    sqlite_url: URL, caplog: pytest.LogCaptureFixture, of: str
) -> None:
    def refuse(*args: Any) -> None:
        raise ValueError

    discarded: list[Any] = []
    with closing(World(sqlite_url, class_=UnableToRollBack if of == "session" else OrmSession)) as world:
        event.listen(world.engine, "invalidate", lambda connection, *args: discarded.append(connection))
        event.listen(world.engine, "rollback_savepoint", refuse)
        with suppress(Failure), session_scope(world.Session) as session:
            connection = session.connection().connection.dbapi_connection
            with session_scope(world.Session, propagation="nested" if of == "SAVEPOINT" else "required"):
                write(session, "lost")
                raise Failure
        assert discarded == [connection]
        assert world.checked_out == 0
        assert world.durable() == []
    (message,) = caplog.messages
    assert "failed" in message
    assert "discarded: ValueError" in message


def test_what_a_session_holds_that_cannot_be_closed_is_discarded(sqlite_url: URL) -> None:
    class BeginsAnew(UnableToClose):
        failure = ValueError()

        def commit(self) -> None:
            super().commit()
            self.connection()

    with closing(World(sqlite_url, class_=BeginsAnew)) as world:
        with session_scope(world.Session) as session:
            session.add(note("kept"))
        assert world.durable() == ["kept"]
        assert world.checked_out == 0


def test_a_session_that_begins_anew_at_its_end_gives_its_connection_back(sqlite_url: URL) -> None:
    class BeginsAnew(OrmSession):
        def commit(self) -> None:
            super().commit()
            self.connection()

    with closing(World(sqlite_url, class_=BeginsAnew)) as world:
        with session_scope(world.Session) as session:
            session.execute(sa.select(Note)).all()
        assert not session.in_transaction()
        assert world.checked_out == 0


@pytest.mark.parametrize("what", ["commit", "rollback"])
def test_a_commit_or_rollback_of_ones_own_that_ends_nothing_is_called_once(sqlite_url: URL, what: str) -> None:
    calls: list[str] = []

    class Reluctant(OrmSession):
        def commit(self) -> None:
            self._wait("commit")

        def rollback(self) -> None:
            self._wait("rollback")

        def _wait(self, name: str) -> None:
            calls.append(name)
            if calls.count(name) > 2 or name != what:
                getattr(super(), name)()

    with closing(World(sqlite_url, class_=Reluctant, future=True)) as world:
        with session_scope(world.Session) as session:
            write(session, "lost")
            if what == "rollback":
                current_scope().doom("a dry run")
        assert calls == [what]
        assert world.durable() == []
        assert world.checked_out == 0


def test_a_rollback_that_is_interrupted_goes_on_as_the_interruption(sqlite_url: URL) -> None:
    class Interrupted(OrmSession):
        def rollback(self) -> None:
            raise KeyboardInterrupt

    with closing(World(sqlite_url, class_=Interrupted)) as world:
        with pytest.raises(KeyboardInterrupt), session_scope(world.Session) as session:
            write(session, "lost")
            current_scope().doom("a dry run")
        assert world.durable() == []
        assert world.checked_out == 0
        assert not world.Session.registry.has()


def test_a_block_does_not_listen_for_the_sake_of_a_policy_that_it_has_not() -> None:
    maker = sessionmaker()
    dispatch: Any = maker().dispatch
    before = {name: len(list(getattr(dispatch, name))) for name in ("after_commit", "after_soft_rollback")}
    with session_scope(maker):
        assert len(list(dispatch.after_commit)) == before["after_commit"] + 1
        assert len(list(dispatch.after_soft_rollback)) == before["after_soft_rollback"]


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registry", ["thread-local", "contextual"])
def test_many_threads_at_once_each_have_their_own_session(sqlite_url: URL, registry: str) -> None:
    threads = 12
    with closing(World(sqlite_url, registry, pool_size=threads)) as world:
        all_inside = threading.Barrier(threads, timeout=30)
        one_writes = threading.Lock()
        seen: list[Any] = []

        def job(number: int) -> None:
            with suppress(Failure), session_scope(world.Session) as session:
                session.add(note(f"thread {number:02}"))
                seen.append(session)
                all_inside.wait()
                assert world.Session() is session
                assert [each.text for each in session.new] == [f"thread {number:02}"]
                if number % 3 == 2:
                    raise Failure
                with one_writes:
                    session.commit()

        run_in_threads(*[functools.partial(job, number) for number in range(threads)])
        assert len(set(map(id, seen))) == threads
        assert world.durable() == [f"thread {number:02}" for number in range(threads) if number % 3 != 2]
        assert world.checked_out == 0


@pytest.mark.parametrize("registry", ["thread-local", "contextual"])
def test_a_thread_started_in_a_block_has_a_unit_of_work_of_its_own(sqlite_url: URL, registry: str) -> None:
    with closing(World(sqlite_url, registry)) as world, session_scope(world.Session) as outer:

        def job() -> None:
            with session_scope(world.Session) as session:
                assert session is not outer
                session.add(note("of the thread"))

        run_in_threads(job)
        assert world.durable() == ["of the thread"]
        assert world.Session() is outer


def run_in_threads(*jobs: Callable[[], object]) -> None:
    """Run all of them at once, and raise what one of them has raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


# -- propagation ------------------------------------------------------------------------------------------------------


@in_each_registry
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_outside_of_a_unit_of_work_every_propagation_begins_one(world: World, propagation: Any) -> None:
    with session_scope(world.Session, propagation=propagation) as session:
        session.add(note("kept"))
    assert world.durable() == ["kept"]
    with pytest.raises(Failure), session_scope(world.Session, propagation=propagation) as session:
        write(session, "lost")
        raise Failure
    assert world.durable() == ["kept"]


@in_each_registry
def test_required_joins_the_session_and_the_transaction_of_the_outer_block(world: World) -> None:
    with session_scope(world.Session) as outer:
        with session_scope(world.Session) as joined:
            assert joined is outer
            write(joined, "joined")
        assert world.durable() == []
        assert outer.in_transaction()
    assert world.durable() == ["joined"]


def test_required_is_lost_with_the_outer_block(world: World) -> None:
    with pytest.raises(Failure), session_scope(world.Session):
        with session_scope(world.Session) as joined:
            write(joined, "joined")
        raise Failure
    assert world.durable() == []


def test_nested_is_kept_or_lost_alone_but_durable_only_with_the_outer_block(world_on_each_database: World) -> None:
    world = world_on_each_database
    with session_scope(world.Session) as outer:
        outer.add(note("a: before"))
        with session_scope(world.Session, propagation="nested") as nested:
            assert nested is outer
            nested.add(note("b: released"))
        with pytest.raises(Failure), session_scope(world.Session, propagation="nested") as nested:
            write(nested, "c: rolled back")
            raise Failure
        outer.add(note("d: after"))
        assert world.durable() == []
    assert world.durable() == ["a: before", "b: released", "d: after"]


def test_nested_is_lost_with_the_outer_block(world_on_each_database: World) -> None:
    world = world_on_each_database
    with pytest.raises(Failure), session_scope(world.Session):
        with session_scope(world.Session, propagation="nested") as nested:
            write(nested, "released")
        raise Failure
    assert world.durable() == []


def test_nested_survives_an_error_of_the_database_in_it(world_on_each_database: World) -> None:
    world = world_on_each_database
    world.insert("taken")
    with session_scope(world.Session) as session:
        write(session, "before")
        with pytest.raises(IntegrityError), session_scope(world.Session, propagation="nested"):
            write(session, "a: lost")
            write(session, "taken")
        with pytest.raises(IntegrityError), session_scope(world.Session, propagation="nested"):
            session.add(note("taken"))  # found out when the SAVEPOINT is released
        write(session, "z: after")
    assert world.durable() == ["before", "taken", "z: after"]


def test_nested_in_nested_is_kept_or_lost_alone(world_on_each_database: World) -> None:
    world = world_on_each_database

    def nested() -> Any:
        return session_scope(world.Session, propagation="nested")

    with session_scope(world.Session) as session:
        with nested():
            write(session, "a: first level")
            with suppress(Failure), nested():
                write(session, "b: second level, lost")
                with nested():
                    write(session, "c: third level, lost with the second")
                raise Failure
            with nested():
                write(session, "d: second level")
                with suppress(Failure), nested():
                    write(session, "e: third level, lost")
                    raise Failure
        write(session, "f: outermost")
    assert world.durable() == ["a: first level", "d: second level", "f: outermost"]


def test_requires_new_has_a_session_and_a_transaction_of_its_own(postgresql_world: World) -> None:
    world = postgresql_world
    with session_scope(world.Session) as outer:
        write(outer, "outer")
        with session_scope(world.Session, propagation="requires_new") as inner:
            assert inner is not outer
            assert world.Session() is inner
            assert current_scope().session is inner
            write(inner, "inner")
            assert world.checked_out == 2
        assert world.Session() is outer
        assert world.checked_out == 1
        assert world.durable() == ["inner"]
    assert world.durable() == ["inner", "outer"]


def test_requires_new_stays_though_the_outer_block_is_lost(postgresql_world: World) -> None:
    world = postgresql_world
    with pytest.raises(Failure), session_scope(world.Session) as outer:
        write(outer, "outer")
        with session_scope(world.Session, propagation="requires_new") as inner:
            write(inner, "inner")
        raise Failure
    assert world.durable() == ["inner"]


def test_requires_new_is_lost_alone(postgresql_world: World) -> None:
    world = postgresql_world
    with session_scope(world.Session) as outer:
        write(outer, "outer")
        with suppress(Failure), session_scope(world.Session, propagation="requires_new") as inner:
            write(inner, "inner")
            raise Failure
        assert world.Session() is outer
    assert world.durable() == ["outer"]


class Case:
    """Three blocks in one another, of which the innermost fails; each has written its name first."""

    def __init__(self, middle: str, inner: str, swallowed_by: str, kept: str, error: Any = None) -> None:
        self.middle, self.inner, self.swallowed_by = middle, inner, swallowed_by
        self.kept, self.error = kept.split(), error
        self.id = f"{inner} in {middle}, swallowed by {swallowed_by}"


LOST = ""
CASES = [
    # The middle block swallows the exception that has left the inner one.
    Case("required", "required", "middle", LOST, RollbackOnlyError),
    Case("required", "nested", "middle", "middle outer"),
    Case("required", "requires_new", "middle", "middle outer"),
    # Here it's the SAVEPOINT that can only be rolled back, and its block says so when it ends, to everybody.
    Case("nested", "required", "middle", LOST, RollbackOnlyError),
    Case("nested", "nested", "middle", "middle outer"),
    Case("nested", "requires_new", "middle", "middle outer"),
    Case("requires_new", "required", "middle", LOST, RollbackOnlyError),
    Case("requires_new", "nested", "middle", "middle outer"),
    Case("requires_new", "requires_new", "middle", "middle outer"),
    # The exception leaves the middle block too, and the outer one swallows it.
    Case("required", "required", "outer", LOST, RollbackOnlyError),
    Case("required", "nested", "outer", LOST, RollbackOnlyError),
    Case("required", "requires_new", "outer", LOST, RollbackOnlyError),
    Case("nested", "required", "outer", "outer"),
    Case("nested", "nested", "outer", "outer"),
    Case("nested", "requires_new", "outer", "outer"),
    Case("requires_new", "required", "outer", "outer"),
    Case("requires_new", "nested", "outer", "outer"),
    Case("requires_new", "requires_new", "outer", "outer"),
    # The middle block swallows, and the outer one swallows whatever the middle one says to that.
    Case("required", "required", "both", LOST, RollbackOnlyError),
    Case("nested", "required", "both", "outer"),
    Case("requires_new", "required", "both", "outer"),
    # Nobody swallows it.
    *[Case(middle, inner, "nobody", LOST, Failure) for middle in PROPAGATIONS for inner in PROPAGATIONS],
]


@pytest.mark.parametrize("registry", ["thread-local", "contextual"])
def test_what_is_kept_of_three_blocks_depends_on_who_swallows_the_exception(
    postgresql_url: URL, registry: str, subtests: pytest.Subtests
) -> None:
    with closing(World(postgresql_url, registry)) as world:
        for case in CASES:
            with subtests.test(case.id):
                try:
                    caught = run_three_blocks(world.Session, case)
                    assert (None if caught is None else type(caught)) is case.error
                    if isinstance(caught, RollbackOnlyError):
                        assert isinstance(caught.__cause__, Failure)
                    assert world.durable() == case.kept
                    assert world.checked_out == 0
                finally:
                    with world.engine.begin() as connection:
                        connection.execute(sa.delete(Note))


def run_three_blocks(Session: Any, case: Case) -> BaseException | None:
    in_middle: Any = Failure if case.swallowed_by in ("middle", "both") else ()
    in_outer: Any = Exception if case.swallowed_by in ("outer", "both") else ()
    middle: Any = case.middle
    inner: Any = case.inner
    try:
        with session_scope(Session) as session:
            write(session, "outer")
            try:
                with session_scope(Session, propagation=middle) as session:
                    write(session, "middle")
                    try:
                        with session_scope(Session, propagation=inner) as session:
                            write(session, "inner")
                            raise Failure
                    except in_middle:
                        pass
            except in_outer:
                pass
    except Exception as error:
        return error
    return None


@in_each_registry
def test_a_joined_block_that_outlives_the_unit_of_work_is_told(world: World) -> None:
    for failure in (None, Failure()):
        whole, joined = session_scope(world.Session), session_scope(world.Session)
        session = whole.__enter__()
        joined.__enter__()
        write(session, f"in time, {failure!r}")
        whole.__exit__(None, None, None)
        write(session, "too late")
        if failure is None:
            with pytest.raises(NoActiveScope, match="ended before the block did"):
                joined.__exit__(None, None, None)
        else:
            joined.__exit__(Failure, failure, None)
        assert world.checked_out == 0
    assert world.durable() == ["in time, Failure()", "in time, None"]


def test_all_depths_yield_the_session_of_their_unit_of_work(postgresql_world: World) -> None:
    Session = postgresql_world.Session
    with session_scope(Session) as outer:
        with session_scope(Session, propagation="nested") as nested:
            with session_scope(Session, propagation="requires_new") as new:
                assert Session() is new is not outer
                with session_scope(Session, propagation="nested") as nested_in_new, session_scope(Session) as joined:
                    assert joined is nested_in_new is new is Session()
                with session_scope(Session, propagation="requires_new") as newest:
                    assert newest not in (new, outer)
                    assert Session() is newest
                assert Session() is new
            assert nested is outer is Session()
        assert Session() is outer


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_another_session_is_another_unit_of_work(sqlite_url: URL, tmp_path: Any, propagation: Any) -> None:
    other_url = URL.create("sqlite", database=str(tmp_path / "other.sqlite"))
    with closing(World(sqlite_url)) as world, closing(World(other_url)) as other:
        with pytest.raises(Failure), session_scope(world.Session) as session:
            write(session, "lost")
            with session_scope(other.Session, propagation=propagation) as other_session:
                write(other_session, "kept")
            assert other.durable() == ["kept"]
            raise Failure
        assert world.durable() == []


@pytest.mark.parametrize("wrong", ["REQUIRED", "mandatory", "", None, 1, ["required"]])
def test_a_propagation_that_there_is_not_is_told_at_once(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r'propagation must be "required", "nested" or "requires_new"'):
        session_scope(FACTORY, propagation=wrong)
    with pytest.raises(ValueError, match="propagation must be"):
        with_session(FACTORY, propagation=wrong)


@pytest.mark.parametrize("wrong", [None, "a string", OrmSession, OrmSession(), object()])
def test_what_is_no_session_source_is_told_at_once(wrong: Any) -> None:
    with pytest.raises(TypeError, match="session must be a scoped_session"):
        session_scope(wrong)
    with pytest.raises(TypeError, match="session must be a scoped_session"):
        with_session(wrong)


# -- propagation inside of requests -----------------------------------------------------------------------------------


def ok(start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"done"]


@in_each_registry
def test_in_a_request_required_joins_the_request(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        with session_scope(world.Session) as session:
            assert session is world.Session()
            write(session, "joined")
        assert world.durable() == []
        return ok(start_response)

    assert request(SessionMiddleware(app, world.Session)).status == "200 OK"
    assert world.durable() == ["joined"]


@in_each_registry
def test_in_a_request_nested_is_lost_alone(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        write(world.Session, "kept")
        with suppress(Failure), session_scope(world.Session, propagation="nested") as session:
            write(session, "lost")
            raise Failure
        return ok(start_response)

    assert request(SessionMiddleware(app, world.Session)).status == "200 OK"
    assert world.durable() == ["kept"]


@in_each_registry
def test_in_a_request_requires_new_stays_though_the_request_fails(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        world.Session.add(note("lost"))
        with session_scope(world.Session, propagation="requires_new") as session:
            session.add(note("kept"))
        start_response("500 Internal Server Error", [])
        return [b"sorry"]

    assert request(SessionMiddleware(app, world.Session)).status == "500 Internal Server Error"
    assert world.durable() == ["kept"]


@in_each_registry
def test_in_a_request_a_swallowed_failure_of_a_joined_part_is_no_success(world: World) -> None:
    failure = Failure()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        write(world.Session, "half")
        with suppress(Failure), session_scope(world.Session):
            raise failure
        return ok(start_response)

    statuses: list[str] = []
    with pytest.raises(RollbackOnlyError) as caught:
        Exchange(SessionMiddleware(app, world.Session), on_start=statuses.append)
    assert caught.value.__cause__ is failure
    assert statuses == []
    assert world.durable() == []


def test_in_a_request_that_answers_an_error_the_swallowed_failure_is_no_second_one(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        with suppress(Failure), session_scope(world.Session) as session:
            write(session, "lost")
            raise Failure
        start_response("409 Conflict", [])
        return [b"sorry"]

    exchange = request(SessionMiddleware(app, world.Session))
    assert exchange.status == "409 Conflict"
    assert world.durable() == []


@in_each_registry
def test_in_a_body_a_swallowed_failure_of_a_joined_part_breaks_the_transfer_off(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        write(world.Session, "view")
        start_response("200 OK", [])

        def body() -> Iterator[bytes]:
            yield b"one"
            write(world.Session, "body")
            with suppress(Failure), session_scope(world.Session):
                raise Failure
            yield b"two"

        return body()

    exchange = Exchange(SessionMiddleware(app, world.Session))
    assert exchange.next() == b"one"
    assert exchange.next() == b"two"
    with pytest.raises(RollbackOnlyError) as caught:
        exchange.next()
    exchange.close()
    assert isinstance(caught.value.__cause__, Failure)
    assert world.durable() == ["view"]


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_a_request_can_be_made_inside_of_a_block(sqlite_url: URL, propagation: Any) -> None:
    with closing(World(sqlite_url, "contextual")) as world:

        def app(environ: Any, start_response: Any) -> list[bytes]:
            with session_scope(world.Session, propagation=propagation) as session:
                session.add(note("of the request"))
            return ok(start_response)

        with suppress(Failure), session_scope(world.Session) as outer:
            outer.add(note("of the block"))
            request(SessionMiddleware(app, world.Session))
            assert world.Session() is outer
            assert world.durable() == ["of the request"]
            raise Failure
        assert world.durable() == ["of the request"]


# -- rollback-only ----------------------------------------------------------------------------------------------------


@in_each_registry
def test_a_swallowed_failure_of_a_joined_part_keeps_nothing_and_says_so(world: World) -> None:
    failure = Failure()
    with pytest.raises(RollbackOnlyError) as caught, session_scope(world.Session) as session:
        write(session, "before")
        with suppress(Failure), session_scope(world.Session):
            write(session, "half")
            raise failure
        write(session, "z: after")
    assert caught.value.__cause__ is failure
    assert world.durable() == []
    assert world.checked_out == 0


def test_of_several_swallowed_failures_the_first_is_the_cause_unless_it_was_rolled_back(world: World) -> None:
    def fail(session: Any, failure: Failure) -> None:
        with suppress(Failure), session_scope(world.Session):
            write(session, "half")
            raise failure

    undone, cause = Failure(), Failure()
    with pytest.raises(RollbackOnlyError) as caught, session_scope(world.Session) as session:
        fail(session, undone)
        session.rollback()
        fail(session, cause)
        with suppress(IntegrityError):  # that is there already
            fail(session, Failure())
    assert caught.value.__cause__ is cause
    assert world.durable() == []


@in_each_registry
def test_a_swallowed_failure_counts_even_before_the_first_statement(world: World) -> None:
    with pytest.raises(RollbackOnlyError), session_scope(world.Session) as session:
        with suppress(Failure), session_scope(world.Session):
            raise Failure
        session.add(note("after"))
    assert world.durable() == []


def test_a_rollback_of_ones_own_makes_it_possible_to_commit_again(world: World) -> None:
    with session_scope(world.Session) as session:
        write(session, "before")
        try:
            with session_scope(world.Session):
                raise Failure
        except Failure:
            session.rollback()
        write(session, "instead")
    assert world.durable() == ["instead"]


def test_a_rollback_of_ones_own_counts_even_before_the_first_statement(world: World) -> None:
    with session_scope(world.Session) as session:
        try:
            with session_scope(world.Session):
                raise Failure
        except Failure:
            session.rollback()
        session.add(note("instead"))
    assert world.durable() == ["instead"]


def test_a_rollback_before_the_failure_makes_nothing_possible(world: World) -> None:
    with pytest.raises(RollbackOnlyError), session_scope(world.Session) as session:
        write(session, "before")
        session.rollback()
        with suppress(Failure), session_scope(world.Session):
            raise Failure
        write(session, "after")
    assert world.durable() == []


@in_each_registry
def test_removing_the_session_makes_it_possible_to_commit_again(world: World) -> None:
    with session_scope(world.Session) as session:
        write(session, "before")
        with suppress(Failure), session_scope(world.Session):
            raise Failure
        world.Session.remove()
        world.Session.add(note("instead"))
    assert world.durable() == ["instead"]


def test_the_last_of_several_swallowed_failures_counts(world: World) -> None:
    with pytest.raises(RollbackOnlyError), session_scope(world.Session) as session:
        for _ in range(2):
            with suppress(Failure), session_scope(world.Session):
                raise Failure
            session.rollback()
        with suppress(Failure), session_scope(world.Session):
            raise Failure
        session.add(note("lost"))
    assert world.durable() == []


def test_an_outer_block_that_fails_itself_raises_its_own_exception(world: World) -> None:
    failure = KeyError("its own")
    with pytest.raises(KeyError) as caught, session_scope(world.Session) as session:
        write(session, "lost")
        with suppress(Failure), session_scope(world.Session):
            raise Failure
        raise failure
    assert caught.value is failure
    assert world.durable() == []


def test_doom_is_the_quiet_form(world: World) -> None:
    with session_scope(world.Session) as session:
        write(session, "tried")
        current_scope().doom("a dry run")
    assert world.durable() == []


def test_doom_in_a_joined_part_dooms_the_whole_quietly(world: World) -> None:
    with session_scope(world.Session) as session:
        write(session, "outer")
        with session_scope(world.Session):
            write(session, "joined")
            current_scope().doom("a dry run")
    assert world.durable() == []


def test_doom_in_a_nested_part_dooms_only_that(world: World) -> None:
    with session_scope(world.Session) as session:
        write(session, "outer")
        with session_scope(world.Session, propagation="nested"):
            write(session, "nested")
            current_scope().doom("a dry run")
    assert world.durable() == ["outer"]


def test_what_is_doomed_has_no_swallowed_failure_to_complain_of(world: World) -> None:
    with session_scope(world.Session) as session:
        write(session, "lost")
        current_scope().doom("a dry run")
        with suppress(Failure), session_scope(world.Session):
            raise Failure
    assert world.durable() == []


def test_doom_is_not_undone_by_a_rollback_of_ones_own(world: World) -> None:
    with session_scope(world.Session) as session:
        current_scope().doom("a dry run")
        session.rollback()
        write(session, "lost")
    assert world.durable() == []


@in_each_registry
def test_a_swallowed_failure_in_a_nested_part_can_be_undone_with_that_part(world: World) -> None:
    with session_scope(world.Session) as session:
        write(session, "outer")
        with pytest.raises(RollbackOnlyError) as caught, session_scope(world.Session, propagation="nested"):
            write(session, "half")
            with suppress(Failure), session_scope(world.Session):
                raise Failure
        assert isinstance(caught.value.__cause__, Failure)
    assert world.durable() == ["outer"]


@in_each_registry
def test_a_nested_part_that_ends_the_whole_transaction_itself_is_taken_at_its_word(world: World) -> None:
    with session_scope(world.Session) as session:
        write(session, "a: outer")
        with session_scope(world.Session, propagation="nested"):
            write(session, "b: nested")
            if SQLALCHEMY_14:
                session.commit()
            session.commit()
        assert world.durable() == ["a: outer", "b: nested"]
        write(session, "c: after")
        with session_scope(world.Session, propagation="nested"):
            write(session, "d: nested")
            world.Session.remove()
        world.Session.add(note("e: at last"))
    assert world.durable() == ["a: outer", "b: nested", "e: at last"]


def test_a_nested_part_that_ends_only_its_own_savepoint_is_taken_at_its_word(world: World) -> None:
    with session_scope(world.Session) as session:
        with session_scope(world.Session, propagation="nested"):
            write(session, "nested")
            own = session.get_nested_transaction()
            assert own is not None
            own.commit()
            # Of the block around it now.
            other = session.begin_nested()
            write(session, "after")
        other.rollback()
    assert world.durable() == ["nested"]


# -- the databases ----------------------------------------------------------------------------------------------------


def test_a_block_commits_or_rolls_back_on_each_database(world_on_each_database: World) -> None:
    world = world_on_each_database
    with session_scope(world.Session) as session:
        session.add(note("kept"))
    with suppress(Failure), session_scope(world.Session) as session:
        write(session, "lost")
        raise Failure
    assert world.durable() == ["kept"]


def test_a_transaction_that_postgresql_has_aborted_is_no_success(postgresql_world: World) -> None:
    world = postgresql_world
    with pytest.raises(RollbackOnlyError), session_scope(world.Session) as session:
        write(session, "lost")
        with suppress(DBAPIError):
            session.execute(sa.text("SELECT 1 / 0"))
    assert world.durable() == []
    assert world.checked_out == 0


def test_a_transaction_that_postgresql_has_aborted_is_forgiven_after_a_rollback_of_ones_own(
    postgresql_world: World,
) -> None:
    world = postgresql_world
    with session_scope(world.Session) as session:
        write(session, "lost")
        try:
            session.execute(sa.text("SELECT 1 / 0"))
        except DBAPIError:
            session.rollback()
        session.add(note("instead"))
    assert world.durable() == ["instead"]


def test_an_error_of_postgresql_in_a_nested_part_costs_only_the_savepoint(postgresql_world: World) -> None:
    world = postgresql_world
    with session_scope(world.Session) as session:
        write(session, "outer")
        with suppress(DBAPIError), session_scope(world.Session, propagation="nested"):
            write(session, "lost")
            session.execute(sa.text("SELECT 1 / 0"))
        write(session, "z: after")
    assert world.durable() == ["outer", "z: after"]


def test_an_error_of_postgresql_swallowed_in_a_nested_part_costs_only_the_savepoint(postgresql_world: World) -> None:
    world = postgresql_world
    with session_scope(world.Session) as session:
        write(session, "outer")
        with pytest.raises(RollbackOnlyError), session_scope(world.Session, propagation="nested"):
            write(session, "lost")
            with suppress(DBAPIError):
                session.execute(sa.text("SELECT 1 / 0"))
        write(session, "z: after")
    assert world.durable() == ["outer", "z: after"]


def test_a_connection_that_breaks_is_discarded_and_the_first_exception_stays(postgresql_world: World) -> None:
    world = postgresql_world
    failure = Failure()
    with pytest.raises(Failure) as caught, session_scope(world.Session) as session:
        write(session, "lost")
        cut_off(world)
        raise failure
    assert caught.value is failure
    assert world.checked_out == 0
    with session_scope(world.Session) as session:
        session.add(note("kept"))
    assert world.durable() == ["kept"]


def test_a_connection_that_breaks_in_a_nested_part_takes_the_whole_along(postgresql_world: World) -> None:
    world = postgresql_world
    with pytest.raises((RollbackOnlyError, SQLAlchemyError)), session_scope(world.Session) as session:
        write(session, "lost")
        with suppress(Failure), session_scope(world.Session, propagation="nested"):
            write(session, "lost too")
            cut_off(world)
            raise Failure
        write(session, "after")
    assert world.durable() == []
    assert world.checked_out == 0


def test_a_savepoint_that_cannot_be_rolled_back_to_takes_the_whole_along_although_nothing_follows(
    postgresql_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world = postgresql_world
    with pytest.raises(RollbackOnlyError) as caught, session_scope(world.Session) as session:
        write(session, "lost")
        with suppress(Failure), session_scope(world.Session, propagation="nested"):
            write(session, "lost too")
            cut_off(world)
            raise Failure
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert [message.partition(":")[2].partition(";")[0] for message in caplog.messages] == [
        " rolling back to a SAVEPOINT failed"
    ]
    assert world.durable() == []
    assert world.checked_out == 0


def test_a_connection_that_breaks_before_a_nested_part_is_released_is_no_success(postgresql_world: World) -> None:
    world = postgresql_world
    with pytest.raises((RollbackOnlyError, SQLAlchemyError)), session_scope(world.Session) as session:
        write(session, "lost")
        with suppress(DBAPIError), session_scope(world.Session, propagation="nested"):
            write(session, "lost too")
            cut_off(world)
        write(session, "after")
    assert world.durable() == []
    assert world.checked_out == 0


def cut_off(world: World) -> None:
    """Let the server drop the connections of the world's pool."""
    pids = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE state = 'idle in transaction'"
    engine = sa.create_engine(world.engine.url)
    with engine.connect() as connection:
        connection.execute(sa.text(pids))
    engine.dispose()


# -- with_session -----------------------------------------------------------------------------------------------------


@in_each_registry
def test_a_decorated_function_gets_the_session_and_is_committed(world: World) -> None:
    @with_session(world.Session)
    def job(text: str, *, session: Any) -> str:
        assert session is world.Session()
        session.add(note(text))
        return f"result of {text}"

    assert job("kept") == "result of kept"
    assert world.durable() == ["kept"]
    assert world.checked_out == 0


def test_a_decorated_function_that_raises_is_rolled_back(world: World) -> None:
    failure = Failure()

    @with_session(world.Session)
    def job(session: Any) -> None:
        write(session, "lost")
        raise failure

    with pytest.raises(Failure) as caught:
        job()
    assert caught.value is failure
    assert world.durable() == []


def test_a_decorated_function_can_take_the_session_under_another_name(world: World) -> None:
    @with_session(world.Session, argument="db")
    def job(text: str, db: Any = None) -> None:
        db.add(note(text))

    job(text="kept")
    assert world.durable() == ["kept"]


def test_a_decorated_function_that_takes_any_keyword_gets_the_session(world: World) -> None:
    @with_session(world.Session)
    def job(**options: Any) -> list[str]:
        return sorted(options)

    assert job(other=1) == ["other", "session"]


def test_a_method_can_be_decorated(world: World) -> None:
    class Worker:
        prefix = "by a method: "

        @with_session(world.Session)
        def run(self, text: str, *, session: Any) -> None:
            session.add(note(self.prefix + text))

        @classmethod
        @with_session(world.Session)
        def of_class(cls, *, session: Any) -> None:
            session.add(note(f"by {cls.__name__}"))

        @staticmethod
        @with_session(world.Session)
        def of_nobody(*, session: Any) -> None:
            session.add(note("by a static method"))

    Worker().run("kept")
    Worker.of_class()
    Worker.of_nobody()
    with_session(world.Session)(Worker().run.__wrapped__.__get__(Worker()))("bound")  # type: ignore[attr-defined]
    assert world.durable() == ["by Worker", "by a method: bound", "by a method: kept", "by a static method"]


def test_a_partial_and_a_callable_object_can_be_decorated(world: World) -> None:
    def job(text: str, *, session: Any) -> str:
        """What it does."""
        session.add(note(text))
        return str(current_scope())

    class Job:
        def __call__(self, session: Any) -> str:
            session.add(note("object"))
            return str(current_scope())

    assert with_session(world.Session)(functools.partial(job, "partial"))().endswith(".job")
    assert with_session(world.Session)(Job())().endswith(".Job")
    assert world.durable() == ["object", "partial"]


def test_a_callable_without_a_signature_is_taken_at_its_word(world: World) -> None:
    # dict.update, for one, has none on CPython 3.10 and 3.11.
    kept: dict[str, Any] = {}
    with_session(world.Session)(kept.update)()
    assert list(kept) == ["session"]


def test_a_decorated_function_keeps_its_name_its_docstring_and_its_signature(world: World) -> None:
    @with_session(world.Session)
    def job(text: str, *, session: Any = None) -> None:
        """What it does."""

    assert job.__name__ == "job"
    assert job.__doc__ == "What it does."
    assert job.__module__ == __name__
    assert list(inspect.signature(job).parameters) == ["text", "session"]


def test_a_decorated_function_is_named_in_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    @with_session(world.Session)
    def purge(session: Any) -> None:
        session.add(note("kept"))

    with caplog.at_level("DEBUG", "sa_wsgi_session"):
        purge()
    (record,) = caplog.records
    assert record.levelname == "DEBUG"
    assert f"{__name__}." in record.message
    assert ".purge" in record.message
    assert "committed" in record.message


def test_a_decorated_function_can_call_itself_and_joins_itself(world: World) -> None:
    @with_session(world.Session)
    def job(depth: int, *, session: Any) -> set[Any]:
        session.add(note(f"{depth}"))
        return {session} if depth == 0 else {session, *job(depth - 1)}

    assert len(job(3)) == 1
    assert world.durable() == ["0", "1", "2", "3"]


def test_a_decorated_function_follows_its_propagation(world: World) -> None:
    @with_session(world.Session, propagation="nested")
    def nested(text: str, *, session: Any) -> None:
        write(session, text)
        raise Failure

    @with_session(world.Session, propagation="requires_new")
    def new(text: str, *, session: Any) -> None:
        session.add(note(text))

    with suppress(KeyError), session_scope(world.Session) as session:
        session.add(note("outer"))
        new("new")
        raise KeyError
    with session_scope(world.Session) as session:
        with suppress(Failure):
            nested("lost")
        session.add(note("outer"))
    assert world.durable() == ["new", "outer"]


def test_one_decorated_function_runs_on_many_threads(sqlite_url: URL) -> None:
    threads = 8
    with closing(World(sqlite_url, pool_size=threads)) as world:
        all_inside = threading.Barrier(threads, timeout=30)
        sessions: list[Any] = []

        @with_session(world.Session)
        def job(*, session: Any) -> None:
            all_inside.wait()
            sessions.append(session)
            all_inside.wait()

        run_in_threads(*[job] * threads)
        assert len(set(map(id, sessions))) == threads


def test_a_caller_who_passes_the_session_too_is_told(world: World) -> None:
    @with_session(world.Session)
    def job(session: Any) -> None:
        pytest.fail("not reached")

    with pytest.raises(TypeError, match="session"):
        job(session=object())
    with pytest.raises(TypeError, match="session"):
        job(object())


async def _coroutine(session: Any) -> None:
    pass


async def _asynchronous_generator(session: Any) -> Any:
    yield


def _generator(session: Any) -> Any:
    yield


class _AsynchronousCall:
    async def __call__(self, session: Any) -> None:
        pass


class _GeneratorCall:
    def __call__(self, session: Any) -> Any:
        yield


@pytest.mark.parametrize(
    "function",
    [
        _coroutine,
        _generator,
        _asynchronous_generator,
        functools.partial(_coroutine),
        functools.partial(_generator),
        _AsynchronousCall(),
        _GeneratorCall(),
    ],
    ids=[
        "coroutine",
        "generator",
        "async generator",
        "partial coroutine",
        "partial generator",
        "call",
        "generator call",
    ],
)
def test_a_function_that_would_run_after_its_unit_of_work_is_refused_at_once(function: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot decorate .*session_scope\(\) inside it"):
        with_session(FACTORY)(function)


def test_a_function_that_does_not_take_the_session_is_refused_at_once() -> None:
    def job(text: str) -> None:
        pass

    def positional(session: Any, /) -> None:
        pass

    for function in (job, positional):
        with pytest.raises(TypeError, match=rf"session=, which {__name__}\.\S+\.{function.__name__} does not take"):
            with_session(FACTORY)(function)
    with pytest.raises(TypeError, match="db=, which"):
        with_session(FACTORY, argument="db")(_job)


def _job(session: Any) -> None:
    pass


@pytest.mark.parametrize("wrong", [None, "job", 3])
def test_what_is_no_function_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(TypeError, match="decorates a function"):
        with_session(FACTORY)(wrong)


@pytest.mark.parametrize(
    ("wrong", "error"), [(None, TypeError), (b"session", TypeError), ("", ValueError), ("not a name", ValueError)]
)
def test_what_is_no_name_of_an_argument_is_told_at_once(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="argument must be"):
        with_session(FACTORY, argument=wrong)


def test_a_block_is_over_even_if_the_session_cannot_be_made(sqlite_url: URL) -> None:
    def factory() -> Any:
        raise Failure

    Session: Any = scoped_session(factory)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(Failure), session_scope(Session):
            pytest.fail("not reached")
        with pytest.raises(NoActiveScope):
            current_scope()


def test_a_joined_part_that_fails_is_over_even_if_no_session_can_be_made_any_more(
    sqlite_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(World(sqlite_url)) as world:
        left = [OrmSession(world.engine)]
        Session: Any = scoped_session(left.pop)  # type: ignore[arg-type]
        with session_scope(Session) as session:
            write(session, "lost")
            with suppress(Failure), session_scope(Session):
                Session.remove()
                raise Failure
        assert "IndexError" in caplog.text
        assert world.durable() == []
        assert world.checked_out == 0


# -- blocks that lose their place -------------------------------------------------------------------------------------


def block_of_a_generator(session: Any, text: str) -> Iterator[None]:
    with session_scope(session, propagation="requires_new") as own:
        own.add(Note(text=f"{text} before"))
        own.commit()  # so that SQLite lets others write meanwhile
        yield
        own.add(Note(text=f"{text} after"))


@in_each_registry
def test_a_block_that_a_generator_keeps_open_outlives_the_block_around_it(world: World) -> None:
    generator = block_of_a_generator(world.Session, "inner")
    with session_scope(world.Session) as session:
        next(generator)
        session.add(Note(text="outer"))
    assert not world.Session.registry.has()
    assert world.durable() == ["inner before", "outer"]
    assert list(generator) == []
    assert world.durable() == ["inner after", "inner before", "outer"]


def test_a_block_that_ends_in_another_context_leaves_alone_what_is_running_there(sqlite_url: URL) -> None:
    with closing(World(sqlite_url, "contextual")) as world:
        block = session_scope(world.Session)

        def begin() -> None:
            session = block.__enter__()
            with session_scope(world.Session, propagation="nested"):
                session.add(note("kept"))
            session.commit()  # so that SQLite lets others write meanwhile

        contextvars.Context().run(begin)
        with session_scope(world.Session) as session:
            scope = current_scope()
            session.add(note("kept too"))
            block.__exit__(None, None, None)
            assert current_scope() is scope
            assert world.Session() is session
        assert world.durable() == ["kept", "kept too"]


@in_each_registry
def test_a_block_may_end_in_another_context_than_it_began_in(world: World) -> None:
    block = session_scope(world.Session)
    session = block.__enter__()
    with session_scope(world.Session, propagation="nested"):
        session.add(Note(text="kept"))
    contextvars.Context().run(block.__exit__, None, None, None)
    assert world.durable() == ["kept"]
    with pytest.raises(NoActiveScope):
        current_scope()
