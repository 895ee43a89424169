"""``docs/``: every Python block is run, and does what the text around it says.

``docs/migrating.rst`` needs the frameworks that it tells of: ``frameworks/test_migrating.py``.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import sqlalchemy as sa
from docutils import nodes
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError, PendingRollbackError
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.orm.exc import DetachedInstanceError
from sqlalchemy.pool import QueuePool

from sa_wsgi_session import (
    NoActiveScope,
    RetryPolicy,
    RollbackOnlyError,
    SessionMiddleware,
    contextual_session,
    current_scope,
    session_scope,
)
from tests.reading import FIRST, ROOT, Reader, Rival, Sections, blocks, parse, reader, visit
from tests.support import Exchange, respond

__all__ = ["reader"]  # the fixture

IDEAS, STREAMING, JOBS, RETRIES = "docs/ideas.rst", "docs/streaming.rst", "docs/jobs.rst", "docs/retries.rst"
DATABASES, PRODUCTION, TUTORIAL = "docs/databases.rst", "docs/production.rst", "docs/tutorial.rst"
OBSERVING, QUESTIONS, REPLICAS = "docs/observing.rst", "docs/questions.rst", "docs/replicas.rst"

section = Sections(IDEAS, STREAMING, JOBS, RETRIES, DATABASES, PRODUCTION, TUTORIAL, OBSERVING, QUESTIONS, REPLICAS)

#: Who runs the blocks of the other pages.
ELSEWHERE = {
    "docs/frameworks.rst": "tests/frameworks",  # it is made of the READMEs of the examples
    "docs/migrating.rst": "tests/frameworks/test_migrating.py",
    "docs/paste.rst": "tests/test_paste.py",
    "docs/testing.rst": "tests/test_testing_docs.py",
}


def test_every_python_block_is_run_by_a_test():
    section.check()
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.rst")}
    assert {page for page in pages if blocks(page)} <= {*section.documents, *ELSEWHERE}
    for place in ELSEWHERE.values():
        assert (ROOT / place).exists()


def test_the_figures_are_well_formed_have_words_for_who_cannot_see_them_and_a_dark_form():
    drawn = {path.name for path in (ROOT / "docs").glob("*.svg")}
    shown = set()
    for path in sorted((ROOT / "docs").glob("*.rst")):
        for image in parse(f"docs/{path.name}").findall(nodes.image):
            assert image["alt"], path
            shown.add(image["uri"])
    assert drawn <= shown
    for name in drawn:
        figure = ElementTree.parse(ROOT / "docs" / name).getroot()
        texts = {child.tag.rpartition("}")[2]: (child.text or "").strip() for child in figure}
        assert figure.tag == "{http://www.w3.org/2000/svg}svg"
        assert texts["title"]
        assert texts["desc"]
        assert "prefers-color-scheme: dark" in (ROOT / "docs" / name).read_text("utf-8")


# -- docs/ideas.rst ----------------------------------------------------------------------------------------------------


@section(IDEAS, "Rollback-only, and doom")
def test_half_of_the_work_is_never_kept(reader, capsys):
    reader.run()
    assert capsys.readouterr().out.endswith("because of a guest needs a name\n")
    assert reader.guests() == set()


@section(IDEAS, "Callbacks")
def test_a_callback_has_a_unit_of_work_of_its_own(reader):
    reader.run()
    assert visit(reader.wrap("bring_a_friend"), QUERY_STRING="Ada").status == "200 OK"
    assert reader.guests() == {"Ada", "a friend of Ada"}
    with pytest.raises(IntegrityError):
        visit(reader.wrap("bring_a_friend"), QUERY_STRING="Ada")
    assert reader.guests() == {"Ada", "a friend of Ada"}


@section(IDEAS, "Which session")
def test_a_contextual_session_is_strict(reader, capsys):
    reader.run()
    assert "no unit of work is active here" in capsys.readouterr().out


def test_only_while_a_unit_of_work_is_open_commit_at_can_be_set_and_only_until_it_has_ended_can_it_be_used(
    reader_of_readme,
):
    reader = reader_of_readme
    scopes = []

    def view(environ: Any, start_response: Any) -> Any:
        scopes.append(current_scope())
        current_scope().commit_at = "end"
        start_response("200 OK", [])
        return body()

    def body() -> Iterator[bytes]:
        with pytest.raises(RuntimeError, match="after its response had begun"):
            current_scope().commit_at = "start"
        current_scope().on_commit(lambda: None)
        yield b""

    visit(SessionMiddleware(view, reader["Session"]))
    [scope] = scopes
    with pytest.raises(NoActiveScope):
        scope.session  # noqa: B018
    with pytest.raises(NoActiveScope):
        scope.on_commit(lambda: None)
    with pytest.raises(NoActiveScope):
        scope.doom("too late")


@pytest.mark.parametrize("make", [scoped_session, contextual_session])
def test_the_table_of_where_which_session_is(reader_of_readme, make):
    Session = make(sessionmaker(reader_of_readme["engine"]))
    contextual = make is contextual_session
    seen: list[Any] = []

    def ask() -> Any:
        """The session that is here; ``None`` where there is none to be had."""
        try:
            session = Session()
        except NoActiveScope:
            return None
        try:
            current_scope(Session)
        except NoActiveScope:
            Session.remove()  # as one has to
        return session

    def in_thread(run: Callable[[Callable[[], Any]], Any] = lambda function: function()) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(run(ask)))
        thread.start()
        thread.join()
        return found[0]

    async def in_task() -> Any:
        async def task() -> Any:
            return Session()

        return await asyncio.create_task(task())

    def view(environ: Any, start_response: Any) -> Any:
        own = Session()
        current_scope(Session).on_commit(lambda: seen.append(ask()))
        with session_scope(Session) as joined, session_scope(Session, propagation="requires_new") as independent:
            seen.extend([joined is own, independent is own, Session() is independent])
        other = in_thread()
        seen.append(None if other is None else other is own)
        context = contextvars.copy_context()
        seen.append(in_thread(context.run) is own)
        seen.append(asyncio.run(in_task()) is own)
        start_response("200 OK", [])
        return body(own)

    def body(own: Any) -> Iterator[bytes]:
        try:
            seen.append(Session() is own)
            yield b"chunk"
        finally:
            seen.append(Session() is own)

    exchange = Exchange(SessionMiddleware(view, Session))
    callback = seen.pop()
    assert (callback is None) == contextual
    # joined, independent, bound in it; in a thread; in a thread with the context; in a task
    assert seen == [True, False, True, None if contextual else False, contextual, True]
    exchange.next()
    assert not Session.registry.has()
    assert (ask() is None) == contextual
    exchange.close()
    assert seen[6:] == [True, True]


@pytest.fixture
def reader_of_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Somebody who has typed in the smallest example, and nothing else."""
    monkeypatch.chdir(tmp_path)
    reader = Reader(*FIRST)
    reader.run()
    yield reader
    reader.finish()


