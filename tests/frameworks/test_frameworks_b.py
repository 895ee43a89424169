"""The guest books in Pyramid, CherryPy, TurboGears and Morepath, and what their READMEs say about these frameworks."""

from __future__ import annotations

import gc
import io
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import cherrypy
import morepath
import pytest
import tg
from pyramid.config import Configurator
from pyramid.response import Response
from pyramid.threadlocal import get_current_request
from sqlalchemy import delete, event
from sqlalchemy.exc import IntegrityError

from examples import guest_book
from examples.guest_book import Entry, Session, sign
from sa_wsgi_session import SessionMiddleware, current_scope
from tests.support import Exchange, is_in_a_scope, make_environ, request

ROOT = Path(__file__).parents[2]
SECONDS_TO_WAIT = 20
FRAMEWORKS = ("pyramid", "cherrypy", "turbogears", "morepath")

#: To these, a page is a list when it reaches the middleware.
WITH_LISTS = ("pyramid", "turbogears", "morepath")
#: In these, GET implies HEAD.
WITH_HEAD = ("pyramid", "cherrypy", "turbogears")

FORM = "application/x-www-form-urlencoded"


class Book:
    """A database of the guest book, empty at first, and the applications that use it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: The example, where the test is about one.
        self.app: Any = None
        self.engine = Session.session_factory.kw["bind"]
        self.checked_out: set[Any] = set()
        event.listen(self.engine, "checkout", lambda connection, record, proxy: self.checked_out.add(record))
        event.listen(self.engine, "checkin", lambda connection, record: self.checked_out.discard(record))

    @property
    def entries(self) -> list[str]:
        """The texts that are durable, read by sqlite3 alone."""
        with closing(sqlite3.connect(self.path)) as connection:
            return [text for (text,) in connection.execute("SELECT text FROM entries ORDER BY id")]

    def fill(self, count: int) -> None:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            rows = ((f"entry {number}",) for number in range(count))
            connection.executemany("INSERT INTO entries (name, text) VALUES ('somebody', ?)", rows)

    def ask(self, path: str = "/", method: str = "GET", **more: Any) -> Exchange:
        return request(self.app, path, method, **with_host(more))

    def post(self, path: str, body: bytes, **more: Any) -> Exchange:
        form = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": FORM}
        return self.ask(path, "POST", **{**form, **more})

    def sign(self, text: str, path: str = "/") -> str:
        return self.post(path, urlencode({"text": text}).encode()).status


def with_host(environ: dict[str, Any]) -> dict[str, Any]:
    return {"HTTP_HOST": "localhost", **environ}


def start(app: Any, path: str = "/", method: str = "GET", **more: Any) -> Exchange:
    """A request whose body nobody has read yet."""
    return Exchange(app, make_environ(path, method, HTTP_HOST="localhost"), **more)


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Book]:
    path = tmp_path / "guest_book.sqlite"
    monkeypatch.setenv("GUEST_BOOK_URL", f"sqlite:///{path}")
    monkeypatch.setattr(guest_book, "PAUSE", 0)
    # The examples share one Session, which each of them binds when it is imported; here, each test binds it.
    guest_book.open_database()
    book = Book(path)
    yield book
    assert book.checked_out == set()
    assert not Session.registry.has()
    assert not is_in_a_scope()
    book.engine.dispose()


@pytest.fixture(params=FRAMEWORKS)
def example(request: pytest.FixtureRequest, book: Book) -> Book:
    """The guest book in one framework; the test runs with each of them."""
    module = "wsgi" if request.param == "pyramid" else "application"
    bound_to = book.engine
    book.app = import_module(f"examples.{request.param}.{module}").application
    Session.configure(bind=bound_to)
    return book


def only(*frameworks: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("example", frameworks, indirect=True)


# -- what every guest book does ---------------------------------------------------------------------------------------


def test_the_page_shows_the_entries_and_answers_a_signature_with_a_redirect(example):
    answer = example.post("/", urlencode({"name": "Ada", "text": "héllo"}).encode())
    assert answer.status == "303 See Other"
    assert dict(answer.headers)["Location"] in ("/", "http://localhost/")
    assert example.entries == ["héllo"]

    page = example.ask("/")
    assert page.status == "200 OK"
    assert dict(page.headers)["Content-Type"].lower() == "text/html; charset=utf-8"
    assert "<b>Ada</b>: héllo" in page.content.decode()


def test_only_what_was_answered_with_a_success_is_durable(example):
    assert example.sign("kept") == "303 See Other"
    assert example.sign("changed my mind", "/fail") == "409 Conflict"
    assert example.sign("  ") == "400 Bad Request"
    assert example.sign("too long " * 100) == "400 Bad Request"
    assert example.sign("kept too") == "303 See Other"
    assert example.entries == ["kept", "kept too"]


def test_the_visitor_is_told_why(example):
    assert b"Please write something." in example.post("/", b"text=").content
    assert b"Nothing of it was kept." in example.post("/fail", b"text=x").content


@only("pyramid", "turbogears", "morepath")
def test_an_exception_that_nobody_expects_goes_through_to_the_server(example):
    with pytest.raises(RuntimeError, match=r"^failed on purpose$"):
        example.sign("half of it", "/crash")
    assert example.entries == []


@only("cherrypy")
def test_cherrypy_makes_a_500_of_it_which_is_rolled_back_and_logged(example, caplog):
    answer = example.post("/crash", b"text=half+of+it")
    assert answer.status == "500 Internal Server Error"
    assert b"failed on purpose" not in answer.content
    assert b"Traceback" not in answer.content
    assert example.entries == []
    assert "failed on purpose" in caplog.text


@pytest.mark.parametrize(
    ("body", "more"),
    [
        pytest.param(b"", {}, id="empty"),
        pytest.param(b"no fields", {}, id="no fields"),
        pytest.param(b"name=Ada", {}, id="no text"),
        pytest.param(b'{"text": "x"}', {"CONTENT_TYPE": "application/json"}, id="JSON"),
        pytest.param(b"text=x", {"CONTENT_TYPE": ""}, id="no type"),
        pytest.param(b"text=x", {"CONTENT_TYPE": "multipart/form-data"}, id="no boundary"),
        pytest.param(
            b'--x\r\nContent-Disposition: form-data; name="text"; filename="x"\r\n\r\nx\r\n--x--\r\n',
            {"CONTENT_TYPE": "multipart/form-data; boundary=x"},
            id="a file",
        ),
        pytest.param(b"text=cut+off", {"CONTENT_LENGTH": "400"}, id="cut off"),
    ],
)
def test_a_broken_form_is_the_fault_of_who_sent_it(example, body, more):
    assert example.post("/", body, **more).status == "400 Bad Request"
    assert example.entries == []


@pytest.mark.parametrize(
    ("body", "more"),
    [
        pytest.param(b"text=%ff", {}, id="no UTF-8"),
        pytest.param(b"text=x", {"CONTENT_TYPE": f"{FORM}; charset=nonsense"}, id="no charset"),
        pytest.param(b"text=x&text=y", {}, id="twice"),
        pytest.param(b"text=x&self=y&=z&request=1;&%&cls=4", {}, id="other fields"),
        pytest.param(b"text=x", {"QUERY_STRING": "text=y&name=%ff"}, id="query"),
        pytest.param(b"text=x", {"CONTENT_LENGTH": "six"}, id="no length"),
        pytest.param(b"text=x", {"CONTENT_LENGTH": "-6"}, id="negative length"),
    ],
)
def test_a_strange_form_is_no_crash(example, body, more):
    answer = example.post("/", body, **more)
    assert answer.status in ("303 See Other", "400 Bad Request", "404 Not Found")
    assert len(example.entries) == (answer.status == "303 See Other")


class Endless(io.RawIOBase):
    """A form without an end; counts what was read of it."""

    count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        buffer[:] = b"x" * len(buffer)
        self.count += len(buffer)
        return len(buffer)


def test_of_a_form_that_is_too_large_little_is_read(example):
    form = Endless()
    answer = example.post("/", b"", **{"wsgi.input": form, "CONTENT_LENGTH": str(10**12)})
    assert answer.status[:3] in ("400", "413")
    assert form.count <= 20_000


def test_what_visitors_wrote_is_shown_as_text(example):
    assert example.sign("<script>alert(1)</script>") == "303 See Other"
    page = example.ask("/").content
    assert b"<script>" not in page
    assert b"&lt;script&gt;" in page


def test_no_error_page_shows_html_of_the_visitor_or_the_inside_of_the_application(example):
    pages = [
        example.ask("/<script>x</script>", HTTP_ACCEPT="text/html"),
        example.ask("/fail", QUERY_STRING="<script>", HTTP_ACCEPT="text/html"),
        example.ask("/", "<SCRIPT>", HTTP_ACCEPT="text/html"),
        example.post("/", b"<script>=<script>", HTTP_ACCEPT="text/html"),
    ]
    for page in pages:
        assert page.status.startswith("4")
        content = page.content.decode().lower()
        assert "<script" not in content
        assert "traceback (" not in content
        assert "predicate" not in content


def test_the_export_streams_from_a_result_that_stays_open(example):
    example.fill(1000)
    exchange = start(example.app, "/export.csv")
    assert exchange.status == "200 OK"
    assert dict(exchange.headers)["Content-Type"] == "text/csv; charset=utf-8"
    assert not isinstance(exchange.body, (list, tuple))
    assert [exchange.next(), exchange.next()] == [b"id,name,text\r\n", b"1,somebody,entry 0\r\n"]
    assert len(example.checked_out) == 1
    assert not Session.registry.has()  # between two chunks
    # Meanwhile, on the same thread:
    assert example.sign("hello") == "303 See Other"
    assert exchange.read().count(b"\r\n") >= 999
    assert example.checked_out == set()


def test_events_hold_no_connection_while_they_sleep(example):
    exchange = start(example.app, "/events")
    assert dict(exchange.headers)["Content-Type"].startswith("text/event-stream")
    assert dict(exchange.headers)["Cache-Control"] == "no-store"
    assert exchange.next() == b"data: 0\n\n"
    assert example.checked_out == set()
    assert example.sign("hello") == "303 See Other"
    assert exchange.next() == b"data: 1\n\n"
    assert example.checked_out == set()
    exchange.close()


@pytest.mark.parametrize("path", ["/export.csv", "/events"])
@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_who_hangs_up_leaves_nothing_behind(example, path, chunks):
    example.fill(1000)
    exchange = start(example.app, path)
    for _ in range(chunks):
        exchange.next()
    exchange.close()
    assert example.checked_out == set()
    assert not Session.registry.has()


@only(*WITH_HEAD)
@pytest.mark.parametrize("path", ["/", "/export.csv", "/events"])
def test_head_is_get_without_the_body(example, path):
    example.fill(3)
    answer, get = example.ask(path, "HEAD"), start(example.app, path)
    get.close()
    assert answer.status == "200 OK"
    assert answer.content == b""
    assert dict(answer.headers)["Content-Type"] == dict(get.headers)["Content-Type"]


@only("morepath")
def test_morepath_has_no_head_where_no_view_is_written_for_it(example):
    assert example.ask("/", "HEAD").status == "405 Method Not Allowed"


@only(*WITH_LISTS)
def test_a_page_is_a_list_whose_session_is_removed_before_the_server_gets_it(example):
    left: list[bool] = []
    exchange = start(example.app, on_start=lambda status: left.append(Session.registry.has()))
    assert type(exchange.body) is list
    assert example.checked_out == set()
    assert left == [False]


@only("cherrypy")
def test_a_page_of_cherrypy_is_no_list_and_settled_all_the_same(example):
    exchange = start(example.app)
    assert not isinstance(exchange.body, (list, tuple))
    assert example.checked_out == set()
    exchange.close()


# -- a generator in each framework ------------------------------------------------------------------------------------

Chunks = Callable[[], Iterator[bytes]]


def in_pyramid(chunks: Chunks, configure: Callable[[Any], object] = lambda config: None) -> Any:
    return pyramid_app(lambda request: Response(app_iter=chunks()), configure)


def pyramid_app(view: Any, configure: Callable[[Any], object] = lambda config: None) -> Any:
    with Configurator() as config:
        config.add_route("index", "/")
        config.add_view(view, route_name="index")
        configure(config)
        return SessionMiddleware(config.make_wsgi_app(), Session)


def in_cherrypy(chunks: Chunks, *, stream: bool = True) -> Any:
    return cherrypy_app(lambda: chunks(), stream=stream)


def cherrypy_app(view: Any, *, stream: bool = False, **config: Any) -> Any:
    class Root:
        @cherrypy.expose
        def index(self) -> Any:
            return view()

    settings = {"response.stream": stream, "request.show_tracebacks": False, "tools.encode.on": False, **config}
    return SessionMiddleware(cherrypy.Application(Root(), config={"/": settings}), Session)


def in_turbogears(chunks: Chunks, **settings: Any) -> Any:
    return turbogears_app(lambda: chunks(), **settings)


def turbogears_app(view: Any, *, registry_streaming: bool = False, configure: Any = None, **settings: Any) -> Any:
    class Root(tg.TGController):
        @tg.expose()
        def index(self) -> Any:
            return view()

    configurator = tg.MinimalApplicationConfigurator()
    configurator.update_blueprint({"root_controller": Root(), "registry_streaming": registry_streaming, **settings})
    if configure is not None:
        configure(configurator)
    return SessionMiddleware(configurator.make_wsgi_app(), Session)


def in_morepath(chunks: Chunks) -> Any:
    return morepath_app(lambda self, request: morepath.Response(app_iter=chunks()))


def morepath_app(view: Any, *, of_error: Any = None) -> Any:
    class App(morepath.App):
        pass

    class Root:
        pass

    App.path(path="")(Root)
    App.view(model=Root)(view)
    if of_error is not None:
        App.view(model=RuntimeError)(of_error)
    App.commit()
    return SessionMiddleware(App(), Session)


STREAMS: dict[str, Callable[[Chunks], Any]] = {
    "pyramid": in_pyramid,
    "cherrypy": in_cherrypy,
    "turbogears": in_turbogears,
    "morepath": in_morepath,
}
in_each_framework = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)


class Log:
    """What a generator did, and whether the session was bound then."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def chunks(self) -> Iterator[bytes]:
        try:
            for number in (1, 2):
                self.note(f"chunk {number}")
                yield f"{number}".encode()
        finally:
            self.note("finally")

    def note(self, what: str) -> None:
        bound = is_in_a_scope() and current_scope().session is Session()
        self.lines.append(what if bound else f"{what}, unbound")


