"""Slow clients: fifty of them read a response of 2 MB at 20 kB/s; how long do others wait for one of two connections?

The view loads 1,000 rows, in one result; the body renders their attributes, over and over, until it is long enough.  A
contender that keeps the connection until the body ends is at the end of its capacity with two such clients.

All contenders are served at the same time, each by a server with a pool and a database of its own: nearly all that they
do is wait.  Waitress lets a response run ahead of its client by 16 MB unless it is told otherwise: none of 2 MB
waits for its client.  So it is measured as it comes, and with 64 KiB, which is how any longer response fares.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import scoped_session, sessionmaker

from benchmarks.contenders import (
    ROWS,
    TEXT,
    VIEWS,
    Application,
    Contender,
    Database,
    Environ,
    View,
    by_hand,
    make_advanced_alchemy,
    make_by_hand,
    make_flask_sqlalchemy,
    make_ours,
    make_pyramid_tm,
    make_repoze,
    plain,
)
from benchmarks.serve import Served, Setup, serving
from sa_wsgi_session import SessionMiddleware

CLIENTS = 50
BYTES = 2_000_000
CHUNK = 16_000
BYTES_PER_SECOND = 20_000
CONNECTIONS = 2
#: More than there are clients: what the others wait for is a connection, not a thread.
THREADS = 64
SECONDS = 30.0
#: In which the slow clients come, one after the other: all at once, they would be a load, and be waited for as such.
SECONDS_TO_COME = 12.0
#: Until all that can be sent is.
SECONDS_TO_SETTLE = 3.0
SECONDS_TO_HANG_UP = 5.0
#: Whoever waits longer for the answer to a short request has none.
TIMEOUT = 10.0
PAUSE = 0.05

SETUPS = {
    "waitress": Setup(server="waitress", threads=THREADS, pool_size=CONNECTIONS),
    "waitress, 64 KiB": Setup(server="waitress", threads=THREADS, pool_size=CONNECTIONS, read_ahead=65536),
    "gunicorn": Setup(server="gunicorn", threads=THREADS, pool_size=CONNECTIONS),
}


# The applications: /slow is the long response, /read the short request


def rendered(rows: Iterable[Any]) -> Iterator[bytes]:
    """The rows as lines, over and over, in chunks."""
    left = BYTES
    buffer = bytearray()
    for row in itertools.cycle(rows):
        buffer += f"{row.id:08d},{row.text:<400}\n".encode()
        if len(buffer) >= min(CHUNK, left):
            yield bytes(buffer[:left])
            left -= len(buffer)
            if left <= 0:
                return
            buffer.clear()


def slow(session: Any, row: Any) -> Iterator[bytes]:
    return rendered(session.scalars(sa.select(row).where(row.id <= ROWS)).all())


def slow_in_context(session: Any, row: Any) -> Iterator[bytes]:
    """As Flask's documentation says.  The context ends with the view, and is there once more for the body."""
    from flask import stream_with_context

    return stream_with_context(slow(session, row))


@dataclass(frozen=True)
class _Constant:
    id: int
    text: str


def slow_without_database(session: Any, row: Any) -> Iterator[bytes]:
    return rendered([_Constant(number, TEXT) for number in range(1, ROWS + 1)])


def _made_with(view: View, make: Callable[[Database], Application]) -> Callable[[Database], Application]:
    def made(database: Database) -> Application:
        # In the process of the contender, which serves nothing else.
        VIEWS["/slow"] = view
        return make(database)

    return made


def _make_by_hand_without_expiry(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine(), expire_on_commit=False))
    return by_hand(plain(Session), Session)


def _make_by_hand_until_close(database: Database) -> Application:
    from werkzeug.wsgi import ClosingIterator

    Session = scoped_session(sessionmaker(database.engine()))
    app = plain(Session)

    def finish() -> None:
        try:
            Session.commit()
        finally:
            Session.remove()

    def application(environ: Environ, start_response: Any) -> Iterable[bytes]:
        try:
            body = app(environ, start_response)
        except BaseException:
            Session.remove()
            raise
        return ClosingIterator(body, finish)

    return application


def _make_ours_at_end(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine()))
    return SessionMiddleware(plain(Session), Session, commit_at="end")


