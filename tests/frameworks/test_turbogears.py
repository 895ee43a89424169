"""What the README of the guest book in TurboGears 2 says is to be known, and no other says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tg
from sqlalchemy.exc import IntegrityError
from tg.appwrappers.base import ApplicationWrapper
from tg.configurator.components.error_pages import ErrorPagesConfigurationComponent

from sa_wsgi_session import SessionMiddleware
from tests.frameworks.applications import make_turbogears
from tests.frameworks.support import ask, elsewhere, start, status_code
from tests.support import note


def is_over() -> bool:
    """Whether TurboGears knows of no request."""
    try:
        str(tg.request.path)
    except TypeError as error:
        if "No object" not in str(error):
            raise
        return True
    return False


# -- registry_streaming -----------------------------------------------------------------------------------------------


def test_left_on_it_makes_a_generator_of_each_body(world):
    def run() -> None:
        exchange = start(SessionMiddleware(make_turbogears(lambda: "page", registry_streaming=True), world.Session))
        assert not isinstance(exchange.body, list)
        assert exchange.read() == b"page"
        assert is_over()

    elsewhere(run)


def test_left_on_a_body_cannot_end_on_another_thread(world):
    def run() -> None:
        exchange = start(SessionMiddleware(make_turbogears(lambda: "page", registry_streaming=True), world.Session))
        with pytest.raises(AssertionError, match="No object has been registered"):
            elsewhere(exchange.read)

    elsewhere(run)


@pytest.mark.parametrize("left_on", [True, False])
def test_left_on_its_request_stays_behind_where_the_commit_fails(world, left_on):
    world.insert("taken")

    def view() -> str:
        world.Session.add(note("taken"))
        return "page"

    def run() -> bool:
        with pytest.raises(IntegrityError):
            start(SessionMiddleware(make_turbogears(view, registry_streaming=left_on), world.Session))
        return is_over()

    assert elsewhere(run) != left_on


def test_switched_off_its_request_is_gone_while_the_body_streams(world):
    def view() -> Iterator[bytes]:
        yield str(is_over()).encode()

    assert ask(SessionMiddleware(make_turbogears(view), world.Session)).content == b"True"


# -- before the commit ------------------------------------------------------------------------------------------------


def test_hooks_and_after_and_application_wrappers_run_before_the_commit_and_belong_to_it(world):
    lines: list[str] = []

    def add(what: str) -> None:
        world.Session.add(note(what))
        lines.append(what)

    class Root(tg.TGController):
        @tg.expose()
        def page(self) -> str:
            return "page"

        def _after(self, *args: Any, **kwargs: Any) -> None:
            add("_after")

    tg.hooks.register("after_render", lambda response: add("hook"), controller=Root.page)

    class Wrapper(ApplicationWrapper):
        def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
            response = self.next_handler(controller, environ, context)
            add("wrapper")
            return response

    def configure(configurator: Any) -> None:
        configurator.register_application_wrapper(Wrapper)

    app = make_turbogears(lambda: "index", root=Root, configure=configure)
    start(SessionMiddleware(app, world.Session), "/page", on_start=lines.append).close()
    assert lines == ["hook", "_after", "wrapper", "200 OK"]
    assert world.durable() == ["_after", "hook", "wrapper"]


def test_an_application_wrapper_that_raises_takes_the_work_with_it(world):
    def view() -> str:
        world.Session.add(note("never"))
        return "page"

    class Wrapper(ApplicationWrapper):
        def __call__(self, controller: Any, environ: Any, context: Any) -> Any:
            self.next_handler(controller, environ, context)
            raise RuntimeError("failed on purpose")

    def configure(configurator: Any) -> None:
        configurator.register_application_wrapper(Wrapper)

    with pytest.raises(RuntimeError, match=r"^failed on purpose$"):
        start(SessionMiddleware(make_turbogears(view, configure=configure), world.Session))
    assert world.durable() == []


def test_its_error_pages_swallow_the_exception_into_a_500(world):
    class Error(tg.TGController):
        @tg.expose()
        def document(self) -> str:
            return "Something went wrong."

    class Root(tg.TGController):
        error = Error()

    def view() -> str:
        world.Session.add(note("half of it"))
        raise RuntimeError("failed on purpose")

    app = make_turbogears(
        view,
        root=Root,
        configure=lambda configurator: configurator.register(ErrorPagesConfigurationComponent),
        **{"errorpage.enabled": True},
    )
    exchange = ask(SessionMiddleware(app, world.Session))
    assert (status_code(exchange), exchange.content) == (500, b"Something went wrong.")
    assert world.durable() == []
