"""Real servers with all sorts of clients, and the three linters that watch over PEP 3333."""

from __future__ import annotations

import gc
import http.client
import io
import logging
import socket
import socketserver
import struct
import sys
import threading
import time
import warnings
import wsgiref.simple_server
import wsgiref.validate
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any
from wsgiref.util import FileWrapper

import pytest
import sqlalchemy as sa
import werkzeug.serving
from werkzeug.middleware.lint import LintMiddleware

from sa_wsgi_session import SessionMiddleware, current_scope
from tests.servers import WaitressServer
from tests.support import Exchange, Note, World, Worlds, make_environ

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # WebOb imports cgi
    import webtest.lint

PLAIN = [("Content-Type", "text/plain")]
#: How long anything here may take that has to wait for a server. It never does, unless something is broken.
SECONDS = 30


@pytest.fixture
def world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    """SQLite, with a thread-local session."""
    with worlds.use(request.getfixturevalue, "sqlite", "thread-local") as world:
        yield world


@pytest.fixture(params=["thread-local", "contextual"])
def busy_world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    """PostgreSQL, which has many writers at once, with each kind of registry that has many threads."""
    with worlds.use(request.getfixturevalue, "postgresql", request.param) as world:
        yield world


# -- linters ----------------------------------------------------------------------------------------------------------

LINTERS: dict[str, Callable[[Any], Any]] = {
    "wsgiref": wsgiref.validate.validator,
    "webtest": webtest.lint.middleware,
    "werkzeug": LintMiddleware,
}


class Shapes:
    """Applications of every shape that PEP 3333 knows, all of which use their session."""

    def __init__(self, world: World, note: str) -> None:
        self._world = world
        self._note = note

    def write(self, fate: str) -> None:
        self._world.Session.add(Note(text=f"{self._note} {fate}"))
        self._world.Session.flush()

    def a_list(self, environ: Any, start_response: Any) -> Any:
        self.write("kept")
        start_response("200 OK", [*PLAIN, ("Content-Length", "2")])
        return [b"a", b"b"]

    def a_tuple(self, environ: Any, start_response: Any) -> Any:
        self.write("kept")
        start_response("200 OK", [*PLAIN])
        return b"a", b"b"

    def nothing(self, environ: Any, start_response: Any) -> Any:
        self.write("kept")
        start_response("304 Not Modified", [])
        return []

    def an_iterator(self, environ: Any, start_response: Any) -> Any:
        self.write("kept")
        start_response("200 OK", [*PLAIN])
        return iter([b"a", b"b"])

    def a_generator(self, environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*PLAIN])

        def body() -> Any:
            yield b"a"
            self.write("kept")
            yield b"b"

        return body()

    def a_generator_application(self, environ: Any, start_response: Any) -> Any:
        self.write("kept")
        start_response("200 OK", [*PLAIN])
        yield b"a"
        yield b"b"

    def a_generator_application_without_a_body(self, environ: Any, start_response: Any) -> Any:
        self.write("kept")
        start_response("304 Not Modified", [])
        yield from ()

    def a_file(self, environ: Any, start_response: Any) -> Any:
        self.write("kept")
        start_response("200 OK", [*PLAIN])
        return environ["wsgi.file_wrapper"](io.BytesIO(b"ab"), 1)

    def a_body_with_close(self, environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*PLAIN])
        shapes = self

        class Body:
            def __iter__(self) -> Any:
                return iter([b"a", b"b"])

            def close(self) -> None:
                shapes.write("kept")

        return Body()

    def a_write(self, environ: Any, start_response: Any) -> Any:
        self.write("kept")
        send = start_response("200 OK", [*PLAIN])
        send(b"a")
        return [b"b"]

    def a_write_and_a_generator(self, environ: Any, start_response: Any) -> Any:
        send = start_response("200 OK", [*PLAIN])
        send(b"a")
        self.write("kept")
        yield b"b"

    def an_error_page(self, environ: Any, start_response: Any) -> Any:
        self.write("not kept")
        start_response("200 OK", [*PLAIN])
        try:
            raise LookupError
        except LookupError:
            start_response("500 Oops", [*PLAIN], sys.exc_info())
        return [b"a", b"b"]

    def a_reader_of_the_input(self, environ: Any, start_response: Any) -> Any:
        self.write("kept" if environ["wsgi.input"].read(1) == b"" else "not kept")
        start_response("200 OK", [*PLAIN])
        return [b"a", b"b"]


