"""Every guest book of the examples under every server, with clients as they are: many at once, and not all polite.

Nothing is mocked: a real server in a process of its own, a real database, and real sockets. The clients read, post,
fail, and crash the application; they hang up in the middle of an export and of a stream without an end, stop reading
for a while, and leave in the middle of a form. In the end the database holds exactly what was acknowledged, no
connection and no transaction is left open, and the server's log tells of no trouble but the one that was made on
purpose.

With ``$GUEST_BOOK_REPORT`` set to the name of a folder, what was seen is written there, one JSON file for each pair.
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import io
import json
import os
import platform
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from sqlalchemy import create_engine, func, insert, select, text
from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import NullPool

from examples.guest_book import Base, Entry
from tests.conftest import SQLALCHEMY_14, unavailable
from tests.frameworks.wsgi_servers import WSGI_SERVERS, Running, WSGIServer, run_wsgi_server
from tests.servers import DatabaseServer, NotInstalled

#: The folder of each guest book, and the distribution of its framework.
FRAMEWORKS = {
    "plain_wsgi": None,
    "flask": "Flask",
    "bottle": "bottle",
    "pyramid": "pyramid",
    "falcon": "falcon",
    "django": "Django",
    "cherrypy": "CherryPy",
    "turbogears": "TurboGears2",
    "morepath": "morepath",
    "webpy": "web.py",
}

#: Entries that are there before the first client comes: their export is larger than all the buffers on its way.
PREFILLED = 4000
TEXT = "All work and no play makes Jack a dull boy. " * 9

#: What the entry begins with whose sender leaves in the middle of it. Nobody has told them that it is kept, so that it
#: may be there or not.
HALF = "half"

#: How long to wait for what has to come.
SECONDS = 20

#: SQLite needs no server of its own, and so it is there for whoever has no PostgreSQL: under one server, that of the
#: examples themselves.
CELLS = [
    pytest.param((framework, server, database), id=f"{framework}-{server.name}-{database}")
    for framework in FRAMEWORKS
    for server in WSGI_SERVERS
    for database in ("postgresql", "sqlite")
    if database == "postgresql" or server.name == "waitress"
]


# -- clients ----------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def connect(port: int, *, narrow: bool = False) -> socket.socket:
    """A connection to the server.

    :param narrow: as little as possible is on its way in it: the buffers of both ends are as small as they get.
    """
    client = socket.socket()
    client.settimeout(SECONDS)
    if narrow:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # The server's end sizes its buffer by the segments that it may send: those of an Ethernet, not of the loopback.
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
    client.connect(("127.0.0.1", port))
    return client


def send(client: socket.socket, method: str, path: str) -> None:
    client.sendall(f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())


def ask(port: int, method: str, path: str, form: dict[str, str] | None = None) -> Answer:
    """Send a request and read its answer to the end.

    :raises http.client.HTTPException: if that ends too early.
    """
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection:
        body = None if form is None else urlencode(form)
        connection.request(method, path, body, {"Content-Type": "application/x-www-form-urlencoded"} if form else {})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def response_to(client: socket.socket, method: str = "GET") -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(client, method=method)
    response.begin()
    return response


def framing_of(response: http.client.HTTPResponse) -> str:
    """How the client can tell where the body ends."""
    if response.chunked:
        return "chunked"
    return "close" if response.length is None else "content-length"


def wait_for(condition: Callable[[], object], what: Callable[[], object], *, pause: float = 0.02) -> None:
    """Wait until the condition holds; *what* tells what is the case if it never does."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(pause)


# -- the database -----------------------------------------------------------------------------------------------------


_entries: Any = Entry.__table__


def prefill(url: URL) -> None:
    engine = create_engine(url, poolclass=NullPool)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(_entries), [{"name": "Jack", "text": TEXT}] * PREFILLED)


@pytest.fixture(scope="module")
def template(postgresql: DatabaseServer) -> Iterator[str]:
    """The name of a PostgreSQL database that is prefilled, and to which nobody is connected."""
    with postgresql.database() as url:
        prefill(url)
        assert url.database
        yield url.database


@pytest.fixture
def prefilled_postgresql(postgresql: DatabaseServer, template: str) -> Iterator[URL]:
    name = f"{template}_copy"
    postgresql.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield postgresql.url.set(drivername=f"postgresql+{'psycopg2' if SQLALCHEMY_14 else 'psycopg'}", database=name)
    postgresql.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "guest_book.sqlite"
    prefill(URL.create("sqlite", database=str(path)))
    return path