def _make_django(database: Database) -> Application:
    """With Django's own pool of connections (since 5.1), in place of one connection for each thread."""
    import django
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.db import connection, models
    from django.http import HttpResponse, StreamingHttpResponse
    from django.urls import path

    url = sa.make_url(database.url)
    default = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.database,
        "USER": url.username,
        "PASSWORD": url.password,
        "HOST": url.host,
        "PORT": url.port,
        "ATOMIC_REQUESTS": True,
        # It waits as long as those of the others.
        "OPTIONS": {"pool": {"min_size": 0, "max_size": database.pool_size, "timeout": 300}},
    }
    settings.configure(ALLOWED_HOSTS=["*"], DATABASES={"default": default}, ROOT_URLCONF=__name__, LOGGING_CONFIG=None)
    django.setup()

    class DjangoRow(models.Model):
        text = models.CharField(max_length=50)

        class Meta:
            app_label = "benchmarks"
            db_table = "django_row"

    objects = DjangoRow.objects
    with connection.schema_editor() as editor:
        editor.create_model(DjangoRow)
    objects.bulk_create([DjangoRow(text=TEXT) for _ in range(ROWS)])
    connection.close()

    def slow(request: Any) -> Any:
        return StreamingHttpResponse(rendered(list(objects.filter(pk__lte=ROWS))), content_type="text/plain")

    urlpatterns[:] = [
        path("none", lambda request: HttpResponse(b"nothing", content_type="text/plain")),
        path("read", lambda request: HttpResponse(objects.get(pk=7).text, content_type="text/plain")),
        path("slow", slow),
    ]
    app: Application = get_wsgi_application()
    return app


#: Django's, which it looks for in a module.
urlpatterns: list[Any] = []

#: The first: what the server itself costs others.
CONTENDERS = [
    Contender("no database", "WSGI", _made_with(slow_without_database, make_by_hand), "the long response needs none"),
    Contender(
        "by hand",
        "WSGI",
        _made_with(slow, make_by_hand),
        "commits, which expires the rows, and removes the session before the body streams",
    ),
    Contender(
        "by hand, expire_on_commit=False",
        "WSGI",
        _made_with(slow, _make_by_hand_without_expiry),
        "the same, and the rows keep what was loaded",
    ),
    Contender(
        "by hand, until the body is closed",
        "WSGI",
        _made_with(slow, _make_by_hand_until_close),
        "commits and removes the session when the server closes the body",
    ),
    Contender(
        "sa_wsgi_session",
        "WSGI",
        _made_with(slow, make_ours),
        "commits before the status leaves, and the rows keep what was loaded",
        ours=True,
    ),
    Contender(
        "sa_wsgi_session, commit_at='end'",
        "WSGI",
        _made_with(slow, _make_ours_at_end),
        "one transaction over view and body",
        ours=True,
    ),
    Contender(
        "repoze.tm2", "WSGI", _made_with(slow, make_repoze), "commits when the body has been read", ("repoze.tm2",)
    ),
    Contender(
        "Flask-SQLAlchemy",
        "Flask",
        _made_with(slow, make_flask_sqlalchemy),
        "removes the session before the body streams; a view that only reads commits nothing, so nothing expires",
        ("Flask-SQLAlchemy",),
    ),
    Contender(
        "Flask-SQLAlchemy, stream_with_context",
        "Flask",
        _made_with(slow_in_context, make_flask_sqlalchemy),
        "removes the session before the body streams, and that which the body may make after it",
        ("Flask-SQLAlchemy",),
    ),
    Contender(
        "advanced-alchemy",
        "Flask",
        _made_with(slow, make_advanced_alchemy),
        "commits after the view and closes the session, before the body streams",
        ("advanced-alchemy",),
    ),
    Contender(
        "pyramid_tm",
        "Pyramid",
        _made_with(slow, make_pyramid_tm),
        "commits, which expires the rows, and closes the session before the body streams",
        ("pyramid_tm", "zope.sqlalchemy"),
    ),
    Contender(
        "Django, pool",
        "Django",
        _make_django,
        "commits after the view; the connection is given back when the body is closed",
        ("Django",),
    ),
]


# The clients


