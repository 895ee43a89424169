"""The guest book in Falcon."""

from __future__ import annotations

from typing import Any

import falcon
from falcon import Request, Response

from examples.guest_book import BadEntry, Session, events, export, open_database, page, sign
from sa_wsgi_session import SessionMiddleware

LARGEST_FORM = 10_000  # bytes


class Book:
    def on_get(self, req: Request, resp: Response) -> None:
        resp.content_type = falcon.MEDIA_HTML
        resp.text = page()

    def on_post(self, req: Request, resp: Response) -> None:
        sign(form(req))
        raise falcon.HTTPSeeOther("/")  # to Falcon an exception; to the middleware a 303, a success


class Fail:
    def on_post(self, req: Request, resp: Response) -> None:
        sign(form(req))
        Session.flush()  # even what the database has been told is rolled back by an error status
        raise falcon.HTTPConflict(description="Nothing of it was kept.")


class Crash:
    def on_post(self, req: Request, resp: Response) -> None:
        sign(form(req))
        Session.flush()
        raise RuntimeError("failed on purpose")


class Export:
    def on_get(self, req: Request, resp: Response) -> None:
        resp.content_type = "text/csv; charset=utf-8"
        resp.stream = export()


class Events:
    def on_get(self, req: Request, resp: Response) -> None:
        resp.content_type = "text/event-stream"
        resp.cache_control = ["no-store"]
        resp.stream = events()


def form(req: Request) -> dict[str, str]:
    if (req.content_length or 0) > LARGEST_FORM:  # Falcon has no limit of its own
        raise falcon.HTTPContentTooLarge
    # A field that came more than once is a list.
    return {name: value if isinstance(value, str) else value[-1] for name, value in req.get_media().items()}


def refuse_bad_entry(req: Request, resp: Response, error: BadEntry, params: dict[str, Any]) -> None:
    raise falcon.HTTPBadRequest(description=str(error))


app = falcon.App()
app.add_route("/", Book())
app.add_route("/fail", Fail())
app.add_route("/crash", Crash())
app.add_route("/export.csv", Export())
app.add_route("/events", Events())
app.add_error_handler(BadEntry, refuse_bad_entry)
# Forms only: of JSON, get_media() might be anything.
app.req_options.media_handlers = falcon.media.Handlers({falcon.MEDIA_URLENCODED: falcon.media.URLEncodedFormHandler()})

open_database()
# The type checker alone complains: Falcon declares that write() returns None, which nobody promises.
application = SessionMiddleware(app, Session)
