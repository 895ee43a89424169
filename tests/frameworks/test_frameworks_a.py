"""The guest book in Flask, Bottle, Falcon, Django and web.py, and what their READMEs say is to be known of them."""

# A generator that raises before its first chunk has a "yield" that nothing reaches.
# mypy: no-warn-unreachable

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import QueuePool

from examples import guest_book
from sa_wsgi_session import NoActiveScope, SessionMiddleware, contextual_session, current_scope, session_scope
from tests.support import Exchange, Note, is_in_a_scope, make_environ, note, request

ROOT = Path(__file__).parents[2]
SECONDS_TO_WAIT = 15


class Framework(NamedTuple):
    #: The module that it is imported as.
    module: str
    #: Makes an application whose only page, ``/``, is what a function returns: a ``str``, or an iterator of chunks.
    make: Callable[[Callable[[], Any]], Any]
    #: Whether the middleware gets a page as a list, so that its session is removed before the server sees it.
    page_is_a_list: bool
    #: Whether it asks a generator for its first chunk before it calls ``start_response``.
    pulls_first_chunk: bool
    #: Whether its close reaches the ``finally`` of a generator.
    closes: bool
    #: What becomes of a generator when the request is a HEAD: ``"read"``, ``"closed"`` or ``"dropped"``.
    head: str
    #: Which exceptions of a view it lets through; it makes a 500 of the others.
    lets_through: tuple[type[BaseException], ...]
    #: What it answers to a form that is too large, and to one of the wrong type.
    too_large: int
    wrong_type: int
    #: Whether its HEAD of the page is answered as its GET is.
    has_head: bool = True


class Abandon(BaseException):
    """As a timeout of gevent's is: nothing that one may swallow."""


NOT_FOR_FRAMEWORKS = (SystemExit, KeyboardInterrupt, Abandon)


def make_flask(view: Callable[[], Any]) -> Any:
    flask = importlib.import_module("flask")
    app = flask.Flask("tests")
    app.add_url_rule("/", view_func=view, endpoint="view")
    return app


def make_bottle(view: Callable[[], Any]) -> Any:
    app = importlib.import_module("bottle").Bottle()
    app.get("/", callback=view)
    return app


def make_falcon(view: Callable[[], Any]) -> Any:
    falcon = importlib.import_module("falcon")

    class Resource:
        def on_get(self, req: Any, resp: Any) -> None:
            body = view()
            if isinstance(body, str):
                resp.text = body
            else:
                resp.stream = body

        on_head = on_get

    app = falcon.App()
    app.add_route("/", Resource())
    return app


def make_django(view: Callable[..., Any]) -> Any:
    importlib.import_module("examples.django.application")  # for its settings
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
    from django.test import override_settings
    from django.urls import path

    def django_view(request: Any) -> Any:
        body = view()
        if isinstance(body, HttpResponseBase):
            return body
        return HttpResponse(body) if isinstance(body, str) else StreamingHttpResponse(body)

    async def async_view(request: Any) -> Any:
        return HttpResponse(await view())

    handler = get_wsgi_application()
    urls = (path("", async_view if inspect.iscoroutinefunction(view) else django_view),)

    def application(environ: Any, start_response: Any) -> Any:
        with override_settings(ROOT_URLCONF=urls):
            return handler(environ, start_response)

    return application


def make_webpy(view: Callable[[], Any]) -> Any:
    web = importlib.import_module("web")
    web.config.debug = False
    page = type("Page", (), {"GET": staticmethod(view)})
    return web.application(("/", "Page"), {"Page": page}).wsgifunc()


FRAMEWORKS = {
    "flask": Framework("flask", make_flask, False, False, True, "closed", NOT_FOR_FRAMEWORKS, 413, 400),
    "bottle": Framework(
        "bottle", make_bottle, True, True, True, "closed", (*NOT_FOR_FRAMEWORKS, MemoryError), 413, 400
    ),
    "falcon": Framework("falcon", make_falcon, True, False, True, "dropped", NOT_FOR_FRAMEWORKS, 413, 415, False),
    "django": Framework("django", make_django, False, False, True, "read", NOT_FOR_FRAMEWORKS, 400, 400),
    "webpy": Framework("web", make_webpy, False, True, False, "read", (SystemExit, KeyboardInterrupt), 413, 400),
}
EXAMPLES = ["plain_wsgi", *FRAMEWORKS]
in_each_framework = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)


# -- the guest books --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def database_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the module of an example opens its database when it is imported, which any of these tests may do."""
    path = tmp_path / "book.sqlite"
    monkeypatch.setenv("GUEST_BOOK_URL", f"sqlite:///{path}")
    return path


URLENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=b"


def form_environ(form: bytes | str, content_type: str = URLENCODED) -> dict[str, Any]:
    body = form.encode() if isinstance(form, str) else form
    return {
        "CONTENT_TYPE": content_type,
        "CONTENT_LENGTH": str(len(body)),
        "HTTP_HOST": "127.0.0.1",
        "wsgi.input": io.BytesIO(body),
    }


