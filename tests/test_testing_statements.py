"""``count_statements()``: what was sent, and how a guard fails."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sa_wsgi_session import contextual_session, session_scope
from sa_wsgi_session.testing import Statements, count_statements, isolated
from tests.support import Base, Note, World, note, request, respond, serve


@pytest.fixture
def notes(world: World) -> World:
    """A world with three notes."""
    world.insert("a", "b", "c")
    with world.engine.connect():
        pass
    return world


def load_one_by_one(session: Any) -> list[bytes]:
    return [session.get(Note, number).text.encode() for number in (1, 2, 3)]


def test_what_a_request_sends_is_counted(notes):
    with count_statements(notes.engine) as statements:
        request(serve(notes, lambda: load_one_by_one(notes.Session)))
    assert isinstance(statements, Statements)
    assert len(statements) == 3
    assert statements[0].startswith("SELECT note.id")
    assert statements[:2] == list(statements)[:2]
    assert [*reversed(statements)][-1] in statements
    request(serve(notes, lambda: load_one_by_one(notes.Session)))
    assert len(statements) == 3


def test_a_guard_that_holds_says_nothing(notes):
    with count_statements(notes.engine) as statements:
        statements.exactly(0)
        load_one_by_one(notes.Session)
        statements.exactly(3)
        statements.at_most(3)
        statements.at_most(4)
    notes.Session.remove()


@pytest.mark.parametrize("guard", ["exactly", "at_most"])
def test_a_guard_that_fails_points_at_the_test(notes, guard):
    with count_statements(notes.engine) as statements:
        load_one_by_one(notes.Session)
    notes.Session.remove()
    with pytest.raises(AssertionError) as failed:
        getattr(statements, guard)(1)
    assert len(failed.traceback) == 2
    assert [entry.name for entry in failed.traceback.filter(failed)] == ["test_a_guard_that_fails_points_at_the_test"]


def test_a_guard_that_fails_lists_the_statements(notes):
    with count_statements(notes.engine) as statements:
        notes.Session.execute(sa.text("SELECT count(*)\n  FROM note"))
        load_one_by_one(notes.Session)
    notes.Session.remove()
    with pytest.raises(AssertionError) as failed:
        statements.at_most(2)
    first, second, third = str(failed.value).split("\n")
    assert first == "expected at most 2 statements, but there were 4:"
    assert second == "  1. SELECT count(*) FROM note"
    assert third.startswith("  3 times (2, 3, 4): SELECT note.id")
    assert third.endswith("FROM note WHERE note.id = ?")
    with pytest.raises(AssertionError, match="expected exactly 1 statement, but there were 4:\n"):
        statements.exactly(1)


def test_guards_of_one_and_of_none(notes):
    with count_statements(notes.engine) as statements:
        with pytest.raises(AssertionError, match=r"^expected exactly 1 statement, but there was none$"):
            statements.exactly(1)
        notes.Session.execute(sa.text("SELECT 1"))
        with pytest.raises(AssertionError, match=r"^expected at most 0 statements, but there was 1:\n  1. SELECT 1$"):
            statements.at_most(0)
    notes.Session.remove()


@pytest.mark.parametrize(("times", "more"), [(10, ""), (11, ", …"), (12, ", …")])
def test_a_long_list_is_cut(notes, times, more):
    with count_statements(notes.engine) as statements:
        for _ in range(times):
            notes.Session.execute(sa.text("SELECT 1"))
    notes.Session.remove()
    assert str(statements) == f"  {times} times (1, 2, 3, 4, 5, 6, 7, 8, 9, 10{more}): SELECT 1"


@pytest.mark.parametrize(("length", "shown"), [(80, 80), (81, 79), (82, 79)])
def test_a_long_statement_is_cut_in_the_one_line(notes, length, shown):
    statement = "SELECT 1 -- ".ljust(length, "x")
    with count_statements(notes.engine) as statements:
        notes.Session.execute(sa.text(statement))
    notes.Session.remove()
    assert repr(statements) == f"<1 statement: {statement[:shown]}{'' if shown == length else '…'}>"


def test_a_plain_assert_shows_the_statements_in_one_line(notes):
    with count_statements(notes.engine) as statements:
        assert repr(statements) == "<0 statements>"
        notes.Session.execute(sa.text("SELECT 1 WHERE " + " AND ".join(["1 = 1"] * 20)))
        load_one_by_one(notes.Session)
    notes.Session.remove()
    shown = repr(statements)
    assert shown.startswith("<4 statements: 3x SELECT … FROM note WHERE note.id = ?; SELECT 1 WHERE 1 = 1 AND")
    assert shown.endswith("…>")
    assert len(shown) < 200


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        (0, "<0 statements>"),
        (1, "<1 statement: SELECT 1>"),
        (2, "<2 statements: 2x SELECT 1>"),
        (3, "<3 statements: 3x SELECT 1>"),
    ],
)
def test_the_one_line_says_how_often_each_was_sent(notes, times, shown):
    with count_statements(notes.engine) as statements, notes.engine.connect() as connection:
        for _ in range(times):
            connection.execute(sa.text("SELECT 1"))
    assert repr(statements) == shown


def test_parameters_are_shown_only_where_that_is_asked_for(notes):
    for parameters in False, True:
        with count_statements(notes.engine, parameters=parameters) as statements:
            load_one_by_one(notes.Session)
            notes.Session.execute(sa.select(Note.id).where(Note.text == "secret"))
            notes.Session.connection().exec_driver_sql("SELECT 2", execution_options={"no_parameters": True})
        notes.Session.remove()
        assert str(statements).endswith("SELECT 2\n       5: ()" if parameters else "SELECT 2")
        with pytest.raises(AssertionError) as failed:
            statements.exactly(0)
        assert ("secret" in str(failed.value)) is parameters
        assert ("\n       2: (2,)\n" in str(failed.value)) is parameters
        assert "secret" not in repr(statements)


def test_many_at_once_are_one(notes):
    with count_statements(notes.engine) as statements, notes.engine.begin() as connection:
        connection.execute(sa.insert(Note), [{"text": "d"}, {"text": "e"}])
    statements.exactly(1)


def test_transactions_are_not_counted(notes):
    counts = []
    for block in count_statements(notes.engine), isolated(notes.engine):
        with block as statements:
            if not isinstance(statements, Statements):
                continue
            with session_scope(notes.Session) as session:
                session.add(note("d"))
                with session_scope(notes.Session, propagation="nested"):
                    session.add(note("e"))
            counts.append(len(statements))
    with isolated(notes.engine), count_statements(notes.engine) as statements, session_scope(notes.Session) as session:
        session.add(note("f"))
        with session_scope(notes.Session, propagation="nested"):
            session.add(note("g"))
    assert [*counts, len(statements)] == [2, 2]
    with notes.engine.begin() as connection, count_statements(notes.engine) as statements:
        connection.execute(sa.text("SELECT 1 -- " + "COMMIT " * 1000))
    statements.exactly(1)


def test_blocks_count_each_for_itself(notes):
    with count_statements(notes.engine) as outer:
        load_one_by_one(notes.Session)
        notes.Session.expunge_all()
        elsewhere = sa.create_engine("sqlite://")
        with count_statements(notes.engine) as inner, count_statements(elsewhere) as other:
            load_one_by_one(notes.Session)
        elsewhere.dispose()
    notes.Session.remove()
    assert (len(outer), len(inner), len(other)) == (6, 3, 0)


def test_connections_that_are_open_already_and_other_threads_are_counted(notes):
    connection = notes.engine.connect()
    connection.execute(sa.text("SELECT 1"))
    with count_statements(notes.engine.execution_options(logging_token="x")) as statements:
        connection.execute(sa.text("SELECT 2"))
        thread = threading.Thread(target=request, args=(serve(notes, lambda: load_one_by_one(notes.Session)),))
        thread.start()
        thread.join()
    connection.close()
    statements.exactly(4)


def test_what_an_engine_asks_at_its_first_connection_is_not_counted(database_url):
    engine = sa.create_engine(database_url)
    with count_statements(engine) as statements, engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
    assert list(statements) == ["SELECT 1"]
    engine.dispose()


@pytest.mark.parametrize("kind", ["scoped", "sessionmaker", "contextual", "session", "class"])
def test_any_session(sqlite_url: URL, kind):
    engine = sa.create_engine(sqlite_url)
    Base.metadata.create_all(engine)

    class Own(Session):
        def get_bind(self, *args: Any, **options: Any) -> Any:
            return engine

    factory = sessionmaker(engine)
    session = factory()
    source: Any = {
        "scoped": scoped_session(factory),
        "sessionmaker": factory,
        "contextual": contextual_session(factory),
        "session": session,
        "class": Own(),
    }[kind]
    with count_statements(source) as statements:
        session.execute(sa.text("SELECT 1"))
    session.close()
    engine.dispose()
    statements.exactly(1)


def test_what_has_no_engine_is_refused(sqlite_url):
    with pytest.raises(ValueError, match="the engine of the session cannot be told"):
        count_statements(sessionmaker())
    for wrong in None, "sqlite://":
        with pytest.raises(TypeError, match="session must be a scoped_session"):
            count_statements(wrong)


def test_asynchronous_sessions_are_refused():
    asyncio = pytest.importorskip("sqlalchemy.ext.asyncio")
    for wrong in sessionmaker(class_=asyncio.AsyncSession), asyncio.AsyncSession:
        with pytest.raises(TypeError, match="synchronous"):
            count_statements(wrong)


def test_each_block_is_used_once_at_a_time(notes):
    block = count_statements(notes.engine)
    for _ in range(2):
        with block as statements:
            with pytest.raises(RuntimeError, match="in use already"), block:
                pass
            notes.Session.execute(sa.text("SELECT 1"))
        statements.exactly(1)
        notes.Session.remove()


def test_an_application_without_n_plus_one(notes):
    app = serve(notes, lambda: [text.encode() for text in notes.Session.execute(sa.select(Note.text)).scalars()])
    with count_statements(notes.Session) as statements:
        assert request(app).content == b"abc"
    statements.at_most(1)
    assert request(respond(lambda: [b""])).content == b""
