"""The clients of the bank: what they ask for, how they hang up, and what they get to see.

Each notes every request with what came of it (:attr:`Request.answer`):

* a status, as in ``"200"``: the whole response was read;
* ``"cut"``: the server has broken the connection before the response was complete;
* ``"hung up"``: the client has broken it, sooner or later after it had sent the request;
* ``"not connected"``: there was nobody to send it to;
* ``"unanswered"``: nothing came of it in :data:`GUARD` seconds. That must not be.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from tests.proof.bank import KINDS, PAGES

CLIENTS = 16

ACCOUNTS = 5
BALANCE = 1000

#: Seconds. Whatever becomes of a request has come by then, even on a machine that is busy with something else.
GUARD = 60

#: Seconds that a client waits who hangs up because it takes too long, or who has no more than a glance at it.
IMPATIENCE = 1.0
GLANCE = 0.03

#: Seconds that a client waits who was told, or has seen, that something is broken; or who has found nobody.
PAUSE = 0.02
LONGER_PAUSE = 0.2

#: What a client asks for, and how often. ``half an order`` is broken off while it is sent; ``cut export``, which is far
#: larger than all the buffers on its way, after the first chunk.
SHARES = {
    "transfer": 56,
    "early transfer": 6,
    "abandoned transfer": 3,
    "late transfer": 12,
    "rehearsal": 4,
    "blunder": 4,
    "half an order": 4,
    "export": 8,
    "cut export": 8,
}
assert SHARES.keys() > set(KINDS)


@dataclass
class Request:
    id: str
    kind: str
    branch: str
    #: ``(source, target, amount)``; of an export, nothing.
    order: tuple[int, int, int] | None
    answer: str = ""
    #: What a complete export has told of the sum of all balances.
    total: int | None = None


class Client:
    """One of them, who sends one request after the other."""

    def __init__(self, number: int, port: int, seen: Callable[[Request], None]) -> None:
        self._name = f"c{number}"
        self._port = port
        self._seen = seen
        self._numbers = count(1)
        self._random = random.Random(number)
        self._connection: http.client.HTTPConnection | None = None
        self.requests: list[Request] = []

    def run(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                request = self._make()
                self.requests.append(request)
                request.answer = self._send(request)
                self._seen(request)
                if request.answer not in ("200", "409"):
                    self._hang_up()
                    stop.wait(LONGER_PAUSE if request.answer == "not connected" else PAUSE)
        finally:
            self._hang_up()

    def _make(self) -> Request:
        [kind] = self._random.choices(list(SHARES), list(SHARES.values()))
        order = None
        if kind not in ("export", "cut export"):
            source, target = self._random.sample(range(1, ACCOUNTS + 1), 2)
            order = (source, target, self._random.randint(1, BALANCE // 2))
        branch = self._random.choice(["local", "context"])
        return Request(f"{self._name}-{next(self._numbers)}", kind, branch, order)

    def _send(self, request: Request) -> str:
        try:
            connection = self._connect()
        except TimeoutError:
            return "unanswered"
        except OSError:
            return "not connected"
        patience = self._random.choices([None, IMPATIENCE, self._random.uniform(0, GLANCE)], [7, 2, 1])[0]
        try:
            if request.order is None:
                return self._export(connection, request)
            return self._transfer(connection, request, patience)
        except TimeoutError:
            return "unanswered" if patience is None else "hung up"
        except (OSError, http.client.HTTPException):
            return "cut"

    def _connect(self) -> http.client.HTTPConnection:
        # Where the server has said that it closes the connection, there is no socket any more.
        if self._connection is None or self._connection.sock is None:
            self._connection = connection = http.client.HTTPConnection("127.0.0.1", self._port)
            connection.sock = socket.socket()
            # Else the kernel would take in megabytes of an export that nobody reads.
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            # As http.client does: the head and the body of a request are not to wait for each other.
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sock.settimeout(GUARD)
            connection.sock.connect(("127.0.0.1", self._port))
        else:
            self._connection.sock.settimeout(GUARD)
        return self._connection

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _transfer(self, connection: http.client.HTTPConnection, request: Request, patience: float | None) -> str:
        assert request.order is not None
        source, target, amount = request.order
        kind = "transfer" if request.kind == "half an order" else request.kind
        order = {
            "kind": kind,
            "source": source,
            "target": target,
            "amount": amount,
            "lock": self._random.random() < 0.3,
        }
        body = json.dumps(order).encode()
        connection.putrequest("POST", f"/{request.branch}/transfer/{request.id}")
        connection.putheader("Content-Length", str(len(body)))
        if request.kind == "half an order":
            connection.endheaders(body[: len(body) // 2])
            return "hung up"
        connection.endheaders(body)
        connection.sock.settimeout(patience or GUARD)
        response = self._response(connection)
        response.read()
        return str(response.status)

    def _export(self, connection: http.client.HTTPConnection, request: Request) -> str:
        cut = request.kind == "cut export"
        connection.request("GET", f"/{request.branch}/export/{request.id}?{PAGES if cut else 2}")
        response = self._response(connection)
        if cut and response.status == 200:
            response.readline()
            return "hung up"
        content = response.read()
        if response.status == 200:
            request.total = int(content.partition(b"\n")[0])
        return str(response.status)

    def _response(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        response = connection.getresponse()
        # Else nobody could tell a response that is complete from one that was cut.
        assert response.chunked or response.length is not None
        return response
