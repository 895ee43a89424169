"""The guest book in Django: settings, URLs and ``wsgi.py`` in one file."""

# Django ships no types.
# mypy: allow-untyped-decorators, allow-subclassing-any

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.core.management.utils import get_random_secret_key
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, StreamingHttpResponse
from django.urls import path
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from examples.guest_book import BadEntry, Session, events, export, open_database, page, sign
from sa_wsgi_session import SessionMiddleware

# settings.py

settings.configure(
    ALLOWED_HOSTS=["localhost", "127.0.0.1"],
    DATA_UPLOAD_MAX_MEMORY_SIZE=10_000,  # bytes of a form
    # Not Django's own, which tells nobody of errors where there is no DEBUG and no ADMINS: to stderr.
    LOGGING_CONFIG=None,
    # CommonMiddleware is what refuses other hosts. There is no CsrfViewMiddleware: the form of the guest book has no
    # token. Where there are accounts, it has to be here.
    MIDDLEWARE=["django.middleware.common.CommonMiddleware", f"{__name__}.refuse_bad_entries"],
    ROOT_URLCONF=__name__,
    SECRET_KEY=get_random_secret_key(),
    WSGI_APPLICATION=f"{__name__}.application",  # what "runserver" serves
)

# views.py


class SeeOther(HttpResponseRedirect):  # type: ignore[misc, unused-ignore]
    status_code = 303


@require_http_methods(["GET", "HEAD", "POST"])
def book(request: HttpRequest) -> HttpResponse:
    if request.method == "POST":
        sign(request.POST)
        return SeeOther("/")
    return HttpResponse(page())


@require_POST
def fail(request: HttpRequest) -> HttpResponse:
    sign(request.POST)
    Session.flush()  # even what the database has been told is rolled back by an error status
    return HttpResponse("Nothing of it was kept.\n", status=409, content_type="text/plain")


@require_POST
def crash(request: HttpRequest) -> HttpResponse:
    sign(request.POST)
    Session.flush()
    raise RuntimeError("failed on purpose")


@require_GET
def export_csv(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(export(), content_type="text/csv; charset=utf-8")


@require_GET  # for a HEAD too, Django hands on the body, and a server reads it
def event_stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(events(), content_type="text/event-stream", headers={"Cache-Control": "no-store"})


class refuse_bad_entries:
    """A middleware of Django's, around the views."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self._get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        if isinstance(error, BadEntry):
            return HttpResponse(f"{error}\n", status=400, content_type="text/plain")
        return None


# urls.py

urlpatterns: list[Any] = [
    path("", book),
    path("fail", fail),
    path("crash", crash),
    path("export.csv", export_csv),
    path("events", event_stream),
]

# wsgi.py

open_database()
application = SessionMiddleware(get_wsgi_application(), Session)
