"""Bytes that are requests, or are not, and a server that they are sent to."""

from __future__ import annotations

import socket
import struct
import time
from collections import Counter
from dataclasses import dataclass
from itertools import count
from typing import Any

import sqlalchemy as sa
from hypothesis import strategies as st
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from tests.frameworks.wsgi_servers import Running

#: A guard against hanging, no more.
SECONDS_TO_ANSWER = 60

_numbers = count(1)

#: These stand for the text of the note, which is of the same length and of this request alone.
HEAD, TAIL = b"<<<", b">>>>>"
TEXT = HEAD + TAIL


@dataclass(frozen=True)
class Raw:
    """The bytes that a client sends, and what it does then."""

    data: bytes
    #: "good": it has to be served. "cut": it must not be. "any": that is for the server to judge.
    kind: str
    #: "read" the answers, "close" the connection without, or "reset" it.
    manner: str


ENDS = [b"\r\n", b"\n", b"\r"]
TARGETS = [b"/", b"/race", b"/stream", b"/race/stream", b"/fail"]
#: Beyond what a server accepts, or not.
ODD_TARGETS = [
    b"",
    b"*",
    b"//",
    b"http://[/",
    b"/%0d%0aX: y",
    b"/%ff%00%c3%28",
    b"/a b",
    b"/\xff\x00\x1b[2J",
    b"/" + b"x" * 9000,
]
METHODS = [b"GET", b"HEAD", b"post", b"", b"P\x00ST", b"P OST", b"OPTIONS", b"\xff", b"P" * 9000]
VERSIONS = [b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9", b"http/1.1", b"", b"HTTP/1.1 HTTP/1.1", b"\xff"]
FIELDS = [
    *[b"X", b": y", b"X : y", b" X: y", b"X:\r\n y", b"X: a\rb", b"X: \x00", b"\xff: \xff", b"X\n: y", b"X_Y: z"],
    *[b"Expect: 100-continue", b"Connection: Upgrade", b"Connection: keep-alive", b"Host: other", b"X: " + b"y" * 9000],
    *[
        b"Content-Length: 0",
        b"Transfer-Encoding: identity",
        b"wsgi.input: x",
        b"Sa-Wsgi-Session.Scope: x",
        b"Upgrade: h2c",
    ],
]

#: The fields that say how long the body is, and how it is sent: right, more than there is, or neither.
FRAMES: dict[str, tuple[list[bytes], bytes]] = {
    "length": ([b"Content-Length: 8"], TEXT),
    "chunks": ([b"Transfer-Encoding: chunked"], b"3\r\n" + HEAD + b"\r\n5;x=y\r\n" + TAIL + b"\r\n0\r\n\r\n"),
    "length, cut": ([b"Content-Length: 9"], TEXT),
    "chunks, cut": ([b"Transfer-Encoding: chunked"], b"8\r\n" + TEXT + b"\r\n"),
    "chunk, cut": ([b"Transfer-Encoding: chunked"], b"9\r\n" + TEXT),
    "a length too small": ([b"Content-Length: 3"], TEXT),
    "two lengths": ([b"Content-Length: 8", b"Content-Length: 8"], TEXT),
    "two other lengths": ([b"Content-Length: 8", b"Content-Length: 80"], TEXT),
    "a list of lengths": ([b"Content-Length: 8, 80"], TEXT),
    "a negative length": ([b"Content-Length: -8"], TEXT),
    "a signed length": ([b"Content-Length: +8"], TEXT),
    "a length in words": ([b"Content-Length: eight"], TEXT),
    "a huge length": ([b"Content-Length: " + b"9" * 40], TEXT),
    "an empty length": ([b"Content-Length: "], TEXT),
    "both": ([b"Content-Length: 8", b"Transfer-Encoding: chunked"], b"8\r\n" + TEXT + b"\r\n0\r\n\r\n"),
    "both, the other way": ([b"Content-Length: 80", b"Transfer-Encoding: xchunked"], TEXT),
    "no size": ([b"Transfer-Encoding: chunked"], b"\r\n" + TEXT),
    "a negative size": ([b"Transfer-Encoding: chunked"], b"-8\r\n" + TEXT + b"\r\n0\r\n\r\n"),
    "a size with a prefix": ([b"Transfer-Encoding: chunked"], b"0x8\r\n" + TEXT + b"\r\n0\r\n\r\n"),
    "a huge size": ([b"Transfer-Encoding: chunked"], b"f" * 40 + b"\r\n" + TEXT),
    "a size too small": ([b"Transfer-Encoding: chunked"], b"2\r\n" + TEXT + b"\r\n0\r\n\r\n"),
    "chunks without an end": ([b"Transfer-Encoding: chunked"], (b"1\r\nn\r\n" * 50)),
    "none": ([], TEXT),
}
MANNERS = ["close", "reset", "read", "read", "read"]


@st.composite
def raws(draw: Any) -> Raw:
    """A request with something wrong, or nothing."""
    wrong = draw(st.sampled_from(["", "", "line", "field", "end", "frame", "frame", "cut", "noise"]))
    if wrong == "noise":
        return Raw(draw(st.binary(max_size=60)), "any", draw(st.sampled_from(MANNERS)))
    method, target, version = b"POST", draw(st.sampled_from(TARGETS[:4])), b"HTTP/1.1"
    fields = [b"Host: localhost", b"Connection: close"]
    frame = draw(st.sampled_from(["length", "chunks"]))
    end = b"\r\n"
    if wrong == "line":
        method = draw(st.sampled_from([method, *METHODS]) | st.binary(max_size=5))
        target = draw(st.sampled_from(TARGETS + ODD_TARGETS) | st.binary(max_size=9).map(lambda path: b"/" + path))
        version = draw(st.sampled_from([version, *VERSIONS]))
    elif wrong == "field":
        fields = draw(
            st.permutations(fields + draw(st.lists(st.sampled_from(FIELDS) | st.binary(max_size=9), max_size=3)))
        )
    elif wrong == "end":
        end = draw(st.sampled_from(ENDS))
    elif wrong == "frame":
        frame = draw(st.sampled_from(sorted(FRAMES)))
    framing, body = FRAMES[frame]
    data = end.join([b" ".join([method, target, version]), *fields, *framing, b"", body])
    if wrong == "cut":
        data = data[: draw(st.integers(0, len(data) - 1))]
    manner = draw(st.sampled_from(MANNERS))
    if wrong == "cut" and data.endswith((b"0", b"0\r", b"0\r\n", b"0\r\n\r")):
        # The last chunk has begun: of the body nothing is missing, which is enough for cheroot.
        return Raw(data, "any", manner)
    if wrong == "cut" or frame.endswith("cut"):
        # Whoever waited for the answer would wait until the server has enough of it.
        return Raw(data, "cut", draw(st.sampled_from(MANNERS[:2])))
    if wrong == "" and manner == "read":
        return Raw(data, "good", manner)
    return Raw(data, "any", manner)


class Attacked:
    """A server that runs, and its database."""

    def __init__(self, running: Running, url: URL) -> None:
        self._running = running
        self._engine = sa.create_engine(url, poolclass=NullPool)
        #: The texts of the requests that the server may have heard of, but not of all of it.
        self.cut: set[str] = set()
        self.outcomes: Counter[str] = Counter()

    def send(self, raw: Raw) -> None:
        text = f"n{next(_numbers):07}"
        answer = self._exchange(raw, raw.data.replace(HEAD, text[:3].encode()).replace(TAIL, text[3:].encode()))
        self.outcomes[f"{raw.kind}, {answer[9:12].decode('latin-1') or 'no answer'}"] += 1
        if raw.kind == "good":
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), answer
            assert text in answer.decode()
            # What a client has been told is durable.
            assert text in self.notes()
        elif raw.kind == "cut":
            self.cut.add(text)

    def _exchange(self, raw: Raw, data: bytes) -> bytes:
        answer = b""
        with socket.create_connection(("127.0.0.1", self._running.port), timeout=SECONDS_TO_ANSWER) as connection:
            if raw.manner == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if raw.kind != "good":
                # Some wait for more of what is no request: that is no reason to wait for them.
                connection.settimeout(0.1)
            try:
                connection.sendall(data)
                while raw.manner == "read" and (more := connection.recv(65536)):
                    answer += more
            except OSError:
                # It may have hung up.
                if raw.kind == "good":
                    raise
        return answer

    def notes(self) -> list[str]:
        with self._engine.connect() as connection:
            return sorted(connection.exec_driver_sql("SELECT text FROM note").scalars())

    def assert_unharmed(self) -> None:
        """It serves as ever, has everything back, and the database has what was answered with a success, no more."""
        self.send(
            Raw(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 8\r\n\r\n" + TEXT, "good", "read")
        )
        deadline = time.monotonic() + SECONDS_TO_ANSWER
        while True:
            state = self._running.state()
            notes = self.notes()
            at_rest = not (state["running"] or state["checked_out"])
            # A commit comes before it is told, so one that is on its way is seen in the database first.
            if (at_rest and state["told"] == notes) or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        assert (state["running"], state["checked_out"]) == (0, 0)
        assert state["told"] == notes
        assert not self.cut & set(notes)
        assert not state["bound"]
        assert not state["strays"]
        assert not state["forged"]

    def close(self) -> None:
        self._engine.dispose()
