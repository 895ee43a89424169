"""What the middleware costs, beside the same application with its session managed by hand; and what a policy adds.

    python benchmarks/hot_path.py [--rounds 60] [--json FILE]

Everything runs in this one process, on SQLite in memory, in short rounds that alternate between the contenders, and is
measured in seconds of processor time of the thread, so that whatever else the machine does hits all of them alike.
What counts are the ratios; each is the median over the rounds, with the quartiles beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from sa_wsgi_session import RetryPolicy, SessionMiddleware, contextual_session

#: What makes a scoped session, by the kind of registry that it has.
KINDS: dict[str, Any] = {"thread-local": scoped_session, "contextual": contextual_session}

Environ = dict[str, Any]
Application = Callable[[Environ, Any], Iterable[bytes]]

Base: Any = declarative_base()


class Row(Base):
    __tablename__ = "row"
    id = sa.Column(sa.Integer, primary_key=True)
    text = sa.Column(sa.String(50), nullable=False)


def make_engine() -> sa.engine.Engine:
    engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Row), [{"id": number, "text": f"row {number}"} for number in range(1, 101)])
    return engine


def by_hand(app: Application, Session: Any) -> Application:
    """What the textbook says: commit, else roll back, and remove in any case."""

    def application(environ: Environ, start_response: Any) -> Iterable[bytes]:
        try:
            body = app(environ, start_response)
            Session.commit()
            return body
        except BaseException:
            Session.rollback()
            raise
        finally:
            Session.remove()

    return application


# -- the applications -------------------------------------------------------------------------------------------------


def make_applications(Session: Any) -> dict[str, Application]:
    def no_session(environ: Environ, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"x"]

    def session_only(environ: Environ, start_response: Any) -> Iterable[bytes]:
        Session()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"x"]

    def one_row_read(environ: Environ, start_response: Any) -> Iterable[bytes]:
        row = Session.get(Row, 7)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [row.text.encode()]

    def one_row_write(environ: Environ, start_response: Any) -> Iterable[bytes]:
        row = Session.get(Row, 7)
        row.text = f"row {environ['bench.count']}"
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"x"]

    return {
        "no session": no_session,
        "session only": session_only,
        "one-row read": one_row_read,
        "one-row write": one_row_write,
    }


CHUNKS = 2000


def stream(environ: Environ, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return (b"x" for _ in range(CHUNKS))


def make_stream_with_session(Session: Any) -> Application:
    def stream_with_session(environ: Environ, start_response: Any) -> Iterable[bytes]:
        Session()
        return stream(environ, start_response)

    return stream_with_session


# -- measuring --------------------------------------------------------------------------------------------------------


def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
    return len


def drain(body: Iterable[bytes]) -> None:
    for _ in body:
        pass
    close = getattr(body, "close", None)
    if close is not None:
        close()


#: As many entries as the environ of a browser's request has, which a policy copies.
HEADERS = {f"HTTP_X_{number}": "value" for number in range(32)}


def time_requests(app: Application, requests: int, headers: dict[str, str] | None = None) -> float:
    """Seconds per request."""
    begin = time.thread_time()
    for count in range(requests):
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "bench.count": count, **(headers or {})}
        for _ in app(environ, start_response):
            pass
    return (time.thread_time() - begin) / requests


def time_chunks(app: Application) -> float:
    """Seconds per chunk of one streamed response."""
    body = app({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, start_response)
    begin = time.thread_time()
    for _ in body:
        pass
    elapsed = time.thread_time() - begin
    close = getattr(body, "close", None)
    if close is not None:
        close()
    return elapsed / CHUNKS


def alternate(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for measure in contenders.values():
        measure()  # warm up: caches of compiled statements, specialised bytecode
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            # Each goes first as often as it goes last.
            names = list(contenders) if number % 2 else list(reversed(contenders))
            for name in names:
                times[name].append(contenders[name]())
            gc.collect()
    finally:
        gc.enable()
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


#: How many requests make a round.
REQUESTS = {"no session": 400, "session only": 150, "one-row read": 40, "one-row write": 25}


def measure_requests(rounds: int) -> Iterator[dict[str, Any]]:
    for case, requests in REQUESTS.items():
        contenders: dict[str, Callable[[], float]] = {}
        engines = []

        def add(name: str, app: Application, contenders: dict[str, Any] = contenders, requests: int = requests) -> None:
            contenders[name] = lambda: time_requests(app, requests)

        for kind in ("by hand", *KINDS):
            engine = make_engine()
            engines.append(engine)
            Session = KINDS.get(kind, scoped_session)(sessionmaker(engine))
            app = make_applications(Session)[case]
            add(kind, by_hand(app, Session) if kind == "by hand" else SessionMiddleware(app, Session))
        times = alternate(contenders, rounds)
        for kind in KINDS:
            ratios = [ours / theirs for ours, theirs in zip(times[kind], times["by hand"], strict=True)]
            yield {
                "case": case,
                "registry": kind,
                "by_hand_us": statistics.median(times["by hand"]) * 1e6,
                "us": statistics.median(times[kind]) * 1e6,
                "ratio": quartiles(ratios),
            }
        for engine in engines:
            engine.dispose()


def measure_policy(rounds: int) -> Iterator[dict[str, Any]]:
    """The same application, on the same engine and session, without a ``RetryPolicy`` and with one."""
    for kind, make in KINDS.items():
        engine = make_engine()
        Session: Any = make(sessionmaker(engine))
        for case, app in make_applications(Session).items():
            without, with_policy = SessionMiddleware(app, Session), SessionMiddleware(app, Session, retry=RetryPolicy())
            times = alternate(
                {
                    "without": partial(time_requests, without, REQUESTS[case], HEADERS),
                    "with": partial(time_requests, with_policy, REQUESTS[case], HEADERS),
                },
                rounds,
            )
            extra = [(more - less) * 1e6 for more, less in zip(times["with"], times["without"], strict=True)]
            yield {
                "case": case,
                "registry": kind,
                "without_us": statistics.median(times["without"]) * 1e6,
                "extra_us": quartiles(extra),
            }
        engine.dispose()


def measure_chunks(rounds: int) -> Iterator[dict[str, Any]]:
    engine = make_engine()
    for held in (False, True):
        contenders: dict[str, Callable[[], float]] = {"bare": lambda: time_chunks(stream)}
        for kind, make in KINDS.items():
            Session: Any = make(sessionmaker(engine))
            app = SessionMiddleware(make_stream_with_session(Session) if held else stream, Session)
            contenders[kind] = lambda app=app: time_chunks(app)  # type: ignore[misc]
        times = alternate(contenders, rounds)
        for kind in KINDS:
            extra = [(ours - bare) * 1e9 for ours, bare in zip(times[kind], times["bare"], strict=True)]
            yield {
                "case": "chunk, a session in use" if held else "chunk, no session",
                "registry": kind,
                "bare_ns": statistics.median(times["bare"]) * 1e9,
                "extra_ns": quartiles(extra),
            }
    engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60, help="how often each contender is measured (default: 60)")
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, not {arguments.rounds}")
    print(f"Python {platform.python_version()}, SQLAlchemy {sa.__version__}, {platform.platform()}")
    results = []
    print(f"\n{'request':<16} {'registry':<14} {'by hand':>10} {'this':>10}   ratio (quartiles)")
    for result in measure_requests(arguments.rounds):
        results.append(result)
        low, middle, high = result["ratio"]
        print(
            f"{result['case']:<16} {result['registry']:<14} {result['by_hand_us']:>7.1f} us {result['us']:>7.1f} us"
            f"   {middle:.3f} ({low:.3f}-{high:.3f})",
            flush=True,
        )
    print(f"\n{'retry=RetryPolicy()':<20} {'registry':<14} {'without':>10}   more than that (quartiles)")
    for result in measure_policy(arguments.rounds):
        results.append(result)
        low, middle, high = result["extra_us"]
        print(
            f"{result['case']:<20} {result['registry']:<14} {result['without_us']:>7.1f} us"
            f"   {middle:+.2f} us ({low:+.2f} to {high:+.2f})",
            flush=True,
        )
    print(f"\n{'body':<26} {'registry':<14} {'bare':>8}   more than that (quartiles)")
    for result in measure_chunks(arguments.rounds):
        results.append(result)
        low, middle, high = result["extra_ns"]
        print(
            f"{result['case']:<26} {result['registry']:<14} {result['bare_ns']:>5.0f} ns"
            f"   {middle:+.0f} ns ({low:+.0f} to {high:+.0f})",
            flush=True,
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"python": sys.version, "sqlalchemy": sa.__version__, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
