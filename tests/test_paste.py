"""``use = egg:sa_wsgi_session``: ini files that PasteDeploy loads.

Servers that are given such a file: ``frameworks/test_paste_servers.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
import sqlite3
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import sqlalchemy as sa
from docutils import nodes
from docutils.core import publish_doctree
from paste.deploy import loadapp, loadfilter
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, declarative_base, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool, StaticPool

import sa_wsgi_session.paste
from sa_wsgi_session import NoActiveScope, RetryPolicy, SessionMiddleware, session_scope
from sa_wsgi_session.paste import filter_app_factory, filter_factory
from sa_wsgi_session.replicas import ReadReplicas
from tests import paste_fixtures
from tests.paste_fixtures import Contextual, Maker, Other, Scoped
from tests.support import PLAIN, Base, Exchange, Note, note, request

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paste.rst"
PAGE_TEXT = PAGE.read_text("utf-8")


def unbind(*factories: Any) -> None:
    """Leave nothing of a file that was loaded."""
    for factory in factories:
        bind = factory.kw["bind"]
        factory.configure(bind=None)
        if bind is not None:
            bind.dispose()


@pytest.fixture(autouse=True)
def _unbound() -> Iterator[None]:
    yield
    unbind(*paste_fixtures.FACTORIES)
    assert bind_of(sa_wsgi_session.paste.Session) is None


class Folder:
    """A folder with an ini file, and databases beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = 0

    def database(self, name: str = "notes") -> str:
        """The URL of an SQLite file that has the tables."""
        url = f"sqlite:///{self.path / name}.sqlite"
        engine = sa.create_engine(url)
        Base.metadata.create_all(engine)
        engine.dispose()
        return url

    def notes(self, name: str = "notes") -> set[str]:
        """What another connection sees there."""
        with contextlib.closing(sqlite3.connect(self.path / f"{name}.sqlite")) as connection:
            return {text for (text,) in connection.execute("SELECT text FROM note")}

    def write(self, text: str) -> str:
        """Write the file, and return PasteDeploy's name for it."""
        self._files += 1
        path = self.path / f"{self._files}.ini"
        path.write_text(dedent(text), "utf-8")
        return f"config:{path}"

    def app(self, text: str, name: str | None = None) -> Any:
        return loadapp(self.write(text), name)

    def section(self, *lines: str) -> Any:
        """The filter that the section with these lines describes."""
        return loadfilter(self.write("\n".join(["[filter:main]", "use = egg:sa_wsgi_session", *lines])))

    def serve(self, app: Any, *lines: str) -> Any:
        return self.section(*lines)(app)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def bind_of(session: Any) -> Any:
    return getattr(session, "session_factory", session).kw["bind"]


WRITER = "paste.app_factory = tests.paste_fixtures:make_writer"


# -- how a filter gets into an application ----------------------------------------------------------------------------


PLACES = {
    "in a pipeline": f"""
        [pipeline:main]
        pipeline = session writer

        [filter:session]
        use = egg:sa_wsgi_session
        session = tests.paste_fixtures:Scoped
        sqlalchemy.url = sqlite:///%(here)s/notes.sqlite

        [app:writer]
        {WRITER}
        """,
    "by its full name": f"""
        [pipeline:main]
        pipeline = session writer

        [filter:session]
        use = egg:sa_wsgi_session#main
        session = tests.paste_fixtures:Scoped
        sqlalchemy.url = sqlite:///%(here)s/notes.sqlite

        [app:writer]
        {WRITER}
        """,
    "filter-with": f"""
        [app:main]
        {WRITER}
        filter-with = session

        [filter:session]
        use = egg:sa_wsgi_session
        session = tests.paste_fixtures:Scoped
        sqlalchemy.url = sqlite:///%(here)s/notes.sqlite
        """,
    "filter-app": f"""
        [filter-app:main]
        use = egg:sa_wsgi_session
        next = writer
        session = tests.paste_fixtures:Scoped
        sqlalchemy.url = sqlite:///%(here)s/notes.sqlite

        [app:writer]
        {WRITER}
        """,
    "filter_app_factory": f"""
        [pipeline:main]
        pipeline = session writer

        [filter:session]
        paste.filter_app_factory = sa_wsgi_session.paste:filter_app_factory
        session = tests.paste_fixtures:Scoped
        sqlalchemy.url = sqlite:///%(here)s/notes.sqlite

        [app:writer]
        {WRITER}
        """,
}


@pytest.mark.parametrize("place", PLACES)
def test_the_application_has_its_session_wherever_the_filter_stands(place, folder):
    folder.database()
    app = folder.app(PLACES[place])
    assert isinstance(app, SessionMiddleware)
    assert app.session is Scoped
    assert request(app, "/kept").statuses == ["200 OK"]
    assert request(app, "/dropped", QUERY_STRING="404 Not Found").statuses == ["404 Not Found"]
    assert folder.notes() == {"kept"}


def test_both_entry_points_are_registered():
    from importlib.metadata import distribution

    assert {
        (entry_point.group, entry_point.name, entry_point.load())
        for entry_point in distribution("sa_wsgi_session").entry_points
        if entry_point.group.startswith("paste.")
    } == {
        ("paste.filter_factory", "main", filter_factory),
        ("paste.filter_app_factory", "main", filter_app_factory),
    }


def test_pastedeploy_is_not_needed():
    """The functions are called by whoever likes, with a dictionary of settings."""
    program = "import sys; sys.modules['paste'] = None; import sa_wsgi_session.paste as it; print(it.__all__)"
    said = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    assert said == "['Session', 'filter_app_factory', 'filter_factory']\n"


def test_what_the_sections_share_is_not_read(folder):
    url = folder.database()
    app = folder.app(
        f"""
        [DEFAULT]
        commit_at = never
        nonsense = 1

        [filter-app:main]
        use = egg:sa_wsgi_session
        next = writer
        sqlalchemy.url = {url}

        [app:writer]
        use = call:tests.test_paste:make_plain_writer
        """
    )
    request(app, "/kept")
    assert folder.notes() == {"kept"}


def test_what_the_sections_share_is_not_even_handed_on(folder):
    """PasteDeploy's own rule, which ``docs/paste.rst`` tells."""
    text = """
        [DEFAULT]
        sqlalchemy.url = sqlite:///shared.sqlite

        [filter:main]
        use = egg:sa_wsgi_session
        sqlalchemy.url = sqlite:///own.sqlite
        """
    refusal(lambda: loadfilter(folder.write(text)), "session, sqlalchemy.url", "[DEFAULT] is not read")


def make_plain_writer(global_conf: Any, **ignored: Any) -> Any:
    return paste_fixtures.make_writer(global_conf)


def test_no_connection_is_made_when_the_file_is_loaded(folder):
    folder.section("session = tests.paste_fixtures:Scoped", "sqlalchemy.url = sqlite:///%(here)s/none.sqlite")
    assert not (folder.path / "none.sqlite").exists()


# -- session and sqlalchemy.url ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Scoped", "Contextual", "Maker"])
@pytest.mark.parametrize("form", ["tests.paste_fixtures:{}", "tests.paste_fixtures.{}"])
def test_session_is_bound_to_the_url(name, form, folder):
    url = folder.database()
    app = folder.serve(paste_fixtures.make_writer({}), f"session = {form.format(name)}", f"sqlalchemy.url = {url}")
    request(app, "/kept")
    assert folder.notes() == {"kept"}
    with session_scope(getattr(paste_fixtures, name)) as session:
        session.add(note("from a job"))
    assert folder.notes() == {"kept", "from a job"}


