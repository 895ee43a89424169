"""What the README of the guest book in CherryPy says is to be known, and no other says."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import cherrypy
import pytest

from sa_wsgi_session import SessionMiddleware
from tests.frameworks.applications import make_cherrypy
from tests.frameworks.support import Log, ask, elsewhere, only, start, status_code
from tests.support import note, request


@only("cherrypy")
def test_the_guest_book_logs_the_exception_that_is_made_a_500_page(book, caplog):
    assert status_code(book.sign("half of it", "/crash")) == 500
    assert "failed on purpose" in caplog.text


@only("cherrypy")
def test_the_guest_book_shows_no_traceback_to_a_request_without_host(book):
    answer = request(book.application)
    assert status_code(answer) == 400
    assert b"Traceback" not in answer.content


# -- streams ----------------------------------------------------------------------------------------------------------


def test_without_response_stream_a_generator_is_put_together_in_the_call(world):
    log = Log(world)
    app = SessionMiddleware(make_cherrypy(log.chunks, stream=False), world.Session)
    exchange = start(app, on_start=log.lines.append)
    assert log.lines == ["chunk 1", "chunk 2", "finally", "200 OK"]
    assert exchange.read() == b"12"


def test_without_response_stream_an_exception_of_a_generator_is_a_500(world):
    def view() -> Iterator[bytes]:
        world.Session.add(note("half of it"))
        yield b"1"
        raise RuntimeError("failed on purpose")

    app = SessionMiddleware(make_cherrypy(view, stream=False), world.Session)
    assert ask(app).status == "500 Internal Server Error"
    assert world.durable() == []


def test_a_stream_that_is_closed_on_another_thread_is_left_to_the_garbage_collector(world):
    def run() -> list[str]:
        log = Log(world)
        exchange = start(SessionMiddleware(make_cherrypy(log.chunks), world.Session))
        exchange.next()
        elsewhere(exchange.close)
        assert world.checked_out == 0
        assert log.lines == ["chunk 1"]
        del exchange
        cherrypy.serving.clear()  # as the next request of this thread does
        gc.collect()
        return log.lines

    assert elsewhere(run) == ["chunk 1", "finally, unbound"]


def test_a_stream_is_left_to_the_garbage_collector_if_the_thread_has_had_another_request_meanwhile(world):
    log = Log(world)
    exchange = start(SessionMiddleware(make_cherrypy(log.chunks), world.Session))
    exchange.next()
    assert ask(SessionMiddleware(make_cherrypy(Log(world).chunks), world.Session)).content == b"12"
    exchange.close()
    assert world.checked_out == 0
    assert log.lines == ["chunk 1"]
    del exchange
    gc.collect()
    assert log.lines == ["chunk 1", "finally, unbound"]


# -- units of work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_its_end", [True, False], ids=["read", "hung up"])
def test_hooks_run_before_the_commit_but_on_end_request_after_it(world, to_its_end):
    lines: list[str] = []

    def add(what: str) -> None:
        world.Session.add(note(what))
        lines.append(f"{what}, after {len(world.durable())}")

    def view() -> str:
        world.Session.add(note("view"))
        for point in ("on_end_resource", "on_end_request"):
            cherrypy.request.hooks.attach(point, lambda point=point: add(point))
        return "page"

    exchange = start(SessionMiddleware(make_cherrypy(view), world.Session), on_start=lines.append)
    if to_its_end:
        assert exchange.read() == b"page"
    else:
        exchange.close()
    assert lines == ["on_end_resource, after 0", "200 OK", "on_end_request, after 2"]
    # What the latter changes is a second unit of work, and is lost where the visitor hangs up.
    assert world.durable() == sorted(["view", "on_end_resource", *(["on_end_request"] if to_its_end else [])])


def test_an_internal_redirect_stays_in_the_unit_of_work(world):
    class Root:
        @cherrypy.expose
        def index(self) -> None:
            world.Session.add(note("before"))
            raise cherrypy.InternalRedirect("/other")

        @cherrypy.expose
        def other(self) -> bytes:
            world.Session.add(note("after"))
            assert world.durable() == []
            return b"page"

    app = cherrypy.Application(Root(), config={"/": {"tools.encode.on": False}})
    assert ask(SessionMiddleware(app, world.Session)).content == b"page"
    assert world.durable() == ["after", "before"]
