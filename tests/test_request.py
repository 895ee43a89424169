"""One request, from the binding of its session to the end of its body."""

from __future__ import annotations

import contextvars
import gc
import io
import itertools
import logging
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from threading import get_ident
from typing import Any, cast
from wsgiref.util import FileWrapper

import greenlet
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, declarative_base, scoped_session, sessionmaker

from sa_wsgi_session import (
    NoActiveScope,
    RollbackOnlyError,
    SessionMiddleware,
    SessionScope,
    _watching,
    contextual_session,
    current_scope,
    default_commit_veto,
    session_scope,
)
from tests.support import (
    PLAIN,
    REGISTRIES,
    Body,
    Exchange,
    Note,
    World,
    Worlds,
    is_in_a_scope,
    make_environ,
    make_session,
    request,
    respond,
    serve,
)

pytestmark = [
    # What psycopg says where an application lets go of an open cursor of the server, as some of these do.
    pytest.mark.filterwarnings("ignore:<psycopg.ServerCursor:ResourceWarning"),
    # And PyMySQL where such a cursor outlives the body: CPython 3.13.0 keeps what a closed generator had.
    pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete:UserWarning"),
]


@pytest.fixture(params=REGISTRIES)
def world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    """SQLite, with each kind of registry."""
    with worlds.use(request.getfixturevalue, "sqlite", request.param) as world:
        yield world


@pytest.fixture(params=["thread-local", "custom"])
def holding_world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    """SQLite, with a registry that gives sessions also outside of units of work."""
    with worlds.use(request.getfixturevalue, "sqlite", request.param) as world:
        yield world
        world.Session.remove()


# Each kind of registry once, and each database once.
DATABASES = [("sqlite", "custom"), ("postgresql", "thread-local"), ("mariadb", "contextual")]


@pytest.fixture(params=DATABASES, ids="-".join)
def any_world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    """Each kind of registry, and each database."""
    with worlds.use(request.getfixturevalue, *request.param) as world:
        yield world


@pytest.fixture
def postgresql_world(request: pytest.FixtureRequest, worlds: Worlds) -> Iterator[World]:
    with worlds.use(request.getfixturevalue, "postgresql", "thread-local") as world:
        yield world


def add(world: World, text: str) -> None:
    world.Session.add(Note(text=text))


def write(world: World, text: str) -> None:
    """Like :func:`add`, but the database knows of it at once."""
    add(world, text)
    world.Session.flush()


def run_in_thread(function: Callable[[], Any]) -> Any:
    """What *function* returns, or raises, on a thread of its own."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


@contextmanager
def statements(world: World) -> Iterator[list[str]]:
    """All that is sent to the database meanwhile."""
    sent: list[str] = []

    def record(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        sent.append(statement)

    event.listen(world.engine, "before_cursor_execute", record)
    try:
        yield sent
    finally:
        event.remove(world.engine, "before_cursor_execute", record)


# -- bind: the session of the request ---------------------------------------------------------------------------------


def test_in_a_request_the_session_is_always_the_same_one_and_in_the_next_another(world: World) -> None:
    seen: list[list[Any]] = []

    def view() -> Any:
        seen.append([world.Session(), world.Session()])
        yield b"streamed"
        seen[-1].append(world.Session())

    app = serve(world, view)
    assert request(app).content == b"streamed"
    assert request(app).content == b"streamed"
    (first, *others), (second, *more) = seen
    assert others == [first, first]
    assert more == [second, second]
    assert first is not second


def test_no_session_is_made_until_the_application_asks_for_one(world: World) -> None:
    made: list[Any] = []
    make = world.Session.session_factory

    def factory() -> Any:
        made.append(make())
        return made[-1]

    session: Any
    if world.Session.registry.__class__.__name__ == "ContextRegistry":
        session = contextual_session(factory)
    else:
        make_scoped: Any = scoped_session
        session = make_scoped(factory, getattr(world.Session.registry, "scopefunc", None))

    def stream() -> Any:
        yield b"nothing "
        yield b"asked"

    for body in ([b""], (b"",), stream):
        app = SessionMiddleware(respond(lambda body=body: body() if callable(body) else body), session)  # type: ignore[misc]
        request(app)
        request(SessionMiddleware(respond(lambda: stream(), "500 Oops"), session))
    assert made == []
    request(SessionMiddleware(respond(lambda: [str(session().is_active).encode()]), session))
    assert len(made) == 1


def test_a_session_that_the_thread_already_held_is_set_aside_and_comes_back(holding_world: World) -> None:
    world = holding_world
    held = world.Session()
    held.add(Note(text="not of the request"))

    def view() -> Any:
        assert not world.Session.registry.has()
        write(world, "first")
        yield b"1"
        assert world.Session() is not held
        yield b"2"

    exchange = Exchange(serve(world, view))
    assert world.Session() is held
    assert exchange.next() == b"1"
    assert world.Session() is held
    assert exchange.next() == b"2"
    assert world.Session() is held
    exchange.read()
    assert world.Session() is held
    assert world.durable() == ["first"]
    held.commit()
    assert world.durable() == ["first", "not of the request"]


def test_the_thread_may_take_and_drop_sessions_of_its_own_between_the_chunks(holding_world: World) -> None:
    world = holding_world

    def view() -> Any:
        mine = world.Session()
        for number in range(4):
            assert world.Session() is mine
            yield b"%d" % number

    exchange = Exchange(serve(world, view))
    other = world.Session()
    assert exchange.next() == b"0"
    assert world.Session() is other
    world.Session.remove()
    assert exchange.next() == b"1"
    assert not world.Session.registry.has()
    another = world.Session()
    assert exchange.read() == b"23"
    assert world.Session() is another


def test_a_session_that_was_set_aside_comes_back_also_after_an_exception(holding_world: World) -> None:
    world = holding_world
    held = world.Session()

    def view() -> Any:
        world.Session()
        raise LookupError

    with pytest.raises(LookupError):
        request(serve(world, view))
    assert world.Session() is held


def test_the_environ_has_the_scope_and_the_session(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        scope = environ["sa_wsgi_session.scope"]
        assert isinstance(scope, SessionScope)
        assert scope is current_scope() is current_scope(world.Session)
        assert environ["sa_wsgi_session.session"] is world.Session
        assert scope.session is world.Session()
        assert scope.attempt == 1
        assert scope.commit_at == "start"
        return [b"seen"]

    assert request(SessionMiddleware(app, world.Session)).content == b"seen"


def test_the_prefix_of_the_environ_keys_can_be_chosen(world: World) -> None:
    environ = make_environ()
    exchange = Exchange(serve(world, lambda: [b""], environ_key="warehouse.db"), environ)
    exchange.read()
    assert environ["warehouse.db.session"] is world.Session
    assert isinstance(environ["warehouse.db.scope"], SessionScope)
    assert not [key for key in environ if key.startswith("sa_wsgi_session")]


def test_the_middleware_shows_the_scoped_session_that_it_was_given(world: World) -> None:
    assert serve(world, lambda: [b""]).session is world.Session


def test_of_a_sessionmaker_the_middleware_makes_a_contextual_session(world: World) -> None:
    Maker = sessionmaker(world.engine)
    views: list[Any] = []
    app = SessionMiddleware(respond(lambda: [views.pop()()]), Maker)

    def view() -> bytes:
        app.session.add(Note(text="kept"))
        assert current_scope(Maker).session is app.session()
        return b"done"

    views.append(view)
    assert isinstance(app.session, scoped_session)
    assert request(app).content == b"done"
    assert world.durable() == ["kept"]
    with pytest.raises(NoActiveScope):
        app.session()


def test_after_the_request_its_scope_says_that_it_has_ended(world: World) -> None:
    environ = make_environ()
    Exchange(serve(world, lambda: [b""]), environ).read()
    scope = environ["sa_wsgi_session.scope"]
    with pytest.raises(NoActiveScope, match="ended"):
        scope.session  # noqa: B018
    with pytest.raises(NoActiveScope, match="ended"):
        scope.doom("too late")
    with pytest.raises(NoActiveScope, match="of GET / was used after that unit of work had ended"):
        scope.use_primary()


def test_between_the_chunks_the_scope_gives_no_session_away(world: World) -> None:
    def view() -> Any:
        write(world, "a")
        yield b"1"

    exchange = Exchange(serve(world, view))
    with pytest.raises(NoActiveScope, match="not running here"):
        exchange.environ["sa_wsgi_session.scope"].session  # noqa: B018
    exchange.read()


# -- decide: commit or roll back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["list", "stream"])
@pytest.mark.parametrize(
    ("status", "kept"),
    [
        ("200 OK", True),
        ("204 No Content", True),
        ("299 Fine", True),
        ("302 Found", True),
        ("304 Not Modified", True),
        ("199 Something", True),
        ("400 Bad Request", False),
        ("404 Not Found", False),
        ("500 Internal Server Error", False),
        ("999 Unheard Of", False),
    ],
)
def test_the_status_decides_whether_the_request_is_committed(world: World, status: str, kept: bool, body: str) -> None:
    def view() -> Any:
        write(world, "a note")
        return [b"x"] if body == "list" else iter([b"x"])

    assert request(serve(world, view, status)).status == status
    assert world.durable() == (["a note"] if kept else [])


def test_what_was_never_flushed_is_committed_as_well(world: World) -> None:
    def view() -> Any:
        add(world, "pending")
        return [b""]

    request(serve(world, view))
    assert world.durable() == ["pending"]


@pytest.mark.parametrize(
    ("status", "veto"),
    [("100 Go On", False), ("200 OK", False), ("302 Found", False), ("404 ?", True), ("500 !", True)],
)
def test_the_default_veto_spares_what_is_no_error(status: str, veto: bool) -> None:
    assert default_commit_veto({}, status, []) is veto


def test_a_veto_of_ones_own_is_asked_with_environ_status_and_headers(world: World) -> None:
    asked: list[Any] = []

    def veto(environ: Any, status: str, headers: Any) -> Any:
        asked.append((environ, status, headers))
        return None

    environ = make_environ()

    def view() -> Any:
        add(world, "kept against the custom")
        return [b""]

    Exchange(serve(world, view, "500 Oops", commit_veto=veto), environ).read()
    assert asked == [(environ, "500 Oops", PLAIN)]
    assert asked[0][0] is environ
    assert world.durable() == ["kept against the custom"]


def test_anything_true_that_a_veto_returns_rolls_back(world: World) -> None:
    def view() -> Any:
        write(world, "vetoed")
        return [b""]

    assert request(serve(world, view, commit_veto=lambda *asked: "because")).status == "200 OK"
    assert world.durable() == []


def test_a_doomed_request_answers_its_success_and_keeps_nothing(world: World) -> None:
    def view() -> Any:
        write(world, "dry run")
        current_scope().doom("a dry run")
        return [b"would work"]

    exchange = request(serve(world, view))
    assert (exchange.status, exchange.content) == ("200 OK", b"would work")
    assert world.durable() == []


def test_a_request_for_which_the_hook_is_false_passes_untouched(world: World) -> None:
    body = [b"untouched"]
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        seen.append((dict(environ), start_response))
        with pytest.raises(NoActiveScope):
            current_scope()
        start_response("200 OK", PLAIN)
        return body

    asked: list[Any] = []

    def hook(environ: Any) -> Any:
        asked.append(environ)
        return environ["PATH_INFO"] != "/static"

    middleware = SessionMiddleware(app, world.Session, activate_hook=hook)
    environ = make_environ("/static")
    before = dict(environ)

    def start_response(status: str, headers: Any) -> None: ...

    assert middleware(environ, start_response) is body  # type: ignore[arg-type]
    assert environ == before
    assert seen == [(before, start_response)]
    assert asked == [environ]
    assert asked[0] is environ


def test_a_request_for_which_the_hook_is_true_has_its_session(world: World) -> None:
    def view() -> Any:
        add(world, "kept")
        return [b""]

    request(serve(world, view, activate_hook=lambda environ: "yes"))
    assert world.durable() == ["kept"]


# -- settle: before the server learns the status ----------------------------------------------------------------------


@pytest.mark.parametrize("commit_at", ["start", "end"])
@pytest.mark.parametrize("make_body", [lambda: [b"x"], lambda: (b"x",)], ids=["list", "tuple"])
def test_a_success_is_durable_before_the_server_learns_of_it(any_world: World, commit_at: str, make_body: Any) -> None:
    def view() -> Any:
        add(any_world, "kept")
        return make_body()

    durable: list[Any] = []
    app = serve(any_world, view, commit_at=commit_at)
    Exchange(app, on_start=lambda status: durable.append((status, any_world.durable()))).read()
    assert durable == [("200 OK", ["kept"])]


def test_the_success_of_a_stream_is_durable_before_the_server_learns_of_it(any_world: World) -> None:
    def view() -> Any:
        add(any_world, "kept")
        return iter([b"x"])

    durable: list[Any] = []
    Exchange(serve(any_world, view), on_start=lambda status: durable.append((status, any_world.durable()))).read()
    assert durable == [("200 OK", ["kept"])]


def test_the_success_of_a_generator_application_is_durable_before_the_server_learns_of_it(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        add(world, "before the status")
        start_response("200 OK", PLAIN)
        add(world, "before the first chunk")
        yield b"x"

    durable: list[Any] = []
    middleware = SessionMiddleware(app, world.Session)
    Exchange(middleware, on_start=lambda status: durable.append(world.durable())).read()
    assert durable == [["before the first chunk", "before the status"]]


def test_a_status_is_told_to_the_server_once_with_its_headers(world: World) -> None:
    exchange = request(serve(world, lambda: [b"x"], "201 Created"))
    assert exchange.statuses == ["201 Created"]
    assert exchange.headers == PLAIN


@pytest.mark.parametrize("body", ["list", "stream"])
def test_a_commit_that_fails_reaches_the_server_before_any_status(any_world: World, body: str) -> None:
    any_world.insert("taken")

    def view() -> Any:
        add(any_world, "taken")
        return [b"x"] if body == "list" else iter([b"x"])

    told: list[str] = []
    with pytest.raises(sa.exc.IntegrityError):
        Exchange(serve(any_world, view), on_start=told.append)
    assert told == []
    assert any_world.checked_out == 0
    assert any_world.durable() == ["taken"]


# -- start_response and write() ---------------------------------------------------------------------------------------


def handle(app: Any, session: Any = None) -> SessionMiddleware:
    """*app* in a middleware whose session has no database."""
    return SessionMiddleware(app, sessionmaker() if session is None else session)


def test_a_status_that_was_none_and_was_swallowed_is_the_error_and_not_the_lack_of_one() -> None:
    def app(environ: Any, start_response: Any) -> Any:
        with suppress(ValueError):
            start_response("nonsense", PLAIN)
        return [b"all is well"]

    with pytest.raises(ValueError, match="'nonsense'"):
        Exchange(handle(app))


def test_a_failure_of_write_that_was_swallowed_is_no_error_page_either() -> None:
    def app(environ: Any, start_response: Any) -> Any:
        send = start_response("500 Oops", PLAIN)
        with suppress(TypeError):
            send("text")
        return [b"an error page"]

    with pytest.raises(TypeError, match=r"write\(\).*type str"):
        Exchange(handle(app))


def test_of_a_status_without_end_the_first_hundred_characters_are_told() -> None:
    with pytest.raises(ValueError, match=f"the status '{'x' * 100}': PEP 3333"):
        Exchange(handle(respond(lambda: [b"x"], "x" * 1000)))


def test_nobody_may_write_while_the_callbacks_of_a_response_run_that_has_not_begun() -> None:
    called: list[str] = []

    def app(environ: Any, start_response: Any) -> Any:
        send = start_response("200 OK", PLAIN)

        def callback() -> None:
            with pytest.raises(RuntimeError, match="before the application had returned, but outside of its call"):
                send(b"too early")
            called.append("called")

        current_scope().on_commit(callback)
        return iter([b"x"])

    exchange = request(handle(app))
    assert called == ["called"]
    assert (exchange.written, exchange.content) == ([], b"x")


@pytest.mark.parametrize("registry", REGISTRIES)
def test_a_session_scope_in_which_the_application_writes_goes_on_after_it(registry: str) -> None:
    session = make_session(registry, sessionmaker())
    seen: list[bool] = []

    def app(environ: Any, start_response: Any) -> Any:
        send = start_response("200 OK", PLAIN)
        with session_scope(session, propagation="requires_new") as mine:
            inner = current_scope()
            for _ in range(2):
                send(b"x")
                seen.append(current_scope() is inner and session() is mine)
        return []

    assert (
        Exchange(handle(app, session), on_start=lambda status: seen.append(not is_in_a_scope())).written == [b"x"] * 2
    )
    assert seen == [True] * 3
    assert not session.registry.has()


@contextmanager
def without_the_garbage_collector() -> Iterator[None]:
    """Which would find a cycle in the end, but not before a while."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Failure(Exception):
    """One to which there may be weak references."""


