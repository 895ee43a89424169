"""A request that may be replayed: what the application reads from ``wsgi.input``, each time."""

from __future__ import annotations

import dataclasses
import io
from contextlib import closing, suppress
from typing import Any

import pytest
from sqlalchemy.orm import sessionmaker

from sa_wsgi_session import RetryPolicy, SessionMiddleware
from tests.support import PLAIN, Body, World, request


class Lost(Exception):
    """A race was lost."""


POLICY = RetryPolicy(delay=0, max_body=100_000, is_transient=lambda error: isinstance(error, Lost))


class Upload:
    """An application that reads the body and loses the first race, and what it has read."""

    def __init__(self, world: World, read: Any = lambda stream: stream.read()) -> None:
        self.bodies: list[Any] = []
        self._read = read
        self._middleware = SessionMiddleware(self._app, world.Session, retry=POLICY)

    def _app(self, environ: Any, start_response: Any) -> Any:
        self.bodies.append(self._read(environ["wsgi.input"]))
        if len(self.bodies) == 1:
            raise Lost
        start_response("200 OK", PLAIN)
        return [b"read"]

    def send(self, body: bytes, **environ: Any) -> None:
        request(self._middleware, "/", "POST", **{"wsgi.input": Socket(body), **environ})


class Socket(io.BytesIO):
    """What a server reads a body from: neither rewound nor closed."""

    def seek(self, *args: Any) -> int:
        raise io.UnsupportedOperation("seek")

    def tell(self) -> int:
        raise io.UnsupportedOperation("tell")


SIZES = pytest.mark.parametrize("size", [0, 5, 20_000, 100_000])


@SIZES
def test_a_body_with_a_length_is_read_once_more(size, world):
    upload = Upload(world, lambda stream: stream.read(size))
    upload.send(b"x" * size + b"the next request", CONTENT_LENGTH=str(size))
    assert upload.bodies == [b"x" * size] * 2


@SIZES
def test_a_body_that_the_server_terminates_is_read_once_more(size, world):
    upload = Upload(world)
    upload.send(b"x" * size, **{"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"})
    assert upload.bodies == [b"x" * size] * 2


def test_half_a_body_was_read_and_the_rest_is_there(world):
    upload = Upload(world, lambda stream: stream.read(3))
    upload.send(b"abcdef", CONTENT_LENGTH="6")
    assert upload.bodies == [b"abc", b"abc"]


def test_a_body_of_unknown_length_that_is_too_large_is_whole_and_read_once(world):
    body = b"first line\n" + b"x" * 99_999 + b"\nlast line"

    def read(stream: Any) -> Any:
        return [stream.readline(), stream.read(7), *stream]

    upload = Upload(world, read)
    with pytest.raises(Lost):
        upload.send(body, **{"wsgi.input_terminated": True})
    assert upload.bodies == [[b"first line\n", b"x" * 7, b"x" * (99_999 - 7) + b"\n", b"last line"]]


@pytest.mark.parametrize("at_once", [1, 10, 100])
@pytest.mark.parametrize(("size", "attempts"), [(10, 2), (11, 1), (30, 1)])
def test_a_body_of_unknown_length_is_kept_up_to_the_limit_however_it_arrives(size, attempts, at_once):
    class Dribble(Socket):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(at_once if size is None or size < 0 else min(size, at_once))

    bodies: list[bytes] = []

    def app(environ: Any, start_response: Any) -> Any:
        bodies.append(b"".join(iter(lambda: environ["wsgi.input"].read(100), b"")))
        if len(bodies) == 1:
            raise Lost
        start_response("200 OK", PLAIN)
        return [b"read"]

    middleware = SessionMiddleware(app, sessionmaker(), retry=dataclasses.replace(POLICY, max_body=10))
    body = bytes(range(size))
    with suppress(Lost):
        request(middleware, "/", "POST", **{"wsgi.input": Dribble(body), "wsgi.input_terminated": True})
    assert bodies == [body] * attempts


MIB = 1024 * 1024