def test_a_session_without_a_url_is_taken_as_it_is_and_may_be_bound_later(folder):
    app = folder.serve(paste_fixtures.make_writer({}), "session = tests.paste_fixtures:Scoped")
    with pytest.raises(UnboundExecutionError):
        request(app, "/too early")
    engine = sa.create_engine(folder.database())
    Scoped.configure(bind=engine)
    request(app, "/kept")
    assert folder.notes() == {"kept"}
    folder.section("session = tests.paste_fixtures:Scoped")
    assert bind_of(Scoped) is engine


@pytest.mark.parametrize("factory", ["make_writer", "make_importer"])
def test_with_a_url_alone_the_application_finds_its_session(factory, folder):
    folder.database()
    app = folder.app(
        f"""
        [filter-app:main]
        use = egg:sa_wsgi_session
        next = application
        sqlalchemy.url = sqlite:///%(here)s/notes.sqlite

        [app:application]
        paste.app_factory = tests.paste_fixtures:{factory}
        """
    )
    assert app.session is sa_wsgi_session.paste.Session
    request(app, "/kept")
    assert folder.notes() == {"kept"}


def test_with_a_url_alone_jobs_have_the_session_too(folder):
    with pytest.raises(NoActiveScope):
        sa_wsgi_session.paste.Session()
    folder.section(f"sqlalchemy.url = {folder.database()}")
    with pytest.raises(NoActiveScope):
        sa_wsgi_session.paste.Session()
    with session_scope(sa_wsgi_session.paste.Session) as session:
        session.add(note("from a job"))
    with pytest.raises(ZeroDivisionError), session_scope(sa_wsgi_session.paste.Session) as session:
        session.add(note("broken"))
        session.flush()
        1 / 0  # noqa: B018
    assert folder.notes() == {"from a job"}


def test_a_job_of_a_process_that_has_loaded_no_file_is_told_so():
    with session_scope(sa_wsgi_session.paste.Session) as session, pytest.raises(UnboundExecutionError):
        session.connection()


def test_the_file_wins_over_the_code(folder):
    mistaken = sa.create_engine("sqlite://", poolclass=StaticPool)
    Scoped.configure(bind=mistaken)
    app = folder.serve(
        paste_fixtures.make_writer({}),
        "session = tests.paste_fixtures:Scoped",
        f"sqlalchemy.url = {folder.database()}",
    )
    request(app, "/kept")
    assert folder.notes() == {"kept"}
    mistaken.dispose()


def test_a_connection_that_the_code_has_bound_is_no_engine_of_ours(folder):
    mistaken = sa.create_engine("sqlite://", poolclass=StaticPool)
    with mistaken.connect() as connection:
        Scoped.configure(bind=connection)
        folder.section("session = tests.paste_fixtures:Scoped", f"sqlalchemy.url = {folder.database()}")
    assert str(bind_of(Scoped).url).endswith("notes.sqlite")
    mistaken.dispose()


def test_two_sections_with_the_same_settings_share_one_pool(folder):
    folder.database()
    text = f"""
        [composite:main]
        use = call:tests.test_paste:make_fork
        one = one
        two = two

        [app:one]
        {WRITER}
        filter-with = session

        [app:two]
        {WRITER}
        filter-with = session

        [filter:session]
        use = egg:sa_wsgi_session
        sqlalchemy.pool_recycle = 60
        sqlalchemy.url = sqlite:///%(here)s/notes.sqlite
        """
    one, two = folder.app(text)
    engine = bind_of(sa_wsgi_session.paste.Session)
    request(one, "/one")
    request(two, "/two")
    assert folder.notes() == {"one", "two"}
    folder.app(text)
    assert bind_of(sa_wsgi_session.paste.Session) is engine


def make_fork(loader: Any, global_conf: Any, one: str, two: str) -> Any:
    return loader.get_app(one, global_conf=global_conf), loader.get_app(two, global_conf=global_conf)


@pytest.mark.parametrize(
    ("first", "second", "differing"),
    [
        (
            ["sqlalchemy.url = sqlite:///%(here)s/notes.sqlite"],
            ["sqlalchemy.url = sqlite://"],
            "sqlalchemy.url",
        ),
        (
            ["sqlalchemy.url = sqlite:///%(here)s/notes.sqlite"],
            ["sqlalchemy.url = sqlite:///%(here)s/notes.sqlite", "sqlalchemy.pool_recycle = 60"],
            "sqlalchemy.pool_recycle",
        ),
    ],
)
@pytest.mark.parametrize(
    ("session", "said"),
    [
        (["session = tests.paste_fixtures:Scoped"], "session = 'tests.paste_fixtures:Scoped'"),
        ([], "sa_wsgi_session.paste.Session"),
    ],
)
def test_two_sections_with_different_settings_need_two_sessions(first, second, differing, session, said, folder):
    folder.section(*session, *first)
    bound = bind_of(Scoped if session else sa_wsgi_session.paste.Session)
    message = refusal(
        lambda: folder.section(*session, *second),
        "sqlalchemy.url = ", said, "is bound to", "notes.sqlite' already", differing, "differs",
        "session = package.module:Session", "Session.configure(bind=None)",
    )  # fmt: skip
    assert message.count("notes.sqlite") >= 1
    assert bind_of(Scoped if session else sa_wsgi_session.paste.Session) is bound

    # Both of the ways out.
    folder.section("session = tests.paste_fixtures:Other", *second)
    unbind(bound_factory := (Scoped if session else sa_wsgi_session.paste.Session).session_factory)
    folder.section(*session, *second)
    assert bound_factory.kw["bind"] not in (None, bound)


def test_a_session_that_is_bound_already_is_told_without_its_password(folder):
    first = [SCOPED, "sqlalchemy.url = postgresql+psycopg2://me:s3cret-1@localhost/notes"]
    second = [SCOPED, "sqlalchemy.url = postgresql+psycopg2://me:s3cret-2@localhost/notes"]
    folder.section(*first)
    refusal(
        lambda: folder.section(*second),
        "is bound to 'postgresql+psycopg2://me:***@localhost/notes' already",
    )


def test_the_same_settings_make_a_new_engine_after_the_session_was_unbound(folder):
    lines = ["session = tests.paste_fixtures:Scoped", f"sqlalchemy.url = {folder.database()}"]
    folder.section(*lines)
    first = bind_of(Scoped)
    Scoped.configure(bind=None)
    folder.section(*lines)
    assert bind_of(Scoped) not in (None, first)


def test_an_engine_is_remembered_no_longer_than_its_sessionmaker_lives():
    maker = sessionmaker()
    filter_factory({}, **{"session": maker, "sqlalchemy.url": "sqlite://"})
    engine = weakref.ref(maker.kw["bind"])
    assert engine() is not None
    del maker
    gc.collect()
    assert engine() is None


def test_a_session_that_no_sessionmaker_makes_cannot_be_bound(folder):
    lines = ["session = tests.paste_fixtures:Homemade"]
    folder.section(*lines)
    refusal(
        lambda: folder.section(*lines, "sqlalchemy.url = sqlite://"),
        "session = 'tests.paste_fixtures:Homemade'", "function", "cannot be bound", "sqlalchemy.url",
        "accepted", "sessionmaker",
    )  # fmt: skip


@pytest.mark.parametrize(
    "line", ["commit_at = never", "commit_veto = tests.paste_fixtures:nothing", "sqlalchemy.echo = perhaps"]
)
def test_a_section_that_is_refused_binds_nothing(line, folder):
    lines = ["session = tests.paste_fixtures:Scoped", f"sqlalchemy.url = {folder.database()}", line]
    refusal(lambda: folder.section(*lines), line.partition(" ")[0])
    assert bind_of(Scoped) is None


# -- the settings of the engine ---------------------------------------------------------------------------------------


