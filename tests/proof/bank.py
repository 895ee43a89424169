"""The bank of ``faults.py``: transfers between a few accounts, on which many clients are at once.

It is served by the function :func:`serve`, which takes from the environment what it needs::

    BANK_URL=postgresql+psycopg://... BANK_NAME=... gunicorn "tests.proof.bank:serve()"

There are two branches, each with an engine, a session and a middleware of its own: ``local`` has a thread-local
session, and lets its exceptions go on to the server; ``context`` has a contextual one, makes error pages itself, and
asks a connection whether it is alive before it uses it. In each of them there is

``POST /<branch>/transfer/<id>``
    An order in JSON: ``source``, ``target`` and ``amount``; whether it is to ``lock`` the accounts before it reads
    them; and its ``kind``, see :data:`KINDS`. It answers 200, or 409 where the balance does not suffice.

``GET /<branch>/export/<id>?<pages>``
    A stream: the sum of all balances, then so many pages of a quarter of a megabyte. The receipt for it is written to
    the database when the first chunk has left, and is durable if the stream is read to its end.

``/status`` tells, in JSON, what cannot be seen from the outside.

That an order has come twice is for the tests to see, so no constraint keeps it from being done twice.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine
from sqlalchemy.engine.url import make_url
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker

from sa_wsgi_session import RetryPolicy, SessionMiddleware, contextual_session, current_scope

#: What may be ordered: a transfer in the view; one that the view commits itself, before it goes on to something else;
#: the same, but then the view loses its connection; one whose second half is in the body, in the same transaction; one
#: that is done and then doomed, and answers 200 all the same; one that is done, and then the view raises.
KINDS = ("transfer", "early transfer", "abandoned transfer", "late transfer", "rehearsal", "blunder")

#: Seconds after which a statement, a lock or a transaction in which nothing happens is given up by the database.
PATIENCE = 1.5

PAGE = 256 * 1024
PAGES = 64

THREADS = 8

Base: Any = declarative_base()


class Account(Base):
    __tablename__ = "account"
    id = sa.Column(sa.Integer, primary_key=True)
    balance = sa.Column(sa.Integer, nullable=False)


class Transfer(Base):
    __tablename__ = "transfer"
    number = sa.Column(sa.Integer, primary_key=True)
    id = sa.Column(sa.String(40), nullable=False)
    source = sa.Column(sa.Integer, nullable=False)
    target = sa.Column(sa.Integer, nullable=False)
    amount = sa.Column(sa.Integer, nullable=False)


class Receipt(Base):
    __tablename__ = "receipt"
    number = sa.Column(sa.Integer, primary_key=True)
    id = sa.Column(sa.String(40), nullable=False)


class Page(Base):
    __tablename__ = "page"
    id = sa.Column(sa.Integer, primary_key=True)
    text = sa.Column(sa.String(1024), nullable=False)


class Blunder(Exception):
    """What a view raises after it has changed something."""


def connect(url: URL, **options: Any) -> Engine:
    """An engine whose connections give up in time what does not go on."""
    milliseconds = int(PATIENCE * 1000)
    if url.get_backend_name() == "postgresql":
        options["isolation_level"] = "SERIALIZABLE"
        settings = {
            "statement_timeout": milliseconds,
            "idle_in_transaction_session_timeout": milliseconds,
            "deadlock_timeout": 50,
        }
        arguments = {
            "connect_timeout": 2,
            "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
        }
    else:
        arguments = {
            "connect_timeout": 2,
            "read_timeout": PATIENCE,
            "write_timeout": PATIENCE,
            "init_command": f"SET innodb_lock_wait_timeout = {int(PATIENCE)}",
        }
    return sa.create_engine(url, pool_size=THREADS, max_overflow=0, connect_args=arguments, **options)


class Branch:
    """The application within the middleware, for one kind of session."""

    def __init__(self, session: Any, engine: Engine) -> None:
        self._session = session
        self._on_postgresql = engine.dialect.name == "postgresql"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        _, _branch, action, name = environ["PATH_INFO"].split("/")
        if action == "transfer":
            return self._transfer(name, environ, start_response)
        return self._export(name, int(environ["QUERY_STRING"]), start_response)

    def _transfer(self, name: str, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        session, scope = self._session, current_scope(self._session)
        order = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        amount, kind = order["amount"], order["kind"]
        assert kind in KINDS
        # At SERIALIZABLE PostgreSQL finds out by itself who has read what is no longer so. Where rows are locked, there
        # are deadlocks as well.
        lock = order["lock"] or not self._on_postgresql
        source = session.get(Account, order["source"], with_for_update=lock)
        target = session.get(Account, order["target"], with_for_update=lock)
        session.add(Transfer(id=name, source=source.id, target=target.id, amount=amount))
        source.balance -= amount
        session.flush()
        # The last two never come to be. A rehearsal is not durable, so of that nobody is told either.
        scope.on_commit(lambda: notice(name))
        if source.balance < 0:
            return _answer(start_response, "409 Conflict", b"the balance does not suffice\n")
        if kind == "late transfer":
            scope.commit_at = "end"
            # Of no known length: what the client has read is complete only if the server says so at the end.
            start_response("200 OK", [("Content-Type", "text/plain")])
            return self._second_half(target, amount)
        target.balance += amount
        if kind in ("early transfer", "abandoned transfer"):
            session.commit()
            if kind == "abandoned transfer":
                session.connection().connection.dbapi_connection.close()
            self._touch(order["target"], lock)
        if kind == "blunder":
            session.flush()
            raise Blunder(name)
        if kind == "rehearsal":
            scope.doom("a rehearsal")
        return _answer(start_response, "200 OK", b"done\n")

    def _touch(self, account: int, lock: bool) -> None:
        """Change nothing, in a transaction that loses races like any other."""
        touched = self._session.get(Account, account, with_for_update=lock, populate_existing=True)
        touched.balance += 1
        self._session.flush()
        touched.balance -= 1

    def _second_half(self, target: Any, amount: int) -> Iterator[bytes]:
        yield b"taken\n"
        target.balance += amount
        yield b"given\n"

    def _export(self, name: str, pages: int, start_response: Any) -> Iterable[bytes]:
        session = self._session
        total = session.execute(sa.select(sa.func.sum(Account.balance))).scalar()
        texts = session.execute(sa.select(Page.text).order_by(Page.id).limit(pages))
        start_response("200 OK", [("Content-Type", "text/plain")])
        # The view has left a result open, so this goes on in its transaction.
        return self._pages(name, total, texts)

    def _pages(self, name: str, total: int, texts: Any) -> Iterator[bytes]:
        yield b"%d\n" % total
        self._session.add(Receipt(id=name))
        self._session.flush()
        for (text,) in texts:
            yield text.encode() * (PAGE // len(text))


def notice(name: str) -> None:
    """Tell of a transfer that is durable. (Whole lines, whoever else writes.)"""
    os.write(2, f"DONE {name}\n".encode())


def _answer(start_response: Any, status: str, body: bytes) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def with_error_pages(app: Any) -> Any:
    """What frameworks do: no exception of a view comes out of them."""

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        try:
            return app(environ, start_response)
        except Exception:
            return _answer(start_response, "500 Internal Server Error", b"an error page\n")

    return application


class Bank:
    """Both branches, and what there is to tell of them."""

    def __init__(self, url: URL, name: str) -> None:
        self._name = name
        self._branches: dict[str, Any] = {}
        self._sessions: list[Any] = []
        self._engines: list[Engine] = []
        # Kept for a while, with what they hold: a connection that the middleware has forgotten would otherwise be given
        # back as soon as Python frees its session, and be forgotten by the tests as well.
        self._scopes: deque[Any] = deque(maxlen=5000)
        self._left_in_registry = 0
        policy = RetryPolicy(attempts=5, delay=0.02)
        for branch, make_session, wrap, options in (
            ("local", scoped_session, lambda app: app, {}),
            ("context", contextual_session, with_error_pages, {"pool_pre_ping": True}),
        ):
            engine = connect(url, **options)
            session: Any = make_session(sessionmaker(engine))
            self._engines.append(engine)
            self._sessions.append(session)
            self._branches[branch] = SessionMiddleware(wrap(Branch(session, engine)), session, retry=policy)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/status":
            return _answer(start_response, "200 OK", json.dumps(self._status()).encode())
        branch = self._branches[environ["PATH_INFO"].split("/")[1]]
        try:
            body: Iterable[bytes] = branch(environ, start_response)
            return body
        finally:
            self._scopes.append(environ.get("sa_wsgi_session.scope"))
            # What this thread serves next would find it.
            self._left_in_registry += sum(session.registry.has() for session in self._sessions)

    def _status(self) -> dict[str, Any]:
        pools: list[Any] = [engine.pool for engine in self._engines]
        return {
            "name": self._name,
            "pid": os.getpid(),
            "checked_out": sum(pool.checkedout() for pool in pools),
            "left_in_registry": self._left_in_registry,
        }


def serve() -> Bank:
    """The application, for a server that runs in a process of its own."""
    # Whatever the server does with its own -W: a body that is dropped unclosed has to show in the log.
    warnings.simplefilter("always", ResourceWarning)
    complaints = logging.StreamHandler()
    complaints.setFormatter(logging.Formatter("SA_WSGI_SESSION %(levelname)s %(message)s"))
    logger = logging.getLogger("sa_wsgi_session")
    logger.addHandler(complaints)
    logger.propagate = False
    return Bank(make_url(os.environ["BANK_URL"]), os.environ["BANK_NAME"])