@in_each_framework
def test_a_stream_begins_after_its_status_and_ends_with_the_session_bound(book, stream):
    log = Log()
    exchange = start(stream(log.chunks), on_start=log.lines.append)
    assert log.lines == ["200 OK"]
    assert exchange.read() == b"12"
    assert log.lines == ["200 OK", "chunk 1", "chunk 2", "finally"]


@in_each_framework
def test_close_reaches_the_generator_with_the_session_bound(book, stream):
    log = Log()
    exchange = start(stream(log.chunks))
    exchange.next()
    exchange.close()
    assert log.lines == ["chunk 1", "finally"]


@in_each_framework
def test_what_a_generator_has_changed_before_the_visitor_hung_up_is_rolled_back(book, stream):
    def chunks() -> Iterator[bytes]:
        sign({"text": "half of it"})
        Session.flush()
        yield b"1"
        yield b"2"

    exchange = start(stream(chunks))
    exchange.next()
    exchange.close()
    assert book.entries == []
    assert start(stream(chunks)).read() == b"12"
    assert book.entries == ["half of it"]


@in_each_framework
def test_an_exception_in_the_stream_breaks_it_off(book, stream, capfd):
    def chunks() -> Iterator[bytes]:
        sign({"text": "half of it"})
        Session.flush()
        yield b"1"
        raise RuntimeError("failed on purpose")

    exchange = start(stream(chunks))
    assert exchange.next() == b"1"
    with closing(exchange), pytest.raises(RuntimeError, match=r"^failed on purpose$"):
        exchange.next()
    assert book.entries == []