def test_settings_reach_the_engine_as_what_they_mean(folder):
    folder.section(
        "session = tests.paste_fixtures:Scoped",
        "sqlalchemy.url = postgresql+psycopg2://localhost/notes",
        "sqlalchemy.pool_size = 3",
        "sqlalchemy.max_overflow = -1",
        "sqlalchemy.pool_pre_ping = false",
        "sqlalchemy.hide_parameters = yes",
        "sqlalchemy.echo = off",
        "sqlalchemy.logging_name = notes",
        "sqlalchemy.paramstyle = pyformat",
        "sqlalchemy.pool_reset_on_return = none",
    )
    engine = bind_of(Scoped)
    assert engine.dialect.paramstyle == "pyformat"
    assert engine.pool.size() == 3
    assert engine.pool._max_overflow == -1
    assert engine.pool._pre_ping is False
    assert engine.hide_parameters is True
    assert engine.echo is False
    assert engine.logging_name == "notes"


def test_a_pool_without_a_limit_and_one_that_waits_for_nobody(folder):
    folder.section(SCOPED, URL_LINE, "sqlalchemy.pool_size = 0", "sqlalchemy.pool_timeout = 0")
    pool = bind_of(Scoped).pool
    assert (pool.size(), pool.timeout()) == (0, 0)


def test_a_pool_that_is_made_already_is_used(folder):
    folder.database()
    pool = sa.create_engine(f"sqlite:///{folder.path / 'notes.sqlite'}").pool
    app = filter_app_factory(
        paste_fixtures.make_writer({}),
        None,
        session=Maker,
        **{"sqlalchemy.url": "sqlite://", "sqlalchemy.pool": pool},
    )
    request(app, "/kept")
    assert folder.notes() == {"kept"}
    assert bind_of(app.session).pool is pool


def test_settings_of_a_dialect_are_read_too(folder):
    folder.section(
        SCOPED, "sqlalchemy.url = sqlite://", "sqlalchemy.native_datetime = false", "sqlalchemy.paramstyle = named"
    )
    assert bind_of(Scoped).dialect.native_datetime is False
    assert bind_of(Scoped).dialect.paramstyle == "named"


def test_the_binds_of_the_code_stay(folder):
    """They are for certain tables; the bind of the file is for all the others."""

    class Other(declarative_base()):  # type: ignore[misc]
        __tablename__ = "other"
        id = sa.Column(sa.Integer, primary_key=True)

    old = sa.create_engine("sqlite://")
    session: Any = scoped_session(sessionmaker(binds={Note: old}))
    filter_factory({}, session=session, **{"sqlalchemy.url": "sqlite:///new.sqlite"})
    assert session.get_bind(Note) is old
    assert session.get_bind(Other) is bind_of(session)
    session.remove()
    unbind(session.session_factory)
    old.dispose()


def test_a_setting_that_is_an_object_is_named(folder):
    folder.section(
        "session = tests.paste_fixtures:Scoped",
        "sqlalchemy.url = postgresql+psycopg2://localhost/notes",
        "sqlalchemy.poolclass = tests.paste_fixtures:Pool",
        "sqlalchemy.json_serializer = json.dumps",
    )
    assert type(bind_of(Scoped).pool) is paste_fixtures.Pool
    folder.section(
        "session = tests.paste_fixtures:Other",
        "sqlalchemy.url = sqlite://",
        "sqlalchemy.creator = tests.test_paste:connect",
    )
    with pytest.raises(ConnectionRefusedError), session_scope(Other) as session:
        session.connection()


def connect() -> Any:
    raise ConnectionRefusedError


# -- the keys of the middleware ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("veto", "kept"),
    [
        ("tests.paste_fixtures:veto_everything", set()),
        ("tests.paste_fixtures:Vetoes.none", {"200 OK", "302 Found", "404 Not Found", "500 Oh"}),
        ("sa_wsgi_session.default_commit_veto", {"200 OK", "302 Found"}),
        ("repoze.tm:default_commit_veto", {"200 OK", "302 Found"}),
    ],
)
def test_commit_veto(veto, kept, folder):
    app = folder.serve(
        paste_fixtures.make_writer({}),
        "session = tests.paste_fixtures:Scoped",
        f"sqlalchemy.url = {folder.database()}",
        f"commit_veto = {veto}",
    )
    for status in "200 OK", "302 Found", "404 Not Found", "500 Oh":
        assert request(app, f"/{status}", QUERY_STRING=status).statuses == [status]
    assert folder.notes() == kept


def test_the_veto_of_repoze_reads_its_headers_here_too(folder):
    app = folder.serve(
        paste_fixtures.make_writer({}),
        f"sqlalchemy.url = {folder.database()}",
        "commit_veto = repoze.tm:default_commit_veto",
    )
    request(app, "/aborted", headers=[("X-Tm", "abort")])
    request(app, "/aborted in the old way", headers=[("X-Tm-Abort", "yes")])
    request(app, "/committed all the same", QUERY_STRING="500 Oh", headers=[("X-Tm", "commit")])
    assert folder.notes() == {"committed all the same"}


@pytest.mark.parametrize(
    ("lines", "before_the_last_chunk"),
    [([], {"from the view"}), (["commit_at = start"], {"from the view"}), (["commit_at = end"], set())],
)
def test_commit_at(lines, before_the_last_chunk, folder):
    app = folder.serve(
        paste_fixtures.make_streamer({}),
        "session = tests.paste_fixtures:Scoped",
        f"sqlalchemy.url = {folder.database()}",
        *lines,
    )
    exchange = Exchange(app)
    assert exchange.next() == b"first\n"
    assert folder.notes() == before_the_last_chunk
    assert exchange.read() == b"last\n"
    assert folder.notes() == {"from the view"}


def test_activate_hook(folder):
    app = folder.serve(
        paste_fixtures.make_bystander({}),
        "session = tests.paste_fixtures:Scoped",
        "activate_hook = tests.paste_fixtures:is_not_static",
    )
    assert request(app, "/static/logo.png").content == b"False"
    assert request(app, "/").content == b"True"


def test_the_keys_of_the_policy_ask_for_replays(folder):
    attempts: list[int] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        attempts.append(environ["sa_wsgi_session.scope"].attempt)
        raise paste_fixtures.Contention

    middleware = filter_factory(
        {},
        **{
            "sqlalchemy.url": folder.database(),
            "retry.attempts": "4",
            "retry.delay": "0",
            "retry.max_delay": "2.5",
            "retry.deadline": "None",
            "retry.max_body": "4096",
            "retry.is_transient": "tests.paste_fixtures:is_contention",
        },
    )(app)
    with pytest.raises(paste_fixtures.Contention):
        request(middleware)
    assert attempts == [1, 2, 3, 4]
    assert middleware._retry == RetryPolicy(
        attempts=4, delay=0, max_delay=2.5, deadline=None, max_body=4096, is_transient=paste_fixtures.is_contention
    )
    given_as_objects = filter_factory({}, session=Scoped, **{"retry.deadline": 3})(app)
    assert given_as_objects._retry == RetryPolicy(deadline=3)


def test_the_keys_of_what_is_to_be_seen(folder):
    paste_fixtures.seen.clear()
    app = folder.serve(
        paste_fixtures.make_bystander({}),
        "session = tests.paste_fixtures:Scoped",
        "observer = tests.paste_fixtures:seen.append",
        "server_timing = tests.paste_fixtures:is_not_static",
        "warn_after = 2.5",
    )
    assert "Server-Timing" in dict(request(app, "/one").headers)
    assert "Server-Timing" not in dict(request(app, "/static/logo.png").headers)
    assert [unit.path for unit in paste_fixtures.seen] == ["/one", "/static/logo.png"]
    assert app._watcher.warn_after == 2.5

    app = folder.serve(
        paste_fixtures.make_bystander({}), "session = tests.paste_fixtures:Scoped", "server_timing = yes"
    )
    assert "Server-Timing" in dict(request(app, "/two").headers)
    app = folder.serve(
        paste_fixtures.make_bystander({}),
        "session = tests.paste_fixtures:Scoped",
        "server_timing = false",
        "warn_after = none",
    )
    assert app._watcher is None


