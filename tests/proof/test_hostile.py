"""Hostile input, in process: whatever a request, an application or an argument is, the answer is right or the error
clear, and nothing is left over.

``PROOF_EXAMPLES`` is the number of the model's examples; each test here has a tenth of it. Real servers, which are sent
bytes that are no requests: the last part. Ini files: ``test_hostile_ini.py``.
"""

from __future__ import annotations

import io
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import URL
from webob.request import DisconnectionError

from sa_wsgi_session import RetryPolicy, SessionMiddleware, current_scope, session_scope, with_session
from tests.conftest import unavailable
from tests.frameworks.wsgi_servers import WSGI_SERVERS, run_wsgi_server
from tests.proof.conftest import Tell
from tests.proof.hostile_bytes import Attacked, Raw, raws
from tests.proof.hostile_support import ANY_TEXT, PRIVATE, Log, assert_clear, hostile, logged
from tests.servers import NotInstalled
from tests.support import PLAIN, Body, Exchange, World, is_in_a_scope, make_environ, note, request

REGISTRIES = ("thread-local", "contextual")
in_both_registries = pytest.mark.parametrize("registry", REGISTRIES)

_numbers = count(1)


class Worlds:
    """One world for each registry, for all examples: what one of them leaves behind, the next one would find."""

    def __init__(self, folder: Any) -> None:
        self._worlds = {
            registry: World(URL.create("sqlite", database=str(folder / f"{registry}.sqlite")), registry)
            for registry in REGISTRIES
        }

    def __getitem__(self, registry: str) -> World:
        return self._worlds[registry]

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    with closing(Worlds(tmp_path_factory.mktemp("hostile"))) as worlds:
        yield worlds


@pytest.fixture
def log() -> Iterator[Log]:
    with logged() as log:
        yield log


def assert_nothing_is_left(world: World, log: Log) -> None:
    assert world.checked_out == 0
    assert not world.Session.registry.has()
    assert not is_in_a_scope()
    assert not log.forged
    log.lines.clear()


def is_durable(world: World, text: str) -> bool:
    """Whether the note with this text is there; there is no other one, and afterwards none."""
    found = durable(world)
    assert found in ([], [text])
    return bool(found)


def durable(world: World) -> list[str]:
    """The notes that are there; afterwards there is none."""
    found = world.durable()
    if found:
        with world.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM note")
    return found


# -- requests --------------------------------------------------------------------------------------------------------


class Hiccup(Exception):
    """What reading from the client raises."""


class Lost(Exception):
    """A race was lost."""


class Client:
    """``wsgi.input``: what comes after the body belongs to the next request, and nothing can be rewound."""

    def __init__(self, data: bytes, *, breaks_at: int | None = None, at_once: int = sys.maxsize) -> None:
        self.size = len(data)
        self._stream = io.BytesIO(data)
        self._breaks_at = breaks_at
        self.at_once = at_once

    def _about_to_read(self, size: int) -> int:
        if self._breaks_at is not None and self._stream.tell() + max(size, 0) >= self._breaks_at:
            raise Hiccup
        return min(size, self.at_once) if size >= 0 else size

    def read(self, size: int = -1) -> Any:
        return self._stream.read(self._about_to_read(size))

    def readline(self, size: int = -1) -> Any:
        return self._stream.readline(self._about_to_read(size))

    def readlines(self, hint: int = -1) -> Any:
        return self._stream.readlines(self._about_to_read(hint))

    def __iter__(self) -> Iterator[bytes]:
        while line := self.readline():
            yield line


class Broken:
    """A ``wsgi.input`` as no server should have it: its ``read`` returns something else."""

    def __init__(self, result: Any) -> None:
        self._result = result
        self._reads = 0

    def read(self, size: int = -1) -> Any:
        self._reads += 1
        if self._reads > 100:
            # It never ends, and whoever does not notice never does either.
            raise Hiccup
        return self._result


MISSING = object()

