"""Who is measured: one small application, with its sessions managed in each of the ways that there are.

Each contender is set up as its own documentation says, with an engine of its own, and does the same work:

=============  ========================================================================================
``/none``      no database
``/session``   a session is made, and not used
``/read``      one row, by its key
``/rows``      1,000 rows, one result
``/insert``    one row more
``/stream``    one row is read, then 1,000 chunks are streamed
``/error``     a row is inserted, then the view raises
``/race``      the view loses a race; it is replayed where the contender can do that
=============  ========================================================================================

The views are functions of a session: what differs is where that comes from, and who ends its transaction.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from sa_wsgi_session import RetryPolicy, SessionMiddleware, contextual_session

Environ = dict[str, Any]
Application = Callable[[Environ, Any], Iterable[bytes]]

ROWS = 1000
CHUNKS = 1000
TEXT = "a row of the table"
HEADERS = [("Content-Type", "text/plain")]


class Failure(Exception):
    """What the view raises on ``/error``."""


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "row"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Counter(Base):
    """A row with a version counter: whoever writes an old version of it has lost a race."""

    __tablename__ = "counter"
    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


@dataclass(frozen=True)
class Database:
    """Where the rows are."""

    url: str = "sqlite://"
    #: Connections in the pool, for a server.
    pool_size: int = 5
    isolation_level: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What ``create_engine()`` is given besides."""
        if self.url == "sqlite://":
            return {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
        options: dict[str, Any] = {"pool_size": self.pool_size, "max_overflow": 0, "pool_timeout": 300}
        if self.isolation_level is not None:
            options["isolation_level"] = self.isolation_level
        return options

    def engine(self) -> sa.Engine:
        return prepared(sa.create_engine(self.url, **self.options))


def prepared(engine: sa.Engine) -> sa.Engine:
    """With the table, and the rows, unless they are there."""
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        if connection.scalar(sa.select(sa.func.count()).select_from(Row)) == 0:
            connection.execute(sa.insert(Row), [{"text": TEXT} for _ in range(ROWS)])
            connection.execute(sa.insert(Counter).values(value=0, version=1))
    return engine


# The views

View = Callable[[Any, Any], "bytes | Iterator[bytes]"]


def read(session: Any, row: Any) -> bytes:
    found = session.get(row, 7)
    return str(found.text).encode()


def rows(session: Any, row: Any) -> bytes:
    found = session.scalars(sa.select(row).where(row.id <= ROWS))
    return b"\n".join(each.text.encode() for each in found)


def insert(session: Any, row: Any) -> bytes:
    session.add(row(text=TEXT))
    return b"inserted"


def stream(session: Any, row: Any) -> Iterator[bytes]:
    text = read(session, row)
    return (text for _ in range(CHUNKS))


def error(session: Any, row: Any) -> bytes:
    insert(session, row)
    session.flush()
    raise Failure


_attempts = itertools.count(1)


def race(session: Any, row: Any) -> bytes:
    """Lost each other time: to an update that the session has not seen."""
    counter = session.get(Counter, 1)
    if next(_attempts) % 2:
        session.execute(
            sa.update(Counter).values(version=Counter.version + 1).execution_options(synchronize_session=False)
        )
    counter.value += 1
    session.flush()
    return b"won"


VIEWS: dict[str, View] = {
    "/read": read,
    "/rows": rows,
    "/insert": insert,
    "/stream": stream,
    "/error": error,
    "/race": race,
}
#: Those that leave something to be committed.
CHANGES = {"/insert"}


# Applications that know WSGI only


def plain(Session: Callable[[], Any]) -> Application:
    """The application; *Session* gives it the session."""

    def application(environ: Environ, start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        body: bytes | Iterator[bytes] = b"nothing"
        if path == "/session":
            Session()
        elif path != "/none":
            body = VIEWS[path](Session(), Row)
        start_response("200 OK", HEADERS)
        return [body] if isinstance(body, bytes) else body

    return application


def make_floor(database: Database) -> Application:
    # Nothing is ever committed or given back: what the work itself costs.
    return plain(scoped_session(sessionmaker(database.engine())))


def by_hand(app: Application, Session: Any) -> Application:
    """What the textbook says: commit, else roll back, and remove in any case."""

    def application(environ: Environ, start_response: Any) -> Iterable[bytes]:
        try:
            body = app(environ, start_response)
            Session.commit()
            return body
        except BaseException:
            Session.rollback()
            raise
        finally:
            Session.remove()

    return application


def make_by_hand(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine()))
    return by_hand(plain(Session), Session)


def make_ours(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine()))
    return SessionMiddleware(plain(Session), Session)