def test_the_key_of_the_replicas(folder, monkeypatch):
    primary, replica = folder.database("primary"), sa.create_engine(folder.database("replica"))
    monkeypatch.setattr(paste_fixtures, "replicas", ReadReplicas([replica], secret=64 * "1"))
    with Session(replica) as session:
        session.add(note("old"))
        session.commit()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            Scoped.add(note("new"))
        start_response("200 OK", PLAIN)
        return [str(Scoped.execute(sa.select(Note.text)).scalars().all()).encode()]

    paste_fixtures.seen.clear()
    app = folder.serve(
        app,
        SCOPED,
        f"sqlalchemy.url = {primary}",
        "replicas = tests.paste_fixtures:replicas",
        "observer = tests.paste_fixtures:seen.append",
    )
    assert request(app).content == b"['old']"
    assert request(app, "/", "POST").content == b"['new']"
    assert [unit.engine for unit in paste_fixtures.seen] == ["replica 1 of 1", "primary"]
    # Another section with the same settings shares the engine, and so can share these.
    folder.section(SCOPED, f"sqlalchemy.url = {primary}", "replicas = tests.paste_fixtures:replicas")
    replica.dispose()


def test_a_section_whose_replicas_are_refused_leaves_no_trace(folder):
    def load() -> None:
        refusal(
            lambda: folder.section(SCOPED, URL_LINE, "replicas = tests.paste_fixtures:replicas"), "cannot have them"
        )

    load()
    assert bind_of(Scoped) is None
    engine = sa.create_engine("sqlite://")
    Scoped.configure(bind=engine)
    load()
    assert bind_of(Scoped) is engine


def test_two_databases_have_two_environ_keys(folder):
    for name in "left", "right":
        folder.database(name)
    app = folder.app(
        """
        [pipeline:main]
        pipeline = left right twofold

        [filter:left]
        use = egg:sa_wsgi_session
        session = tests.paste_fixtures:Scoped
        sqlalchemy.url = sqlite:///%(here)s/left.sqlite
        environ_key = left

        [filter:right]
        use = egg:sa_wsgi_session
        session = tests.paste_fixtures:Maker
        sqlalchemy.url = sqlite:///%(here)s/right.sqlite
        environ_key = right

        [app:twofold]
        paste.app_factory = tests.paste_fixtures:make_twofold
        """
    )
    assert request(app).statuses == ["200 OK"]
    assert (folder.notes("left"), folder.notes("right")) == ({"left"}, {"right"})


def test_two_sessions_under_one_environ_key_are_refused_when_the_file_is_loaded(folder):
    with pytest.raises(ValueError, match="environ_key='sa_wsgi_session'"):
        folder.app(
            f"""
            [pipeline:main]
            pipeline = left right writer

            [filter:left]
            use = egg:sa_wsgi_session
            session = tests.paste_fixtures:Scoped

            [filter:right]
            use = egg:sa_wsgi_session
            session = tests.paste_fixtures:Other

            [app:writer]
            {WRITER}
            """
        )


# -- called from Python -----------------------------------------------------------------------------------------------


def test_python_code_gives_the_objects_themselves(folder):
    folder.database()
    url = URL.create("sqlite", database=str(folder.path / "notes.sqlite"))
    asked = []

    def hook(environ: Any) -> bool:
        asked.append(environ["PATH_INFO"])
        return True

    app = filter_app_factory(
        paste_fixtures.make_writer({}),
        None,
        session=Maker,
        commit_veto=paste_fixtures.Vetoes.none,
        activate_hook=hook,
        **{"sqlalchemy.url": url, "sqlalchemy.poolclass": NullPool, "sqlalchemy.pool_pre_ping": False},
    )
    request(app, "/kept", QUERY_STRING="500 Oh")
    assert (folder.notes(), asked) == ({"kept"}, ["/kept"])
    assert app.session.session_factory is Contextual.session_factory


# -- errors -----------------------------------------------------------------------------------------------------------


def refusal(load: Callable[[], Any], *words: str) -> str:
    """The message of the ``ValueError`` that *load* raises, with all of *words* in that order, and no password."""
    with pytest.raises(ValueError, match="accepted: ") as raised:
        load()
    message = str(raised.value)
    assert re.search(".*".join(map(re.escape, words)), message, re.DOTALL), message
    assert "s3cret" not in "".join(traceback.format_exception(raised.value))
    # Nor where a tool shows what a traceback suppresses.
    if raised.value.__cause__ is None:
        assert raised.value.__context__ is None
    return message