NASTY = [
    "",
    "/",
    "/\r\nWARNING:root:forged",
    "/%0d%0a%1b[2J",
    "/\x1b[31m\x07\x08",
    "/\x00\x7f\x85\xa0\xff",
    "/\u2028\u2029\u202e",
    "/\ud800\udfff",
    "/" + "x" * 100_000,
    "/" + "\n" * 1000,
    "%s %d {0} \\n",
]
texts = st.sampled_from(NASTY) | ANY_TEXT

methods = st.sampled_from(["GET", "POST", "PUT", "get", "", "POST\r\nX", "\ud800", "P" * 10_000, MISSING]) | ANY_TEXT

lengths = (
    st.sampled_from([MISSING, "", "0", "1", "7", "8", "00007", "100", "101", "9" * 19, "9" * 20, "9" * 5000])
    # Some of these are numbers for Python, but for nobody else.
    | st.sampled_from(
        ["\u0661\u0662", "\uff19\uff19", "\u00b2", "+99", "-1", " 99 ", "99\n", "9_9", "0x9", "9,9", "9.0", "1e3"]
    )
    | st.sampled_from(["nan", "None", "\ud800", "\x00"])
    | st.integers(-5, 120).map(str)
)

encodings = st.sampled_from([*[MISSING] * 8, "chunked", "", "gzip, chunked", "identity", "\r\n"])
terminated = st.sampled_from([MISSING, True, False, None, 0, 1, "", "yes", "False", (), math.nan])
# Copies of an environ, and servers of another mind, may have anything under the keys of the middleware.
scopes = st.sampled_from([MISSING, None, "scope", 0, object()])

contents = st.sampled_from(
    [b"", b"1234567", b"a\nb\r\n\nc", b"1234567 and the next request", b"\xff\x00" * 60, b"x" * 70_000]
) | st.binary(max_size=120)
bodies = st.builds(
    Client, contents, breaks_at=st.none() | st.integers(0, 10), at_once=st.sampled_from([sys.maxsize, 1, 3])
)

anything = st.fixed_dictionaries(
    {
        "REQUEST_METHOD": methods,
        "PATH_INFO": texts | st.just(MISSING),
        "SCRIPT_NAME": texts | st.just(MISSING),
        "QUERY_STRING": texts.map(lambda text: f"{PRIVATE}={text}"),
        "HTTP_COOKIE": texts.map(lambda text: f"{PRIVATE}={text}"),
        "CONTENT_LENGTH": lengths,
        "HTTP_TRANSFER_ENCODING": encodings,
        "wsgi.input_terminated": terminated,
        "wsgi.input": bodies,
        "sa_wsgi_session.scope": scopes,
        "sa_wsgi_session.session": scopes,
    }
)


def _tell_its_size(environ: dict[str, Any], body: Client) -> dict[str, Any]:
    return {**environ, "wsgi.input": body, "CONTENT_LENGTH": str(body.size), "HTTP_TRANSFER_ENCODING": MISSING}


#: Half of the bodies are what they are said to be.
requests = anything | st.builds(_tell_its_size, anything, st.builds(Client, contents))

#: How an application reads: any of these, one after the other.
readings = st.lists(
    st.sampled_from(["read()", "read(7)", "read(0)", "read(1000)", "readline()", "readlines()", "list()", "close()"]),
    max_size=3,
)

READ: dict[str, Callable[[Any], Any]] = {
    "read()": lambda stream: stream.read(),
    "read(7)": lambda stream: stream.read(7),
    "read(0)": lambda stream: stream.read(0),
    "read(1000)": lambda stream: stream.read(1000),
    "readline()": lambda stream: stream.readline(),
    "readlines()": lambda stream: stream.readlines(),
    "list()": list,
    # A client's stream has none.
    "close()": lambda stream: getattr(stream, "close", lambda: None)(),
}