def make_ours_contextual(database: Database) -> Application:
    Session = contextual_session(sessionmaker(database.engine()))
    return SessionMiddleware(plain(Session), Session)


#: Replays at once: what is measured is the work, not the pause.
POLICY = RetryPolicy(attempts=3, delay=0)


def make_ours_with_policy(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine()))
    return SessionMiddleware(plain(Session), Session, retry=POLICY)


def make_ours_observed(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine()))
    return SessionMiddleware(plain(Session), Session, observer=lambda unit: None, server_timing=True)


def make_repoze(database: Database) -> Application:
    from repoze.tm import TM, default_commit_veto
    from zope.sqlalchemy import register

    Session = scoped_session(sessionmaker(database.engine()))
    register(Session)
    app: Application = TM(plain(Session), commit_veto=default_commit_veto)
    return app


# Flask


def flask_app(Session: Callable[[], Any], row: Any = Row, *, commit: bool = False) -> Any:
    """The application; with *commit* the views commit for themselves."""
    from flask import Flask, Response

    app = Flask("benchmarks")
    # What it says of the exceptions that are raised on purpose is not what is measured.
    app.logger.disabled = True

    @app.get("/none")
    def none() -> str:
        return "nothing"

    @app.get("/session")
    def session() -> str:
        Session()
        return "nothing"

    def add(path: str, view: View) -> None:
        def endpoint() -> Response:
            session = Session()
            body = view(session, row)
            if commit and path in CHANGES:
                session.commit()
            return Response(body, mimetype="text/plain")

        app.add_url_rule(path, path, endpoint)

    for path, view in VIEWS.items():
        add(path, view)
    return app


def make_flask_ours(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine()))
    return SessionMiddleware(flask_app(Session).wsgi_app, Session)


def make_flask_ours_with_policy(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine()))
    return SessionMiddleware(flask_app(Session).wsgi_app, Session, retry=POLICY)


def make_flask_by_hand(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine()))
    app = flask_app(Session, commit=True)

    @app.teardown_appcontext
    def remove(error: BaseException | None) -> None:
        Session.remove()

    application: Application = app.wsgi_app
    return application


def make_flask_sqlalchemy(database: Database) -> Application:
    from flask_sqlalchemy import SQLAlchemy

    db = SQLAlchemy(model_class=type("Base", (DeclarativeBase,), {}))
    # The same table as ours, as a model of the extension's.
    model: Any = type(
        "Row",
        (db.Model,),
        {
            "__tablename__": "row",
            "__annotations__": {"id": Mapped[int], "text": Mapped[str]},
            "id": mapped_column(primary_key=True),
        },
    )
    app = flask_app(lambda: db.session, model, commit=True)
    app.config["SQLALCHEMY_DATABASE_URI"] = database.url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = database.options
    db.init_app(app)
    with app.app_context():
        prepared(db.engine)
    # db.session is a proxy; on /session the session itself is made, as by everyone else.
    endpoint = app.view_functions["session"]
    app.view_functions["session"] = lambda: (db.session(), endpoint())[1]
    application: Application = app.wsgi_app
    return application


def make_advanced_alchemy(database: Database) -> Application:
    from advanced_alchemy.extensions.flask import AdvancedAlchemy, SQLAlchemySyncConfig

    config = SQLAlchemySyncConfig(engine_instance=database.engine(), commit_mode="autocommit")
    alchemy = AdvancedAlchemy(config)
    app = flask_app(lambda: alchemy.get_sync_session())
    alchemy.init_app(app)
    application: Application = app.wsgi_app
    return application


# Pyramid


def pyramid_config(Session: Callable[[Any], Any]) -> Any:
    """The configuration of the application; *Session* gives a request its session."""
    from pyramid.config import Configurator
    from pyramid.response import Response

    config = Configurator()

    def add(path: str, view: Callable[[Any], bytes | Iterator[bytes]]) -> None:
        def endpoint(request: Any) -> Response:
            body = view(request)
            if isinstance(body, bytes):
                return Response(body, content_type="text/plain")
            return Response(app_iter=body, content_type="text/plain")

        config.add_route(path, path)
        config.add_view(endpoint, route_name=path)

    def with_session(view: View) -> Callable[[Any], bytes | Iterator[bytes]]:
        return lambda request: view(Session(request), Row)

    add("/none", lambda request: b"nothing")
    add("/session", with_session(lambda session, row: b"nothing"))
    for path, view in VIEWS.items():
        add(path, with_session(view))
    return config


