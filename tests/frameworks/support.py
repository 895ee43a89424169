"""What the tests of the frameworks share: requests, a guest book, and a generator that notes what happens to it."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from examples import guest_book
from sa_wsgi_session import current_scope
from tests.frameworks.applications import Framework
from tests.support import Exchange, World, is_in_a_scope, make_environ

URLENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=b"


def only(*names: str) -> pytest.MarkDecorator:
    """Let a test that takes ``framework``, or the guest book in it, run with these frameworks only."""
    return pytest.mark.parametrize("framework", names, indirect=True)


def start(
    app: Any,
    path: str = "/",
    method: str = "GET",
    *,
    on_start: Callable[[str], object] = lambda status: None,
    **environ: Any,
) -> Exchange:
    """A request whose body nobody has read yet."""
    return Exchange(app, make_environ(path, method, **{"HTTP_HOST": "127.0.0.1", **environ}), on_start=on_start)


def ask(app: Any, path: str = "/", method: str = "GET", **environ: Any) -> Exchange:
    """A whole request. The body is in ``.content``."""
    exchange = start(app, path, method, **environ)
    exchange.content = exchange.read()
    return exchange


def status_code(exchange: Exchange) -> int:
    return int(exchange.status[:3])


def headers(exchange: Exchange) -> dict[str, str]:
    """Their names in small letters."""
    return {name.lower(): value for name, value in exchange.headers}


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it on a thread of its own, with which ends what a framework may leave behind there."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


class Book:
    """The guest book in one framework, with a database that is empty at first."""

    def __init__(self, framework: Framework, path: Path) -> None:
        self.framework = framework
        self._path = path
        self.application: Any = import_module(f"examples.{framework.name}.{framework.module}").application
        #: The module with its views.
        self.views = import_module(f"examples.{framework.name}.application")
        # The examples share one Session, which each of them binds when it is imported; here, each test binds it.
        guest_book.open_database()
        self._engine = guest_book.Session.session_factory.kw["bind"]

    def start(self, path: str = "/", method: str = "GET", **more: Any) -> Exchange:
        return start(self.application, path, method, **more)

    def ask(self, path: str = "/", method: str = "GET", **environ: Any) -> Exchange:
        return ask(self.application, path, method, **environ)

    def send(self, path: str, form: bytes, content_type: str = URLENCODED, **environ: Any) -> Exchange:
        sent = {"wsgi.input": io.BytesIO(form), "CONTENT_LENGTH": str(len(form)), "CONTENT_TYPE": content_type}
        return self.ask(path, "POST", **{**sent, **environ})

    def sign(self, text: str, path: str = "/", **fields: str) -> Exchange:
        return self.send(path, urlencode({"text": text, **fields}).encode())

    @property
    def texts(self) -> list[str]:
        """The texts that are durable."""
        with closing(sqlite3.connect(self._path)) as connection:
            return [text for (text,) in connection.execute("SELECT text FROM entries ORDER BY id")]

    def fill(self, count: int) -> None:
        """Put this many entries into the database, past the session."""
        with closing(sqlite3.connect(self._path)) as connection, connection:
            rows = ((f"entry {number}",) for number in range(count))
            connection.executemany("INSERT INTO entries (name, text) VALUES ('Ada', ?)", rows)

    @property
    def checked_out(self) -> int:
        """How many connections the pool has given out and not got back."""
        return int(self._engine.pool.checkedout())

    def close(self) -> None:
        self._engine.dispose()


class Log:
    """What a generator did, and whether the session was bound then."""

    def __init__(self, world: World) -> None:
        self.lines: list[str] = []
        self._Session = world.Session

    def chunks(self) -> Iterator[bytes]:
        try:
            for number in (1, 2):
                self._note(f"chunk {number}")
                yield f"{number}".encode()
        finally:
            self._note("finally")

    def _note(self, what: str) -> None:
        bound = is_in_a_scope() and current_scope().session is self._Session()
        self.lines.append(what if bound else f"{what}, unbound")
