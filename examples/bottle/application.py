"""The guest book in Bottle."""

# Bottle ships no types.
# mypy: allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

from bottle import Bottle, abort, redirect, request, response

from examples.guest_book import BadEntry, Session, events, export, open_database, page, sign
from sa_wsgi_session import SessionMiddleware

LARGEST_FORM = 10_000  # bytes

app = Bottle()


@app.get("/")
def index() -> str:
    return page()


@app.post("/")
def add() -> None:
    sign(form())
    redirect("/", 303)


@app.post("/fail")
def fail() -> None:
    sign(form())
    Session.flush()  # even what the database has been told is rolled back by an error status
    abort(409, "Nothing of it was kept.")


@app.post("/crash")
def crash() -> None:
    sign(form())
    Session.flush()
    raise RuntimeError("failed on purpose")


@app.get("/export.csv")
def export_csv() -> Iterator[bytes]:
    response.content_type = "text/csv; charset=utf-8"
    return export()


@app.get("/events")
def event_stream() -> Iterator[bytes]:
    response.content_type = "text/event-stream"
    response.set_header("Cache-Control", "no-store")
    return events()


def form() -> Mapping[str, str]:
    # Before Bottle reads it: it would put any amount that is multipart or chunked into a temporary file.
    if request.chunked or request.content_length > LARGEST_FORM:
        abort(413, "That is too much.")
    try:
        return request.forms.decode()  # type: ignore[no-any-return]
    except UnicodeError as error:
        raise BadEntry("That is no text.") from error


@app.install
def refuse_bad_entries(view: Callable[..., Any]) -> Callable[..., Any]:
    """A plugin, around every route."""

    @wraps(view)
    def wrapped(**arguments: Any) -> Any:
        try:
            return view(**arguments)
        except BadEntry as error:
            abort(400, str(error))

    return wrapped


open_database()
application = SessionMiddleware(app, Session)
