"""The guest book in web.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import web

from examples.guest_book import BadEntry, Session, events, export, open_database, page, sign
from sa_wsgi_session import SessionMiddleware

web.config.debug = False  # else web.py's error page shows the code, and the values in it, to everybody

LARGEST_FORM = 10_000  # bytes


class Book:
    def GET(self) -> str:
        web.header("Content-Type", "text/html; charset=utf-8")
        return page()

    def POST(self) -> None:
        sign_with_form()
        raise web.seeother("/")  # in web.py this is an exception; to the middleware it is a 303, a success


class Fail:
    def POST(self) -> None:
        sign_with_form()
        Session.flush()  # even what the database has been told is rolled back by an error status
        raise web.conflict("Nothing of it was kept.")


class Crash:
    def POST(self) -> None:
        sign_with_form()
        Session.flush()
        raise RuntimeError("failed on purpose")


class Export:
    def GET(self) -> Iterator[bytes]:
        web.header("Content-Type", "text/csv; charset=utf-8")
        return export()


class Events:
    def GET(self) -> Iterator[bytes]:
        web.header("Content-Type", "text/event-stream")
        web.header("Cache-Control", "no-store")
        return events()

    def HEAD(self) -> None:
        raise web.nomethod()  # else web.py runs GET, and the server reads a body without an end


def sign_with_form() -> None:
    # Not in a processor of the application: what is no web.HTTPError is a 500 by the time it gets there.
    try:
        sign(form())
    except BadEntry as error:
        raise web.badrequest(web.websafe(str(error))) from error


def form() -> Mapping[str, str]:
    # web.py reads a form of any size.
    environ = web.ctx.env
    if web.intget(environ.get("CONTENT_LENGTH"), 0) > LARGEST_FORM or environ.get("HTTP_TRANSFER_ENCODING"):
        raise web.HTTPError("413 Content Too Large", {"Content-Type": "text/plain"}, "That is too much.")
    try:
        fields = web.input(_method="post", name="", text="")
    except ValueError as error:  # no UTF-8
        raise BadEntry("That is no text.") from error
    # What was sent as a file comes as bytes, which SQLite would keep as such, and no page could show.
    return {name: value for name, value in fields.items() if isinstance(value, str)}


app = web.application(
    ("/", "Book", "/fail", "Fail", "/crash", "Crash", "/export.csv", "Export", "/events", "Events"), globals()
)

open_database()
application = SessionMiddleware(app.wsgifunc(), Session)
