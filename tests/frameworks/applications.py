"""The smallest application of each framework, and in what the frameworks differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import bottle
import cherrypy
import falcon
import flask
import morepath
import tg
import web
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.urls import path
from pyramid.config import Configurator
from pyramid.response import Response

from sa_wsgi_session import SessionMiddleware
from tests.support import PLAIN, World

#: What a page is made by: it returns a ``str``, or an iterator of chunks, which is to be streamed.
View = Callable[[], Any]


def make_plain_wsgi(view: View) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        body = view()
        start_response("200 OK", PLAIN)
        return [body.encode()] if isinstance(body, str) else body

    return app


def make_flask(view: View) -> flask.Flask:
    app = flask.Flask("tests")
    app.add_url_rule("/", view_func=view, endpoint="view")
    return app


def make_bottle(view: View) -> Any:
    app = bottle.Bottle()
    app.get("/", callback=view)
    return app


def make_pyramid(view: View, configure: Callable[[Any], object] = lambda config: None) -> Any:
    def pyramid_view(request: Any) -> Response:
        body = view()
        return Response(body) if isinstance(body, str) else Response(app_iter=body)

    with Configurator() as config:
        config.add_route("index", "/")
        config.add_view(pyramid_view, route_name="index")
        configure(config)
        return config.make_wsgi_app()


def make_falcon(view: View, **options: Any) -> Any:
    class Page:
        def on_get(self, req: Any, resp: Any) -> None:
            body = view()
            if isinstance(body, str):
                resp.text = body
            else:
                resp.stream = body

        on_head = on_get

    app: Any = falcon.App(**options)
    app.add_route("/", Page())
    return app


def make_django(view: View) -> Any:
    """The view may be ``async def``, or return a response of Django's."""
    import_module("examples.django.application")  # A process has one configuration of Django's.
    from django.test import override_settings  # which can be imported only now

    def response_of(body: Any) -> Any:
        if isinstance(body, HttpResponseBase):
            return body
        return HttpResponse(body) if isinstance(body, str) else StreamingHttpResponse(body)

    async def async_view(request: Any) -> Any:
        return response_of(await view())

    urls = (path("", async_view if inspect.iscoroutinefunction(view) else lambda request: response_of(view())),)
    handler = get_wsgi_application()

    def app(environ: Any, start_response: Any) -> Any:
        with override_settings(ROOT_URLCONF=urls):
            return handler(environ, start_response)

    return app


def make_cherrypy(view: View, *, stream: bool = True) -> Any:
    class Root:
        @cherrypy.expose
        def index(self) -> Any:
            body = view()
            if isinstance(body, str):
                return body.encode()
            cherrypy.response.stream = stream
            return body

    config = {"request.show_tracebacks": False, "tools.encode.on": False}
    return cherrypy.Application(Root(), config={"/": config})


def make_turbogears(
    view: View,
    *,
    root: type[tg.TGController] = tg.TGController,
    registry_streaming: bool = False,
    configure: Callable[[Any], object] = lambda configurator: None,
    **settings: Any,
) -> Any:
    class Root(root):
        @tg.expose()
        def index(self) -> Any:
            return view()

    configurator = tg.MinimalApplicationConfigurator()
    configurator.update_blueprint({"root_controller": Root(), "registry_streaming": registry_streaming, **settings})
    configure(configurator)
    return configurator.make_wsgi_app()


def make_morepath(view: View, configure: Callable[[Any], object] = lambda app_class: None) -> Any:
    class App(morepath.App):
        pass

    @App.path(path="")
    class Root:
        pass

    @App.view(model=Root)
    def morepath_view(self: Root, request: Any) -> Any:
        body = view()
        return body if isinstance(body, str) else morepath.Response(app_iter=body)

    configure(App)
    App.commit()
    return App()


def make_webpy(view: View, *processors: Callable[[Callable[[], Any]], Any]) -> Any:
    web.config.debug = False
    page = type("Page", (), {"GET": staticmethod(view)})
    app = web.application(("/", "Page"), {"Page": page})
    for processor in processors:
        app.add_processor(processor)
    return app.wsgifunc()