@pytest.fixture
def prefilled_sqlite(sqlite_template: Path, tmp_path: Path) -> URL:
    return URL.create("sqlite", database=str(shutil.copy(sqlite_template, tmp_path / "guest_book.sqlite")))


class Database:
    """The database of one guest book, seen from the side."""

    def __init__(self, url: URL) -> None:
        self.name = url.get_backend_name()
        self.driver = url.get_driver_name()
        self.is_postgresql = self.name == "postgresql"
        self._engine: Engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    def as_csv(self) -> bytes:
        with self._engine.connect() as connection:
            rows: Any = connection.execute(select(_entries).order_by(_entries.c.id)).all()
        lines = io.StringIO()
        csv.writer(lines).writerows([("id", "name", "text"), *map(tuple, rows)])
        return lines.getvalue().encode()

    def texts(self) -> list[str]:
        """The texts of all the entries that were not there from the beginning."""
        with self._engine.connect() as connection:
            return list(connection.execute(select(_entries.c.text).where(_entries.c.id > PREFILLED)).scalars())

    def untouched(self) -> bool:
        with self._engine.connect() as connection:
            intact = select(func.count()).where(_entries.c.id <= PREFILLED, _entries.c.text == TEXT)
            return connection.execute(intact).scalar() == PREFILLED

    def at_work(self, query: str = "%") -> list[tuple[Any, ...]]:
        """The connections of the server that are in a transaction, and since when they are idle in it."""
        if not self.is_postgresql:
            return []
        statement = text(
            "SELECT pid, state, query, state_change FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND state <> 'idle' AND query LIKE :query"
        )
        with self._engine.connect() as connection:
            return [tuple(row) for row in connection.execute(statement, {"query": query})]


# -- the visit --------------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """A guest book that is served, its visitors, and the books that they keep."""

    server: WSGIServer
    running: Running
    database: Database
    #: What was answered with a success.
    acknowledged: list[str] = field(default_factory=list)
    #: What would have been, had the server passed the answer on (``WSGIServer.needs_a_chunk``).
    unanswered: list[str] = field(default_factory=list)
    #: What is reported.
    requests: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)

    def ask(self, method: str, path: str, form: dict[str, str] | None = None, *, status: int) -> Answer:
        """Ask for that, and be answered with that status."""
        self.requests["answered"] += 1
        answer = ask(self.running.port, method, path, form)
        assert answer.status == status
        return answer

    def post(self) -> None:
        entry = f"entry {next(self._numbers)} & more"
        self.requests["answered"] += 1
        answer = ask(self.running.port, "POST", "/", {"name": "Ann", "text": entry})
        # Of all the answers, a redirect alone may have no body. Whether it was one, the database tells in the end.
        if self.server.needs_a_chunk and (answer.status, answer.body) == (500, b""):
            self.facts["status_without_body"] = "500 instead"
            self.unanswered.append(entry)
        else:
            assert answer.status == 303
            assert answer.headers["Location"].endswith("/")
            self.acknowledged.append(entry)

    def post_at_once(self, entries: int) -> None:
        with ThreadPoolExecutor(1 if self.server.serial else 4) as clients:
            for posted in [clients.submit(self.post) for _ in range(entries)]:
                posted.result()


def test_a_guest_book_is_kept_whatever_its_visitors_do(visit: Visit) -> None:
    they_read(visit)
    they_post(visit)
    they_change_their_minds(visit)
    they_crash_it(visit)
    they_leave_in_the_middle_of_a_form(visit)
    they_read_the_export(visit)
    they_leave_in_the_middle_of_the_export(visit)
    they_leave_in_the_middle_of_the_events(visit)
    they_rest_in_the_middle_of_the_export(visit)
    they_ask_for_the_head_alone(visit)
    they_post(visit)

    nothing_is_left_open(visit)
    the_books_are_right(visit)


def they_read(visit: Visit) -> None:
    page = visit.ask("GET", "/", status=200)
    assert page.body.count(b"<b>Jack</b>") == 20
    visit.ask("GET", "/nowhere", status=404)


def they_post(visit: Visit) -> None:
    visit.post_at_once(8)
    page = visit.ask("GET", "/", status=200)
    assert page.body.count(b"<b>Ann</b>: entry ") >= 8
    visit.ask("POST", "/", {"name": "Ann", "text": " "}, status=400)


def they_change_their_minds(visit: Visit) -> None:
    visit.ask("POST", "/fail", {"name": "Ann", "text": "fail"}, status=409)