SHAPES = [name for name in vars(Shapes) if name not in ("__init__", "write") and callable(getattr(Shapes, name))]


@pytest.fixture
def silence(capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """The linters warn, raise, or print when an iterator is dropped: here they do none of it."""
    yield
    gc.collect()
    assert [str(warning.message) for warning in recwarn] == []
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("always")
@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_linters_have_nothing_to_say(world: World, shape: str) -> None:
    # In one test, because it takes its time to see that nothing is said when all is garbage.
    cases = sorted(f"{linter} {side}" for linter in LINTERS for side in ("inside", "outside", "on both sides"))
    for case in cases:
        linter, _, side = case.partition(" ")
        lint = LINTERS[linter]
        app = getattr(Shapes(world, case), shape)
        app = SessionMiddleware(app if side == "outside" else lint(app), world.Session)
        app = app if side == "inside" else lint(app)
        exchange = Exchange(app, make_environ() | {"wsgi.file_wrapper": FileWrapper})
        content = exchange.read()
        assert b"".join(exchange.written) + content == (b"" if exchange.status.startswith("304") else b"ab")
    assert world.durable() == ([] if shape == "an_error_page" else [f"{case} kept" for case in cases])


@pytest.mark.filterwarnings("always")
@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("linter", LINTERS)
@pytest.mark.parametrize("end", ["cut", "failed", "vetoed"])
def test_the_linters_have_nothing_to_say_when_things_go_wrong(world: World, linter: str, end: str) -> None:
    lint = LINTERS[linter]

    def app(environ: Any, start_response: Any) -> Any:
        start_response("404 Not Found" if end == "vetoed" else "200 OK", [*PLAIN])

        def body() -> Any:
            yield b"a"
            world.Session.add(Note(text="lost"))
            yield b"b"
            if end == "failed":
                raise LookupError

        return body()

    exchange = Exchange(lint(SessionMiddleware(lint(app), world.Session)))
    assert [exchange.next(), exchange.next()] == [b"a", b"b"]
    if end == "failed":
        with pytest.raises(LookupError):
            exchange.next()
    exchange.close()
    assert world.durable() == []


@pytest.mark.filterwarnings("always")
@pytest.mark.usefixtures("silence")
def test_webtest_sees_an_application_like_any_other(world: World) -> None:
    for method in ("get", "post"):
        app = webtest.TestApp(SessionMiddleware(Shapes(world, method).a_generator, world.Session))
        response = getattr(app, method)("/")
        assert response.status == "200 OK"
        assert response.body == b"ab"
    assert world.durable() == ["get kept", "post kept"]


# -- waitress ---------------------------------------------------------------------------------------------------------


class Site:
    """An application behind the middleware, and what has become of its bodies.

    ========================  ==============================================================
    ``/store/<text>``         stores the text: 200
    ``/refuse/<text>``        stores the text, and thinks better of it: 409
    ``/fail/<text>``          stores the text, and fails before it has a status
    ``/stream/<text>``        stores the text; the body of three chunks stores another
    ``/endless/<text>``       likewise, but the body never ends
    ``/idle/<text>``          stores the text; the body never ends, and changes nothing
    ``/rows/<text>``          streams the rows of an open result, far more than anybody reads
    ``/break/<text>``         a body that fails after its first chunk
    ========================  ==============================================================
    """

    def __init__(self, world: World, **options: Any) -> None:
        self._world = world
        self._lock = threading.Lock()
        self.opened = 0
        self.closed = 0
        self.chunks = 0
        self.all_closed = threading.Condition(self._lock)
        self.application = SessionMiddleware(self._app, world.Session, **options)

    def _app(self, environ: Any, start_response: Any) -> Any:
        _, action, text = environ["PATH_INFO"].split("/")
        scope, session = current_scope(), self._world.Session
        if action != "rows":
            session.add(Note(text=text))
            session.flush()
        if action == "fail":
            raise LookupError(text)
        status = "409 Conflict" if action == "refuse" else "200 OK"
        start_response(status, [*PLAIN])
        assert current_scope() is scope
        if action in ("store", "refuse"):
            return [b"done"]
        return Tracked(self, getattr(self, f"_{action}")(session(), text))

    def _stream(self, session: Any, text: str) -> Any:
        yield b"1"
        session.add(Note(text=f"{text} body"))
        assert self._world.Session() is session
        yield b"2"
        yield b"3"

    def _endless(self, session: Any, text: str) -> Any:
        yield b"1"
        session.add(Note(text=f"{text} body"))
        session.flush()
        while True:
            assert self._world.Session() is session
            yield b"." * 65536

    def _idle(self, session: Any, text: str) -> Any:
        while True:
            self.chunks += 1
            yield b"." * 65536

    def chunks_until_the_server_waits(self) -> int:
        """How many chunks of ``/idle`` the server has taken before the client's silence has stopped it."""
        taken = -1
        while taken != self.chunks:
            taken = self.chunks
            time.sleep(0.2)
        return taken

    def _rows(self, session: Any, text: str) -> Any:
        statement = sa.text("SELECT repeat('.', 65536) FROM generate_series(1, 10000)")
        rows = session.execute(statement, execution_options={"stream_results": True})

        def body() -> Any:
            yield b"1"
            with closing(rows):
                for row in rows:
                    yield row[0].encode()

        return body()

    def _break(self, session: Any, text: str) -> Any:
        yield b"1" * 100_000
        session.add(Note(text=f"{text} body"))
        session.flush()
        raise LookupError(text)

    def wait_until_all_bodies_are_closed(self) -> None:
        with self.all_closed:
            assert self.all_closed.wait_for(lambda: self.closed == self.opened, SECONDS)


class Tracked:
    """A body of a site."""

    def __init__(self, site: Site, chunks: Any) -> None:
        self._site = site
        self._chunks = chunks
        with site.all_closed:
            site.opened += 1

    def __iter__(self) -> Any:
        return self._chunks

    def close(self) -> None:
        self._chunks.close()
        with self._site.all_closed:
            self._site.closed += 1
            self._site.all_closed.notify_all()


@contextmanager
def served(
    world: World, waitress_server: Callable[..., WaitressServer], **options: Any
) -> Iterator[tuple[Site, WaitressServer]]:
    """A site on a waitress of its own; in the end nothing of it is left."""
    site = Site(world, **options)
    server = waitress_server(site.application, threads=8, outbuf_high_watermark=100_000)
    yield site, server
    site.wait_until_all_bodies_are_closed()
    server.stop()
    gc.collect()
    assert world.checked_out == 0


@pytest.fixture(autouse=True)
def _no_tracebacks_of_waitress(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "waitress")


def get(server: Any, path: str) -> tuple[int, bytes]:
    """A client that reads all."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=SECONDS)
    with closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


def hang_up(server: Any, path: str, *, reset: bool) -> None:
    """A client that goes away as soon as it has seen the success, and one byte of the body."""
    with socket.create_connection((server.host, server.port), SECONDS) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n1" not in answer:  # either the chunk or, where the transfer is chunked, its length
            answer += connection.recv(1)
        assert b" 200 OK\r\n" in answer
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def stalled(server: Any, path: str) -> Iterator[None]:
    """A client that has seen the success, and reads no further."""
    with socket.create_connection((server.host, server.port), SECONDS) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        yield


def test_what_a_client_was_told_is_what_the_database_holds(
    busy_world: World, waitress_server: Callable[..., WaitressServer]
) -> None:
    """Eight clients at once, who read all that they are told."""
    expected = {"store": 200, "refuse": 409, "fail": 500, "stream": 200}
    with served(busy_world, waitress_server) as (_, server):

        def client(number: int) -> list[str]:
            stored = []
            for turn in range(8):
                action = list(expected)[(number + turn) % 4]
                text = f"{action}-{number}-{turn}"
                status, content = get(server, f"/{action}/{text}")
                assert status == expected[action]
                if status == 200:
                    assert content == (b"123" if action == "stream" else b"done")
                    stored += [text, f"{text} body"] if action == "stream" else [text]
            return stored

        with ThreadPoolExecutor(8) as clients:
            acknowledged = [text for stored in clients.map(client, range(8)) for text in stored]
    assert busy_world.durable() == sorted(acknowledged)
    assert len(acknowledged) == 8 * (2 + 2 * 2)


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
@pytest.mark.parametrize("commit_at", ["start", "end"])
def test_of_a_client_that_hangs_up_midway_nothing_is_left_but_what_it_was_told(
    busy_world: World, waitress_server: Callable[..., WaitressServer], commit_at: str, reset: bool
) -> None:
    with served(busy_world, waitress_server, commit_at=commit_at) as (site, server):
        with ThreadPoolExecutor(4) as clients:
            list(clients.map(lambda number: hang_up(server, f"/endless/{number}", reset=reset), range(4)))
        site.wait_until_all_bodies_are_closed()
        assert get(server, "/store/after") == (200, b"done")
        assert site.opened == site.closed == 4
    told = ["0", "1", "2", "3"] if commit_at == "start" else []
    assert busy_world.durable() == [*told, "after"]


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
def test_a_result_that_is_open_when_the_client_hangs_up_gives_its_connection_back(
    busy_world: World, waitress_server: Callable[..., WaitressServer], reset: bool
) -> None:
    with served(busy_world, waitress_server) as (site, server):
        with ThreadPoolExecutor(4) as clients:
            list(clients.map(lambda number: hang_up(server, f"/rows/{number}", reset=reset), range(4)))
        site.wait_until_all_bodies_are_closed()
        assert site.closed == 4
    assert busy_world.checked_out == 0


def test_behind_a_client_that_stalls_no_transaction_idles(
    busy_world: World, waitress_server: Callable[..., WaitressServer]
) -> None:
    with served(busy_world, waitress_server) as (site, server):
        with stalled(server, "/idle/told"):
            assert site.chunks_until_the_server_waits() > 0
            assert busy_world.checked_out == 0
            assert busy_world.durable() == ["told"]
            assert get(server, "/store/meanwhile") == (200, b"done")
        site.wait_until_all_bodies_are_closed()
        assert site.closed == 1
    assert busy_world.durable() == ["meanwhile", "told"]


def test_a_body_that_breaks_off_is_seen_to_be_incomplete(
    busy_world: World, waitress_server: Callable[..., WaitressServer]
) -> None:
    with served(busy_world, waitress_server) as (site, server):
        with pytest.raises(http.client.IncompleteRead):
            get(server, "/break/told")
        site.wait_until_all_bodies_are_closed()
        assert site.closed == 1
    assert busy_world.durable() == ["told"]


def test_at_the_end_a_failed_commit_is_seen_as_an_incomplete_body(
    busy_world: World, waitress_server: Callable[..., WaitressServer]
) -> None:
    with served(busy_world, waitress_server, commit_at="end") as (_, server):
        assert get(server, "/stream/once") == (200, b"123")
        busy_world.insert("twice body")
        with pytest.raises(http.client.IncompleteRead):
            get(server, "/stream/twice")
    assert busy_world.durable() == ["once", "once body", "twice body"]


# -- other servers ----------------------------------------------------------------------------------------------------


class QuietHandler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...


class ThreadingWSGIServer(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    """The standard library's server, with a thread for each request."""


def make_wsgiref_server(app: Any) -> Any:
    return wsgiref.simple_server.make_server("127.0.0.1", 0, app, ThreadingWSGIServer, QuietHandler)


class QuietWerkzeugHandler(werkzeug.serving.WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None: ...


def make_werkzeug_server(app: Any) -> Any:
    return werkzeug.serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=QuietWerkzeugHandler)


@pytest.mark.parametrize("make", [make_wsgiref_server, make_werkzeug_server], ids=["wsgiref", "werkzeug"])
def test_other_servers_are_served_as_well(busy_world: World, make: Callable[[Any], Any]) -> None:
    site = Site(busy_world)
    server = make(site.application)
    server.host, server.port = server.server_address[:2]
    loop = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    loop.start()
    try:
        assert get(server, "/store/stored") == (200, b"done")
        assert get(server, "/refuse/refused") == (409, b"done")
        assert get(server, "/fail/failed")[0] == 500
        assert get(server, "/stream/streamed") == (200, b"123")
        for number in range(2):
            hang_up(server, f"/endless/{number}", reset=bool(number))
        site.wait_until_all_bodies_are_closed()
    finally:
        server.shutdown()
        server.server_close()
        loop.join()
    gc.collect()
    assert busy_world.durable() == ["0", "1", "stored", "streamed", "streamed body"]
    assert site.opened == site.closed == 3
