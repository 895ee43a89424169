"""The guest book in CherryPy: a class for each resource, a method for each HTTP method."""

# CherryPy ships no types.
# mypy: allow-untyped-decorators

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import cherrypy
from cherrypy._cpreqbody import process_urlencoded

from examples.guest_book import BadEntry, Session, events, export, open_database, page, sign
from sa_wsgi_session import SessionMiddleware

LARGEST_FORM = 10_000  # bytes; what is beyond is answered with 413

# A guest in somebody else's server: no reloader, no signal handlers, no tracebacks in error pages.
cherrypy.config.update({"environment": "embedded"})
# That setting is read with the configuration of the resource; what fails before, a request without Host, has this one.
cherrypy.Application.request_class.show_tracebacks = False
# "embedded" turns the log off. What is swallowed into a 500 page should be seen somewhere.
cherrypy.log.error_log.addHandler(logging.StreamHandler())

CONFIG = {
    "/": {
        "request.dispatch": cherrypy.dispatch.MethodDispatcher(),
        "request.body.maxbytes": LARGEST_FORM,
        # The form of the page and no other. What CherryPy would try to decode, but cannot, would be a 500.
        "request.body.processors": {"application/x-www-form-urlencoded": process_urlencoded},
        "request.body.attempt_charsets": ["utf-8"],
        # All is UTF-8 already. On by default, it puts a generator of its own around what is streamed as text.
        "tools.encode.on": False,
        "response.headers.Content-Type": "text/html; charset=utf-8",
    }
}


def sign_with(form: dict[str, Any]) -> None:
    body = cherrypy.request.body
    with cherrypy.HTTPError.handle(BadEntry, 400):
        # A field that comes twice is a list; and CherryPy takes a form for whole whose sender has gone halfway.
        if body.fp.bytes_read != body.length or not all(isinstance(value, str) for value in form.values()):
            raise BadEntry("That is no form.")
        sign(form)


@cherrypy.expose
class Fail:
    def POST(self, /, **form: Any) -> None:
        sign_with(form)
        Session.flush()  # even what the database has been told is rolled back by an error status
        raise cherrypy.HTTPError(409, "Nothing of it was kept.")


@cherrypy.expose
class Crash:
    def POST(self, /, **form: Any) -> None:
        sign_with(form)
        Session.flush()
        raise RuntimeError("failed on purpose")


@cherrypy.expose
class Export:
    @cherrypy.config(**{"response.stream": True})  # else it would be put together in memory first
    def GET(self) -> Iterator[bytes]:
        cherrypy.response.headers["Content-Type"] = "text/csv; charset=utf-8"
        return export()


@cherrypy.expose
class Events:
    @cherrypy.config(**{"response.stream": True})
    def GET(self) -> Iterator[bytes]:
        cherrypy.response.headers.update({"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        return events()


@cherrypy.expose
class GuestBook:
    fail = Fail()
    crash = Crash()
    export_csv = Export()  # the dispatcher reads a dot as an underscore
    events = Events()

    def GET(self) -> bytes:
        return page().encode()

    def POST(self, /, **form: Any) -> None:
        sign_with(form)
        raise cherrypy.HTTPRedirect("/", 303)  # an exception in CherryPy; to the middleware it is a 303, a success


open_database()
application = SessionMiddleware(cherrypy.Application(GuestBook(), config=CONFIG), Session)