@pytest.mark.parametrize(("size", "in_memory"), [(1, True), (4 * MIB, True), (4 * MIB + 1, False)])
def test_a_body_that_is_kept_is_in_memory_up_to_four_mebibytes(size, in_memory):
    def app(environ: Any, start_response: Any) -> Any:
        with closing(environ["wsgi.input"]) as stream:
            try:
                stream.fileno()
            except io.UnsupportedOperation:
                kept.append(True)
            else:
                kept.append(False)
        start_response("200 OK", PLAIN)
        return [b"read"]

    kept: list[bool] = []
    middleware = SessionMiddleware(app, sessionmaker(), retry=dataclasses.replace(POLICY, max_body=size))
    request(middleware, "/", "POST", **{"wsgi.input": Socket(bytes(size)), "CONTENT_LENGTH": str(size)})
    assert kept == [in_memory]


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({"CONTENT_LENGTH": "100001"}, id="too large"),
        pytest.param({"CONTENT_LENGTH": "9" * 30}, id="far too large"),
        pytest.param({"CONTENT_LENGTH": "-1"}, id="negative"),
        pytest.param({"CONTENT_LENGTH": "six"}, id="no number"),
        pytest.param({"CONTENT_LENGTH": 4}, id="no text"),
        pytest.param({"CONTENT_LENGTH": "\u0663"}, id="a digit of another script"),
        pytest.param({"HTTP_TRANSFER_ENCODING": "chunked"}, id="nobody knows where it ends"),
    ],
)
def test_a_body_that_cannot_be_kept_is_left_alone(environ, world, caplog):
    upload = Upload(world, lambda stream: stream)
    body = Socket(b"body")
    with pytest.raises(Lost):
        request(upload._middleware, "/", "POST", **{"wsgi.input": body, **environ})
    assert upload.bodies == [body]
    assert body.read() == b"body"
    assert caplog.messages == []  # it is no failure


def test_a_request_without_a_body_has_nothing_read(world):
    for environ in {}, {"CONTENT_LENGTH": ""}, {"CONTENT_LENGTH": "0"}:
        upload = Upload(world, lambda stream: None)
        upload.send(b"the next request", **environ)
        assert len(upload.bodies) == 2


def test_a_server_that_terminates_every_body_has_none_in_a_get(world):
    upload = Upload(world, lambda stream: stream)
    body = Socket(b"")
    request(upload._middleware, "/", "GET", **{"wsgi.input": body, "wsgi.input_terminated": True})
    assert upload.bodies == [body, body]


def test_an_application_that_closes_the_body_is_not_replayed(world):
    upload = Upload(world, lambda stream: stream.close())
    with pytest.raises(Lost):
        upload.send(b"body", CONTENT_LENGTH="4")
    assert upload.bodies == [None]


@pytest.mark.parametrize(("finish", "attempts"), [("read", 2), ("close", 1)])
def test_what_a_failed_attempt_does_while_it_is_closed_counts_too(finish, attempts, world):
    bodies: list[bytes] = []

    def lose(chunk: bytes) -> bytes:
        raise Lost

    def app(environ: Any, start_response: Any) -> Any:
        stream = environ["wsgi.input"]
        bodies.append(stream.read(3))
        if len(bodies) == 1:
            # It fails with its first chunk, and frameworks read what is left of the body when they are done.
            return Body(map(lose, [b"first chunk"]), getattr(stream, finish))
        start_response("200 OK", PLAIN)
        return [b"done"]

    middleware = SessionMiddleware(app, world.Session, retry=POLICY)
    environ = {"wsgi.input": Socket(b"abcdef"), "CONTENT_LENGTH": "6"}
    if attempts == 2:
        assert request(middleware, "/", "POST", **environ).content == b"done"
    else:
        with pytest.raises(Lost):
            request(middleware, "/", "POST", **environ)
    assert bodies == [b"abc"] * attempts


def test_a_client_that_hangs_up_halfway_meets_no_application(world):
    upload = Upload(world)
    with pytest.raises(OSError, match="3 more bytes were expected"):
        upload.send(b"bo", CONTENT_LENGTH="5")
    assert upload.bodies == []
