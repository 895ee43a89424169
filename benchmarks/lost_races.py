"""Lost races: eight clients add to a few counters, at SERIALIZABLE, on PostgreSQL.

A transaction that PostgreSQL has refused is replayed, or it is a 500: that is up to the contender.  Each counter is
compared with the successes that its clients were told of.
"""

from __future__ import annotations

import http.client
import random
import statistics
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import scoped_session, sessionmaker

from benchmarks.contenders import (
    VIEWS,
    Application,
    Contender,
    Counter,
    Database,
    View,
    make_by_hand,
    make_ours,
    make_pyramid_with,
    plain,
)
from benchmarks.serve import Served, Setup, serving, turns
from sa_wsgi_session import RetryPolicy, SessionMiddleware

COUNTERS = 8
CLIENTS = 8
ATTEMPTS = 10
ROUNDS = 5
SECONDS = 2.0

_SETUP = Setup(server="waitress", threads=CLIENTS, pool_size=CLIENTS, isolation_level="SERIALIZABLE")


# The application: /1 adds to the first counter


def _adding_to(number: int) -> View:
    def add(session: Any, row: Any) -> bytes:
        session.get(Counter, number).value += 1
        # Now, not by the commit: what a commit meets, pyramid_retry does not replay.
        session.flush()
        return b"added"

    return add


def _made_with_counters(make: Callable[[Database], Application]) -> Callable[[Database], Application]:
    def made(database: Database) -> Application:
        # In the process of the contender, which serves nothing else.
        VIEWS.update({f"/{number}": _adding_to(number) for number in _numbers()})
        return make(database)

    return made


def _numbers() -> range:
    return range(1, COUNTERS + 1)


def _make_ours_with_policy(database: Database) -> Application:
    Session = scoped_session(sessionmaker(database.engine()))
    return SessionMiddleware(plain(Session), Session, retry=RetryPolicy(attempts=ATTEMPTS))


def includeme(config: Any) -> None:
    """What Pyramid asks of a module that is included: the setting of pyramid_retry."""
    config.add_settings({"retry.attempts": ATTEMPTS})


def _make_pyramid_retry(database: Database) -> Application:
    return make_pyramid_with(database, __name__, "pyramid_retry", "pyramid_tm")


CONTENDERS = [
    Contender("by hand", "WSGI", _made_with_counters(make_by_hand), "a lost race is a 500"),
    Contender("sa_wsgi_session", "WSGI", _made_with_counters(make_ours), "a lost race is a 500", ours=True),
    Contender(
        f"sa_wsgi_session, {ATTEMPTS} attempts",
        "WSGI",
        _made_with_counters(_make_ours_with_policy),
        "replays a lost race, after a random pause that doubles",
        ours=True,
    ),
    Contender(
        f"pyramid_tm, pyramid_retry, {ATTEMPTS} attempts",
        "Pyramid",
        _made_with_counters(_make_pyramid_retry),
        "replays at once a race that the view has lost; one that the commit has lost is a 500",
        ("pyramid", "pyramid_tm", "pyramid_retry", "zope.sqlalchemy", "transaction"),
    ),
]


# The clients


@dataclass
class _Answers:
    """What a client was told."""

    succeeded: Tally[int] = field(default_factory=Tally)
    failed: Tally[int] = field(default_factory=Tally)
    #: The connection broke: nobody knows what was done.
    unknown: Tally[int] = field(default_factory=Tally)
    milliseconds: list[float] = field(default_factory=list)

    def add(self, other: _Answers) -> None:
        self.succeeded += other.succeeded
        self.failed += other.failed
        self.unknown += other.unknown
        self.milliseconds += other.milliseconds


def measure(database_url: str, tell: Callable[[str], None], *, scale: float = 1.0) -> Iterator[dict[str, Any]]:
    """Successes per second, and what was lost or done twice.

    :param tell: called with what is being measured.
    :param scale: of the length of a round.
    """
    tell("lost races: the servers start")
    with serving(CONTENDERS, database_url, _SETUP, __name__) as all_served:
        for served in all_served:
            served.execute("DELETE FROM counter")
            served.execute(f"INSERT INTO counter SELECT number, 0, 1 FROM generate_series(1, {COUNTERS}) AS number")
        totals = {each.contender.name: _Answers() for each in all_served}
        rates: dict[str, list[float]] = {name: [] for name in totals}
        p99s: dict[str, list[float]] = {name: [] for name in totals}
        for number, in_turn in enumerate(turns(all_served, ROUNDS), 1):
            for served in in_turn:
                name = served.contender.name
                tell(f"lost races: round {number} of {ROUNDS}: {name}")
                began = time.perf_counter()
                answers = _compete(served, SECONDS * scale)
                rates[name].append(answers.succeeded.total() / (time.perf_counter() - began))
                p99s[name].append(statistics.quantiles(answers.milliseconds, n=100, method="inclusive")[98])
                totals[name].add(answers)
        for served in all_served:
            name = served.contender.name
            failed = totals[name].failed.total() + totals[name].unknown.total()
            if failed:
                tell(f"lost races: {failed} answers of {name} are errors; it said:\n{served.said()}")
            yield {
                "part": "lost races",
                "contender": name,
                "family": served.contender.family,
                "server": _SETUP.server,
                "threads": _SETUP.threads,
                "clients": CLIENTS,
                "counters": COUNTERS,
                "successes_per_second": rates[name],
                "p99_ms": p99s[name],
                "succeeded": totals[name].succeeded.total(),
                "failed": failed,
                "unanswered": totals[name].unknown.total(),
                **_compared(served, totals[name]),
            }


def _compete(served: Served, seconds: float) -> _Answers:
    deadline = time.perf_counter() + seconds
    answers = _Answers()
    with ThreadPoolExecutor(CLIENTS) as clients:
        for each in [clients.submit(_ask_again_and_again, served, deadline) for _ in range(CLIENTS)]:
            answers.add(each.result())
    return answers


def _ask_again_and_again(served: Served, deadline: float) -> _Answers:
    """Each request is waited for, the last one too: what was done is known."""
    answers = _Answers()
    # It connects anew where the server has hung up, as waitress does after a 500.
    with closing(http.client.HTTPConnection(served.host, served.port, timeout=60)) as connection:
        while not answers.milliseconds or time.perf_counter() < deadline:
            number = random.choice(_numbers())
            began = time.perf_counter()
            try:
                connection.request("POST", f"/{number}")
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                answers.unknown[number] += 1
            else:
                (answers.succeeded if 200 <= response.status < 300 else answers.failed)[number] += 1
            answers.milliseconds.append((time.perf_counter() - began) * 1000)
    return answers


def _compared(served: Served, answers: _Answers) -> dict[str, int]:
    """Successes that are not there, and changes of which nobody was told."""
    counted: dict[int, int] = dict(iter(served.execute("SELECT id, value FROM counter")))
    lost = twice = 0
    for number, value in counted.items():
        lost += max(0, answers.succeeded[number] - value)
        twice += max(0, value - answers.succeeded[number] - answers.unknown[number])
    return {"lost": lost, "twice": twice}
