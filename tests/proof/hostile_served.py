"""What the servers of ``test_hostile.py`` serve: an application that adds the request's body as a note.

``$HOSTILE_DATABASE`` is the URL of its database. ``/race`` loses its first race, ``/stream`` streams the answer,
``/fail`` raises. ``/-/state`` tells, in JSON, what the process holds, and what it has told of success.
"""

from __future__ import annotations

import json
import os
import re
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url

from sa_wsgi_session import RetryPolicy, SessionMiddleware
from tests.proof.hostile_support import PACKAGE, assert_clear, logged
from tests.support import PLAIN, World, note

# As long as the process lives.
_logging = logged()
log = _logging.__enter__()

#: More than a server of these tests has threads.
CONNECTIONS = 20

world = World(make_url(os.environ["HOSTILE_DATABASE"]), pool_size=CONNECTIONS)


class Lost(Exception):
    """A race was lost."""


class Failed(Exception):
    """What the application raises."""


def application_inside(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    text = read(environ).decode("latin-1")
    environ["hostile.text"].append(text)
    world.Session.add(note(text[:200]))
    world.Session.flush()
    if path.startswith("/race") and environ["sa_wsgi_session.scope"].attempt == 1:
        raise Lost
    if path.startswith("/fail"):
        raise Failed
    good = re.fullmatch("n[0-9]{7}", text) is not None
    start_response("200 OK" if good else "400 Bad Request", PLAIN)
    chunks = [b"added ", text.encode("latin-1")]
    return iter(chunks) if path.endswith("/stream") else chunks


def read(environ: dict[str, Any]) -> bytes:
    """The whole body, as an application reads it that trusts its server."""
    if environ.get("wsgi.input_terminated"):
        body: bytes = environ["wsgi.input"].read()
    else:
        size = environ.get("CONTENT_LENGTH", "")
        body = environ["wsgi.input"].read(int(size)) if size.isdigit() else b""
    return body


middleware = SessionMiddleware(
    application_inside,
    world.Session,
    retry=RetryPolicy(delay=0, is_transient=lambda error: isinstance(error, Lost)),
)


class Ledger:
    """What went through the middleware, as the server sees it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.running = 0
        self.told: list[str] = []
        #: Exceptions that nobody has raised on purpose.
        self.strays: list[str] = []
        #: Threads that were left with a session.
        self.bound = 0

    def serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # The same list in every attempt.
        texts: list[str] = []
        environ["hostile.text"] = texts

        def start(status: str, *more: Any) -> Any:
            if status.startswith("2"):
                with self._lock:
                    self.told.append(texts[-1])
            return start_response(status, *more)

        with self._lock:
            self.running += 1
        try:
            return middleware(environ, start)
        except Exception as error:
            self._judge(error)
            raise
        finally:
            with self._lock:
                self.running -= 1
                self.bound += world.Session.registry.has()

    def _judge(self, error: Exception) -> None:
        where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        # What a server raises where a client breaks off, or the database where two send the same, is theirs.
        if where.is_relative_to(PACKAGE) or "webob" in where.parts:
            try:
                assert_clear(error)
            except AssertionError as stray:
                with self._lock:
                    self.strays.append(str(stray))

    def state(self) -> dict[str, Any]:
        with self._lock:
            return {
                "pid": os.getpid(),
                "go_on": os.environ["GUEST_BOOK_GO_ON"],
                "running": self.running,
                "checked_out": world.checked_out,
                "told": sorted(self.told),
                "strays": self.strays,
                "bound": self.bound,
                "forged": log.forged,
            }


ledger = Ledger()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if environ.get("PATH_INFO") != "/-/state":
        return ledger.serve(environ, start_response)
    answer = json.dumps(ledger.state()).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
    return [answer]