class _SlowClient:
    """Reads, a little now and then, until it is told to hang up."""

    def __init__(self, served: Served, delay: float) -> None:
        self._served = served
        self._delay = delay
        self.status: int | None = None
        #: The response ended although nobody can have read all of it.
        self._broken_off = False

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._delay)
        with socket.socket() as connection:
            # The kernel takes as little as it can, and as much at a time as over Ethernet: on loopback it would take
            # 2 MB off the server at once.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
            connection.setblocking(False)
            try:
                await loop.sock_connect(connection, (self._served.host, self._served.port))
                await loop.sock_sendall(connection, b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
                while chunk := await loop.sock_recv(connection, 4096):
                    if self.status is None:
                        self.status = int(chunk.split(maxsplit=2)[1])
                    await asyncio.sleep(len(chunk) / BYTES_PER_SECOND)
                self._broken_off = True
            except OSError:
                self._broken_off = True

    @property
    def begun(self) -> bool:
        return self.status == 200

    @property
    def broken(self) -> bool:
        return self._broken_off or self.status not in (None, 200)


async def _wait_for_answer(served: Served) -> int:
    """Ask for something short, on a connection of its own; its status."""
    reader, writer = await asyncio.open_connection(served.host, served.port)
    try:
        writer.write(b"GET /read HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        head = await reader.readline()
        await reader.read()
        return int(head.split(maxsplit=2)[1])
    finally:
        writer.close()


@dataclass
class _Waiting:
    """What another client has seen."""

    milliseconds: list[float]
    failures: int = 0


async def _ask_again_and_again(served: Served, deadline: float) -> _Waiting:
    seen = _Waiting([])
    while (began := time.perf_counter()) < deadline:
        try:
            status = await asyncio.wait_for(_wait_for_answer(served), TIMEOUT)
        except (asyncio.TimeoutError, OSError, IndexError, ValueError):  # the last two: it was no answer
            seen.failures += 1
        else:
            if status == 200:
                seen.milliseconds.append((time.perf_counter() - began) * 1000)
            else:
                seen.failures += 1
        await asyncio.sleep(PAUSE)
    return seen


async def _observe(all_served: list[Served], scale: float) -> list[tuple[list[_SlowClient], _Waiting]]:
    delays = [number * SECONDS_TO_COME / CLIENTS for number in range(CLIENTS)]
    slow_clients = [[_SlowClient(served, delay) for delay in delays] for served in all_served]
    reading = [asyncio.create_task(client.run()) for clients in slow_clients for client in clients]
    try:
        await asyncio.sleep(SECONDS_TO_COME + SECONDS_TO_SETTLE)
        deadline = time.perf_counter() + SECONDS * scale
        seen = await asyncio.gather(*(_ask_again_and_again(served, deadline) for served in all_served))
    finally:
        for task in reading:
            task.cancel()
        ends = await asyncio.gather(*reading, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):  # and not cancelled
            raise end
    return list(zip(slow_clients, seen, strict=True))


# The measurement


def measure(database_url: str, tell: Callable[[str], None], *, scale: float = 1.0) -> Iterator[dict[str, Any]]:
    """How long others wait, while the slow clients read.

    :param tell: called with what is being measured.
    :param scale: of the time for which that is observed.
    """
    for title, setup in SETUPS.items():
        tell(f"slow clients: {title}, {len(CONTENDERS)} contenders start")
        with serving(CONTENDERS, database_url, setup, __name__) as all_served:
            tell(f"slow clients: {title}, {CLIENTS} for each of {len(all_served)} contenders")
            seen = asyncio.run(_observe(all_served, scale))
            tell(f"slow clients: {title}, they have hung up")
            leaked = _leaked(all_served)
            for served, (clients, waiting) in zip(all_served, seen, strict=True):
                times = waiting.milliseconds
                broken = sum(client.broken for client in clients)
                if broken:
                    tell(
                        f"slow clients: {broken} broken responses of {served.contender.name}; it said:\n{served.said()}"
                    )
                yield {
                    "part": "slow clients",
                    "contender": served.contender.name,
                    "family": served.contender.family,
                    "server": title,
                    "threads": setup.threads,
                    "connections": setup.pool_size,
                    "clients": CLIENTS,
                    "wait_ms": {
                        "median": statistics.median(times) if times else None,
                        "p99": _percentile(times, 99) if times else None,
                        "max": max(times, default=None),
                    },
                    "answers": len(times),
                    "failures": waiting.failures,
                    # Those that have got some of it; the others have waited all the time.
                    "begun": sum(client.begun for client in clients),
                    "broken": broken,
                    "leaked": leaked[served.contender.name],
                }


def _percentile(values: list[float], percent: int) -> float:
    return values[0] if len(values) < 2 else statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _leaked(all_served: list[Served]) -> dict[str, int]:
    """Connections whose transaction is open after everybody has gone, and the server has had the time to notice it."""
    deadline = time.monotonic() + SECONDS_TO_HANG_UP
    while True:
        open_now = {served.contender.name: _open_transactions(served) for served in all_served}
        if not any(open_now.values()) or time.monotonic() > deadline:
            return open_now
        time.sleep(0.5)


def _open_transactions(served: Served) -> int:
    statement = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE '%in transaction%'"
    )
    return int(served.execute(statement)[0][0])