@pytest.mark.parametrize("answered", [True, False], ids=["answered", "swallowed"])
def test_a_failure_that_the_application_has_met_is_kept_by_nobody(answered: bool) -> None:
    failures: list[Any] = []
    statuses: list[str] = []

    def veto(environ: Any, status: str, headers: Any) -> bool:
        if status == "200 OK":
            raise Failure
        return True

    def app(environ: Any, start_response: Any) -> Any:
        send = start_response("200 OK", PLAIN)
        try:
            send(b"x")
        except Failure as error:
            failures.append(weakref.ref(error))
            if answered:
                start_response("500 Oops", PLAIN, sys.exc_info())
        return [b"an error page"]

    def server(environ: Any, start_response: Any) -> None:
        with suppress(Failure):
            SessionMiddleware(app, sessionmaker(), commit_veto=veto)(environ, start_response)

    with without_the_garbage_collector():
        server(make_environ(), lambda status, headers, exc_info=None: statuses.append(status))
        assert [failure() for failure in failures] == [None]
    assert statuses == (["500 Oops"] if answered else [])


def test_a_failure_in_the_middle_of_the_body_is_kept_by_nobody() -> None:
    def fail(data: bytes) -> Any:
        raise Failure

    def refuse(status: str, headers: Any, exc_info: Any = None) -> Any:
        try:
            if exc_info is not None:
                raise exc_info[1]
        finally:
            exc_info = None  # as PEP 3333 demands it of a server
        return fail

    def app(environ: Any, start_response: Any) -> Any:
        send = start_response("200 OK", PLAIN)
        yield b"1"
        try:
            send(b"2")
        except Failure as error:
            failures.append(weakref.ref(error))
        yield b"3"
        try:
            try:
                raise Failure
            except Failure as error:
                failures.append(weakref.ref(error))
                start_response("500 Oops", PLAIN, (Failure, error, error.__traceback__))
        except Failure:
            pass
        yield b"4"

    failures: list[Any] = []
    with without_the_garbage_collector():
        body: Any = handle(app)(make_environ(), refuse)
        assert list(body) == [b"1", b"3", b"4"]
        body.close()
        assert [failure() for failure in failures] == [None, None]


# -- hand on: the three kinds of body ---------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [[b"a", b"b"], (b"a", b"b"), [], (), [bytearray(b"a")]], ids=repr)
def test_a_list_or_a_tuple_is_handed_on_as_the_very_same_object(world: World, body: Any) -> None:
    def view() -> Any:
        write(world, "kept")
        return body

    exchange = Exchange(serve(world, view))
    assert exchange.body is body
    assert world.checked_out == 0


@pytest.mark.parametrize("status", ["200 OK", "500 Oops"])
def test_with_a_list_the_session_is_gone_before_the_server_learns_the_status(world: World, status: str) -> None:
    def view() -> Any:
        write(world, "a note")
        return [b"x"]

    seen: list[Any] = []

    def on_start(status: str) -> None:
        with pytest.raises(NoActiveScope):
            current_scope()
        seen.append((world.checked_out, world.Session.registry.has()))

    Exchange(serve(world, view, status), on_start=on_start)
    assert seen == [(0, False)]


def test_a_list_with_a_close_of_its_own_is_closed_like_any_other_body(world: World) -> None:
    class Chunks(list):  # type: ignore[type-arg]
        def close(self) -> None:
            write(world, "by close")

    assert request(serve(world, lambda: Chunks([b"a", b"b"]))).content == b"ab"
    assert world.durable() == ["by close"]


def file_wrapper_function(file: Any, block_size: int = 8192) -> Any:
    """A ``wsgi.file_wrapper`` that is a function, as some servers have it."""
    return FileWrapper(file, block_size)


@pytest.mark.parametrize(
    "wrapper",
    [FileWrapper, file_wrapper_function, lambda file, block_size=0: file],
    ids=["a class", "a function", "a function that returns the file itself"],
)
def test_what_the_servers_file_wrapper_made_is_handed_on_untouched(world: World, wrapper: Any) -> None:
    made: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        write(world, "a download")
        start_response("200 OK", PLAIN)
        made.append(environ["wsgi.file_wrapper"](io.BytesIO(b"the file"), 4))
        return made[0]

    durable: list[Any] = []
    exchange = Exchange(
        SessionMiddleware(app, world.Session),
        make_environ() | {"wsgi.file_wrapper": wrapper},
        on_start=lambda status: durable.append((world.durable(), world.checked_out)),
    )
    assert exchange.body is made[0]
    assert durable == [(["a download"], 0)]
    assert exchange.read() == b"the file"


@pytest.mark.parametrize("wrapper", [FileWrapper, file_wrapper_function], ids=["a class", "a function"])
def test_a_body_around_what_the_file_wrapper_made_is_streamed(world: World, wrapper: Any) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        file = environ["wsgi.file_wrapper"](io.BytesIO(b"the file"))

        def body() -> Any:
            yield from file
            add(world, "downloaded")

        return body()

    environ = make_environ() | {"wsgi.file_wrapper": wrapper}
    assert Exchange(SessionMiddleware(app, world.Session), environ).read() == b"the file"
    assert world.durable() == ["downloaded"]


