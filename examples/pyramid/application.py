"""The guest book in Pyramid. The middleware is not here: it stands before this in the pipeline of development.ini."""

# Pyramid ships no types.
# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any

from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPConflict, HTTPNotFound, HTTPSeeOther
from pyramid.request import Request
from pyramid.response import Response
from pyramid.view import exception_view_config, notfound_view_config, view_config

from examples.guest_book import BadEntry, Session, events, export, open_database, page, sign

LARGEST_FORM = 10_000  # bytes; what is beyond is not read


@view_config(route_name="index", request_method="GET")
def index(request: Request) -> Response:
    return Response(page())


@view_config(route_name="index", request_method="POST")
def add(request: Request) -> Response:
    sign(read_form(request))
    return HTTPSeeOther(request.route_path("index"))


@view_config(route_name="fail", request_method="POST")
def fail(request: Request) -> None:
    sign(read_form(request))
    Session.flush()  # even what the database has been told is rolled back by an error status
    raise HTTPConflict("Nothing of it was kept.")


@view_config(route_name="crash", request_method="POST")
def crash(request: Request) -> None:
    sign(read_form(request))
    Session.flush()
    raise RuntimeError("failed on purpose")


@view_config(route_name="export", request_method="GET")
def export_csv(request: Request) -> Response:
    return Response(app_iter=export(), content_type="text/csv", charset="utf-8")


@view_config(route_name="events", request_method="GET")
def event_stream(request: Request) -> Response:
    return Response(app_iter=events(), content_type="text/event-stream", cache_control="no-store")


@exception_view_config(BadEntry)
def bad_entry(error: BadEntry, request: Request) -> Response:
    return Response(f"{error}\n", 400, content_type="text/plain", charset="utf-8")


@notfound_view_config()
def not_found(request: Request) -> Response:
    return HTTPNotFound()  # that of Pyramid tells which predicate did not match


def read_form(request: Request) -> dict[str, str]:
    """The fields of the form, read only if it is small, and encoded as the page's own form is."""
    try:
        size, kind = request.content_length, request.content_type
        if not size or size > LARGEST_FORM or kind != "application/x-www-form-urlencoded":
            raise BadEntry("That is no form.")
        return dict(request.POST)
    except (OSError, ValueError, DeprecationWarning) as error:  # of WebOb: cut off; no number; not in UTF-8
        raise BadEntry("That is no form.") from error


def main(global_config: dict[str, str], **settings: Any) -> Any:
    """The application, as PasteDeploy makes it of ``[app:guest_book]``."""
    open_database(settings["sqlalchemy.url"])
    with Configurator(settings=settings) as config:
        config.add_route("index", "/")
        config.add_route("fail", "/fail")
        config.add_route("crash", "/crash")
        config.add_route("export", "/export.csv")
        config.add_route("events", "/events")
        config.scan(__name__)
        return config.make_wsgi_app()