class Upload:
    """An application that adds a note and reads the body, and loses its first races."""

    def __init__(
        self, world: World, text: str, reading: list[str], losses: int, *, clears: bool, streams: bool
    ) -> None:
        self._world = world
        self._text = text
        self._reading = reading
        self._losses = losses
        self._clears = clears
        self._streams = streams
        #: What each attempt has seen: the environ, and what was read.
        self.seen: list[tuple[Any, ...]] = []
        #: What its callbacks were told.
        self.told: list[str] = []

    def __call__(self, environ: Any, start_response: Any) -> Any:
        known = {key: value for key, value in environ.items() if not key.startswith(("wsgi.input", "sa_wsgi_session."))}
        stream = environ.get("wsgi.input")
        self._world.Session.add(note(self._text))
        read: list[Any] = []
        self.seen.append((known, read))
        current_scope().on_commit(lambda: self.told.append("committed"))
        current_scope().on_rollback(lambda: self.told.append("rolled back"))
        if self._clears:
            environ.clear()
        for how in self._reading:
            read.append(READ[how](stream))
        if len(self.seen) <= self._losses:
            raise Lost
        start_response("200 OK", PLAIN)
        return self._stream() if self._streams else [b"done"]

    def _stream(self) -> Iterator[bytes]:
        yield b"do"
        self._world.Session.add(note(f"{self._text}, streamed"))
        self._world.Session.flush()
        yield b"ne"


POLICY = RetryPolicy(attempts=3, delay=0, max_body=100, is_transient=lambda error: isinstance(error, Lost))


def announces_a_body(environ: Any) -> bool:
    if "HTTP_TRANSFER_ENCODING" in environ:
        return True
    length = environ.get("CONTENT_LENGTH", "")
    if length != "":
        return bool(length != "0")
    safe = environ.get("REQUEST_METHOD") in ("GET", "HEAD", "OPTIONS", "TRACE")
    return bool(environ.get("wsgi.input_terminated")) and not safe


@in_both_registries
def test_whatever_a_client_sends_is_served_or_refused_and_never_logged(
    registry: str, worlds: Worlds, log: Log, tell: Tell
) -> None:
    world = worlds[registry]
    outcomes: Counter[str] = Counter()

    @hostile(parts=len(REGISTRIES))
    @given(
        *(requests, readings, st.sampled_from([0, 1, 1, 2, 3])),
        *(st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0, 1, 2, 9, 9])),
    )
    def check(
        sent: Any, reading: list[str], losses: int, clears: bool, streams: bool, retries: bool, chunks: int
    ) -> None:
        text = f"note {next(_numbers)}"
        upload = Upload(world, text, reading, losses, clears=clears, streams=streams)
        middleware = SessionMiddleware(upload, world.Session, retry=POLICY if retries else None)
        environ = {key: value for key, value in {**make_environ(), **sent}.items() if value is not MISSING}
        announced = announces_a_body(environ)
        length, client = environ.get("CONTENT_LENGTH", ""), environ["wsgi.input"]
        served = False
        try:
            answer = request_with(middleware, environ, chunks)
            assert (answer.status, answer.content) == (
                "200 OK",
                b"do" if streams and chunks == 1 else b"done"[: chunks * 4],
            )
            served = True
            outcomes["served"] += 1
        except DisconnectionError:
            # WebOb's error, an OSError: the client has sent less than it has announced.
            assert retries
            assert length.isascii()
            assert length.isdigit()
            # Or it seems so: WebOb does not ask again where a stream returns less than it was asked for.
            assert client.size < int(length) or client.at_once < client.size
            assert not upload.seen
            outcomes["hung up"] += 1
        except (Hiccup, Lost, ValueError, OSError) as error:
            assert_clear_to_the_application(error)
            outcomes[type(error).__name__] += 1
        written = [text] if served else []
        if served and streams and chunks > 2:
            written.append(f"{text}, streamed")
        assert durable(world) == written
        assert upload.told == (["committed"] if served else ["rolled back"] if upload.seen else [])
        assert len(upload.seen) <= (3 if retries else 1)
        if len(upload.seen) > 1:
            outcomes["replayed"] += 1
            first, *others = upload.seen
            for known, read in others:
                assert known == first[0]
                # Else the application reads what is not the body of this request.
                assert not announced or read == first[1]
        if retries and served and announced and len(upload.seen) == 1:
            outcomes["a body, one attempt"] += 1
        assert_nothing_is_left(world, log)

    check()
    # All of it has happened.
    # (Of a few hundred examples perhaps none hangs up.)
    missing = {"served", "replayed", "hung up", "Hiccup", "Lost"} - set(outcomes)
    assert not missing or (missing == {"hung up"} and sum(outcomes.values()) < 5000)
    tell(f"requests, {registry}", outcomes)


