"""How the cost of a request grows: with threads, with responses that stream meanwhile, with requests served before."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.contenders import Application, Database, named
from benchmarks.in_process import alternate, environ_for, frozen, serve, start_response, time_requests

NAMES = ("by hand", "sa_wsgi_session", "sa_wsgi_session, contextual")
THREADS = (1, 2, 4, 8, 16, 32)
STREAMING = (0, 10, 100, 1000)
SERVED = 20_000
STEPS = 10


def measure(tell: Callable[[str], None], *, scale: float = 1.0) -> Iterator[dict[str, Any]]:
    """The request that makes a session and does nothing with it: most of it is ours.

    :param tell: called with what is being measured.
    :param scale: of the number of rounds, or of requests.
    """
    with frozen():
        yield from _with_threads(tell, max(3, round(20 * scale)))
        yield from _with_streams(tell, max(3, round(20 * scale)))
        yield from _with_requests(tell, max(STEPS, round(SERVED * scale)))


def _apps() -> dict[str, Application]:
    return {name: named(name).make(Database()) for name in NAMES}


def _with_threads(tell: Callable[[str], None], rounds: int) -> Iterator[dict[str, Any]]:
    for threads in THREADS:
        tell(f"growth: {threads} threads")
        contenders = {name: partial(_time_in_threads, app, threads) for name, app in _apps().items()}
        for name, times in alternate(contenders, rounds).items():
            yield {
                "part": "growth",
                "with": "threads",
                "count": threads,
                "contender": name,
                "microseconds": [seconds * 1e6 for seconds in times],
            }


def _time_in_threads(app: Application, threads: int, requests: int = 320) -> float:
    """Seconds of processor time per request; the threads wait for each other to begin."""
    barrier = threading.Barrier(threads)
    times: list[float] = []

    def run() -> None:
        barrier.wait()
        times.append(time_requests(app, "/session", requests // threads))

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(times) / len(times)


def _with_streams(tell: Callable[[str], None], rounds: int) -> Iterator[dict[str, Any]]:
    """While so many responses of this thread have sent their first chunk, and wait for their clients."""
    for streaming in STREAMING:
        tell(f"growth: {streaming} responses that stream")
        apps = _apps()
        bodies = []
        for app in apps.values():
            for _ in range(streaming):
                body = app(environ_for("/stream"), start_response)
                chunks = iter(body)
                next(chunks)
                bodies.append((body, chunks))
        contenders = {name: partial(time_requests, app, "/session", 100) for name, app in apps.items()}
        for name, times in alternate(contenders, rounds).items():
            yield {
                "part": "growth",
                "with": "streams",
                "count": streaming,
                "contender": name,
                "microseconds": [seconds * 1e6 for seconds in times],
            }
        for body, chunks in bodies:
            del chunks
            close = getattr(body, "close", None)
            if close is not None:
                close()


def _with_requests(tell: Callable[[str], None], requests: int) -> Iterator[dict[str, Any]]:
    """The time of each tenth of so many requests, and the memory that is left after it."""
    tell(f"growth: {requests} requests")
    apps = _apps()
    step = requests // STEPS
    for app in apps.values():
        time_requests(app, "/read", 500)
    for number in range(1, STEPS + 1):
        for name, app in apps.items():
            seconds = time_requests(app, "/session", step)
            # Measuring memory slows down what is measured: a hundredth of the requests are done once more for it.
            tracemalloc.start()
            serve(app, environ_for("/read"))
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(max(1, step // 100)):
                serve(app, environ_for("/read"))
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            yield {
                "part": "growth",
                "with": "requests",
                "count": number * step,
                "contender": name,
                "microseconds": [seconds * 1e6],
                "grown_bytes": grown,
            }