@dataclass(frozen=True, kw_only=True)
class Framework:
    #: The folder of its guest book.
    name: str
    #: The module with the ``application`` of its guest book.
    module: str = "application"
    make: Callable[..., Any]

    #: Whether a page reaches the middleware as a list, so that its session is removed before the server gets it.
    page_is_a_list: bool
    #: Whether a generator is asked for its first chunk before ``start_response`` is called.
    pulls_first_chunk: bool = False
    #: Whether an exception before the first chunk becomes a 500.
    catches_before_first_chunk: bool = False
    #: Which exceptions of a view go on to the server; the others become a 500.
    lets_through: tuple[type[BaseException], ...]
    #: Whether a generator is closed when the visitor hangs up, or else is left to the garbage collector...
    closes: bool = True
    #: ... and whether it is on another thread than that of the call, too.
    closes_on_another_thread: bool = True
    #: What is done with an iterator of two chunks for a HEAD of it; ``None`` where there is no HEAD.
    head_of_iterator: tuple[str, ...] | None
    #: Whether what it reads for a HEAD is handed on to the server.
    head_has_body: bool = False

    #: Whether two requests may take turns on one thread.
    takes_turns: bool = True

    # What its guest book answers.
    head_of_page: int = 200
    head_of_export: int = 200
    head_of_events: int = 200
    wrong_method: int = 405
    form_of_wrong_type: int = 400
    form_too_large: int = 400
    #: How many bytes of that are read.
    reads_at_most: int = 20_000
    #: Of a form without an end, in chunks: URL-encoded, and multipart. Most take what has no length for empty.
    form_in_chunks: tuple[int, int] = (400, 400)
    query_not_in_utf8: int = 400
    #: Which one counts of a field that comes twice: 0, or 1; ``None`` where that is refused.
    of_two_fields: int | None = 1

    def serve(self, world: World, view: View, **options: Any) -> Any:
        """Make the application, with the middleware where the README has it."""
        app = self.make(view, **options)
        if self.name == "flask":
            app.wsgi_app = SessionMiddleware(app.wsgi_app, world.Session)
            return app
        return SessionMiddleware(app, world.Session)


EVERYTHING = (BaseException,)


class Abandon(BaseException):
    """As a timeout of gevent's is: nothing that one may swallow."""


#: What is no ``Exception``.
NO_EXCEPTIONS = (SystemExit, KeyboardInterrupt, Abandon)

FRAMEWORKS = {
    framework.name: framework
    for framework in (
        Framework(
            name="plain_wsgi",
            make=make_plain_wsgi,
            page_is_a_list=True,
            lets_through=EVERYTHING,
            head_of_iterator=None,
            head_of_page=405,
            head_of_export=405,
            head_of_events=405,
        ),
        Framework(
            name="flask",
            make=make_flask,
            page_is_a_list=False,
            lets_through=NO_EXCEPTIONS,
            head_of_iterator=("closed",),
            form_too_large=413,
            form_in_chunks=(400, 413),  # Werkzeug cuts the former off, and finds no text in it
            of_two_fields=0,
        ),
        Framework(
            name="bottle",
            make=make_bottle,
            page_is_a_list=True,
            pulls_first_chunk=True,
            catches_before_first_chunk=True,
            lets_through=(*NO_EXCEPTIONS, MemoryError),
            head_of_iterator=("read", "closed"),
            form_too_large=413,
            form_in_chunks=(413, 413),
        ),
        Framework(
            name="pyramid",
            module="wsgi",
            make=make_pyramid,
            page_is_a_list=True,
            lets_through=EVERYTHING,
            head_of_iterator=("closed",),
            wrong_method=404,
        ),
        Framework(
            name="falcon",
            make=make_falcon,
            page_is_a_list=True,
            lets_through=NO_EXCEPTIONS,
            head_of_iterator=(),
            head_of_page=405,
            head_of_export=405,
            head_of_events=405,
            form_too_large=413,
            form_in_chunks=(400, 415),
            form_of_wrong_type=415,
        ),
        Framework(
            name="django",
            make=make_django,
            page_is_a_list=False,
            lets_through=NO_EXCEPTIONS,
            head_of_iterator=("read", "read", "closed"),
            head_has_body=True,
            head_of_export=405,
            head_of_events=405,
            reads_at_most=65_536,
        ),
        Framework(
            name="cherrypy",
            make=make_cherrypy,
            page_is_a_list=False,
            lets_through=NO_EXCEPTIONS,
            closes_on_another_thread=False,
            head_of_iterator=(),
            form_too_large=413,
            form_in_chunks=(413, 400),
            query_not_in_utf8=404,
            of_two_fields=None,
        ),
        Framework(
            name="turbogears",
            make=make_turbogears,
            page_is_a_list=True,
            lets_through=EVERYTHING,
            head_of_iterator=("closed",),
        ),
        Framework(
            name="morepath",
            make=make_morepath,
            page_is_a_list=True,
            lets_through=EVERYTHING,
            head_of_iterator=None,
            head_of_page=405,
            head_of_export=405,
            head_of_events=405,
        ),
        Framework(
            name="webpy",
            make=make_webpy,
            page_is_a_list=False,
            pulls_first_chunk=True,
            lets_through=(SystemExit, KeyboardInterrupt),
            closes=False,
            closes_on_another_thread=False,
            head_of_iterator=("read", "read"),
            head_has_body=True,
            takes_turns=False,
            head_of_events=405,
            form_too_large=413,
            form_in_chunks=(413, 413),
        ),
    )
}