SCOPED = "session = tests.paste_fixtures:Scoped"
URL_LINE = "sqlalchemy.url = postgresql+psycopg2://me:s3cret@localhost/notes"
POLICY = "retry.attempts, retry.delay, retry.max_delay, retry.deadline, retry.max_body, retry.is_transient"
SIGHT = "replicas, observer, server_timing, warn_after"
KEYS = f"session, commit_veto, commit_at, activate_hook, environ_key, {POLICY}, {SIGHT}, sqlalchemy.url"

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    # Keys
    "nothing at all": (
        [],
        ["session, sqlalchemy.url", "one of them is needed", "package.module:Session", "sqlite:///"],
    ),
    "neither of the two": (["commit_at = end"], ["session, sqlalchemy.url", "one of them is needed"]),
    "no such key": ([SCOPED, "fnord = 23"], ["fnord = '23'", "no such key;", KEYS]),
    "a misspelt key": ([SCOPED, "comit_veto = x:y"], ["comit_veto = 'x:y'", "(is commit_veto meant?)", KEYS]),
    "a misspelt key of the policy": (
        [SCOPED, "retry.attemps = 3"],
        ["retry.attemps = '3'", "(is retry.attempts meant?)", KEYS],
    ),
    "a policy of no attempts": (
        [SCOPED, "retry.attempts = 0"],
        ["retry.attempts = '0'", "1 or more, not 0", "how many"],
    ),
    "attempts that are no number": (
        [SCOPED, "retry.attempts = many"],
        ["retry.attempts = 'many'", "cannot be read", "how many"],
    ),
    "half an attempt": ([SCOPED, "retry.attempts = 2.5"], ["retry.attempts = '2.5'", "a whole number", "how many"]),
    "no pause": ([SCOPED, "retry.delay = none"], ["retry.delay = 'none'", "seconds"]),
    "an endless pause": ([SCOPED, "retry.max_delay = inf"], ["retry.max_delay = 'inf'", "seconds"]),
    "a deadline in the past": ([SCOPED, "retry.deadline = -1"], ["retry.deadline = '-1'", "or none"]),
    "a body that is no number": ([SCOPED, "retry.max_body = 1 MiB"], ["retry.max_body = '1 MiB'", "bytes"]),
    "a test of errors that does not exist": (
        [SCOPED, "retry.is_transient = tests.paste_fixtures:fnord"],
        ["retry.is_transient = 'tests.paste_fixtures:fnord'", "cannot be resolved", "dotted name"],
    ),
    "a test of errors that is a class": (
        [SCOPED, "retry.is_transient = builtins:ValueError"],
        ["retry.is_transient = 'builtins:ValueError'", "the class builtins.ValueError", "dotted name"],
    ),
    "replicas that are none": (
        [SCOPED, "replicas = tests.paste_fixtures:Scoped"],
        ["replicas = 'tests.paste_fixtures:Scoped'", "scoped_session", "the dotted name of a ReadReplicas"],
    ),
    "replicas of nothing": (
        [SCOPED, "replicas = tests.paste_fixtures:replicas"],
        ["replicas = ", "cannot have them", "must be bound to an Engine", "the dotted name of a ReadReplicas"],
    ),
    "replicas of another dialect": (
        [SCOPED, URL_LINE, "replicas = tests.paste_fixtures:replicas"],
        ["replicas = ", "cannot have them", "'sqlite'", "'postgresql'", "the dotted name of a ReadReplicas"],
    ),
    "an observer that is a class": (
        [SCOPED, "observer = sa_wsgi_session.observers:PrometheusObserver"],
        ["observer = ", "the class sa_wsgi_session.observers.PrometheusObserver", "dotted name", "FinishedUnit"],
    ),
    "a timing that is neither": (
        [SCOPED, "server_timing = perhaps"],
        ["server_timing = 'perhaps'", "cannot be resolved", "true, false, or the dotted name"],
    ),
    "a time that is none": ([SCOPED, "warn_after = 5 s"], ["warn_after = '5 s'", "cannot be read", "or none"]),
    "a time in the past": ([SCOPED, "warn_after = -1"], ["warn_after = '-1'", "nobody can wait", "or none"]),
    "a misspelt prefix": (
        ["sqlachemy.url = postgresql://me:s3cret@localhost/notes"],
        ["sqlachemy.url = 'postgresql://me:***@localhost/notes'", "(is sqlalchemy.url meant?)", KEYS],
    ),
    "a secret under any key": ([SCOPED, "db_password = s3cret"], ["db_password = ***", "no such key", KEYS]),
    "a secret in any value": (
        [SCOPED, "dsn = host=localhost password=s3cret"],
        ["dsn = ***", "no such key", KEYS],
    ),
    "a secret in a text that is no URL": (
        [SCOPED, "sqlalchemy.url = host=localhost password=s3cr@et"],
        ["sqlalchemy.url = ***", "cannot be read as a URL"],
    ),
    **{
        f"a URL that is spelt {url}": (
            [SCOPED, f"sqlalchemy.url = {url}"],
            [f"sqlalchemy.url = {shown!r}", "cannot be read as a URL"],
        )
        for url, shown in {
            "postgresql:/me:s3cret@localhost/notes": "postgresql:***@localhost/notes",
            "postgresql//me:s3cret@localhost/notes": "postgresql//***@localhost/notes",
            "postgresql//mes3cret@localhost/notes": "postgresql//***@localhost/notes",
            "me=s3cret@localhost/notes": "***@localhost/notes",
            "@localhost/notes": "***@localhost/notes",
        }.items()
    },
    "a setting without a URL": (
        [SCOPED, "sqlalchemy.echo = true"],
        ["sqlalchemy.echo = 'true'", "without sqlalchemy.url", "accepted", "sqlalchemy.url"],
    ),
    "a misspelt URL": (
        [SCOPED, "sqlalchemy.ulr = postgresql://me:s3cret@localhost/notes"],
        [
            "sqlalchemy.ulr = 'postgresql://me:***@localhost/notes'",
            "without sqlalchemy.url",
            "is sqlalchemy.url meant?",
        ],
    ),
    # Empty values
    **{
        f"{key}, empty": ([SCOPED, f"{key} ="], [f"{key} = ''", "empty", "accepted", word])
        for key, word in {
            "sqlalchemy.url": "postgresql://",
            "sqlalchemy.pool_size": "an integer",
            "sqlalchemy.fnord": "create_engine()",
            "commit_veto": "environ, status and headers",
            "commit_at": "start or end",
            "activate_hook": "environ",
            "environ_key": "sa_wsgi_session",
        }.items()
    },
    "session, empty": (["session ="], ["session = ''", "empty", "package.module:Session"]),
    # Names
    **{
        f"{key}, {what}": (
            [other, f"{key} = {name}"],
            [f"{key} = {name!r}", "cannot be resolved", error, "accepted", word],
        )
        for key, other, word in (
            ("session", "commit_at = end", "a scoped_session or a sessionmaker"),
            ("commit_veto", SCOPED, "environ, status and headers"),
            ("activate_hook", SCOPED, "environ"),
        )
        for what, name, error in (
            ("no name", "not a name", "invalid format"),
            ("no module", "no_such_package.module:thing", "No module named 'no_such_package'"),
            ("no submodule", "tests.no_such_module:thing", "No module named 'tests.no_such_module'"),
            ("no submodule, with dots", "tests.no_such_module.thing", "'tests' has no attribute 'no_such_module'"),
            ("no attribute", "tests.paste_fixtures:thing", "has no attribute 'thing'"),
            ("no attribute, with dots", "tests.paste_fixtures.thing", "has no attribute 'thing'"),
            ("a module that is broken", "broken_module:thing", "ZeroDivisionError"),
            ("a module that misses another", "hungry_module:thing", "No module named 'no_such_dependency'"),
            ("the same in a package, with dots", "a_package.hungry.thing", "No module named 'no_such_dependency'"),
        )
    },
    # Kinds
    "session, a module": (
        ["session = tests.paste_fixtures"],
        ["session = 'tests.paste_fixtures'", "a scoped_session", "not an object of", "module", "accepted"],
    ),
    "session, a number": (
        ["session = tests.paste_fixtures:number"],
        ["session = 'tests.paste_fixtures:number'", "int", "accepted", "a scoped_session or a sessionmaker"],
    ),
    "session, for asyncio": (
        ["session = tests.test_paste:AsyncMaker"],
        ["session = 'tests.test_paste:AsyncMaker'", "synchronous", "accepted", "a sessionmaker"],
    ),
    "session, a URL": (
        ["session = postgresql://me:s3cret@localhost/notes"],
        ["session = 'postgresql://me:***@localhost/notes'", "cannot be resolved", "accepted", "a scoped_session"],
    ),
    "commit_veto, a number": (
        [SCOPED, "commit_veto = tests.paste_fixtures:number"],
        ["commit_veto = 'tests.paste_fixtures:number'", "type int", "accepted", "environ, status and headers"],
    ),
    "commit_veto, a class": (
        [SCOPED, "commit_veto = tests.paste_fixtures:Vetoes"],
        ["commit_veto = 'tests.paste_fixtures:Vetoes'", "the class", "instance", "accepted", "status"],
    ),
    "commit_veto, a coroutine function": (
        [SCOPED, "commit_veto = tests.paste_fixtures:veto_in_time"],
        ["commit_veto = 'tests.paste_fixtures:veto_in_time'", "coroutine", "synchronous", "accepted", "status"],
    ),
    "app, which is an argument too": ([SCOPED, "app = x:y"], ["app = 'x:y'", "no such key", KEYS]),
    "global_conf, which is an argument too": ([SCOPED, "global_conf = x"], ["global_conf = 'x'", "no such key", KEYS]),
    "activate_hook, a number": (
        [SCOPED, "activate_hook = tests.paste_fixtures:number"],
        ["activate_hook = 'tests.paste_fixtures:number'", "type int", "accepted", "environ"],
    ),
    "commit_at, never": ([SCOPED, "commit_at = never"], ["commit_at = 'never'", "accepted", "start or end"]),
    # URLs
    "no URL": ([SCOPED, "sqlalchemy.url = fnord"], ["sqlalchemy.url = 'fnord'", "read as a URL", "sqlite:///file"]),
    "a URL without slashes": (
        [SCOPED, "sqlalchemy.url = postgresql:me:s3cret@localhost/notes"],
        ["sqlalchemy.url = 'postgresql:***@localhost/notes'", "read as a URL", "postgresql://user:password@host"],
    ),
    "a URL without a scheme": (
        [SCOPED, "sqlalchemy.url = me:s3cret@localhost"],
        ["sqlalchemy.url = 'me:***@localhost'", "read as a URL", "postgresql://"],
    ),
    "a password with @ and :": (
        [SCOPED, "sqlalchemy.url = postgresql://me:very@s3cret:s3cret@localhost/notes"],
        ["sqlalchemy.url = 'postgresql://***@localhost/notes'", "read as a URL", "%40"],
    ),
    "a password with @ and /": (
        [SCOPED, "sqlalchemy.url = fnord://me:very@s3cret/s3cret@localhost/notes"],
        ["sqlalchemy.url = 'fnord://me:***@localhost/notes'", "no dialect 'fnord'", "accepted", "postgresql"],
    ),
    "a password with @ and ?": (
        [SCOPED, "sqlalchemy.url = fnord://me:very@s3cret?s3cret@localhost/notes"],
        ["sqlalchemy.url = 'fnord://me:***?***'", "no dialect 'fnord'", "accepted", "postgresql"],
    ),
    "a password in the query, with @": (
        [SCOPED, "sqlalchemy.url = fnord://me:s3cret@localhost/notes?password=very@s3cret"],
        ["sqlalchemy.url = 'fnord://me:***?***'", "no dialect 'fnord'", "accepted", "postgresql"],
    ),
    "an @ that is encoded by mistake": (
        [SCOPED, "sqlalchemy.url = postgresql://me:s3cret%%40localhost/notes"],
        ["sqlalchemy.url = 'postgresql://***'", "read as a URL", "postgresql://user:password@host"],
    ),
    "a port that is none": (
        [SCOPED, "sqlalchemy.url = postgresql://me:s3cret@localhost:port/notes"],
        ["sqlalchemy.url = 'postgresql://***@localhost:port/notes'", "read as a URL", "postgresql://"],
    ),
    "a connection string of libpq": (
        [SCOPED, "sqlalchemy.url = host=localhost password=s3cret"],
        ["sqlalchemy.url = ***", "read as a URL", "postgresql://"],
    ),
    "an unknown dialect": (
        [SCOPED, "sqlalchemy.url = postgres://me:s3cret@localhost/notes"],
        ["'postgres://me:***@localhost/notes'", "no dialect 'postgres'", "is postgresql meant?", "accepted", "sqlite"],
    ),
    "an address for a user": (
        [SCOPED, "sqlalchemy.url = postgres://me@example.com:s3cret@localhost/notes"],
        ["'postgres://me@example.com:***@localhost/notes'", "no dialect 'postgres'", "is postgresql meant?"],
    ),
    "an unknown driver": (
        [SCOPED, "sqlalchemy.url = postgresql+fnord://me:s3cret@localhost/notes"],
        [
            "'postgresql+fnord://me:***@localhost/notes'",
            "no dialect 'postgresql+fnord'",
            "accepted",
            "postgresql+psycopg",
        ],
    ),
    "a driver that is not installed": (
        [SCOPED, "sqlalchemy.url = mssql+pyodbc://me:s3cret@localhost/notes?driver=fnord"],
        ["'mssql+pyodbc://me:***@localhost/notes?***'", "driver of mssql+pyodbc", "'pyodbc'", "accepted", "installed"],
    ),
    "a driver for asyncio": (
        [SCOPED, "sqlalchemy.url = sqlite+waiting:///notes"],
        ["'sqlite+waiting:///notes'", "sqlite+waiting is for asyncio", "WSGI is synchronous", "accepted", "sqlite:///"],
    ),
    "an unknown plugin": (
        [SCOPED, "sqlalchemy.url = postgresql+psycopg2://me@localhost/notes?plugin=fnord"],
        ["'postgresql+psycopg2://me@localhost/notes?***'", "create_engine() refuses it", "accepted", "postgresql://"],
    ),
    # SQLAlchemy 1.4 quotes the URL with its password.
    "SQLite with a server": (
        [SCOPED, "sqlalchemy.url = sqlite://me:s3cret@localhost/notes"],
        ["'sqlite://me:***@localhost/notes'", "create_engine() refuses it", "accepted", "sqlite:///file"],
    ),
    "a password in the query": (
        [SCOPED, "sqlalchemy.url = sqlite://localhost/notes?passwd=s3cret"],
        ["'sqlite://localhost/notes?***'", "create_engine() refuses it", "accepted", "sqlite:///file"],
    ),
    "a password that is encoded": (
        [SCOPED, "sqlalchemy.url = sqlite://me:%%73%%33cret@localhost/notes"],
        ["'sqlite://me:***@localhost/notes'", "create_engine() refuses it", "accepted", "sqlite:///file"],
    ),
    # Settings
    "an unknown setting": (
        [SCOPED, URL_LINE, "sqlalchemy.fnord = 23"],
        ["sqlalchemy.fnord = '23'", "refuses it for this database (TypeError", "accepted", "create_engine()"],
    ),
    "a misspelt setting": (
        [SCOPED, URL_LINE, "sqlalchemy.echo = true", "sqlalchemy.pool_sise = 5"],
        ["sqlalchemy.pool_sise = '5'", "is sqlalchemy.pool_size meant?", "accepted", "create_engine()"],
    ),
    "a setting for another database": (
        [SCOPED, "sqlalchemy.url = sqlite://", "sqlalchemy.max_overflow = 5"],
        ["sqlalchemy.max_overflow = '5'", "refuses it for this database (TypeError", "accepted", "an integer"],
    ),
    "a number that is none": (
        [SCOPED, URL_LINE, "sqlalchemy.pool_size = many"],
        ["sqlalchemy.pool_size = 'many'", "cannot be read (ValueError", "accepted", "an integer"],
    ),
    "a pool that could never lend a connection": (
        [SCOPED, URL_LINE, "sqlalchemy.pool_size = -1"],
        ["sqlalchemy.pool_size = '-1'", "negative", "accepted", "how many connections are kept"],
    ),
    "a wait that is over before it begins": (
        [SCOPED, URL_LINE, "sqlalchemy.pool_timeout = -5"],
        ["sqlalchemy.pool_timeout = '-5'", "negative", "accepted", "how many seconds"],
    ),
    "a creator that is no function": (
        [SCOPED, URL_LINE, "sqlalchemy.creator = tests.paste_fixtures:number"],
        ["sqlalchemy.creator = ", "type int, which cannot be called", "accepted", "a class or a function"],
    ),
    "a boolean that is none": (
        [SCOPED, URL_LINE, "sqlalchemy.pool_pre_ping = perhaps"],
        ["sqlalchemy.pool_pre_ping = 'perhaps'", "cannot be read (ValueError", "accepted", "true or false"],
    ),
    "echo that is none": (
        [SCOPED, URL_LINE, "sqlalchemy.pool_size = 5", "sqlalchemy.echo = perhaps"],
        ["sqlalchemy.echo = 'perhaps'", "refuses it for this database (ValueError", "accepted", "true, false or debug"],
    ),
    "a reset that is none": (
        [SCOPED, URL_LINE, "sqlalchemy.pool_reset_on_return = perhaps"],
        ["sqlalchemy.pool_reset_on_return = 'perhaps'", "refuses it", "accepted", "rollback, commit or none"],
    ),
    "a style that is none": (
        [SCOPED, URL_LINE, "sqlalchemy.paramstyle = perhaps"],
        ["sqlalchemy.paramstyle = 'perhaps'", "there is no such style", "accepted", "qmark or numeric or named"],
    ),
    "the dialect apart from the URL": (
        [SCOPED, URL_LINE, "sqlalchemy.dialect = mysql"],
        ["sqlalchemy.dialect = 'mysql'", "it is sqlalchemy.url that says so", "accepted", "the beginning of the URL"],
    ),
    "a class that does not exist": (
        [SCOPED, URL_LINE, "sqlalchemy.poolclass = NullPool"],
        ["sqlalchemy.poolclass = 'NullPool'", "cannot be resolved", "accepted", "sqlalchemy.pool:NullPool"],
    ),
    "a class that is none": (
        [SCOPED, URL_LINE, "sqlalchemy.poolclass = tests.paste_fixtures:number"],
        ["sqlalchemy.poolclass = 'tests.paste_fixtures:number'", "int", "accepted", "sqlalchemy.pool:NullPool"],
    ),
    "a setting that a text cannot give": (
        [SCOPED, URL_LINE, "sqlalchemy.connect_args = {'password': 's3cret'}"],
        ["sqlalchemy.connect_args = ***", "refuses it for this database (ValueError", "accepted", "an object"],
    ),
    "a secret setting": (
        [SCOPED, URL_LINE, "sqlalchemy.connect_args.password = s3cret"],
        [
            "sqlalchemy.connect_args.password = ***",
            "refuses it for this database (TypeError",
            "accepted",
            "create_engine()",
        ],
    ),
    "settings that do not go together": (
        [SCOPED, URL_LINE, "sqlalchemy.pool_size = 5", "sqlalchemy.poolclass = sqlalchemy.pool:NullPool"],
        [
            "sqlalchemy.pool_size = '5', sqlalchemy.poolclass = 'sqlalchemy.pool:NullPool'",
            "not all together",
            "accepted",
        ],
    ),
}


