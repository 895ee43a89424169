"""gevent without monkey-patching: the greenlets of all requests share one thread, and so its thread-locals.

gevent's own server serves, and its clients switch in the middle of their work, as often as they can.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import gevent
import pytest
from gevent import socket as gevent_socket
from gevent.pywsgi import WSGIServer
from sqlalchemy import select
from sqlalchemy.engine import URL

from sa_wsgi_session import NoActiveScope, SessionMiddleware, session_scope
from tests.support import PLAIN, REGISTRIES, Note, World, note

CLIENTS = 12
REQUESTS = 5  # of each client


@contextmanager
def gevent_server(app: Any) -> Iterator[int]:
    """Serve *app* on this thread's hub; yields the port."""
    server = WSGIServer(("127.0.0.1", 0), app, log=None, error_log=None)
    server.start()
    try:
        yield server.server_port
    finally:
        server.stop(timeout=5)


def get(port: int, path: str) -> tuple[str, bytes]:
    with closing(gevent_socket.create_connection(("127.0.0.1", port))) as client:
        client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b""
        while data := client.recv(65536):
            answer += data
    head, _, content = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode().partition(" ")[2], content


def run_clients(port: int, *kinds: str) -> dict[str, tuple[str, bytes]]:
    """All clients at once; what each path (without its slash) was answered."""
    answers: dict[str, tuple[str, bytes]] = {}

    def client(number: int) -> None:
        for count in range(REQUESTS):
            for kind in kinds:
                path = f"{kind}-{number}-{count}"
                answers[path] = get(port, f"/{path}")

    clients = [gevent.spawn(client, number) for number in range(CLIENTS)]
    gevent.joinall(clients, raise_error=True)
    return answers


class Switching:
    """Adds a note for each request, and lets others run after each step; notes who met whose session."""

    def __init__(self, Session: Any) -> None:
        self.Session = Session
        self.shared = 0
        self._random = random.Random(3)

    def switch(self) -> None:
        gevent.sleep(self._random.choice([0, 0, 0.001]))

    def __call__(self, environ: Any, start_response: Any) -> Any:
        text = environ["PATH_INFO"].strip("/")
        session = self.Session()
        self.switch()
        self.shared += self.Session() is not session
        self.Session.add(note(text))
        self.switch()
        self.shared += self.Session() is not session
        self.shared += any(each.text != text for each in self.Session.new)
        self.Session.flush()
        status = "409 Conflict" if "bad" in text else "200 OK"
        start_response(status, PLAIN)
        return self.body(text) if "stream" in text else [text.encode()]

    def body(self, text: str) -> Iterator[bytes]:
        session = self.Session()
        for _ in range(3):
            self.switch()
            self.shared += self.Session() is not session
            yield self.Session.execute(select(Note.text).where(Note.text == text)).scalars().first().encode()


@pytest.fixture(params=REGISTRIES[:2])
def world(request: pytest.FixtureRequest, postgresql_url: URL) -> Iterator[World]:
    """With a connection for each client: who waits for one here, or for SQLite's lock, makes all greenlets wait."""
    with closing(World(postgresql_url, request.param, pool_size=CLIENTS)) as world:
        yield world


@pytest.mark.parametrize("world", ["contextual"], indirect=True)
def test_requests_that_switch_amid_their_work_never_share_a_contextual_session(world: World) -> None:
    app = Switching(world.Session)
    with gevent_server(SessionMiddleware(app, world.Session)) as port:
        answers = run_clients(port, "good", "bad", "stream")
    assert app.shared == 0
    assert len(answers) == 3 * CLIENTS * REQUESTS
    for path, (status, content) in answers.items():
        assert status == ("409 Conflict" if "bad" in path else "200 OK")
        assert content == path.encode() * (3 if "stream" in path else 1)
    assert world.durable() == sorted(path for path in answers if "bad" not in path)
    assert world.checked_out == 0


@pytest.mark.parametrize("world", ["thread-local"], indirect=True)
def test_they_do_share_a_plain_scoped_session(world: World) -> None:
    """Why the other one is there: unpatched, the requests of a thread meet in the session that belongs to it."""
    app = Switching(world.Session)
    with gevent_server(SessionMiddleware(app, world.Session)) as port:
        answers = run_clients(port, "good")
    assert app.shared > 0
    assert len(answers) == CLIENTS * REQUESTS


@pytest.mark.parametrize("world", ["contextual"], indirect=True)
def test_a_greenlet_that_a_request_spawns_has_a_unit_of_work_of_its_own(world: World) -> None:
    def add(text: str) -> None:
        with session_scope(world.Session) as session:
            session.add(note(text))
            gevent.sleep()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        world.Session.add(note("the request's"))
        with pytest.raises(NoActiveScope):
            gevent.spawn(world.Session).get()
        gevent.joinall([gevent.spawn(add, "one"), gevent.spawn(add, "another")], raise_error=True)
        start_response("409 Conflict", PLAIN)
        return [b"their work is kept, the request's is not"]

    with gevent_server(SessionMiddleware(app, world.Session)) as port:
        assert get(port, "/")[0] == "409 Conflict"
    assert world.durable() == ["another", "one"]
    assert world.checked_out == 0


@pytest.mark.parametrize("world", ["contextual"], indirect=True)
def test_a_request_that_gevent_times_out_is_rolled_back(world: World) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", PLAIN)
        with gevent.Timeout(0.01):
            world.Session.add(note("too slow"))
            world.Session.flush()
            gevent.sleep(60)
        return []

    with gevent_server(SessionMiddleware(app, world.Session)) as port:
        assert get(port, "/")[0] == "500 Internal Server Error"
    assert world.durable() == []
    assert world.checked_out == 0
