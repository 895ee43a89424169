"""What the README of the guest book in web.py says is to be known, and no other says."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import web

from sa_wsgi_session import SessionMiddleware
from tests.frameworks.applications import make_webpy
from tests.frameworks.support import URLENCODED, ask, only, status_code
from tests.support import is_in_a_scope, note


@pytest.mark.parametrize(("answer", "code", "kept"), [("seeother", 303, ["hello"]), ("conflict", 409, [])])
@pytest.mark.parametrize("in_generator", [False, True], ids=["handler", "generator"])
def test_answers_that_are_raised_are_answers(world, answer, code, kept, in_generator):
    def view() -> None:
        world.Session.add(note("hello"))
        raise getattr(web, answer)("/elsewhere")

    def generator() -> Iterator[bytes]:
        view()
        yield b"never"

    exchange = ask(SessionMiddleware(make_webpy(generator if in_generator else view), world.Session))
    assert status_code(exchange) == code
    assert world.durable() == kept


def test_a_processor_sees_no_exceptions_but_its_own(world):
    seen: list[str] = []

    def processor(handler: Callable[[], Any]) -> Any:
        try:
            return handler()
        except Exception as error:
            seen.append(type(error).__name__)
            raise

    def view() -> str:
        raise RuntimeError("failed on purpose")

    assert status_code(ask(SessionMiddleware(make_webpy(view, processor), world.Session))) == 500
    assert seen == ["_InternalError"]


def test_its_own_way_to_test_passes_the_middleware_by(world):
    seen: list[bool] = []

    class Page:
        def GET(self) -> str:
            seen.append(is_in_a_scope())
            return "page"

    app = web.application(("/", "Page"), {"Page": Page})
    assert app.request("/").data == b"page"
    assert seen == [False]
    assert ask(SessionMiddleware(app.wsgifunc(), world.Session)).content == b"page"
    assert seen == [False, True]


@only("webpy")
def test_the_guest_book_refuses_a_form_without_a_length(book):
    exchange = book.ask(
        "/",
        "POST",
        CONTENT_TYPE=URLENCODED,
        HTTP_TRANSFER_ENCODING="chunked",
        **{"wsgi.input": io.BytesIO(b"text=a")},
    )
    assert status_code(exchange) == 413
    assert book.texts == []
