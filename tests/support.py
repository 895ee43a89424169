"""What the tests of the package share: a model, a world around one database, and a WSGI client."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker
from sqlalchemy.pool import QueuePool

from sa_wsgi_session import NoActiveScope, SessionMiddleware, contextual_session, current_scope

Base: Any = declarative_base()


class Note(Base):
    """A row; its text is unique, which the database checks at once."""

    __tablename__ = "note"
    id = sa.Column(sa.Integer, primary_key=True)
    text = sa.Column(sa.String(200), unique=True, nullable=False)


#: Both kinds of registry that the package binds without moving more than it has to, and any other.
REGISTRIES = ("thread-local", "contextual", "custom")


#: Runs a test with a world of each of them, where that can make a difference.
in_each_registry = pytest.mark.parametrize("world", REGISTRIES, indirect=True)


def note(text: str) -> Note:
    return Note(text=text)


def make_session(registry: str, factory: Any) -> Any:
    """A scoped session with that kind of registry."""
    if registry == "thread-local":
        return scoped_session(factory)
    if registry == "contextual":
        return contextual_session(factory)
    # All threads alike: only for tests that run on one thread at a time.
    return scoped_session(factory, scopefunc=lambda: "the one and only")


class World:
    """One database, its pool, and a session of the application's."""

    def __init__(self, url: Any, registry: str = "thread-local", *, pool_size: int = 5, **options: Any) -> None:
        # SQLAlchemy 1.4 pools no connections to SQLite files, so it does not open them for all threads either.
        arguments = {"check_same_thread": False} if url.get_backend_name() == "sqlite" else {}
        self.engine: Engine = sa.create_engine(
            url, poolclass=QueuePool, pool_size=pool_size, max_overflow=0, connect_args=arguments
        )
        if self.engine.dialect.name == "sqlite":
            make_sqlite_transactional(self.engine)
        Base.metadata.create_all(self.engine)
        self.Session: Any = make_session(registry, sessionmaker(self.engine, **options))
        # Reads what is durable: a pool, and so a connection, of its own.
        self._observer: Engine = sa.create_engine(url)

    def durable(self) -> list[str]:
        """The texts of the notes that another connection sees, in alphabetical order."""
        with self._observer.connect() as connection:
            return list(connection.execute(sa.select(Note.text).order_by(Note.text)).scalars())

    def insert(self, *texts: str) -> None:
        """Put notes into the database, past the session."""
        with self._observer.begin() as connection:
            connection.execute(sa.insert(Note), [{"text": text} for text in texts])

    @property
    def checked_out(self) -> int:
        """How many connections the pool has given out and not got back."""
        return self.engine.pool.checkedout()  # type: ignore[attr-defined]

    def close(self) -> None:
        self.engine.dispose()
        self._observer.dispose()


