"""What the README of the guest book in Pyramid says is to be known, and no other says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pyramid.response import Response
from pyramid.threadlocal import get_current_request

from sa_wsgi_session import SessionMiddleware
from tests.frameworks.applications import make_pyramid
from tests.frameworks.support import ask, start, status_code
from tests.support import note


def test_callbacks_run_before_the_commit_and_belong_to_it(world):
    lines: list[str] = []

    def add(what: str) -> None:
        world.Session.add(note(what))
        lines.append(what)

    def view() -> str:
        get_current_request().add_response_callback(lambda request, response: add("response callback"))
        get_current_request().add_finished_callback(lambda request: add("finished callback"))
        return "page"

    def configure(config: Any) -> None:
        config.add_subscriber(lambda event: add("NewResponse"), "pyramid.events.NewResponse")

    app = SessionMiddleware(make_pyramid(view, configure), world.Session)
    start(app, on_start=lines.append).close()
    assert lines == ["response callback", "NewResponse", "finished callback", "200 OK"]
    assert world.durable() == ["NewResponse", "finished callback", "response callback"]


def test_a_finished_callback_that_raises_takes_the_work_with_it(world):
    def view() -> str:
        world.Session.add(note("never"))
        get_current_request().add_finished_callback(lambda request: 1 / 0)
        return "page"

    with pytest.raises(ZeroDivisionError):
        start(SessionMiddleware(make_pyramid(view), world.Session))
    assert world.durable() == []


@pytest.mark.parametrize(("code", "kept"), [(200, ["half of it"]), (409, [])])
def test_what_an_exception_view_answers_decides(world, code, kept):
    def view() -> str:
        world.Session.add(note("half of it"))
        raise RuntimeError("failed on purpose")

    def configure(config: Any) -> None:
        config.add_exception_view(lambda error, request: Response("never mind", code), context=RuntimeError)

    exchange = ask(SessionMiddleware(make_pyramid(view, configure), world.Session))
    assert (status_code(exchange), exchange.content) == (code, b"never mind")
    assert world.durable() == kept


def test_its_thread_locals_are_gone_while_the_body_streams(world):
    def view() -> Iterator[bytes]:
        yield repr(get_current_request()).encode()

    assert ask(SessionMiddleware(make_pyramid(view), world.Session)).content == b"None"
