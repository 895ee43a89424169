"""Visitors of an application with replicas, at random, on many threads: none of them may ever see the past.

There is a row for each of some keys, and its version only grows.  A visitor remembers the versions that they have seen,
and those that they have written.  What they see next must not be older, whatever server it comes from: that is checked
from the outside, by what the responses say.

``tox -e replicas`` plays 10,000 requests of 50 visitors, and prints the figures.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import sqlalchemy as sa

from sa_wsgi_session import RetryPolicy, SessionMiddleware
from tests.replicated import Site, Sites, Visitor, make_sites
from tests.servers import Replicated

REQUESTS = int(os.environ.get("REPLICAS_REQUESTS", "600"))
VISITORS = 50
THREADS = 8
KEYS = 10


@pytest.fixture(scope="module")
def sites(replicated: Replicated) -> Iterator[Sites]:
    with make_sites(replicated) as sites:
        engine = sa.create_engine(sites.url)
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE version (key int PRIMARY KEY, number int NOT NULL)"))
            connection.execute(sa.text(f"INSERT INTO version SELECT n, 0 FROM generate_series(0, {KEYS - 1}) n"))
        engine.dispose()
        replicated.wait_until_replayed()
        yield sites


def versions(site: Site) -> Any:
    return site.Session.execute(sa.text("SELECT key, number FROM version ORDER BY key"))


def write(site: Site, key: str) -> Any:
    statement = sa.text("UPDATE version SET number = number + 1 WHERE key = :key RETURNING key, number")
    return site.Session.execute(statement, {"key": int(key)})


def application(site: Site) -> Any:
    """What a visitor can do: each answers with the versions that it has seen."""

    def app(environ: Any, start_response: Any) -> Any:
        what, _, key = environ["PATH_INFO"].strip("/").partition("/")
        status = "404 Not Found" if what == "refused" else "200 OK"
        if what == "stream":
            rows = versions(site)
            start_response(status, [])
            return (f"{key} {number}\n".encode() for key, number in rows)
        rows = write(site, key) if what in ("write", "touch") else versions(site)
        body = ["".join(f"{key} {number}\n" for key, number in rows).encode()]
        start_response(status, [])
        return body if what != "iterate" else iter(body)

    return app


#: Method, path, and of how many requests.  A "touch" is a change in a safe request; a "refused" one reads on the
#: primary, but changes nothing, and is rolled back.
KINDS = [
    ("GET", "read", 70),
    ("GET", "iterate", 6),
    ("GET", "stream", 6),
    ("HEAD", "read", 3),
    ("POST", "write", 10),
    ("POST", "read", 2),
    ("POST", "refused", 2),
    ("GET", "touch", 1),
]


class Person:
    """A visitor with a memory."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.seen = [0] * KEYS

    def request(self, method: str, what: str, key: int) -> list[str]:
        """Make a request, and tell where it has shown the past."""
        exchange = self.visitor.exchange(f"/{what}/{key}", method)
        wrong = []
        for line in exchange.read().decode().splitlines():
            row, version = map(int, line.split())
            if version < self.seen[row]:
                wrong.append(f"{method} {what}: row {row} is {version}, and was {self.seen[row]}")
            self.seen[row] = max(self.seen[row], version)
        return wrong


class Load:
    """Requests of visitors, on threads, and what came of them."""

    def __init__(self, site: Site, seed: int, **options: Any) -> None:
        self.site = site
        app = SessionMiddleware(
            application(site), site.Session, replicas=site.replicas, observer=site.units.append, **options
        )
        self.wrong: list[str] = []
        self.errors: list[str] = []
        self._one_event = threading.Lock()
        self._random = random.Random(seed)
        self._idle: SimpleQueue[Person] = SimpleQueue()
        for number in range(VISITORS):
            # Some of them are API clients.
            self._idle.put(Person(Visitor(app, header="Replica-Position" if number % 5 == 0 else None)))

    def run(self, requests: int, events: dict[int, Callable[[], None]] | None = None) -> None:
        """So many requests; before the one with that number, the event happens."""
        plan: SimpleQueue[tuple[int, str, str, int]] = SimpleQueue()
        weights = [weight for _method, _what, weight in KINDS]
        for number in range(requests):
            ((method, what, _weight),) = self._random.choices(KINDS, weights)
            plan.put((number, method, what, self._random.randrange(KEYS)))
        threads = [threading.Thread(target=self._work, args=(plan, events or {})) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, plan: SimpleQueue[tuple[int, str, str, int]], events: dict[int, Callable[[], None]]) -> None:
        while True:
            try:
                number, method, what, key = plan.get_nowait()
            except Empty:
                return
            try:
                if number in events:
                    with self._one_event:
                        events[number]()
                person = self._idle.get()
                try:
                    self.wrong += person.request(method, what, key)
                finally:
                    self._idle.put(person)
            except BaseException as error:
                self.errors.append(f"{method} {what}: {error!r}")

    def figures(self) -> dict[str, Any]:
        """What the observer was told since the last call."""
        units, self.site.units[:] = list(self.site.units), []
        reads = [unit for unit in units if unit.method in ("GET", "HEAD") and "/touch/" not in unit.name]
        seconds = sorted(unit.seconds for unit in reads)
        return {
            "requests": len(units),
            "reads": len(reads),
            "reads on replicas": round(sum(unit.engine != "primary" for unit in reads) / len(reads), 4),
            "engines": dict(Counter(str(unit.engine) for unit in units)),
            "reasons": dict(Counter(str(unit.engine_reason) for unit in reads)),
            "moved": sum(unit.attempts > 1 for unit in reads),
            "median milliseconds of a read": round(1000 * seconds[len(seconds) // 2], 2),
        }


def report(title: str, figures: dict[str, Any]) -> None:
    print(f"\n{title}:\n{json.dumps(figures, indent=2)}")


def test_none_of_many_visitors_ever_sees_the_past(sites):
    with sites.make(0, 1) as site:
        load = Load(site, seed=REQUESTS)
        load.run(REQUESTS)
        assert load.errors == []
        assert load.wrong == []
        figures = load.figures()
        report("healthy", figures)
        assert figures["requests"] == REQUESTS
        # Some hundreds are over before a standby, on a busy machine, has had its turn.
        assert figures["reads on replicas"] > (0.9 if REQUESTS >= 10_000 else 0.1)


def test_a_standby_that_is_killed_and_started_again_is_not_noticed(sites):
    first, second = sites.servers.standbys
    quarter = REQUESTS // 4
    events = {
        quarter // 2: first.stop,
        quarter: first.start,
        2 * quarter: second.restart,
        3 * quarter: first.restart,
    }
    with sites.make(0, 1) as site:
        load = Load(site, seed=REQUESTS + 1, retry=RetryPolicy(attempts=3))
        load.run(REQUESTS, events)
        assert load.errors == []
        assert load.wrong == []
        assert {unit.status for unit in site.units} == {200, 404}
        report("standbys are killed", load.figures())