def request_with(app: Any, environ: Any, chunks: int = sys.maxsize) -> Exchange:
    """A request whose client hangs up after so many chunks."""
    exchange = Exchange(app, environ)
    with closing(exchange):
        exchange.content = b"".join(islice(exchange.body, chunks))
    return exchange


def assert_clear_to_the_application(error: BaseException) -> None:
    """It comes from the client or the application, or is what a file says that was closed or is none to rewind."""
    if type(error) is ValueError and "closed" in str(error):
        return
    assert_clear(error)


# -- servers that break PEP 3333 ---------------------------------------------------------------------------------------

broken = st.fixed_dictionaries(
    {
        "REQUEST_METHOD": st.sampled_from([None, 5, b"POST", "POST"]),
        "PATH_INFO": st.sampled_from([None, 5, b"/\r\n", ["/"], "/"]),
        "CONTENT_LENGTH": st.sampled_from([7, 0, b"7", 7.0, None, True, ["7"], "7", MISSING]),
        "wsgi.input": st.sampled_from([None, MISSING, "body", b"body"])
        | st.builds(Broken, st.sampled_from(["1234567", None, 7, b"more than was asked for", b""])),
        "wsgi.input_terminated": terminated,
    }
)


@in_both_registries
def test_a_server_that_breaks_the_rules_breaks_nothing_else(
    registry: str, worlds: Worlds, log: Log, tell: Tell
) -> None:
    world = worlds[registry]
    outcomes: Counter[str] = Counter()

    @hostile(parts=len(REGISTRIES))
    @given(broken, st.booleans())
    def check(sent: Any, retries: bool) -> None:
        text = f"note {next(_numbers)}"
        upload = Upload(world, text, [], 0, clears=False, streams=False)
        middleware = SessionMiddleware(upload, world.Session, retry=POLICY if retries else None)
        environ = {key: value for key, value in {**make_environ(), **sent}.items() if value is not MISSING}
        length = environ.get("CONTENT_LENGTH") or ""
        # Nobody knows what a length says that is no text: that body is left alone.
        announced = isinstance(length, str) and announces_a_body({**environ, "CONTENT_LENGTH": length})
        served = False
        try:
            served = request_with(middleware, environ).content == b"done"
        except (DisconnectionError, TypeError, AttributeError, KeyError, ValueError):
            # Reading what is no stream of bytes: nobody else did.
            assert retries
            assert announced
            outcomes["refused"] += 1
        else:
            outcomes["served"] += 1
        assert is_durable(world, text) is served is bool(upload.seen)
        assert_nothing_is_left(world, log)

    check()
    tell(f"servers that break the rules, {registry}", outcomes)


# -- responses -------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """What the server says of a status, of headers or of data that it does not take."""


class Text(str):
    """A kind of text."""


class Unanswerable:
    """It is neither true nor false."""

    def __bool__(self) -> bool:
        raise Hiccup


def is_status(status: object) -> bool:
    """Whether PEP 3333 calls it a status: "999 Message here", without control characters, in ISO-8859-1.

    The message may be missing.
    """
    if not isinstance(status, str):
        return False
    number, space, message = status[:3], status[3:4], status[4:]
    if len(number) != 3 or not (number.isascii() and number.isdigit()) or number < "100" or space not in ("", " "):
        return False
    return all(" " <= char <= "\xff" and char != "\x7f" for char in message)


