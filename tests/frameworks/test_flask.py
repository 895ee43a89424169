"""What the README of the guest book in Flask says is to be known. Its ``async def`` views and Flask-SQLAlchemy have
files of their own."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import flask
import pytest
from sqlalchemy import select

from sa_wsgi_session import SessionMiddleware
from tests.frameworks.support import ask, start, status_code
from tests.support import Note, is_in_a_scope, note


@pytest.fixture
def app(world):
    app: Any = flask.Flask("tests")
    app.wsgi_app = SessionMiddleware(app.wsgi_app, world.Session)
    return app


@pytest.mark.parametrize("setting", ["TESTING", "DEBUG", "PROPAGATE_EXCEPTIONS"])
def test_exceptions_go_on_where_it_tests_or_debugs(world, app, setting):
    app.config[setting] = True

    @app.get("/")
    def view() -> str:
        world.Session.add(note("never"))
        world.Session.flush()
        raise RuntimeError("failed on purpose")

    with pytest.raises(RuntimeError, match=r"^failed on purpose$"):
        ask(app)
    assert world.durable() == []


@pytest.mark.parametrize(("code", "kept"), [(200, ["hello"]), (409, [])])
def test_what_an_error_handler_answers_decides(world, app, code, kept):
    @app.get("/")
    def view() -> str:
        world.Session.add(note("hello"))
        raise RuntimeError("failed on purpose")

    @app.errorhandler(RuntimeError)
    def forgive(error: RuntimeError) -> Any:
        return "never mind", code

    exchange = ask(app)
    assert (status_code(exchange), exchange.content) == (code, b"never mind")
    assert world.durable() == kept


def test_it_tears_down_before_the_commit_and_in_the_unit_of_work_of_the_view(world, app):
    @app.teardown_request
    def teardown(error: Any) -> None:
        assert world.durable() == []
        world.Session.add(note("teardown"))

    @app.get("/")
    def view() -> str:
        world.Session.add(note("view"))
        return "page"

    assert ask(app).content == b"page"
    assert world.durable() == ["teardown", "view"]


def test_it_tears_down_again_after_a_stream_with_context(world, app):
    seen: list[bool] = []

    @app.teardown_appcontext
    def teardown(error: Any) -> None:
        seen.append(is_in_a_scope())

    @app.get("/")
    def view() -> flask.Response:
        def generate() -> Iterator[str]:
            yield flask.request.path
            world.Session.add(note("stream"))

        return flask.Response(flask.stream_with_context(generate()))

    assert ask(app).content == b"/"
    assert seen == [True, True]
    assert world.durable() == ["stream"]


def test_call_on_close_runs_with_the_session(world, app):
    @app.get("/")
    def view() -> flask.Response:
        response = flask.Response("page")
        response.call_on_close(lambda: world.Session.add(note("close")))
        return response

    exchange = start(app)
    assert world.durable() == []
    exchange.read()
    assert world.durable() == ["close"]


def test_its_test_client_has_to_be_told_to_close(world, app):
    @app.get("/")
    def view() -> Iterator[str]:
        rows = world.Session.execute(select(Note.text)).scalars()
        return (f"{text}\n" for text in rows)

    world.insert("one")
    client = app.test_client()
    assert client.get("/", buffered=True).text == "one\n"
    assert world.checked_out == 0
    with client.get("/") as response:
        assert world.checked_out == 1
        assert response.text == "one\n"
    assert world.checked_out == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        response = client.get("/")
        assert response.text == "one\n"
        del response
        gc.collect()
    assert any("dropped without a call to its close()" in str(warning.message) for warning in caught)
    assert world.checked_out == 0
