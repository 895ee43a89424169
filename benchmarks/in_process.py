"""Time and memory of a request, without a server: the application is called, and its body read, in this process.

On SQLite in memory, in short rounds that go round the contenders, in seconds of processor time of the thread: whatever
else the machine does hits all of them alike.  What counts are the ratios.
"""

from __future__ import annotations

import gc
import io
import sys
import time
import tracemalloc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import scoped_session, sessionmaker

from benchmarks.contenders import CASES, CHUNKS, CONTENDERS, FAMILIES, HEADERS, Application, Database, Environ, Failure
from sa_wsgi_session import SessionMiddleware, contextual_session

#: How many requests of a case make a round.
REQUESTS = {
    "/none": 200,
    "/session": 100,
    "/read": 25,
    "/rows": 2,
    "/insert": 15,
    "/stream": 4,
    "/error": 15,
    "/race": 8,
}
ROUNDS = 40

#: What a browser sends, more or less.
_ENVIRON: Environ = {
    "REQUEST_METHOD": "GET",
    "SCRIPT_NAME": "",
    "QUERY_STRING": "",
    "SERVER_NAME": "localhost",
    "SERVER_PORT": "80",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "REMOTE_ADDR": "127.0.0.1",
    "HTTP_HOST": "localhost",
    "HTTP_ACCEPT": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8",
    "HTTP_ACCEPT_ENCODING": "gzip, deflate, br",
    "HTTP_ACCEPT_LANGUAGE": "en",
    "HTTP_USER_AGENT": "Mozilla/5.0",
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.errors": sys.stderr,
    "wsgi.multithread": True,
    "wsgi.multiprocess": False,
    "wsgi.run_once": False,
}


def environ_for(path: str) -> Environ:
    return {**_ENVIRON, "PATH_INFO": path, "wsgi.input": io.BytesIO()}


def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
    return len


def serve(app: Application, environ: Environ) -> None:
    """What a server does."""
    try:
        body = app(environ, start_response)
        try:
            for _ in body:
                pass
        finally:
            close = getattr(body, "close", None)
            if close is not None:
                close()
    except Failure:
        pass  # which other applications have answered with a page by now


def time_requests(app: Application, path: str, requests: int) -> float:
    """Seconds per request."""
    environs = [environ_for(path) for _ in range(requests)]
    begin = time.thread_time()
    for environ in environs:
        serve(app, environ)
    return (time.thread_time() - begin) / requests


def peak_of_request(app: Application, path: str) -> int:
    """Bytes that a request holds at its peak: the least of several, because caches grow now and then."""
    peaks = []
    for _ in range(10):
        environ = environ_for(path)
        gc.collect()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        serve(app, environ)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    return min(peaks)


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each has measured, round by round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for measure in contenders.values():
        measure()  # warm up: caches of compiled statements, specialised bytecode
    # The garbage of one contender is not to be collected in the time of another one. (Its own is.)
    for number in range(rounds):
        names = list(contenders)
        # Each goes first as often as any other.
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            times[name].append(contenders[name]())
    return times


@contextmanager
def frozen() -> Iterator[None]:
    """What is there by now is no garbage: a collection need not look through it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def measure(
    tell: Callable[[str], None], *, scale: float = 1.0, families: Collection[str] = FAMILIES
) -> Iterator[dict[str, Any]]:
    """The requests of all contenders, then the chunks of a body.

    :param tell: called with what is being measured.
    :param scale: of the number of rounds.
    :param families: of the contenders.
    """
    rounds = max(3, round(ROUNDS * scale))
    apps: dict[str, Application] = {
        contender.name: contender.make(Database()) for contender in CONTENDERS if contender.family in families
    }
    with frozen():
        for case in CASES:
            tell(f"in one process: {case}")
            contenders = {
                contender.name: partial(time_requests, apps[contender.name], case, REQUESTS[case])
                for contender in CONTENDERS
                if contender.name in apps and case not in contender.without
            }
            if not contenders:
                continue
            times = alternate(contenders, rounds)
            tracemalloc.start()
            peaks = {name: peak_of_request(apps[name], case) for name in contenders}
            tracemalloc.stop()
            for name in contenders:
                yield {
                    "part": "request",
                    "case": case,
                    "contender": name,
                    "microseconds": [seconds * 1e6 for seconds in times[name]],
                    "peak_bytes": peaks[name],
                }
        yield from _measure_chunks(tell, rounds)


def _measure_chunks(tell: Callable[[str], None], rounds: int) -> Iterator[dict[str, Any]]:
    engine = sa.create_engine("sqlite://")
    for uses_session in (False, True):
        tell(f"in one process: chunks, {'a session in use' if uses_session else 'no session'}")

        def app(environ: Environ, start_response: Any, Session: Any = None) -> Iterable[bytes]:
            if Session is not None:
                Session()
            start_response("200 OK", HEADERS)
            return (b"x" for _ in range(CHUNKS))

        contenders: dict[str, Callable[[], float]] = {"bare generator": partial(_time_chunks, app)}
        for name, make in (("thread-local", scoped_session), ("contextual", contextual_session)):
            Session = make(sessionmaker(engine))

            def used(environ: Environ, start_response: Any, Session: Any = Session) -> Iterable[bytes]:
                return app(environ, start_response, Session)

            ours = SessionMiddleware(used if uses_session else app, Session)
            contenders[name] = partial(_time_chunks, ours)
        for name, times in alternate(contenders, rounds * 2).items():
            yield {
                "part": "chunk",
                "case": "a session in use" if uses_session else "no session",
                "contender": name,
                "nanoseconds": [seconds * 1e9 for seconds in times],
            }
    engine.dispose()


def _time_chunks(app: Application) -> float:
    """Seconds per chunk of one body."""
    body = app(environ_for("/"), start_response)
    begin = time.thread_time()
    for _ in body:
        pass
    elapsed = time.thread_time() - begin
    close = getattr(body, "close", None)
    if close is not None:
        close()
    return elapsed / CHUNKS
