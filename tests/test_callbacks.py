"""``on_commit`` and ``on_rollback``: what is done when the outcome is certain."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import scoped_session, sessionmaker

from sa_wsgi_session import (
    NoActiveScope,
    RollbackOnlyError,
    SessionMiddleware,
    SessionScope,
    contextual_session,
    current_scope,
    session_scope,
)
from tests.conftest import SQLALCHEMY_14
from tests.support import Exchange, Note, World, in_each_registry, note, request


class Failure(Exception):
    """What goes wrong in these tests."""


class Diary:
    """What has happened, in order; ``diary("a")`` is a callback that notes it."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    def __call__(self, entry: str) -> Callable[[], object]:
        return lambda: self.entries.append(entry)

    def watch(self, name: str = "") -> None:
        """Note the outcome of what is done in the present transaction."""
        scope = current_scope()
        scope.on_commit(self(f"{name} committed".strip()))
        scope.on_rollback(self(f"{name} rolled back".strip()))


@pytest.fixture
def diary() -> Diary:
    return Diary()


def write(session: Any, text: str) -> None:
    session.add(Note(text=text))
    session.flush()


# Two ways to do some work in a unit of work of its own. What the work raises, they raise.


def in_a_job(Session: Any, work: Callable[[], object]) -> None:
    with session_scope(Session):
        work()


def in_a_request(Session: Any, work: Callable[[], object]) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        work()
        start_response("200 OK", [])
        return [b"done"]

    request(SessionMiddleware(app, Session))


def in_a_streamed_request(Session: Any, work: Callable[[], object]) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"first"
        work()
        yield b"last"

    request(SessionMiddleware(app, Session))


Unit = Callable[[Any, Callable[[], object]], None]
UNITS: list[Unit] = [in_a_job, in_a_request, in_a_streamed_request]
in_each_unit = pytest.mark.parametrize("unit", UNITS)


# -- when, and in which order -----------------------------------------------------------------------------------------


