"""The guest book as a plain WSGI application: a function for each path, and nothing in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

from examples.guest_book import BadEntry, Session, events, export, open_database, page, sign
from sa_wsgi_session import SessionMiddleware

LARGEST_FORM = 10_000  # bytes


def index(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
    return [page().encode()]


def add(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    sign(_form(environ))
    start_response("303 See Other", [("Location", "/")])
    return []


def fail(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    sign(_form(environ))
    Session.flush()  # even what the database has been told is rolled back by an error status
    start_response("409 Conflict", [("Content-Type", "text/plain")])
    return [b"Nothing of it was kept.\n"]


def crash(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    sign(_form(environ))
    Session.flush()
    raise RuntimeError("failed on purpose")


def export_csv(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/csv; charset=utf-8")])
    return export()


def event_stream(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")])
    return events()


VIEWS = {
    ("GET", "/"): index,
    ("POST", "/"): add,
    ("POST", "/fail"): fail,
    ("POST", "/crash"): crash,
    ("GET", "/export.csv"): export_csv,
    ("GET", "/events"): event_stream,
}


def guest_book(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    path = environ["PATH_INFO"]
    view = VIEWS.get((environ["REQUEST_METHOD"], path))
    if view is None:
        known = any(path == other for _, other in VIEWS)
        start_response("405 Method Not Allowed" if known else "404 Not Found", [("Content-Type", "text/plain")])
        return [b"There is no such page.\n"]
    try:
        return view(environ, start_response)
    except BadEntry as error:
        start_response("400 Bad Request", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{error}\n".encode()]


def _form(environ: dict[str, Any]) -> dict[str, str]:
    try:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length) if 0 <= length <= LARGEST_FORM else b""
        if len(body) != length:
            raise ValueError("it is too long, or its sender has left in the middle of it")
        return dict(parse_qsl(body.decode(), max_num_fields=10))
    except ValueError as error:
        raise BadEntry("That is no form.") from error


open_database()
application = SessionMiddleware(guest_book, Session)
