"""The body of a request that may be replayed: kept, to be read once more.

Imported only where there is a ``RetryPolicy``, because WebOb takes its time.
"""

from __future__ import annotations

import io
import re
from typing import IO, Any

from webob.request import BaseRequest

_AT_ONCE = 65536


class _Request(BaseRequest):
    #: Up to so many bytes WebOb keeps in memory.  Its own limit is 10 KiB; but a temporary file takes its time, and
    #: Python warns that nobody has closed it, because nobody knows who reads it last.
    request_body_tempfile_limit = 4 * 1024 * 1024


class RequestBody:
    """The body of a request that has one."""

    __slots__ = ("_kept",)

    def __init__(self, environ: dict[str, Any], limit: int) -> None:
        """Keep the body, unless it has more than *limit* bytes, or nobody knows where it ends.

        :raises OSError: if the client hangs up before it has sent all of it.

        It is read here, before the application is called: a slow client holds no connection while it sends.
        """
        self._kept: Any = None
        # Transfer-Encoding overrides the length (RFC 9112, Message Body Length).
        length = environ.get("CONTENT_LENGTH") if "HTTP_TRANSFER_ENCODING" not in environ else None
        # A text, by PEP 3333; but some environs are made by hand.
        if isinstance(length, str) and re.fullmatch("[0-9]{1,19}", length) and int(length) <= limit:
            _Request(environ).make_body_seekable()
            self._kept = environ["wsgi.input"]
        elif not length and environ.get("wsgi.input_terminated"):
            # WebOb would read all of it, however much that is.
            self._keep_beginning(environ, limit)

    def _keep_beginning(self, environ: dict[str, Any], limit: int) -> None:
        rest = environ["wsgi.input"]
        beginning = io.BytesIO()
        missing = limit + 1
        while missing > 0 and (data := rest.read(min(missing, _AT_ONCE))):
            beginning.write(data)
            missing -= len(data)
        beginning.seek(0)
        if missing > 0:
            self._kept = environ["wsgi.input"] = beginning
        else:
            environ["wsgi.input"] = io.BufferedReader(_Joined(beginning, rest))

    def rewind(self) -> bool:
        """Begin it anew; false if that can't be done: it was not kept, or the application has closed it."""
        if self._kept is None:
            return False
        try:
            self._kept.seek(0)
        except (OSError, ValueError):
            return False
        return True


class _Joined(io.RawIOBase):
    """A body of which the beginning was read before."""

    def __init__(self, beginning: IO[bytes], rest: IO[bytes]) -> None:
        self._beginning = beginning
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._beginning.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