@pytest.mark.parametrize("framework", WITH_HEAD)
def test_head_does_not_begin_the_generator(book, framework):
    log = Log()
    assert start(STREAMS[framework](log.chunks), method="HEAD").read() == b""
    assert log.lines == []


@pytest.mark.parametrize("framework", WITH_LISTS)
def test_a_body_may_be_read_on_another_thread(book, framework):
    log = Log()
    exchange = start(STREAMS[framework](log.chunks))
    exchange.next()
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(exchange.close).result()
    assert log.lines == ["chunk 1", "finally"]


# -- Pyramid ----------------------------------------------------------------------------------------------------------


def test_callbacks_of_pyramid_run_before_the_commit_and_belong_to_it(book):
    lines: list[str] = []

    def view(request: Any) -> Response:
        request.add_response_callback(lambda request, response: note("response callback"))
        request.add_finished_callback(lambda request: note("finished callback"))
        return Response("")

    def note(what: str) -> None:
        sign({"text": what})
        lines.append(what)

    def configure(config: Any) -> None:
        config.add_subscriber(lambda event: note("NewResponse"), "pyramid.events.NewResponse")

    start(pyramid_app(view, configure), on_start=lines.append).close()
    assert lines == ["response callback", "NewResponse", "finished callback", "200 OK"]
    assert book.entries == ["response callback", "NewResponse", "finished callback"]


