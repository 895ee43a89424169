"""What the README of the guest book in Bottle says is to be known, and no other says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bottle
import pytest

from sa_wsgi_session import SessionMiddleware
from tests.frameworks.applications import make_bottle
from tests.frameworks.support import ask, start, status_code
from tests.support import note


@pytest.mark.parametrize(("code", "kept"), [(303, ["hello"]), (409, [])])
@pytest.mark.parametrize("in_generator", [False, True], ids=["view", "generator"])
def test_answers_that_are_raised_are_answers(world, code, kept, in_generator):
    def view() -> None:
        world.Session.add(note("hello"))
        raise bottle.HTTPResponse("answer", code)

    def generator() -> Iterator[bytes]:
        view()
        yield b"never"

    exchange = ask(SessionMiddleware(make_bottle(generator if in_generator else view), world.Session))
    assert (status_code(exchange), exchange.content) == (code, b"answer")
    assert world.durable() == kept


def test_a_first_chunk_that_is_empty_is_none(world):
    def view() -> Iterator[bytes]:
        yield b""
        world.Session.add(note("before the first chunk"))
        yield b"first"

    durable: list[list[str]] = []
    app = SessionMiddleware(make_bottle(view), world.Session)
    assert start(app, on_start=lambda status: durable.append(world.durable())).read() == b"first"
    assert durable == [["before the first chunk"]]


def test_without_catchall_exceptions_go_on(world):
    def view() -> str:
        world.Session.add(note("never"))
        world.Session.flush()
        raise RuntimeError("failed on purpose")

    app = make_bottle(view)
    app.catchall = False
    with pytest.raises(RuntimeError, match=r"^failed on purpose$"):
        ask(SessionMiddleware(app, world.Session))
    assert world.durable() == []


def test_hooks_and_plugins_belong_to_the_unit_of_work_of_the_view(world):
    app = make_bottle(lambda: "page")
    for hook in ("before_request", "after_request"):
        app.add_hook(hook, lambda hook=hook: world.Session.add(note(hook)))

    @app.install
    def plugin(view: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(**arguments: Any) -> Any:
            world.Session.add(note("plugin"))
            return view(**arguments)

        return wrapped

    assert ask(SessionMiddleware(app, world.Session)).content == b"page"
    assert world.durable() == ["after_request", "before_request", "plugin"]