class Book:
    """A guest book, with an empty database."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.module: Any = importlib.import_module(f"examples.{name}.application")
        self.application = self.module.application
        # The first import has opened the database already; another test's needs to be opened by hand.
        guest_book.open_database()
        self.engine = guest_book.Session.session_factory.kw["bind"]
        self._observer = create_engine(f"sqlite:///{path}")

    def send(self, path: str, form: bytes | str, content_type: str = URLENCODED) -> Exchange:
        return request(self.application, path, "POST", **form_environ(form, content_type))

    def sign(self, path: str = "/", **fields: str) -> Exchange:
        return self.send(path, urlencode(fields))

    def get(self, path: str, method: str = "GET") -> Exchange:
        return request(self.application, path, method)

    @property
    def texts(self) -> list[str]:
        """The texts that are durable."""
        with self._observer.connect() as connection:
            query: Any = select(guest_book.Entry.text).order_by(guest_book.Entry.id)
            return list(connection.execute(query).scalars())

    def insert(self, *texts: str) -> None:
        with self._observer.begin() as connection:
            for text in texts:
                connection.execute(guest_book.Entry.__table__.insert().values(name="Ada", text=text))

    @property
    def checked_out(self) -> int:
        return self.engine.pool.checkedout()

    def close(self) -> None:
        self.engine.dispose()
        self._observer.dispose()


@pytest.fixture(params=EXAMPLES)
def book(request: pytest.FixtureRequest, database_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Book]:
    if request.param in FRAMEWORKS:
        pytest.importorskip(FRAMEWORKS[request.param].module)
    monkeypatch.setattr(guest_book, "PAUSE", 0)
    with closing(Book(request.param, database_path)) as book:
        yield book
        assert book.checked_out == 0
        assert not guest_book.Session.registry.has()
        assert not is_in_a_scope()


def status_code(exchange: Exchange) -> int:
    return int(exchange.status[:3])


def test_an_entry_is_durable_before_the_server_hears_of_the_redirect(book):
    seen = []
    environ = make_environ("/", "POST", **form_environ("name=Ada&text=hello"))
    exchange = Exchange(book.application, environ, on_start=lambda status: seen.append((status[:3], book.texts)))
    exchange.read()
    assert seen == [("303", ["hello"])]
    [location] = [value for name, value in exchange.headers if name.lower() == "location"]
    assert location in ("/", "http://127.0.0.1/")


@pytest.mark.parametrize(("path", "status"), [("/fail", 409), ("/crash", 500)])
def test_nothing_remains_of_a_request_that_fails(book, path, status):
    try:
        exchange = book.sign(path, text="never")
    except RuntimeError as error:
        assert (book.name, str(error)) == ("plain_wsgi", "failed on purpose")  # noqa: PT017
    else:
        assert status_code(exchange) == status
        for secret in (b"failed on purpose", b"Traceback", b".py", b"RuntimeError"):
            assert secret not in exchange.content
        if status == 409:
            assert b"Nothing of it was kept." in exchange.content
    assert book.texts == []
    assert book.checked_out == 0
    assert status_code(book.sign(text="next")) == 303
    assert book.texts == ["next"]


@pytest.mark.parametrize("form", ["", "text=", "text=+", "text=" + "a" * 501, "text=a&name=" + "a" * 81])
def test_what_is_no_entry_is_refused_with_the_reason(book, form):
    exchange = book.send("/", form)
    assert status_code(exchange) == 400
    assert b"please" in exchange.content.lower()
    assert book.texts == []


FILE = b'--b\r\nContent-Disposition: form-data; name="text"; filename="f"\r\n\r\n\xff\x00\r\n--b--\r\n'


@pytest.mark.parametrize(
    ("form", "content_type"),
    [
        (b"text=\xff", URLENCODED),
        (b"text=%ff%fe", URLENCODED),
        (b"text=%zz&&=&=%00", URLENCODED),
        (b"\x00" * 100, URLENCODED),
        ("&".join(f"a{n}" for n in range(1500)).encode(), URLENCODED),
        (b"text=a", "application/x-www-form-urlencoded; charset=nonsense"),
        (b'{"text": ["a"]}', "application/json"),
        (b"[1]", "application/json"),
        (b"text=a", "nonsense"),
        (b"text=a", ""),
        (FILE, MULTIPART),
        (FILE[:-20], MULTIPART),
        (b"--b\r\n\r\n", MULTIPART),
        (b"text=a", "multipart/form-data"),
    ],
)
def test_a_form_that_is_none_breaks_nothing(book, form, content_type):
    assert status_code(book.send("/", form, content_type)) in (303, 400, 415)
    # Whatever was kept can be shown.
    assert status_code(book.get("/")) == 200
    assert status_code(book.get("/export.csv")) == 200


def test_of_a_field_that_comes_twice_one_counts(book):
    assert status_code(book.send("/", "text=first&text=second")) == 303
    assert book.texts in (["first"], ["second"])


@pytest.mark.parametrize("content_type", [URLENCODED, MULTIPART])
def test_a_form_that_is_too_large_is_refused_unread(book, content_type):
    class Endless(io.RawIOBase):
        taken = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.taken += len(buffer)
            buffer[:] = b"a" * len(buffer)
            return len(buffer)

    endless = Endless()
    exchange = request(
        book.application,
        "/",
        "POST",
        CONTENT_TYPE=content_type,
        CONTENT_LENGTH=str(10**9),
        **{"wsgi.input": io.BufferedReader(endless)},
    )
    framework = FRAMEWORKS.get(book.name)
    assert status_code(exchange) == (framework.too_large if framework else 400)
    assert endless.taken < 100_000
    assert book.texts == []


def test_a_page_shows_what_visitors_wrote_as_text(book):
    book.sign(name="<i>", text="<script>alert(1)</script>")
    exchange = book.get("/")
    assert ("Content-Type", "text/html; charset=utf-8") in [
        (name.title(), value.lower()) for name, value in exchange.headers
    ]
    assert b"<script>" not in exchange.content
    assert b"&lt;script&gt;" in exchange.content
    assert b"<i>" not in exchange.content


def test_an_export_streams_from_a_result_that_is_open(book):
    book.insert(*(f"entry {n}" for n in range(300)))
    exchange = Exchange(book.application, make_environ("/export.csv"))
    assert book.checked_out == 1
    lines = exchange.read().decode().splitlines()
    assert lines == ["id,name,text", *(f"{n + 1},Ada,entry {n}" for n in range(300))]
    headers = {name.lower(): value for name, value in exchange.headers}
    assert headers["content-type"] == "text/csv; charset=utf-8"
    assert book.checked_out == 0


def test_an_export_that_the_visitor_cuts_off_leaves_nothing_checked_out(book):
    book.insert(*(f"entry {n}" for n in range(300)))
    exchange = Exchange(book.application, make_environ("/export.csv"))
    assert [exchange.next(), exchange.next()] == [b"id,name,text\r\n", b"1,Ada,entry 0\r\n"]
    exchange.close()
    assert book.checked_out == 0


def test_events_hold_no_connection_between_two_of_them_and_tell_what_is_new(book):
    exchange = Exchange(book.application, make_environ("/events"))
    assert exchange.next() == b"data: 0\n\n"
    assert book.checked_out == 0
    assert status_code(book.sign(text="hello")) == 303
    assert exchange.next() == b"data: 1\n\n"
    assert book.checked_out == 0
    headers = {name.lower(): value for name, value in exchange.headers}
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"
    exchange.close()


def test_hanging_up_ends_the_events(book, monkeypatch):
    ended = []

    def events() -> Iterator[bytes]:
        try:
            while True:
                guest_book.Session.execute(select(guest_book.Entry))
                yield b"data: 0\n\n"
        finally:
            ended.append("ended")

    monkeypatch.setattr(book.module, "events", events)
    exchange = Exchange(book.application, make_environ("/events"))
    exchange.next()
    exchange.close()
    assert book.checked_out == 0
    del exchange
    assert ended == ["ended"]


def test_a_head_of_the_page_is_answered_where_the_framework_has_it(book):
    expected = 404 if book.name == "plain_wsgi" else 200 if FRAMEWORKS[book.name].has_head else 405
    assert status_code(book.get("/", "HEAD")) == expected


def test_a_head_of_the_events_ends(book):
    assert status_code(book.get("/events", "HEAD")) in (200, 404, 405)


def test_what_is_not_there_is_a_404_and_the_wrong_method_an_error(book):
    assert status_code(book.get("/nowhere")) == 404
    assert status_code(book.get("/fail")) in (404, 405)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_the_command_of_its_readme_serves_it_until_it_is_stopped(name, end, tmp_path):
    if name in FRAMEWORKS:
        pytest.importorskip(FRAMEWORKS[name].module)
    text = (ROOT / f"examples/{name}/README.rst").read_text()
    [command] = re.findall(r"^    (python3 -m venv .*)$", text, re.MULTILINE)
    assert command.split(" && ")[-1] == f".venv/bin/python -m examples.{name}"
    assert f"examples.{name}.application" in text.partition("What to know")[0]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "GUEST_BOOK_URL": f"sqlite:///{tmp_path / 'book.sqlite'}"}
    pipe = subprocess.PIPE
    arguments = [sys.executable, "-W", "error::DeprecationWarning", "-m", f"examples.{name}", "--port", "0"]
    with subprocess.Popen(arguments, cwd=tmp_path, env=environ, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            [(host, port)] = re.findall(r"http://([0-9.]+):([0-9]+)/", process.stdout.readline())
            with closing(HTTPConnection(host, int(port), timeout=SECONDS_TO_WAIT)) as connection:
                connection.request("POST", "/", "text=hello", {"Content-Type": "application/x-www-form-urlencoded"})
                assert connection.getresponse().status == 303
            with closing(HTTPConnection(host, int(port), timeout=SECONDS_TO_WAIT)) as connection:
                connection.request("GET", "/")
                assert b"hello" in connection.getresponse().read()
            process.send_signal(end)
            _, errors = process.communicate(timeout=SECONDS_TO_WAIT)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0 if end == signal.SIGINT else -end, "")


def test_django_answers_to_no_other_host(book):
    if book.name == "django":
        assert status_code(request(book.application, HTTP_HOST="evil.example")) == 400
        assert status_code(request(book.application, HTTP_HOST="localhost:8080")) == 200


def test_web_py_refuses_a_form_without_a_length(book):
    if book.name == "webpy":
        exchange = request(
            book.application,
            "/",
            "POST",
            CONTENT_TYPE=URLENCODED,
            HTTP_TRANSFER_ENCODING="chunked",
            **{"wsgi.input": io.BytesIO(b"text=a")},
        )
        assert status_code(exchange) == 413


# -- what is to be known of each framework ----------------------------------------------------------------------------


def install(framework: Framework, world: Any, view: Callable[[], Any]) -> Any:
    """The application, with the middleware where the README has it."""
    pytest.importorskip(framework.module)
    app = framework.make(view)
    if framework.module == "flask":
        app.wsgi_app = SessionMiddleware(app.wsgi_app, world.Session)
        return app
    return SessionMiddleware(app, world.Session)


@in_each_framework
def test_a_page_is_committed_at_once_and_removed_at_once_where_it_is_a_list(world, framework):
    def view() -> str:
        world.Session.add(note("hello"))
        world.Session.flush()
        return "page"

    exchange = Exchange(install(framework, world, view))
    assert world.durable() == ["hello"]
    assert world.checked_out == 0
    assert isinstance(exchange.body, list) == framework.page_is_a_list
    assert exchange.environ["sa_wsgi_session.scope"].__str__() == "GET /"
    assert exchange.read() == b"page"


@in_each_framework
def test_what_comes_before_the_first_chunk_belongs_to_the_view_where_it_is_pulled(world, framework):
    def view() -> Iterator[bytes]:
        world.Session.add(note("before the first chunk"))
        yield b"first"
        yield b"second"

    exchange = Exchange(install(framework, world, view))
    assert (world.durable() == ["before the first chunk"]) == framework.pulls_first_chunk
    assert exchange.read() == b"firstsecond"
    assert world.durable() == ["before the first chunk"]


@in_each_framework
def test_an_error_before_the_first_chunk_is_a_500_or_an_exception_and_is_rolled_back(world, framework):
    def view() -> Iterator[bytes]:
        world.Session.add(note("never"))
        world.Session.flush()
        raise RuntimeError("failed on purpose")
        yield

    app = install(framework, world, view)
    if framework.module == "bottle":
        assert status_code(request(app)) == 500
    else:
        with pytest.raises(RuntimeError, match="failed on purpose"):
            request(app)
    assert world.durable() == []


@in_each_framework
def test_the_session_is_there_while_the_body_streams(world, framework):
    def view() -> Iterator[bytes]:
        session = world.Session()
        yield b"first"
        assert world.Session() is session
        world.Session.add(note("in the body"))
        yield b"second"

    assert request(install(framework, world, view)).content == b"firstsecond"
    assert world.durable() == ["in the body"]


@in_each_framework
def test_hanging_up_reaches_the_finally_of_a_generator_with_its_session_if_at_all(world, framework):
    seen: list[bool] = []

    def view() -> Iterator[bytes]:
        session = world.Session()
        try:
            yield b"first"
            yield b"second"
        finally:
            seen.append(is_in_a_scope() and world.Session() is session)
            if not is_in_a_scope():
                world.Session.remove()

    exchange = Exchange(install(framework, world, view))
    exchange.next()
    exchange.close()
    # The session is removed by now in any case; web.py's generator has not heard of it yet.
    assert seen == ([True] if framework.closes else [])
    del exchange
    assert seen == [framework.closes]


@in_each_framework
def test_a_head_reads_closes_or_drops_a_generator(world, framework):
    seen: list[str] = []

    class Chunks:
        def __iter__(self) -> Chunks:
            return self

        def __next__(self) -> bytes:
            if seen.count("read") == 2:
                raise StopIteration
            seen.append("read")
            return b"chunk"

        def close(self) -> None:
            seen.append("closed")

    exchange = request(install(framework, world, Chunks), "/", "HEAD")
    assert status_code(exchange) == 200
    assert exchange.content == (b"chunkchunk" if framework.head == "read" else b"")
    expected = {
        "flask": ["closed"],
        "bottle": ["read", "closed"],
        "falcon": [],
        "django": ["read", "read", "closed"],
        "web": ["read", "read"],
    }
    assert seen == expected[framework.module]


@in_each_framework
@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, SystemExit, KeyboardInterrupt, Abandon])
def test_an_exception_of_a_view_is_a_500_or_goes_on_and_is_rolled_back(world, framework, kind):
    def view() -> str:
        world.Session.add(note("never"))
        world.Session.flush()
        raise kind("failed on purpose")

    app = install(framework, world, view)
    if issubclass(kind, framework.lets_through):
        with pytest.raises(kind):
            request(app)
    else:
        exchange = request(app)
        assert status_code(exchange) == 500
        assert b"failed on purpose" not in exchange.content
    assert world.durable() == []


@in_each_framework
def test_a_commit_that_fails_is_the_servers_500(world, framework):
    world.insert("taken")

    def view() -> str:
        world.Session.add(note("taken"))
        return "page"

    exchange: list[str] = []
    with pytest.raises(Exception, match="UNIQUE"):
        Exchange(install(framework, world, view), on_start=exchange.append)
    assert exchange == []


# -- Flask ------------------------------------------------------------------------------------------------------------


def flask_app(world: Any) -> Any:
    flask = pytest.importorskip("flask")
    app = flask.Flask("tests")
    app.wsgi_app = SessionMiddleware(app.wsgi_app, world.Session)
    return app


@pytest.mark.parametrize("setting", ["TESTING", "DEBUG", "PROPAGATE_EXCEPTIONS"])
def test_flask_lets_exceptions_through_where_it_tests_or_debugs(world, setting):
    app = flask_app(world)
    app.config[setting] = True

    @app.get("/")
    def view() -> str:
        world.Session.add(note("never"))
        world.Session.flush()
        raise RuntimeError("failed on purpose")

    with pytest.raises(RuntimeError, match="failed on purpose"):
        request(app)
    assert world.durable() == []


def test_flask_tears_down_before_the_commit_and_in_the_unit_of_work_of_the_view(world):
    app = flask_app(world)

    @app.teardown_request
    def teardown(error: Any) -> None:
        assert world.durable() == []
        world.Session.add(note("teardown"))

    @app.get("/")
    def view() -> str:
        world.Session.add(note("view"))
        return "page"

    assert request(app).content == b"page"
    assert world.durable() == ["teardown", "view"]


def test_flask_tears_down_again_after_a_stream_with_context(world):
    app = flask_app(world)
    seen: list[Any] = []
    flask = sys.modules["flask"]

    @app.teardown_appcontext
    def teardown(error: Any) -> None:
        seen.append(is_in_a_scope())

    @app.get("/")
    def view() -> Any:
        def generate() -> Iterator[str]:
            yield flask.request.path
            world.Session.add(note("stream"))

        return flask.Response(flask.stream_with_context(generate()))

    assert request(app).content == b"/"
    assert seen == [True, True]
    assert world.durable() == ["stream"]


def test_flask_call_on_close_runs_with_the_session(world):
    app = flask_app(world)
    flask = sys.modules["flask"]

    @app.get("/")
    def view() -> Any:
        response = flask.Response("page")
        response.call_on_close(lambda: world.Session.add(note("close")))
        return response

    exchange = Exchange(app)
    assert world.durable() == []
    exchange.read()
    assert world.durable() == ["close"]


def test_flasks_test_client_has_to_be_told_to_close(world):
    app = flask_app(world)

    @app.get("/")
    def view() -> Any:
        return iter(world.Session.execute(select(Note.text)).scalars()) and "page"

    @app.get("/export")
    def export() -> Any:
        rows = world.Session.execute(select(Note.text)).scalars()
        return (f"{text}\n" for text in rows)

    world.insert("one")
    client = app.test_client()
    assert client.get("/export", buffered=True).text == "one\n"
    assert world.checked_out == 0
    with client.get("/export") as response:
        assert world.checked_out == 1
        assert response.text == "one\n"
    assert world.checked_out == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        response = client.get("/export")
        assert response.text == "one\n"
        del response
        gc.collect()
    assert any("dropped without a call to its close()" in str(warning.message) for warning in caught)
    assert world.checked_out == 0


class AsyncSite:
    """A Flask or Django application with an ``async def`` view, and where that ran."""

    def __init__(self, name: str, world: Any, view: Callable[[], Any]) -> None:
        self.threads: list[int] = []

        async def page() -> str:
            self.threads.append(threading.get_ident())
            await view()
            return "page"

        self.app = install(FRAMEWORKS[name], world, page)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        return self.app(environ, start_response)


in_flask_and_django = pytest.mark.parametrize("name", ["flask", "django"])
contextual = pytest.mark.parametrize("world", ["contextual"], indirect=True)


@in_flask_and_django
def test_an_async_view_has_another_thread_and_its_thread_local_session_is_lost(world, name):
    """Not an advice: what happens without one."""
    pytest.importorskip("asgiref")

    async def view() -> None:
        with pytest.raises(NoActiveScope):
            current_scope()
        world.Session.add(note("lost"))
        world.Session.flush()

    site = AsyncSite(name, world, view)
    gc.collect()
    gc.disable()
    try:
        assert request(site).status == "200 OK"
        assert site.threads != [threading.get_ident()]
        assert world.durable() == []
        # Nobody has removed that session: its connection is back when the garbage collector finds it.
        assert world.checked_out == 1
    finally:
        gc.enable()
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while world.checked_out:
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)  # the thread is about to end
        gc.collect()
    assert world.durable() == []


@contextual
@in_flask_and_django
def test_an_async_view_has_the_session_of_a_contextual_session(world, name):
    pytest.importorskip("asgiref")

    async def view() -> None:
        session = world.Session()
        world.Session.add(note("one"))
        await asyncio.sleep(0)
        world.Session.flush()
        await asyncio.sleep(0.001)
        assert world.Session() is session
        world.Session.add(note("two"))

    site = AsyncSite(name, world, view)
    gc.disable()
    try:
        assert request(site).status == "200 OK"
        assert site.threads != [threading.get_ident()]
        assert world.checked_out == 0
    finally:
        gc.enable()
    assert world.durable() == ["one", "two"]


@contextual
@in_flask_and_django
def test_an_async_view_that_fails_is_rolled_back(world, name):
    pytest.importorskip("asgiref")

    async def view() -> None:
        world.Session.add(note("never"))
        world.Session.flush()
        raise RuntimeError("failed on purpose")

    assert status_code(request(AsyncSite(name, world, view))) == 500
    assert world.durable() == []


@pytest.mark.parametrize("world", ["thread-local", "contextual"], indirect=True)
@in_flask_and_django
def test_sync_to_async_is_back_on_the_thread_of_the_request_and_has_its_session(world, name):
    sync_to_async = pytest.importorskip("asgiref.sync").sync_to_async

    def work() -> int:
        world.Session.add(note("kept"))
        return threading.get_ident()

    async def view() -> None:
        assert await sync_to_async(work)() == site.thread

    site: Any = AsyncSite(name, world, view)
    site.thread = threading.get_ident()
    assert request(site).status == "200 OK"
    assert world.durable() == ["kept"]


@contextual
@in_flask_and_django
def test_tasks_of_a_view_share_its_session_unless_they_open_their_own(world, name):
    pytest.importorskip("asgiref")

    async def share(text: str) -> Any:
        world.Session.add(note(text))
        await asyncio.sleep(0)
        return world.Session()

    async def own(text: str) -> None:
        with session_scope(world.Session, propagation="requires_new") as session:
            await asyncio.sleep(0)
            assert world.Session() is session
            session.add(note(text))

    async def view() -> None:
        first, second = await asyncio.gather(share("shared 1"), share("shared 2"))
        assert first is second is world.Session()
        await asyncio.gather(own("own 1"), own("own 2"))
        world.Session.rollback()  # what one of them has rolled back, all of them have

    assert request(AsyncSite(name, world, view)).status == "200 OK"
    assert world.durable() == ["own 1", "own 2"]


# -- Flask-SQLAlchemy -------------------------------------------------------------------------------------------------


class FlaskDatabase:
    """A Flask application with Flask-SQLAlchemy, two databases and a model in each."""

    def __init__(self, folder: Path) -> None:
        flask = pytest.importorskip("flask")
        extension = pytest.importorskip("flask_sqlalchemy")
        self.app = flask.Flask("tests")
        options = {"poolclass": QueuePool, "connect_args": {"check_same_thread": False}}
        self.app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{folder / 'one.sqlite'}"
        self.app.config["SQLALCHEMY_BINDS"] = {"other": f"sqlite:///{folder / 'other.sqlite'}"}
        self.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options
        self.db: Any = extension.SQLAlchemy(self.app)
        db = self.db

        class Guest(db.Model):  # type: ignore[misc, name-defined, unused-ignore]
            name = db.Column(db.String(80), primary_key=True)

        class Order(db.Model):  # type: ignore[misc, name-defined, unused-ignore]
            __bind_key__ = "other"
            number = db.Column(db.Integer, primary_key=True)

        self.Guest: Any = Guest
        self.Order: Any = Order
        with self.app.app_context():
            db.create_all()
            self.engines = dict(db.engines)

    def view(self, view: Callable[[], Any], Session: Any) -> Any:
        self.app.wsgi_app = SessionMiddleware(self.app.wsgi_app, Session)
        self.app.add_url_rule("/", view_func=view, endpoint="view")
        return self.app

    def durable(self) -> tuple[list[str], list[int]]:
        with self.engines[None].connect() as one, self.engines["other"].connect() as other:
            return (
                list(one.execute(select(self.Guest.name)).scalars()),
                list(other.execute(select(self.Order.number)).scalars()),
            )

    def close(self) -> None:
        for engine in self.engines.values():
            engine.dispose()


@pytest.fixture
def flask_database(tmp_path: Path) -> Iterator[FlaskDatabase]:
    with closing(FlaskDatabase(tmp_path)) as database:
        yield database
        assert [engine.pool.checkedout() for engine in database.engines.values()] == [0, 0]


def test_the_session_of_flask_sqlalchemy_cannot_be_bound_around_flask(flask_database):
    app = flask_database.view(lambda: "page", flask_database.db.session)
    with pytest.raises(RuntimeError, match="Working outside of application context"):
        request(app)


def test_putting_our_session_in_its_place_loses_the_work_because_its_teardown_comes_before_the_commit(flask_database):
    db, Guest = flask_database.db, flask_database.Guest
    Session = db.session = scoped_session(sessionmaker(flask_database.engines[None]))

    def view() -> str:
        Session.add(Guest(name="lost"))
        Session.flush()
        return "page"

    assert request(flask_database.view(view, Session)).status == "200 OK"
    assert flask_database.durable() == ([], [])


def test_the_class_of_its_sessions_needs_the_application_in_bodies_and_jobs_too(flask_database):
    session_class = importlib.import_module("flask_sqlalchemy.session").Session
    Session = scoped_session(sessionmaker(class_=session_class, db=flask_database.db))

    def view() -> Iterator[bytes]:
        yield b"first"
        yield str(Session.query(flask_database.Guest).count()).encode()

    with pytest.raises(RuntimeError, match="Working outside of application context"):
        request(flask_database.view(view, Session))
    with pytest.raises(RuntimeError, match="Working outside of application context"), session_scope(Session) as session:
        session.query(flask_database.Guest).count()


@pytest.mark.parametrize("make", [scoped_session, contextual_session])
def test_its_models_engines_and_queries_work_with_a_session_of_our_own(flask_database, make):
    app, db, Guest, Order = flask_database.app, flask_database.db, flask_database.Guest, flask_database.Order
    with app.app_context():
        tables = {
            table: db.engines[key] for key, metadata in db.metadatas.items() for table in metadata.tables.values()
        }
    Session = make(sessionmaker(binds=tables))
    db.Model.query = Session.query_property(db.Query)

    def view() -> Iterator[bytes]:
        Session.add_all([Guest(name="Ada"), Order(number=1)])
        assert Guest.query.filter_by(name="Ada").first_or_404() is Session.get(Guest, "Ada")
        yield b"first"
        yield str(Guest.query.count()).encode()

    def missing() -> str:
        Session.add(Guest(name="never"))
        return str(Guest.query.filter_by(name="nobody").first_or_404())

    app.add_url_rule("/missing", view_func=missing)
    flask_database.view(view, Session)
    assert request(app).content == b"first1"
    assert flask_database.durable() == (["Ada"], [1])
    assert status_code(request(app, "/missing")) == 404
    assert flask_database.durable() == (["Ada"], [1])
    with session_scope(Session):
        assert Order.query.one().number == 1


# -- Bottle, Falcon, Django, web.py -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "kept"), [(303, ["hello"]), (409, [])])
def test_bottles_answers_that_are_raised_are_answers_in_a_generator_too(world, code, kept):
    bottle = pytest.importorskip("bottle")

    def view() -> Iterator[bytes]:
        world.Session.add(note("hello"))
        raise bottle.HTTPResponse("answer", code)
        yield

    exchange = request(install(FRAMEWORKS["bottle"], world, view))
    assert (status_code(exchange), exchange.content) == (code, b"answer")
    assert world.durable() == kept


def test_bottle_without_catchall_lets_exceptions_through(world):
    bottle = pytest.importorskip("bottle")
    app = bottle.Bottle()
    app.catchall = False

    @app.get("/")  # type: ignore[untyped-decorator, unused-ignore]
    def view() -> str:
        world.Session.add(note("never"))
        world.Session.flush()
        raise RuntimeError("failed on purpose")

    with pytest.raises(RuntimeError, match="failed on purpose"):
        request(SessionMiddleware(app, world.Session))
    assert world.durable() == []


def test_bottles_and_falcons_hooks_after_the_view_belong_to_its_unit_of_work(world):
    bottle, falcon = pytest.importorskip("bottle"), pytest.importorskip("falcon")
    bottle_app = make_bottle(lambda: "page")
    bottle_app.add_hook("after_request", lambda: world.Session.add(note("bottle")))
    assert bottle.response is not None
    assert request(SessionMiddleware(bottle_app, world.Session)).content == b"page"

    class Hook:
        def process_response(self, req: Any, resp: Any, resource: Any, req_succeeded: bool) -> None:
            world.Session.add(note("falcon"))

    class Resource:
        def on_get(self, req: Any, resp: Any) -> None:
            resp.text = "page"

    falcon_app = falcon.App(middleware=[Hook()])
    falcon_app.add_route("/", Resource())
    assert request(SessionMiddleware(falcon_app, world.Session)).content == b"page"
    assert world.durable() == ["bottle", "falcon"]


def test_falcon_drops_its_media_but_not_the_stream_when_a_handler_answers(world):
    falcon = pytest.importorskip("falcon")

    class Resource:
        def on_get(self, req: Any, resp: Any) -> None:
            world.Session.add(note("never"))
            resp.stream = iter([b"never"])
            raise falcon.HTTPConflict

    app = falcon.App()
    app.add_route("/", Resource())
    exchange = request(SessionMiddleware(app, world.Session))
    assert status_code(exchange) == 409
    assert json.loads(exchange.content) == {"title": "409 Conflict"}
    assert world.durable() == []


def test_falcons_test_client_takes_the_middleware(world):
    testing = pytest.importorskip("falcon.testing")
    app = install(FRAMEWORKS["falcon"], world, lambda: str(is_in_a_scope()))
    assert testing.TestClient(app).simulate_get("/").text == "True"


@pytest.mark.parametrize("name", ["django", "webpy"])
def test_the_test_clients_of_django_and_web_py_pass_the_middleware_by(world, name):
    seen: list[bool] = []

    def view() -> str:
        seen.append(is_in_a_scope())
        return "page"

    framework = FRAMEWORKS[name]
    pytest.importorskip(framework.module)
    if name == "django":
        framework.make(view)
        from django.http import HttpResponse
        from django.test import Client, override_settings
        from django.urls import path

        with override_settings(ROOT_URLCONF=(path("", lambda request: HttpResponse(view())),)):
            assert Client(headers={"host": "127.0.0.1"}).get("/").status_code == 200
    else:
        web = importlib.import_module("web")
        app = web.application(("/", "Page"), {"Page": type("Page", (), {"GET": staticmethod(view)})})
        assert app.request("/").data == b"page"
    assert seen == [False]
    assert request(install(framework, world, view)).content == b"page"
    assert seen == [False, True]


def test_djangos_runserver_serves_the_middleware(book):
    if book.name == "django":
        from django.core.servers.basehttp import get_internal_wsgi_application

        assert get_internal_wsgi_application() is book.application


def test_django_sends_request_finished_in_close_with_the_session(world):
    pytest.importorskip("django")
    from django.core.signals import request_finished

    seen: list[bool] = []

    def finished(**more: Any) -> None:
        seen.append(is_in_a_scope())

    exchange = Exchange(install(FRAMEWORKS["django"], world, lambda: "page"))
    request_finished.connect(finished)
    try:
        assert exchange.read() == b"page"
    finally:
        request_finished.disconnect(finished)
    assert seen == [True]


def test_django_swallows_what_the_close_of_a_body_raises(world):
    def view() -> Iterator[bytes]:
        try:
            yield b"first"
            yield b"second"
        finally:
            raise RuntimeError("failed on purpose")

    exchange = Exchange(install(FRAMEWORKS["django"], world, view))
    exchange.next()
    exchange.close()


def test_an_async_body_of_django_is_read_at_once_on_another_thread(world):
    framework = FRAMEWORKS["django"]
    pytest.importorskip(framework.module)
    threads: list[int] = []

    def view() -> Any:
        from django.http import StreamingHttpResponse

        async def chunks() -> Any:
            for chunk in ("first", "second"):
                threads.append(threading.get_ident())
                yield chunk

        return StreamingHttpResponse(chunks())

    with pytest.warns(Warning, match="must consume asynchronous iterators"):
        exchange = Exchange(install(framework, world, view))
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    assert exchange.read() == b"firstsecond"


DJANGO_WITH_ITS_OWN_ORM = """
import sys
from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="-",
    ROOT_URLCONF=__name__,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1], "ATOMIC_REQUESTS": True}},
)
from django.core.wsgi import get_wsgi_application
from django.db import connection
from django.http import HttpResponse
from django.urls import path
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from sa_wsgi_session import SessionMiddleware, current_scope
from tests.support import request