@pytest.mark.parametrize("wrapper", [FileWrapper, file_wrapper_function], ids=["a class", "a function"])
def test_each_file_has_a_wrapper_of_its_own(wrapper: Any) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        files = [environ["wsgi.file_wrapper"](io.BytesIO(content)) for content in (b"unused", b"the file")]
        return files[1]

    environ = make_environ() | {"wsgi.file_wrapper": wrapper}
    assert Exchange(handle(app), environ).read() == b"the file"


@pytest.mark.parametrize("failing", ["the veto", "the server"])
def test_a_file_that_reaches_no_server_is_closed_once(failing: str) -> None:
    """By who else: the server has not got it."""
    closed: list[str] = []

    class File:
        def read(self, size: int) -> bytes:
            return b""

        def close(self) -> None:
            closed.append("closed")

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        return environ["wsgi.file_wrapper"](File())

    def fail_if(it: str) -> Callable[..., bool]:
        def fail(*args: Any) -> bool:
            if it == failing:
                raise LookupError
            return False

        return fail

    middleware = SessionMiddleware(app, sessionmaker(), commit_veto=fail_if("the veto"))
    with pytest.raises(LookupError):
        Exchange(middleware, make_environ() | {"wsgi.file_wrapper": FileWrapper}, on_start=fail_if("the server"))
    assert closed == ["closed"]


def test_a_file_wrapper_of_the_applications_own_is_streamed(world: World) -> None:
    class Journal(FileWrapper):
        def __next__(self) -> bytes:
            write(world, f"read at {self.filelike.tell()}")
            return super().__next__()

    app = serve(world, lambda: Journal(io.BytesIO(b"the file"), 4))
    exchange = Exchange(app, make_environ() | {"wsgi.file_wrapper": FileWrapper})
    assert exchange.read() == b"the file"
    assert world.durable() == ["read at 0", "read at 4", "read at 8"]