def test_a_finished_callback_of_pyramid_that_raises_takes_the_work_with_it(book):
    def view(request: Any) -> Response:
        sign({"text": "hello"})
        request.add_finished_callback(lambda request: 1 / 0)
        return Response("")

    with pytest.raises(ZeroDivisionError):
        start(pyramid_app(view))
    assert book.entries == []


def test_an_exception_view_of_pyramid_that_answers_200_is_a_success(book):
    def view(request: Any) -> Response:
        sign({"text": "half of it"})
        raise RuntimeError("failed on purpose")

    def configure(config: Any) -> None:
        config.add_exception_view(lambda error, request: Response("Never mind."), context=RuntimeError)

    assert start(pyramid_app(view, configure)).read() == b"Never mind."
    assert book.entries == ["half of it"]


def test_the_thread_locals_of_pyramid_are_gone_while_the_body_streams(book):
    def chunks() -> Iterator[bytes]:
        yield repr(get_current_request()).encode()

    assert start(in_pyramid(chunks)).read() == b"None"


# -- CherryPy ---------------------------------------------------------------------------------------------------------


def test_cherrypy_lets_through_what_is_no_exception(book):
    def view() -> None:
        sign({"text": "half of it"})
        raise SystemExit("on purpose")

    with pytest.raises(SystemExit, match=r"^on purpose$"):
        start(cherrypy_app(view))
    assert book.entries == []