def they_crash_it(visit: Visit) -> None:
    try:
        visit.ask("POST", "/crash", {"name": "Ann", "text": "crash"}, status=500)
    except http.client.RemoteDisconnected:
        assert visit.server.breaks_off_errors
        visit.facts["crash"] = "closed"
    except http.client.IncompleteRead:
        assert visit.server.breaks_off_errors
        visit.facts["crash"] = "500, broken off"
    else:
        visit.facts["crash"] = "500"
    visit.ask("GET", "/", status=200)


def they_leave_in_the_middle_of_a_form(visit: Visit) -> None:
    form = urlencode({"name": "Ann", "text": f"{HALF} {'a form ' * 40}"})
    head = f"Host: 127.0.0.1\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(form)}"
    visit.requests["cut_off"] += 1
    with connect(visit.running.port) as client:
        client.sendall(f"POST / HTTP/1.1\r\n{head}\r\n\r\n{form[: len(form) // 2]}".encode())
        if not visit.server.serial:
            visit.post_at_once(2)
            visit.ask("GET", "/", status=200)


def they_read_the_export(visit: Visit) -> None:
    expected = visit.database.as_csv()
    with connect(visit.running.port) as client:
        visit.requests["answered"] += 1
        send(client, "GET", "/export.csv")
        response = response_to(client)
        assert response.status == 200
        visit.facts["framing"] = framing_of(response)
        assert without_half(response.read()) == without_half(expected)


def without_half(export: bytes) -> list[bytes]:
    """The lines of an export, but for the one that may come at any time: nobody waits for its answer."""
    return [line for line in export.splitlines(keepends=True) if f",{HALF} ".encode() not in line]


def they_leave_in_the_middle_of_the_export(visit: Visit) -> None:
    visit.requests["cut_off"] += 2
    with connect(visit.running.port, narrow=True) as client:
        send(client, "GET", "/export.csv")
        response = response_to(client)
        for _ in range(20):
            assert response.readline()
    with connect(visit.running.port) as client:
        send(client, "GET", "/export.csv")


def they_leave_in_the_middle_of_the_events(visit: Visit) -> None:
    visit.requests["cut_off"] += 1
    received = b""
    with connect(visit.running.port) as client:
        send(client, "GET", "/events")
        while b"data: " not in received:
            received += some_of(client)
        # The second waits for this, and longer than anybody holds the first back; so that it came at once.
        visit.running.go_on.touch()
        assert received.count(b"data: ") == 1
        while received.count(b"data: ") < 3:
            received += some_of(client)
    visit.facts["first_event_at_once"] = True


def some_of(client: socket.socket) -> bytes:
    data = client.recv(65536)
    assert data, "it has ended"
    return data


def they_rest_in_the_middle_of_the_export(visit: Visit) -> None:
    expected = visit.database.as_csv()
    with connect(visit.running.port, narrow=True) as client:
        visit.requests["answered"] += 1
        send(client, "GET", "/export.csv")
        response = response_to(client)
        received = [response.readline() for _ in range(20)]
        if not visit.server.serial:
            visit.post_at_once(4)
            visit.ask("GET", "/", status=200)
            assert visit.running.state()["checked_out"] >= 1
        if visit.database.is_postgresql:
            the_export_rests_too(visit)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        received.append(response.read())
    assert without_half(b"".join(received)) == without_half(expected)
    visit.facts["others_are_served"] = not visit.server.serial


def the_export_rests_too(visit: Visit) -> None:
    """The server has stopped in the middle of the rows, until its client reads on."""
    seen: list[Any] = [None]

    def rests() -> bool:
        seen.append(visit.database.at_work("FETCH%"))
        assert seen[-1], "it has read all the rows, although nobody takes them"
        return bool(seen[-1] == seen[-2])

    wait_for(rests, lambda: seen[-1], pause=0.1)