def test_a_file_wrapper_is_not_asked_for_where_the_server_has_none(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        return [str("wsgi.file_wrapper" in environ).encode()]

    assert request(SessionMiddleware(app, world.Session)).content == b"False"


def test_a_file_wrapper_that_is_none_stays_none(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        return [repr(environ["wsgi.file_wrapper"]).encode()]

    exchange = Exchange(SessionMiddleware(app, world.Session), make_environ() | {"wsgi.file_wrapper": None})
    assert exchange.read() == b"None"


# -- stream -----------------------------------------------------------------------------------------------------------


def test_a_body_is_streamed_and_not_collected(world: World) -> None:
    produced: list[int] = []

    def view() -> Any:
        for number in range(3):
            produced.append(number)
            yield b"%d" % number

    exchange = Exchange(serve(world, view))
    progress = []
    for _ in range(3):
        exchange.next()
        progress.append(len(produced))
    assert progress == [1, 2, 3]
    assert exchange.read() == b""


def test_a_generator_application_loses_no_chunk_and_doubles_none(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        yield b""
        yield b"1"
        yield b"2"

    exchange = Exchange(SessionMiddleware(app, world.Session))
    assert exchange.status == "200 OK"
    assert [exchange.next() for _ in range(3)] == [b"", b"1", b"2"]
    with pytest.raises(StopIteration):
        exchange.next()
    exchange.close()


def test_a_generator_application_may_have_no_body_at_all(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write(world, "kept")
        start_response("204 No Content", [])
        yield from ()

    exchange = request(SessionMiddleware(app, world.Session))
    assert (exchange.status, exchange.content) == ("204 No Content", b"")
    assert world.durable() == ["kept"]


def test_of_a_generator_application_only_the_first_chunk_is_pulled_ahead(world: World) -> None:
    produced: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        for number in range(3):
            produced.append(number)
            yield b"%d" % number

    exchange = Exchange(SessionMiddleware(app, world.Session))
    assert produced == [0]
    assert exchange.read() == b"012"


def test_nothing_is_pulled_ahead_where_the_status_is_known(world: World) -> None:
    produced: list[int] = []

    def view() -> Any:
        produced.append(0)
        yield b"0"

    exchange = Exchange(serve(world, view))
    assert produced == []
    exchange.read()


class OldSequence:
    """An iterable by the protocol of sequences."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = chunks

    def __getitem__(self, index: int) -> bytes:
        return self._chunks[index]


class OnlyNext:
    """What ``for`` accepts from ``__iter__``, though it is no iterable itself."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def __next__(self) -> bytes:
        return next(self._chunks)


class IterableOfOnlyNext:
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Any:
        return OnlyNext(self._chunks)


@pytest.mark.parametrize(
    "make_body",
    [
        lambda: OldSequence(b"a", b"b"),
        lambda: Body(OldSequence(b"a", b"b")),
        lambda: IterableOfOnlyNext(iter([b"a", b"b"])),
        lambda: deque([b"a", b"b"]),
        lambda: {b"a": 1, b"b": 2},
        lambda: filter(None, [b"a", b"b"]),
    ],
    ids=["__getitem__", "with close", "only __next__", "deque", "dict", "filter"],
)
def test_any_iterable_may_be_a_body(world: World, make_body: Any) -> None:
    assert request(serve(world, make_body)).content == b"ab"


def test_an_iterator_without_iter_may_set_the_status_with_its_first_chunk(world: World) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        def chunks() -> Iterator[bytes]:
            start_response("200 OK", PLAIN)
            yield b"a"
            yield b"b"

        return IterableOfOnlyNext(chunks())

    assert request(SessionMiddleware(app, world.Session)).content == b"ab"


def test_the_session_is_bound_exactly_while_code_of_the_application_runs(world: World) -> None:
    events: list[Any] = []

    def bound(where: str) -> None:
        try:
            current_scope()
        except NoActiveScope:
            events.append((where, False, world.Session.registry.has()))
        else:
            events.append((where, True, world.Session.registry.has()))

    def stream() -> Any:
        bound("chunk 1")
        yield b"1"
        bound("chunk 2")
        yield b"2"
        bound("the end")

    class Streamed:
        def __iter__(self) -> Any:
            bound("iter")
            return stream()

        def close(self) -> None:
            bound("close")

    def view() -> Any:
        world.Session()
        bound("view")
        return Streamed()

    bound("before")
    exchange = Exchange(serve(world, view), on_start=lambda status: bound("start_response"))
    bound("called")
    for _ in exchange.body:
        bound("between")
    bound("read")
    exchange.close()
    bound("closed")
    inside = ["view", "iter", "chunk 1", "chunk 2", "the end", "close"]
    assert events == [(where, where in inside, where in inside) for where, *_ in events]
    assert [where for where, *_ in events] == [
        "before", "view", "iter", "start_response", "called", "chunk 1", "between", "chunk 2", "between", "the end",
        "read", "close", "closed",
    ]  # fmt: skip


def test_two_streams_interleaved_on_one_thread_never_meet(world: World) -> None:
    sessions: dict[str, set[Any]] = {"a": set(), "b": set()}

    def view(name: str) -> Any:
        for number in range(4):
            sessions[name].add(world.Session())
            assert world.Session.info.setdefault("owner", name) == name
            yield b"%d" % number
        if name == "a":
            write(world, "by a")
        yield b"."

    a = Exchange(serve(world, lambda: view("a")))
    b = Exchange(serve(world, lambda: view("b")))
    for _ in range(4):
        assert a.next() == b.next()
    assert (a.next(), b.next()) == (b".", b".")
    b.close()
    assert a.read() == b""
    assert [len(owned) for owned in sessions.values()] == [1, 1]
    assert not sessions["a"] & sessions["b"]
    assert world.durable() == ["by a"]


def test_of_interleaved_streams_each_commits_and_rolls_back_for_itself(postgresql_world: World) -> None:
    world = postgresql_world

    def stream(name: str) -> Exchange:
        def body() -> Any:
            yield b"1"
            write(world, name)
            yield b"2"
            yield b"3"

        return Exchange(serve(world, body))

    kept, cut = stream("kept"), stream("cut")
    for _ in range(2):
        kept.next()
        cut.next()
    assert world.checked_out == 2
    cut.close()
    assert kept.read() == b"3"
    assert world.durable() == ["kept"]


def test_a_body_may_hop_from_thread_to_thread(world: World) -> None:
    sessions: list[Any] = []
    idents: set[int] = set()
    keep: list[Any] = []

    def view() -> Any:
        for number in range(5):
            sessions.append(world.Session())
            idents.add(threading.get_ident())
            keep.append(threading.current_thread())
            write(world, f"chunk {number}")
            yield b"%d" % number

    def close() -> None:
        sessions.append(world.Session())
        keep.append(threading.current_thread())
        write(world, "close")

    exchange = run_in_thread(lambda: Exchange(serve(world, lambda: Body(view(), close))))
    content = b"".join(run_in_thread(exchange.next) for _ in range(5))
    assert world.checked_out == 1
    with pytest.raises(StopIteration):
        run_in_thread(exchange.next)
    run_in_thread(exchange.close)
    assert content == b"01234"
    assert len(set(map(id, sessions))) == 1
    assert len(set(map(id, keep))) == 6
    assert world.durable() == [*(f"chunk {number}" for number in range(5)), "close"]


def test_a_body_keeps_its_session_where_a_new_thread_has_the_identifier_of_one_that_has_ended() -> None:
    session = scoped_session(sessionmaker())
    seen: list[Session] = []

    def view() -> Any:
        for _ in range(8):
            seen.append(session())
            yield b"%d" % get_ident()

    # One context, and one thread after the other: their identifiers are given out again.
    context = contextvars.copy_context()
    exchange = context.run(Exchange, handle(respond(view), session))
    threads = [run_in_thread(partial(context.run, exchange.next)) for _ in range(8)]
    assert len(set(threads)) < 8
    assert len(set(map(id, seen))) == 1
    exchange.close()


def test_a_session_that_was_set_aside_comes_back_where_another_thread_has_closed_the_body() -> None:
    session = scoped_session(sessionmaker())
    mine = session()

    called: list[int] = []

    def close_in_thread(number: int) -> bytes:
        called.append(number)
        assert session() is not mine
        run_in_thread(exchange.close)
        return b"too late"

    exchange = Exchange(handle(respond(lambda: map(close_in_thread, range(2))), session))
    with pytest.raises(StopIteration):
        exchange.next()
    # Nobody wants another chunk.
    assert called == [0]
    assert session() is mine
    session.remove()


@pytest.mark.parametrize("registry", ["thread-local", "contextual"])
def test_a_body_may_take_its_context_along_to_another_thread(registry: str) -> None:
    session = make_session(registry, sessionmaker())

    def view() -> Any:
        mine = session()
        while True:
            yield str(session() is current_scope().session is mine).encode()

    context = contextvars.copy_context()
    exchange = context.run(Exchange, handle(respond(view), session))
    assert [context.run(exchange.next) for _ in range(2)] == [b"True"] * 2
    assert run_in_thread(partial(context.run, exchange.next)) == b"True"
    assert [context.run(exchange.next) for _ in range(2)] == [b"True"] * 2
    context.run(exchange.close)


@pytest.mark.parametrize("registry", REGISTRIES)
@pytest.mark.parametrize("read", [1, 2])
def test_a_server_that_reads_on_after_it_has_closed_the_body_gets_nothing(registry: str, read: int) -> None:
    """Also where the first chunk was pulled before the response could begin."""
    called: list[int] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        def chunk(number: int) -> bytes:
            called.append(number)
            if number == 0:
                start_response("200 OK", PLAIN)
            return b"chunk"

        return map(chunk, range(9))

    exchange = Exchange(handle(app, make_session(registry, sessionmaker())))
    for _ in range(read):
        exchange.next()
    exchange.close()
    with pytest.raises(StopIteration):
        exchange.next()
    assert called == list(range(read))


@pytest.mark.parametrize("registry", ["thread-local", "contextual"])
def test_a_body_may_be_closed_while_another_thread_still_waits_for_its_next_chunk(
    request: pytest.FixtureRequest, worlds: Worlds, registry: str
) -> None:
    with worlds.use(request.getfixturevalue, "sqlite", registry) as world:
        at_work, closed = threading.Event(), threading.Event()

        def chunks() -> Any:
            yield b"1"
            write(world, "too late")
            at_work.set()
            assert closed.wait(30)
            yield b"2"

        body = Body(chunks())
        exchange = Exchange(serve(world, lambda: body))
        assert exchange.next() == b"1"
        ended: list[bool] = []

        def read_on() -> None:
            with pytest.raises(StopIteration):
                exchange.next()
            ended.append(True)

        thread = threading.Thread(target=read_on)
        thread.start()
        assert at_work.wait(30)
        exchange.close()
        closed.set()
        thread.join()
        assert ended == [True]
        assert body.closed == 1
        assert world.checked_out == 0
        assert world.durable() == []


@pytest.mark.parametrize("registry", REGISTRIES)
def test_a_session_scope_that_a_body_leaves_in_its_close_is_the_innermost_one_there(registry: str) -> None:
    session = make_session(registry, sessionmaker())
    seen: list[bool] = []

    class Chunks:
        def __init__(self) -> None:
            self._block = session_scope(session, propagation="requires_new")
            self._rest = [b"1", b"2"]

        def __iter__(self) -> Any:
            self._mine = self._block.__enter__()
            self._inner = current_scope()
            return self

        def _look(self) -> None:
            seen.append(current_scope() is self._inner and session() is self._mine)

        def __next__(self) -> bytes:
            self._look()
            if not self._rest:
                raise StopIteration
            return self._rest.pop()

        def close(self) -> None:
            self._look()
            self._block.__exit__(None, None, None)

    exchange = Exchange(handle(respond(Chunks), session))
    for end in ([], [], [StopIteration]):
        assert not is_in_a_scope()
        with pytest.raises(StopIteration) if end else nullcontext():
            exchange.next()
    assert not is_in_a_scope()
    assert not session.registry.has()
    exchange.close()
    assert seen == [True] * 4
    assert not is_in_a_scope()


@pytest.mark.parametrize("registry", REGISTRIES)
@pytest.mark.parametrize("started", [True, False], ids=["a generator", "a generator application"])
def test_a_body_that_was_closed_has_no_chunk(registry: str, started: bool) -> None:
    session = make_session(registry, sessionmaker())
    asked: list[str] = []

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        asked.append("first")
        yield b"first"
        asked.append("second")
        yield b"second"

    def start(environ: Any, start_response: Any) -> Any:
        body = app(environ, lambda *_: None)
        start_response("200 OK", PLAIN)
        return body

    exchange = Exchange(handle(start if started else app, session))
    exchange.close()
    assert list(exchange.body) == []
    assert asked == ([] if started else ["first"])
    assert not is_in_a_scope()


def test_callbacks_of_a_body_whose_commit_fails_run_before_the_server_learns_of_it() -> None:
    called: list[str] = []
    session = contextual_session(sessionmaker())

    def chunks() -> Any:
        yield b"1"
        session.add(Note(text="lost"))
        current_scope().on_rollback(lambda: called.append("on_rollback"))

    exchange = Exchange(handle(respond(chunks), session))
    exchange.next()
    with pytest.raises(UnboundExecutionError):
        exchange.next()
    assert called == ["on_rollback"]
    exchange.close()
    assert called == ["on_rollback"]


@pytest.mark.parametrize("propagation", ["required", "nested", "requires_new"])
def test_a_body_may_keep_a_session_scope_open_over_its_chunks(any_world: World, propagation: Any) -> None:
    def chunks() -> Any:
        with session_scope(any_world.Session, propagation=propagation) as session:
            session.add(Note(text="kept"))
            session.flush()
            for number in range(3):
                assert any_world.Session() is session
                assert current_scope().session is session
                yield b"%d" % number
        assert (any_world.Session() is session) == (propagation != "requires_new")

    def view() -> Any:
        any_world.Session()
        return chunks()

    exchange = Exchange(serve(any_world, view))
    for number in range(3):
        assert exchange.next() == b"%d" % number
        with pytest.raises(NoActiveScope):
            current_scope()
        assert not any_world.Session.registry.has()
    exchange.read()
    assert any_world.durable() == ["kept"]


@pytest.mark.parametrize("propagation", ["nested", "requires_new"])
def test_a_session_scope_that_a_body_has_open_when_the_client_goes_away_is_rolled_back(
    any_world: World, propagation: Any
) -> None:
    def chunks() -> Any:
        with session_scope(any_world.Session, propagation=propagation) as session:
            session.add(Note(text="lost"))
            session.flush()
            yield b"1"
            yield b"2"

    exchange = Exchange(serve(any_world, chunks))
    exchange.next()
    exchange.close()
    assert any_world.checked_out == 0
    assert any_world.durable() == []


@pytest.mark.parametrize("propagation", ["nested", "requires_new"])
def test_a_generator_application_may_keep_a_session_scope_open_over_its_first_chunk(
    world: World, propagation: Any
) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        with session_scope(world.Session, propagation=propagation) as session:
            inner = current_scope()
            start_response("200 OK", PLAIN)
            for number in range(2):
                yield b"%d" % number
                assert world.Session() is session
                assert current_scope() is inner

    exchange = Exchange(SessionMiddleware(app, world.Session))
    for number in range(2):
        assert not is_in_a_scope()
        assert not world.Session.registry.has()
        assert exchange.next() == b"%d" % number
    assert exchange.read() == b""


@pytest.mark.parametrize("by_the_server", [False, True])
@pytest.mark.parametrize("registry", REGISTRIES)
def test_a_session_scope_over_a_first_chunk_that_is_never_sent_ends_as_the_innermost_one(
    registry: str, by_the_server: bool
) -> None:
    session = make_session(registry, sessionmaker())
    seen: list[bool] = []

    def app(environ: Any, start_response: Any) -> Any:
        with session_scope(session, propagation="requires_new") as mine:
            inner = current_scope()
            start_response("200 OK", PLAIN)
            try:
                yield b"never sent"
            finally:
                seen.append(current_scope() is inner and session() is mine)

    def fail(*_: Any) -> Any:
        raise LookupError

    with pytest.raises(LookupError):
        if by_the_server:
            SessionMiddleware(app, session)(make_environ(), fail)
        else:
            Exchange(SessionMiddleware(app, session, commit_veto=fail))
    assert seen == [True]
    assert not is_in_a_scope()
    assert not session.registry.has()


@pytest.mark.parametrize("registry", REGISTRIES)
def test_a_body_that_reaches_no_server_is_closed_within_its_request(registry: str) -> None:
    session = make_session(registry, sessionmaker())
    scopes: list[SessionScope] = []

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        mine = session()

        def close() -> None:
            assert session() is mine
            scopes.append(current_scope())

        return Body([b"never sent"], close)

    def fail(status: str) -> None:
        raise LookupError

    environ = make_environ()
    with pytest.raises(LookupError):
        Exchange(handle(app, session), environ, on_start=fail)
    assert scopes == [environ["sa_wsgi_session.scope"]]
    assert not session.registry.has()


def test_a_body_may_be_read_in_another_context_each_time(world: World) -> None:
    def view() -> Any:
        mine = world.Session()
        for number in range(3):
            assert world.Session() is mine
            assert current_scope().session is mine
            yield b"%d" % number
        add(world, "kept")

    exchange = contextvars.copy_context().run(Exchange, serve(world, view))
    chunks = [contextvars.copy_context().run(exchange.next) for _ in range(3)]
    assert contextvars.copy_context().run(exchange.read) == b""
    assert chunks == [b"0", b"1", b"2"]
    assert world.durable() == ["kept"]


def test_streams_in_greenlets_of_one_thread_never_meet(request: pytest.FixtureRequest, worlds: Worlds) -> None:
    with worlds.use(request.getfixturevalue, "sqlite", "contextual") as world:
        sessions: dict[str, set[Any]] = {"a": set(), "b": set()}

        def view(name: str) -> Any:
            for _ in range(3):
                sessions[name].add(world.Session())
                others.switch()  # in the middle of the application's code, as gevent does
                sessions[name].add(world.Session())
                yield name.encode()

        others = greenlet.getcurrent()
        contents: list[bytes] = []

        def serve_one(name: str) -> None:
            contents.append(Exchange(serve(world, lambda: view(name))).read())

        workers = [greenlet.greenlet(partial(serve_one, name)) for name in "ab"]
        while workers:
            for worker in workers:
                worker.switch()
            workers = [worker for worker in workers if not worker.dead]
        assert contents == [b"aaa", b"bbb"]
        assert [len(owned) for owned in sessions.values()] == [1, 1]
        assert not sessions["a"] & sessions["b"]


def test_a_request_inside_a_request_has_its_own_transaction(any_world: World) -> None:
    def inner() -> Any:
        assert current_scope().session is any_world.Session()
        write(any_world, "inner")
        return [b"inner"]

    def outer() -> Any:
        before = any_world.Session()
        assert request(serve(any_world, inner)).content == b"inner"
        assert any_world.durable() == ["inner"]
        assert any_world.Session() is before
        write(any_world, "outer")
        return [b"outer"]

    request(serve(any_world, outer, "500 Oops"))
    assert any_world.durable() == ["inner"]


def test_a_request_inside_a_request_that_fails_leaves_the_outer_one_alone(world: World) -> None:
    def inner() -> Any:
        add(world, "inner")
        return [b"inner"]

    def outer() -> Any:
        add(world, "outer")
        request(serve(world, inner, "404 Not Found"))
        with suppress(LookupError):
            request(serve(world, lambda: os.environ["MISSING"]))
        return [b"outer"]

    request(serve(world, outer))
    assert world.durable() == ["outer"]


def test_a_stream_inside_the_chunks_of_another_has_its_own_session(world: World) -> None:
    def inner() -> Any:
        for number in range(3):
            assert world.Session.info.setdefault("owner", "inner") == "inner"
            yield b"%d" % number

    def outer() -> Any:
        world.Session.info["owner"] = "outer"
        exchange = Exchange(serve(world, inner))
        assert world.Session.info["owner"] == "outer"
        for _ in range(3):
            yield exchange.next()
            assert world.Session.info["owner"] == "outer"
            assert current_scope().session is world.Session()
        exchange.read()
        add(world, "by the outer one")

    assert request(serve(world, outer)).content == b"012"
    assert world.durable() == ["by the outer one"]


# -- the second unit of work: what the body changes -------------------------------------------------------------------


def streaming(world: World, *, fail: BaseException | None = None) -> Callable[[], Any]:
    """A view that writes, and a body that writes between its chunks."""

    def body() -> Any:
        yield b"1"
        write(world, "by the body")
        yield b"2"
        if fail is not None:
            raise fail
        yield b"3"

    def view() -> Any:
        write(world, "by the view")
        return body()

    return view


def test_what_the_body_changes_is_committed_when_it_has_been_read_to_its_end(any_world: World) -> None:
    exchange = Exchange(serve(any_world, streaming(any_world)))
    assert [exchange.next() for _ in range(3)] == [b"1", b"2", b"3"]
    assert any_world.durable() == ["by the view"]
    with pytest.raises(StopIteration):
        exchange.next()
    assert any_world.durable() == ["by the body", "by the view"]
    assert any_world.checked_out == 0
    exchange.close()


def test_what_the_body_changes_is_rolled_back_when_the_client_goes_away(any_world: World) -> None:
    exchange = Exchange(serve(any_world, streaming(any_world)))
    assert [exchange.next() for _ in range(2)] == [b"1", b"2"]
    exchange.close()
    assert any_world.durable() == ["by the view"]
    assert any_world.checked_out == 0


def test_what_the_body_changes_is_rolled_back_when_an_exception_leaves_it(any_world: World) -> None:
    failure = LookupError("in the body")
    exchange = Exchange(serve(any_world, streaming(any_world, fail=failure)))
    assert [exchange.next() for _ in range(2)] == [b"1", b"2"]
    with pytest.raises(LookupError) as raised:
        exchange.next()
    assert raised.value is failure
    assert any_world.checked_out == 0
    exchange.close()
    assert any_world.durable() == ["by the view"]


def test_what_the_body_changes_after_a_veto_is_rolled_back_too(world: World) -> None:
    def close() -> None:
        write(world, "by close")

    exchange = request(serve(world, lambda: Body(streaming(world)(), close), "404 Not Found"))
    assert exchange.content == b"123"
    assert world.durable() == []


def test_what_a_body_changes_that_dooms_its_request_is_rolled_back(world: World) -> None:
    def body() -> Any:
        yield b"1"
        write(world, "by the body")
        current_scope().doom("changed my mind")
        yield b"2"

    def view() -> Any:
        write(world, "by the view")
        return body()

    assert request(serve(world, view)).content == b"12"
    assert world.durable() == ["by the view"]


def test_a_body_that_is_doomed_in_the_view_keeps_nothing_either(world: World) -> None:
    def view() -> Any:
        current_scope().doom("a dry run")
        return streaming(world)()

    assert request(serve(world, view)).content == b"123"
    assert world.durable() == []


# -- close ------------------------------------------------------------------------------------------------------------


def test_what_close_changes_is_committed_after_a_body_that_was_read_to_its_end(any_world: World) -> None:
    body = Body([b"1", b"2"], lambda: write(any_world, "by close"))
    exchange = request(serve(any_world, lambda: body))
    assert exchange.content == b"12"
    assert any_world.durable() == ["by close"]


def test_what_close_changes_is_rolled_back_after_a_client_that_went_away(any_world: World) -> None:
    body = Body([b"1", b"2"], lambda: write(any_world, "by close"))
    exchange = Exchange(serve(any_world, lambda: body))
    exchange.next()
    exchange.close()
    assert body.closed == 1
    assert any_world.durable() == []


def test_what_close_changes_is_rolled_back_after_a_body_that_failed(world: World) -> None:
    def fail() -> Any:
        yield b"1"
        raise LookupError

    body = Body(fail(), lambda: write(world, "by close"))
    with pytest.raises(LookupError):
        request(serve(world, lambda: body))
    assert body.closed == 1
    assert world.durable() == []


def test_what_close_changes_is_rolled_back_when_it_dooms_the_request(world: World) -> None:
    def close() -> None:
        write(world, "by close")
        current_scope().doom("after all")

    request(serve(world, lambda: Body([b""], close)))
    assert world.durable() == []


@pytest.mark.parametrize("read", [0, 1, 2, 3])
def test_the_applications_close_is_called_exactly_once_however_far_the_body_was_read(world: World, read: int) -> None:
    body = Body([b"1", b"2"])
    exchange = Exchange(serve(world, lambda: body))
    for _ in range(read):
        with suppress(StopIteration):
            exchange.next()
    assert body.closed == 0
    exchange.close()
    assert body.closed == 1
    exchange.close()
    assert body.closed == 1


@pytest.mark.parametrize("status", ["200 OK", "500 Oops"])
def test_the_applications_close_may_use_the_objects_that_the_view_has_loaded(any_world: World, status: str) -> None:
    any_world.insert("a note")
    closed: list[str] = []

    def view() -> Any:
        note = any_world.Session.query(Note).one()
        return Body([b""], lambda: closed.append(note.text))

    request(serve(any_world, view, status))
    assert closed == ["a note"]


def test_the_warning_of_a_body_that_is_dropped_comes_from_the_package() -> None:
    """So that a filter may name its module."""
    dropped = [Exchange(handle(respond(lambda: iter([b"x"]))))]
    with pytest.warns(ResourceWarning, match="dropped without a call to its close") as warned:
        dropped.clear()
    assert [os.path.basename(warning.filename) for warning in warned] == ["_middleware.py"]


def test_a_closed_stream_yields_nothing_more(world: World) -> None:
    exchange = Exchange(serve(world, lambda: iter([b"1", b"2"])))
    exchange.next()
    exchange.close()
    with pytest.raises(StopIteration):
        exchange.next()


def test_a_server_that_never_iterates_still_ends_the_request(any_world: World) -> None:
    """As for a HEAD request."""

    def view() -> Any:
        write(any_world, "by the view")
        return body

    body = Body(iter([b"never sent"]))
    exchange = Exchange(serve(any_world, view), make_environ(method="HEAD"))
    exchange.close()
    assert body.closed == 1
    assert any_world.durable() == ["by the view"]
    assert any_world.checked_out == 0


# -- commit_at="start" ------------------------------------------------------------------------------------------------


NOTES = Note.__table__


def orm(session: Any) -> Any:
    return session.execute(sa.select(Note).order_by(Note.text)).scalars()


def orm_in_batches(session: Any) -> Any:
    return session.execute(sa.select(Note).order_by(Note.text).execution_options(yield_per=2)).scalars()


def core(session: Any) -> Any:
    return session.execute(sa.select(NOTES).order_by(NOTES.c.text))


def core_on_a_cursor_of_the_server(session: Any) -> Any:
    statement = sa.select(NOTES).order_by(NOTES.c.text)
    return session.execute(statement.execution_options(stream_results=True, max_row_buffer=2))


def query(session: Any) -> Any:
    return iter(session.query(Note).order_by(Note.text).yield_per(2))


def partitions(session: Any) -> Any:
    result = session.execute(sa.select(NOTES).order_by(NOTES.c.text).execution_options(stream_results=True))
    return itertools.chain.from_iterable(result.partitions(2))


def core_with_options(session: Any) -> Any:
    # With SQLAlchemy 1.4 that is another Connection.
    return session.connection().execution_options(any_option=1).execute(sa.select(NOTES).order_by(NOTES.c.text))


RESULTS = [orm, orm_in_batches, core, core_on_a_cursor_of_the_server, core_with_options, query, partitions]
TEXTS = [f"note {number}" for number in range(7)]
CSV = "\n".join(TEXTS).encode()


def export(world: World, select: Callable[[Any], Any], read_before: int = 0) -> Callable[[], Any]:
    """The usual CSV export: the view runs the query, the generator reads the rows."""

    def view() -> Any:
        rows = iter(select(world.Session()))
        read = [next(rows) for _ in range(read_before)]

        def lines() -> Any:
            for number, row in enumerate(itertools.chain(read, rows)):
                yield (b"\n" if number else b"") + row.text.encode()

        return lines()

    return view


@pytest.mark.parametrize("read_before", [0, 1, 3], ids=["unread", "begun", "half-read"])
@pytest.mark.parametrize("select", RESULTS)
def test_a_result_that_the_view_left_open_is_read_by_the_body(any_world: World, select: Any, read_before: int) -> None:
    if select in (query, partitions) and not read_before:
        read_before = 1  # generators of SQLAlchemy: before the first row they have sent no statement, or left it unread
    any_world.insert(*TEXTS)
    exchange = Exchange(serve(any_world, export(any_world, select, read_before)))
    if select is not orm or not read_before:  # with the first object SQLAlchemy has fetched the others
        assert any_world.checked_out == 1
    assert exchange.read() == CSV
    assert any_world.checked_out == 0


@pytest.mark.parametrize("select", RESULTS)
def test_a_result_that_is_still_open_when_the_client_goes_away_leaks_nothing(any_world: World, select: Any) -> None:
    any_world.insert(*TEXTS)
    exchange = Exchange(serve(any_world, export(any_world, select, 1)))
    exchange.next()
    exchange.next()
    exchange.close()
    assert any_world.checked_out == 0


@pytest.mark.parametrize("select", RESULTS)
def test_a_stream_that_reads_nothing_of_an_open_result_leaks_nothing(any_world: World, select: Any) -> None:
    any_world.insert(*TEXTS)

    def view() -> Any:
        rows = iter(select(any_world.Session()))
        next(rows)

        def body() -> Any:
            yield b"there are some" if rows else b""

        return body()

    assert request(serve(any_world, view)).content == b"there are some"
    assert any_world.checked_out == 0


@pytest.mark.parametrize("select", RESULTS)
def test_a_result_that_the_view_left_open_and_dropped_keeps_no_transaction(any_world: World, select: Any) -> None:
    any_world.insert(*TEXTS)

    def view() -> Any:
        add(any_world, "kept")
        next(iter(select(any_world.Session())))
        return iter([b"1", b"2"])

    exchange = Exchange(serve(any_world, view))
    assert any_world.checked_out == 0
    assert any_world.durable() == ["kept", *TEXTS]
    assert exchange.read() == b"12"


def test_a_result_that_was_read_by_a_list_body_leaks_nothing_where_it_was_left_open(any_world: World) -> None:
    any_world.insert(*TEXTS)
    left: list[Any] = []

    def view() -> Any:
        left.append(any_world.Session.execute(sa.select(Note.text)))
        return [next(left[0]).text.encode()]

    request(serve(any_world, view))
    assert any_world.checked_out == 0


@pytest.mark.parametrize(
    "read",
    [
        lambda result: result.all(),
        lambda result: list(result),
        lambda result: result.scalars().all(),
        lambda result: result.first(),
        lambda result: result.close(),
    ],
    ids=["all", "list", "scalars", "first", "close"],
)
def test_a_result_that_was_read_is_not_open_even_if_the_body_still_holds_it(any_world: World, read: Any) -> None:
    any_world.insert(*TEXTS)

    def view() -> Any:
        result = any_world.Session.execute(sa.select(NOTES))
        read(result)

        def body() -> Any:
            yield b"held" if result is not None else b""

        return body()

    exchange = Exchange(serve(any_world, view))
    idle = any_world.checked_out
    exchange.read()
    assert idle == 0


def test_the_result_of_a_change_is_not_open_even_if_the_body_still_holds_it(
    any_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    any_world.insert(*TEXTS)

    def view() -> Any:
        result = any_world.Session.execute(sa.delete(NOTES))

        def body() -> Any:
            yield b"%d" % result.rowcount

        return body()

    assert request(serve(any_world, view)).content == b"7"
    assert any_world.durable() == []
    assert caplog.records == []


def test_where_a_result_is_open_and_something_was_changed_the_promise_comes_first(
    any_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    any_world.insert(*TEXTS)

    def view() -> Any:
        add(any_world, "audited")
        return export(any_world, core, 1)()

    durable: list[Any] = []
    with caplog.at_level(logging.WARNING, "sa_wsgi_session"):
        exchange = Exchange(serve(any_world, view), on_start=lambda status: durable.append(any_world.durable()))
    assert durable == [["audited", *TEXTS]]
    assert any_world.checked_out == 0
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert 'commit_at = "end"' in record.getMessage()
    assert "GET /" in record.getMessage()
    with suppress(sa.exc.SQLAlchemyError):  # its rows are lost, as the warning says
        exchange.next()
        exchange.next()
    exchange.close()


def change_before_a_savepoint(session: Any) -> None:
    session.add(Note(text="new"))
    session.flush()
    with session.begin_nested():
        session.execute(sa.select(NOTES)).all()


CHANGES = {
    "pending": lambda session: session.add(Note(text="new")),
    "flushed": lambda session: (session.add(Note(text="new")), session.flush()),
    "many": lambda session: (session.add_all([Note(text="new"), Note(text="newer")]), session.flush()),
    "dirty": lambda session: setattr(session.query(Note).filter_by(text="old").one(), "text", "new"),
    "deleted": lambda session: session.delete(session.query(Note).filter_by(text="old").one()),
    "insert": lambda session: session.execute(sa.insert(Note).values(text="new")),
    "update": lambda session: session.execute(
        sa.update(Note).where(Note.text == "old").values(text="new"), execution_options={"synchronize_session": False}
    ),
    "text": lambda session: session.execute(sa.text("/* SELECT */ DELETE FROM note")),
    "driver": lambda session: session.connection().exec_driver_sql("DELETE FROM note"),
    "bulk": lambda session: session.bulk_insert_mappings(Note, [{"text": "new"}, {"text": "newer"}]),
    "before a savepoint": change_before_a_savepoint,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_was_changed_is_durable_before_the_first_byte_although_a_result_is_open(
    world: World, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.insert("old")

    def view() -> Any:
        CHANGES[change](world.Session())
        rows = world.Session.execute(sa.text("SELECT 1 UNION SELECT 2"))
        return (b"%d" % row[0] for row in rows)

    exchange = Exchange(serve(world, view))
    assert world.durable() != ["old"]
    assert world.checked_out == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    exchange.close()


READS = [
    "SELECT text FROM note",
    "select text from note;",
    "  ( SELECT text FROM note )",
    "WITH read AS (SELECT text FROM note) SELECT text FROM read",
    "SELECT text FROM note FOR UPDATE",
    "SELECT text FROM note FOR NO KEY UPDATE",
    "SELECT text AS \"insert\" FROM note WHERE text <> 'DELETE; it''s INTO'",
    "SELECT text FROM note -- UPDATE it; INSERT INTO it",
    "/* INSERT INTO */ SELECT text FROM note",
    f"SELECT text FROM note WHERE text <> '{'x' * 5_000}'",
    # The longest that is taken apart, 20,000 characters; and a longer one.
    "SELECT text FROM note WHERE text <> 'DELETE; it''s INTO ".ljust(19_999, "x") + "'",
    f"SELECT text FROM note WHERE text <> '{'x' * 200_000}'",
    "VALUES ('a note')",
    "TABLE note",
    "EXPLAIN DELETE FROM note",
    "SHOW search_path",
]


@pytest.mark.parametrize("statement", READS)
def test_what_only_reads_is_no_change_however_it_is_written(postgresql_world: World, statement: str) -> None:
    postgresql_world.insert("a note")

    def view() -> Any:
        rows = postgresql_world.Session.execute(sa.text(statement))
        return (str(row).encode() for row in rows)

    exchange = Exchange(serve(postgresql_world, view))
    assert postgresql_world.checked_out == 1
    assert exchange.read()


WRITES = [
    "WITH made AS (INSERT INTO note (text) VALUES ('new') RETURNING text) SELECT text FROM made",
    "WITH gone AS (DELETE FROM note RETURNING text) SELECT text FROM gone",
    "WITH done AS (UPDATE note SET text = 'new' RETURNING text) SELECT text FROM done",
    "INSERT INTO note (text) VALUES ('new') RETURNING text",
    "SELECT text INTO other FROM note",
    "EXPLAIN ANALYZE DELETE FROM note",
    "EXPLAIN (ANALYZE) DELETE FROM note",
    "DELETE FROM note; SELECT text FROM note",
    "SELECT text FROM note; DELETE FROM note",
    "DO $$ BEGIN DELETE FROM note; END $$",
    "SELECT $$'$$; DELETE FROM note; SELECT ''",
]


def held(rows: Any) -> Iterator[bytes]:
    """A body that has a result, of whatever kind, and another one that is open."""
    yield b"" if rows is None else b"held"


@pytest.mark.parametrize("statement", WRITES)
def test_what_writes_and_returns_rows_is_durable_before_the_first_byte(postgresql_world: World, statement: str) -> None:
    postgresql_world.insert("old")

    def view() -> Any:
        written = postgresql_world.Session.execute(sa.text(statement))
        return held((written, postgresql_world.Session.execute(sa.text("SELECT 1 UNION SELECT 2"))))

    exchange = Exchange(serve(postgresql_world, view))
    assert postgresql_world.checked_out == 0
    exchange.close()
    with postgresql_world.engine.begin() as connection:
        assert postgresql_world.durable() != ["old"] or sa.inspect(connection).has_table("other")
        connection.execute(sa.text("DROP TABLE IF EXISTS other"))


@pytest.mark.parametrize(("pragma", "open_after"), [("user_version", 1), ("user_version = 7", 0)])
def test_a_pragma_that_sets_is_a_change_and_one_that_asks_is_none(world: World, pragma: str, open_after: int) -> None:
    def view() -> Any:
        world.Session.execute(sa.text(f"PRAGMA {pragma}"))
        return held(world.Session.execute(sa.text("SELECT 1 UNION SELECT 2")))

    exchange = Exchange(serve(world, view))
    assert world.checked_out == open_after
    exchange.read()


def test_an_error_page_may_stream_the_rows_of_a_result_that_the_view_left_open(any_world: World) -> None:
    any_world.insert(*TEXTS)
    assert request(serve(any_world, export(any_world, core, 1), "404 Not Found")).content == CSV
    assert any_world.durable() == TEXTS


@pytest.mark.parametrize("end", ["veto", "doom"])
def test_what_was_changed_is_rolled_back_at_once_although_a_result_is_open(any_world: World, end: str) -> None:
    any_world.insert(*TEXTS)

    def view() -> Any:
        add(any_world, "not kept")
        if end == "doom":
            current_scope().doom("a dry run")
        return export(any_world, core, 1)()

    exchange = Exchange(serve(any_world, view, "500 Oops" if end == "veto" else "200 OK"))
    assert any_world.checked_out == 0
    with suppress(sa.exc.SQLAlchemyError):
        exchange.next()
    exchange.close()
    assert any_world.durable() == TEXTS


PENDING = {
    "new": (lambda session, note: session.add(Note(text="new")), ["new", "old"]),
    "dirty": (lambda session, note: setattr(note, "text", "new"), ["new"]),
    "deleted": (lambda session, note: session.delete(note), []),
}


@pytest.mark.parametrize("change", PENDING)
def test_what_is_merely_pending_is_durable_before_the_first_byte_although_a_result_is_open(
    world: World, change: str
) -> None:
    world.insert("old")
    make, texts = PENDING[change]

    def view() -> Any:
        old = world.Session.query(Note).one()
        rows = world.Session.execute(sa.text("SELECT 1 UNION SELECT 2"))
        # After the query, which would flush it.
        make(world.Session(), old)
        opened.append(rows)
        return (b"%d" % row[0] for row in rows)

    opened: list[Any] = []
    durable: list[Any] = []
    Exchange(serve(world, view), on_start=lambda status: durable.append(world.durable())).close()
    opened.pop().close()  # a generator that was closed may keep it, and SQLite waits for it
    assert durable == [texts]


def test_a_flush_that_fails_while_a_result_is_open_reaches_the_server_before_any_status(world: World) -> None:
    world.insert("taken")

    def view() -> Any:
        rows = world.Session.execute(sa.text("SELECT 1 UNION SELECT 2"))
        opened.append(rows)
        world.Session.add_all([Note(text="not kept"), Note(text="taken")])
        return (b"%d" % row[0] for row in rows)

    opened: list[Any] = []
    told: list[str] = []
    with pytest.raises(sa.exc.IntegrityError):
        Exchange(serve(world, view), on_start=told.append)
    opened.pop().close()  # the exception keeps it, and SQLite waits for it
    assert told == []
    assert world.checked_out == 0
    assert world.durable() == ["taken"]


@pytest.mark.parametrize("end", ["veto", "doom"])
@pytest.mark.parametrize("change", PENDING)
def test_what_is_merely_pending_is_rolled_back_at_once_although_a_result_is_open(
    world: World, change: str, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.insert("old")

    def view() -> Any:
        old = world.Session.query(Note).one()
        rows = world.Session.execute(sa.text("SELECT 1 UNION SELECT 2"))
        PENDING[change][0](world.Session(), old)
        if end == "doom":
            current_scope().doom("a dry run")
        opened.append(rows)
        return (b"%d" % row[0] for row in rows)

    opened: list[Any] = []
    exchange = Exchange(serve(world, view, "500 Oops" if end == "veto" else "200 OK"))
    assert world.checked_out == 0
    exchange.close()
    opened.pop().close()  # a generator that was closed may keep it, and SQLite waits for it
    assert world.durable() == ["old"]
    # That is for what is committed.
    assert caplog.messages == []


def test_what_the_application_committed_itself_is_no_change_that_takes_an_open_result(any_world: World) -> None:
    any_world.insert(*TEXTS)

    def view() -> Any:
        add(any_world, "by itself")
        any_world.Session.commit()
        return export(any_world, orm, 1)()

    exchange = Exchange(serve(any_world, view))
    assert exchange.read() == b"by itself\n" + CSV


def test_a_view_of_many_statements_still_knows_its_open_result(world: World) -> None:
    world.insert(*TEXTS)

    def view() -> Any:
        body = export(world, core, 1)()
        for _ in range(300):
            world.Session.execute(sa.text("SELECT 1")).all()
        return body

    exchange = Exchange(serve(world, view))
    assert world.checked_out == 1
    assert exchange.read() == CSV


@pytest.mark.parametrize("end", ["read", "cut"])
def test_no_transaction_idles_behind_a_slow_client(any_world: World, end: str) -> None:
    any_world.insert("a note")

    def view() -> Any:
        add(any_world, "another")
        notes = any_world.Session.query(Note).order_by(Note.text).all()
        return (note.text.encode() for note in notes)

    exchange = Exchange(serve(any_world, view))
    idle = [any_world.checked_out]
    for _ in range(2):
        exchange.next()
        idle.append(any_world.checked_out)
    assert idle == [0, 0, 0]
    exchange.read() if end == "read" else exchange.close()


# -- the commit does not expire objects -------------------------------------------------------------------------------


def test_the_body_renders_what_the_view_loaded_with_no_statement_and_no_transaction(any_world: World) -> None:
    any_world.insert(*TEXTS)
    in_transaction: list[bool] = []

    def view() -> Any:
        add(any_world, "zzz")
        notes = any_world.Session.query(Note).order_by(Note.text).all()

        def body() -> Any:
            for note in notes:
                yield note.text.encode()
                in_transaction.append(any_world.Session().in_transaction())

        return body()

    exchange = Exchange(serve(any_world, view))
    with statements(any_world) as sent:
        assert exchange.read() == b"".join(text.encode() for text in [*TEXTS, "zzz"])
    assert sent == []
    assert in_transaction == [False] * 8


def test_a_body_that_wants_fresh_state_expires_the_objects_itself(world: World) -> None:
    world.insert("old")

    def view() -> Any:
        note = world.Session.query(Note).one()

        def body() -> Any:
            yield note.text.encode()
            world.Session.expire_all()
            yield note.text.encode()

        return body()

    exchange = Exchange(serve(world, view))
    assert exchange.next() == b"old"
    with world.engine.begin() as connection:
        connection.execute(sa.update(Note).values(text="new"))
    assert exchange.read() == b"new"


@pytest.mark.parametrize("expire", [True, False])
@pytest.mark.parametrize("where", ["view", "body"])
@pytest.mark.parametrize("registry", REGISTRIES)
def test_the_applications_own_commit_follows_its_own_setting(
    request: pytest.FixtureRequest, worlds: Worlds, registry: str, where: str, expire: bool
) -> None:
    expired: list[bool] = []
    with worlds.use(request.getfixturevalue, "sqlite", registry) as world:
        session = make_session(registry, sessionmaker(world.engine, expire_on_commit=expire))

        def commit() -> None:
            note = Note(text=f"in the {where}")
            session.add(note)
            session.commit()
            expired.append(sa.inspect(note).expired)

        def body() -> Any:
            yield b"1"
            if where == "body":
                commit()

        def view() -> Any:
            session.add(Note(text="so that there is something to commit"))
            if where == "view":
                commit()
            return body()

        Exchange(SessionMiddleware(respond(view), session)).read()
    assert expired == [expire]


# -- commit_at="end" --------------------------------------------------------------------------------------------------


def test_at_the_end_view_and_body_are_one_transaction(any_world: World) -> None:
    exchange = Exchange(serve(any_world, streaming(any_world), commit_at="end"))
    for chunk in (b"1", b"2", b"3"):
        assert any_world.durable() == []
        assert exchange.next() == chunk
    assert any_world.durable() == []
    with pytest.raises(StopIteration):
        exchange.next()
    assert any_world.durable() == ["by the body", "by the view"]
    exchange.close()


def test_at_the_end_the_client_sees_the_status_first(world: World) -> None:
    exchange = Exchange(serve(world, streaming(world), commit_at="end"))
    assert exchange.status == "200 OK"
    assert exchange.read() == b"123"


def test_at_the_end_a_client_that_goes_away_takes_all_with_it(any_world: World) -> None:
    exchange = Exchange(serve(any_world, streaming(any_world), commit_at="end"))
    exchange.next()
    exchange.close()
    assert any_world.durable() == []


def test_at_the_end_an_exception_in_the_body_takes_all_with_it(any_world: World) -> None:
    failure = LookupError()
    with pytest.raises(LookupError) as raised:
        request(serve(any_world, streaming(any_world, fail=failure), commit_at="end"))
    assert raised.value is failure
    assert any_world.durable() == []


@pytest.mark.parametrize("end", ["veto", "doom"])
def test_at_the_end_a_refused_request_keeps_nothing(any_world: World, end: str) -> None:
    def view() -> Any:
        if end == "doom":
            current_scope().doom("a dry run")
        return streaming(any_world)()

    status = "500 Oops" if end == "veto" else "200 OK"
    assert request(serve(any_world, view, status, commit_at="end")).content == b"123"
    assert any_world.durable() == []


@pytest.mark.parametrize("end", ["veto", "doom"])
def test_at_the_end_a_refused_request_holds_no_connection_while_it_streams(world: World, end: str) -> None:
    def view() -> Any:
        if end == "doom":
            current_scope().doom("a dry run")
        write(world, "by the view")
        return iter([b"x"])

    exchange = Exchange(serve(world, view, "500 Oops" if end == "veto" else "200 OK", commit_at="end"))
    assert world.checked_out == 0
    assert exchange.read() == b"x"


def test_at_the_end_a_commit_that_fails_is_rolled_back_at_once(any_world: World) -> None:
    failure = LookupError()

    def refuse(session: Any) -> None:
        raise failure

    def view() -> Any:
        event.listen(any_world.Session(), "before_commit", refuse)
        write(any_world, "by the view")
        return iter([b"x"])

    exchange = Exchange(serve(any_world, view, commit_at="end"))
    assert exchange.next() == b"x"
    with pytest.raises(LookupError):
        exchange.next()
    # Not only when the server gets to it.
    assert any_world.checked_out == 0
    exchange.close()
    assert any_world.durable() == []


def test_at_the_end_a_failed_commit_breaks_the_transfer_off(any_world: World) -> None:
    any_world.insert("taken")

    def view() -> Any:
        add(any_world, "taken")
        return iter([b"1", b"2"])

    exchange = Exchange(serve(any_world, view, commit_at="end"))
    assert exchange.status == "200 OK"
    assert [exchange.next(), exchange.next()] == [b"1", b"2"]
    with pytest.raises(sa.exc.IntegrityError):
        exchange.next()
    exchange.close()
    assert any_world.checked_out == 0
    assert any_world.durable() == ["taken"]


@pytest.mark.parametrize("select", RESULTS)
def test_at_the_end_changes_and_an_open_result_go_together(
    any_world: World, select: Any, caplog: pytest.LogCaptureFixture
) -> None:
    any_world.insert(*TEXTS)

    def view() -> Any:
        write(any_world, "audited")
        return export(any_world, select, 1)()

    assert request(serve(any_world, view, commit_at="end")).content == b"audited\n" + CSV
    assert any_world.durable() == ["audited", *TEXTS]
    assert caplog.records == []


@pytest.mark.parametrize(("configured", "chosen"), [("start", "end"), ("end", "start")])
def test_one_request_alone_may_choose_when_it_commits(world: World, configured: str, chosen: str) -> None:
    stream = streaming(world)
    views: list[Any] = []

    def choosing() -> Any:
        current_scope().commit_at = chosen
        assert current_scope().commit_at == chosen
        return stream()

    app = serve(world, lambda: views.pop()(), commit_at=configured)
    durable = {}
    for name, view in (("chosen", choosing), ("configured", stream)):
        views.append(view)
        exchange = Exchange(app)
        durable[name] = world.durable()
        exchange.close()
        with world.engine.begin() as connection:
            connection.execute(sa.delete(Note))
    at = {"start": ["by the view"], "end": []}
    assert durable == {"chosen": at[chosen], "configured": at[configured]}


def test_commit_at_can_only_be_a_moment_that_exists(world: World) -> None:
    def view() -> Any:
        with pytest.raises(ValueError, match='"start" or "end", not \'never\''):
            current_scope().commit_at = "never"
        assert current_scope().commit_at == "start"
        return [b"checked"]

    assert request(serve(world, view)).content == b"checked"


def test_commit_at_comes_too_late_in_the_body(world: World) -> None:
    def view() -> Any:
        assert current_scope().commit_at == "start"
        with pytest.raises(RuntimeError, match="before the view returns"):
            current_scope().commit_at = "end"
        yield b"checked"

    assert request(serve(world, view)).content == b"checked"


# -- the same middleware met twice ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["200 OK", "500 Oops"])
@pytest.mark.parametrize("body", ["list", "stream"])
def test_wrapped_twice_by_mistake_there_is_one_unit_of_work(world: World, status: str, body: str) -> None:
    scopes: list[Any] = []

    def view() -> Any:
        scopes.append(current_scope())
        write(world, "once")
        return [b"x"] if body == "list" else iter([b"x"])

    durable: list[Any] = []
    app = SessionMiddleware(serve(world, view, status), world.Session)
    exchange = Exchange(app, on_start=lambda status: durable.append(world.durable()))
    assert exchange.read() == b"x"
    assert scopes == [exchange.environ["sa_wsgi_session.scope"]]
    assert durable == [["once"] if status == "200 OK" else []]
    assert exchange.statuses == [status]


def test_an_inner_copy_of_the_environ_joins_the_outer_request(world: World) -> None:
    def inner() -> Any:
        write(world, "inner")
        return [b"inner"]

    inner_app = serve(world, inner)

    def outer(environ: Any, start_response: Any) -> Any:
        session = world.Session()
        content = Exchange(inner_app, dict(environ, PATH_INFO="/inner")).read()
        assert world.Session() is session
        assert world.durable() == []
        start_response("500 Oops", PLAIN)
        return [content]

    assert request(SessionMiddleware(outer, world.Session)).content == b"inner"
    assert world.durable() == []


@pytest.mark.parametrize("body", [[b"a", b"b"], (b"a", b"b"), FileWrapper(io.BytesIO())], ids=["list", "tuple", "file"])
def test_of_a_joined_part_too_a_body_that_runs_no_code_is_the_very_same_object(body: Any) -> None:
    inner = handle(respond(lambda: body), (session := contextual_session(sessionmaker())))
    bodies: list[Any] = []

    def outer(environ: Any, start_response: Any) -> Any:
        bodies.append(inner(dict(environ), start_response))
        return [b"x"]

    Exchange(handle(outer, session), make_environ() | {"wsgi.file_wrapper": FileWrapper}).read()
    assert len(bodies) == 1
    assert bodies[0] is body


def test_a_joined_part_that_fails_and_is_swallowed_cannot_be_half_kept(world: World) -> None:
    failure = LookupError()

    def inner() -> Any:
        write(world, "half")
        raise failure

    inner_app = serve(world, inner)

    def outer(environ: Any, start_response: Any) -> Any:
        with suppress(LookupError):
            Exchange(inner_app, dict(environ))
        start_response("200 OK", PLAIN)
        return [b"all is well"]

    with pytest.raises(RollbackOnlyError) as raised:
        request(SessionMiddleware(outer, world.Session))
    assert raised.value.__cause__ is failure
    assert world.durable() == []


def test_a_copy_of_an_environ_whose_request_has_ended_is_a_request_of_its_own(world: World) -> None:
    def view() -> Any:
        add(world, f"note {len(world.durable())}")
        return [b""]

    app = serve(world, view)
    environ = make_environ()
    Exchange(app, environ).read()
    scope = environ["sa_wsgi_session.scope"]
    again = dict(environ)
    Exchange(app, again).read()
    assert world.durable() == ["note 0", "note 1"]
    assert again["sa_wsgi_session.scope"] is not scope


def test_the_environ_of_a_stream_is_no_scope_to_join_between_its_chunks(world: World) -> None:
    def view() -> Any:
        yield b"1"

    exchange = Exchange(serve(world, view))

    def other() -> Any:
        add(world, "kept")
        return [b""]

    Exchange(serve(world, other), dict(exchange.environ)).read()
    assert world.durable() == ["kept"]
    exchange.read()


def test_a_foreign_object_under_the_environ_key_is_no_scope_to_join(world: World) -> None:
    def view() -> Any:
        add(world, "kept")
        return [b""]

    Exchange(serve(world, view), make_environ() | {"sa_wsgi_session.scope": object()}).read()
    assert world.durable() == ["kept"]


def test_two_databases_are_two_middlewares_with_two_keys(world: World, tmp_path: Any) -> None:
    other = World(sa.engine.URL.create("sqlite", database=str(tmp_path / "other.sqlite")))

    def app(environ: Any, start_response: Any) -> Any:
        scopes = environ["sa_wsgi_session.scope"], environ["other.scope"]
        assert (current_scope(world.Session), current_scope(other.Session)) == scopes
        assert (environ["sa_wsgi_session.session"], environ["other.session"]) == (world.Session, other.Session)
        write(world, "here")
        write(other, "there")
        start_response(environ["HTTP_X_STATUS"], PLAIN)

        def body() -> Any:
            yield b"1"
            assert (current_scope(world.Session), current_scope(other.Session)) == scopes
            yield b"2"

        return body()

    middleware = SessionMiddleware(SessionMiddleware(app, other.Session, environ_key="other"), world.Session)
    assert request(middleware, HTTP_X_STATUS="500 Oops").content == b"12"
    assert (world.durable(), other.durable()) == ([], [])
    assert request(middleware, HTTP_X_STATUS="200 OK").content == b"12"
    assert (world.durable(), other.durable()) == (["here"], ["there"])
    assert other.checked_out == 0
    other.close()


# -- sessions of many kinds -------------------------------------------------------------------------------------------


#: SQLAlchemy's, which takes any callable, whatever its annotations say.
any_scoped_session: Any = scoped_session


class Audited(Session):
    """A session class of the application's."""


@pytest.mark.parametrize(
    "make",
    [
        lambda engine: scoped_session(sessionmaker(engine)),
        lambda engine: scoped_session(sessionmaker(engine, class_=Audited)),
        lambda engine: any_scoped_session(partial(sessionmaker(), bind=engine)),
        lambda engine: any_scoped_session(partial(Audited, engine)),
        lambda engine: any_scoped_session(lambda: Session(engine)),
        lambda engine: scoped_session(sessionmaker(binds={Note: engine})),
        lambda engine: contextual_session(partial(Session, engine)),
        lambda engine: contextual_session(lambda: Audited(engine)),
    ],
    ids=[
        "maker",
        "maker of a class",
        "partial maker",
        "partial class",
        "function",
        "binds",
        "contextual",
        "function 2",
    ],
)
def test_open_results_are_known_to_sessions_of_every_make(
    request: pytest.FixtureRequest, worlds: Worlds, make: Any
) -> None:
    with worlds.use(request.getfixturevalue, "sqlite", "thread-local") as world:
        world.insert(*TEXTS)
        engine = sa.create_engine(world.engine.url)
        session = make(engine)
        in_transaction: list[bool] = []

        def view() -> Any:
            rows = session.execute(sa.select(Note.text).order_by(Note.text))

            def body() -> Any:
                in_transaction.append(session().in_transaction())
                for row in rows:
                    yield row.text.encode()

            return body()

        for _ in range(2):
            assert Exchange(SessionMiddleware(respond(view), session)).read() == "".join(TEXTS).encode()
        assert in_transaction == [True, True]
        engine.dispose()


def test_open_results_are_known_also_to_the_sessionmakers_that_come_after_others(
    request: pytest.FixtureRequest, worlds: Worlds
) -> None:
    """Each ``sessionmaker`` makes a class, which may have the address of one that was there before."""
    with worlds.use(request.getfixturevalue, "sqlite", "thread-local") as world:
        world.insert(*TEXTS)
        known = []
        for _ in range(8):
            session = scoped_session(sessionmaker(world.engine))

            def view(session: Any = session) -> Any:
                rows = session.execute(sa.select(Note.text))
                return (row.text.encode() for row in rows)

            exchange = Exchange(SessionMiddleware(respond(view), session))
            known.append(world.checked_out)
            exchange.close()
            del session, view, exchange
            gc.collect()
        assert known == [1] * 8


def test_a_session_on_a_connection_of_its_own_works_like_any_other(
    request: pytest.FixtureRequest, worlds: Worlds
) -> None:
    """As the tests of applications have it, which roll back what the requests have committed."""
    with worlds.use(request.getfixturevalue, "sqlite", "thread-local") as world:
        with world.engine.connect() as connection:
            outermost = connection.begin()
            session = scoped_session(sessionmaker(connection))

            def view() -> Any:
                session.add(Note(text="seen by the test"))
                return iter([b"x"])

            assert Exchange(SessionMiddleware(respond(view), session)).read() == b"x"
            assert connection.execute(sa.select(Note.text)).scalars().all() == ["seen by the test"]
            outermost.rollback()
        assert world.durable() == []


OtherBase: Any = declarative_base()


class Page(OtherBase):
    """A row of the other database."""

    __tablename__ = "page"
    id = sa.Column(sa.Integer, primary_key=True)


@pytest.mark.parametrize("changed", [None, Note, Page])
def test_a_session_with_two_databases_waits_for_the_results_of_both_and_for_the_changes_of_none(
    request: pytest.FixtureRequest, worlds: Worlds, tmp_path: Any, changed: Any
) -> None:
    with worlds.use(request.getfixturevalue, "sqlite", "thread-local") as world:
        other = sa.create_engine(f"sqlite:///{tmp_path / 'other.sqlite'}")
        OtherBase.metadata.create_all(other)
        with other.begin() as connection:
            connection.execute(sa.insert(Page), [{"id": 1}, {"id": 2}])
        world.insert("a", "b")
        session = scoped_session(sessionmaker(binds={Note: world.engine, Page: other}))

        def view() -> Any:
            pages = session.execute(sa.select(Page.__table__))
            if changed is not None:
                session.add(Note(text="new") if changed is Note else Page(id=3))
                session.flush()
            notes = session.execute(sa.select(NOTES))

            def body() -> Any:
                for page, note in zip(pages, notes, strict=True):
                    yield f"{page.id}{note.text} ".encode()

            return body()

        exchange = Exchange(SessionMiddleware(respond(view), session))
        assert world.checked_out == (changed is None)
        if changed is None:
            assert exchange.read() == b"1a 2b "
        exchange.close()
        with other.connect() as connection:
            assert connection.execute(sa.select(sa.func.count(Page.id))).scalar() == (3 if changed is Page else 2)
        assert world.durable() == (["a", "b", "new"] if changed is Note else ["a", "b"])
        other.dispose()


def test_a_session_with_two_databases_still_knows_the_result_of_the_first_one(
    request: pytest.FixtureRequest, worlds: Worlds, tmp_path: Any
) -> None:
    with worlds.use(request.getfixturevalue, "sqlite", "thread-local") as world:
        other = sa.create_engine(f"sqlite:///{tmp_path / 'other.sqlite'}")
        OtherBase.metadata.create_all(other)
        with other.begin() as connection:
            connection.execute(sa.insert(Page), [{"id": 1}, {"id": 2}])
        session = scoped_session(sessionmaker(binds={Note: world.engine, Page: other}))

        def view() -> Any:
            pages = session.execute(sa.select(Page.__table__))
            session.execute(sa.select(NOTES)).all()
            return (str(page.id).encode() for page in pages)

        exchange = Exchange(SessionMiddleware(respond(view), session))
        assert world.checked_out == 1
        assert exchange.read() == b"12"
        other.dispose()


class Meeting:
    """A lock before which two threads meet."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=30)
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._barrier.wait()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def in_two_threads_that_meet(function: Callable[[], Any]) -> list[Any]:
    returned: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sa_wsgi_session._watching.lock", Meeting())
        threads = [threading.Thread(target=lambda: returned.append(function())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return returned


def test_middlewares_that_are_made_at_the_same_time_listen_once() -> None:
    def listeners(factory: Any) -> int:
        return len(list(factory().dispatch.after_begin))

    session = scoped_session(sessionmaker())
    before = listeners(session.session_factory)
    in_two_threads_that_meet(lambda: SessionMiddleware(respond(list), session))
    assert listeners(session.session_factory) == before + 1


def test_of_two_that_register_at_the_same_time_one_is_the_first() -> None:
    class Target:
        """Nothing."""

    listeners = _watching.Listeners({})
    assert sorted(in_two_threads_that_meet(lambda: listeners.register(Target))) == [False, True]
    assert not listeners.register(Target)


def test_a_view_of_many_statements_remembers_only_the_open_results(world: World) -> None:
    remembered: list[int] = []

    def view() -> Any:
        results, scope = [], cast(Any, current_scope())
        for number in range(1_000):
            result = world.Session.execute(sa.select(sa.literal(number)))
            if number % 100 == 0:
                results.append(result)
            else:
                result.all()
            remembered.append(len(scope.watch._contexts))

        return (str(result.scalar_one()).encode() for result in results)

    assert request(serve(world, view)).content == b"0100200300400500600700800900"
    assert remembered[:64] == list(range(1, 65))
    assert max(remembered) < 100
