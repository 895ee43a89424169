"""The body of a request that may be replayed: kept, to be read once more.

Imported only where there is a ``RetryPolicy``, because WebOb takes its time.
"""

from __future__ import annotations

from typing import Any

from webob.request import BaseRequest


class RequestBody:
    """The body of a request that has one."""

    __slots__ = ("_kept", "replayable")

    def __init__(self, environ: dict[str, Any], limit: int) -> None:
        """Keep the body, unless it has more than *limit* bytes, or nobody knows how many.

        :raises OSError: if the client hangs up before it has sent all of it.

        It is read here, before the application is called: a slow client holds no connection while it sends.
        """
        length = environ.get("CONTENT_LENGTH") or ""
        #: Whether the request can be made once more, as far as its body is concerned.
        self.replayable = length.isascii() and length.isdigit() and len(length) < 20 and int(length) <= limit
        if self.replayable:
            BaseRequest(environ).make_body_seekable()
            self._kept = environ["wsgi.input"]

    def rewind(self) -> bool:
        """Begin it anew; false if that can't be done, because the application has closed it."""
        try:
            self._kept.seek(0)
        except (OSError, ValueError):
            return False
        return True
