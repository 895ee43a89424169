"""What the README of the guest book in Django says is to be known, and no other says.

Its ``async def`` views are in ``test_async_views.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.signals import request_finished
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

from sa_wsgi_session import SessionMiddleware
from tests.frameworks.applications import make_django
from tests.frameworks.support import ask, only, start, status_code
from tests.support import is_in_a_scope, note

ROOT = Path(__file__).parents[2]
SECONDS_TO_WAIT = 15


@only("django")
def test_the_guest_book_answers_to_no_other_host(book):
    assert status_code(book.ask(HTTP_HOST="evil.example")) == 400
    assert status_code(book.ask(HTTP_HOST="localhost:8080")) == 200


@only("django")
def test_runserver_serves_the_middleware(book):
    from django.core.servers.basehttp import get_internal_wsgi_application

    assert get_internal_wsgi_application() is book.application


@pytest.mark.parametrize(("to_its_end", "kept"), [(True, ["finished"]), (False, [])])
def test_request_finished_is_sent_in_close_with_the_session(world, to_its_end, kept):
    seen: list[bool] = []

    def finished(**more: Any) -> None:
        seen.append(is_in_a_scope())
        world.Session.add(note("finished"))

    exchange = start(SessionMiddleware(make_django(lambda: iter(["page", "end"])), world.Session))
    request_finished.connect(finished)
    try:
        if to_its_end:
            assert exchange.read() == b"pageend"
        else:
            exchange.next()
            exchange.close()
    finally:
        request_finished.disconnect(finished)
    assert seen == [True]
    assert world.durable() == kept


def test_it_swallows_what_the_close_of_a_body_raises(world):
    def view() -> Iterator[bytes]:
        try:
            yield b"first"
            yield b"second"
        finally:
            raise RuntimeError("failed on purpose")

    exchange = start(SessionMiddleware(make_django(view), world.Session))
    exchange.next()
    exchange.close()


def test_an_asynchronous_body_is_read_at_once_on_another_thread(world):
    threads: list[int] = []

    async def chunks() -> AsyncIterator[str]:
        for chunk in ("first", "second"):
            threads.append(threading.get_ident())
            yield chunk

    app = SessionMiddleware(make_django(lambda: StreamingHttpResponse(chunks())), world.Session)
    with pytest.warns(Warning, match="must consume asynchronous iterators"):
        exchange = start(app)
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    assert exchange.read() == b"firstsecond"


def test_its_test_client_passes_the_middleware_by(world):
    seen: list[bool] = []

    def view() -> str:
        seen.append(is_in_a_scope())
        return "page"

    app = SessionMiddleware(make_django(view), world.Session)
    from django.test import Client, override_settings  # which can be imported only where there are settings

    with override_settings(ROOT_URLCONF=(path("", lambda request: HttpResponse(view())),)):
        assert Client(headers={"host": "127.0.0.1"}).get("/").status_code == 200
    assert seen == [False]
    assert ask(app).content == b"page"
    assert seen == [False, True]


WITH_ITS_OWN_ORM = """
import sqlite3
import sys
from contextlib import closing

from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="-",
    ROOT_URLCONF=__name__,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1], "ATOMIC_REQUESTS": True}},
)
from django.core.wsgi import get_wsgi_application
from django.db import connection
from django.http import HttpResponse
from django.urls import path
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

from sa_wsgi_session import SessionMiddleware, current_scope
from tests.support import request

Session = scoped_session(sessionmaker(create_engine(f"sqlite:///{sys.argv[2]}")))


def view(request):
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO note VALUES ('of Django')")
    Session.execute(text("INSERT INTO note VALUES ('of SQLAlchemy')"))
    current_scope().doom("as if its COMMIT had failed")
    return HttpResponse("page")


urlpatterns = [path("", view)]
for name in sys.argv[1:]:
    with closing(sqlite3.connect(name)) as database:
        database.execute("CREATE TABLE note (text)")
print(request(SessionMiddleware(get_wsgi_application(), Session)).status)
for name in sys.argv[1:]:
    with closing(sqlite3.connect(name)) as database:
        print(database.execute("SELECT text FROM note").fetchall())
"""


def test_the_transaction_of_its_own_orm_is_another_one_and_comes_first(tmp_path):
    script = tmp_path / "own_orm.py"
    script.write_text(WITH_ITS_OWN_ORM, encoding="utf-8")
    # In a process of its own, for one has one configuration of Django's.
    command = [sys.executable, str(script), str(tmp_path / "django.sqlite"), str(tmp_path / "ours.sqlite")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=SECONDS_TO_WAIT)
    assert done.stdout.splitlines() == ["200 OK", "[('of Django',)]", "[]"]
