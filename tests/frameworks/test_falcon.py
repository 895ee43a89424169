"""What the README of the guest book in Falcon says is to be known, and no other says."""

from __future__ import annotations

import json
from typing import Any

import falcon
import pytest
from falcon import testing

from sa_wsgi_session import SessionMiddleware
from tests.frameworks.applications import make_falcon
from tests.frameworks.support import ask, status_code
from tests.support import is_in_a_scope, note


def fail() -> str:
    raise RuntimeError("failed on purpose")


@pytest.mark.parametrize(("code", "kept"), [(200, ["hello"]), (409, [])])
def test_what_an_error_handler_answers_decides(world, code, kept):
    def view() -> str:
        world.Session.add(note("hello"))
        return fail()

    def forgive(req: Any, resp: Any, error: Any, params: Any) -> None:
        resp.status = code
        resp.text = "never mind"

    app = make_falcon(view)
    app.add_error_handler(RuntimeError, forgive)
    exchange = ask(SessionMiddleware(app, world.Session))
    assert (status_code(exchange), exchange.content) == (code, b"never mind")
    assert world.durable() == kept


def test_an_error_leaves_nothing_of_the_stream_that_was_set(world):
    class Page:
        def on_get(self, req: Any, resp: Any) -> None:
            world.Session.add(note("never"))
            resp.stream = iter([b"never"])
            raise falcon.HTTPConflict

    app = falcon.App()
    app.add_route("/", Page())
    exchange = ask(SessionMiddleware(app, world.Session))
    assert status_code(exchange) == 409
    assert json.loads(exchange.content) == {"title": "409 Conflict"}
    assert world.durable() == []


class Middleware:
    def __init__(self, on_response: Any) -> None:
        self._on_response = on_response

    def process_response(self, req: Any, resp: Any, resource: Any, req_succeeded: bool) -> None:
        self._on_response()


def test_process_response_belongs_to_the_unit_of_work_of_the_view(world):
    app = make_falcon(lambda: "page", middleware=[Middleware(lambda: world.Session.add(note("process_response")))])
    assert ask(SessionMiddleware(app, world.Session)).content == b"page"
    assert world.durable() == ["process_response"]


def test_an_exception_of_its_middleware_is_a_500_too(world):
    def view() -> str:
        world.Session.add(note("never"))
        return "page"

    app = make_falcon(view, middleware=[Middleware(fail)])
    assert status_code(ask(SessionMiddleware(app, world.Session))) == 500
    assert world.durable() == []


@pytest.mark.parametrize(("name", "content"), [("text", "page"), ("data", b"page"), ("media", {"a": 1})])
def test_what_is_no_stream_is_a_list(world, name, content):
    class Page:
        def on_get(self, req: Any, resp: Any) -> None:
            setattr(resp, name, content)

    app = falcon.App()
    app.add_route("/", Page())
    exchange = ask(SessionMiddleware(app, world.Session))
    assert type(exchange.body) is list
    assert exchange.content in (b"page", b'{"a": 1}')


def test_its_test_client_takes_the_middleware(world):
    app = SessionMiddleware(make_falcon(lambda: str(is_in_a_scope())), world.Session)
    assert testing.TestClient(app).simulate_get("/").text == "True"
