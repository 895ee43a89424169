"""The live panel: a WSGI middleware that watches what each request does to the database.

It knows nothing of ``sa_wsgi_session`` and asks it nothing: what it shows is what SQLAlchemy's own
events tell. What a request has written is *committed* once the session reports a commit that
succeeded. What it has written and not committed when its connection goes back to the pool is
*rolled back*. What begins anew after the database has refused a statement, because somebody else was
quicker, is *another attempt*. It is demonstration code, made to be plain and not to be quick.
"""

from __future__ import annotations

import contextvars
import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from . import model
from .safety import WSGIApplication

_REQUESTS_SHOWN = 15
_JOBS_SHOWN = 3
_WRITES = ("INSERT", "UPDATE", "DELETE")
_SQLITE_BUSY = "database is locked"
#: As psycopg2 tells it.
_SERIALIZATION = "40001"

#: The request or job whose code runs here and now.
_current: contextvars.ContextVar[_Record | None] = contextvars.ContextVar("record", default=None)


@dataclass
class _Record:
    """What is known of one request, or of one run of a job."""

    number: int
    method: str
    path: str
    status: str = ""
    statements: int = 0
    #: Statements that changed something, of which it is not yet known what became of them.
    undecided: int = 0
    #: "committed" and "rolled back", in the order in which it happened.
    decisions: list[str] = field(default_factory=list)
    attempts: int = 1
    #: Whether this attempt has lost a race.
    lost_race: bool = False
    connections: int = 0
    units: int = 0
    started: float = field(default_factory=time.perf_counter)
    seconds: float | None = None

    @contextmanager
    def bound(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def decide(self, decision: str) -> None:
        if self.undecided and decision not in self.decisions[-1:]:
            self.decisions.append(decision)
        self.undecided = 0

    def count_unit(self, step: int) -> None:
        self.units += step
        if step > 0 and self.lost_race:
            self.lost_race = False
            self.attempts += 1
            # It is this attempt that counts now, and no longer the one that was undone.
            if self.decisions[-1:] == ["rolled back"]:
                self.decisions.pop()

    @property
    def outcome(self) -> tuple[str, str]:
        """What became of its changes: a kind (for the colour) and a text."""
        if self.seconds is None:
            return "running", "running"
        if self.undecided or self.connections or self.units:
            return "leak", "left open"
        if not self.decisions:
            return "nothing", "no change"
        kind = "rolled-back" if "rolled back" in self.decisions else "committed"
        return kind, ", then ".join(self.decisions)

    def as_json(self) -> dict[str, Any]:
        kind, outcome = self.outcome
        seconds = time.perf_counter() - self.started if self.seconds is None else self.seconds
        return {
            "number": self.number,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "kind": kind,
            "outcome": outcome,
            "attempts": self.attempts,
            "statements": self.statements,
            "milliseconds": round(seconds * 1000, 1),
        }


class Panel:
    """WSGI middleware: watches the application, and answers ``GET /panel.json`` itself."""

    def __init__(self, application: WSGIApplication, engine: Engine, replicas: Iterable[Engine] = ()) -> None:
        self.application = application
        self._engines = [engine, *replicas]
        # The panel reads the books over connections of its own, which are none of those it counts.
        self._own_engine = model.open_aside(engine)
        self._lock = threading.Lock()
        self._number = 0
        self._running: dict[int, _Record] = {}
        self._requests: deque[_Record] = deque(maxlen=_REQUESTS_SHOWN)
        self._jobs: deque[_Record] = deque(maxlen=_JOBS_SHOWN)
        self._units = 0
        self._listeners = [
            *((each, "before_cursor_execute", self._on_statement) for each in self._engines),
            *((each, "checkout", self._on_checkout) for each in self._engines),
            *((each, "checkin", self._on_checkin) for each in self._engines),
            *((each, "handle_error", self._on_error) for each in self._engines),
            (model.Session, "after_transaction_create", self._on_unit_begin),
            (model.Session, "after_transaction_end", self._on_unit_end),
            (model.Session, "after_commit", self._on_commit),
        ]
        for target, name, listener in self._listeners:
            event.listen(target, name, listener)

    def close(self) -> None:
        while self._listeners:
            event.remove(*self._listeners.pop())
        self._own_engine.dispose()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
        if path == "/panel.json":
            return self._answer(start_response)
        environ["ledger.panel"] = self
        if path.startswith("/static/"):
            return self.application(environ, start_response)

        record = self._open(environ["REQUEST_METHOD"], path)

        def start(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
            record.status = status[:3]
            return start_response(status, headers, *exc_info)

        try:
            with record.bound():
                body = self.application(environ, start)
        except BaseException:
            record.status += " failed"
            self._close(record)
            raise
        if isinstance(body, (list, tuple)):
            self._close(record)
            return body
        return _WatchedBody(self, record, body)

    @contextmanager
    def job(self, name: str) -> Iterator[None]:
        """Watch what runs in this block as one run of a job."""
        record = self._open("job", name)
        try:
            with record.bound():
                yield
            record.status = "done"
        except BaseException:
            record.status = "failed"
            raise
        finally:
            self._close(record)

    def snapshot(self) -> dict[str, Any]:
        """What the panel shows. What the request that asks for it holds itself is not counted."""
        own = _current.get()
        with self._lock:
            connections = sum(engine.pool.checkedout() for engine in self._engines)  # type: ignore[attr-defined]
            units = self._units
            records = [*self._running.values(), *self._requests, *self._jobs]
            if own is not None:
                connections -= own.connections
                units -= own.units
                records.remove(own)
            records.sort(key=lambda record: record.number, reverse=True)
            requests = [record.as_json() for record in records]
        with self._own_engine.connect() as connection:
            found = model.audit(connection)
        return {
            "sound": found.sound,
            "verdict": found.verdict,
            "balances": {number: model.pounds(balance) for number, balance in found.balances.items()},
            "connections": connections,
            "units": units,
            "requests": requests,
        }

    def _answer(self, start_response: Any) -> list[bytes]:
        body = json.dumps(self.snapshot()).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
        ]
        start_response("200 OK", headers)
        return [body]

    def _open(self, method: str, path: str) -> _Record:
        with self._lock:
            self._number += 1
            record = _Record(self._number, method[:10], path[:60])
            self._running[record.number] = record
        return record

    def _close(self, record: _Record) -> None:
        with self._lock:
            record.seconds = time.perf_counter() - record.started
            del self._running[record.number]
            (self._jobs if record.method == "job" else self._requests).append(record)

    # What SQLAlchemy tells. Each comes on the thread that works for the record.

    def _on_statement(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        record = _current.get()
        if record is not None:
            record.statements += 1
            record.undecided += statement.lstrip().upper().startswith(_WRITES)

    def _on_checkout(self, *_: Any) -> None:
        record = _current.get()
        if record is not None:
            record.connections += 1

    def _on_checkin(self, *_: Any) -> None:
        record = _current.get()
        if record is not None:
            record.connections -= 1
            # No transaction outlives its connection's return to the pool.
            record.decide("rolled back")

    def _on_error(self, context: Any) -> None:
        record = _current.get()
        error = context.original_exception
        if record is not None and (str(error) == _SQLITE_BUSY or getattr(error, "pgcode", None) == _SERIALIZATION):
            record.lost_race = True

    def _on_commit(self, _session: Any) -> None:
        record = _current.get()
        if record is not None:
            record.decide("committed")

    def _on_unit_begin(self, _session: Any, transaction: Any) -> None:
        self._count_unit(transaction, +1)

    def _on_unit_end(self, _session: Any, transaction: Any) -> None:
        self._count_unit(transaction, -1)

    def _count_unit(self, transaction: Any, step: int) -> None:
        if transaction.parent is not None:  # a SAVEPOINT, or a flush
            return
        record = _current.get()
        if record is not None:
            record.count_unit(step)
        with self._lock:
            self._units += step


class _WatchedBody:
    """The body of a response, with its record bound whenever code of the application runs."""

    def __init__(self, panel: Panel, record: _Record, body: Iterable[bytes]) -> None:
        self._panel = panel
        self._record = record
        self._body = body
        self._chunks: Iterator[bytes] | None = None
        self._ended = False
        self._closed = False

    def __iter__(self) -> _WatchedBody:
        return self

    def __next__(self) -> bytes:
        try:
            with self._record.bound():
                if self._chunks is None:
                    self._chunks = iter(self._body)
                return next(self._chunks)
        except StopIteration:
            self._ended = True
            raise
        except BaseException:
            self._ended = True
            self._record.status += " broken off"
            raise

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._ended:
            self._record.status += " cancelled"
        try:
            with self._record.bound():
                close = getattr(self._body, "close", None)
                if close is not None:
                    close()
        finally:
            self._panel._close(self._record)