def test_cherrypy_puts_together_in_the_call_what_it_does_not_stream(book, capfd):
    log = Log()
    exchange = start(in_cherrypy(log.chunks, stream=False), on_start=log.lines.append)
    assert log.lines == ["chunk 1", "chunk 2", "finally", "200 OK"]
    assert exchange.read() == b"12"

    def chunks() -> Iterator[bytes]:
        sign({"text": "half of it"})
        yield b"1"
        raise RuntimeError("failed on purpose")

    exchange = start(in_cherrypy(chunks, stream=False))
    exchange.read()
    assert exchange.status == "500 Internal Server Error"
    assert book.entries == []


def test_hooks_of_cherrypy_run_before_the_commit_but_on_end_request_after_it(book):
    lines: list[str] = []

    def note(what: str) -> None:
        sign({"text": what})
        lines.append(f"{what}, after {len(book.entries)}")

    def view() -> str:
        sign({"text": "view"})
        for point in ("on_end_resource", "on_end_request"):
            cherrypy.request.hooks.attach(point, lambda point=point: note(point))
        return b"hello"  # type: ignore[return-value]

    start(cherrypy_app(view)).close()
    assert book.entries == ["view", "on_end_resource"]

    with book.engine.begin() as connection:
        connection.execute(delete(Entry))
    lines.clear()
    exchange = start(cherrypy_app(view), on_start=lines.append)
    assert exchange.read() == b"hello"
    assert lines == ["on_end_resource, after 0", "200 OK", "on_end_request, after 2"]
    assert book.entries == ["view", "on_end_resource", "on_end_request"]