STATUSES = [
    "200 OK",
    "204 No Content",
    "301 Moved",
    "100 Continue",
    "404 Not Found",
    "503 Busy",
    "200",
    "200 ",
    "999 X",
]
NO_STATUSES = [
    *[
        "",
        " ",
        "OK",
        "20",
        "2000 OK",
        "2 00 OK",
        "99 X",
        "099 X",
        "000 X",
        "-20 X",
        "+20 X",
        "1e2 X",
        "200OK",
        "200\tOK",
    ],
    *["200 OK\r\nX: y", "200 OK\n", "200\n", "\n200 OK", "200 \x00", "200 \x7f", " 200 OK", "\u0662\u0660\u0660 OK"],
    *[
        "\uff12\uff10\uff10 OK",
        "200 \u2603",
        "200 \ud800",
        "2\x0000",
        "200 " + "\r" * 1000,
        "x" * 100_000,
        "HTTP/1.1 200 OK",
    ],
    *[b"200 OK", None, 200, 2.0, True, ("200", "OK"), ["200 OK"], object(), MISSING],
]
statuses = (
    st.sampled_from(STATUSES)
    | st.sampled_from(STATUSES)
    | st.sampled_from(STATUSES + NO_STATUSES)
    | st.sampled_from(STATUSES).map(Text)
    | st.builds(lambda code, text: f"{code} {text}", st.integers(-1, 1001), ANY_TEXT)
    | ANY_TEXT
)

headers = (
    st.just(PLAIN)
    | st.lists(st.tuples(ANY_TEXT, ANY_TEXT), max_size=3)
    | st.sampled_from([None, "text", b"", 0, (), {}, {"A": "b"}, iter(()), object()])
    | st.lists(
        st.sampled_from(
            [
                *[("A",), ("A", "b", "c"), (1, 2), ("A", None), (b"A", b"b"), ["A", "b"], None, "Ab", ("A\r\nB", "c")],
                *[("A", "b\r\nSet-Cookie: c"), ("Status", "200"), ("", ""), ("A", "\ud800"), ("Connection", "close")],
            ]
        ),
        max_size=2,
    )
)

#: Each of them a call of start_response, in the view and, for a body that is a generator, before its first chunk.
one_call = st.tuples(statuses, headers, st.sampled_from(["", "", "exc_info"]))
calls = (
    st.lists(one_call, min_size=1, max_size=1)
    | st.lists(one_call, min_size=1, max_size=1)
    | st.lists(one_call, max_size=3)
)