# -- docs/streaming.rst ------------------------------------------------------------------------------------------------


@section(STREAMING, "Two transactions")
def test_a_body_has_a_transaction_of_its_own(reader):
    reader.run()
    exchange = Exchange(reader["application"])
    assert exchange.status == "200 OK"
    assert reader.guests() == {"first"}
    exchange.close()
    assert reader.guests() == {"first"}
    with reader["engine"].begin() as connection:
        connection.execute(sa.text("DELETE FROM guests"))
    visit(reader["application"])
    assert reader.guests() == {"first", "last"}

    def refuse(environ: Any, start_response: Any) -> Any:
        return reader["reception"](environ, lambda status, headers: start_response("400 Bad Request", headers))

    with reader["engine"].begin() as connection:
        connection.execute(sa.text("DELETE FROM guests"))
    visit(SessionMiddleware(refuse, reader["Session"]))
    assert reader.guests() == set()


@section(STREAMING, "Rows that the body reads")
def test_a_large_export(reader):
    names = [f"{number:04}" for number in range(1000)]
    reader.insert(*names)
    reader.run()
    assert visit(reader.wrap("export")).content.decode().split() == names

    def error_page(environ: Any, start_response: Any) -> Any:
        return reader["export"](environ, lambda status, headers: start_response("404 Not Found", headers))

    page = visit(SessionMiddleware(error_page, reader["Session"]))
    assert (page.status, page.content.decode().split()) == ("404 Not Found", names)

    # What the text says of the ORM without yield_per.
    Session, connections = reader["Session"], set()
    sa.event.listen(reader["engine"], "checkout", lambda _, record, proxy: connections.add(record))
    sa.event.listen(reader["engine"], "checkin", lambda _, record: connections.discard(record))
    for options, held in ({"yield_per": 100}, 1), ({}, 0):

        def peeped(environ: Any, start_response: Any, options: Any = options) -> Any:
            start_response("200 OK", [])
            for name in Session.execute(sa.select(reader["Guest"].name).execution_options(**options)).scalars():
                yield name.encode()

        exchange = Exchange(SessionMiddleware(peeped, Session))
        assert len(connections) == held
        assert len(exchange.read()) == 4 * 1000
        assert not connections


@section(STREAMING, 'commit_at = "end"')
def test_one_transaction_for_view_and_body(reader, caplog):
    reader.insert("Ada", "Grace")
    reader.run()
    exchange = Exchange(reader.wrap("stamp"))
    assert (exchange.status, exchange.next()) == ("200 OK", b"Ada\n")
    assert "stamped" not in reader.guests()
    assert exchange.read() == b"Grace\n"
    assert "stamped" in reader.guests()
    assert caplog.text == ""

    with pytest.raises(IntegrityError):  # after the status: the transfer breaks off
        visit(reader.wrap("stamp"))