class AsyncSession(Session):
    pass


AsyncSession.__module__ = "sqlalchemy.ext.asyncio"  # without greenlet there is no other
AsyncMaker = sessionmaker(class_=AsyncSession)


class WaitingDialect(SQLiteDialect_pysqlite):
    """A driver for asyncio that needs no package."""

    is_async = True
    supports_statement_cache = True

    @classmethod
    def get_pool_class(cls, url: Any) -> Any:
        return WaitingPool


class WaitingPool(NullPool):
    _is_asyncio = True


class QuotingDialect(SQLiteDialect_pysqlite):
    """A driver whose error shows the password, and is hidden by another one when it cleans up."""

    supports_statement_cache = True

    def create_connect_args(self, url: Any) -> Any:
        try:
            raise ValueError(f"{url.password} at {url.host}?")
        finally:
            url.close()


sa.dialects.registry.register("sqlite.waiting", __name__, "WaitingDialect")
sa.dialects.registry.register("sqlite.quoting", __name__, "QuotingDialect")


@pytest.fixture
def broken_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules that cannot be imported."""
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "hungry_module.py").write_text("import no_such_dependency\n")
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").touch()
    (tmp_path / "a_package" / "hungry.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("a_package", None)


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("broken_modules")
def test_what_is_wrong_is_told_when_the_file_is_loaded(case, folder):
    lines, words = REFUSED[case]
    refusal(lambda: folder.section(*lines), *words)
    assert bind_of(Scoped) is None


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["session = broken_module:thing"], ZeroDivisionError),
        (["session = hungry_module:thing"], ModuleNotFoundError),
        (["session = a_package.hungry.thing"], ModuleNotFoundError),
        ([SCOPED, "commit_veto = tests.paste_fixtures:thing"], AttributeError),
        ([SCOPED, URL_LINE, "sqlalchemy.pool_size = many"], ValueError),
        ([SCOPED, "sqlalchemy.url = mssql+pyodbc://me:s3cret@localhost/notes"], ModuleNotFoundError),
        # A password that is a word of any day: a name is resolved without it.
        (["session = json:thing", "sqlalchemy.url = postgresql://json:json@localhost/json"], AttributeError),
        (["session = tests.nowhere:thing", "sqlalchemy.url = sqlite://?application_name=tests"], ModuleNotFoundError),
        # So is the beginning of one that has an @: only what comes after that may be taken for something else.
        ([SCOPED, "sqlalchemy.url = sqlite://me:a@s3cret@/", "sqlalchemy.pool_size = many"], ValueError),
        # What quotes the URL, or may quote a part of it, is left out.
        ([SCOPED, "sqlalchemy.url = sqlite://me:p@55@localhost/notes"], None),
        ([SCOPED, "sqlalchemy.url = sqlite://localhost/notes?passwd=s3cret"], None),
        ([SCOPED, "sqlalchemy.url = postgresql://me:very@s3cret:s3cret@localhost/notes"], None),
    ],
)
@pytest.mark.usefixtures("broken_modules")
def test_the_cause_is_told_unless_it_quotes_a_secret(lines, cause, folder):
    with pytest.raises(ValueError, match="accepted") as raised:
        folder.section(*lines)
    assert type(raised.value.__cause__) is (cause or type(None))
    assert raised.value.__context__ is None


REFUSED_OBJECTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "session, a number": ({"session": 1}, ["session = 1", "int", "accepted", "sessionmaker"]),
    "session, none": ({"session": None}, ["session = None", "accepted", "sessionmaker"]),
    "session, one Session": (
        {"session": Session()},
        ["session = <sqlalchemy.orm.session.Session>", "accepted", "sessionmaker"],
    ),
    "commit_veto, false": ({"commit_veto": False}, ["commit_veto = False", "bool", "accepted", "status"]),
    "activate_hook, none": ({"activate_hook": None}, ["activate_hook = None", "NoneType", "accepted", "environ"]),
    "commit_at, none": ({"commit_at": None}, ["commit_at = None", "accepted", "start or end"]),
    "environ_key, bytes": (
        {"environ_key": b"key"},
        ["environ_key = <bytes>", "no text", "accepted", "sa_wsgi_session"],
    ),
    "a pool, its class": (
        {"sqlalchemy.url": "sqlite://", "sqlalchemy.pool": NullPool},
        ["sqlalchemy.pool = <", "the class of a pool", "accepted", "poolclass"],
    ),
    "a pool, its name": (
        {"sqlalchemy.url": "sqlite://", "sqlalchemy.pool": "sqlalchemy.pool:NullPool"},
        ["sqlalchemy.pool = 'sqlalchemy.pool:NullPool'", "no pool", "accepted", "poolclass"],
    ),
    **{
        f"{name}, {given!r}": (
            {"sqlalchemy.url": "sqlite://", f"sqlalchemy.{name}": given},
            [f"sqlalchemy.{name} = ", problem, "accepted", "an integer"],
        )
        for name, given, problem in (
            ("pool_size", None, "no number"),
            ("max_overflow", None, "no number"),
            ("query_cache_size", None, "no number"),
            ("pool_recycle", [60], "type list"),
            ("pool_timeout", [60], "type list"),
        )
    },
    "a URL, a number": ({"sqlalchemy.url": 1}, ["sqlalchemy.url = 1", "no text", "accepted", "postgresql://"]),
    "a URL of SQLAlchemy's": (
        {"sqlalchemy.url": URL.create("fnord", "me", "s3cret", "localhost", query={"passwd": "s3cret"})},
        ["sqlalchemy.url = 'fnord://me:***@localhost?***'", "no dialect 'fnord'", "accepted", "postgresql"],
    ),
    "a URL of SQLAlchemy's, of a driver that quotes it": (
        {"sqlalchemy.url": URL.create("sqlite+quoting", "me", "s3cret", "localhost")},
        [
            "sqlalchemy.url = 'sqlite+quoting://me:***@localhost'",
            "refuses it (AttributeError)",
            "accepted",
            "postgresql",
        ],
    ),
    "a setting": (
        {"sqlalchemy.url": "sqlite://", "sqlalchemy.connect_args": ["s3cret"]},
        ["sqlalchemy.connect_args = <list>", "refuses it", "accepted", "an object"],
    ),
}


@pytest.mark.parametrize("case", REFUSED_OBJECTS)
def test_what_is_wrong_is_told_to_python_code_too(case):
    conf, words = REFUSED_OBJECTS[case]
    refusal(lambda: filter_factory({}, **{"session": Scoped, **conf}), *words)


# -- docs/paste.rst ---------------------------------------------------------------------------------------------------


def blocks(title: str, language: str) -> list[str]:
    """The blocks in that language of one section of the page."""
    settings = {"report_level": 5, "halt_level": 5, "file_insertion_enabled": False, "syntax_highlight": "none"}
    page = publish_doctree(PAGE_TEXT, settings_overrides=settings)
    return [
        block.astext()
        for section in page.findall(nodes.section)
        if section.next_node(nodes.title).astext() == title
        for block in section.findall(nodes.literal_block)
        if language in block["classes"]
    ]


class Reader:
    """Somebody who has typed in the smallest example, and goes on from there."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        (self.module,) = blocks("The smallest file", "python")
        (self.ini,) = blocks("The smallest file", "ini")
        (folder.path / "guests.py").write_text(self.module, "utf-8")
        self._write(self.ini)
        self.load, self.make_tables = blocks("Serving it", "python")

    def _write(self, ini: str) -> None:
        (self.folder.path / "guests.ini").write_text(ini, "utf-8")

    def app(self, ini: str) -> Any:
        self._write(ini)
        return loadapp(f"config:{self.folder.path / 'guests.ini'}")

    def filter(self, ini: str) -> Any:
        self._write(ini)
        return loadfilter(f"config:{self.folder.path / 'guests.ini'}")

    def make(self) -> None:
        """Make the tables, as the page does."""
        self.run(self.make_tables)

    def run(self, source: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(source, "<docs/paste.rst>", "exec", dont_inherit=True), names)
        return names

    @property
    def guests(self) -> Any:
        import guests  # type: ignore[import-not-found]

        return guests

    def names(self, database: str = "guests") -> set[str]:
        with contextlib.closing(sqlite3.connect(self.folder.path / f"{database}.sqlite")) as connection:
            return {name for (name,) in connection.execute("SELECT name FROM guests")}