def make_pyramid_ours(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine()))
    return SessionMiddleware(pyramid_config(lambda request: Session()).make_wsgi_app(), Session)


def make_pyramid_ours_with_policy(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine()))
    app = pyramid_config(lambda request: Session()).make_wsgi_app()
    return SessionMiddleware(app, Session, retry=POLICY)


def make_pyramid_with(database: Database, *packages: str) -> Application:
    """As Pyramid's cookiecutter does it, with these packages included."""
    from zope.sqlalchemy import register

    factory = sessionmaker(database.engine())

    def dbsession(request: Any) -> Session:
        session = factory()
        register(session, transaction_manager=request.tm)
        return session

    config = pyramid_config(lambda request: request.dbsession)
    config.add_settings({"tm.manager_hook": "pyramid_tm.explicit_manager"})
    for package in packages:
        config.include(package)
    config.add_request_method(dbsession, reify=True)
    app: Application = config.make_wsgi_app()
    return app


def make_pyramid_tm(database: Database) -> Application:
    return make_pyramid_with(database, "pyramid_tm")


def make_pyramid_retry(database: Database) -> Application:
    return make_pyramid_with(database, "pyramid_retry", "pyramid_tm")


# Django


def make_django(database: Database) -> Application:
    import django
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.db import connection, models
    from django.http import HttpResponse, StreamingHttpResponse
    from django.urls import path

    default: dict[str, Any] = {"ATOMIC_REQUESTS": True, "CONN_MAX_AGE": None}
    url = sa.engine.make_url(database.url)
    if url.get_backend_name() == "sqlite":
        default |= {"ENGINE": "django.db.backends.sqlite3", "NAME": "file:benchmarks?mode=memory&cache=shared"}
    else:
        default |= {"ENGINE": "django.db.backends.postgresql", "NAME": url.database, "USER": url.username}
        default |= {"PASSWORD": url.password, "HOST": url.host, "PORT": url.port}
    settings.configure(ALLOWED_HOSTS=["*"], DATABASES={"default": default}, ROOT_URLCONF=__name__, LOGGING_CONFIG=None)
    logging.getLogger("django.request").disabled = True
    django.setup()

    class DjangoRow(models.Model):
        text = models.CharField(max_length=50)

        class Meta:
            app_label = "benchmarks"
            db_table = "django_row"

    with suppress(Exception), connection.schema_editor() as editor:
        editor.create_model(DjangoRow)  # unless another process has
    objects = DjangoRow.objects
    if objects.count() == 0:
        objects.bulk_create([DjangoRow(text=TEXT) for _ in range(ROWS)])

    def read() -> bytes:
        return str(objects.get(pk=7).text).encode()

    def error() -> bytes:
        objects.create(text=TEXT)
        raise Failure

    def insert() -> bytes:
        objects.create(text=TEXT)
        return b"inserted"

    def stream() -> Iterator[bytes]:
        text = read()
        return (text for _ in range(CHUNKS))

    def endpoint(view: Callable[[], bytes | Iterator[bytes]]) -> Callable[[Any], Any]:
        def respond(request: Any) -> Any:
            body = view()
            if isinstance(body, bytes):
                return HttpResponse(body, content_type="text/plain")
            return StreamingHttpResponse(body, content_type="text/plain")

        return respond

    views: dict[str, Callable[[], bytes | Iterator[bytes]]] = {
        "none": lambda: b"nothing",
        "read": read,
        "rows": lambda: b"\n".join(row.text.encode() for row in objects.filter(pk__lte=ROWS)),
        "insert": insert,
        "stream": stream,
        "error": error,
    }
    urlpatterns[:] = [path(name, endpoint(view)) for name, view in views.items()]
    app: Application = get_wsgi_application()
    return app


#: Django's, which it looks for in a module.
urlpatterns: list[Any] = []


# All of them

CASES = ("/none", "/session", *VIEWS)