def test_an_internal_redirect_of_cherrypy_stays_in_the_unit_of_work(book):
    class Root:
        @cherrypy.expose
        def index(self) -> None:
            sign({"text": "before"})
            raise cherrypy.InternalRedirect("/other")

        @cherrypy.expose
        def other(self, fail: str = "") -> bytes:
            sign({"text": "after"})
            assert book.entries == []
            return b"hello"

    app = SessionMiddleware(cherrypy.Application(Root(), config={"/": {"tools.encode.on": False}}), Session)
    assert start(app).read() == b"hello"
    assert book.entries == ["before", "after"]


def test_cherrypy_leaves_a_stream_that_is_closed_on_another_thread_to_the_garbage_collector(book):
    def run() -> list[str]:
        log = Log()
        exchange = start(in_cherrypy(log.chunks))
        exchange.next()
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(exchange.close).result()
        assert book.checked_out == set()
        assert log.lines == ["chunk 1"]
        del exchange
        cherrypy.serving.clear()  # as the next request of this thread does
        gc.collect()
        return log.lines

    with ThreadPoolExecutor(1) as here:
        assert here.submit(run).result() == ["chunk 1", "finally, unbound"]


def test_cherrypy_leaves_a_stream_to_the_garbage_collector_if_the_thread_has_had_another_request_meanwhile(book):
    log = Log()
    exchange = start(in_cherrypy(log.chunks))
    exchange.next()
    assert start(in_cherrypy(Log().chunks)).read() == b"12"
    exchange.close()
    assert book.checked_out == set()
    assert log.lines == ["chunk 1"]
    del exchange
    gc.collect()
    assert log.lines == ["chunk 1", "finally, unbound"]


@only("cherrypy")
def test_a_request_without_host_shows_no_traceback(example):
    answer = request(example.app)
    assert answer.status == "400 Bad Request"
    assert b"Traceback" not in answer.content


# -- TurboGears -------------------------------------------------------------------------------------------------------


def test_without_the_setting_turbogears_makes_a_generator_of_each_body(book):
    def run() -> None:
        exchange = start(turbogears_app(lambda: "hello", registry_streaming=True))
        assert not isinstance(exchange.body, list)
        assert exchange.read() == b"hello"
        with pytest.raises(TypeError):
            tg.request.path  # noqa: B018

    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(run).result()


def test_without_the_setting_turbogears_leaves_its_request_behind_where_the_commit_fails(book):
    def view() -> str:
        Session.add(Entry(name="without a text"))
        return "hello"

    def run(**settings: Any) -> str:
        with pytest.raises(IntegrityError):
            start(turbogears_app(view, **settings))
        return str(tg.request.path)

    with ThreadPoolExecutor(1) as elsewhere:
        assert elsewhere.submit(run, registry_streaming=True).result() == "/"
    with ThreadPoolExecutor(1) as elsewhere, pytest.raises(TypeError, match="No object"):
        elsewhere.submit(run).result()


def test_without_the_setting_a_body_of_turbogears_cannot_end_on_another_thread(book):
    def run() -> None:
        exchange = start(turbogears_app(lambda: "hello", registry_streaming=True))
        with ThreadPoolExecutor(1) as elsewhere, pytest.raises(AssertionError, match="No object has been registered"):
            elsewhere.submit(exchange.read).result()

    with ThreadPoolExecutor(1) as here:
        here.submit(run).result()


def test_with_the_setting_the_request_of_turbogears_is_gone_while_the_body_streams(book):
    def chunks() -> Iterator[bytes]:
        with pytest.raises(TypeError, match="No object"):
            tg.request.path  # noqa: B018
        yield b"gone"

    assert start(in_turbogears(chunks)).read() == b"gone"


