"""The guest book in TurboGears 2."""

# TurboGears ships no types.
# mypy: allow-untyped-decorators, allow-subclassing-any

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tg import MinimalApplicationConfigurator, TGController, abort, expose, redirect, request, response
from tg.appwrappers.base import ApplicationWrapper
from tg.util import Bunch
from webob.exc import HTTPBadRequest, HTTPSeeOther

from examples.guest_book import BadEntry, Session, events, export, open_database, page, sign
from sa_wsgi_session import SessionMiddleware

LARGEST_FORM = 10_000  # bytes; what is beyond is not read


class RootController(TGController):
    @expose(allowed_methods=["GET", "POST"])
    def index(self) -> str:
        if request.method == "POST":
            sign(request.POST)
            redirect("/", redirect_with=HTTPSeeOther)
        return page()

    @expose(allowed_methods=["POST"])
    def fail(self) -> None:
        sign(request.POST)
        Session.flush()  # even what the database has been told is rolled back by an error status
        abort(409, "Nothing of it was kept.")

    @expose(allowed_methods=["POST"])
    def crash(self) -> None:
        sign(request.POST)
        Session.flush()
        raise RuntimeError("failed on purpose")

    @expose(allowed_methods=["GET"], content_type="text/csv")
    def export_csv(self) -> Iterator[bytes]:  # the dispatcher reads a dot as an underscore
        return export()

    @expose(allowed_methods=["GET"], content_type="text/event-stream")
    def events(self) -> Iterator[bytes]:
        response.cache_control = "no-store"
        return events()


class GoodForms(ApplicationWrapper):
    """Answers what is no form, or no entry, with a 400. TurboGears reads the form before it calls a controller."""

    def __call__(self, controller: Any, environ: dict[str, Any], context: Any) -> Any:
        try:
            check_form(context.request)
            return self.next_handler(controller, environ, context)
        except BadEntry as error:
            return HTTPBadRequest(str(error))


def check_form(request: Any) -> None:
    """Let no form be read unless it is small, and encoded as the page's own form is."""
    try:
        size, kind = request.content_length, request.content_type
        if request.method == "POST" and (
            not size or size > LARGEST_FORM or kind != "application/x-www-form-urlencoded"
        ):
            raise BadEntry("That is no form.")
        request.params.mixed()
    except (OSError, ValueError, DeprecationWarning) as error:  # of WebOb: cut off; no number; not in UTF-8
        raise BadEntry("That is no form.") from error


configurator = MinimalApplicationConfigurator()
configurator.update_blueprint(
    {
        "root_controller": RootController(),
        # The whole path is the name of the controller's method: export.csv is not "export" that is asked for as CSV.
        "disable_request_extensions": True,
        # By default TurboGears makes a generator of every body, which tidies up at its end: it cannot do so on another
        # thread, and does not where the body is closed before its first chunk. Without it, the body is what it is.
        "registry_streaming": False,
        # Nothing here is rendered by a template; TurboGears warns where it has to guess that.
        "renderers": ["json"],
        "default_renderer": "json",
        "app_globals": Bunch,
        "helpers": Bunch(),
    }
)
configurator.register_application_wrapper(GoodForms)

open_database()
application = SessionMiddleware(configurator.make_wsgi_app(), Session)
