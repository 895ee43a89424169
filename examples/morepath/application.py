"""The guest book in Morepath: a model, and its views."""

from __future__ import annotations

from typing import Any

import morepath
from morepath import Request, Response
from webob.exc import HTTPConflict, HTTPSeeOther

from examples.guest_book import BadEntry, Session, events, export, open_database, page, sign
from sa_wsgi_session import SessionMiddleware

LARGEST_FORM = 10_000  # bytes; what is beyond is not read


class App(morepath.App):
    pass


@App.path(path="")
class GuestBook:
    pass


@App.html(model=GuestBook)
def index(self: GuestBook, request: Request) -> str:
    return page()


@App.view(model=GuestBook, request_method="POST")
def add(self: GuestBook, request: Request) -> HTTPSeeOther:
    sign(read_form(request))
    return HTTPSeeOther(location=request.link(self))


@App.view(model=GuestBook, name="fail", request_method="POST")
def fail(self: GuestBook, request: Request) -> None:
    sign(read_form(request))
    Session.flush()  # even what the database has been told is rolled back by an error status
    raise HTTPConflict("Nothing of it was kept.")


@App.view(model=GuestBook, name="crash", request_method="POST")
def crash(self: GuestBook, request: Request) -> None:
    sign(read_form(request))
    Session.flush()
    raise RuntimeError("failed on purpose")


@App.view(model=GuestBook, name="export.csv")
def export_csv(self: GuestBook, request: Request) -> Response:
    return Response(app_iter=export(), content_type="text/csv", charset="utf-8")


@App.view(model=GuestBook, name="events")
def event_stream(self: GuestBook, request: Request) -> Response:
    return Response(app_iter=events(), content_type="text/event-stream", cache_control="no-store")


@App.view(model=BadEntry)
def bad_entry(self: BadEntry, request: Request) -> Response:
    return Response(f"{self}\n", 400, content_type="text/plain", charset="utf-8")


def read_form(request: Request) -> dict[str, Any]:
    """The fields of the form, read only if it is small, and encoded as the page's own form is."""
    try:
        size, kind = request.content_length, request.content_type
        if not size or size > LARGEST_FORM or kind != "application/x-www-form-urlencoded":
            raise BadEntry("That is no form.")
        return dict(request.POST.items())
    except (OSError, ValueError, DeprecationWarning) as error:  # of WebOb: cut off; no number; not in UTF-8
        raise BadEntry("That is no form.") from error


open_database()
App.commit()
application = SessionMiddleware(App(), Session)
