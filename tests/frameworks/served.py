"""What the servers of test_guest_books.py serve: one guest book, and a way to look behind it.

``$GUEST_BOOK`` names the folder of the example, ``$GUEST_BOOK_URL`` its database (examples/guest_book.py).  A server is
given ``tests.frameworks.served:application``.

``/-/state`` answers, in JSON, what cannot be seen from the outside: what the server says of itself in the environ, how
many connections are checked out, what became of the bodies that were handed to the server, and how often a thread was
left with a session.

A stream of events goes on after its first one when there is the file that ``$GUEST_BOOK_GO_ON`` names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from examples import guest_book

#: The modules that serve, where it is not ``application``.
MODULES = {"pyramid": "wsgi"}

#: The longest that a stream waits after its first event, in seconds: longer than any buffer on its way may take.
LONGEST_WAIT = 5


class Body:
    """A streamed body on its way to the server: counts whether it is closed, and changes nothing."""

    def __init__(self, body: Any, probe: Probe) -> None:
        self._body = body
        self._probe = probe
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        try:
            self._body.close()
        finally:
            self._probe.look_for_what_is_left()
            self.closed += 1
            self._probe.closed(self)


class Probe:
    """Between the server and the application."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = threading.Lock()
        # Weak, for a body that the server drops has to end as if nobody looked.
        self._open: weakref.WeakSet[Body] = weakref.WeakSet()
        self._handed_on = 0
        # All scopes are kept, and with them what they still hold, or a session that the middleware has forgotten would
        # give its connection back as soon as Python frees it, and be forgotten by the test too.
        self._scopes: list[Any] = []
        self._closed = 0
        self._closed_twice = 0
        self._left_in_registry = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/-/state":
            answer = json.dumps(self._state(environ)).encode()
            start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
            return [answer]
        try:
            body = self._app(environ, start_response)
        finally:
            self.look_for_what_is_left()
            self._scopes.append(environ.get("sa_wsgi_session.scope"))
        if isinstance(body, (list, tuple)) or not hasattr(body, "close"):
            return body
        counted = Body(body, self)
        with self._lock:
            self._open.add(counted)
            self._handed_on += 1
        return counted

    def closed(self, body: Body) -> None:
        with self._lock:
            self._open.discard(body)
            self._closed += body.closed == 1
            self._closed_twice += body.closed == 2

    def look_for_what_is_left(self) -> None:
        """The thread goes back to the server: whatever it serves next would find this session."""
        with self._lock:
            self._left_in_registry += guest_book.Session.registry.has()

    def _state(self, environ: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            still_open = len(self._open)
            dropped = self._handed_on - self._closed - still_open
        return {
            "pid": os.getpid(),
            "go_on": str(GO_ON),
            "checked_out": guest_book.Session.session_factory.kw["bind"].pool.checkedout(),
            "open_bodies": still_open,
            "dropped_bodies": dropped,
            "closed_twice": self._closed_twice,
            "left_in_registry": self._left_in_registry,
            "server": environ.get("SERVER_SOFTWARE", ""),
            "multithread": bool(environ["wsgi.multithread"]),
            "multiprocess": bool(environ["wsgi.multiprocess"]),
            "file_wrapper": environ.get("wsgi.file_wrapper") is not None,
        }


GO_ON = Path(os.environ["GUEST_BOOK_GO_ON"])
_events = guest_book.events


def events() -> Iterator[bytes]:
    """The second event comes when the client has told that it has seen the first."""
    rest: Any = _events()  # a generator, which is to be closed even where it is not read to its end
    with contextlib.closing(rest):
        yield next(rest)
        deadline = time.monotonic() + LONGEST_WAIT
        while not GO_ON.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield from rest


def asgi_application() -> Any:
    """The same for a server that knows ASGI only."""
    from a2wsgi import WSGIMiddleware

    app: Any = application
    return WSGIMiddleware(app)


# Whatever the server does with its own -W or PYTHONWARNINGS: the log has to show a body that was dropped unclosed.
warnings.simplefilter("always", ResourceWarning)
# And what the middleware complains of, in a form that is found again.
_complaints = logging.StreamHandler()
_complaints.setLevel(logging.WARNING)
_complaints.setFormatter(logging.Formatter("SA_WSGI_SESSION %(levelname)s %(message)s"))
logging.getLogger("sa_wsgi_session").addHandler(_complaints)
guest_book.PAUSE = 0.05
guest_book.events = events
_name = os.environ["GUEST_BOOK"]
application = Probe(import_module(f"examples.{_name}.{MODULES.get(_name, 'application')}").application)
