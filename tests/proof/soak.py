"""A long run: many requests of all shapes to one process, a fifth of them hung up; and what that process then holds.

How it flows (:func:`soak`)::

    start a server ─▶ measure ─▶ warm up ─▶ measure ─▶ all the other requests ─▶ measure ─▶ read the database

It is measured when all is quiet: the clients have closed their connections, and every thread of the server has since
served a request that has no session (``/-/meet`` of ``soak_served.py``). What is still there then is kept by somebody.
Nothing changes from one measurement to the next but what grows: the number of objects is the same, to the last one.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

from sqlalchemy import select

from tests.frameworks.wsgi_servers import (
    APPLICATION,
    THREADS,
    WSGI_SERVERS,
    Running,
    WSGIServer,
    run_wsgi_server,
)
from tests.proof.soak_shapes import ALL_ONCE, DONE, ENDLESS, FIRST, Request, request
from tests.proof.soak_views import DATABASE, LARGE_FILE, SMALL_FILE, Number, Row, make_database, make_engine
from tests.servers import tail

SERVED = "tests.proof.soak_served:application"

CLIENTS = 6
#: So many requests, or half of them: what is made when it is first needed is not only made by the first ones.  And the
#: allocator takes its time: what little is kept from request to request, Python's counters and tables, lies somewhere
#: else after each, and keeps the page that it is on.  The first 25,000 requests have most of that.
LONGEST_WARM_UP = 25_000
#: Seconds, against what hangs.
PATIENCE = 120
#: Seconds in which a server, once all is quiet, has to let go of what it held.
SECONDS_TO_REST = 20

#: The size of a file, in bytes, that is larger than all the buffers on its way.
LARGE = 32 * 1024 * 1024

#: What a request makes: of these, as many have to be there as before the first request.
PER_REQUEST = frozenset(
    {
        "sqlalchemy.orm.session.Session",
        "sqlalchemy.orm.session.SessionTransaction",
        "sqlalchemy.orm.state.InstanceState",
        "sqlalchemy.engine.base.Connection",
        "sqlalchemy.engine.base.RootTransaction",
        "sqlalchemy.engine.base.NestedTransaction",
        "sqlalchemy.engine.cursor.CursorResult",
        "sqlite3.Connection",
        "sqlite3.Cursor",
    }
)
#: And of all that is made by the package, and by the application.
OURS = ("sa_wsgi_session.", "tests.proof.")

#: That memory is measured, and not what allocators do with it. As they are, they keep what was freed, each thread some
#: for itself, and let it lie between what is in use: with eight threads that is some megabytes, and it goes on for some
#: ten thousand requests, although not a byte more is in use. So there is one allocator, that of the C library, with one
#: store for all threads (glibc's; others ignore that), which can give back what is free.
ALLOCATOR = {
    "PYTHONMALLOC": "malloc",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1",
}


def soak_server(name: str) -> WSGIServer:
    """A server of ``tests/frameworks/wsgi_servers.py`` that serves the application of the long run."""
    [server] = [server for server in WSGI_SERVERS if server.name == name]

    def command(port: int, folder: Path) -> list[str]:
        words = [word.replace(APPLICATION, SERVED) for word in server.command(port, folder)]
        if name.startswith("gunicorn"):
            # It hangs up on a client that is quiet for two seconds; on a machine with more to do, some are.
            words.insert(-1, f"--keep-alive={PATIENCE}")
        if name == "uwsgi":
            # It does, after each answer, and does not say so.
            words.append("--add-header=Connection: close")
        return words

    return replace(server, command=command)


# -- the clients ------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a client has seen."""

    requests: int = 0
    hung_up: int = 0
    #: Of these, in the middle of an answer whose end the application sees.
    endless: int = 0
    #: How much was added to the number that all share.
    added: int = 0
    kept: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    #: Those of which nobody knows.
    unknown: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Client:
    """One client, on one connection after the other."""

    def __init__(self, server: WSGIServer, port: int) -> None:
        self._server = server
        self._port = port
        self._connection = self._connect()
        self.seen = Seen()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)

    def close(self) -> None:
        self._connection.close()

    def play(self, request: Request) -> None:
        self.seen.requests += 1
        if request.shape.hangs_up is not None:
            self.seen.hung_up += 1
            wrong = self._hang_up(request)
        else:
            wrong = self._ask(request)
        if wrong is not None:
            self.seen.wrong.append(f"{request.shape.method} {request.target}: {wrong}")

    def _ask(self, request: Request) -> str | None:
        """Ask, and return what is wrong with the answer."""
        shape, seen = request.shape, self.seen
        seen.kept += request.labels(shape.keeps)
        seen.refused += request.labels(shape.refuses)
        seen.added += shape.counts
        connection = self._connection
        status, body, chunked, cut = None, b"", False, False
        try:
            connection.request(shape.method, request.target, request.content)
            response = connection.getresponse()
            status, chunked = response.status, bool(response.chunked)
            body = response.read()
        except http.client.IncompleteRead as error:
            body, cut = error.partial, True
        except (http.client.HTTPException, ConnectionError) as error:
            # A new one for the next request.
            connection.close()
            if not (shape.fails and self._server.breaks_off_errors):
                return repr(error)
            return None
        if cut or shape.fails:
            # cheroot closes it then, and does not say so.
            connection.close()
        if status != shape.status and not (shape.fails and status is not None and status >= 500):
            return f"status {status}, {body[:200]!r}"
        if cut and not shape.breaks:
            return f"broken off after {body[:200]!r}"
        if chunked and shape.breaks and not cut:
            return f"ended as if {body[:200]!r} were all of it"
        # Without a length and without chunks, which uWSGI does not make, an answer that breaks off looks like a whole
        # one: it is the body that tells.
        expected = None if shape.fails and self._server.breaks_off_errors else request.answer
        if expected is not None and body != expected:
            return f"body {body[:200]!r}"
        return None

    def _hang_up(self, request: Request) -> str | None:
        """Ask, leave in the middle, and return what is wrong with the answer by then."""
        shape, seen = request.shape, self.seen
        connection = self._connection
        self._connection = self._connect()
        if connection.sock is None:
            connection.connect()
        if request.resets:
            # No FIN when it is closed, but an RST.
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        response: http.client.HTTPResponse | None = None
        try:
            if shape.hangs_up == "in its body":
                seen.refused += request.labels(shape.refuses)
                self._send_half(connection, request)
                return None
            connection.request(shape.method, request.target)
            if shape.hangs_up == "before the answer":
                seen.unknown += request.labels(shape.keeps)
                return None
            response = connection.getresponse()
            begin = response.read(len(FIRST))
        except (http.client.HTTPException, OSError) as error:
            return repr(error)
        finally:
            if response is not None:
                response.close()
            connection.close()
        seen.kept += request.labels(shape.keeps)
        seen.refused += request.labels(shape.refuses)
        seen.endless += shape.name in ENDLESS
        if response.status != shape.status:
            return f"status {response.status}, {begin!r}"
        if shape.name in ENDLESS and begin != FIRST:
            return f"body {begin!r}"
        return None

    @staticmethod
    def _send_half(connection: http.client.HTTPConnection, request: Request) -> None:
        content = request.content
        assert content is not None
        connection.putrequest(request.shape.method, request.target)
        connection.putheader("Content-Length", str(len(content)))
        connection.endheaders(content[: len(content) // 2])


class Run:
    """Clients at work on one server."""

    def __init__(self, server: WSGIServer, port: int, log: Path) -> None:
        self._server = server
        self._port = port
        self._log = log
        self._next = 0
        self.seen = Seen()
        self.seconds = 0.0

    def play(self, count: int) -> None:
        """The next *count* requests.

        :raises WrongAnswer: at the first one that is wrong.
        """
        numbers = range(self._next, self._next + count)
        self._next = numbers.stop
        began = time.monotonic()
        stop = Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            for seen in pool.map(lambda first: self._play(numbers[first::CLIENTS], stop), range(CLIENTS)):
                self.seen.add(seen)
        self.seconds += time.monotonic() - began
        if self.seen.wrong:
            raise WrongAnswer("\n".join([*self.seen.wrong, f"{self._server.name} said:", tail(self._log)]))

    def _play(self, numbers: range, stop: Event) -> Seen:
        with contextlib.closing(Client(self._server, self._port)) as client:
            for number in numbers:
                if stop.is_set():
                    break
                client.play(request(number))
                if client.seen.wrong:
                    stop.set()
            return client.seen


# -- what the server holds --------------------------------------------------------------------------------------------


class Measured:
    """What ``/-/state`` has told."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        #: Resident memory, and what of it is in use (``None`` where that can't be told), in bytes.
        self.resident: int = state["resident"]
        self.in_use: int | None = state["in_use"]
        #: What the garbage collector knows.
        self.objects: int = state["objects"]
        self.types: dict[str, int] = state["types"]

    @property
    def per_request(self) -> dict[str, int]:
        return {name: count for name, count in self.types.items() if name in PER_REQUEST or name.startswith(OURS)}

    def more_than(self, before: Measured) -> dict[str, int]:
        """The types of which there are more than before, and how many more; the most first."""
        return dict((Counter(self.types) - Counter(before.types)).most_common())


def measure(running: Running) -> Measured:
    """What the server holds, now that all its threads have met."""
    with ThreadPoolExecutor(int(THREADS)) as pool:
        for meeting in [pool.submit(_meet, running.port) for _ in range(int(THREADS))]:
            meeting.result()
    return Measured(running.state())


def _meet(port: int) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        # Such that the server closes it, in the same thread.
        connection.request("GET", "/-/meet", headers={"Connection": "close"})
        response = connection.getresponse()
        if (response.status, response.read()) != (200, b"null"):
            raise RuntimeError(f"the threads of the server did not meet: {response.status}")


def measure_until(running: Running, accept: Callable[[Measured, Measured], bool]) -> Measured:
    """Measure until *accept* takes this measurement and the last one, or the time to rest is over.

    What is kept by somebody does not go in that time.
    """
    deadline = time.monotonic() + SECONDS_TO_REST
    last = measure(running)
    while True:
        now = measure(running)
        if accept(now, last) or time.monotonic() > deadline:
            return now
        time.sleep(0.1)
        last = now


# -- the long run -----------------------------------------------------------------------------------------------------


class WrongAnswer(Exception):
    """A client was not answered what it has to be answered."""


@dataclass(frozen=True)
class Result:
    """What has come of the long run on one server."""

    server: str
    seen: Seen
    #: How long the clients took, in seconds.
    seconds: float
    #: How many of the requests were for the warm-up.
    warm_up: int
    before: Measured
    warm: Measured
    last: Measured
    #: The labels of the rows in the database.
    rows: set[str]
    #: What those who raced have added to.
    number: int


def soak(name: str, count: int, folder: Path) -> Result:
    """Have *count* requests made to that server.

    :raises NotInstalled: where it is not installed.
    :raises WrongAnswer: as soon as a client is answered what it must not be.
    """
    engine = make_engine(folder / DATABASE, 1)
    make_database(engine)
    engine.dispose()
    (folder / SMALL_FILE).write_bytes(DONE)
    with (folder / LARGE_FILE).open("wb") as file:
        file.write(FIRST)
        file.truncate(LARGE)
    server = soak_server(name)
    log = folder / "server.log"
    warm_up = max(ALL_ONCE, min(count // 2, LONGEST_WARM_UP))
    environment = {"SOAK_FOLDER": str(folder), "SOAK_THREADS": THREADS, **ALLOCATOR}
    with run_wsgi_server(server, environment, log) as running:
        run = Run(server, running.port, log)
        before = measure(running)
        run.play(warm_up)
        # Twice the same: it was not measured while the server was still letting go of something.
        warm = measure_until(running, lambda now, last: now.objects == last.objects)
        run.play(count - warm_up)
        last = measure_until(running, lambda now, last: now.objects <= warm.objects)
    with engine.connect() as connection:
        rows = set(connection.execute(select(Row.label)).scalars())
        number: int = connection.execute(select(Number.value)).scalar_one()
    engine.dispose()
    return Result(name, run.seen, run.seconds, warm_up, before, warm, last, rows, number)