@in_each_registry
@in_each_unit
def test_callbacks_run_in_order_when_all_of_it_is_durable(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        scope = current_scope()
        scope.on_commit(diary("before any statement"))
        write(world.Session, "kept")
        scope.on_commit(lambda: diary.entries.append(f"durable: {world.durable()}"))
        scope.on_rollback(lambda: pytest.fail("it was not rolled back"))
        scope.on_commit(diary("last"))
        assert diary.entries == []

    unit(world.Session, work)
    assert diary.entries == ["before any statement", "durable: ['kept']", "last"]


@in_each_registry
@in_each_unit
def test_callbacks_of_a_failure_run_in_order_when_nothing_of_it_is_left(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        scope = current_scope()
        scope.on_rollback(diary("before any statement"))
        write(world.Session, "lost")
        scope.on_commit(lambda: pytest.fail("it was not committed"))
        scope.on_rollback(lambda: diary.entries.append(f"durable: {world.durable()}"))
        scope.on_rollback(lambda: world.insert("nothing is locked any more"))
        raise Failure

    with pytest.raises(Failure):
        unit(world.Session, work)
    assert diary.entries == ["before any statement", "durable: []"]
    assert world.durable() == ["nothing is locked any more"]


@in_each_unit
def test_callbacks_run_although_nothing_was_done(world: World, diary: Diary, unit: Unit) -> None:
    unit(world.Session, diary.watch)
    assert diary.entries == ["committed"]


@in_each_registry
@in_each_unit
def test_callbacks_run_when_their_connection_is_back_in_the_pool(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        write(world.Session, "kept")
        current_scope().on_commit(lambda: diary.entries.append(f"{world.checked_out} connections"))

    unit(world.Session, work)
    assert diary.entries == ["0 connections"]


@in_each_unit
def test_one_callback_registered_twice_runs_twice(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        callback = diary("again")
        current_scope().on_commit(callback)
        current_scope().on_commit(callback)

    unit(world.Session, work)
    assert diary.entries == ["again", "again"]


def test_callbacks_run_before_the_response_leaves(world: World, diary: Diary) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        write(world.Session, "kept")
        diary.watch()
        start_response("200 OK", [])
        return [b"done"]

    Exchange(SessionMiddleware(app, world.Session), on_start=lambda status: diary.entries.append(status))
    assert diary.entries == ["committed", "200 OK"]


def test_callbacks_of_a_streamed_response_run_before_it_begins(world: World, diary: Diary) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        write(world.Session, "kept")
        diary.watch("view")
        start_response("200 OK", [])
        yield b"first"
        yield b"last"

    exchange = Exchange(SessionMiddleware(app, world.Session), on_start=lambda status: diary.entries.append(status))
    assert diary.entries == ["view committed", "200 OK"]
    assert exchange.read() == b"firstlast"
    assert diary.entries == ["view committed", "200 OK"]


def test_callbacks_run_before_the_first_byte_of_the_legacy_write(world: World, diary: Diary) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        write(world.Session, "kept")
        diary.watch("before")
        send = start_response("200 OK", [])
        send(b"first")
        write(world.Session, "kept too")
        diary.watch("after")
        return []

    exchange = Exchange(SessionMiddleware(app, world.Session), on_start=lambda status: diary.entries.append(status))
    exchange.read()
    assert diary.entries == ["before committed", "200 OK", "after committed"]
    assert world.durable() == ["kept", "kept too"]


def test_callbacks_wait_for_the_end_of_the_body_where_the_commit_does(world: World, diary: Diary) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        write(world.Session, "view")
        diary.watch("view")
        start_response("200 OK", [])
        yield b"first"
        write(world.Session, "body")
        diary.watch("body")
        yield b"last"

    exchange = Exchange(SessionMiddleware(app, world.Session, commit_at="end"))
    assert [exchange.next(), exchange.next()] == [b"first", b"last"]
    assert diary.entries == []
    with pytest.raises(StopIteration):
        exchange.next()
    assert diary.entries == ["view committed", "body committed"]
    exchange.close()


@pytest.mark.parametrize(
    ("commit_at", "status", "doomed", "before", "after"),
    [
        ("start", "200 OK", False, ["committed"], []),
        ("start", "200 OK", True, ["rolled back"], []),
        ("start", "500 Oops", False, ["rolled back"], []),
        ("end", "200 OK", False, [], ["committed"]),
        ("end", "200 OK", True, ["rolled back"], []),
        ("end", "500 Oops", False, ["rolled back"], []),
    ],
)
def test_callbacks_of_a_view_that_has_done_nothing_wait_as_if_it_had(
    world: World, diary: Diary, commit_at: Any, status: str, doomed: bool, before: list[str], after: list[str]
) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        diary.watch()
        if doomed:
            current_scope().doom("a dry run")
        start_response(status, [])
        yield b"first"
        diary.entries.append("body")

    request(SessionMiddleware(app, world.Session, commit_at=commit_at))
    assert diary.entries == [*before, "body", *after]


def test_callbacks_of_the_view_and_of_the_body_follow_their_own_transaction(world: World, diary: Diary) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        write(world.Session, "view")
        diary.watch("view")
        start_response("200 OK", [])
        yield b"first"
        write(world.Session, "body")
        diary.watch("body")
        yield b"last"

    exchange = Exchange(SessionMiddleware(app, world.Session))
    assert [exchange.next(), exchange.next()] == [b"first", b"last"]
    exchange.close()  # the client hangs up
    assert diary.entries == ["view committed", "body rolled back"]
    assert world.durable() == ["view"]


@in_each_registry
def test_callbacks_can_be_registered_while_the_application_closes_its_body(world: World, diary: Diary) -> None:
    class Body:
        def __iter__(self) -> Iterator[bytes]:
            yield b"one"
            yield b"two"

        def close(self) -> None:
            write(world.Session, f"closed {len(diary.entries)}")
            diary.watch("close")

    def app(environ: Any, start_response: Any) -> Body:
        start_response("200 OK", [])
        return Body()

    application = SessionMiddleware(app, world.Session)
    request(application)
    assert diary.entries == ["close committed"]
    assert world.durable() == ["closed 0"]

    cut_off = Exchange(application)
    cut_off.next()
    cut_off.close()
    assert diary.entries == ["close committed", "close rolled back"]
    assert world.durable() == ["closed 0"]


@in_each_registry
def test_callbacks_of_a_body_that_commits_by_itself_run_before_the_next_chunk_leaves(
    world: World, diary: Diary
) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"0"
        for number in (1, 2):
            write(world.Session, f"{number}")
            current_scope().on_commit(lambda: diary.entries.append(f"durable: {world.durable()}"))
            world.Session.commit()
            yield b"%d" % number

    exchange = Exchange(SessionMiddleware(app, world.Session))
    assert [exchange.next(), exchange.next()] == [b"0", b"1"]
    assert diary.entries == ["durable: ['1']"]
    assert exchange.next() == b"2"
    assert diary.entries == ["durable: ['1']", "durable: ['1', '2']"]
    exchange.close()  # the client hangs up, and what is durable stays
    assert len(diary.entries) == 2


# -- what a callback finds --------------------------------------------------------------------------------------------


@in_each_registry
@in_each_unit
def test_a_callback_runs_outside_of_the_unit_of_work(world: World, diary: Diary, unit: Unit) -> None:
    def callback() -> None:
        diary.entries.append(f"{world.Session.registry.has()}")
        with pytest.raises(NoActiveScope):
            current_scope()

    def work() -> None:
        write(world.Session, "kept")
        current_scope().on_commit(callback)

    unit(world.Session, work)
    assert diary.entries == ["False"]


@in_each_unit
def test_a_callback_finds_a_contextual_session_that_refuses(sqlite_url: URL, diary: Diary, unit: Unit) -> None:
    with closing(World(sqlite_url, "contextual")) as world:

        def callback() -> None:
            with pytest.raises(NoActiveScope):
                world.Session()
            diary.entries.append("refused")

        unit(world.Session, lambda: current_scope().on_commit(callback))
        assert diary.entries == ["refused"]


@in_each_unit
@pytest.mark.parametrize("registry", ["thread-local", "custom"])
def test_a_callback_finds_the_registry_as_it_was_before(
    sqlite_url: URL, diary: Diary, unit: Unit, registry: str
) -> None:
    with closing(World(sqlite_url, registry)) as world:
        held = world.Session()

        def callback() -> None:
            assert world.Session() is held
            diary.entries.append("the thread's own")

        def work() -> None:
            assert world.Session() is not held
            current_scope().on_commit(callback)

        unit(world.Session, work)
        assert diary.entries == ["the thread's own"]
        world.Session.remove()


@in_each_registry
@in_each_unit
def test_a_callback_may_do_work_in_a_unit_of_its_own(world: World, diary: Diary, unit: Unit) -> None:
    def callback() -> None:
        with session_scope(world.Session) as session:
            session.add(note("by the callback"))
            current_scope().on_commit(diary("callback's callback"))

    def work() -> None:
        world.Session.add(note("a: by the work"))
        current_scope().on_commit(callback)
        current_scope().on_commit(diary("next"))

    unit(world.Session, work)
    assert world.durable() == ["a: by the work", "by the callback"]
    assert diary.entries == ["callback's callback", "next"]


def test_a_callback_of_an_independent_part_finds_the_unit_around_it(sqlite_url: URL, diary: Diary) -> None:
    with closing(World(sqlite_url, "contextual")) as world, session_scope(world.Session) as outer:
        with session_scope(world.Session, propagation="requires_new") as inner:
            inner.add(note("inner"))

            def callback() -> None:
                assert world.Session() is outer
                diary.entries.append(f"durable: {world.durable()}")

            current_scope().on_commit(callback)
        assert diary.entries == ["durable: ['inner']"]


@in_each_unit
def test_a_callback_that_raises_is_logged_and_stops_nothing(
    world: World, diary: Diary, unit: Unit, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "what the client has sent"

    def broken() -> None:
        raise ValueError(secret)

    def work() -> None:
        world.Session.add(note("kept"))
        current_scope().on_commit(broken)
        current_scope().on_commit(functools.partial(broken))
        current_scope().on_commit(diary("next"))

    unit(world.Session, work)
    assert diary.entries == ["next"]
    assert world.durable() == ["kept"]
    warnings = [record for record in caplog.records if record.name == "sa_wsgi_session"]
    assert [record.levelname for record in warnings] == ["WARNING", "WARNING"]
    for record in warnings:
        assert ".broken" in record.getMessage()
        assert "ValueError" in record.getMessage()
        assert secret not in record.getMessage()


def test_the_log_names_the_error_of_the_driver_too(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.insert("taken")

    def broken() -> None:
        with session_scope(world.Session) as session:
            session.add(note("taken"))

    def broken_without_a_database() -> None:
        raise ValueError

    with session_scope(world.Session):
        current_scope().on_commit(broken)
        current_scope().on_commit(broken_without_a_database)
    first, second = (record.getMessage().partition("\n")[0] for record in caplog.records)
    assert first.endswith(": sqlalchemy.exc.IntegrityError from sqlite3.IntegrityError")
    assert second.endswith(": ValueError")


@in_each_unit
def test_a_callback_of_a_failure_that_raises_leaves_the_first_exception(
    world: World, diary: Diary, unit: Unit, caplog: pytest.LogCaptureFixture
) -> None:
    failure = Failure()

    def broken() -> None:
        raise ValueError

    def work() -> None:
        current_scope().on_rollback(broken)
        current_scope().on_rollback(diary("next"))
        raise failure

    with pytest.raises(Failure) as caught:
        unit(world.Session, work)
    assert caught.value is failure
    assert diary.entries == ["next"]
    assert "ValueError" in caplog.text


def test_a_callback_that_is_interrupted_stops_no_other_and_the_interruption_goes_on(world: World, diary: Diary) -> None:
    interruption = KeyboardInterrupt()

    def interrupted() -> None:
        raise interruption

    with pytest.raises(KeyboardInterrupt) as caught, session_scope(world.Session) as session:
        session.add(note("kept"))
        current_scope().on_commit(interrupted)
        current_scope().on_commit(diary("next"))
    assert caught.value is interruption
    assert diary.entries == ["next"]
    assert world.durable() == ["kept"]


def test_an_interruption_leaves_no_reference_cycle(world: World) -> None:
    """It may be a timeout, whose traceback holds all that the request had."""

    class Interruption(BaseException):
        pass

    made: list[weakref.ref[BaseException]] = []

    def interrupted() -> None:
        interruption = Interruption()
        made.append(weakref.ref(interruption))
        try:
            raise interruption
        finally:
            del interruption

    def work() -> None:
        with suppress(Interruption), session_scope(world.Session):
            current_scope().on_commit(interrupted)

    gc.disable()
    try:
        work()
        assert [reference() for reference in made] == [None]
    finally:
        gc.enable()


def test_a_callback_that_is_interrupted_after_a_failure_leaves_the_first_exception(world: World, diary: Diary) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    failure = Failure()
    with pytest.raises(Failure) as caught, session_scope(world.Session):
        current_scope().on_rollback(interrupted)
        current_scope().on_rollback(diary("next"))
        raise failure
    assert caught.value is failure
    assert diary.entries == ["next"]


@pytest.mark.parametrize("wrong", [None, "a string", 1, []])
def test_what_cannot_be_called_is_told_at_once(world: World, wrong: Any) -> None:
    with session_scope(world.Session):
        for register in (current_scope().on_commit, current_scope().on_rollback):
            with pytest.raises(TypeError, match="takes a callable without arguments, not an object of type"):
                register(wrong)


@in_each_unit
def test_it_is_too_late_when_the_unit_of_work_has_ended(world: World, diary: Diary, unit: Unit) -> None:
    scopes: list[SessionScope] = []
    unit(world.Session, lambda: scopes.append(current_scope()))
    (scope,) = scopes
    with pytest.raises(NoActiveScope, match="had ended"):
        scope.on_commit(diary("too late"))
    with pytest.raises(NoActiveScope, match="had ended"):
        scope.on_rollback(diary("too late"))
    assert diary.entries == []


# -- dropped ----------------------------------------------------------------------------------------------------------


@in_each_unit
def test_doomed_means_rolled_back(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        diary.watch("before any statement")
        write(world.Session, "lost")
        diary.watch("after")
        current_scope().doom("a dry run")

    unit(world.Session, work)
    assert diary.entries == ["before any statement rolled back", "after rolled back"]


@in_each_unit
def test_a_failed_commit_means_rolled_back(world: World, diary: Diary, unit: Unit) -> None:
    world.insert("taken")

    def work() -> None:
        world.Session.add(note("taken"))
        diary.watch()

    with pytest.raises(IntegrityError):
        unit(world.Session, work)
    assert diary.entries == ["rolled back"]


@in_each_unit
def test_rollback_only_means_rolled_back(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        diary.watch("before any statement")
        with suppress(Failure), session_scope(world.Session) as session:
            write(session, "half")
            diary.watch("joined")
            raise Failure

    with pytest.raises(RollbackOnlyError):
        unit(world.Session, work)
    assert diary.entries == ["before any statement rolled back", "joined rolled back"]


@pytest.mark.parametrize("writes", [False, True])
def test_a_veto_means_rolled_back(world: World, diary: Diary, writes: bool) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        diary.watch()
        if writes:
            write(world.Session, "lost")
        start_response("404 Not Found", [])
        return [b"sorry"]

    request(SessionMiddleware(app, world.Session))
    assert diary.entries == ["rolled back"]


@in_each_registry
@pytest.mark.parametrize("writes", [False, True])
def test_a_client_that_hangs_up_means_rolled_back(world: World, diary: Diary, writes: bool) -> None:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"one"
        if writes:
            write(world.Session, "lost")
        diary.watch()
        yield b"two"

    exchange = Exchange(SessionMiddleware(app, world.Session))
    assert [exchange.next(), exchange.next()] == [b"one", b"two"]
    assert diary.entries == []
    exchange.close()
    assert diary.entries == ["rolled back"]


def test_a_failed_commit_is_a_500_whose_callbacks_are_told_first(world: World, diary: Diary) -> None:
    world.insert("taken")

    def app(environ: Any, start_response: Any) -> list[bytes]:
        world.Session.add(note("taken"))
        diary.watch()
        start_response("200 OK", [])
        return [b"done"]

    with pytest.raises(IntegrityError):
        Exchange(SessionMiddleware(app, world.Session), on_start=lambda status: diary.entries.append(status))
    assert diary.entries == ["rolled back"]


def test_what_a_listener_registers_while_a_failed_commit_is_rolled_back_is_told(world: World, diary: Diary) -> None:
    world.insert("taken")

    def ended(session: Any, transaction: Any) -> None:
        if transaction.parent is None:
            diary.watch("afterwards")

    with pytest.raises(IntegrityError), session_scope(world.Session) as session:
        event.listen(session, "after_transaction_end", ended)
        session.add(note("taken"))
    assert diary.entries == ["afterwards rolled back"]


# -- what the application does itself ---------------------------------------------------------------------------------


@in_each_registry
@in_each_unit
def test_a_commit_of_ones_own_is_final_for_what_was_registered_before(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        diary.watch("before any statement")
        write(world.Session, "kept")
        diary.watch("first")
        world.Session.commit()
        assert diary.entries == []
        write(world.Session, "lost")
        diary.watch("second")
        raise Failure

    with pytest.raises(Failure):
        unit(world.Session, work)
    assert diary.entries == ["before any statement committed", "first committed", "second rolled back"]
    assert world.durable() == ["kept"]


@in_each_registry
@in_each_unit
def test_a_rollback_of_ones_own_is_final_for_what_was_registered_before(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        write(world.Session, "lost")
        diary.watch("first")
        world.Session.rollback()
        write(world.Session, "kept")
        diary.watch("second")

    unit(world.Session, work)
    assert diary.entries == ["first rolled back", "second committed"]
    assert world.durable() == ["kept"]


@in_each_registry
@in_each_unit
@pytest.mark.parametrize("leave", ["remove", "close"])
def test_removing_the_session_rolls_back_what_was_not_committed(
    world: World, diary: Diary, unit: Unit, leave: str
) -> None:
    def work() -> None:
        write(world.Session, "kept")
        diary.watch("first")
        world.Session.commit()
        write(world.Session, "lost")
        diary.watch("second")
        getattr(world.Session, leave)()
        diary.watch("between")
        write(world.Session, "z: in the next session")
        diary.watch("third")

    unit(world.Session, work)
    assert diary.entries == ["first committed", "second rolled back", "between committed", "third committed"]
    assert world.durable() == ["kept", "z: in the next session"]


def test_every_new_sessionmaker_is_listened_to(sqlite_url: URL, diary: Diary) -> None:
    """Also where it was made in the place, in memory, of one that is gone."""
    with closing(World(sqlite_url)) as world:
        for _ in range(5):
            factory = sessionmaker(world.engine)
            with session_scope(factory) as session:
                session.execute(sa.select(Note)).all()
                diary.watch()
                session.rollback()
            del factory, session
            gc.collect()
        assert diary.entries == ["rolled back"] * 5


@in_each_unit
def test_an_error_while_flushing_that_was_rolled_back_is_a_rollback(world: World, diary: Diary, unit: Unit) -> None:
    world.insert("taken")

    def work() -> None:
        write(world.Session, "lost")
        diary.watch("first")
        try:
            write(world.Session, "taken")
        except IntegrityError:
            world.Session.rollback()
        diary.watch("second")
        write(world.Session, "kept")

    unit(world.Session, work)
    assert diary.entries == ["first rolled back", "second committed"]


@in_each_unit
def test_flushes_are_no_ends_of_transactions(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        write(world.Session, "a")
        diary.watch("first")
        write(world.Session, "b")
        diary.watch("second")
        write(world.Session, "c")
        raise Failure

    with pytest.raises(Failure):
        unit(world.Session, work)
    assert diary.entries == ["first rolled back", "second rolled back"]


# -- SAVEPOINTs -------------------------------------------------------------------------------------------------------


@in_each_registry
@in_each_unit
def test_a_savepoint_that_is_rolled_back_drops_what_was_registered_in_it(
    world: World, diary: Diary, unit: Unit
) -> None:
    def work() -> None:
        diary.watch("before")
        with suppress(Failure), world.Session.begin_nested():
            diary.watch("inside")
            write(world.Session, "lost")
            raise Failure
        diary.watch("after")
        world.Session.add(note("kept"))

    unit(world.Session, work)
    assert sorted(diary.entries) == ["after committed", "before committed", "inside rolled back"]
    assert diary.entries.index("before committed") < diary.entries.index("after committed")
    assert world.durable() == ["kept"]


@in_each_unit
def test_a_savepoint_that_is_released_keeps_what_was_registered_in_it(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        diary.watch("before")
        with world.Session.begin_nested():
            diary.watch("inside")
            write(world.Session, "kept")
        diary.watch("after")
        assert diary.entries == []

    unit(world.Session, work)
    assert diary.entries == ["before committed", "inside committed", "after committed"]


@in_each_unit
def test_a_savepoint_that_is_released_is_lost_with_the_transaction(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        with world.Session.begin_nested():
            diary.watch("inside")
            write(world.Session, "lost")
        raise Failure

    with pytest.raises(Failure):
        unit(world.Session, work)
    assert diary.entries == ["inside rolled back"]


@in_each_registry
@in_each_unit
def test_nested_savepoints_hand_on_what_was_registered_in_them_level_by_level(
    world: World, diary: Diary, unit: Unit
) -> None:
    def work() -> None:
        session = world.Session()
        with session.begin_nested():
            diary.watch("1")
            with suppress(Failure), session.begin_nested():
                diary.watch("1.1")
                with session.begin_nested():
                    diary.watch("1.1.1")
                    write(session, "lost")
                raise Failure
            with session.begin_nested():
                diary.watch("1.2")
                write(session, "kept")

    unit(world.Session, work)
    assert sorted(diary.entries) == ["1 committed", "1.1 rolled back", "1.1.1 rolled back", "1.2 committed"]
    assert world.durable() == ["kept"]


def test_a_savepoint_within_a_flush_hands_on_what_was_registered_in_it(world: World, diary: Diary) -> None:
    """A flush has a subtransaction of SQLAlchemy's own, which is no transaction of the database."""

    def audit(session: Any, context: Any) -> None:
        with session.begin_nested():
            diary.watch("audit")

    with session_scope(world.Session) as session:
        diary.watch("whole")
        event.listen(session, "after_flush", audit)
        with suppress(Failure), session.begin_nested():
            write(session, "lost")
            raise Failure
        diary.watch("after")
    assert diary.entries == ["whole committed", "audit rolled back", "after committed"]


def test_a_listener_that_fails_after_the_commit_drops_nothing(world: World, diary: Diary) -> None:
    def fail(session: Any) -> None:
        raise Failure

    event.listen(world.Session, "after_commit", fail)
    with pytest.raises(Failure), session_scope(world.Session) as session:
        write(session, "kept")
        diary.watch()
    assert diary.entries == ["committed"]
    assert world.durable() == ["kept"]


@in_each_registry
@in_each_unit
def test_a_nested_part_that_fails_drops_what_was_registered_in_it(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        diary.watch("before")
        with suppress(Failure), session_scope(world.Session, propagation="nested") as session:
            diary.watch("part")
            with session_scope(world.Session, propagation="nested"):
                diary.watch("part of part")
                write(session, "lost")
            raise Failure

    unit(world.Session, work)
    assert sorted(diary.entries) == ["before committed", "part of part rolled back", "part rolled back"]


@in_each_registry
@in_each_unit
def test_a_nested_part_that_ends_well_waits_for_the_whole(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        with session_scope(world.Session, propagation="nested") as session:
            diary.watch("part")
            with session_scope(world.Session, propagation="nested"):
                diary.watch("part of part")
                write(session, "kept")
        diary.watch("whole")
        assert diary.entries == []

    unit(world.Session, work)
    assert diary.entries == ["part committed", "part of part committed", "whole committed"]


def test_a_nested_part_that_is_doomed_drops_what_was_registered_in_it(world: World, diary: Diary) -> None:
    with session_scope(world.Session):
        diary.watch("whole")
        with session_scope(world.Session, propagation="nested") as session:
            diary.watch("part")
            write(session, "lost")
            current_scope().doom("a dry run")
    assert diary.entries == ["whole committed", "part rolled back"]


def test_a_savepoint_left_open_goes_with_the_whole(world: World, diary: Diary) -> None:
    with session_scope(world.Session) as session:
        session.begin_nested()
        diary.watch("1")
        session.begin_nested()
        diary.watch("1.1")
        write(session, "kept")
    assert diary.entries == ["1 committed", "1.1 committed"]
    with suppress(Failure), session_scope(world.Session) as session:
        session.begin_nested()
        diary.watch("2")
        raise Failure
    assert diary.entries[2:] == ["2 rolled back"]


def test_a_savepoint_lost_to_an_error_of_postgresql_drops_what_was_registered_in_it(
    postgresql_url: URL, diary: Diary
) -> None:
    with closing(World(postgresql_url)) as world:
        with session_scope(world.Session) as session:
            diary.watch("whole")
            with suppress(DBAPIError), session_scope(world.Session, propagation="nested"):
                diary.watch("part")
                session.execute(sa.text("SELECT 1 / 0"))
            session.add(note("kept"))
        assert diary.entries == ["whole committed", "part rolled back"]
        assert world.durable() == ["kept"]


# -- joined and independent parts -------------------------------------------------------------------------------------


@in_each_unit
def test_a_joined_part_waits_for_the_whole(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        with session_scope(world.Session) as session:
            diary.watch("joined")
            write(session, "kept")
        assert diary.entries == []

    unit(world.Session, work)
    assert diary.entries == ["joined committed"]


@in_each_registry
@in_each_unit
def test_an_independent_part_does_not_wait(world: World, diary: Diary, unit: Unit) -> None:
    def work() -> None:
        diary.watch("whole")
        with session_scope(world.Session, propagation="requires_new") as session:
            diary.watch("independent")
            session.add(note("kept"))
        assert diary.entries == ["independent committed"]
        raise Failure

    with pytest.raises(Failure):
        unit(world.Session, work)
    assert diary.entries == ["independent committed", "whole rolled back"]


@in_each_registry
@in_each_unit
@pytest.mark.parametrize("failure", [None, Failure])
def test_the_end_of_an_independent_part_says_nothing_of_the_whole(
    world: World, diary: Diary, unit: Unit, failure: type[Failure] | None
) -> None:
    def work() -> None:
        world.Session()
        diary.watch("whole")
        with suppress(Failure), session_scope(world.Session, propagation="requires_new") as session:
            write(session, "independent")
            if failure is not None:
                raise failure
        assert diary.entries == []
        if failure is None:
            raise Failure

    with suppress(Failure):
        unit(world.Session, work)
    assert diary.entries == ["whole rolled back" if failure is None else "whole committed"]


@in_each_unit
def test_a_unit_of_another_session_does_not_wait(world: World, diary: Diary, unit: Unit, tmp_path: Any) -> None:
    with closing(World(URL.create("sqlite", database=str(tmp_path / "other.sqlite")))) as other:

        def work() -> None:
            write(world.Session, "lost")
            diary.watch("this")
            with session_scope(other.Session) as session:
                write(session, "kept")
                diary.watch("other")
                # The innermost one is meant, unless one says otherwise.
                current_scope(world.Session).on_rollback(diary("this, from inside of the other"))
            assert diary.entries == ["other committed"]
            raise Failure

        with pytest.raises(Failure):
            unit(world.Session, work)
        assert diary.entries == ["other committed", "this rolled back", "this, from inside of the other"]
        assert other.durable() == ["kept"]


# -- all that makes sessions ------------------------------------------------------------------------------------------


class OwnSession(OrmSession):
    """A class of sessions of the application's own."""


def scoped(factory: Any) -> Any:
    return scoped_session(factory)


SESSIONS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda bind: scoped(lambda: OrmSession(bind)),
    "lambda, contextual": lambda bind: contextual_session(lambda: OrmSession(bind)),
    "partial": lambda bind: scoped(functools.partial(OrmSession, bind)),
    "partial of a sessionmaker": lambda bind: scoped(functools.partial(sessionmaker(bind), info={})),
    "own class": lambda bind: scoped(functools.partial(OwnSession, bind)),
    "own class, sessionmaker": lambda bind: contextual_session(sessionmaker(bind, class_=OwnSession)),
    "sessionmaker": sessionmaker,
}


@pytest.mark.parametrize("kind", SESSIONS)
def test_callbacks_work_with_everything_that_makes_sessions(sqlite_url: URL, diary: Diary, kind: str) -> None:
    with closing(World(sqlite_url)) as world:
        Session = SESSIONS[kind](world.engine)
        with session_scope(Session) as session:
            diary.watch("first")
            write(session, "kept")
            diary.watch("second")
            session.commit()
            write(session, "lost")
            diary.watch("third")
            session.rollback()
            with suppress(Failure), session.begin_nested():
                diary.watch("fourth")
                raise Failure
        assert diary.entries == ["first committed", "second committed", "third rolled back", "fourth rolled back"]
        assert world.durable() == ["kept"]


MODES: list[dict[str, Any]] = [{}] if SQLALCHEMY_14 else [{}, {"join_transaction_mode": "create_savepoint"}]


@in_each_unit
@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("registry", ["thread-local", "contextual"])
def test_a_session_in_a_transaction_from_outside_has_its_own_outcome(
    sqlite_url: URL, diary: Diary, unit: Unit, options: dict[str, Any], registry: str
) -> None:
    """As tests do that roll back whatever the tested code has committed."""
    with closing(World(sqlite_url)) as world:
        with world.engine.connect() as connection, connection.begin() as transaction:
            factory = sessionmaker(connection, **options)
            Session = scoped_session(factory) if registry == "thread-local" else contextual_session(factory)

            def work() -> None:
                diary.watch("first")
                write(Session, "first")
                diary.watch("second")

            unit(Session, work)
            assert connection.execute(sa.select(Note.text)).scalars().all() == ["first"]
            assert diary.entries == ["first committed", "second committed"]

            def failing_work() -> None:
                write(Session, "second")
                diary.watch("third")
                raise Failure

            with pytest.raises(Failure):
                unit(Session, failing_work)
            assert diary.entries[2:] == ["third rolled back"]
            if transaction.is_active:  # else it has ended with the session's
                transaction.rollback()
        assert world.durable() == []
        assert world.checked_out == 0