@dataclass(frozen=True)
class Contender:
    #: What it is called in the tables.
    name: str
    #: Whom it is compared with.
    family: str
    make: Callable[[Database], Application]
    #: Who commits, and when; what becomes of a client that hangs up; what becomes of a lost race.
    semantics: str
    #: The distributions that it consists of.
    packages: tuple[str, ...] = ()
    #: What it does not have.
    without: frozenset[str] = field(default=frozenset())
    #: Whether it is this package.
    ours: bool = False

    @property
    def versions(self) -> str:
        return ", ".join(f"{package} {metadata.version(package)}" for package in self.packages)


_OURS = "commits before the status leaves, by the status; rolls back and removes the session at a hang-up"
_POLICY = f"{_OURS}; replays a lost race"
_NO_REPLAY = frozenset({"/race"})

CONTENDERS = [
    Contender(
        "no session management",
        "WSGI",
        make_floor,
        "one session for ever, nothing is committed: what the work itself costs",
        without=frozenset({"/error", "/race"}),
    ),
    Contender(
        "by hand",
        "WSGI",
        make_by_hand,
        "try: commit, except: rollback, finally: remove; whatever the status says, and before the body streams",
        without=_NO_REPLAY,
    ),
    Contender("sa_wsgi_session", "WSGI", make_ours, _OURS, without=_NO_REPLAY, ours=True),
    Contender("sa_wsgi_session, contextual", "WSGI", make_ours_contextual, _OURS, without=_NO_REPLAY, ours=True),
    Contender("sa_wsgi_session, retry", "WSGI", make_ours_with_policy, _POLICY, ours=True),
    Contender(
        "sa_wsgi_session, observed",
        "WSGI",
        make_ours_observed,
        f"{_OURS}; tells an observer, and Server-Timing",
        without=_NO_REPLAY,
        ours=True,
    ),
    Contender(
        "repoze.tm2",
        "WSGI",
        make_repoze,
        "commits when the body has been read, after the status has left; a client that hangs up leaves the transaction "
        "to the next request of the thread",
        ("repoze.tm2", "zope.sqlalchemy", "transaction"),
        without=_NO_REPLAY,
    ),
    Contender(
        "Flask, by hand",
        "Flask",
        make_flask_by_hand,
        "the view commits; teardown_appcontext removes the session, before the body streams",
        ("Flask",),
        without=_NO_REPLAY,
    ),
    Contender("Flask, sa_wsgi_session", "Flask", make_flask_ours, _OURS, ("Flask",), without=_NO_REPLAY, ours=True),
    Contender("Flask, sa_wsgi_session, retry", "Flask", make_flask_ours_with_policy, _POLICY, ("Flask",), ours=True),
    Contender(
        "Flask-SQLAlchemy",
        "Flask",
        make_flask_sqlalchemy,
        "the view commits; the extension removes the session, before the body streams",
        ("Flask", "Flask-SQLAlchemy"),
        without=_NO_REPLAY,
    ),
    Contender(
        "advanced-alchemy",
        "Flask",
        make_advanced_alchemy,
        "commit_mode='autocommit': commits after the view if the status is 2xx, and closes the session",
        ("Flask", "advanced-alchemy"),
        without=_NO_REPLAY,
    ),
    Contender(
        "Pyramid, sa_wsgi_session", "Pyramid", make_pyramid_ours, _OURS, ("pyramid",), without=_NO_REPLAY, ours=True
    ),
    Contender(
        "Pyramid, sa_wsgi_session, retry", "Pyramid", make_pyramid_ours_with_policy, _POLICY, ("pyramid",), ours=True
    ),
    Contender(
        "pyramid_tm",
        "Pyramid",
        make_pyramid_tm,
        "commits after the view, unless it raises; before the body streams",
        ("pyramid", "pyramid_tm", "zope.sqlalchemy", "transaction"),
        without=_NO_REPLAY,
    ),
    Contender(
        "pyramid_tm, pyramid_retry",
        "Pyramid",
        make_pyramid_retry,
        "the same; replays a lost race",
        ("pyramid", "pyramid_tm", "pyramid_retry", "zope.sqlalchemy", "transaction"),
    ),
    Contender(
        "Django",
        "Django",
        make_django,
        "ATOMIC_REQUESTS, with its own ORM: commits after the view, unless it raises; before the body streams",
        ("Django",),
        without=frozenset({"/session", "/race"}),
    ),
]

FAMILIES = tuple(dict.fromkeys(contender.family for contender in CONTENDERS))


def named(name: str) -> Contender:
    """The contender of that name.

    :raises KeyError: if there is none.
    """
    return {contender.name: contender for contender in CONTENDERS}[name]
