"""What any site with forms needs, and what has nothing to do with sessions of SQLAlchemy.

Three things: response headers, a friendly page for an exception that nobody caught, and the check
that a form was sent from our own page.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from webob import Request, Response
from webob.cookies import SignedCookieProfile

from . import pages

WSGIApplication = Callable[[dict[str, Any], Any], Iterable[bytes]]

_logger = logging.getLogger(__name__)

SECURITY_HEADERS = [
    (
        "Content-Security-Policy",
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    # Not "no-referrer": with it a browser sends "Origin: null" with our own forms.
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]


class SecurityHeaders:
    """WSGI middleware: the headers above on every response, whoever made it."""

    def __init__(self, application: WSGIApplication) -> None:
        self.application = application

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            return start_response(status, [*headers, *SECURITY_HEADERS], *exc_info)

        return self.application(environ, start)


class ErrorPage:
    """WSGI middleware: a page instead of an exception. It stays *outside* of the SessionMiddleware.

    The SessionMiddleware must see the exception, or it would see a response and judge that.
    """

    def __init__(self, application: WSGIApplication) -> None:
        self.application = application

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        try:
            return self.application(environ, start_response)
        except Exception as error:
            _logger.error(
                "%s %s ended in an exception",
                environ["REQUEST_METHOD"],
                environ["PATH_INFO"],
                exc_info=True,
            )
            page = Response(pages.unexpected(type(error).__name__), status=500)
            page.cache_control = "no-store"
            body: Iterable[bytes] = page(environ, start_response)
            return body


class Forgery(Exception):
    """A form that may not come from our own page. The text is for the person who sent it."""


class FormGuard:
    """Protects forms against forgery from other sites.

    The token of a form must be the one in the visitor's signed cookie, and a browser that tells
    where the form was sent from must name this very site.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_hex(64)

    def token(self, request: Request) -> str:
        """The visitor's token: the one in the cookie, else a new one."""
        known = self._cookie(request, "token").get_value()
        return known if isinstance(known, str) else secrets.token_urlsafe(32)

    def remember(self, request: Request, response: Response, token: str) -> None:
        self._cookie(request, "token").set_cookies(response, token)

    def check(self, request: Request) -> None:
        """Raise :class:`Forgery` unless the form was sent from a page of ours."""
        site = request.headers.get("Sec-Fetch-Site", "same-origin")
        origin = request.headers.get("Origin", request.host_url)
        if site not in ("same-origin", "none") or origin != request.host_url:
            raise Forgery("This form was sent from another site.")
        known = self._cookie(request, "token").get_value()
        sent = request.POST.get("token", "")
        if not (
            isinstance(known, str) and isinstance(sent, str) and hmac.compare_digest(known.encode(), sent.encode())
        ):
            raise Forgery(
                "This form is out of date, or your browser did not send our cookie back. "
                "Open the ledger again and send it from there."
            )

    def flash(self, request: Request, response: Response, message: str) -> None:
        """Have the next page show this message."""
        self._cookie(request, "flash").set_cookies(response, message)

    def take_flash(self, request: Request, response: Response) -> str:
        cookie = self._cookie(request, "flash")
        message = cookie.get_value()
        if request.cookies.get(cookie.cookie_name) is not None:
            response.delete_cookie(cookie.cookie_name, path="/")
        return message if isinstance(message, str) else ""

    def _cookie(self, request: Request, name: str) -> Any:
        # Cookies do not tell ports apart: two ledgers on one host would take each other's.
        port = request.environ["SERVER_PORT"]
        return SignedCookieProfile(
            self._secret, name, f"ledger-{port}-{name}", httponly=True, samesite="Lax", path="/"
        ).bind(request)
