"""What the README of the guest book in Morepath says is to be known, and no other says."""

from __future__ import annotations

from typing import Any

import morepath
import pytest

from sa_wsgi_session import SessionMiddleware
from tests.frameworks.applications import make_morepath
from tests.frameworks.support import ask, start, status_code
from tests.support import note


def test_tweens_and_what_is_done_after_a_view_run_before_the_commit_and_belong_to_it(world):
    lines: list[str] = []

    def add(what: str) -> None:
        world.Session.add(note(what))
        lines.append(what)

    def configure(app_class: Any) -> None:
        @app_class.path(path="page")
        class Page:
            pass

        @app_class.view(model=Page)
        def page(self: Page, request: Any) -> str:
            request.after(lambda response: add("after"))
            return "page"

        @app_class.tween_factory()
        def make_tween(app: Any, handler: Any) -> Any:
            def tween(request: Any) -> Any:
                response = handler(request)
                add("tween")
                return response

            return tween

    app = SessionMiddleware(make_morepath(lambda: "root", configure), world.Session)
    start(app, "/page", on_start=lines.append).close()
    assert lines == ["after", "tween", "200 OK"]
    assert world.durable() == ["after", "tween"]


def test_a_tween_that_raises_takes_the_work_with_it(world):
    def view() -> str:
        world.Session.add(note("never"))
        return "root"

    def configure(app_class: Any) -> None:
        @app_class.tween_factory()
        def make_tween(app: Any, handler: Any) -> Any:
            def tween(request: Any) -> Any:
                handler(request)
                raise RuntimeError("failed on purpose")

            return tween

    with pytest.raises(RuntimeError, match=r"^failed on purpose$"):
        start(SessionMiddleware(make_morepath(view, configure), world.Session))
    assert world.durable() == []


@pytest.mark.parametrize(("code", "kept"), [(200, ["half of it"]), (409, [])])
def test_what_a_view_for_an_exception_answers_decides(world, code, kept):
    def view() -> str:
        world.Session.add(note("half of it"))
        raise RuntimeError("failed on purpose")

    def configure(app_class: Any) -> None:
        @app_class.view(model=RuntimeError)
        def forgive(self: RuntimeError, request: Any) -> morepath.Response:
            return morepath.Response("never mind", code)

    exchange = ask(SessionMiddleware(make_morepath(view, configure), world.Session))
    assert (status_code(exchange), exchange.content) == (code, b"never mind")
    assert world.durable() == kept


def test_there_is_no_head_where_no_view_is_written_for_it(world):
    called: list[str] = []
    app = SessionMiddleware(make_morepath(lambda: called.append("called")), world.Session)
    assert status_code(ask(app, method="HEAD")) == 405
    assert called == []
