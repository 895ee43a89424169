"""``async def`` views in Flask and Django, as the README of the guest book in Flask tells of them for both."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from sa_wsgi_session import NoActiveScope, current_scope, session_scope
from tests.frameworks.applications import Framework
from tests.frameworks.support import ask, only, status_code
from tests.support import World, note

SECONDS_TO_WAIT = 15

in_flask_and_django = only("flask", "django")
contextual = pytest.mark.parametrize("world", ["contextual"], indirect=True)


class AsyncSite:
    """An application with an ``async def`` view, and the threads on which that ran."""

    def __init__(self, framework: Framework, world: World, view: Callable[[], Awaitable[None]]) -> None:
        self.threads: list[int] = []

        async def page() -> str:
            self.threads.append(threading.get_ident())
            await view()
            return "page"

        self._app = framework.serve(world, page)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        return self._app(environ, start_response)


@in_flask_and_django
def test_it_runs_on_another_thread_and_its_thread_local_session_is_lost(world, framework):
    """Not an advice: what happens without one."""

    async def view() -> None:
        with pytest.raises(NoActiveScope):
            current_scope()
        world.Session.add(note("lost"))
        world.Session.flush()

    site = AsyncSite(framework, world, view)
    gc.collect()
    gc.disable()
    try:
        assert status_code(ask(site)) == 200
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
def test_a_contextual_session_is_the_same_one_before_and_after_each_await(world, framework):
    async def view() -> None:
        session = world.Session()
        world.Session.add(note("one"))
        await asyncio.sleep(0)
        world.Session.flush()
        await asyncio.sleep(0.001)
        assert world.Session() is session
        world.Session.add(note("two"))

    site = AsyncSite(framework, world, view)
    gc.disable()
    try:
        assert status_code(ask(site)) == 200
        assert site.threads != [threading.get_ident()]
        assert world.checked_out == 0
    finally:
        gc.enable()
    assert world.durable() == ["one", "two"]


@contextual
@in_flask_and_django
def test_one_that_fails_is_rolled_back(world, framework):
    async def view() -> None:
        world.Session.add(note("never"))
        world.Session.flush()
        raise RuntimeError("failed on purpose")

    assert status_code(ask(AsyncSite(framework, world, view))) == 500
    assert world.durable() == []


@pytest.mark.parametrize("world", ["thread-local", "contextual"], indirect=True)
@in_flask_and_django
def test_sync_to_async_is_back_on_the_thread_of_the_request_and_has_its_session(world, framework):
    of_request = threading.get_ident()

    def work() -> int:
        world.Session.add(note("kept"))
        return threading.get_ident()

    async def view() -> None:
        assert await sync_to_async(work)() == of_request

    assert status_code(ask(AsyncSite(framework, world, view))) == 200
    assert world.durable() == ["kept"]


@contextual
@in_flask_and_django
def test_tasks_of_a_view_share_its_session_unless_they_open_their_own(world, framework):
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

    assert status_code(ask(AsyncSite(framework, world, view))) == 200
    assert world.durable() == ["own 1", "own 2"]