def they_ask_for_the_head_alone(visit: Visit) -> None:
    for path in "/", "/export.csv":
        visit.requests["answered"] += 1
        answer = b""
        with connect(visit.running.port) as client:
            client.sendall(f"HEAD {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            while data := client.recv(65536):
                answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        assert status in (200, 404, 405) or (visit.server.needs_a_chunk and status == 500)
        visit.facts[f"head{path.replace('/', '_')}"] = {"status": status, "bytes_follow": bool(body)}


def nothing_is_left_open(visit: Visit) -> None:
    # A stream that is never told that its client has gone is left as well; it holds no connection between two events.
    streams = 1 if visit.server.streams_on else 0
    expected = {
        "checked_out": 0,
        "open_bodies": streams,
        "dropped_bodies": 0,
        "closed_twice": 0,
        "left_in_registry": 0,
    }
    seen: dict[str, Any] = {}

    def settled() -> bool:
        seen.update(visit.running.state())
        seen["at_work"] = visit.database.at_work()
        return not seen["at_work"] and {name: seen[name] for name in expected} == expected

    wait_for(settled, lambda: seen)
    visit.facts["hang_up_closes_the_stream"] = streams == 0
    for name in "multithread", "multiprocess", "file_wrapper":
        visit.facts[name] = seen[name]


def the_books_are_right(visit: Visit) -> None:
    assert visit.database.untouched()
    there = Counter(visit.database.texts())
    there.subtract(visit.acknowledged)
    there.subtract(visit.unanswered)
    assert not -there, "acknowledged, and not there"
    left = list((+there).elements())
    assert all(entry.startswith(HALF) for entry in left), left
    assert len(left) <= 1
    visit.facts["half_a_form"] = "kept" if left else "not kept"


# -- the log ----------------------------------------------------------------------------------------------------------

#: mod_wsgi puts date, process and client in front of each line.
_PREFIX = re.compile(r"^(?:\[[^\]]*\] )+")
#: The line that a traceback ends with: the exception. (Those before it are indented, but for code that was generated.)
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(?:: |$)")
#: What stands between two tracebacks of one chain, of which the last is the one that counts.
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
#: What the middleware complains of (served.py), Python, and a server that has lost a worker.
_TROUBLE = re.compile(
    "SA_WSGI_SESSION |was dropped without a call|SAWarning|WORKER TIMEOUT|was sent SIG(?!TERM)|DAMN ! worker"
    "|exit signal|Fatal Python error|Segmentation fault|unexpected exit",
    re.IGNORECASE,
)
_ON_PURPOSE = ("RuntimeError: failed on purpose", "BrokenPipeError", "ConnectionResetError")


def troubles_in(log: str, server: WSGIServer) -> list[str]:
    """What a server has logged, but for the crash on purpose and for clients that have gone."""
    expected = re.compile("|".join([*_ON_PURPOSE, *server.logs]))
    lines = [line for line in (_PREFIX.sub("", line) for line in log.splitlines()) if line]
    found = [line for line in lines if _TROUBLE.search(line)]
    for number, line in enumerate(lines):
        if "Traceback (most recent call last)" in line:
            rest = iter(lines[number + 1 :])
            error = next((line for line in rest if _EXCEPTION.match(line)), "a traceback without an end")
            if not expected.match(error) and not next(rest, "").startswith(_CHAINED):
                found.append(error)
    return found


# -- the report -------------------------------------------------------------------------------------------------------


def report(visit: Visit, framework: str, folder: Path) -> None:
    distribution = FRAMEWORKS[framework]
    driver = visit.database.driver
    content = {
        "framework": framework,
        "framework_version": version(distribution) if distribution else None,
        "server": visit.server.name,
        "server_versions": visit.server.versions(),
        "python": platform.python_version(),
        "sqlalchemy": version("SQLAlchemy"),
        "database": visit.database.name,
        "driver": {driver: version({"psycopg2": "psycopg2-binary"}.get(driver, driver))}
        if driver != "pysqlite"
        else {},
        "acknowledged": len(visit.acknowledged),
        **visit.requests,
        **visit.facts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{framework}-{visit.server.name}-{visit.database.name}.json"
    (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=CELLS)
def visit(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Visit]:
    """One guest book under one server, which runs; in the end the server's log is read."""
    framework, server, database = request.param
    if (distribution := FRAMEWORKS[framework]) is not None:
        try:
            version(distribution)
        except PackageNotFoundError:
            unavailable(NotInstalled(f"{distribution} is not installed"))
    url: URL = request.getfixturevalue(f"prefilled_{database}")
    log = tmp_path / "server.log"
    environment = {"GUEST_BOOK": framework, "GUEST_BOOK_URL": url.render_as_string(hide_password=False)}
    try:
        with run_wsgi_server(server, environment, log) as running:
            visit = Visit(server, running, Database(url))
            yield visit
    except NotInstalled as reason:
        unavailable(reason)
    said = log.read_text(errors="replace")
    # pytest shows it if the test has failed.
    print(f"{server.name} said:\n{said[-20_000:]}")
    assert troubles_in(said, server) == []
    # Complete only if the visit was.
    if "half_a_form" in visit.facts and (folder := os.environ.get("GUEST_BOOK_REPORT")):
        report(visit, framework, Path(folder))