class Worlds:
    """Worlds that several tests use one after the other, because a database takes its time to make."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._worlds: dict[tuple[str, str], World] = {}
        self._stack = ExitStack()
        self._made = 0

    @contextmanager
    def use(self, fixture: Callable[[str], Any], database: str, registry: str) -> Iterator[World]:
        """A world without notes, in which a test leaves nothing bound and nothing checked out.

        :param fixture: ``request.getfixturevalue``, which starts the database's server.
        :param database: ``"sqlite"``, ``"postgresql"`` or ``"mariadb"``; or a certain driver, as in
            ``"postgresql+psycopg2"``.
        """
        world = self._worlds.pop((database, registry), None) or self._make(fixture, database, registry)
        yield world
        assert world.checked_out == 0
        assert not world.Session.registry.has()
        assert not is_in_a_scope()
        with world.engine.begin() as connection:
            connection.execute(sa.delete(Note))
        # Only now: where a test has failed, the next one gets another world.
        self._worlds[database, registry] = world

    def _make(self, fixture: Callable[[str], Any], database: str, registry: str) -> World:
        self._made += 1
        if database == "sqlite":
            url = sa.engine.URL.create("sqlite", database=str(self._folder / f"{self._made}.sqlite"))
        else:
            url = self._stack.enter_context(fixture(database.partition("+")[0]).database())
        if database == "postgresql" and not sa.__version__.startswith("1.4."):
            url = url.set(drivername="postgresql+psycopg")
        elif "+" in database:
            url = url.set(drivername=database)
        world = World(url, registry)
        self._stack.callback(world.close)
        return world

    def close(self) -> None:
        self._stack.close()


def is_in_a_scope() -> bool:
    """Whether any unit of work, of whatever session, is active here."""
    try:
        current_scope()
    except NoActiveScope:
        return False
    return True


def make_sqlite_transactional(engine: Engine, journal_mode: str = "MEMORY") -> None:
    """Let SQLAlchemy begin SQLite's transactions, as its documentation advises where SAVEPOINTs are used."""

    @event.listens_for(engine, "connect")
    def _no_implicit_begin(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        # For speed: nobody will miss these files after a power cut.
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(f"PRAGMA journal_mode = {journal_mode}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")


def make_environ(path: str = "/", method: str = "GET", **more: Any) -> dict[str, Any]:
    """A complete environ, as PEP 3333 demands it."""
    return {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        **more,
    }


class Exchange:
    """One request as the server of PEP 3333 makes it, step by step.

    The constructor calls the application; iterate with :meth:`read`, hang up with :meth:`close`.
    """

    #: The whole body, after :func:`request`.
    content: bytes

    def __init__(
        self,
        app: Any,
        environ: dict[str, Any] | None = None,
        *,
        on_start: Callable[[str], object] = lambda status: None,
    ) -> None:
        self.environ = make_environ() if environ is None else environ
        #: Every status that the server was told, in order.
        self.statuses: list[str] = []
        self.headers: list[tuple[str, str]] = []
        #: What went through the legacy write().
        self.written: list[bytes] = []
        self._on_start = on_start
        self._iterator: Iterator[bytes] | None = None
        self.body: Any = app(self.environ, self._start_response)

    def _start_response(self, status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], object]:
        if exc_info is not None and (self.written or self._iterator is not None):
            raise exc_info[1].with_traceback(exc_info[2])
        self._on_start(status)
        self.statuses.append(status)
        self.headers = list(headers)
        return self.written.append

    @property
    def status(self) -> str:
        return self.statuses[-1]

    def next(self) -> bytes:
        """The next chunk, or ``StopIteration``."""
        if self._iterator is None:
            self._iterator = iter(self.body)
        return next(self._iterator)

    def read(self) -> bytes:
        """The rest of the body, and close."""
        with closing(self):
            if self._iterator is None:
                self._iterator = iter(self.body)
            return b"".join(self._iterator)

    def close(self) -> None:
        close = getattr(self.body, "close", None)
        if close is not None:
            close()


def request(app: Any, path: str = "/", method: str = "GET", **more: Any) -> Exchange:
    """A whole request: called, read to the end, closed.  The body is in ``.content``."""
    exchange = Exchange(app, make_environ(path, method, **more))
    exchange.content = exchange.read()
    return exchange


PLAIN = [("Content-Type", "text/plain")]


def respond(view: Callable[[], Any], status: str = "200 OK") -> Any:
    """The application whose every response has this status, and the body that *view* returns."""

    def app(environ: Any, start_response: Any) -> Any:
        body = view()
        start_response(status, PLAIN)
        return body

    return app


def serve(world: World, view: Callable[[], Any], status: str = "200 OK", **options: Any) -> SessionMiddleware:
    return SessionMiddleware(respond(view, status), world.Session, **options)


class Body:
    """An iterable body with a ``close``, which calls *on_close*."""

    def __init__(self, chunks: Any, on_close: Callable[[], object] = lambda: None) -> None:
        self.closed = 0
        self._chunks = chunks
        self._on_close = on_close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._chunks)

    def close(self) -> None:
        self.closed += 1
        self._on_close()