@section(STREAMING, "Objects that the body renders")
def test_the_body_renders_what_the_view_has_loaded(reader):
    reader.insert("Ada", "Grace")
    reader.run()
    statements: list[str] = []

    def count(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
        statements.append(statement)

    def respond(body: Callable[[Any], Any]) -> Any:
        def view(environ: Any, start_response: Any) -> Any:
            guests = reader["Session"].execute(sa.select(reader["Guest"]).order_by(sa.text("rowid"))).scalars().all()
            reader["Session"].add(reader["Guest"](name=environ["PATH_INFO"]))
            start_response("200 OK", [])
            return body(guests)

        return SessionMiddleware(view, reader["Session"])

    sa.event.listen(reader["engine"], "before_cursor_execute", count)
    render = respond(lambda guests: (f"{guest.name}\n".encode() for guest in guests))
    assert visit(render, "/1").content == b"Ada\nGrace\n"
    assert len(statements) == 2  # the view's SELECT and INSERT
    statements.clear()
    assert visit(respond(reader["current_names"]), "/2").content == b"Ada\nGrace\n/1\n"
    assert len(statements) == 2 + 3


def test_the_table_of_what_is_detected_is_right(sqlite_url: URL):
    from sa_wsgi_session._watching import Effect, effect_of

    for statement in "WITH x AS (INSERT INTO t) SELECT 1", "SELECT 1 INTO t", "CREATE TABLE t (i int)", "CALL p()":
        assert effect_of(statement) is not Effect.READS, statement
    for statement in "SELECT 1 FROM t FOR UPDATE", "SELECT setval('s', 1)":
        assert effect_of(statement) is Effect.READS, statement


# -- docs/retries.rst --------------------------------------------------------------------------------------------------


@section(RETRIES, "Lost races")
def test_lost_races_of_requests_and_of_jobs_are_replayed(reader):
    reader.run()
    with closing(Rival(reader["engine"])) as rival:
        rival.write()
        assert visit(reader["application"], "/Ada").status == "200 OK"
        rival.write()
        reader["purge"]()
    assert rival.won == 2
    assert reader.guests() == set()


@section(RETRIES, "What is replayed")
def test_what_is_transient_can_be_added_to(reader):
    reader.names["RetryPolicy"] = RetryPolicy
    reader.run()
    attempts = []

    class LockTimeout(Exception):
        sqlstate = "55P03"

    def impatient(environ: Any, start_response: Any) -> Any:
        attempts.append(1)
        raise DatabaseError("SELECT 1", {}, LockTimeout())

    with pytest.raises(DatabaseError):
        visit(reader["SessionMiddleware"](impatient, reader["Session"], retry=reader["policy"]))
    assert len(attempts) == 3


@section(RETRIES, "What must be idempotent")
def test_mail_is_sent_once(reader):
    sent: list[str] = []
    reader.names["send_mail"] = sent.append
    reader.run()
    with closing(Rival(reader["engine"])) as rival:
        rival.write()
        response = visit(reader.wrap("order", retry=RetryPolicy()), QUERY_STRING="Ada")
    assert (response.content, sent) == (b"attempt 2\n", ["Ada"])


# -- docs/jobs.rst ----------------------------------------------------------------------------------------------------


@section(JOBS, "Jobs and schedulers")
def test_a_job_is_one_transaction_and_a_block_is_a_part_of_one(reader):
    reader.insert("Ada", "Grace", "Alan", "Edsger")
    reader.run()
    reader["forget"]("Ada")
    assert reader.guests() == {"Grace", "Alan", "Edsger"}
    with pytest.raises(sa.exc.InvalidRequestError):  # there is no such guest to delete
        reader["forget_all"](["Grace", "nobody", "Alan"])
    assert reader.guests() == {"Alan", "Edsger"}

    # What the text says of objects after the block.
    with session_scope(reader["Session"]) as session:
        guest: Any = session.get(reader["Guest"], "Alan")
        expired: Any = session.get(reader["Guest"], "Edsger")
        session.expire(expired)
    assert guest.name == "Alan"
    with pytest.raises(DetachedInstanceError):
        expired.name  # noqa: B018


@section(JOBS, "A job that is called in another one")
def test_propagation(reader):
    reader.run()
    assert visit(reader.wrap("enter"), QUERY_STRING="Ada,Grace").status == "303 See Other"
    assert reader.guests() == {"Ada", "Grace"}
    with pytest.raises(ValueError, match="a guest needs a name"):
        visit(reader.wrap("enter"), QUERY_STRING="Alan,")
    assert reader.guests() == {"Ada", "Grace"}
    reader.run()
    with pytest.raises(RuntimeError, match="not today"):
        visit(reader.wrap("attempt"))
    assert reader.guests() == {"Ada", "Grace", "somebody has tried"}


@section(JOBS, "Threads")
def test_threads_have_units_of_work_of_their_own(reader, capsys):
    reader.run()
    assert capsys.readouterr().out == "1\n"
    assert reader.guests() == {"Ada"}


@section(JOBS, "What a request starts")
def test_a_job_is_started_when_the_request_is_committed_and_only_then(reader):
    seen: list[tuple[str, set[str]]] = []

    class Queue:
        def put(self, name: str) -> None:
            seen.append((name, reader.guests()))

    reader.names["queue"] = Queue()
    reader.run()
    assert visit(reader.wrap("register"), QUERY_STRING="Ada").status == "202 Accepted"
    assert seen == [("Ada", {"Ada"})]
    with pytest.raises(IntegrityError):
        visit(reader.wrap("register"), QUERY_STRING="Ada")
    assert len(seen) == 1


@section(JOBS, "APScheduler")
def test_apscheduler_runs_what_is_decorated(reader):
    from apscheduler.events import EVENT_JOB_EXECUTED

    reader.insert("Ada")
    reader.run()
    scheduler, done = reader["scheduler"], threading.Event()
    try:
        scheduler.add_listener(lambda event: done.set(), EVENT_JOB_EXECUTED)
        [job] = scheduler.get_jobs()
        job.modify(next_run_time=datetime.now(timezone.utc))
        assert done.wait(60)
    finally:
        scheduler.shutdown()
    assert reader.guests() == set()


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """A worker of Celery takes the root logger for its own."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@section(JOBS, "Celery")
@pytest.mark.usefixtures("logging_as_it_was")
def test_celery_runs_what_is_decorated(reader):
    from celery.contrib.testing.worker import start_worker
    from celery.exceptions import Retry
    from celery.signals import worker_process_init

    mails: list[str] = []

    def send_mail(name: str) -> None:
        if name == "Grace":
            raise OSError("no mail today")
        mails.append(name)

    reader.names.update(broker="memory://", send_mail=send_mail)
    reader.run()
    app = reader["app"]
    app.conf.update(result_backend="cache+memory://", broker_connection_retry_on_startup=True)
    pool = reader["engine"].pool
    with start_worker(app, perform_ping_check=False, loglevel="CRITICAL"):
        # It has begun with a pool of its own, as one that was forked does.
        assert reader["engine"].pool is not pool
        pool.dispose()
        reader["admit"].delay("Ada").get(timeout=60)
        assert reader.guests() == {"Ada"}
        reader["announce"].delay("Ada").get(timeout=60)
    assert mails == ["Ada"]
    app.close()

    # self.retry() rolls back.
    reader.insert("Grace")
    session = reader["Session"]
    with pytest.raises((Retry, OSError)), session_scope(session):
        session.add(reader["Guest"](name="Alan"))
        reader["announce"]("Grace")
    assert reader.guests() == {"Ada", "Grace"}

    # Eager, within a request: the task joins, and makes it rollback-only if it fails, which Celery keeps to itself.
    app.conf.task_always_eager = True

    def break_down(name: str) -> None:
        raise ValueError(name)

    def eager(environ: Any, start_response: Any) -> Any:
        name = environ["PATH_INFO"].strip("/")
        if environ["QUERY_STRING"] == "later":
            current_scope().on_commit(partial(reader["admit"].delay, name))
        else:
            reader["admit"].delay(name)
        if environ["QUERY_STRING"] == "fails":
            reader["announce"].delay("Ada")
        start_response("200 OK" if name != "Alan" else "409 Conflict", [])
        return []

    reader.names.update(eager=eager, send_mail=break_down)
    visit(reader.wrap("eager"), "/Alan")
    visit(reader.wrap("eager"), "/Barbara")
    visit(reader.wrap("eager"), "/Donald", QUERY_STRING="later")
    with pytest.raises(RollbackOnlyError):
        visit(reader.wrap("eager"), "/Edsger", QUERY_STRING="fails")
    assert reader.guests() == {"Ada", "Grace", "Barbara", "Donald"}

    worker_process_init.disconnect(reader["forget_connections_of_the_parent"])


@section(JOBS, "RQ")
def test_rq_runs_what_is_decorated(reader, tmp_path, monkeypatch):
    from fakeredis import FakeStrictRedis
    from rq import SimpleWorker
    from rq.timeouts import TimerDeathPenalty

    class Worker(SimpleWorker):
        # The other one wants the main thread.
        death_penalty_class = TimerDeathPenalty

    source = blocks("README.rst")["sa_wsgi_session"][0]
    (tmp_path / "guests.py").write_text(source, "utf-8")
    reader.write(tmp_path / "jobs.py")
    monkeypatch.syspath_prepend(tmp_path)
    redis = reader.names["redis"] = FakeStrictRedis()
    try:
        reader.run()
        queue = reader["queue"]
        Worker([queue], connection=redis).work(burst=True, logging_level="CRITICAL")
        assert reader.guests() == {"Ada"}
        failed = queue.enqueue("jobs.admit", "Ada")
        Worker([queue], connection=redis).work(burst=True, logging_level="CRITICAL")
        assert failed.get_status(refresh=True) == "failed"
        assert not sys.modules["guests"].Session.registry.has()
    finally:
        redis.close()
        sys.modules["guests"].engine.dispose()
        for name in "guests", "jobs":
            del sys.modules[name]


# -- docs/databases.rst -----------------------------------------------------------------------------------------------


def numbers(engine: Any) -> list[int]:
    """The orders that another connection sees."""
    observer = sa.create_engine(engine.url)
    try:
        with observer.connect() as connection:
            return list(connection.execute(sa.text("SELECT number FROM orders")).scalars())
    finally:
        observer.dispose()


@section(DATABASES, "A session for each")
def test_a_session_for_each_database(reader):
    reader.run()
    orders = reader["orders_engine"]
    assert visit(reader["application"], "/Ada").status == "201 Created"
    assert (reader.guests(), numbers(orders)) == ({"Ada"}, [1])
    with pytest.raises(IntegrityError):  # the commit of the outer one: Ada is there
        visit(reader["application"], "/Ada")
    assert (reader.guests(), numbers(orders)) == ({"Ada"}, [1, 2])

    def refuse(environ: Any, start_response: Any) -> Any:
        return reader["order"](environ, lambda status, headers: start_response("409 Conflict", headers))

    visit(serve_both(reader, refuse), "/Alan")
    assert (reader.guests(), numbers(orders)) == ({"Ada"}, [1, 2])

    def order_twice(environ: Any, start_response: Any) -> Any:
        reader["OrderSession"].add(reader["Order"](number=1))  # the commit of the inner one: it is there
        return reader["order"](environ, start_response)

    with pytest.raises(IntegrityError):
        visit(serve_both(reader, order_twice), "/Alan")
    assert (reader.guests(), numbers(orders)) == ({"Ada"}, [1, 2])

    reader.run()
    assert (reader.guests(), numbers(orders)) == ({"Ada", "Grace"}, [1, 2, 3])

    sent: list[tuple[set[str], int]] = []
    reader.names["send_mail"] = lambda: sent.append((reader.guests(), len(numbers(orders))))
    reader.run()
    visit(serve_both(reader, reader["order_and_tell"]), "/Edsger")
    assert sent == [({"Ada", "Grace", "Edsger"}, 4)]

    Session, OrderSession = reader["Session"], reader["OrderSession"]
    with session_scope(Session) as one, session_scope(OrderSession) as two:
        assert current_scope(Session).session is one
        assert current_scope(OrderSession).session is current_scope().session is two


def serve_both(reader: Any, app: Any, outer: RetryPolicy | None = None, inner: RetryPolicy | None = None) -> Any:
    orders = SessionMiddleware(app, reader["OrderSession"], environ_key="orders", retry=inner)
    return SessionMiddleware(orders, reader["Session"], environ_key="guests", retry=outer)


@pytest.mark.parametrize(
    ("whose", "flushed", "policy", "replayed"),
    [
        ("guests", True, "outer", True),  # lost in the view
        ("orders", True, "outer", True),
        ("orders", False, "outer", True),  # lost at the commit of the inner one
        ("guests", False, "outer", False),  # at that of the outer one: the inner one is durable
        ("orders", True, "inner", False),  # the outer one has changed something
    ],
)
def test_with_two_databases_the_policy_belongs_to_the_outermost_middleware(
    reader_of_readme, whose, flushed, policy, replayed
):
    reader = reader_of_readme
    for block in blocks(DATABASES)["A session for each"][:1]:
        reader._execute(DATABASES, block)
    engine = reader["engine" if whose == "guests" else "orders_engine"]

    def view(environ: Any, start_response: Any) -> Any:
        body = reader["order"](environ, start_response)
        if flushed:
            reader["Session"].flush()
            reader["OrderSession"].flush()
        return body

    once_more = RetryPolicy(delay=0)
    app = serve_both(reader, view, **{policy: once_more})
    with closing(Rival(engine)) as rival:
        rival.write()
        if replayed:
            assert visit(app, "/Ada").status == "201 Created"
        else:
            with pytest.raises(OperationalError, match="locked"):
                visit(app, "/Ada")
        assert rival.won == 1
    stored = (reader.guests(), len(numbers(reader["orders_engine"])))
    assert stored == (({"Ada"}, 1) if replayed else (set(), 1 if whose == "guests" else 0))


@section(DATABASES, "Both or neither")
def test_both_databases_or_neither(reader, postgresql_url: URL, other_postgresql_url: URL):
    reader.names.update(guests_url=postgresql_url, orders_url=other_postgresql_url)
    reader.run()
    guests, orders = reader["guests_engine"], reader["orders_engine"]
    for engine in guests, orders:
        reader["Base"].metadata.create_all(engine)
    assert visit(reader["application"]).status == "201 Created"
    assert (reader.guests(guests), numbers(orders)) == ({"Grace"}, [2])
    with orders.begin() as connection:
        connection.execute(sa.text("DELETE FROM orders"))
    with pytest.raises(IntegrityError):
        visit(reader["application"])
    assert (reader.guests(guests), numbers(orders)) == ({"Grace"}, [])


# -- docs/production.rst ----------------------------------------------------------------------------------------------


@section(PRODUCTION, "The pool")
def test_the_settings_of_the_engine_reach_the_database(reader, postgresql_url: URL):
    reader.names["url"] = postgresql_url
    reader.run()
    engine = reader["engine"]
    with engine.connect() as connection:
        settings = {
            name: connection.execute(sa.text(f"SHOW {name}")).scalar()
            for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        }
    assert settings == {
        "statement_timeout": "30s",
        "lock_timeout": "5s",
        "idle_in_transaction_session_timeout": "1min",
    }
    assert engine.pool.size() == 8


def test_a_pool_that_is_too_small_for_requires_new_is_told(world):
    engine = sa.create_engine(world.engine.url, poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0)
    Session = scoped_session(sessionmaker(engine))

    def view() -> Any:
        Session.execute(sa.text("SELECT 1"))
        with session_scope(Session, propagation="requires_new") as session:
            session.execute(sa.text("SELECT 1"))

    with pytest.raises(sa.exc.TimeoutError, match="QueuePool limit of size 1 overflow 0 reached"):
        visit(SessionMiddleware(respond(view), Session))
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    engine.dispose()


@pytest.mark.parametrize(
    ("options", "retry", "succeeds"),
    [({}, None, False), ({"pool_pre_ping": True}, None, True), ({}, RetryPolicy(delay=0), True)],
    ids=["as it comes", "pool_pre_ping", "retry"],
)
def test_a_dead_connection_is_replaced_before_its_first_statement_or_by_a_replay_or_for_the_next_request(
    postgresql_url: URL, options, retry, succeeds
):
    engine, operator = sa.create_engine(postgresql_url, **options), sa.create_engine(postgresql_url)
    Session = scoped_session(sessionmaker(engine))

    def view() -> Any:
        return [str(Session.execute(sa.text("SELECT pg_backend_pid()")).scalar()).encode()]

    application = SessionMiddleware(respond(view), Session, retry=retry)
    try:
        first = visit(application).content
        with operator.connect() as connection:
            connection.execute(sa.text(f"SELECT pg_terminate_backend({int(first)}, 60000)"))
        if succeeds:
            assert visit(application).content != first
        else:
            with pytest.raises(OperationalError):
                visit(application)
        assert visit(application).content != first
    finally:
        engine.dispose()
        operator.dispose()


@section(PRODUCTION, "Forks")
def test_after_dispose_no_connection_is_there_to_be_shared(reader):
    engine, happened = reader["engine"], []
    engine.dispose()
    sa.event.listen(engine, "connect", lambda connection, record: happened.append("connect"))
    sa.event.listen(engine, "close", lambda connection, record: happened.append("close"))
    reader.run()
    assert happened.count("connect") == happened.count("close") > 0


def test_a_middleware_that_does_not_hand_on_close_keeps_the_connection_until_the_body_is_forgotten(world):
    def broken(app: Any) -> Any:
        def middleware(environ: Any, start_response: Any) -> Any:
            yield from (chunk for chunk in app(environ, start_response))

        return middleware

    def view() -> Any:
        names = world.Session.execute(sa.text("SELECT 1 UNION SELECT 2")).scalars()
        return (b"%d" % name for name in names)

    exchange = Exchange(broken(SessionMiddleware(respond(view), world.Session)))
    exchange.next()
    assert world.checked_out == 1
    with pytest.warns(ResourceWarning, match="dropped without a call to its close"):
        exchange.close()
    gc.collect()
    assert world.checked_out == 0


@section(PRODUCTION, "Logging")
def test_the_log_names_the_request_and_no_secret(reader, caplog):
    logger = logging.getLogger("sa_wsgi_session")
    level = logger.level
    try:
        reader.run()
        visit(reader["application"], "/Ada", QUERY_STRING="secret")
        visit(reader.wrap("welcome", commit_veto=lambda *_: True), "/Alan")
        visit(reader["application"], "/Grace\n")
        with pytest.raises(IntegrityError):
            visit(reader["application"], "/Ada", QUERY_STRING="secret")
    finally:
        logger.setLevel(level)
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert lines[:3] == [
        ("DEBUG", "GET /Ada: committed"),
        ("DEBUG", "GET /Alan: rolled back"),
        ("DEBUG", "GET /Grace%0A: committed"),
    ]
    assert "GET /Ada: rolled back" in caplog.text
    assert not any("secret" in message or "INSERT" in message for _, message in lines)


# -- docs/tutorial.rst ------------------------------------------------------------------------------------------------


def run_pytest(folder: Path) -> str:
    """The summary of the tests in *folder*."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    result = subprocess.run(
        command, cwd=folder, env={**environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False
    )
    return result.stdout + result.stderr


@section(TUTORIAL, "Wrap an application")
def test_the_first_steps(reader, tmp_path, monkeypatch, waitress_server, chromium):
    reader._blocks += blocks(TUTORIAL)["Write a test for it"]
    reader.write(tmp_path / "guests.py")
    reader.write(tmp_path / "test_guests.py")
    monkeypatch.syspath_prepend(tmp_path)
    import guests  # type: ignore[import-not-found]

    from tests.test_ledger_browser import Browser

    server = waitress_server(guests.application)
    browser = Browser(chromium, server.url, tmp_path)
    try:
        # It is used...
        browser.open()

        def sign(name: str) -> str:
            browser.open()
            browser.find("[name=name]").send_keys(name)
            with browser.next_page():
                browser.find("button").click()
            return browser.text("body")

        assert "Barbara" in sign("Barbara")
        assert "Internal Server Error" in sign("Barbara")
        assert sign("42") == "A name has letters only."

        # ... tested...
        assert "4 passed" in run_pytest(tmp_path)

        # ... and nothing but what was signed is there afterwards.
        browser.open()
        assert browser.text("pre") == "Barbara"
        [expression] = blocks(TUTORIAL, "javascript")["See what it costs"]
        timing = {entry["name"]: entry for entry in chromium.execute_script(f"return {expression.strip()}")}
        assert set(timing) == {"db", "commit", "attempts"}
        assert timing["db"]["description"] == "statements: 1"
        assert timing["attempts"]["description"] == "1"

        [shown] = blocks(TUTORIAL, "text")["See what it costs"]
        header = dict(visit(guests.application).headers)["Server-Timing"]
        assert re.sub(r"\d+\.\d+", "", f"Server-Timing: {header}") == re.sub(r"\d+\.\d+", "", shown)
    finally:
        server.stop()
        guests.engine.dispose()
        del sys.modules["guests"]


@section(TUTORIAL, "Write a test for it")
def test_the_test_of_the_first_steps_fails_if_the_application_is_not_wrapped(reader, tmp_path):
    source = blocks(TUTORIAL)["Wrap an application"][0]
    *lines, last = source.splitlines()
    assert last.startswith("application = SessionMiddleware(")
    (tmp_path / "guests.py").write_text("\n".join([*lines, "application = guests\n"]), "utf-8")
    reader.write(tmp_path / "test_guests.py")
    assert "test_what_was_refused_is_not_kept" in run_pytest(tmp_path).partition("short test summary")[2]


# -- docs/observing.rst -----------------------------------------------------------------------------------------------


@section(OBSERVING, "Observing")
def test_all_three_arguments(reader_of_observing, caplog):
    reader = reader_of_observing
    reader.run()
    with caplog.at_level(logging.INFO, "sa_wsgi_session.units"):
        response = visit(reader["application"], "/Ada", "POST")
    assert "Server-Timing" in dict(response.headers)
    assert "POST /Ada: 200, committed in" in caplog.text


@section(OBSERVING, "What happens to each unit of work")
def test_an_observer_of_requests_and_of_jobs(reader_of_observing):
    reader = reader_of_observing
    reader.run()
    visit(reader["application"], "/Ada")
    told: list[Any] = []
    reader.names["observer"] = told.append
    reader.run()
    reader["invite"]("Grace")
    assert [(unit.name, unit.outcome) for unit in told] == [
        ("nightly purge", "committed"),
        ("__main__.invite", "committed"),
    ]
    assert reader.guests() == {"Grace"}


@section(OBSERVING, "In Prometheus")
def test_an_observer_for_prometheus(reader_of_observing, monkeypatch):
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    reader = reader_of_observing
    reader.run()
    visit(reader["application"], "/Ada")
    names = {sample.name for metric in registry.collect() for sample in metric.samples}
    for [queries] in [blocks(OBSERVING, "text")["In Prometheus"]]:
        asked = set(re.findall(r"sa_wsgi_session_\w+", queries))
        assert asked
        assert asked <= names


@section(OBSERVING, "In OpenTelemetry")
def test_an_observer_for_opentelemetry(reader_of_observing):
    reader = reader_of_observing
    reader.run()
    assert visit(reader["application"], "/Ada").status == "200 OK"
    assert reader.guests() == {"Ada"}


@section(OBSERVING, "Server-Timing")
def test_the_timing_for_operators_alone(reader_of_observing):
    reader = reader_of_observing
    reader.run()
    assert "Server-Timing" not in dict(visit(reader["application"], "/Ada").headers)
    assert "Server-Timing" in dict(visit(reader["application"], "/Grace", REMOTE_USER="operator").headers)


@pytest.fixture
def reader_of_observing(reader: Reader) -> Reader:
    """Somebody who has an application, and imports what the page takes for granted."""
    from sa_wsgi_session import with_session

    reader.names.update(application=reader["welcome"], session_scope=session_scope, with_session=with_session)
    return reader


# -- docs/questions.rst -----------------------------------------------------------------------------------------------
# What is answered there, and not tested elsewhere.


def test_own_commits_and_rollbacks_cut_a_request_into_transactions(reader_of_readme):
    reader = reader_of_readme
    Session, Guest = reader["Session"], reader["Guest"]

    def commit_in_between(environ: Any, start_response: Any) -> Any:
        Session.add(Guest(name="before the commit"))
        Session.commit()
        Session.add(Guest(name="after the commit"))
        start_response("409 Conflict", [])
        return []

    def roll_back_in_between(environ: Any, start_response: Any) -> Any:
        Session.add(Guest(name="before the rollback"))
        Session.rollback()
        Session.add(Guest(name="after the rollback"))
        start_response("200 OK", [])
        return []

    visit(SessionMiddleware(commit_in_between, Session))
    visit(SessionMiddleware(roll_back_in_between, Session))
    assert reader.guests() == {"before the commit", "after the rollback"}


def test_whatever_began_the_transaction_is_committed(postgresql_url: URL):
    engine = sa.create_engine(postgresql_url)
    Session = scoped_session(sessionmaker(engine))
    statements = ["CREATE TABLE t (i int)", "INSERT INTO t VALUES (1)"]

    def view() -> Any:
        Session.execute(sa.text(statements.pop(0)))
        return []

    try:
        for _ in range(2):
            visit(SessionMiddleware(respond(view), Session))
        with engine.connect() as connection:
            assert connection.execute(sa.text("SELECT i FROM t")).scalars().all() == [1]
    finally:
        engine.dispose()


def test_a_callback_after_a_list_finds_what_was_loaded_and_nothing_else(reader_of_readme):
    reader = reader_of_readme
    reader.insert("Ada", "Grace")
    Session, Guest = reader["Session"], reader["Guest"]
    found: list[Any] = []

    def look(loaded: Any, expired: Any) -> None:
        found.append(loaded.name)
        try:
            found.append(expired.name)
        except DetachedInstanceError as error:
            found.append(type(error))

    def view() -> Any:
        loaded, expired = Session.get(Guest, "Ada"), Session.get(Guest, "Grace")
        Session.expire(expired)
        current_scope().on_commit(partial(look, loaded, expired))
        return []

    visit(SessionMiddleware(respond(view), Session))
    assert found == ["Ada", DetachedInstanceError]


def test_a_swallowed_error_is_no_success_and_is_not_handed_on_to_the_next_request(reader_of_readme):
    reader = reader_of_readme
    reader.insert("Ada")
    Session, Guest = reader["Session"], reader["Guest"]

    def swallow() -> Any:
        Session.add(Guest(name="Grace"))
        Session.add(Guest(name="Ada"))
        with suppress(IntegrityError):
            Session.flush()
        return []

    def nested() -> Any:
        Session.add(Guest(name="Grace"))
        with suppress(IntegrityError), session_scope(Session, propagation="nested"):
            Session.add(Guest(name="Ada"))
        return []

    with pytest.raises(PendingRollbackError):
        visit(SessionMiddleware(respond(swallow), Session))
    assert reader.guests() == {"Ada"}
    visit(SessionMiddleware(respond(nested), Session))
    assert reader.guests() == {"Ada", "Grace"}


@pytest.mark.parametrize("make", [scoped_session, contextual_session])
def test_a_request_within_a_request_has_a_session_of_its_own(reader_of_readme, make):
    Session = make(sessionmaker(reader_of_readme["engine"]))
    sessions: list[Any] = []

    def view_within() -> Any:
        sessions.append(Session())
        return []

    inner = SessionMiddleware(respond(view_within), Session)

    def view() -> Any:
        own = Session()
        visit(inner)
        assert Session() is own
        sessions.append(own)
        return []

    visit(SessionMiddleware(respond(view), Session))
    first, second = sessions
    assert first is not second


def test_what_is_no_exception_is_rolled_back_and_goes_on(reader_of_readme):
    reader = reader_of_readme

    class Timeout(BaseException):
        """As ``gevent.Timeout`` is."""

    timeout = Timeout()

    def view() -> Any:
        reader["Session"].add(reader["Guest"](name="Ada"))
        reader["Session"].flush()
        raise timeout

    with pytest.raises(Timeout) as raised:
        visit(SessionMiddleware(respond(view), reader["Session"]))
    assert raised.value is timeout
    assert reader.guests() == set()
    assert not reader["Session"].registry.has()


@pytest.mark.parametrize(("status", "committed"), [("200 OK", True), ("303 See Other", False), ("404 No", False)])
def test_the_veto_that_commits_2xx_alone(reader_of_readme, status, committed):
    reader = reader_of_readme
    [source] = re.findall(r"``commit_veto=(lambda[^`]*)``", (ROOT / QUESTIONS).read_text("utf-8"))
    veto = eval(source.replace("\n", " "), {})

    def view() -> Any:
        reader["Session"].add(reader["Guest"](name="Ada"))
        return []

    visit(SessionMiddleware(respond(view, status), reader["Session"], commit_veto=veto))
    assert reader.guests() == ({"Ada"} if committed else set())


def test_links_to_trackers_are_of_their_form_and_named_after_them():
    references = [node for node in parse(QUESTIONS).findall(nodes.reference) if "refuri" in node]
    assert len(references) > 50
    for reference in references:
        match = re.fullmatch(r"https://github\.com/[\w.-]+/([\w.-]+)/(?:issues|pull)/(\d+)", reference["refuri"])
        assert match, reference["refuri"]
        assert reference.astext().endswith(f"#{match[2]}")


# -- docs/replicas.rst -------------------------------------------------------------------------------------------------


@section(REPLICAS, "Read replicas")
def test_reads_go_to_replicas_and_no_code_of_the_application_changes(reader, tmp_path, monkeypatch):
    monkeypatch.setenv("REPLICAS_SECRET", "only for the tests, and longer than 32 characters")
    reader.insert("primary")

    def guests(environ: Any, start_response: Any) -> Any:
        Session, Guest = reader["Session"], reader["Guest"]
        if environ["REQUEST_METHOD"] == "POST":
            Session.add(Guest(name=environ["PATH_INFO"].strip("/")))
        names = Session.execute(sa.select(Guest.name).order_by(Guest.name)).scalars().all()
        start_response("200 OK", [])
        return [",".join(names).encode()]

    reader.names |= {"os": os, "RetryPolicy": RetryPolicy, "primary": reader["engine"], "application": guests}
    for name in "a", "b":
        url = f"sqlite:///{tmp_path / name}"
        replica = sa.create_engine(url)
        reader["Base"].metadata.create_all(replica)
        with replica.begin() as connection:
            connection.execute(sa.insert(reader["Guest"]), [{"name": name}])
        replica.dispose()
        reader.names[f"url_{name}"] = url
    reader.run()
    application = reader["application"]
    try:
        assert {visit(application).content for _ in range(2)} == {b"a", b"b"}
        assert visit(application, "/Ada", "POST").content == b"Ada,primary"
    finally:
        for engine in reader["replicas"]._engines:
            engine.dispose()
