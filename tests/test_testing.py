"""``isolated()``: the application commits as ever, and leaves no trace."""

from __future__ import annotations

import gc
import inspect
import logging
import random
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from traceback import walk_stack
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from pymysql.constants import SERVER_STATUS
from sqlalchemy import event
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    OperationalError,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from sa_wsgi_session import (
    NoActiveScope,
    RetryPolicy,
    SessionMiddleware,
    _shared_connection,
    contextual_session,
    current_scope,
    session_scope,
    with_session,
)
from sa_wsgi_session._shared_pool import SharedPool
from sa_wsgi_session.testing import IsolationError, isolated
from tests.support import Base, Exchange, Note, World, Worlds, note, request, respond, serve

DATABASES = ("sqlite", "postgresql", "mariadb")


@contextmanager
def told(message: str, *sources: Any, **options: Any) -> Iterator[Any]:
    """A block of ``isolated()`` that tells something at its end, and what else fails in it fails the test.

    (It tells that instead of what fails in the block, which may have come of it.)
    """
    failure: Exception | None = None
    with pytest.raises(IsolationError, match=message) as raised, isolated(*sources, **options):
        try:
            yield raised
        except Exception as error:
            failure = error
            raise
    if failure is not None and failure is not raised.value:
        raise failure


@pytest.fixture(params=DATABASES)
def anywhere(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    """A world on each of the databases, with a thread-local session."""
    with worlds.use(request.getfixturevalue, request.param, "thread-local") as world:
        yield world


@pytest.fixture(params=["postgresql", "postgresql+psycopg2"])
def on_postgresql(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    with worlds.use(request.getfixturevalue, request.param, "thread-local") as world:
        yield world


@pytest.fixture
def on_mariadb(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    with worlds.use(request.getfixturevalue, "mariadb", "thread-local") as world:
        yield world


def texts(source: Any) -> list[str]:
    """The notes that a session or an engine sees."""
    statement: Any = sa.select(Note.text).order_by(Note.text)
    if isinstance(source, sa.engine.Engine):
        with source.connect() as connection:
            return list(connection.execute(statement).scalars())
    return list(source.execute(statement).scalars())


@contextmanager
def another(world: World) -> Iterator[Session]:
    """An independent session."""
    with closing(world.Session.session_factory()) as session:
        yield session


def add(session: Any, *names: str) -> None:
    session.add_all([note(name) for name in names])
    session.flush()


def raw_cursor(connection: Any) -> Any:
    """One that statements can be sent with past SQLAlchemy."""
    return connection.connection.cursor()


@contextmanager
def before_statements(engine: Any, words: str, do: Callable[[], object]) -> Iterator[None]:
    """Call ``do()`` between the making of the cursor and the sending of each statement that has these words."""

    def listener(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
        if words in statement:
            do()

    event.listen(engine, "before_cursor_execute", listener)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", listener)


@pytest.fixture
def sent(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What ``isolated()`` has sent about SAVEPOINTs of its own since it was last asked."""
    caplog.set_level(logging.DEBUG, "sa_wsgi_session")

    def look() -> list[str]:
        found = [message.partition("isolated(): ")[2] for message in caplog.messages]
        caplog.clear()
        return [statement for statement in found if "SAVEPOINT" in statement]

    return look


def refuse(session: Any, statement: str = "SELECT 1/0 FROM note WHERE nothing = 1") -> None:
    """A statement that the database refuses."""
    with pytest.raises(DBAPIError):
        session.execute(sa.text(statement))


# -- no trace ---------------------------------------------------------------------------------------------------------


def test_what_requests_commit_is_seen_within_and_gone_after(anywhere):
    def view():
        anywhere.Session.add(note("a request's"))
        return [b""]

    app = serve(anywhere, view)
    with isolated(anywhere.Session) as given:
        assert given is anywhere.Session
        assert request(app).status == "200 OK"
        assert texts(anywhere.Session) == texts(anywhere.engine) == ["a request's"]
        assert anywhere.durable() == []
        with pytest.raises(IntegrityError):
            request(app)
        assert texts(anywhere.Session) == ["a request's"]
    assert texts(anywhere.engine) == anywhere.durable() == []


def test_what_jobs_commit_is_gone_after(anywhere):
    @with_session(anywhere.Session)
    def job(name, *, session):
        add(session, name)

    with isolated(anywhere.Session):
        job("a job's")
        with session_scope(anywhere.Session) as session:
            add(session, "a block's")
        assert texts(anywhere.Session) == ["a block's", "a job's"]
        assert anywhere.durable() == []
    assert texts(anywhere.engine) == anywhere.durable() == []


@pytest.mark.parametrize("kind", ["contextual", "sessionmaker", "custom", "engine"])
def test_any_session_and_any_engine(sqlite_url, kind):
    with closing(World(sqlite_url)) as world:
        factory = sessionmaker(world.engine)
        session: Any = {
            "contextual": contextual_session(factory),
            "sessionmaker": factory,
            "custom": scoped_session(factory, scopefunc=lambda: 1),
            "engine": world.engine,
        }[kind]
        with isolated(session) as given:
            assert given is session
            with session_scope(factory) as unit:
                add(unit, "a job's")
            assert texts(world.engine) == ["a job's"]
        assert world.durable() == []


def test_what_was_there_before_is_seen_and_stays(anywhere):
    anywhere.insert("before")
    with isolated(anywhere.Session):
        anywhere.Session.execute(sa.delete(Note))
        anywhere.Session.commit()
        assert texts(anywhere.engine) == []
    assert texts(anywhere.engine) == ["before"]


def test_an_error_in_the_block_goes_on_and_all_is_rolled_back(anywhere):
    error = ValueError("the test's")
    with pytest.raises(ValueError, match="the test's") as raised, isolated(anywhere.Session):
        add(anywhere.Session, "mine")
        anywhere.Session.commit()
        raise error
    assert raised.value is error
    assert anywhere.durable() == []


def test_a_rollback_undoes_its_own_transaction_only(anywhere):
    with isolated(anywhere.Session):
        add(anywhere.Session, "kept")
        anywhere.Session.commit()
        add(anywhere.Session, "undone")
        anywhere.Session.rollback()
        assert texts(anywhere.Session) == ["kept"]
        request(serve(anywhere, lambda: anywhere.Session.add(note("refused")) or [b""], "400 No"))
        with pytest.raises(ZeroDivisionError), session_scope(anywhere.Session) as session:
            add(session, "failed")
            raise ZeroDivisionError
        assert texts(anywhere.Session) == ["kept"]


def test_work_without_a_session_is_isolated_too(anywhere):
    with isolated(anywhere.Session):
        with anywhere.engine.begin() as connection:
            connection.execute(sa.insert(Note), [{"text": "many"}, {"text": "of them"}])
        with anywhere.engine.connect() as connection:
            transaction = connection.begin()
            connection.execute(sa.insert(Note), {"text": "undone"})
            transaction.rollback()
        raw = anywhere.engine.raw_connection()
        cursor = raw.cursor()
        cursor.execute("INSERT INTO note (text) VALUES ('raw')")
        raw.commit()
        cursor.execute("INSERT INTO note (text) VALUES ('raw and undone')")
        cursor.close()
        raw.cursor().execute("INSERT INTO note (text) VALUES ('raw and undone, too')")
        raw.rollback()
        raw.close()
        # That engine of SQLite has its driver commit each statement for which SQLAlchemy has not begun a transaction.
        by_itself = ["raw and undone", "raw and undone, too"] if anywhere.engine.dialect.name == "sqlite" else []
        assert texts(anywhere.Session) == ["many", "of them", "raw", *by_itself]
        assert anywhere.durable() == []
    assert texts(anywhere.engine) == []


def test_callbacks_run(anywhere):
    called: list[str] = []

    def view():
        current_scope().on_commit(lambda: called.append("committed"))
        current_scope().on_rollback(lambda: called.append("rolled back"))
        add(anywhere.Session, "new")
        return [b""]

    with isolated(anywhere.Session):
        request(serve(anywhere, view))
        with pytest.raises(IntegrityError):
            request(serve(anywhere, view))
        with suppress(IntegrityError):
            request(serve(anywhere, view, "500 No"))
    assert called == ["committed", "rolled back", "rolled back"]


def test_savepoints_of_the_application(anywhere):
    with isolated(anywhere.Session):
        with session_scope(anywhere.Session) as session:
            add(session, "kept")
            with suppress(ZeroDivisionError), session_scope(anywhere.Session, propagation="nested"):
                add(session, "undone")
                raise ZeroDivisionError
            with session_scope(anywhere.Session, propagation="nested"):
                add(session, "nested")
                with session_scope(anywhere.Session, propagation="nested"):
                    add(session, "in that")
            outer = session.begin_nested()
            add(session, "undone with the outer one")
            session.begin_nested().commit()
            outer.rollback()
        assert texts(anywhere.Session) == ["in that", "kept", "nested"]
    assert anywhere.durable() == []


def test_statements_that_begin_and_end_transactions_are_taken_for_that(anywhere):
    with isolated(anywhere.Session), another(anywhere) as connection:

        def send(*statements: str) -> None:
            for statement in statements:
                connection.execute(sa.text(statement))

        insert = "INSERT INTO note (text) VALUES ('{}')".format
        send("BEGIN", insert("committed"), "COMMIT;")
        send("BEGIN -- once more", insert("rolled back"), "/* no */ ROLLBACK")
        send("BEGIN", insert("kept"), "SAVEPOINT s", insert("undone"), "ROLLBACK TO SAVEPOINT s", insert("again"))
        send("ROLLBACK TO s", insert("released"), "RELEASE SAVEPOINT s", "COMMIT")
        with another(anywhere) as session:
            assert texts(session) == ["committed", "kept", "released"]
        refuse(connection, "RELEASE SAVEPOINT s")
    assert anywhere.durable() == []


# -- several transactions at once -------------------------------------------------------------------------------------


def test_a_second_session_sees_the_first_one_s_work(anywhere):
    with isolated(anywhere.Session):
        add(anywhere.Session, "first")
        anywhere.Session.commit()
        with another(anywhere) as second:
            assert texts(second) == ["first"]
            add(second, "second")
            second.commit()
        assert texts(anywhere.Session) == ["first", "second"]


def test_requires_new_is_kept_when_what_is_around_it_has_only_read(anywhere):
    with isolated(anywhere.Session):
        with pytest.raises(ZeroDivisionError), session_scope(anywhere.Session) as outer:
            texts(outer)
            with session_scope(anywhere.Session, propagation="requires_new") as inner:
                add(inner, "an audit")
            add(outer, "undone")
            raise ZeroDivisionError
        assert texts(anywhere.Session) == ["an audit"]


def test_requires_new_within_changes_is_committed_with_them(anywhere):
    with isolated(anywhere.Session):
        with session_scope(anywhere.Session) as outer:
            add(outer, "outer")
            with session_scope(anywhere.Session, propagation="requires_new") as inner:
                add(inner, "inner")
            with (
                pytest.raises(ZeroDivisionError),
                session_scope(anywhere.Session, propagation="requires_new") as inner,
            ):
                add(inner, "undone")
                raise ZeroDivisionError
            add(outer, "outer once more")
        assert texts(anywhere.Session) == ["inner", "outer", "outer once more"]


def test_a_rollback_around_what_another_one_has_committed_is_told(anywhere):
    with told(r"that work is undone, too, .*keep it.*\(at test_testing.py:\d+, in", anywhere.Session):
        with pytest.raises(ZeroDivisionError), session_scope(anywhere.Session) as outer:
            add(outer, "undone")
            with session_scope(anywhere.Session, propagation="requires_new") as inner:
                add(inner, "an audit")
            raise ZeroDivisionError
        assert texts(anywhere.Session) == []
    assert anywhere.durable() == []


def test_what_is_told_says_so_even_if_the_test_has_failed_of_it(anywhere):
    with pytest.raises(IsolationError, match="keep it") as raised, isolated(anywhere.Session):
        with another(anywhere) as outer, another(anywhere) as inner:
            add(outer, "undone")
            add(inner, "an audit")
            inner.commit()
        assert texts(anywhere.Session) == ["an audit"]
    assert isinstance(raised.value.__cause__, AssertionError)


def test_an_interruption_is_not_replaced_by_what_is_told(anywhere):
    with pytest.raises(KeyboardInterrupt), isolated(anywhere.Session):
        with another(anywhere) as outer, another(anywhere) as inner:
            add(outer, "undone")
            add(inner, "an audit")
            inner.commit()
        raise KeyboardInterrupt


def test_a_savepoint_around_what_another_one_has_committed_is_told(anywhere):
    with told("keep it", anywhere.Session), another(anywhere) as outer:
        savepoint = outer.begin_nested()
        add(outer, "undone")
        with another(anywhere) as inner:
            add(inner, "an audit")
            inner.commit()
        savepoint.rollback()
        outer.commit()


def test_a_savepoint_that_is_released_takes_what_it_holds_along(anywhere):
    with told("keep it", anywhere.Session), another(anywhere) as outer:
        savepoint = outer.begin_nested()
        add(outer, "undone")
        with another(anywhere) as inner:
            add(inner, "an audit")
            inner.commit()
        savepoint.commit()
        outer.rollback()


def test_the_first_commits_while_the_second_goes_on(anywhere):
    with isolated(anywhere.Session):
        for end in "commit", "rollback":
            with another(anywhere) as first, another(anywhere) as second:
                add(first, f"first, {end}")
                add(second, f"second, {end}")
                first.commit()
                assert f"first, {end}" in texts(second)
                add(second, f"once more, {end}")
                getattr(second, end)()
        assert texts(anywhere.Session) == ["first, commit", "first, rollback", "once more, commit", "second, commit"]
    assert anywhere.durable() == []


def test_the_first_commits_and_begins_anew_while_the_second_goes_on(anywhere):
    with isolated(anywhere.Session):
        with another(anywhere) as first, another(anywhere) as second, another(anywhere) as reader:
            add(first, "1")
            add(second, "2")
            assert texts(reader) == ["1", "2"]
            first.commit()
            add(first, "3")
            second.commit()
            assert texts(reader) == ["1", "2", "3"]
            first.rollback()
            assert texts(reader) == ["1", "2"]
        assert texts(anywhere.Session) == ["1", "2"]


def test_a_release_while_the_second_goes_on(anywhere):
    with isolated(anywhere.Session):
        with another(anywhere) as first, another(anywhere) as second:
            savepoint = first.begin_nested()
            add(first, "1")
            add(second, "2")
            savepoint.commit()
            second.rollback()
            add(first, "3")
            first.commit()
        assert texts(anywhere.Session) == ["1", "3"]


@pytest.mark.parametrize("anywhere", ["sqlite", "mariadb"], indirect=True)
def test_a_savepoint_that_was_released_cannot_be_gone_back_to(anywhere):
    with isolated(anywhere.Session), another(anywhere) as first, another(anywhere) as second:
        first.execute(sa.text("SAVEPOINT s"))
        add(first, "1")
        add(second, "2")
        first.execute(sa.text("RELEASE SAVEPOINT s"))
        refuse(first, "ROLLBACK TO SAVEPOINT s")
        second.commit()
        first.commit()
        assert texts(anywhere.Session) == ["1", "2"]


def test_a_savepoint_that_was_rolled_back_cannot_be_gone_back_to(anywhere):
    with isolated(anywhere.Session), another(anywhere) as session:
        add(session, "undone")
        session.execute(sa.text("SAVEPOINT outer_one"))
        session.execute(sa.text("SAVEPOINT inner_one"))
        session.execute(sa.text("ROLLBACK TO SAVEPOINT outer_one"))
        refuse(session, "ROLLBACK TO SAVEPOINT inner_one")
        session.rollback()
        assert texts(session) == []


def test_the_first_rolls_back_while_the_second_is_in_the_midst_of_changes(anywhere):
    with told("let it go on", anywhere.Session):
        with another(anywhere) as first, another(anywhere) as second:
            add(first, "1")
            add(second, "2")
            first.rollback()
            with pytest.raises(IsolationError, match="this transaction is gone"):
                texts(second)
            with pytest.raises(IsolationError, match="cannot be committed, it is gone"):
                second.connection().connection.commit()
            second.rollback()
            add(second, "3")
            second.commit()
        assert texts(anywhere.Session) == ["3"]


def test_the_first_rolls_back_while_the_second_reads(anywhere):
    with isolated(anywhere.Session):
        with another(anywhere) as first, another(anywhere) as second:
            add(first, "1")
            assert texts(second) == ["1"]
            first.rollback()
            assert texts(second) == []
            add(second, "2")
            second.commit()
        assert texts(anywhere.Session) == ["2"]


def test_a_change_of_the_first_amid_changes_of_the_second(anywhere):
    with isolated(anywhere.Session):
        with another(anywhere) as first, another(anywhere) as second:
            add(first, "1")
            add(second, "2")
            add(first, "3")
            second.commit()
            first.commit()
        assert texts(anywhere.Session) == ["1", "2", "3"]
    with told("keep it", anywhere.Session), another(anywhere) as first, another(anywhere) as second:
        add(first, "1")
        add(second, "2")
        add(first, "3")
        second.rollback()


def test_a_transaction_that_only_reads_stands_in_nobody_s_way(anywhere):
    with isolated(anywhere.Session):
        with another(anywhere) as reader, another(anywhere) as other_reader:
            assert texts(reader) == texts(other_reader) == []
            savepoint = reader.begin_nested()
            assert texts(reader) == []
            with session_scope(anywhere.Session) as session:
                add(session, "1")
                assert texts(reader) == ["1"]
            savepoint.rollback()
            reader.rollback()
            assert texts(other_reader) == ["1"]
            add(other_reader, "undone")
            other_reader.rollback()
        assert texts(anywhere.Session) == ["1"]


def test_a_savepoint_that_has_floated_is_released(anywhere):
    with isolated(anywhere.Session), another(anywhere) as reader, another(anywhere) as writer:
        savepoint = reader.begin_nested()
        texts(reader)
        add(writer, "1")
        writer.commit()
        savepoint.commit()
        reader.rollback()
        assert texts(reader) == ["1"]


def test_readers_that_end_above_others_undo_nothing(anywhere):
    with isolated(anywhere.Session):
        with another(anywhere) as writer, another(anywhere) as reader:
            savepoint = reader.begin_nested()
            texts(reader)
            add(writer, "1")
            texts(reader)
            add(writer, "2")
            savepoint.rollback()
            texts(reader)
            reader.rollback()
            writer.commit()
        assert texts(anywhere.Session) == ["1", "2"]


def test_a_reader_around_the_changes_of_others_undoes_nothing(anywhere):
    # Its SAVEPOINT can't float: there is one in it, and in that there are changes.
    with isolated(anywhere.Session), another(anywhere) as outer:
        nested = outer.begin_nested()
        add(outer, "undone")
        nested.rollback()
        inner = outer.begin_nested()
        add(outer, "kept")
        with another(anywhere) as other:
            add(other, "the other's")
            inner.commit()
            other.commit()
        outer.commit()
        assert texts(anywhere.Session) == ["kept", "the other's"]


def test_a_statement_that_fails_amid_another_transaction(anywhere):
    with isolated(anywhere.Session), another(anywhere) as first:
        texts(first)
        with another(anywhere) as second:
            refuse(second)
            second.rollback()
            add(second, "second")
            second.commit()
        assert texts(first) == ["second"]
        first.commit()


def test_what_a_savepoint_amid_another_transaction_was_released_into_is_told(anywhere):
    with told("keep it", anywhere.Session), another(anywhere) as first, another(anywhere) as second:
        add(first, "1")
        add(second, "2")
        savepoint = first.begin_nested()
        add(first, "3")
        savepoint.commit()
        first.commit()
        second.rollback()


def test_what_is_committed_in_a_savepoint_amid_another_transaction_is_told(anywhere):
    with told("keep it", anywhere.Session), another(anywhere) as first, another(anywhere) as second:
        add(first, "1")
        add(second, "2")
        first.execute(sa.text("SAVEPOINT s"))
        add(first, "3")
        first.commit()
        second.rollback()


def test_a_commit_takes_its_savepoints_along(anywhere):
    with isolated(anywhere.Session):
        with another(anywhere) as session:
            add(session, "1")
            session.execute(sa.text("SAVEPOINT s"))
            add(session, "2")
            session.commit()
            with isolated(anywhere.engine):  # nothing is open
                assert texts(anywhere.engine) == ["1", "2"]
            session.rollback()
        assert texts(anywhere.Session) == ["1", "2"]


def test_a_reader_that_commits_amid_changes_has_nothing_to_be_kept(anywhere):
    with isolated(anywhere.Session):
        with another(anywhere) as writer, another(anywhere) as reader:
            add(writer, "undone")
            assert texts(reader) == ["undone"]
            reader.commit()
            writer.rollback()
        assert texts(anywhere.Session) == []


def test_a_commit_around_others_does_not_make_their_work_kept(anywhere):
    with isolated(anywhere.Session):
        with another(anywhere) as first, another(anywhere) as second, another(anywhere) as third:
            add(first, "1")
            add(second, "2")
            add(third, "3")
            first.commit()
            third.rollback()
            second.rollback()
        assert texts(anywhere.Session) == ["1"]


def test_a_commit_below_a_reader_is_sent_at_once(anywhere, sent):
    with isolated(anywhere.Session), another(anywhere) as writer, another(anywhere) as reader:
        add(writer, "1")
        assert texts(reader) == ["1"]
        assert sent() == ["SAVEPOINT isolated_0", "SAVEPOINT isolated_1", "SAVEPOINT isolated_2"]
        writer.commit()
        assert sent() == ["RELEASE SAVEPOINT isolated_1"]
        assert texts(reader) == ["1"]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_what_was_left_behind_is_released_alone(anywhere, end):
    with told("keep it", anywhere.Session):
        with another(anywhere) as first, another(anywhere) as second, another(anywhere) as third:
            add(first, "1")
            add(second, "2")
            add(third, "3")
            second.commit()
            getattr(third, end)()
            first.rollback()
        assert texts(anywhere.Session) == []


def test_a_transaction_that_is_gone_can_only_be_rolled_back(anywhere, sent):
    with told("let it go on", anywhere.Session, timeout=0.01):
        with another(anywhere) as first, another(anywhere) as second:
            add(first, "1")
            nested = second.begin_nested()
            add(second, "2")
            connection = second.connection()
            first.rollback()
            sent()
            for statement in "SELECT 1", "SAVEPOINT s", "RELEASE SAVEPOINT s":
                with pytest.raises(IsolationError, match="this transaction is gone"):
                    connection.execute(sa.text(statement))
            connection.execute(sa.text("ROLLBACK TO SAVEPOINT s"))
            assert sent() == []
            worker = Worker(lambda: texts(anywhere.engine))
            worker.join()
            assert worker.error is None  # it holds nobody up
            nested.rollback()
            second.rollback()
            add(second, "3")
            second.commit()
        assert texts(anywhere.Session) == ["3"]


def test_a_rollback_on_a_connection_that_goes_on(anywhere):
    with isolated(anywhere.engine), anywhere.engine.connect() as connection:
        for end, text in ("rollback", "undone"), ("commit", "kept"):
            transaction = connection.begin()
            connection.execute(sa.insert(Note), {"text": text})
            getattr(transaction, end)()
        assert texts(anywhere.engine) == ["kept"]


def test_a_connection_goes_on_after_its_transaction_was_gone(anywhere):
    with told("let it go on", anywhere.engine):
        with another(anywhere) as first, anywhere.engine.connect() as connection:
            add(first, "1")
            transaction = connection.begin()
            connection.execute(sa.insert(Note), {"text": "2"})
            first.rollback()
            with pytest.raises(IsolationError, match="this transaction is gone"):
                texts(connection)
            transaction.rollback()
            with connection.begin():
                connection.execute(sa.insert(Note), {"text": "3"})
        assert texts(anywhere.engine) == ["3"]


def test_another_transaction_between_a_cursor_and_its_statement(anywhere):
    with isolated(anywhere.Session), another(anywhere) as other:
        nested = anywhere.Session.begin_nested()
        assert texts(anywhere.Session) == []
        with before_statements(anywhere.engine, "RELEASE", lambda: add(other, "1")):
            nested.commit()
        add(anywhere.Session, "2")
        anywhere.Session.commit()
        other.commit()
        assert texts(anywhere.Session) == ["1", "2"]


def test_another_transaction_that_reads_between_a_cursor_and_its_statement_holds_nothing(anywhere):
    with isolated(anywhere.Session), another(anywhere) as other:
        with before_statements(anywhere.engine, "INSERT", lambda: texts(other)):
            add(anywhere.Session, "1")
        other.rollback()
        anywhere.Session.commit()
        assert texts(anywhere.Session) == ["1"]


def test_statements_without_parameters(anywhere):
    with isolated(anywhere.Session):
        for end in "rollback", "commit":
            connection = anywhere.Session.connection().execution_options(no_parameters=True)
            connection.exec_driver_sql(f"INSERT INTO note (text) VALUES ('100 % {end}')")
            getattr(anywhere.Session, end)()
        assert texts(anywhere.Session) == ["100 % commit"]
    assert anywhere.durable() == []


def test_a_session_that_is_closed_in_the_midst_of_a_commit(anywhere, sent):
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "RELEASE" in record.getMessage():
                other.close()

    with told("production would keep it", anywhere.Session), another(anywhere) as other:
        add(other, "undone")
        add(anywhere.Session, "undone, too")
        handler = Handler()
        logging.getLogger("sa_wsgi_session").addHandler(handler)
        anywhere.Session.commit()
        logging.getLogger("sa_wsgi_session").removeHandler(handler)
        assert sent()[-3:] == [
            "RELEASE SAVEPOINT isolated_2",
            "ROLLBACK TO SAVEPOINT isolated_1",
            "RELEASE SAVEPOINT isolated_1",
        ]
        assert texts(anywhere.Session) == []


def test_what_is_sent(anywhere, sent):
    with isolated(anywhere.Session):
        assert texts(anywhere.Session) == texts(anywhere.Session) == []
        assert sent() == ["SAVEPOINT isolated_0", "SAVEPOINT isolated_1"]
        anywhere.Session.commit()
        assert sent() == ["RELEASE SAVEPOINT isolated_1"]
        with another(anywhere) as reader:
            nested = anywhere.Session.begin_nested()
            assert texts(anywhere.Session) == []
            assert sent() == ["SAVEPOINT isolated_2", "SAVEPOINT isolated_3"]
            # What would be in the way floats.
            assert texts(reader) == texts(reader) == []
            assert sent() == ["RELEASE SAVEPOINT isolated_2", "SAVEPOINT isolated_4"]
            nested.commit()
            assert sent() == [
                "RELEASE SAVEPOINT isolated_4",
                "SAVEPOINT isolated_2",
                "SAVEPOINT isolated_3",
                "RELEASE SAVEPOINT isolated_3",
            ]
            assert texts(reader) == []
            nested = anywhere.Session.begin_nested()
            add(anywhere.Session, "undone")
            assert sent() == [
                "RELEASE SAVEPOINT isolated_2",
                "SAVEPOINT isolated_4",
                "RELEASE SAVEPOINT isolated_4",
                "SAVEPOINT isolated_2",
                "SAVEPOINT isolated_5",
            ]
            nested.rollback()
            assert texts(anywhere.Session) == []
            assert sent() == ["ROLLBACK TO SAVEPOINT isolated_5"]
            anywhere.Session.rollback()
            assert sent() == ["ROLLBACK TO SAVEPOINT isolated_2", "RELEASE SAVEPOINT isolated_2"]
            reader.rollback()
            assert sent() == []
        with isolated(anywhere.Session):
            pass
        assert sent() == [
            "SAVEPOINT isolated_6",
            "ROLLBACK TO SAVEPOINT isolated_6",
            "RELEASE SAVEPOINT isolated_6",
        ]
    assert sent() == ["ROLLBACK TO SAVEPOINT isolated_0"]


@pytest.mark.parametrize("how", ["as a method", "as a statement"])
def test_the_end_of_a_transaction_sends_no_more_than_that(anywhere, sent, how):
    expected = {
        "commit": ["RELEASE SAVEPOINT isolated_1"],
        "rollback": ["ROLLBACK TO SAVEPOINT isolated_2", "RELEASE SAVEPOINT isolated_2"],
    }
    with isolated(anywhere.engine):
        for end, statements in expected.items():
            with anywhere.engine.connect() as connection:
                connection.begin()
                assert texts(connection) == []
                sent()
                if how == "as a method":
                    getattr(connection.connection, end)()
                else:
                    connection.execute(sa.text(end.upper()))
                assert sent() == statements


# -- cursors that are used past SQLAlchemy ----------------------------------------------------------------------------


def test_what_a_raw_cursor_changes_is_its_transaction_s(anywhere):
    insert = "INSERT INTO note (text) VALUES ('{}')".format
    with isolated(anywhere.Session):
        with anywhere.engine.connect() as connection, another(anywhere) as reader:
            transaction = connection.begin()
            assert texts(connection) == texts(reader) == []
            cursor = raw_cursor(connection)
            cursor.execute(insert("kept"))
            reader.rollback()  # is in nobody's way
            nested = connection.begin_nested()
            cursor.execute(insert("undone"))
            nested.rollback()
            transaction.commit()
            # The same cursor, in the next transaction, of which SQLAlchemy knows nothing.
            cursor.execute(insert("undone, too"))
            connection.connection.rollback()
            connection.execute(sa.text("BEGIN"))
            connection.execute(sa.text("COMMIT"))
            cursor.execute(insert("and this"))
            connection.connection.rollback()
        assert texts(anywhere.Session) == ["kept"]


def test_changes_of_a_raw_cursor_are_taken_into_account(anywhere):
    with told("keep it", anywhere.Session):
        with anywhere.engine.connect() as connection:
            transaction = connection.begin()
            raw_cursor(connection).execute("INSERT INTO note (text) VALUES ('undone')")
            with pytest.raises(IsolationError, match="open that has changed something"), isolated(anywhere.engine):
                pass
            with session_scope(anywhere.Session) as session:
                add(session, "an audit")
            transaction.rollback()
        assert texts(anywhere.Session) == []


def test_an_error_of_a_raw_cursor(on_postgresql):
    with isolated(on_postgresql.Session), on_postgresql.engine.connect() as connection:
        with pytest.raises(on_postgresql.engine.dialect.dbapi.Error):
            raw_cursor(connection).execute("SELECT 1/0")
        assert texts(on_postgresql.Session) == []
        with pytest.raises(IsolationError, match="current transaction is aborted"):
            texts(connection)


class Program:
    """A random course of a few sessions, and what has to be there when they are done: what was committed."""

    def __init__(self, world: World, seed: int, *, orderly: bool) -> None:
        self.random = random.Random(seed)
        self.orderly = orderly
        self.sessions = [world.Session.session_factory() for _ in range(3)]
        #: Where each has to wait for those that began later: the sessions, in that order.
        self.order: list[int] = []
        #: Those within which another one has committed, so that a rollback would be told.
        self.around: set[int] = set()
        #: For each session, the names that it has added: since it began, and in each of its SAVEPOINTs.
        self.added: list[list[list[str]]] = [[[]] for _ in self.sessions]
        self.savepoints: list[list[Any]] = [[] for _ in self.sessions]
        self.committed: set[str] = set()
        self.count = 0

    def run(self) -> None:
        for _ in range(self.random.randrange(40)):
            self.step(self.random.randrange(len(self.sessions)))
        for number in range(len(self.sessions)) if not self.orderly else reversed(list(self.order)):
            self.end(number)

    def step(self, number: int) -> None:
        if self.orderly:
            if number in self.order:
                number = self.order[-1]
            else:
                self.order.append(number)
        session, added, savepoints = self.sessions[number], self.added[number], self.savepoints[number]
        verb = self.random.choice(["add", "add", "read", "savepoint", "release", "undo", "end", "invalidate"])
        if verb == "add":
            self.count += 1
            add(session, str(self.count))
            added[-1].append(str(self.count))
        elif verb == "read":
            texts(session)
        elif verb == "savepoint":
            savepoints.append(session.begin_nested())
            added.append([])
        elif verb == "release" and savepoints:
            savepoints.pop().commit()
            inner = added.pop()
            added[-1] += inner
        elif number in self.around and verb in ("undo", "invalidate"):
            return
        elif verb == "undo" and savepoints:
            savepoints.pop().rollback()
            added.pop()
        elif verb == "end":
            self.end(number)
        elif verb == "invalidate":
            session.invalidate()
            self.over(number)

    def end(self, number: int) -> None:
        if number in self.around or self.random.random() < 0.6:
            if self.orderly:
                self.around |= set(self.order) - {number}
            for savepoint in reversed(self.savepoints[number]):
                savepoint.commit()
            self.sessions[number].commit()
            self.committed |= {name for names in self.added[number] for name in names}
        else:
            self.sessions[number].close()
        self.over(number)

    def over(self, number: int) -> None:
        self.added[number], self.savepoints[number] = [[]], []
        if number in self.order:
            self.order.remove(number)
        self.around.discard(number)


@pytest.mark.parametrize("orderly", [True, False])
def test_any_course_of_several_sessions_is_kept_to_or_told(anywhere, orderly):
    were_told = 0
    for seed in range(120):
        program = Program(anywhere, seed, orderly=orderly)
        try:
            with isolated(anywhere.Session), ExitStack() as stack:
                for session in program.sessions:
                    stack.enter_context(closing(session))
                program.run()
                assert set(texts(anywhere.Session)) == program.committed, seed
        except IsolationError:
            were_told += 1
    assert (were_told == 0) is orderly
    assert were_told < 120
    assert anywhere.durable() == []


# -- PostgreSQL's aborted transactions --------------------------------------------------------------------------------


def test_after_an_error_another_transaction_goes_on(on_postgresql):
    world = on_postgresql
    with isolated(world.Session):
        with another(world) as failed:
            add(failed, "doomed")
            refuse(failed)
            with session_scope(world.Session) as audit:
                add(audit, "an audit")
            for _ in range(2):
                with pytest.raises(IsolationError, match="current transaction is aborted"):
                    texts(failed)
                with pytest.raises(IsolationError, match="cannot be committed: a statement in it has failed"):
                    failed.connection().connection.commit()
            failed.rollback()
            add(failed, "another attempt")
            failed.commit()
        assert texts(world.Session) == ["an audit", "another attempt"]


def test_after_an_error_in_a_savepoint_another_transaction_goes_on(on_postgresql):
    world = on_postgresql
    with isolated(world.Session):
        with another(world) as failed:
            with pytest.raises(ZeroDivisionError), failed.begin_nested():
                add(failed, "doomed")
                refuse(failed)
                with session_scope(world.Session) as audit:
                    texts(audit)
                raise ZeroDivisionError
            add(failed, "kept")
            failed.commit()
        assert texts(world.Session) == ["kept"]


def test_an_aborted_transaction_is_refused_as_ever(on_postgresql):
    world = on_postgresql
    with isolated(world.Session):
        with world.engine.connect() as connection:
            transaction = connection.begin()
            connection.execute(sa.insert(Note), {"text": "doomed"})
            refuse(connection)
            for statement in "SELECT 1", "SAVEPOINT s", "RELEASE SAVEPOINT s", "ROLLBACK TO s":
                with pytest.raises(DBAPIError, match=r"current transaction is aborted|does not exist"):
                    connection.execute(sa.text(statement))
            transaction.commit()  # is a rollback
            assert texts(connection) == []
        assert texts(world.Session) == []


def test_a_connection_goes_on_after_an_aborted_transaction(on_postgresql):
    world = on_postgresql
    with isolated(world.Session), world.engine.connect() as connection:
        transaction = connection.begin()
        refuse(connection)
        assert texts(world.Session) == []
        with pytest.raises(IsolationError, match="current transaction is aborted"):
            texts(connection)
        transaction.rollback()
        assert texts(connection) == []


def test_a_statement_fails_before_which_another_transaction_has_read(on_postgresql):
    world = on_postgresql
    with isolated(world.Session), another(world) as other:
        with before_statements(world.engine, "1/0", lambda: texts(other)):
            refuse(world.Session)
        assert texts(other) == []
        with pytest.raises(IsolationError, match="current transaction is aborted"):
            texts(world.Session)


def test_a_reader_fails_above_changes_of_another_one(on_postgresql):
    world = on_postgresql
    with isolated(world.Session):
        with another(world) as first, another(world) as second:
            add(second, "second")
            refuse(first)
            second.commit()
            first.rollback()
        with another(world) as first, another(world) as second:
            texts(first)
            add(second, "undone")
            refuse(first)
            second.rollback()
            with pytest.raises(IsolationError, match="current transaction is aborted"):
                texts(first)
        assert texts(world.Session) == ["second"]


# -- what the package does ---------------------------------------------------------------------------------------------


def test_a_lost_race_is_replayed(anywhere):
    attempts: list[int] = []

    class Deadlock(Exception):
        sqlstate = "40P01"
        pgcode = "40P01"

    def view():
        attempts.append(current_scope().attempt)
        add(anywhere.Session, "once")
        if len(attempts) == 1:
            raise OperationalError("UPDATE", {}, Deadlock(1213, "Deadlock"))
        return [b""]

    with isolated(anywhere.Session):
        policy = RetryPolicy(delay=0, is_transient=lambda error: isinstance(error, OperationalError))
        assert request(serve(anywhere, view, retry=policy)).status == "200 OK"
        assert attempts == [1, 2]
        assert texts(anywhere.Session) == ["once"]
    assert anywhere.durable() == []


def test_what_is_committed_is_not_replayed(anywhere):
    attempts: list[int] = []

    def view():
        attempts.append(1)
        add(anywhere.Session, f"attempt {len(attempts)}")
        anywhere.Session.commit()
        raise LookupError

    app = serve(anywhere, view, retry=RetryPolicy(delay=0, is_transient=lambda error: True))
    for _ in range(2):  # the policy is known before the block, and was made before the engine was
        attempts.clear()
        with isolated(anywhere.Session):
            with pytest.raises(LookupError):
                request(app)
            assert (len(attempts), texts(anywhere.Session)) == (1, ["attempt 1"])


@pytest.mark.parametrize("commit_at", ["start", "end"])
def test_streamed_bodies(anywhere, commit_at):
    def view():
        anywhere.Session.add(note("view's"))
        anywhere.Session.flush()

        def body():
            yield b"1"
            anywhere.Session.add(note("body's"))
            yield b"2"

        return body()

    with isolated(anywhere.Session):
        app = serve(anywhere, view, commit_at=commit_at)
        exchange = Exchange(app)
        assert exchange.next() == b"1"
        assert texts(anywhere.Session) == ["view's"]
        anywhere.Session.remove()
        assert exchange.read() == b"2"
        assert texts(anywhere.Session) == ["body's", "view's"]
        anywhere.Session.execute(sa.delete(Note))
        anywhere.Session.commit()
        exchange = Exchange(app)
        exchange.next()
        exchange.close()
        assert texts(anywhere.Session) == (["view's"] if commit_at == "start" else [])
    assert anywhere.durable() == []


@pytest.mark.parametrize("options", [{}, {"stream_results": True, "max_row_buffer": 2}])
@pytest.mark.parametrize("database", ["sqlite", "postgresql", "postgresql+psycopg2", "mariadb"])
def test_open_results_outlive_what_others_do(request, worlds, database, options):
    with worlds.use(request.getfixturevalue, database, "thread-local") as world:
        names = [f"{number:04}" for number in range(2000)]
        world.insert(*names)

        def view():
            statement: Any = sa.select(Note.text).order_by(Note.text).execution_options(**options)
            result = world.Session.execute(statement).yield_per(100).scalars()
            return (text.encode() for text in result)

        with isolated(world.Session):
            exchange = Exchange(serve(world, view))
            rows = [exchange.next()]
            with session_scope(world.Session) as session:
                add(session, "another one's")
            rows += [exchange.next() for _ in range(500)]
            with pytest.raises(ZeroDivisionError), session_scope(world.Session) as session:
                add(session, "undone")
                raise ZeroDivisionError
            with closing(exchange):
                rows += list(exchange.body)
            assert [row.decode() for row in rows] == names
            assert texts(world.Session) == [*names, "another one's"]


def test_isolation_levels_are_taken_but_change_nothing(anywhere, monkeypatch):
    reset: list[Any] = []
    with monkeypatch.context() as patch, isolated(anywhere.Session):
        patch.setattr(anywhere.engine.dialect, "reset_isolation_level", reset.append)
        engine = anywhere.engine.execution_options(isolation_level="SERIALIZABLE")
        with engine.begin() as connection:
            connection.execute(sa.insert(Note), {"text": "serializable"})
        with anywhere.engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
            assert texts(anywhere.Session) == ["serializable"]
        anywhere.Session.rollback()
        anywhere.Session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        add(anywhere.Session, "a session's")
        anywhere.Session.commit()
        with pytest.raises(ArgumentError):
            anywhere.engine.connect().execution_options(isolation_level="NONE SUCH")
        assert texts(anywhere.Session) == ["a session's", "serializable"]
    assert anywhere.durable() == []
    assert reset == []
    with anywhere.engine.connect() as connection:
        level = connection.get_isolation_level()
    with anywhere.engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
        assert connection.get_isolation_level() == "SERIALIZABLE"
    with anywhere.engine.connect() as connection:
        assert connection.get_isolation_level() == level


def test_in_autocommit_each_statement_is_kept(database_url):
    # (The worlds' engine of SQLite sends a BEGIN even then.)
    plain = sa.create_engine(database_url)
    try:
        Base.metadata.create_all(plain)
        engine = plain.execution_options(isolation_level="AUTOCOMMIT")
        with isolated(plain), plain.connect() as reader:
            assert texts(reader) == []
            with engine.connect() as connection:
                transaction = connection.begin()
                connection.execute(sa.insert(Note), {"text": "kept"})
                with pytest.raises(IntegrityError):
                    connection.execute(sa.insert(Note), {"text": "kept"})
                assert texts(connection) == ["kept"]
                transaction.rollback()
            assert texts(reader) == ["kept"]
            with plain.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sa.insert(Note), {"text": "kept, too"})
            assert texts(reader) == ["kept", "kept, too"]
            with engine.connect() as connection:
                # Unless it begins a transaction itself, and until that ends.
                transaction = connection.begin()
                connection.execute(sa.text("BEGIN"))
                connection.execute(sa.insert(Note), {"text": "undone"})
                transaction.rollback()
                transaction = connection.begin()
                connection.execute(sa.text("BEGIN"))
                connection.connection.commit()
                connection.execute(sa.insert(Note), {"text": "kept as well"})
                transaction.rollback()
            assert texts(reader) == ["kept", "kept as well", "kept, too"]
        assert texts(plain) == []
    finally:
        plain.dispose()


def test_an_engine_in_autocommit(database_url):
    engine = sa.create_engine(database_url, isolation_level="AUTOCOMMIT")
    try:
        Base.metadata.create_all(engine)
        with isolated(engine):
            with engine.connect() as connection:
                transaction = connection.begin()
                connection.execute(sa.insert(Note), {"text": "kept"})
                transaction.rollback()
            raw = engine.raw_connection()
            raw.cursor().execute("INSERT INTO note (text) VALUES ('raw')")
            raw.rollback()
            raw.close()
            level = "SERIALIZABLE"
            with engine.execution_options(isolation_level=level).connect() as connection:
                transaction = connection.begin()
                connection.execute(sa.insert(Note), {"text": "undone"})
                transaction.rollback()
            assert texts(engine) == ["kept", "raw"]
        assert texts(engine) == []
        with engine.connect() as connection:
            transaction = connection.begin()
            connection.execute(sa.insert(Note), {"text": "in autocommit"})
            transaction.rollback()
        assert texts(engine) == ["in autocommit"]
    finally:
        engine.dispose()


def test_a_read_only_transaction_cannot_change_anything(on_postgresql, caplog):
    world = on_postgresql
    caplog.set_level(logging.DEBUG, "sa_wsgi_session")
    with isolated(world.Session):
        engine = world.engine.execution_options(postgresql_readonly=True, postgresql_deferrable=True)
        with engine.connect() as connection:
            assert texts(connection) == texts(connection) == []
            assert caplog.messages.count("isolated(): SET TRANSACTION READ ONLY") == 1
            with session_scope(world.Session) as session:
                add(session, "another one's")
            with pytest.raises(DBAPIError, match="read-only"):
                connection.execute(sa.insert(Note), {"text": "no"})
        with engine.connect() as connection, pytest.raises(DBAPIError, match="read-only"):
            connection.execute(sa.insert(Note), {"text": "not at first, either"})
        with world.engine.begin() as connection:
            connection.execute(sa.insert(Note), {"text": "yes"})
        assert texts(world.Session) == ["another one's", "yes"]
    read_only = world.engine.execution_options(postgresql_readonly=True)
    with read_only.connect() as connection, pytest.raises(DBAPIError, match="read-only"):
        connection.execute(sa.insert(Note), {"text": "no"})


def test_two_phase_commits(on_postgresql, on_mariadb):
    first, second = on_postgresql, on_mariadb
    for end in "commit", "rollback":
        session: Any = Session(twophase=True)
        with isolated(first.engine, second.engine), closing(session):
            for engine in first.engine, second.engine:
                session.execute(sa.insert(Note.__table__), {"text": end}, bind_arguments={"bind": engine})
            if end == "commit":
                session.prepare()
            getattr(session, end)()
            expected = ["commit"] if end == "commit" else []
            assert texts(first.engine) == texts(second.engine) == expected
        assert first.durable() == second.durable() == []


def test_the_first_phase_finds_what_would_be_refused(on_postgresql):
    engine = on_postgresql.engine
    session: Any = Session(engine, twophase=True)
    with isolated(engine), closing(session):
        session.execute(sa.text("CREATE TABLE parent (id int PRIMARY KEY)"))
        session.execute(sa.text("CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)"))
        session.commit()
        raw_cursor(session.connection()).execute("INSERT INTO child VALUES (1)")
        with pytest.raises(IntegrityError):
            session.prepare()
        session.rollback()


def test_a_two_phase_transaction_that_is_rolled_back(on_postgresql):
    with isolated(on_postgresql.engine), on_postgresql.engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(sa.insert(Note), {"text": "undone"})
        transaction.rollback()
        with connection.begin():
            connection.execute(sa.insert(Note), {"text": "kept"})
        assert texts(connection) == ["kept"]


def test_two_phase_commits_outside_are_as_ever(on_postgresql):
    with isolated(on_postgresql.engine):
        pass
    for end in "commit", "rollback":
        with closing(Session(on_postgresql.engine, twophase=True)) as session:
            add(session, end)
            session.prepare()
            getattr(session, end)()
    assert on_postgresql.durable() == ["commit"]
    with on_postgresql.engine.connect() as connection:
        left = "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()"
        assert connection.execute(sa.text(left)).scalar() == 0


# -- what a COMMIT checks ---------------------------------------------------------------------------------------------


def test_deferred_constraints_are_checked_by_each_commit(on_postgresql):
    engine = on_postgresql.engine
    with isolated(engine):
        with engine.begin() as connection:
            for statement in (
                "CREATE TABLE parent (id int PRIMARY KEY)",
                "CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)",
                "CREATE TABLE eager (parent int REFERENCES parent DEFERRABLE INITIALLY IMMEDIATE)",
            ):
                connection.execute(sa.text(statement))
        with engine.connect() as connection:
            transaction = connection.begin()
            connection.execute(sa.text("INSERT INTO child VALUES (1)"))
            with pytest.raises(IntegrityError):
                transaction.commit()
        with engine.begin() as connection:
            connection.execute(sa.text("SET CONSTRAINTS ALL DEFERRED"))
            connection.execute(sa.text("INSERT INTO child VALUES (1)"))
            connection.execute(sa.text("INSERT INTO eager VALUES (1)"))
            with engine.begin() as other:  # whose commit is not to blame
                other.execute(sa.insert(Note), {"text": "other"})
            connection.execute(sa.text("INSERT INTO parent VALUES (1)"))
        with engine.connect() as connection, pytest.raises(IntegrityError):
            connection.execute(sa.text("INSERT INTO eager VALUES (2)"))
        autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        with autocommit.connect() as connection:
            for _ in range(2):
                with pytest.raises(IntegrityError):
                    connection.execute(sa.text("INSERT INTO child VALUES (2)"))
                # What was refused is gone, and nobody's blame.
                connection.execute(sa.text("INSERT INTO child VALUES (1)"))
        with engine.connect() as connection:
            assert connection.execute(sa.text("SELECT * FROM child")).all() == [(1,)] * 3
        with engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE eager"))
        with engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM child"))
    assert not sa.inspect(engine).has_table("child")


def test_a_commit_that_is_refused_is_nobody_else_s_failure(on_postgresql):
    with isolated(on_postgresql.engine):
        with on_postgresql.engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE parent (id int PRIMARY KEY)"))
            connection.execute(
                sa.text("CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
            )
        with another(on_postgresql) as reader:
            with on_postgresql.engine.connect() as connection:
                transaction = connection.begin()
                connection.execute(sa.text("INSERT INTO child VALUES (1)"))
                assert texts(reader) == []
                with pytest.raises(IntegrityError):
                    transaction.commit()
            assert texts(reader) == []
            assert reader.execute(sa.text("SELECT * FROM child")).all() == []


def test_a_commit_of_what_has_only_read_is_not_refused(on_postgresql):
    # (What is broken amid changes of others is found by the next commit of a change.)
    engine = on_postgresql.engine
    with isolated(engine), ExitStack() as stack:
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE parent (id int PRIMARY KEY)"))
            connection.execute(
                sa.text("CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
            )
        first, second, reader = (stack.enter_context(another(on_postgresql)) for _ in range(3))
        first.execute(sa.text("INSERT INTO child VALUES (1)"))
        add(second, "2")
        first.commit()
        second.rollback()
        assert reader.execute(sa.text("SELECT * FROM child")).all() == [(1,)]
        reader.commit()
        add(reader, "3")
        with pytest.raises(IntegrityError):
            reader.commit()


def test_deferred_foreign_keys_of_sqlite_are_checked_by_each_commit(sqlite_url):
    engine = sa.create_engine(sqlite_url)

    @event.listens_for(engine, "connect")
    def _enforce(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA foreign_keys = ON")

    statements = (
        "CREATE TABLE parent (id int PRIMARY KEY)",
        "CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)",
    )
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
    with closing(sqlite3.connect(str(sqlite_url.database))) as careless, careless:
        careless.execute("INSERT INTO child VALUES (0)")  # does not enforce them
    with isolated(engine):
        with engine.connect() as connection:
            transaction = connection.begin()
            connection.execute(sa.text("INSERT INTO child VALUES (1)"))
            with pytest.raises(IntegrityError, match="FOREIGN KEY constraint failed"):
                transaction.commit()
        with engine.begin() as connection:
            connection.execute(sa.text("INSERT INTO child VALUES (1)"))
            connection.execute(sa.text("INSERT INTO parent VALUES (1)"))
        with engine.connect() as connection:
            assert connection.execute(sa.text("SELECT * FROM child")).all() == [(0,), (1,)]
    engine.dispose()


def test_foreign_keys_that_sqlite_does_not_enforce_are_not_checked(sqlite_url):
    engine = sa.create_engine(sqlite_url)
    with isolated(engine), engine.connect() as connection:
        for statement in (
            "CREATE TABLE parent (id int PRIMARY KEY)",
            "CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)",
            "INSERT INTO child VALUES (1)",
        ):
            with connection.begin():
                connection.execute(sa.text(statement))
        assert connection.execute(sa.text("SELECT * FROM child")).all() == [(1,)]
    engine.dispose()


# -- SQLite -----------------------------------------------------------------------------------------------------------


def test_a_trigger_of_sqlite_ends_nothing(sqlite_url):
    refusal = (DBAPIError, sqlite3.Warning)  # of Python 3.10
    with closing(World(sqlite_url)) as world, isolated(world.Session):
        with world.engine.begin() as connection:
            connection.execute(
                sa.text(
                    "CREATE TRIGGER shout AFTER INSERT ON note BEGIN "
                    "UPDATE note SET text = upper(text) WHERE id = new.id; END"
                )
            )
        add(world.Session, "1 a")
        world.Session.commit()
        assert texts(world.Session) == ["1 A"]
        with world.engine.connect() as connection, pytest.raises(refusal, match="one statement at a time"):
            connection.execute(sa.text("INSERT INTO note (text) VALUES ('2'); COMMIT"))
        assert texts(world.Session) == ["1 A"]


def _plain(url: Any, **options: Any) -> Any:
    return sa.create_engine(url, **options)


def _with_recipe(url: Any, **options: Any) -> Any:
    engine = sa.create_engine(url, **options)

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.execute(sa.text("BEGIN IMMEDIATE"))

    return engine


MODERN = pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has the attribute from Python 3.12 on")
MODES = [
    pytest.param({}, id="legacy"),
    pytest.param({"isolation_level": "EXCLUSIVE"}, id="exclusive"),
    pytest.param({"autocommit": False}, id="PEP 249", marks=MODERN),
]


@pytest.mark.parametrize("make", [_plain, _with_recipe])
@pytest.mark.parametrize("memory", [None, StaticPool, NullPool])
@pytest.mark.parametrize("arguments", MODES)
def test_sqlite_s_late_transactions_are_begun_early(sqlite_url, make, memory, arguments):
    if arguments.get("autocommit") is False and make is _with_recipe:
        pytest.skip("two ways to the same end, that don't go together")
    if memory is NullPool:
        engine = make(sqlite_url, poolclass=NullPool, connect_args=arguments)
    elif memory is StaticPool:
        engine = make("sqlite://", poolclass=StaticPool, connect_args=arguments)
    else:
        engine = make("sqlite://", connect_args=arguments)
    Base.metadata.create_all(engine)
    factory = scoped_session(sessionmaker(engine))
    raw = engine.raw_connection()
    before = raw.dbapi_connection.isolation_level
    raw.close()
    with isolated(factory):
        with session_scope(factory) as session:
            with pytest.raises(ZeroDivisionError), session.begin_nested():
                add(session, "undone")
                raise ZeroDivisionError
            with session.begin_nested():
                add(session, "kept")
        with pytest.raises(ZeroDivisionError), session_scope(factory) as session:
            session.execute(sa.text("CREATE TABLE other (id int)"))
            with session.begin_nested():
                add(session, "undone, too")
            raise ZeroDivisionError
        assert texts(factory) == ["kept"]
        assert not sa.inspect(engine).has_table("other")
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE other (id int)"))
    assert texts(engine) == []
    assert not sa.inspect(engine).has_table("other")
    raw = engine.raw_connection()
    assert raw.dbapi_connection.isolation_level == before
    assert raw.dbapi_connection.in_transaction is (arguments.get("autocommit") is False)
    raw.close()
    engine.dispose()


def test_cursors_of_sqlite(sqlite_url):
    with closing(World(sqlite_url)) as world, isolated(world.engine):
        add(world.Session, *"abcde")
        cursor = world.Session.connection().connection.cursor()
        assert cursor.execute("SELECT text FROM note ORDER BY text").fetchone() == ("a",)
        world.Session.execute(sa.delete(Note))
        assert cursor.fetchmany() == [("b",)]
        assert cursor.fetchmany(2) == [("c",), ("d",)]
        assert [row for row in cursor] == [("e",)]  # noqa: C416
        assert cursor.fetchone() is None
        assert cursor.fetchall() == []
        with pytest.raises(IsolationError, match="commits first"):
            cursor.executescript("SELECT 1")
        add(world.Session, *"fgh")
        assert cursor.execute("SELECT text FROM note ORDER BY text").fetchone() == ("f",)
        assert cursor.execute("SELECT text FROM note WHERE text = 'h'").fetchall() == [("h",)]
        assert cursor.fetchall() == []
        own = world.Session.connection().connection.cursor(sqlite3.Cursor)
        assert type(own) is sqlite3.Cursor


@pytest.mark.parametrize("arguments", [{"isolation_level": None}, pytest.param({"autocommit": True}, marks=MODERN)])
def test_a_driver_that_commits_by_itself(sqlite_url, arguments):
    engine = sa.create_engine(sqlite_url, connect_args=arguments)
    Base.metadata.create_all(engine)
    with isolated(engine):
        with engine.connect() as connection:
            transaction = connection.begin()
            connection.execute(sa.insert(Note), {"text": "kept"})
            transaction.rollback()
        assert texts(engine) == ["kept"]
    assert texts(engine) == []
    engine.dispose()


def test_a_connection_of_sqlite_in_a_transaction_is_refused():
    engine = sa.create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    with engine.connect() as connection, connection.begin():
        connection.execute(sa.insert(Note), {"text": "before"})
        with pytest.raises(IsolationError, match="in a transaction already"), isolated(engine):
            pass
    with isolated(engine):
        assert texts(engine) == []
    engine.dispose()


def test_a_connection_that_cannot_be_used_is_given_back(sqlite_url):
    engine = sa.create_engine(sqlite_url, poolclass=QueuePool, pool_reset_on_return=None)
    raw = engine.raw_connection()
    raw.cursor().execute("CREATE TABLE other (id int)")
    raw.cursor().execute("INSERT INTO other VALUES (1)")
    raw.close()
    with pytest.raises(IsolationError, match="in a transaction already") as raised, isolated(engine):
        pass
    assert raised.traceback  # which refers to everything
    assert engine.pool.status().endswith("Current Checked out connections: 0")
    engine.dispose()


# -- MariaDB and MySQL ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    ["CREATE TABLE other (id int)", "TRUNCATE note", "LOCK TABLES note READ", "SET autocommit = 1", "DROP TABLE note"],
)
def test_what_commits_implicitly_is_refused(on_mariadb, statement):
    with told(r"commits implicitly on MariaDB and MySQL.*before the block", on_mariadb.Session):
        add(on_mariadb.Session, "1")
        words = " ".join(statement.upper().split()[:2])
        with pytest.raises(IsolationError, match=f"^{words} commits implicitly"):
            on_mariadb.Session.execute(sa.text(statement))
        assert texts(on_mariadb.Session) == ["1"]
    assert on_mariadb.durable() == []


def test_temporary_tables_and_a_begin_of_one_s_own(on_mariadb):
    with isolated(on_mariadb.Session), another(on_mariadb) as connection:
        connection.execute(sa.text("CREATE TEMPORARY TABLE other (id int)"))
        connection.execute(sa.text("DROP TEMPORARY TABLE other"))
        connection.execute(sa.insert(Note), {"text": "committed by BEGIN"})
        connection.execute(sa.text("START TRANSACTION"))
        connection.execute(sa.insert(Note), {"text": "undone"})
        connection.execute(sa.text("ROLLBACK"))
        assert texts(on_mariadb.Session) == ["committed by BEGIN"]
    assert on_mariadb.durable() == []


def test_a_procedure_that_commits_is_told(on_mariadb):
    with on_mariadb.engine.begin() as connection:
        connection.execute(sa.text("CREATE OR REPLACE PROCEDURE sly() BEGIN COMMIT; END"))
    with told("may have been kept", on_mariadb.Session) as raised:
        add(on_mariadb.Session, "kept")
        on_mariadb.Session.execute(sa.text("CALL sly()"))
        with pytest.raises(IsolationError, match="committed or rolled back past SQLAlchemy"):
            on_mariadb.Session.commit()
        on_mariadb.Session.rollback()
        with pytest.raises(IsolationError, match="of no use any more"):
            texts(on_mariadb.Session)
        with pytest.raises(IsolationError, match="of no use any more"):
            on_mariadb.engine.connect()
    assert raised.value.__cause__ is not None
    assert on_mariadb.durable() == ["kept"]


def test_cursors_of_drivers_that_take_options_read_all_rows_at_once(mariadb_url):
    import pymysql

    class TakesOptions(pymysql.connections.Connection):
        """As the connections of MySQL Connector/Python do."""

        def cursor(self, cursor: Any = None, *, buffered: bool = True) -> Any:
            return super().cursor(cursor or (pymysql.cursors.Cursor if buffered else pymysql.cursors.SSCursor))

    place: Any = mariadb_url.translate_connect_args(username="user")
    engine = sa.create_engine(mariadb_url, creator=lambda: TakesOptions(**place))
    Base.metadata.create_all(engine)
    with isolated(engine), engine.begin() as connection:
        connection.execute(sa.insert(Note), [{"text": text} for text in "abc"])
        proxy: Any = connection.connection
        cursor = proxy.cursor(buffered=False)
        cursor.execute("SELECT text FROM note ORDER BY text")
        assert cursor.fetchone() == ("a",)
        assert texts(connection) == ["a", "b", "c"]
        assert cursor.fetchall() == (("b",), ("c",))
    engine.dispose()


@pytest.mark.parametrize("as_keyword", [True, False])
@pytest.mark.parametrize(("kind", "row"), [("Cursor", ("a",)), ("DictCursor", {"text": "a"})])
@pytest.mark.parametrize("unbuffered", ["", "SS"])
def test_a_cursor_has_the_rows_of_the_class_that_was_asked_for(on_mariadb, as_keyword, kind, row, unbuffered):
    import pymysql

    cls = getattr(pymysql.cursors, unbuffered + kind)
    with isolated(on_mariadb.Session), on_mariadb.engine.begin() as connection:
        connection.execute(sa.insert(Note), [{"text": text} for text in "abc"])
        proxy: Any = connection.connection
        cursor = proxy.cursor(cursor=cls) if as_keyword else proxy.cursor(cls)
        cursor.execute("SELECT text FROM note ORDER BY text")
        assert cursor.fetchone() == row
        assert texts(connection) == ["a", "b", "c"]
        assert len(cursor.fetchall()) == 2


def test_a_cursor_of_ones_own_is_used_as_it_is(on_mariadb):
    import pymysql

    class OfOnesOwn(pymysql.cursors.DictCursor):
        pass

    with isolated(on_mariadb.Session), on_mariadb.engine.begin() as connection:
        proxy: Any = connection.connection
        assert type(proxy.cursor(OfOnesOwn)) is OfOnesOwn
        assert type(proxy.cursor(None)) is pymysql.cursors.Cursor


def test_an_unbuffered_cursor_of_ones_own_is_one_of_the_driver_that_keeps_its_rows(on_mariadb):
    import pymysql

    class OfOnesOwn(pymysql.cursors.SSCursor):
        pass

    with isolated(on_mariadb.Session), on_mariadb.engine.begin() as connection:
        connection.execute(sa.insert(Note), [{"text": text} for text in "abc"])
        proxy: Any = connection.connection
        cursor = proxy.cursor(OfOnesOwn)
        cursor.execute("SELECT text FROM note ORDER BY text")
        assert cursor.fetchone() == ("a",)
        assert texts(connection) == ["a", "b", "c"]


def test_a_table_without_transactions_is_told(on_mariadb):
    with on_mariadb.engine.begin() as connection:
        connection.execute(sa.text("CREATE OR REPLACE TABLE old (id int) ENGINE=MyISAM"))
    with told("knows no transactions", on_mariadb.Session):
        on_mariadb.Session.execute(sa.text("INSERT INTO old VALUES (1)"))
        on_mariadb.Session.commit()


@pytest.mark.parametrize("anywhere", ["postgresql", "mariadb"], indirect=True)
@pytest.mark.parametrize(
    "statement",
    ["COMMIT AND CHAIN", "INSERT INTO note (text) VALUES (';'); COMMIT", "XA START 'x'", "COMMIT" + " " * 1_000],
)
def test_what_would_end_the_one_transaction_is_refused(anywhere, statement):
    with told("would end the transaction of isolated", anywhere.Session):
        add(anywhere.Session, "1")
        with pytest.raises(IsolationError):
            anywhere.Session.execute(sa.text(statement))
    assert anywhere.durable() == []


def test_the_longest_statement_that_is_taken_for_a_commit(anywhere):
    with isolated(anywhere.Session):
        add(anywhere.Session, "kept")
        anywhere.Session.execute(sa.text("COMMIT".ljust(1000)))
        anywhere.Session.rollback()
        assert texts(anywhere.Session) == ["kept"]
    with told("would end the transaction", anywhere.Session):
        anywhere.Session.execute(sa.text("COMMIT".ljust(1001)))


# -- connections that are lost, or given up ---------------------------------------------------------------------------


def _kill(world: World) -> None:
    """End the database's side of the connection."""
    name = world.engine.dialect.name
    own = "SELECT pg_backend_pid()" if name == "postgresql" else "SELECT connection_id()"
    with world.engine.connect() as connection:
        number = connection.execute(sa.text(own)).scalar()
    with world._observer.connect() as observer:
        observer.execute(
            sa.text(f"SELECT pg_terminate_backend({number})" if name == "postgresql" else f"KILL {number}")
        )


@pytest.mark.parametrize("anywhere", ["postgresql", "mariadb"], indirect=True)
def test_a_lost_connection_is_told_and_replaced_after(anywhere):
    with told("the connection was lost", anywhere.Session):
        add(anywhere.Session, "1")
        anywhere.Session.commit()
        _kill(anywhere)
        with pytest.raises((DBAPIError, IsolationError)):
            texts(anywhere.Session)
        anywhere.Session.remove()
        with pytest.raises(IsolationError, match="of no use any more"):
            texts(anywhere.Session)
    assert texts(anywhere.engine) == []
    with isolated(anywhere.Session):
        add(anywhere.Session, "1")
        anywhere.Session.commit()
    assert texts(anywhere.engine) == []


@pytest.mark.parametrize("anywhere", ["postgresql", "mariadb"], indirect=True)
def test_a_connection_that_is_lost_at_the_very_end(anywhere):
    with told("the connection was lost", anywhere.Session):
        add(anywhere.Session, "1")
        anywhere.Session.commit()
        _kill(anywhere)
    assert texts(anywhere.engine) == []


def test_a_transaction_that_was_ended_past_sqlalchemy_is_told(anywhere):
    with told("past SQLAlchemy", anywhere.Session):
        add(anywhere.Session, "kept")
        anywhere.Session.commit()
        anywhere.Session.connection().connection.dbapi_connection.commit()
        if anywhere.engine.dialect.name != "mysql":  # whose drivers do not know
            with pytest.raises(IsolationError, match="past SQLAlchemy"):
                texts(anywhere.Session)
    assert anywhere.durable() == ["kept"]
    with told("past SQLAlchemy", anywhere.Session):
        anywhere.Session.execute(sa.delete(Note))
        anywhere.Session.connection().connection.dbapi_connection.rollback()
        with pytest.raises(IsolationError):
            anywhere.Session.commit()
    assert anywhere.durable() == ["kept"]


def test_a_connection_whose_transaction_was_ended_is_not_used_again(sqlite_url):
    engine = sa.create_engine(sqlite_url, poolclass=QueuePool)
    Base.metadata.create_all(engine)
    with told("past SQLAlchemy", engine):
        raw = engine.raw_connection()
        used: Any = raw.dbapi_connection
        used.rollback()
        raw.close()
    raw = engine.raw_connection()
    assert raw.dbapi_connection is not used
    raw.close()
    engine.dispose()


def test_what_comes_after_a_loss_names_it(anywhere):
    with told("let it go on", anywhere.Session) as first_of_all:
        with another(anywhere) as first, another(anywhere) as second:
            add(first, "1")
            add(second, "2")
            first.rollback()
        add(anywhere.Session, "3")
        connection = anywhere.Session.connection().connection
        connection.dbapi_connection.rollback()
        with pytest.raises(IsolationError, match="past SQLAlchemy"):
            connection.commit()
        with pytest.raises(IsolationError, match="of no use any more") as raised:
            anywhere.engine.connect()
        assert "past SQLAlchemy" in str(raised.value.__cause__)
    assert first_of_all.value.__cause__ is None  # the driver's error is of the second


def test_a_connection_that_is_given_up_loses_its_own_transaction_only(anywhere):
    with isolated(anywhere.Session):
        add(anywhere.Session, "kept")
        anywhere.Session.commit()
        add(anywhere.Session, "undone")
        anywhere.Session().invalidate()
        assert texts(anywhere.Session) == ["kept"]
        with anywhere.engine.connect() as connection:
            connection.invalidate()
            assert connection.invalidated
            assert texts(connection) == ["kept"]
            connection.connection.invalidate(soft=True)
            assert texts(connection) == ["kept"]
            connection.detach()
            assert texts(connection) == ["kept"]
        assert texts(anywhere.Session) == ["kept"]


def test_a_simulated_disconnect(anywhere):
    def disconnect(*args: Any) -> None:
        raise anywhere.engine.dialect.dbapi.OperationalError("server closed the connection unexpectedly")

    with isolated(anywhere.Session):
        add(anywhere.Session, "kept")
        anywhere.Session.commit()

        @event.listens_for(anywhere.engine, "handle_error")
        def _is_disconnect(context: Any) -> None:
            context.is_disconnect = True

        event.listen(anywhere.engine.dialect, "do_execute", disconnect)
        with pytest.raises(DBAPIError):
            add(anywhere.Session, "undone")
        event.remove(anywhere.engine.dialect, "do_execute", disconnect)
        event.remove(anywhere.engine, "handle_error", _is_disconnect)
        anywhere.Session.rollback()
        assert texts(anywhere.Session) == ["kept"]


def test_connections_that_are_dropped_are_rolled_back(anywhere):
    with isolated(anywhere.Session):
        connection = anywhere.engine.connect()
        transaction = connection.begin()
        connection.execute(sa.insert(Note), {"text": "undone"})
        del connection, transaction
        gc.collect()
        assert texts(anywhere.Session) == []
        assert anywhere.engine.pool.checkedout() == 1


def test_a_session_that_is_closed_in_the_midst_of_a_statement(sqlite_url):
    with closing(World(sqlite_url)) as world, isolated(world.Session):
        with another(world) as other:
            add(other, "undone")
            connection = world.Session.connection()

            def close(value: int) -> int:
                other.close()
                return value

            connection.connection.dbapi_connection.create_function("close", 1, close)
            assert connection.execute(sa.text("SELECT close(1)")).scalar() == 1
        assert texts(world.Session) == []


def test_a_rollback_in_the_midst_of_a_statement(sqlite_url):
    with closing(World(sqlite_url)) as world, isolated(world.Session):
        with world.engine.connect() as other:
            transaction = other.begin()
            other.execute(sa.insert(Note), {"text": "undone"})
            connection = world.Session.connection()
            driver = connection.connection.dbapi_connection
            driver.create_function("undo", 0, lambda: other.connection.rollback())
            connection.execute(sa.text("SELECT undo()"))
            transaction.commit()
        assert texts(world.Session) == []


def test_a_statement_in_the_midst_of_a_statement_is_told(sqlite_url):
    with closing(World(sqlite_url)) as world, told("on the same thread", world.Session):
        connection = world.Session.connection()
        connection.connection.dbapi_connection.create_function("more", 0, lambda: texts(world.engine))
        with pytest.raises(DBAPIError):
            connection.execute(sa.text("SELECT more()"))


# -- threads ----------------------------------------------------------------------------------------------------------


class Worker(threading.Thread):
    """Runs a function, and has its result, or its exception."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self.error = error


def test_threads_take_turns(anywhere):
    anywhere.insert("0")

    def increase() -> None:
        for _ in range(10):
            with session_scope(anywhere.Session) as session:
                found: Any = session.execute(sa.select(Note).with_for_update()).scalars().one()
                found.text = str(int(found.text) + 1)
                session.flush()

    with isolated(anywhere.Session, timeout=60):
        workers = [Worker(increase) for _ in range(4)]
        for worker in workers:
            worker.join()
        assert [worker.error for worker in workers] == [None] * 4
        assert texts(anywhere.Session) == ["40"]
    assert texts(anywhere.engine) == ["0"]


def test_a_thread_waits_for_the_end_of_another_one_s_changes(anywhere):
    changed, seen = threading.Event(), []

    def reader() -> None:
        with session_scope(anywhere.Session) as session:
            changed.set()
            seen.append(texts(session))

    with isolated(anywhere.Session, timeout=60):
        add(anywhere.Session, "1")
        worker = Worker(reader)
        changed.wait()
        add(anywhere.Session, "2")
        anywhere.Session.commit()
        worker.join()
        assert (worker.error, seen) == (None, [["1", "2"]])


def test_a_thread_that_waits_in_vain_is_told(anywhere):
    with told("another thread has changed something", anywhere.Session, timeout=0.01):
        add(anywhere.Session, "1")
        worker = Worker(lambda: texts(anywhere.Session))
        worker.join()
        assert isinstance(worker.error, IsolationError)
        anywhere.Session.commit()
        assert texts(anywhere.Session) == ["1"]


@pytest.mark.parametrize("anywhere", ["postgresql", "mariadb"], indirect=True)
@pytest.mark.parametrize("how", [{}, {"read": True}])
def test_a_thread_that_locks_rows_holds_up_others(anywhere, how):
    with told("another thread has changed something", anywhere.Session, timeout=0.01):
        anywhere.Session.execute(sa.select(Note).with_for_update(**how)).all()
        worker = Worker(lambda: texts(anywhere.Session))
        worker.join()
        assert isinstance(worker.error, IsolationError)
        anywhere.Session.commit()
        worker = Worker(lambda: texts(anywhere.engine))
        worker.join()
        assert worker.error is None


def test_a_thread_that_only_reads_holds_nobody_up(anywhere):
    with isolated(anywhere.Session, timeout=0.01):
        assert texts(anywhere.Session) == []  # its transaction is open

        def job() -> None:
            with session_scope(anywhere.Session) as session:
                add(session, "1")

        worker = Worker(job)
        worker.join()
        assert worker.error is None
        assert texts(anywhere.Session) == ["1"]


def test_a_thread_waits_for_a_unit_of_work_that_has_only_read(anywhere, monkeypatch):
    monkeypatch.setattr(_shared_connection, "_PATIENCE", 60)
    began, order = threading.Event(), []

    def job() -> None:
        with session_scope(anywhere.Session) as session:
            texts(session)
            began.set()
            time.sleep(0.1)
            order.append("the job")

    with isolated(anywhere.Session, timeout=60):
        worker = Worker(job)
        began.wait()
        texts(anywhere.Session)
        order.append("the test")
        worker.join()
    assert (worker.error, order) == (None, ["the job", "the test"])


def test_a_thread_waits_once_for_a_unit_of_work_that_has_only_read(anywhere, monkeypatch):
    monkeypatch.setattr(_shared_connection, "_PATIENCE", 0.5)
    began, go_on = threading.Event(), threading.Event()

    def job() -> None:
        with session_scope(anywhere.Session) as session:
            texts(session)
            began.set()
            go_on.wait()

    with isolated(anywhere.Session, timeout=60):
        worker = Worker(job)
        began.wait()
        times = [time.monotonic()]
        for _ in range(10):
            texts(anywhere.Session)
            times.append(time.monotonic())
        go_on.set()
        worker.join()
    first, rest = times[1] - times[0], times[-1] - times[1]
    assert first >= 0.5
    assert rest < 5 * first  # waiting for it each time would be nine


def test_a_body_between_two_chunks_holds_nobody_up(anywhere, monkeypatch):
    monkeypatch.setattr(_shared_connection, "_PATIENCE", 60)

    def view():
        yield str(len(texts(anywhere.Session))).encode()
        yield b" notes"

    def begin() -> None:
        exchange = Exchange(serve(anywhere, view, commit_at="end"))
        begun.append((exchange, exchange.next()))

    begun: list[tuple[Exchange, bytes]] = []
    with isolated(anywhere.Session, timeout=60):
        worker = Worker(begin)
        worker.join()
        assert worker.error is None
        add(anywhere.Session, "1")
        anywhere.Session.commit()
        exchange, first = begun.pop()
        assert first + exchange.read() == b"0 notes"


def test_a_connection_is_its_user_s_not_its_maker_s(anywhere):
    connections: list[Any] = []
    with isolated(anywhere.Session, timeout=0.01):
        worker = Worker(lambda: connections.append(anywhere.engine.connect()))
        worker.join()
        with connections.pop() as connection, connection.begin():
            connection.execute(sa.insert(Note), {"text": "1"})
            assert texts(anywhere.Session) == ["1"]


@pytest.mark.parametrize("looks", [True, False])
def test_a_connection_that_another_thread_has_dropped_holds_nobody_up(anywhere, looks):
    def job() -> None:
        connection = anywhere.engine.connect()
        transaction = connection.begin()
        connection.execute(sa.insert(Note), {"text": "undone"})
        del connection, transaction
        gc.collect()

    with isolated(anywhere.Session, timeout=0.01):
        worker = Worker(job)
        worker.join()
        assert worker.error is None
        if looks:
            assert texts(anywhere.Session) == []


def test_an_inner_block_waits_for_other_threads(anywhere):
    changed, go_on = threading.Event(), threading.Event()

    def job() -> None:
        with session_scope(anywhere.Session) as session:
            add(session, "1")
            changed.set()
            go_on.wait()

    with isolated(anywhere.Session, timeout=60):
        worker = Worker(job)
        changed.wait()
        threading.Timer(0.05, go_on.set).start()
        with isolated(anywhere.engine):
            assert texts(anywhere.engine) == ["1"]
        worker.join()
    assert worker.error is None


def test_the_end_waits_for_other_threads(anywhere):
    changed, go_on = threading.Event(), threading.Event()

    def job() -> None:
        with session_scope(anywhere.Session) as session:
            add(session, "1")
            changed.set()
            go_on.wait()

    with isolated(anywhere.Session, timeout=60):
        worker = Worker(job)
        changed.wait()
        threading.Timer(0.05, go_on.set).start()
    worker.join()
    assert worker.error is None
    assert anywhere.durable() == []


def test_the_end_does_not_wait_for_ever(anywhere):
    changed, go_on = threading.Event(), threading.Event()

    def job() -> None:
        with session_scope(anywhere.Session) as session:
            add(session, "1")
            changed.set()
            go_on.wait()

    with told("has not ended its transaction for 0.01 seconds", anywhere.Session, timeout=0.01):
        worker = Worker(job)
        changed.wait()
    go_on.set()
    worker.join()
    assert anywhere.durable() == []


def wait_for_its_turn(worker: Worker) -> None:
    """Wait until that thread waits for its turn."""
    number: Any = worker.ident
    while "wait_for" not in [frame.f_code.co_name for frame, _ in walk_stack(sys._current_frames()[number])]:
        time.sleep(0.001)


@pytest.mark.parametrize("anywhere", ["sqlite", "postgresql"], indirect=True)
def test_a_thread_that_waits_when_the_connection_is_lost(anywhere):
    with told("past SQLAlchemy", anywhere.engine, timeout=20), anywhere.engine.connect() as connection:
        transaction = connection.begin()
        connection.execute(sa.insert(Note), {"text": "1"})
        worker = Worker(lambda: texts(anywhere.engine))
        wait_for_its_turn(worker)
        connection.connection.dbapi_connection.rollback()
        with pytest.raises(IsolationError, match="past SQLAlchemy"):
            texts(connection)
        worker.join()  # although this transaction has not ended
        assert "of no use any more" in str(worker.error)
        transaction.rollback()


def test_a_thread_that_waits_when_the_block_ends(anywhere):
    with isolated(anywhere.engine, timeout=20):
        connection = anywhere.engine.connect()
        transaction = connection.begin()
        connection.execute(sa.insert(Note), {"text": "1"})
        worker = Worker(lambda: texts(anywhere.engine))
        wait_for_its_turn(worker)
    worker.join()
    assert "after the block had ended" in str(worker.error)
    transaction.rollback()
    connection.close()


def test_what_may_still_be_sent_past_sqlalchemy_holds_nobody_up(anywhere, monkeypatch):
    monkeypatch.setattr(_shared_connection, "_PATIENCE", 60)
    with isolated(anywhere.engine, timeout=60):
        with session_scope(anywhere.Session), anywhere.engine.connect() as connection:
            with connection.begin():
                raw_cursor(connection).execute("INSERT INTO note (text) VALUES ('1')")
            worker = Worker(lambda: texts(anywhere.engine))
            worker.join(15)
            assert not worker.is_alive()
        assert worker.error is None


def test_a_server_in_another_thread(anywhere, waitress_server):
    from urllib.request import urlopen

    def view():
        add(anywhere.Session, str(len(texts(anywhere.Session))))
        return [b"done"]

    with isolated(anywhere.Session, timeout=60):
        server = waitress_server(SessionMiddleware(respond(view), anywhere.Session))
        for _ in range(3):
            with urlopen(server.url) as response:
                assert response.read() == b"done"
        assert texts(anywhere.Session) == ["0", "1", "2"]
    server.stop()
    assert anywhere.durable() == []


# -- blocks within blocks ---------------------------------------------------------------------------------------------


def test_a_block_within_a_block_is_rolled_back_alone(anywhere):
    with isolated(anywhere.Session):
        add(anywhere.Session, "outer")
        anywhere.Session.commit()
        assert texts(anywhere.Session) == ["outer"]
        for _ in range(2):
            with isolated(anywhere.Session):
                add(anywhere.Session, "inner")
                anywhere.Session.commit()
                with isolated(anywhere.engine):
                    with session_scope(anywhere.Session) as session:
                        session.execute(sa.delete(Note))
                    assert texts(anywhere.engine) == []
                assert texts(anywhere.Session) == ["inner", "outer"]
                add(anywhere.Session, "not even committed")
            assert texts(anywhere.Session) == ["outer"]
        add(anywhere.Session, "and on")
        anywhere.Session.commit()
        assert texts(anywhere.engine) == ["and on", "outer"]
    assert anywhere.durable() == []


def test_an_inner_block_does_not_begin_amid_changes(anywhere):
    with isolated(anywhere.Session):
        add(anywhere.Session, "outer")
        with pytest.raises(IsolationError, match="open that has changed something"), isolated(anywhere.engine):
            pass
        anywhere.Session.commit()
        assert texts(anywhere.Session) == ["outer"]


def test_an_inner_block_after_an_error_in_the_outer_one(on_postgresql):
    with isolated(on_postgresql.Session), another(on_postgresql) as failed:
        refuse(failed)
        with isolated(on_postgresql.engine):
            add(on_postgresql.Session, "1")
            on_postgresql.Session.commit()
        assert texts(on_postgresql.Session) == []
        with pytest.raises(IsolationError, match="current transaction is aborted"):
            texts(failed)
        failed.rollback()
        assert texts(failed) == []


def test_a_transaction_that_has_failed_in_an_inner_block_has_failed_after_it(on_postgresql):
    with isolated(on_postgresql.Session), on_postgresql.engine.connect() as failed:
        transaction = failed.begin()
        with isolated(on_postgresql.engine):
            refuse(failed)
        with pytest.raises(IsolationError, match="current transaction is aborted"):
            texts(failed)
        transaction.rollback()
        assert texts(on_postgresql.Session) == []


def test_an_inner_block_begins_although_a_connection_was_dropped(anywhere):
    with isolated(anywhere.Session):
        connection = anywhere.engine.connect()
        transaction = connection.begin()
        connection.execute(sa.insert(Note), {"text": "undone"})
        del connection, transaction
        gc.collect()
        with isolated(anywhere.engine):
            assert texts(anywhere.engine) == []


def test_an_inner_block_that_loses_the_connection_tells_so(anywhere):
    with told("past SQLAlchemy", anywhere.Session), told("past SQLAlchemy", anywhere.Session):
        anywhere.Session.connection().connection.dbapi_connection.commit()
        add(anywhere.Session, "1")
    assert anywhere.durable() == []


def test_what_an_inner_block_tells_is_told_at_its_end(anywhere):
    with isolated(anywhere.Session):
        with told("let it go on", anywhere.Session), another(anywhere) as first, another(anywhere) as second:
            add(first, "1")
            add(second, "2")
            first.rollback()
        add(anywhere.Session, "3")
        anywhere.Session.commit()
        assert texts(anywhere.Session) == ["3"]


def test_what_happens_after_an_inner_block_is_told(anywhere):
    with told("keep it", anywhere.Session):
        with isolated(anywhere.Session):
            add(anywhere.Session, "1")
        with another(anywhere) as outer, another(anywhere) as inner:
            add(outer, "undone")
            add(inner, "an audit")
            inner.commit()


def test_connections_of_an_inner_block_that_are_left_open(anywhere):
    with isolated(anywhere.Session):
        reader = anywhere.engine.connect()
        texts(reader)
        with isolated(anywhere.Session):
            assert texts(reader) == []
            writer = anywhere.engine.connect()
            writing = writer.begin()
            writer.execute(sa.insert(Note), {"text": "1"})
        assert texts(reader) == []
        with pytest.raises(IsolationError, match="has ended"):
            texts(writer)
        writing.rollback()
        writer.close()
        reader.close()


def test_a_reader_goes_on_after_an_inner_block(anywhere):
    with isolated(anywhere.Session), another(anywhere) as reader:
        assert texts(reader) == []
        with isolated(anywhere.engine):
            assert texts(reader) == []
        add(reader, "undone")
        reader.rollback()
        assert texts(reader) == []
        add(reader, "kept")
        reader.commit()
        assert texts(anywhere.Session) == ["kept"]


@pytest.mark.parametrize("how", ["through SQLAlchemy", "past it"])
def test_what_an_inner_block_has_left_open_holds_nobody_up(anywhere, how):
    with isolated(anywhere.Session, timeout=0.01):
        with isolated(anywhere.Session):
            writer = anywhere.engine.connect()
            writing = writer.begin()
            if how == "past it":
                cursor = raw_cursor(writer)
                cursor.execute("INSERT INTO note (text) VALUES ('1')")
            else:
                writer.execute(sa.insert(Note), {"text": "1"})
        with isolated(anywhere.Session):
            worker = Worker(lambda: texts(anywhere.engine))
            worker.join()
            assert worker.error is None
        writing.rollback()
        writer.close()


# -- the beginning ----------------------------------------------------------------------------------------------------


def test_a_session_in_a_transaction_is_refused(anywhere):
    add(anywhere.Session, "before")
    remedy = "in a transaction already.*commit it, roll it back or remove it"
    with pytest.raises(IsolationError, match=remedy), isolated(anywhere.Session):
        pass
    anywhere.Session.rollback()
    assert anywhere.checked_out == 0
    with isolated(anywhere.Session):
        pass
    anywhere.Session.remove()


@pytest.mark.parametrize("anywhere", ["postgresql", "mariadb"], indirect=True)
def test_a_transaction_from_before_is_not_committed_within(anywhere):
    with another(anywhere) as earlier:
        add(earlier, "before")
        with told("had begun before isolated", anywhere.Session):
            with pytest.raises(IsolationError):
                earlier.commit()
            earlier.rollback()
    assert anywhere.durable() == []


@pytest.mark.parametrize("anywhere", ["postgresql", "mariadb"], indirect=True)
def test_connections_from_before_can_be_used_but_not_committed(anywhere):
    other_level = "REPEATABLE READ" if anywhere.engine.dialect.name == "postgresql" else "READ COMMITTED"
    earlier = anywhere.engine.connect().execution_options(isolation_level=other_level)
    begun = earlier.begin()
    assert texts(earlier) == []
    refused = Session(anywhere.engine, twophase=True)
    add(refused, "refused")
    prepared = Session(anywhere.engine, twophase=True)
    add(prepared, "prepared before")
    prepared.prepare()
    not_begun = anywhere.engine.connect()
    with told("had begun before isolated", anywhere.Session):
        not_begun = not_begun.execution_options(isolation_level=other_level)
        assert not_begun.get_isolation_level() == other_level
        two_phases = not_begun.begin_twophase()
        assert texts(not_begun) == []
        two_phases.rollback()
        not_begun.close()
        assert texts(earlier) == []
        begun.rollback()
        earlier.close()
        with pytest.raises(IsolationError, match="had begun before"):
            refused.prepare()
        refused.rollback()
        prepared.commit()
        with Session(anywhere.engine, twophase=True) as within:
            add(within, "within")
            within.commit()
    assert anywhere.durable() == ["prepared before"]
    with anywhere.engine.connect() as connection:
        assert connection.get_isolation_level() != other_level


@pytest.mark.parametrize("anywhere", ["postgresql", "mariadb"], indirect=True)
def test_what_was_prepared_before_can_be_rolled_back_within(anywhere):
    def are_prepared() -> Any:
        on_postgresql = anywhere.engine.dialect.name == "postgresql"
        ask = "SELECT gid FROM pg_prepared_xacts" if on_postgresql else "XA RECOVER"
        with anywhere.engine.connect() as connection:
            return set(connection.execute(sa.text(ask)).all())

    before = are_prepared()
    with closing(Session(anywhere.engine, twophase=True)) as prepared:
        add(prepared, "before")
        prepared.prepare()
        assert are_prepared() > before
        with isolated(anywhere.engine):
            prepared.rollback()
    assert are_prepared() == before
    assert anywhere.durable() == []


def test_a_dialect_that_was_wrapped_before_is_so_after(anywhere):
    dialect: Any = anywhere.engine.dialect
    with isolated(anywhere.Session):
        add(anywhere.Session, "1")  # a dialect remembers a few things when they are first asked
    kept = {"do_execute": dialect.do_execute, "do_commit": dialect.do_commit}
    for name, original in kept.items():
        setattr(dialect, name, original)
    before = dict(vars(dialect))
    with isolated(anywhere.Session):
        add(anywhere.Session, "1")
        wrapped = dialect.do_execute = partial(dialect.do_execute)
    assert dialect.do_execute is wrapped
    # All that was not wrapped within is as it was.
    assert {name: vars(dialect)[name] for name in before if name != "do_execute"} == {
        name: value for name, value in before.items() if name != "do_execute"
    }
    assert set(vars(dialect)) == set(before)
    for name in kept:
        delattr(dialect, name)


def test_a_dialect_that_was_wrapped_within_the_block_stays_so(anywhere):
    dialect: Any = anywhere.engine.dialect
    calls: list[str] = []
    names = ["do_commit", "do_execute"]
    if dialect.name != "sqlite":
        names += ["do_begin_twophase", "do_prepare_twophase", "do_commit_twophase", "do_rollback_twophase"]

    def wrapper(name: str, original: Any, *args: Any, **options: Any) -> None:
        calls.append(name)
        original(*args, **options)

    with isolated(anywhere.Session):
        for name in names:
            setattr(dialect, name, partial(wrapper, name, getattr(dialect, name)))
    for _ in range(2):
        calls.clear()
        for end in "rollback", "commit":
            with Session(anywhere.engine, twophase=dialect.name != "sqlite") as session:
                session.execute(sa.delete(Note))
                getattr(session, end)()
        assert set(calls) >= set(names) - {"do_commit"}
        assert ("do_commit" in calls) is (dialect.name == "sqlite")
        with isolated(anywhere.Session):
            add(anywhere.Session, "1")
            anywhere.Session.commit()
        assert anywhere.durable() == []
    for name in names:
        delattr(dialect, name)


def test_blocks_of_two_engines_do_not_mix(anywhere, sqlite_url):
    with closing(World(sqlite_url)) as other, isolated(anywhere.Session):
        add(anywhere.Session, "1")
        with isolated(other.Session):
            add(other.Session, "2")
            other.Session.commit()
            anywhere.Session.rollback()
            add(anywhere.Session, "3")
        anywhere.Session.commit()
        assert (texts(anywhere.Session), texts(other.engine)) == (["3"], [])


def test_an_engine_that_is_not_isolated_is_told(sqlite_url, tmp_path):
    with closing(World(sqlite_url)) as world:
        other = sa.create_engine(f"sqlite:///{tmp_path}/other.sqlite")
        Base.metadata.create_all(other)

        class Routing(Session):
            def get_bind(self, mapper: Any = None, **options: Any) -> Any:
                return world.engine if mapper is None else other

        factory = scoped_session(sessionmaker(class_=Routing))
        with told(r"not isolated, of sqlite: pass that, too", factory):
            with pytest.raises(IsolationError):
                add(factory, "1")
            factory.remove()
        with isolated(factory, other, world.engine):
            add(factory, "1")
            factory.commit()
            nobody_s = sa.create_engine("sqlite://")
            with Session(nobody_s) as elsewhere:
                elsewhere.execute(sa.text("SELECT 1"))
            nobody_s.dispose()
        assert texts(other) == []
        other.dispose()


def test_of_all_that_is_told_the_first_is_raised(sqlite_url, tmp_path):
    urls = [sqlite_url, *(sqlite_url.set(database=str(tmp_path / name)) for name in ("second", "third"))]
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(closing(World(url))) for url in urls)

        class Own(Session):
            pass

        factory = sessionmaker(first.engine, class_=Own)
        with told("keep it", factory, second.engine):
            with another(first) as outer, another(first) as inner:
                add(outer, "undone")
                add(inner, "an audit")
                inner.commit()
            with factory(bind=third.engine) as session, pytest.raises(IsolationError, match="is not isolated"):
                texts(session)


def test_a_session_that_is_made_to_ask_for_its_engine_is_closed(sqlite_url):
    closed: list[Session] = []

    class Own(Session):
        def get_bind(self, *args: Any, **options: Any) -> Any:
            return engine

        def close(self) -> None:
            closed.append(self)
            super().close()

    engine = sa.create_engine(sqlite_url)
    with isolated(sessionmaker(class_=Own)):
        assert len(closed) == 1
    engine.dispose()


def test_the_error_is_named_as_it_is_imported():
    from sa_wsgi_session import testing

    for name in testing.__all__:
        assert getattr(testing, name).__module__ == "sa_wsgi_session.testing"


def test_several_binds(database_url, sqlite_url):
    class OtherBase:
        pass

    with (
        closing(World(database_url)) as world,
        closing(World(sqlite_url.set(database=f"{sqlite_url.database}2"))) as other,
    ):
        factory = scoped_session(sessionmaker(binds={Note: world.engine, OtherBase: other.engine}))
        with isolated(factory):
            add(factory, "1")
            factory.execute(sa.insert(Note.__table__), {"text": "2"}, bind_arguments={"bind": other.engine})
            factory.commit()
            assert (texts(world.engine), texts(other.engine)) == (["1"], ["2"])
        assert world.durable() == other.durable() == []


def test_the_engines_of_flask_sqlalchemy_are_found(sqlite_url):
    # Its sessions have their bind from "_db", which knows its engines.
    class Extension:
        engines: ClassVar[dict[Any, Any]] = {}

    class FlaskSession(Session):
        _db = Extension

    with closing(World(sqlite_url)) as world:
        Extension.engines = {None: world.engine, "other": sa.create_engine("sqlite://")}
        with isolated(scoped_session(sessionmaker(class_=FlaskSession))):
            assert all(isinstance(engine.pool, SharedPool) for engine in Extension.engines.values())
            add(world.Session, "1")
            world.Session.commit()
        assert world.durable() == []
        Extension.engines["other"].dispose()


def test_the_engine_of_a_session_without_binds_has_to_be_passed(sqlite_url):
    factory = sessionmaker()
    with (
        pytest.raises(ValueError, match=r"pass its engines, too, as in isolated\(Session, engine\)"),
        isolated(factory),
    ):
        pass
    with closing(World(sqlite_url)) as world:
        block = isolated(factory, world.engine.execution_options(anything=1), world.engine)
        with block, closing(factory(bind=world.engine)) as session:
            add(session, "1")
            session.commit()
        assert world.durable() == []


def test_a_session_that_is_bound_to_a_connection_is_refused(sqlite_url):
    with closing(World(sqlite_url)) as world, world.engine.connect() as connection:
        factory = sessionmaker(connection)
        with pytest.raises(ValueError, match="must not be bound to a Connection"), isolated(factory):
            pass


def test_a_function_that_makes_sessions(sqlite_url):
    with closing(World(sqlite_url)) as world:
        factory = contextual_session(lambda: Session(world.engine))
        with isolated(factory):
            with session_scope(factory) as session:
                add(session, "1")
            with pytest.raises(NoActiveScope):
                factory()
        assert world.durable() == []


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [(None, "None"), ("sqlite://", "an object of type str"), (Session, "an object of type type"), (object(), "")],
)
def test_what_is_no_session_is_refused(wrong, shown):
    with pytest.raises(TypeError, match=f"session must be a scoped_session .*, not {shown}"):
        isolated(wrong)
    with pytest.raises(TypeError, match=f"session must be a scoped_session .*, not {shown}"):
        isolated(sessionmaker(), wrong)


def test_sessions_in_autocommit_are_refused_at_once():
    with pytest.raises(ValueError, match="must not be in autocommit mode"):
        isolated(sessionmaker(autocommit=True))


def test_asynchronous_sessions_are_refused():
    asyncio = pytest.importorskip("sqlalchemy.ext.asyncio")
    with pytest.raises(TypeError, match="synchronous"):
        isolated(sessionmaker(class_=asyncio.AsyncSession))


def test_a_database_that_is_not_supported_is_refused(sqlite_url):
    for name in "oracle", "postgresql":
        engine = sa.create_engine(sqlite_url)
        engine.dialect.name = name
        with pytest.raises(ValueError, match=rf"not {name}\+pysqlite"), isolated(engine):
            pass


@pytest.mark.parametrize("timeout", [-1, 1_000_001, float("nan"), float("inf")])
def test_a_wrong_timeout(timeout):
    with pytest.raises(ValueError, match="timeout must be a number of seconds, 0 or more, not"):
        isolated(sessionmaker(), timeout=timeout)


@pytest.mark.parametrize("timeout", [0, 0.5, 1_000_000])
def test_the_least_and_the_longest_timeout(sqlite_url, timeout):
    with closing(World(sqlite_url)) as world, isolated(world.engine, timeout=timeout):
        assert texts(world.engine) == []


def test_the_timeout_is_ten_seconds_if_none_is_given():
    assert inspect.signature(isolated).parameters["timeout"].default == 10


@pytest.mark.parametrize("timeout", ["1", True, None])
def test_a_timeout_of_a_wrong_type(timeout):
    with pytest.raises(TypeError, match="timeout must be a number of seconds"):
        isolated(sessionmaker(), timeout=timeout)


def test_each_block_is_used_once_at_a_time(sqlite_url):
    with closing(World(sqlite_url)) as world:
        block = isolated(world.Session)
        with pytest.raises(RuntimeError, match="not in use"):
            block.__exit__(None, None, None)
        with block:
            with pytest.raises(RuntimeError, match="in use already"), block:
                pass
            assert texts(world.Session) == []
        with block:
            add(world.Session, "1")
            world.Session.commit()
        assert world.durable() == []


def test_a_block_that_has_told_something_can_be_used_again(sqlite_url):
    with closing(World(sqlite_url)) as world:
        block = isolated(world.Session)
        with pytest.raises(IsolationError, match="keep it"), block, another(world) as outer, another(world) as inner:
            add(outer, "undone")
            add(inner, "an audit")
            inner.commit()
            inner.close()
            outer.rollback()
        with block:
            assert texts(world.Session) == []


def test_if_the_second_engine_fails_the_first_is_given_back(sqlite_url, tmp_path):
    with closing(World(sqlite_url)) as world:
        unreachable = sa.create_engine(f"sqlite:///{tmp_path}/none/such.sqlite")
        pool = world.engine.pool
        with pytest.raises(Exception, match="unable to open"), isolated(world.Session, unreachable):
            pass
        assert world.engine.pool is pool
        assert world.checked_out == 0


# -- the end ----------------------------------------------------------------------------------------------------------


def test_everything_is_put_back(anywhere):
    def state() -> Any:
        return anywhere.engine.pool, {name: id(value) for name, value in vars(anywhere.engine.dialect).items()}

    with isolated(anywhere.Session):
        add(anywhere.Session, "1")  # a dialect remembers a few things when they are first asked
        anywhere.Session.commit()
    pool, attributes = state()
    with isolated(anywhere.Session):
        add(anywhere.Session, "1")
        anywhere.Session.commit()
        assert anywhere.engine.pool is not pool
    assert state() == (pool, attributes)
    assert anywhere.checked_out == 0


@pytest.mark.parametrize("anywhere", [*DATABASES, "postgresql+psycopg2"], indirect=True)
def test_a_connection_is_given_back_in_no_transaction(anywhere):
    # Even to a pool that does not see to that.
    engine = sa.create_engine(anywhere.engine.url, poolclass=QueuePool, pool_reset_on_return=None)
    with isolated(engine), engine.begin() as connection:
        connection.execute(sa.insert(Note), {"text": "undone"})
    raw: Any = engine.raw_connection()
    driver = raw.dbapi_connection
    if engine.dialect.name == "sqlite":
        assert not driver.in_transaction
    elif engine.dialect.name == "postgresql":
        assert driver.info.transaction_status == 0
    else:
        assert not driver.server_status & SERVER_STATUS.SERVER_STATUS_IN_TRANS
    raw.close()
    engine.dispose()


def test_sessions_that_were_left_open_are_closed(anywhere):
    with isolated(anywhere.Session):
        mine = anywhere.Session()
        add(mine, "1")
        other = anywhere.Session.session_factory()
        kept = note("2")
        other.add(kept)
        other.flush()
    assert not mine.in_transaction()
    assert not other.in_transaction()
    assert kept not in other
    assert not anywhere.Session.registry.has()
    assert anywhere.durable() == []


def test_what_the_end_itself_rolls_back_is_not_told(anywhere):
    with isolated(anywhere.Session):
        outer = anywhere.Session()
        add(outer, "left open")
        with another(anywhere) as inner:
            add(inner, "an audit")
            inner.commit()
        assert texts(outer) == ["an audit", "left open"]
    assert not outer.in_transaction()
    assert anywhere.durable() == []


def test_a_session_from_before_keeps_its_objects(anywhere):
    anywhere.insert("before")
    found: Any = anywhere.Session.execute(sa.select(Note)).scalars().one()
    anywhere.Session.commit()
    session = anywhere.Session()
    with isolated(anywhere.Session):
        assert anywhere.Session() is session
        found.text = "changed"
        anywhere.Session.commit()
        anywhere.Session.begin_nested()
        add(anywhere.Session, "new")
    assert anywhere.Session() is session
    assert found.text == "before"
    anywhere.Session.remove()


def test_what_a_session_from_before_has_kept_is_read_anew(sqlite_url):
    with closing(World(sqlite_url, expire_on_commit=False)) as world:
        world.insert("before")
        found: Any = world.Session.execute(sa.select(Note)).scalars().one()
        world.Session.commit()
        with isolated(world.Session):
            found.text = "changed"
            world.Session.commit()
            assert found.text == "changed"
        assert found.text == "before"
        world.Session.remove()


def test_a_scope_that_has_ended_is_logged(sqlite_url, caplog):
    scopes = [1]
    with closing(World(sqlite_url)) as world:
        session = scoped_session(sessionmaker(world.engine), scopefunc=lambda: scopes[0])
        with isolated(session):
            add(session, "1")
            scopes.clear()
        assert "removing the session failed: IndexError" in caplog.text
        assert world.durable() == []


def test_only_the_sessions_that_were_made_in_the_block_are_removed(sqlite_url, tmp_path):
    with closing(World(sqlite_url)) as first, closing(World(sqlite_url.set(database=str(tmp_path / "2")))) as second:
        kept = first.Session()
        with isolated(first.Session, second.Session):
            assert texts(first.Session) == texts(second.Session) == []
        assert first.Session() is kept
        assert not second.Session.registry.has()
        first.Session.remove()


def test_a_session_that_cannot_be_closed_is_logged(sqlite_url, caplog):
    class Stubborn(Session):
        def close(self) -> None:
            raise ZeroDivisionError

    with closing(World(sqlite_url, class_=Stubborn)) as world:
        with isolated(world.engine):
            stubborn = world.Session()
            texts(stubborn)
        assert not stubborn.in_transaction()
        assert "closing a session failed; its connection is discarded: ZeroDivisionError" in caplog.text
        world.Session.registry.clear()
        assert world.checked_out == 0


def test_connections_that_were_left_open_are_of_no_use(anywhere):
    with isolated(anywhere.Session):
        connection = anywhere.engine.connect()
        transaction = connection.begin()
        connection.execute(sa.insert(Note), {"text": "1"})
    with pytest.raises(IsolationError, match="after the block had ended"):
        texts(connection)
    with pytest.raises(IsolationError, match="after the block had ended"):
        connection.connection.commit()
    transaction.rollback()
    connection.close()
    assert anywhere.durable() == []


def test_a_pool_that_was_kept_is_of_no_use(sqlite_url):
    with closing(World(sqlite_url)) as world:
        with isolated(world.engine):
            pool = world.engine.pool
        with pytest.raises(IsolationError, match="after the block had ended"):
            pool.connect()


def test_a_policy_that_was_made_within_the_block_works_after_it(sqlite_url):
    # The first policy of a process has each dialect tell of its commits: it must not be undone at the block's end.
    import subprocess

    code = """
import sqlalchemy as sa
from sqlalchemy.orm import scoped_session, sessionmaker
from sa_wsgi_session import RetryPolicy, with_session
from sa_wsgi_session.testing import isolated
from tests.support import Base, Note, note
engine = sa.create_engine(URL)
Base.metadata.create_all(engine)
Session = scoped_session(sessionmaker(engine))
attempts = []
def make():
    @with_session(Session, retry=RetryPolicy(delay=0, is_transient=lambda error: True))
    def job(*, session):
        attempts.append(1)
        session.add(note(str(len(attempts))))
        session.commit()
        raise LookupError
    return job
for _ in range(2):
    with isolated(Session):
        job = make()
        try:
            job()
        except LookupError:
            pass
    try:
        job()
    except LookupError:
        pass
assert len(attempts) == 4, attempts
with engine.connect() as connection:
    assert list(connection.execute(sa.select(Note.text)).scalars()) == ["2", "4"]
engine.dispose()
"""
    subprocess.run([sys.executable, "-c", f"URL = {str(sqlite_url)!r}\n{code}"], check=True)


# -- the pool, as the application sees it -----------------------------------------------------------------------------


@pytest.mark.parametrize("anywhere", ["postgresql", "mariadb"], indirect=True)
def test_listeners_to_the_pool_are_called(anywhere):
    calls: list[str] = []
    names = ("checkout", "checkin", "reset", "invalidate")
    listeners = {name: partial(lambda name, *args: calls.append(name), name) for name in names}

    def execute(connection: Any, *more: Any) -> None:
        connection.cursor().execute("INSERT INTO note (text) VALUES ('undone')")
        connection.rollback()

    with isolated(anywhere.Session), ExitStack() as stack:
        for name, listener in listeners.items():
            event.listen(anywhere.engine, name, listener)
            stack.callback(event.remove, anywhere.engine, name, listener)
        event.listen(anywhere.engine, "reset", execute)
        stack.callback(event.remove, anywhere.engine, "reset", execute)
        with anywhere.engine.connect() as connection:
            assert texts(connection) == []
        assert calls == ["checkout", "reset", "checkin"]
        with anywhere.engine.connect() as connection:
            connection.invalidate()
        assert calls[3:] == ["checkout", "invalidate"]
        assert texts(anywhere.Session) == []
        anywhere.Session.remove()
        calls.clear()
    assert calls == []


def test_listeners_to_reset_are_told_the_same_as_without(anywhere):
    # (SQLAlchemy 1.4 tells them nothing more than which connection it is.)
    states: list[Any] = []

    def listener(*connection_record_and_state: Any) -> None:
        states.append(connection_record_and_state[2:])

    def use() -> list[Any]:
        states.clear()
        with anywhere.engine.connect() as connection:
            texts(connection)
        with anywhere.engine.connect() as connection, connection.begin():
            texts(connection)
        anywhere.engine.connect().close()
        anywhere.engine.raw_connection().close()
        return states.copy()

    event.listen(anywhere.engine, "reset", listener)
    without = use()
    with isolated(anywhere.engine):
        within = use()
    event.remove(anywhere.engine, "reset", listener)
    assert within == without
    assert len(within) == 4


def test_records_of_connections_are_there_for_listeners(anywhere):
    found: list[Any] = []

    def number(driver: Any, record: Any) -> None:
        record.info["number"] = 7

    def look(driver: Any, record: Any, proxy: Any) -> None:
        found.append((record.info["number"], proxy.info["number"], record.in_use, record.starttime))
        assert record.dbapi_connection is record.driver_connection is proxy.dbapi_connection
        assert record.record_info is proxy.record_info
        record.record_info["mine"] = len(found)

    engine = sa.create_engine(anywhere.engine.url, poolclass=QueuePool)
    event.listen(engine, "connect", number)
    event.listen(engine, "checkout", look)
    engine.connect().close()
    with isolated(engine), engine.connect() as first, engine.connect() as second:
        assert [each.connection.record_info for each in (first, second)] == [{"mine": 3}, {"mine": 4}]
        assert first.connection.info is second.connection.info
    assert found == [found[0]] * 4
    engine.dispose()


def test_a_record_that_is_invalidated_gives_its_own_transaction_up(anywhere):
    invalidated: list[Any] = []
    event.listen(anywhere.engine, "invalidate", lambda driver, record, error: invalidated.append((record, error)))
    with isolated(anywhere.Session):
        add(anywhere.Session, "kept")
        with anywhere.engine.connect() as connection:
            record: Any = connection.connection._connection_record
            record.invalidate(soft=True)
            assert texts(connection) == ["kept"]
            error = ZeroDivisionError()
            record.invalidate(error)
            assert invalidated == [(record, error)]
            assert anywhere.engine.pool.checkedout() == 1
        record.invalidate()
        assert len(invalidated) == 1
        anywhere.Session.commit()
        assert texts(anywhere.Session) == ["kept"]
    anywhere.engine.dispose()


def test_a_lease_is_given_back_once(anywhere):
    calls: list[str] = []
    for name in "checkin", "reset", "invalidate":
        event.listen(anywhere.engine, name, partial(lambda name, *args: calls.append(name), name))
    with isolated(anywhere.Session):
        leases = [anywhere.engine.raw_connection() for _ in range(2)]
        assert anywhere.engine.pool.checkedout() == 2
        for _ in range(2):
            leases[0].close()
            leases[1].invalidate()
            assert anywhere.engine.pool.checkedout() == 0
        assert [lease.is_valid for lease in leases] == [False, False]
        assert calls == ["reset", "checkin", "invalidate"]
    anywhere.engine.dispose()


def test_listeners_come_and_go_as_ever(sqlite_url):
    calls: list[str] = []

    def listener(name: str) -> Callable[..., None]:
        return lambda *args: calls.append(name)

    before, within = listener("before"), listener("within")
    with closing(World(sqlite_url)) as world:
        event.listen(world.engine, "checkout", before)
        with isolated(world.engine):
            event.listen(world.engine, "checkout", within)
            calls.clear()
            world.engine.connect().close()
            assert calls == ["before", "within"]
        calls.clear()
        world.engine.connect().close()
        assert calls == ["before", "within"]


def test_a_listener_that_fails_at_checkout(sqlite_url):
    with closing(World(sqlite_url)) as world:
        error: Exception = ZeroDivisionError()

        def refuse_it(*args: Any) -> None:
            raise error

        with isolated(world.engine):
            event.listen(world.engine, "checkout", refuse_it)
            with pytest.raises(ZeroDivisionError):
                world.engine.connect()
            assert world.checked_out == 0
        event.remove(world.engine, "checkout", refuse_it)
        with told("found its connection lost", world.engine):
            error = DisconnectionError()
            event.listen(world.engine, "checkout", refuse_it)
            with pytest.raises(IsolationError):
                world.engine.connect()
            assert world.checked_out == 0
        event.remove(world.engine, "checkout", refuse_it)


def test_the_pool_in_the_meantime(sqlite_url):
    engine = sa.create_engine(sqlite_url, poolclass=sa.pool.QueuePool, pool_size=3, pool_reset_on_return="commit")
    Base.metadata.create_all(engine)
    with isolated(engine):
        connection = engine.connect()
        pool: Any = engine.pool
        assert connection.info == {}
        assert connection.connection.record_info == {}
        assert connection.connection.is_valid
        assert not connection.connection.is_detached
        assert connection.connection.driver_connection is connection.connection.dbapi_connection
        assert connection.connection.connection is connection.connection.dbapi_connection
        assert connection.connection.in_transaction
        record: Any = connection.connection._connection_record
        assert record.dbapi_connection is record.driver_connection is connection.connection.dbapi_connection
        assert record.in_use
        assert 0 < record.starttime <= time.time()
        assert (pool.checkedout(), pool.size()) == (1, 3)
        assert engine.pool.status() == "SharedPool of isolated(): 1 tenants of one connection"
        proxy = connection.connection
        connection.close()
        proxy.close()
        assert not proxy.is_valid
        assert proxy.record_info is None
        with pytest.raises(AttributeError):
            pool.none_such  # noqa: B018
        raw = engine.raw_connection()
        raw.cursor().execute("INSERT INTO note (text) VALUES ('committed by the pool')")
        raw.close()
        engine.dispose()
        assert texts(engine) == ["committed by the pool"]
    assert texts(engine) == []
    engine.dispose()
