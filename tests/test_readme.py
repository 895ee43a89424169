"""README.rst and ``docs/``: every Python block is run, and does what the text around it says."""

from __future__ import annotations

import configparser
import logging
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import sqlalchemy as sa
from docutils import nodes
from docutils.core import publish_doctree
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DatabaseError, IntegrityError

from sa_wsgi_session import NoActiveScope, RetryPolicy, SessionMiddleware
from tests.support import Exchange, make_environ
from tests.support import request as make_request

ROOT = Path(__file__).parents[1]
README, GUIDE = "README.rst", "docs/guide.rst"
DOCUMENTS = [README, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.rst"))]


def visit(app: Any, *path_and_method: str, **environ: Any) -> Any:
    """A whole request, with its ``status`` and its ``content``."""
    return make_request(app, *path_and_method, **environ)


def parse(document: str) -> Any:
    settings = {
        # Sphinx's own roles and directives are unknown to docutils.
        "report_level": 5,
        "halt_level": 5,
        "file_insertion_enabled": False,
        "syntax_highlight": "none",
    }
    path = ROOT / document
    return publish_doctree(path.read_text("utf-8"), source_path=str(path), settings_overrides=settings)


def title_of(node: Any) -> str:
    """The title of the section that the node is in."""
    while not isinstance(node, (nodes.section, nodes.document)):
        node = node.parent
    return str(next(iter(node.findall(nodes.title))).astext())


def blocks(document: str) -> dict[str, list[str]]:
    """The Python blocks, by the titles of their sections."""
    found: dict[str, list[str]] = {}
    for node in parse(document).findall(nodes.literal_block):
        if "python" in node["classes"]:
            found.setdefault(title_of(node), []).append(node.astext())
    return found


class Reader:
    """Somebody who has typed in the smallest example, and now tries a section."""

    def __init__(self, document: str, title: str) -> None:
        self._document, self._title = document, title
        self._blocks = blocks(document)[title]
        self.names: dict[str, Any] = {"__name__": "__main__"}
        if (document, title) != FIRST:
            self._execute(README, *blocks(FIRST[0])[FIRST[1]])

    def run(self) -> None:
        """Run the next block of the section."""
        self._execute(self._document, self._blocks.pop(0))

    def recall(self, title: str) -> None:
        """Run the first block of an earlier section, whose names this one uses."""
        self._execute(self._document, blocks(self._document)[title][0])

    def _execute(self, document: str, source: str) -> None:
        exec(compile(source, f"<{document}: {self._title}>", "exec", dont_inherit=True), self.names)

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def wrap(self, name: str, **options: Any) -> SessionMiddleware:
        """The application of that name, with its session."""
        return SessionMiddleware(self[name], self["Session"], **options)

    def guests(self, engine: Engine | None = None) -> set[str]:
        """The names that another connection sees."""
        observer = sa.create_engine((engine or self["engine"]).url)
        try:
            with observer.connect() as connection:
                return set(connection.execute(sa.text("SELECT name FROM guests")).scalars())
        finally:
            observer.dispose()

    def insert(self, *names: str) -> None:
        with self["engine"].begin() as connection:
            connection.execute(sa.insert(self["Guest"]), [{"name": name} for name in names])

    def finish(self) -> None:
        assert not self._blocks, f"not run: {self._blocks}"
        for value in list(self.names.values()):
            if isinstance(value, Engine):
                value.dispose()


FIRST = (README, "sa_wsgi_session")
_tested: list[tuple[str, str]] = []


def section(document: str, title: str) -> pytest.MarkDecorator:
    """The test runs all blocks of that section, one after the other."""
    _tested.append((document, title))
    return pytest.mark.parametrize("reader", [(document, title)], indirect=True, ids=[title])


@pytest.fixture
def reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    reader = Reader(*request.param)
    yield reader
    reader.finish()


def test_every_python_block_is_run_by_a_test():
    # test_paste.py runs those of docs/paste.rst, and frameworks/ is what docs/frameworks.rst tells of.
    assert sorted(_tested) == sorted((document, title) for document in (README, GUIDE) for title in blocks(document))


# -- README.rst -------------------------------------------------------------------------------------------------------


@section(*FIRST)
def test_the_smallest_example_commits_what_the_request_added(reader):
    reader.run()
    response = visit(reader["application"], "/Ada")
    assert (response.status, response.content) == ("200 OK", b"Welcome!\n")
    assert reader.guests() == {"Ada"}
    with pytest.raises(IntegrityError):  # the COMMIT fails: no status was forwarded
        visit(reader["application"], "/Ada")
    assert not reader["Session"].registry.has()


@section(README, "Jobs, threads, scripts")
def test_jobs(reader, capsys):
    reader.insert("Edsger")
    reader.run()
    assert reader.guests() == {"Ada", "Edsger"}
    reader["forget"]("Edsger")
    assert reader.guests() == {"Ada"}
    assert not reader["Session"].registry.has()
    reader.run()
    assert capsys.readouterr().out.startswith("Ada was here before")
    assert reader.guests() == {"Ada", "Grace"}


@section(README, "Streaming, and commit_at")
def test_streaming(reader):
    reader.insert("Ada", "Grace")
    reader.run()
    assert visit(reader.wrap("export")).content.splitlines() == [b"Ada", b"Grace"]

    reader.run()
    cut_off = Exchange(reader.wrap("farewell"))
    assert (cut_off.status, cut_off.next()) == ("200 OK", b"Goodbye, Ada!\n")
    cut_off.close()
    assert reader.guests() == {"Ada", "Grace"}
    assert visit(reader.wrap("farewell")).content == b"Goodbye, Ada!\nGoodbye, Grace!\n"
    assert reader.guests() == set()


@section(README, "What counts as a success")
def test_a_veto_of_ones_own(reader):
    reader.run()
    assert visit(reader["application"], "/Ada", "GET").status == "200 OK"
    assert visit(reader["application"], "/Grace", "POST").status == "200 OK"
    assert reader.guests() == {"Grace"}


@section(README, "After the commit, or not at all")
def test_what_is_done_after_the_commit(reader):
    sent = []
    reader.names["send_mail"] = lambda name: sent.append((name, reader.guests()))
    reader.run()
    assert visit(reader.wrap("invite"), "/Ada").status == "200 OK"
    assert sent == [("Ada", {"Ada"})]
    dry_run = visit(reader.wrap("invite"), "/Grace", QUERY_STRING="dry-run")
    assert (dry_run.status, dry_run.content) == ("200 OK", b"Grace is invited\n")
    assert (len(sent), reader.guests()) == (1, {"Ada"})


class Rival:
    """Another writer of the SQLite file, who gives way as soon as somebody has lost against it."""

    def __init__(self, engine: Engine) -> None:
        self.won = 0
        # Without a rest for those who wait.
        engine.dispose()
        sa.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout = 0"))
        sa.event.listen(engine, "handle_error", self._give_way)
        self._connection = sqlite3.connect(str(engine.url.database), isolation_level=None)

    def write(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def _give_way(self, context: Any) -> None:
        assert "database is locked" in str(context.original_exception)
        self.won += 1
        self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()


@section(README, "Lost races")
def test_a_lost_race_is_replayed(reader):
    reader.run()
    with closing(Rival(reader["engine"])) as rival:
        rival.write()
        assert visit(reader["application"], "/Ada").status == "200 OK"
    assert rival.won == 1
    assert reader.guests() == {"Ada"}


@section(README, "Two databases")
def test_two_databases(reader, postgresql_url: URL, other_postgresql_url: URL):
    reader.names.update(guests_url=postgresql_url, orders_url=other_postgresql_url)
    reader.run()
    guests, orders = reader["guests_engine"], reader["orders_engine"]
    reader["Base"].metadata.create_all(guests)
    reader["Base"].metadata.create_all(orders)

    def stored() -> tuple[set[str], list[int]]:
        with orders.connect() as connection:
            numbers = connection.execute(sa.text("SELECT number FROM orders")).scalars().all()
        return reader.guests(guests), list(numbers)

    def clear() -> None:
        for engine in guests, orders:
            with engine.begin() as connection:
                connection.execute(sa.text("DELETE FROM guests"))
                connection.execute(sa.text("DELETE FROM orders"))

    def demand_at_commit(engine: Engine, table: str, column: str) -> None:
        """Whatever is inserted there is refused, and not before the COMMIT (or the PREPARE) asks."""
        kind = {"name": "varchar(80)", "number": "integer"}[column]
        with engine.begin() as connection:
            connection.execute(sa.text(f"CREATE TABLE allowed ({column} {kind} PRIMARY KEY)"))
            connection.execute(
                sa.text(
                    f"ALTER TABLE {table} ADD CONSTRAINT is_allowed FOREIGN KEY ({column}) REFERENCES allowed"
                    " DEFERRABLE INITIALLY DEFERRED"
                )
            )

    def release(engine: Engine, table: str) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {table} DROP CONSTRAINT is_allowed"))
            connection.execute(sa.text("DROP TABLE allowed"))

    def outcome(expected: object) -> None:
        """What is stored after a request that the database has refused."""
        with pytest.raises(DatabaseError) as refused:
            visit(reader["application"])
        # psycopg 3 reports that there is nothing to roll back where a PREPARE TRANSACTION was refused.
        assert "is_allowed" in f"{refused.value} {refused.value.__context__}"
        assert stored() == expected

    assert visit(reader["application"]).status == "201 Created"
    assert stored() == ({"Ada"}, [1])
    clear()
    demand_at_commit(orders, "orders", "number")
    outcome((set(), []))  # the inner one fails: nothing is kept
    release(orders, "orders")
    demand_at_commit(guests, "guests", "name")
    outcome((set(), [1]))  # the outer one fails: the inner one is durable
    release(guests, "guests")
    clear()

    reader.run()
    assert visit(reader["application"]).status == "201 Created"
    assert stored() == ({"Grace"}, [2])
    clear()
    for engine, table, column in (orders, "orders", "number"), (guests, "guests", "name"):
        demand_at_commit(engine, table, column)
        outcome((set(), []))
        release(engine, table)
    for engine in guests, orders:
        with engine.connect() as connection:
            assert connection.execute(sa.text("SELECT count(*) FROM pg_prepared_xacts")).scalar() == 0
        assert engine.pool.checkedout() == 0


@section(README, "Which session")
def test_a_contextual_session(reader):
    reader.run()
    assert reader.guests() == {"Alan"}
    with pytest.raises(NoActiveScope):
        reader["Session"]()


def test_the_commands_name_environments_of_tox():
    text = "\n".join(node.astext() for node in parse(README).findall(nodes.literal_block))
    commands = [line for line in text.splitlines() if "tox" in line]
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox -e demo",
        "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox",
    ]
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    assert {f"testenv:{name}" for name in re.findall(r"tox -e (\S+)", text)} <= set(tox.sections())
    assert tox.get("tox", "env_list")  # what "tox" alone runs


def test_the_readme_installs_the_package_by_its_name():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert f"\n    pip install {setup.get('metadata', 'name')}\n" in (ROOT / README).read_text("utf-8")


def test_the_figure_is_the_one_of_this_repository_and_well_formed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    repository = setup.get("metadata", "url").replace("https://github.com/", "https://raw.githubusercontent.com/")
    [image] = parse(README).findall(nodes.image)
    assert image["uri"] == f"{repository}/main/docs/timeline.svg"
    assert image["alt"]
    figure = ElementTree.parse(ROOT / "docs/timeline.svg").getroot()
    assert figure.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in (ROOT / "docs/timeline.svg").read_text("utf-8")


# -- docs/guide.rst ---------------------------------------------------------------------------------------------------


@section(GUIDE, "Two transactions")
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


@section(GUIDE, "Rows that the body reads")
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


@section(GUIDE, 'commit_at = "end"')
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


@section(GUIDE, "Objects that the body renders")
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


@section(GUIDE, "Jobs and propagation")
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


@section(GUIDE, "Rollback-only, and doom")
def test_half_of_the_work_is_never_kept(reader, capsys):
    reader.recall("Jobs and propagation")
    reader.run()
    assert capsys.readouterr().out.endswith("because of a guest needs a name\n")
    assert reader.guests() == set()


@section(GUIDE, "Callbacks")
def test_a_callback_has_a_unit_of_work_of_its_own(reader):
    reader.run()
    assert visit(reader.wrap("bring_a_friend"), QUERY_STRING="Ada").status == "200 OK"
    assert reader.guests() == {"Ada", "a friend of Ada"}
    with pytest.raises(IntegrityError):
        visit(reader.wrap("bring_a_friend"), QUERY_STRING="Ada")
    assert reader.guests() == {"Ada", "a friend of Ada"}


@section(GUIDE, "Lost races")
def test_lost_races_of_requests_and_of_jobs_are_replayed(reader):
    reader.run()
    with closing(Rival(reader["engine"])) as rival:
        rival.write()
        assert visit(reader["application"], "/Ada").status == "200 OK"
        rival.write()
        reader["purge"]()
    assert rival.won == 2
    assert reader.guests() == set()


@section(GUIDE, "What is replayed")
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


@section(GUIDE, "What must be idempotent")
def test_mail_is_sent_once(reader):
    sent: list[str] = []
    reader.names["send_mail"] = sent.append
    reader.run()
    with closing(Rival(reader["engine"])) as rival:
        rival.write()
        response = visit(reader.wrap("order", retry=RetryPolicy()), QUERY_STRING="Ada")
    assert (response.content, sent) == (b"attempt 2\n", ["Ada"])


@section(GUIDE, "Logging")
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


@section(GUIDE, "Which session")
def test_a_contextual_session_is_strict(reader, capsys):
    reader.run()
    assert "no unit of work is active here" in capsys.readouterr().out


def test_the_table_of_what_is_detected_is_right(sqlite_url: URL):
    from sa_wsgi_session._watching import Effect, effect_of

    for statement in "WITH x AS (INSERT INTO t) SELECT 1", "SELECT 1 INTO t", "CREATE TABLE t (i int)", "CALL p()":
        assert effect_of(statement) is not Effect.READS, statement
    for statement in "SELECT 1 FROM t FOR UPDATE", "SELECT setval('s', 1)":
        assert effect_of(statement) is Effect.READS, statement


def test_a_request_with_a_copy_of_the_environ_joins(reader_of_readme):
    reader = reader_of_readme

    def outer(environ: Any, start_response: Any) -> Any:
        inner = Exchange(reader["application"], {**environ, "PATH_INFO": "/joined"})
        inner.read()
        other = Exchange(reader["application"], make_environ("/independent"))
        other.read()
        start_response("500 No", [])
        return []

    visit(SessionMiddleware(outer, reader["Session"]))
    assert reader.guests() == {"independent"}


@pytest.fixture
def reader_of_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    reader = Reader(*FIRST)
    reader.run()
    yield reader
    reader.finish()