def test_the_error_pages_of_turbogears_swallow_the_exception_into_a_500(book):
    from tg.configurator.components.error_pages import ErrorPagesConfigurationComponent

    class Error(tg.TGController):
        @tg.expose()
        def document(self) -> str:
            return "Something went wrong."

    class Root(tg.TGController):
        error = Error()

        @tg.expose()
        def index(self) -> None:
            sign({"text": "half of it"})
            raise RuntimeError("failed on purpose")

    app = turbogears_app(
        None,
        root_controller=Root(),
        configure=lambda configurator: configurator.register(ErrorPagesConfigurationComponent),
        **{"errorpage.enabled": True},
    )
    exchange = start(app)
    assert (exchange.status, exchange.read()) == ("500 Internal Server Error", b"Something went wrong.")
    assert book.entries == []


def test_hooks_of_turbogears_run_before_the_commit(book):
    lines: list[str] = []

    class Root(tg.TGController):
        @tg.expose()
        def index(self) -> str:
            return "hello"

        def _after(self, *args: Any, **kwargs: Any) -> None:
            sign({"text": "_after"})
            lines.append("_after")

    start(turbogears_app(None, root_controller=Root()), on_start=lines.append).close()
    assert lines == ["_after", "200 OK"]
    assert book.entries == ["_after"]


# -- Morepath ---------------------------------------------------------------------------------------------------------


def test_what_morepath_does_after_a_view_is_before_the_commit(book):
    lines: list[str] = []

    def view(self: Any, request: Any) -> str:
        @request.after
        def note(response: Any) -> None:
            sign({"text": "after"})
            lines.append("after")

        return "hello"

    start(morepath_app(view), on_start=lines.append).close()
    assert lines == ["after", "200 OK"]
    assert book.entries == ["after"]


def test_a_view_of_morepath_for_an_exception_that_answers_200_is_a_success(book):
    def view(self: Any, request: Any) -> str:
        sign({"text": "half of it"})
        raise RuntimeError("failed on purpose")

    app = morepath_app(view, of_error=lambda self, request: "Never mind.")
    assert start(app).read() == b"Never mind."
    assert book.entries == ["half of it"]


# -- the commands of the READMEs --------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def command_of(framework: str, tmp_path: Path) -> list[str]:
    """What the one line of the README runs in the end, on a free port."""
    text = (ROOT / f"examples/{framework}/README.rst").read_text()
    [line] = re.findall(r"^    (python3 -m venv .*)$", text, re.MULTILINE)
    python, *command = shlex.split(line.split(" && ")[-1])
    assert python == ".venv/bin/python"
    if framework != "pyramid":
        return [sys.executable, *command, "--port", "0"]
    ini = tmp_path / "development.ini"
    settings = (ROOT / command[-1]).read_text()
    assert settings.count(":8080") == 1
    ini.write_text(settings.replace(":8080", f":{free_port()}"))
    return [sys.executable, *command[:-1], str(ini)]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_command_of_its_readme_serves_it_until_it_is_ended(framework, ending, tmp_path):
    path = tmp_path / "guest_book.sqlite"
    environ = {**os.environ, "GUEST_BOOK_URL": f"sqlite:///{path}"}
    command = command_of(framework, tmp_path)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            output = process.stderr if framework == "pyramid" else process.stdout
            assert output is not None
            for line in output:
                if found := re.search(r"http://([0-9.]+):([0-9]+)", line):
                    break
            assert found is not None
            for method, form, status in (("GET", None, 200), ("POST", "text=hello", 303), ("POST", "", 400)):
                with closing(HTTPConnection(found[1], int(found[2]), timeout=SECONDS_TO_WAIT)) as connection:
                    connection.request(method, "/", form, {"Content-Type": FORM})
                    assert connection.getresponse().status == status
            process.send_signal(ending)
            _, errors = process.communicate(timeout=SECONDS_TO_WAIT)
        finally:
            process.kill()
    assert process.returncode == (0 if ending == signal.SIGINT else -ending)
    assert "Traceback" not in errors
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT text FROM entries").fetchall() == [("hello",)]