Session = scoped_session(sessionmaker(create_engine(f"sqlite:///{sys.argv[2]}")))


def view(request):
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO note VALUES ('of Django')")
    Session.execute(text("INSERT INTO note VALUES ('of SQLAlchemy')"))
    current_scope().doom("as if its COMMIT had failed")
    return HttpResponse("page")


urlpatterns = [path("", view)]
for name in sys.argv[1:]:
    import sqlite3
    sqlite3.connect(name).execute("CREATE TABLE note (text)")
print(request(SessionMiddleware(get_wsgi_application(), Session)).status)
for name in sys.argv[1:]:
    print(sqlite3.connect(name).execute("SELECT text FROM note").fetchall())
"""


def test_djangos_own_transaction_is_another_one_and_comes_first(tmp_path):
    pytest.importorskip("django")
    script = tmp_path / "own_orm.py"
    script.write_text(DJANGO_WITH_ITS_OWN_ORM)
    command = [sys.executable, str(script), str(tmp_path / "django.sqlite"), str(tmp_path / "ours.sqlite")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=SECONDS_TO_WAIT)
    assert done.stdout.splitlines() == ["200 OK", "[('of Django',)]", "[]"]


@pytest.mark.parametrize(("answer", "kept"), [("seeother", ["hello"]), ("conflict", [])])
def test_web_pys_answers_that_are_raised_are_answers_in_a_generator_too(world, answer, kept):
    web = pytest.importorskip("web")

    def view() -> Iterator[bytes]:
        world.Session.add(note("hello"))
        raise getattr(web, answer)("/elsewhere")
        yield

    exchange = request(install(FRAMEWORKS["webpy"], world, view))
    assert status_code(exchange) == (303 if kept else 409)
    assert world.durable() == kept


def test_a_processor_of_web_py_sees_no_exceptions_but_its_own(world):
    web = pytest.importorskip("web")
    seen: list[str] = []

    def processor(handler: Callable[[], Any]) -> Any:
        try:
            return handler()
        except Exception as error:
            seen.append(type(error).__name__)
            raise

    def view() -> str:
        raise RuntimeError("failed on purpose")

    web.config.debug = False
    app = web.application(("/", "Page"), {"Page": type("Page", (), {"GET": staticmethod(view)})})
    app.add_processor(processor)
    assert status_code(request(SessionMiddleware(app.wsgifunc(), world.Session))) == 500
    assert seen == ["_InternalError"]


def test_what_an_error_handler_of_falcon_answers_decides(world):
    falcon = pytest.importorskip("falcon")

    class Resource:
        def on_get(self, req: Any, resp: Any) -> None:
            world.Session.add(note("kept after all"))
            raise RuntimeError("failed on purpose")

    def forgive(req: Any, resp: Any, error: Any, params: Any) -> None:
        resp.text = "never mind"

    app = falcon.App()
    app.add_route("/", Resource())
    app.add_error_handler(RuntimeError, forgive)
    assert request(SessionMiddleware(app, world.Session)).content == b"never mind"
    assert world.durable() == ["kept after all"]


def test_the_functions_of_flask_sqlalchemy_use_its_own_session(flask_database):
    db, Guest = flask_database.db, flask_database.Guest
    Session = scoped_session(sessionmaker(flask_database.engines[None]))
    db.Model.query = Session.query_property(db.Query)

    def view() -> str:
        Session.add(Guest(name="Ada"))
        Session.flush()
        with pytest.raises(Exception, match="404"):
            db.get_or_404(Guest, "Ada")
        assert db.paginate(db.select(Guest)).total == 0
        assert Guest.query.paginate().total == 1
        return "page"

    assert request(flask_database.view(view, Session)).status == "200 OK"
    assert flask_database.durable() == (["Ada"], [])