class Server:
    """A server's ``start_response``, which refuses what it does not take."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        #: Every status that it was told, whether it took it or not.
        self.statuses: list[Any] = []
        self.written: list[bytes] = []

    def __call__(self, status: Any, headers: Any, exc_info: Any = None) -> Any:
        self.statuses.append(status)
        if self._kind == "strict":
            if type(status) is not str or type(headers) is not list:
                raise Refused
            for header in headers:
                if type(header) is not tuple or len(header) != 2 or not all(type(part) is str for part in header):
                    raise Refused
                if not all("\x20" <= char <= "\xff" for part in header for char in part):
                    raise Refused
        if self._kind == "refuses all":
            raise Refused
        return None if self._kind == "no write" else self.written.append


servers = st.sampled_from(["lax", "lax", "strict", "no write", "refuses all"])

#: What a veto answers; or what it does instead.
ANSWERS = (None, False, 0, "", (), 0.0, True, 1, "no", (0,), object(), math.nan, Exception(), Unanswerable())
vetoes: Any = st.sampled_from([MISSING, MISSING, *ANSWERS, "raises", "interrupts", "empties"])


class Raised(Exception):
    """What a veto raises."""


class Interrupted(BaseException):
    """What is no ``Exception``."""


def make_veto(kind: Any, verdicts: list[bool]) -> Any:
    """The veto, which appends what it has answered to *verdicts*."""

    def veto(environ: Any, status: Any, headers: Any) -> Any:
        if kind == "raises":
            raise Raised
        if kind == "interrupts":
            raise Interrupted
        if kind == "empties":
            environ.clear()
            if isinstance(headers, list):
                headers.clear()
            verdicts.append(False)
            return False
        verdicts.append(bool(kind))
        return kind

    return veto


@in_both_registries
def test_whatever_is_said_of_a_response_is_forwarded_or_refused_by_an_error_that_says_so(
    registry: str, worlds: Worlds, log: Log, tell: Tell
) -> None:
    world = worlds[registry]
    outcomes: Counter[str] = Counter()

    @hostile(parts=len(REGISTRIES))
    @given(
        calls, vetoes, servers, st.sampled_from(["list", "generator", "body", "write"]), st.booleans(), st.booleans()
    )
    def check(calls: Any, veto: Any, kind: str, body: str, swallows: bool, retries: bool) -> None:
        text = f"note {next(_numbers)}"
        verdicts: list[bool] = []
        closed: list[Body] = []
        server = Server(kind)

        def start_all(start_response: Any) -> None:
            for status, headers, exc_info in calls:
                try:
                    given = () if status is MISSING else (status, headers)
                    try:
                        if exc_info:
                            raise Hiccup
                    except Hiccup:
                        write = start_response(*given, sys.exc_info())
                    else:
                        write = start_response(*given)
                    if body == "write":
                        write(b"wr")
                        write(b"itten")
                except Exception:
                    if not swallows:
                        raise

        def generate(start_response: Any) -> Iterator[bytes]:
            start_all(start_response)
            yield b"gener"
            yield b"ated"

        def app(environ: Any, start_response: Any) -> Any:
            world.Session.add(note(text))
            if body == "generator":
                return generate(start_response)
            if body == "body":
                closed.append(Body([b"bo", b"dy"]))
            start_all(start_response)
            return closed[0] if closed else [b"listed"]

        options: Any = {} if veto is MISSING else {"commit_veto": make_veto(veto, verdicts)}
        middleware = SessionMiddleware(app, world.Session, retry=POLICY if retries else None, **options)
        error: BaseException | None = None
        try:
            iterable: Any = middleware(make_environ(), server)
            try:
                b"".join(iterable)
            finally:
                getattr(iterable, "close", lambda: None)()
        except (Exception, Interrupted) as raised:
            error = raised

        durable = is_durable(world, text)
        said = server.statuses
        assert all(map(is_status, said))
        if error is None:
            assert said
            outcomes["committed" if durable else "rolled back"] += 1
        else:
            assert_clear(error)
            assert_says_so(error)
            outcomes[type(error).__name__] += 1
        # The server is told nothing before it is decided; what it then refuses is decided all the same.
        assert durable <= bool(said)
        if veto is MISSING and said:
            assert durable <= (str(said[0])[0] in "123")
        if error is None:
            assert durable is not (verdicts[0] if veto is not MISSING else str(said[0])[0] not in "123")
        heard = [(status, exc_info) for status, _, exc_info in calls if status is not MISSING]
        if error is None and (durable or not swallows) and body != "write":
            # It was called as it has to be: what was wrong, and swallowed, is no success.
            assert all(is_status(status) for status, _ in heard)
            assert all(exc_info for _, exc_info in heard[1:])
        if closed and said:
            assert [each.closed for each in closed] == [1]
        assert_nothing_is_left(world, log)

    check()
    tell(f"responses, {registry}", outcomes)


def assert_says_so(error: BaseException) -> None:
    """An error of ours has a line that names what was wrong, and quotes nothing that would make it two."""
    if isinstance(error, (Hiccup, Raised, Interrupted, Refused)):
        return
    message = str(error)
    assert message.isprintable(), message
    assert len(message) < 1500
    # A call without arguments does not reach us: Python's own words.
    assert "start_response" in message or "write()" in message or "start() missing" in message, message


hooks = st.sampled_from([None, 0, "", False, [], True, 1, "no", object(), math.nan])


@in_both_registries
@hostile(parts=10)
@given(data=st.data())
def test_a_hook_may_answer_anything(registry: str, worlds: Worlds, data: Any) -> None:
    answer = data.draw(hooks)
    world = worlds[registry]
    scopes: list[bool] = []

    def app(environ: Any, start_response: Any) -> Any:
        scopes.append("sa_wsgi_session.scope" in environ)
        start_response("200 OK", PLAIN)
        return [b""]

    with logged() as log:
        request(SessionMiddleware(app, world.Session, activate_hook=lambda environ: answer))
        assert scopes == [bool(answer)]
        for fails in (Raised, Interrupted):

            def hook(environ: Any, fails: Any = fails) -> Any:
                raise fails

            with pytest.raises(fails):
                request(SessionMiddleware(app, world.Session, activate_hook=hook))
        assert len(scopes) == 1
        assert_nothing_is_left(world, log)


# -- arguments -------------------------------------------------------------------------------------------------------

HUGE = 10**400
#: Python refuses to write it down.
UNSPEAKABLE = 10**5000
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from(
        [0, 1, -1, 0.0, -0.0, 1e-320, 1e308, 1e10, math.inf, -math.inf, math.nan, True, False, 2**63, HUGE]
    )
    | st.sampled_from([-HUGE, UNSPEAKABLE, -UNSPEAKABLE])
)


class Named:
    """A bystander."""


strange: Any = (
    st.none()
    | numbers
    | ANY_TEXT
    | st.binary(max_size=5)
    | st.from_type(type).map(lambda cls: cls)
    | st.complex_numbers()
    | st.fractions()
    | st.decimals()
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(ANY_TEXT, st.integers(), max_size=2)
    | st.sampled_from(
        [object(), Named, Named(), NotImplemented, ..., len, print, (), b"", "start", "end", POLICY, RetryPolicy]
    )
)


def is_number(value: Any, *, whole: bool, least: int) -> bool:
    """A number as the documentation of the policy demands it."""
    if type(value) is bool or not isinstance(value, int if whole else (int, float)):
        return False
    return value >= least if whole else bool(least <= value <= sys.float_info.max)


#: What each parameter of a policy accepts.
POLICIES: dict[str, Callable[[Any], bool]] = {
    "attempts": lambda value: is_number(value, whole=True, least=1),
    "delay": lambda value: is_number(value, whole=False, least=0),
    "max_delay": lambda value: is_number(value, whole=False, least=0),
    "deadline": lambda value: value is None or is_number(value, whole=False, least=0),
    "max_body": lambda value: is_number(value, whole=True, least=0),
}


#: What the other arguments accept, of the strange things that they are given here.
ACCEPTED: dict[str, Callable[[Any], bool]] = {
    "app": callable,
    "function": callable,
    "session": lambda value: False,
    "commit_veto": callable,
    "activate_hook": lambda value: value is None or callable(value),
    "commit_at": lambda value: type(value) is str and value in ("start", "end"),
    "retry": lambda value: value is None or isinstance(value, RetryPolicy),
    "environ_key": lambda value: isinstance(value, str) and value != "",
    "propagation": lambda value: False,
    "argument": lambda value: isinstance(value, str) and value.isidentifier(),
}


def assert_names(error: Exception, names: list[str]) -> None:
    """It is an error of ours, of the right kind, in one line that begins with the name of what is wrong."""
    assert type(error) in (TypeError, ValueError)
    assert_clear(error)
    assert str(error).split()[0].partition("(")[0] in names, str(error)


@hostile()
@given(st.dictionaries(st.sampled_from(sorted(POLICIES)), numbers | strange, max_size=3))
def test_a_policy_is_refused_at_once_or_works(worlds: Worlds, arguments: dict[str, Any]) -> None:
    wrong = [name for name, value in arguments.items() if not POLICIES[name](value)]
    try:
        policy = RetryPolicy(**arguments, is_transient=lambda error: isinstance(error, Lost))
    except (TypeError, ValueError) as error:
        assert_names(error, wrong)
        return
    assert not wrong
    world = worlds["thread-local"]
    text = f"note {next(_numbers)}"
    upload = Upload(world, text, ["read()"], 1, clears=True, streams=False)
    middleware = SessionMiddleware(upload, world.Session, retry=policy)
    pauses: list[float] = []
    with logged() as log, pytest.MonkeyPatch.context() as patch:
        # Nobody waits for these pauses; that the real one would is checked.
        patch.setattr("sa_wsgi_session._retry.time.sleep", pauses.append)
        environ = make_environ("/", "POST", CONTENT_LENGTH="4", **{"wsgi.input": Client(b"body")})
        served = False
        try:
            served = request_with(middleware, environ).content == b"done"
        except Lost:
            # A number that is left out is its default: three attempts, a deadline that a test does not reach.
            limits = policy.attempts == 1 or policy.max_body < 4 or policy.deadline is not None
            assert limits
        assert is_durable(world, text) is served
        assert_nothing_is_left(world, log)
    assert len(upload.seen) == 1 + served == 1 + len(pauses)
    for pause in pauses:
        assert 0 <= pause <= min(policy.delay, policy.max_delay)
        assert pause <= threading.TIMEOUT_MAX
        if policy.deadline is not None:
            assert pause <= policy.deadline


def _app(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", PLAIN)
    return [b"done"]


@hostile()
@given(
    st.sampled_from(["app", "session", "commit_veto", "commit_at", "activate_hook", "retry", "environ_key"]), strange
)
def test_a_middleware_is_refused_at_once_or_works(worlds: Worlds, name: str, value: Any) -> None:
    world = worlds["thread-local"]
    arguments: dict[str, Any] = {"app": _app, "session": world.Session, name: value}
    try:
        middleware = SessionMiddleware(**arguments)
    except (TypeError, ValueError) as error:
        assert_names(error, [name])
        return
    assert ACCEPTED[name](value)
    if name in ("app", "commit_veto", "activate_hook"):
        # Nobody can know what a callable takes before it is called.
        return
    with logged() as log:
        answer = request(middleware)
        assert answer.content == b"done"
        if name == "environ_key":
            assert f"{value}.scope" in answer.environ
        assert_nothing_is_left(world, log)


@hostile()
@given(st.sampled_from(["session", "propagation", "argument", "retry", "function"]), strange)
def test_the_job_door_is_refused_at_once_or_works(worlds: Worlds, name: str, value: Any) -> None:
    world = worlds["contextual"]
    text = f"note {next(_numbers)}"

    def job(**given: Any) -> Any:
        [session] = given.values()
        session.add(note(text))
        return list(given)

    arguments: dict[str, Any] = {"session": world.Session}
    function: Any = job
    if name == "function":
        function = value
    else:
        arguments[name] = value
    with logged() as log:
        try:
            decorated = with_session(**arguments)(function)
        except (TypeError, ValueError) as error:
            assert_names(error, [name] if name != "function" else ["with_session"])
        else:
            assert ACCEPTED[name](value)
            if name != "function":
                assert decorated() == [value if name == "argument" else "session"]
                assert is_durable(world, text)
        if name in ("session", "propagation"):
            try:
                with session_scope(**arguments) as session:
                    session.add(note(text))
            except (TypeError, ValueError) as error:
                assert_names(error, [name])
            else:
                assert ACCEPTED[name](value)
        assert_nothing_is_left(world, log)


# -- servers on sockets ------------------------------------------------------------------------------------------------

#: Each example is a batch, and each server has its own.
PARTS = 10
SERVED = "tests.proof.hostile_served:application"
SERVERS = {server.name: server for server in WSGI_SERVERS if server.name in ("waitress", "gunicorn-gthread", "cheroot")}


@pytest.mark.parametrize("name", SERVERS)
def test_bytes_that_are_no_requests_harm_no_server(name: str, tmp_path: Path, tell: Tell) -> None:
    server = SERVERS[name]
    url = URL.create("sqlite", database=str(tmp_path / "notes.sqlite"))
    serving = replace(server, command=lambda port, folder: [*server.command(port, folder)[:-1], SERVED])
    try:
        server.versions()
    except NotInstalled as reason:
        unavailable(reason)
    with (
        run_wsgi_server(serving, {"HOSTILE_DATABASE": str(url)}, tmp_path / "server.log") as running,
        closing(Attacked(running, url)) as attacked,
    ):

        @hostile(PARTS)
        @given(st.lists(raws(), min_size=1, max_size=8))
        def check(batch: list[Raw]) -> None:
            for raw in batch:
                attacked.send(raw)
            attacked.assert_unharmed()

        check()
        tell(f"bytes, {name}", dict(sorted(attacked.outcomes.items())))