@pytest.fixture
def reader(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.chdir(folder.path)
    monkeypatch.syspath_prepend(folder.path)
    monkeypatch.delitem(sys.modules, "guests", raising=False)
    reader = Reader(folder)
    yield reader
    unbind(reader.guests.Session.session_factory)
    sys.modules.pop("guests")


def test_page_the_smallest_file(reader):
    application = reader.run(reader.load)["application"]
    reader.make()
    assert request(application, "/Ada").content == b"Welcome!\n"
    assert reader.names() == {"Ada"}
    with_filter = reader.ini.replace("[pipeline:main]\npipeline = session guests", "").replace(
        "[app:guests]", "[app:main]\nfilter-with = session"
    )
    assert "pipeline" not in with_filter
    assert request(reader.app(with_filter), "/Grace").statuses == ["200 OK"]
    assert reader.names() == {"Ada", "Grace"}


def test_page_keys(reader):
    with_a_pool, with_default = blocks("Keys", "ini")
    reader.filter(with_a_pool)
    engine = reader.guests.Session.session_factory.kw["bind"]
    assert (type(engine.pool), engine.echo) == (NullPool, "debug")
    engine.echo = False
    reader.filter(with_default)
    assert bind_of(sa_wsgi_session.paste.Session).url.database == str(reader.folder.path / "guests.sqlite")


@pytest.mark.parametrize("text", [PAGE_TEXT, sa_wsgi_session.paste.__doc__ or ""], ids=["page", "docstring"])
def test_every_key_is_documented(text):
    documented = set(re.findall(r"^``([a-z_.*]+)``(?=\n| +[A-Z`])", text, re.MULTILINE))
    if text is PAGE_TEXT:
        assert documented >= {f"retry.{field.name}" for field in dataclasses.fields(RetryPolicy)}
    documented = {"retry.*" if key.startswith("retry.") else key for key in documented}
    assert documented == {
        "session", "sqlalchemy.url", "sqlalchemy.*", "commit_veto", "commit_at", "activate_hook", "environ_key",
        "retry.*", "replicas", "observer", "server_timing", "warn_after",
    }  # fmt: skip
    accepted = refusal(lambda: filter_factory({}, fnord="23")).partition("accepted: ")[2]
    named = set(re.findall(r"[a-z_.*]+[a-z_*]", accepted)) - {"and", "other", "keys"}
    assert {"retry.*" if key.startswith("retry.") else key for key in named} == documented


def test_page_a_url_alone(reader):
    (source,) = blocks("A URL alone", "python")
    reader.filter(blocks("Keys", "ini")[1])
    names = reader.run(source)
    with session_scope(names["Session"]) as session:
        reader.guests.Base.metadata.create_all(session.connection())
    wrap = reader.filter(blocks("Keys", "ini")[1])
    request(wrap(names["welcome"]), "/Ada")
    names["invite"]("Grace")
    assert reader.names() == {"Ada", "Grace"}
    request(wrap(names["farewell"]), "/Ada")
    assert reader.names() == {"Grace"}


def test_page_coming_from_repoze(reader):
    (ini,) = blocks("Coming from repoze.tm2", "ini")
    wrap = reader.filter(ini)
    reader.make()

    def answer(status: str, *headers: tuple[str, str]) -> Any:
        def app(environ: Any, start_response: Any) -> Any:
            reader.guests.Session.add(reader.guests.Guest(name=environ["PATH_INFO"]))
            start_response(status, [*PLAIN, *headers])
            return []

        return app

    request(wrap(answer("200 OK", ("X-Tm", "abort"))), "aborted")
    request(wrap(answer("500 Oh", ("X-Tm", "commit"))), "committed")
    assert reader.names() == {"committed"}


def test_page_two_databases(reader):
    (ini,) = blocks("Two databases", "ini")
    (reader.folder.path / "shop.py").write_text(
        dedent(
            """
            from sqlalchemy.orm import scoped_session, sessionmaker
            from guests import Base, Guest

            GuestSession, OrderSession = scoped_session(sessionmaker()), scoped_session(sessionmaker())

            def main(global_conf):
                def shop(environ, start_response):
                    for session in GuestSession, OrderSession:
                        Base.metadata.create_all(session.connection())
                        session.add(Guest(name="Ada"))
                    assert environ["guests.session"] is GuestSession
                    assert environ["orders.session"] is OrderSession
                    start_response("200 OK", [])
                    return []
                return shop
            """
        )
    )
    try:
        assert request(reader.app(ini)).statuses == ["200 OK"]
        assert reader.names("guests") == reader.names("orders") == {"Ada"}
    finally:
        shop = sys.modules.pop("shop")
        unbind(shop.GuestSession.session_factory, shop.OrderSession.session_factory)


def test_page_errors(reader):
    (ini,) = blocks("Errors", "ini")
    (said,) = blocks("Errors", "text")
    with pytest.raises(ValueError, match="accepted") as raised:
        reader.filter(ini)
    # SQLAlchemy 1.4 knows two dialects more.
    assert str(raised.value).replace("firebird, ", "").replace("sqlite, sybase", "sqlite") == " ".join(said.split())


def test_page_shows_nothing_that_is_not_tested():
    page = PAGE_TEXT
    assert page.count("code-block:: python") == 1 + 2 + 1
    assert page.count("code-block:: ini") == 1 + 2 + 1 + 1 + 1
    assert page.count("code-block:: text") == 1
