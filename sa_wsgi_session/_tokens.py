"""What a visitor has seen of the database, in a form that travels with the visitor.

There are two facts, and each has a cookie of its own, because a slow response must not overwrite what a later one has
said of the other fact:

* the **position** is that of the primary when the visitor was last served by it: what they have seen by then is in
  there;
* the **home** is the replica that has served them since.  They see nothing older as long as they stay there.

An API client without cookies gets the same token in a header, and sends back the last one.

A token is signed by WebOb's ``SignedCookieProfile``, and not encrypted: it says nothing but the above.  That of a home
has no content of a visitor's own, and its time is rounded, so that all visitors of a replica share a few strings: to
check one is a look-up, and to send one, too.

This file knows HTTP headers.  It does not know databases.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from webob.cookies import Morsel, SignedCookieProfile

if TYPE_CHECKING:
    from typing import TypeAlias

    Headers: TypeAlias = "list[tuple[str, str]]"

#: For the clocks of several machines, in seconds.
_SKEW = 30
#: Longer ones are not ours, and not worth the arithmetic.  (A digest of 32 bytes and less than 80 bytes, in base64.)
_LONGEST = 160
#: So many tokens of homes are known at once: each replica has a new one now and then.
_MOST_HOMES = 512
#: Of one cookie's name in one request: another subdomain may have set one as well.
_MOST = 4


class Token(NamedTuple):
    """What a response has told its visitor."""

    #: When, in seconds since the epoch.
    issued: int
    #: The position of the primary; 0 where it says nothing about that.
    position: int = 0
    #: The replica, and its incarnation; empty where it says nothing about that.
    home: str = ""
    #: For so many seconds only the primary may serve this visitor.
    pinned: int = 0


class Seen(NamedTuple):
    """What a request says that its visitor has seen."""

    position: int = 0
    #: None, one, or several.
    homes: tuple[str, ...] = ()
    pinned: bool = False
    #: Whether the response need not say the home again.
    fresh: bool = False


NOTHING_SEEN = Seen()


class _Format:
    """How a token is written, before it is signed."""

    def dumps(self, token: Token) -> bytes:
        return f"{token.issued:x}:{token.position:x}:{token.home}:{token.pinned:x}".encode()

    def loads(self, data: bytes) -> Token:
        issued, position, home, pinned = data.decode("ascii").split(":")
        return Token(int(issued, 16), int(position, 16), home, int(pinned, 16))


class Tokens:
    """Reads and writes tokens.

    :param lifetime: for how many seconds one is good.
    """

    def __init__(
        self, secret: bytes, *, cookie_name: str, header: str | None, lifetime: int, clock: Callable[[], float]
    ) -> None:
        def profile(name: str) -> SignedCookieProfile:
            return SignedCookieProfile(
                cast(Any, secret),  # bytes are as good
                f"sa_wsgi_session.replicas {cookie_name} ",
                name,
                hashalg="sha256",
                serializer=_Format(),
            )

        self._clock = clock
        self.lifetime = lifetime
        self._step = max(1, lifetime // 16)
        self._position, self._home = profile(cookie_name), profile(f"{cookie_name}_home")
        self._serializer = self._position.serializer
        self._header = header
        #: The key of the header in an environ.
        self.header_key = "" if header is None else "HTTP_" + header.upper().replace("-", "_")
        self._name = cookie_name
        self._home_key = f"{cookie_name}_home="
        #: The tokens of homes that are known to be ours, and from when to when they are good.
        self._fresh_homes: dict[str, tuple[str, float, float]] = {}
        self._find = re.compile(
            rf"(?:^|;)\s*{re.escape(cookie_name)}(?:_home)?=\"?([\w-]{{1,{_LONGEST}}})(?![^\";\s])"
        ).findall
        self._load = lru_cache(maxsize=4096)(self._load_one)
        self.home_headers = lru_cache(maxsize=256)(self._home_headers)

    def _load_one(self, text: str) -> Token | None:
        try:
            token = self._serializer.loads(text.encode("ascii"))
        except ValueError:
            return None  # forged, or another's
        return token if isinstance(token, Token) else None

    def seen(self, cookies: str | None, header: str | None) -> Seen:
        """What a request says, in its cookies and in its header.  What is not ours, or too old, says nothing."""
        texts = self._find(cookies)[:_MOST] if cookies is not None and self._name in cookies else []
        if header is not None and len(header) <= _LONGEST:
            texts.append(header)
        if not texts:
            return NOTHING_SEEN
        now = self._clock()
        position, pinned, fresh = 0, False, False
        homes: tuple[str, ...] = ()
        for text in texts:
            token = self._load(text)
            if token is None:
                continue
            age = now - token.issued
            if not -_SKEW <= age <= self.lifetime:
                continue
            if token.home and not token.position:
                if len(self._fresh_homes) >= _MOST_HOMES:
                    self._fresh_homes.clear()  # most of them are old
                self._fresh_homes[text] = (token.home, token.issued - _SKEW, token.issued + self.lifetime / 2)
            if token.position > position:
                position = token.position
            if token.home and token.home not in homes:
                homes += (token.home,)
                fresh = age <= self.lifetime / 2
            if token.pinned and age < token.pinned:
                pinned = True
        return Seen(position, homes, pinned, fresh)

    def fresh_home(self, cookies: str) -> str | None:
        """The home that cookies say which say nothing else of ours, if it need not be said again."""
        at = cookies.find(self._home_key)
        if at < 0:
            return None
        start = at + len(self._home_key)
        end = cookies.find(";", start)
        # Before it, or after it, there may be another one.
        if cookies.find(self._name) < at or (end >= 0 and cookies.find(self._name, end) >= 0):
            return None
        known = self._fresh_homes.get(cookies[start:] if end < 0 else cookies[start:end])
        return known[0] if known is not None and known[1] <= self._clock() <= known[2] else None

    def rounded_now(self) -> int:
        """The time that the token of a home has."""
        now = int(self._clock())
        return now - now % self._step

    def _home_headers(self, home: str, issued: int, secure: bool) -> Headers:
        token = Token(issued, home=home)
        return [self._cookie(self._home, token, secure=secure), *self._in_header(token)]

    def position_headers(self, position: int, pinned: int, *, secure: bool, forget_home: bool) -> Headers:
        """The headers that tell a visitor that all they have seen is in the state at that position.

        :param pinned: for how many seconds nobody but the primary may serve them.
        :param forget_home: whether they have, or may have, the cookie that says where they are at home.
        """
        token = Token(int(self._clock()), position, pinned=pinned)
        headers = [self._cookie(self._position, token, secure=secure), *self._in_header(token)]
        if forget_home:
            headers.append(self._cookie(self._home, None, secure=secure))
        return headers

    def _cookie(self, profile: SignedCookieProfile, token: Token | None, *, secure: bool) -> tuple[str, str]:
        """Set it; without a token: have it forgotten.

        As the profile itself would do, but without "expires": Max-Age has precedence (RFC 6265, section 4.1.2.2), and
        for the other one WebOb 1.8 calls what Python 3.12 warns of.
        """
        morsel = Morsel(profile.cookie_name, b"" if token is None else profile.serializer.dumps(token))
        morsel.path = b"/"
        morsel.httponly = True
        morsel.samesite = b"Lax"
        morsel.secure = secure
        morsel.max_age = 0 if token is None else self.lifetime
        return "Set-Cookie", morsel.serialize()

    def _in_header(self, token: Token) -> Headers:
        if self._header is None:
            return []
        return [(self._header, self._serializer.dumps(token).decode("ascii"))]
