"""Lost races of jobs: ``with_session(retry=)`` replays by the rules of the middleware (see ``test_retry.py``)."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm.exc import StaleDataError

from sa_wsgi_session import (
    NoActiveScope,
    RetryPolicy,
    RollbackOnlyError,
    SessionMiddleware,
    current_scope,
    session_scope,
    with_session,
)
from tests.support import (
    REGISTRIES,
    World,
    Worlds,
    in_each_registry,
    is_in_a_scope,
    request,
    respond,
)
from tests.test_retry import (
    COMMITS,
    POLICY,
    RECOVERIES,
    Wire,
    commit,
    deadlock,
    find_it_stale,
    is_unknown,
    kill,
    lose,
    lose_at_commit,
    lose_the_connection,
    lose_within_a_savepoint,
    set_up,
    swallow,
    swallow_and_go_on,
    swallow_stale_data,
    violate,
    warnings_of,
    world_of,
    wrap_and_hide,
    write,
)


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture) -> None:
    """Of whatever level, what is logged is kept."""
    caplog.set_level(logging.DEBUG, "sa_wsgi_session")


sqlite_world = world_of("sqlite")
postgresql_world = world_of("postgresql", "contextual")
mariadb_world = world_of("mariadb", "contextual")


class Job:
    """A job under a policy, and which attempts there were at it."""

    def __init__(self, world: World, work: Callable[[World], object], **options: Any) -> None:
        self.attempts: list[int] = []

        @with_session(world.Session, **{"retry": POLICY, **options})
        def job(*, session: Any) -> object:
            assert session is world.Session()
            self.attempts.append(current_scope().attempt)
            return work(world)

        self.run = job


def first(lose: Callable[[World], object]) -> Callable[[World], str]:
    """A job whose first attempt loses a race, and whose others do not."""

    def work(world: World) -> str:
        attempt = current_scope().attempt
        if attempt == 1:
            lose(world)
        else:
            write(world, f"attempt {attempt}")
        return "done"

    return work


# -- what is replayed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lose_somehow",
    [
        lose,
        find_it_stale,
        deadlock,
        lose_the_connection,
        lose_at_commit,
        swallow,
        swallow_and_go_on,
        swallow_stale_data,
        wrap_and_hide,
        lose_within_a_savepoint,
    ],
)
def test_a_job_that_has_lost_a_race_is_done_once_more(
    postgresql_world: World, lose_somehow: Callable[[World], None]
) -> None:
    job = Job(postgresql_world, first(lose_somehow))
    assert job.run() == "done"
    assert job.attempts == [1, 2]
    assert set(postgresql_world.durable()) - {"rival"} == {"attempt 2"}


@in_each_registry
def test_a_job_is_replayed_with_every_registry(world: World) -> None:
    set_up(world.engine)
    job = Job(world, first(find_it_stale))
    assert job.run() == "done"
    assert job.attempts == [1, 2]
    assert world.durable() == ["attempt 2"]
    assert not is_in_a_scope()


def test_what_a_swallowed_deadlock_has_undone_is_done_anew_and_never_half(mariadb_world: World) -> None:
    def work(world: World) -> None:
        attempt = current_scope().attempt
        write(world, f"first half of {attempt}")
        if attempt == 1:
            with suppress(DBAPIError):
                deadlock(world)
        write(world, f"second half of {attempt}")

    job = Job(mariadb_world, work)
    job.run()
    assert job.attempts == [1, 2]
    assert mariadb_world.durable() == ["first half of 2", "second half of 2"]
    with pytest.raises(RollbackOnlyError, match="1213"):
        Job(mariadb_world, work, retry=None).run()


def test_each_attempt_is_given_the_same_arguments_and_a_session_of_its_own(sqlite_world: World) -> None:
    calls: list[Any] = []
    sessions: list[Any] = []

    @with_session(sqlite_world.Session, argument="db", retry=POLICY)
    def transfer(amount: Any, *more: Any, db: Any, **options: Any) -> int:
        calls.append((amount, more, options))
        sessions.append(db)
        options["changed"] = "by this attempt"
        if len(calls) < 3:
            find_it_stale(sqlite_world)
        return len(calls)

    amount = [1]
    assert transfer(amount, 2, 3, colour="red") == 3
    assert all(call[0] is amount for call in calls)
    assert [call[1] for call in calls] == [(2, 3)] * 3
    assert [call[2] for call in calls] == [{"colour": "red", "changed": "by this attempt"}] * 3
    assert len({id(session) for session in sessions}) == 3


def test_a_job_may_be_run_as_often_as_one_likes(sqlite_world: World) -> None:
    job = Job(sqlite_world, first(find_it_stale))
    job.run()
    with pytest.raises(IntegrityError):  # the second attempt at the second run
        job.run()
    assert job.attempts == [1, 2, 1, 2]


def test_what_waits_for_the_outcome_waits_for_that_of_the_last_attempt(postgresql_world: World) -> None:
    told: list[str] = []

    def work(world: World) -> None:
        attempt = current_scope().attempt
        current_scope().on_commit(lambda: told.append(f"committed {attempt}"))
        current_scope().on_rollback(lambda: told.append(f"rolled back {attempt}"))
        if attempt < wins:
            lose(world)

    wins = 3
    Job(postgresql_world, work).run()
    assert told == ["committed 3"]
    told.clear()
    wins = 4
    with pytest.raises(DBAPIError):
        Job(postgresql_world, work).run()
    assert told == ["rolled back 3"]


def test_the_last_attempt_raises_its_own_error_as_it_is(postgresql_world: World) -> None:
    errors: list[BaseException] = []

    def work(world: World) -> None:
        try:
            lose(world)
        except DBAPIError as error:
            errors.append(error)
            raise

    job = Job(postgresql_world, work)
    with pytest.raises(DBAPIError) as raised:
        job.run()
    assert raised.value is errors[2]
    assert job.attempts == [1, 2, 3]


def test_each_replay_is_one_warning_with_the_name_of_the_function(
    postgresql_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    @with_session(postgresql_world.Session, retry=POLICY)
    def transfer(password: str, *, session: Any) -> None:
        postgresql_world.Session.execute(sa.text("SELECT fail('40P01') WHERE 'secret' = :value"), {"value": password})

    with pytest.raises(DBAPIError):
        transfer("secret")
    warnings = warnings_of(caplog)
    assert len(warnings) == 2
    for number, warning in enumerate(warnings, 1):
        assert re.search(rf"transfer\b.* {number} of 3 .*\(SQLSTATE 40P01\)", warning)
    assert "secret" not in caplog.text


def test_nothing_is_held_during_a_pause(sqlite_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "sa_wsgi_session._retry.time.sleep",
        lambda seconds: seen.append((sqlite_world.checked_out, is_in_a_scope(), 0 <= seconds <= 0.05)),
    )
    Job(sqlite_world, first(find_it_stale), retry=RetryPolicy()).run()
    assert seen == [(0, False, True)]


@pytest.mark.parametrize("registry", REGISTRIES[:2])
def test_each_thread_has_attempts_of_its_own(request: pytest.FixtureRequest, worlds: Worlds, registry: str) -> None:
    with worlds.use(request.getfixturevalue, "postgresql", registry) as world:
        set_up(world.engine)
        together = threading.Barrier(2)
        attempts: list[int] = []

        @with_session(world.Session, retry=RetryPolicy(attempts=10, delay=0))
        def increment(*, session: Any) -> None:
            attempts.append(current_scope().attempt)
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            value = session.execute(sa.text("SELECT value FROM counter WHERE id = 1")).scalar()
            if current_scope().attempt == 1:
                together.wait()
            session.execute(sa.text("UPDATE counter SET value = :value WHERE id = 1"), {"value": value + 1})

        threads = [threading.Thread(target=increment) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with world.engine.connect() as connection:
            assert connection.execute(sa.text("SELECT value FROM counter WHERE id = 1")).scalar() == 2
        assert sorted(attempts) == [1, 1, 2]


# -- what is never replayed -------------------------------------------------------------------------------------------


def test_a_connection_that_is_lost_between_flush_and_commit_is_no_reason_to_begin_anew(
    postgresql_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def work(world: World) -> None:
        write(world, "lost")
        kill(world)

    job = Job(postgresql_world, work)
    with pytest.raises(OperationalError):
        job.run()
    assert job.attempts == [1]
    assert is_unknown(caplog)
    assert postgresql_world.durable() == []


@pytest.mark.parametrize("own", [False, True], ids=["with_session", "function"])
def test_a_connection_that_is_lost_at_commit_is_no_reason_to_begin_anew(
    postgresql_world: World, caplog: pytest.LogCaptureFixture, own: bool
) -> None:
    def work(world: World) -> None:
        write(world, "fatal")
        if own:
            world.Session.commit()

    job = Job(postgresql_world, work)
    with pytest.raises(OperationalError):
        job.run()
    assert job.attempts == [1]
    assert is_unknown(caplog)


def test_a_commit_whose_answer_is_lost_is_not_done_twice(postgresql_url: Any, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Wire(postgresql_url)) as wire, closing(World(wire.url)) as world:

        def work(world: World) -> None:
            write(world, f"attempt {current_scope().attempt}")
            wire.breaks = current_scope().attempt == 1

        with pytest.raises(OperationalError):
            Job(world, work).run()
        assert is_unknown(caplog)
        assert world.durable() == ["attempt 1"]


@pytest.mark.parametrize("commit", COMMITS)
def test_an_attempt_that_has_committed_something_is_not_replayed(
    postgresql_world: World, caplog: pytest.LogCaptureFixture, commit: Callable[[World], None]
) -> None:
    def work(world: World) -> None:
        commit(world)
        world.Session.rollback()
        lose(world)

    job = Job(postgresql_world, work)
    with pytest.raises(DBAPIError):
        job.run()
    assert job.attempts == [1]
    assert warnings_of(caplog) == []
    assert postgresql_world.durable()[0] == "durable"


def fail(world: World) -> None:
    raise ValueError


def lose_and_fail(world: World) -> None:
    with suppress(DBAPIError):
        lose(world)
    world.Session.rollback()
    raise ValueError


@pytest.mark.parametrize(("fail", "kind"), [(violate, IntegrityError), (fail, ValueError), (lose_and_fail, ValueError)])
def test_any_other_error_is_not_replayed(
    postgresql_world: World, fail: Callable[[World], None], kind: type[Exception]
) -> None:
    job = Job(postgresql_world, fail)
    with pytest.raises(kind):
        job.run()
    assert job.attempts == [1]


@pytest.mark.parametrize("recover", RECOVERIES)
def test_a_lost_race_that_the_function_has_dealt_with_is_none(
    postgresql_world: World, recover: Callable[[World], None]
) -> None:
    job = Job(postgresql_world, recover)
    job.run()
    assert job.attempts == [1]
    assert postgresql_world.durable() == ["instead"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_is_not_replayed_whatever_is_pending(
    postgresql_world: World, kind: type[BaseException]
) -> None:
    def work(world: World) -> None:
        swallow(world)
        raise kind

    job = Job(postgresql_world, work)
    with pytest.raises(kind):
        job.run()
    assert job.attempts == [1]


@pytest.mark.parametrize("propagation", ["required", "nested", "requires_new"])
def test_a_job_within_an_error_handler_does_not_come_of_that_error(postgresql_world: World, propagation: str) -> None:
    """What it raises has the error that is handled around it for a context."""
    job = Job(postgresql_world, fail, propagation=propagation)
    with postgresql_world.engine.connect() as connection:
        try:
            connection.execute(sa.text("SELECT fail('40001')"))
        except OperationalError:
            with pytest.raises(ValueError, match=r"^$") as raised:
                job.run()
    assert isinstance(raised.value.__context__, OperationalError)
    assert job.attempts == [1]


def test_a_job_within_an_error_handler_is_replayed_for_its_own_races(postgresql_world: World) -> None:
    job = Job(postgresql_world, first(lose))
    with postgresql_world.engine.connect() as connection:
        try:
            connection.execute(sa.text("SELECT fail('40001')"))
        except OperationalError:
            assert job.run() == "done"
    assert job.attempts == [1, 2]


def test_without_a_policy_there_is_one_attempt(sqlite_world: World) -> None:
    job = Job(sqlite_world, find_it_stale, retry=None)
    with pytest.raises(StaleDataError):
        job.run()
    assert job.attempts == [1]


def test_a_policy_of_one_attempt_is_none(sqlite_world: World, caplog: pytest.LogCaptureFixture) -> None:
    job = Job(sqlite_world, find_it_stale, retry=RetryPolicy(attempts=1))
    with pytest.raises(StaleDataError):
        job.run()
    assert job.attempts == [1]
    assert warnings_of(caplog) == []


# -- within another unit of work --------------------------------------------------------------------------------------


@pytest.mark.parametrize("propagation", ["required", "nested"])
def test_a_job_that_is_a_part_of_a_request_is_not_replayed_by_itself(postgresql_world: World, propagation: str) -> None:
    job = Job(postgresql_world, lose, propagation=propagation)

    def view() -> list[bytes]:
        job.run()
        return [b"done"]

    with pytest.raises(DBAPIError):
        request(SessionMiddleware(respond(view), postgresql_world.Session))
    assert job.attempts == [1]


@pytest.mark.parametrize("propagation", ["required", "nested"])
def test_the_whole_request_is_replayed_for_a_job_that_is_a_part_of_it(
    postgresql_world: World, propagation: str
) -> None:
    job = Job(postgresql_world, first(lose), propagation=propagation)
    attempts: list[int] = []

    def view() -> list[bytes]:
        attempts.append(current_scope().attempt)
        job.run()
        return [b"done"]

    assert request(SessionMiddleware(respond(view), postgresql_world.Session, retry=POLICY)).content == b"done"
    assert attempts == job.attempts == [1, 2]
    assert postgresql_world.durable() == ["attempt 2"]


@pytest.mark.parametrize("retry", [None, POLICY], ids=["plain", "under a policy"])
def test_a_job_that_is_independent_of_its_request_is_replayed_by_itself(
    postgresql_world: World, retry: RetryPolicy | None
) -> None:
    job = Job(postgresql_world, first(lose), propagation="requires_new")
    attempts: list[int] = []

    def view() -> list[bytes]:
        attempts.append(current_scope().attempt)
        write(postgresql_world, "request")
        job.run()
        assert current_scope().attempt == 1
        return [b"done"]

    app = SessionMiddleware(respond(view), postgresql_world.Session, retry=retry)
    assert request(app).content == b"done"
    assert (attempts, job.attempts) == ([1], [1, 2])
    assert postgresql_world.durable() == ["attempt 2", "request"]


def test_a_request_whose_job_has_lost_for_good_begins_anew_as_often_as_it_may(postgresql_world: World) -> None:
    job = Job(postgresql_world, lose, propagation="requires_new")

    def view() -> None:
        job.run()

    with pytest.raises(DBAPIError):
        request(SessionMiddleware(respond(view), postgresql_world.Session, retry=RetryPolicy(attempts=2, delay=0)))
    assert job.attempts == [1, 2, 3, 1, 2, 3]


def test_a_request_that_its_job_has_committed_for_is_not_replayed(postgresql_world: World) -> None:
    job = Job(postgresql_world, lambda world: write(world, "durable"), propagation="requires_new")

    def view() -> None:
        job.run()
        lose(postgresql_world)

    with pytest.raises(DBAPIError):
        request(SessionMiddleware(respond(view), postgresql_world.Session, retry=POLICY))
    assert job.attempts == [1]
    assert postgresql_world.durable() == ["durable"]


def test_what_was_committed_around_a_job_is_none_of_its_business(postgresql_world: World) -> None:
    job = Job(postgresql_world, first(lose), propagation="requires_new")
    with session_scope(postgresql_world.Session):
        commit(postgresql_world)
        assert job.run() == "done"
    assert job.attempts == [1, 2]


def test_a_job_that_calls_a_job_is_replayed_as_a_whole(postgresql_world: World) -> None:
    inner = Job(postgresql_world, lose)
    outer = Job(postgresql_world, lambda world: inner.run(), retry=RetryPolicy(attempts=2, delay=0))
    with pytest.raises(DBAPIError):
        outer.run()
    assert outer.attempts == inner.attempts == [1, 2]


def test_a_scope_of_a_failed_attempt_is_over(sqlite_world: World) -> None:
    scopes: list[Any] = []

    def work(world: World) -> None:
        scopes.append(current_scope())
        if len(scopes) == 1:
            find_it_stale(world)

    Job(sqlite_world, work).run()
    assert scopes[0] is not scopes[1]
    for scope in scopes:
        with pytest.raises(NoActiveScope):
            scope.doom("too late")
    assert sqlite_world.durable() == []
