"""What replicas cost a request that reads: the same application with and without them, in one process and one run.

::

    python -m tests.replicas_cost

SQLite in memory, because its answers take as long each time; the figures are the fastest of many rounds, which take
turns.  Its replicas have no positions: the floor, which those of PostgreSQL have in addition, is one comparison.  That
is what the rows "and positions" have: an SQLite of which the package is made to believe that it has positions, and
never needs to be asked for one.
"""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from sa_wsgi_session import RetryPolicy, SessionMiddleware
from sa_wsgi_session.replicas import ReadReplicas
from tests.replicated import SECRET, Visitor
from tests.support import make_environ

REQUESTS = 20


def engine() -> Any:
    return sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})


def contender(*, with_replicas: bool, positions: bool = False, retry: RetryPolicy | None = None) -> Any:
    """What makes so many requests of a visitor who has read before, and has not written."""
    Session: Any = scoped_session(sessionmaker(engine()))
    statement = sa.text("SELECT 1")

    def app(environ: Any, start_response: Any) -> Any:
        Session.execute(statement).scalar()
        start_response("200 OK", [])
        return [b""]

    replicas = ReadReplicas([engine(), engine()], secret=SECRET) if with_replicas else None
    application = SessionMiddleware(app, Session, replicas=replicas, retry=retry)
    if positions:
        assert replicas is not None
        assert replicas._router is not None
        cluster = replicas._router.cluster
        cluster.primary.due, cluster.primary._interval, cluster.primary.ask = 0.0, 0.6, lambda: 1  # type: ignore[method-assign]
        cluster.primary.positions = True
        for replica in cluster.replicas:
            replica.known = replica.known._replace(position=1)
    visitor = Visitor(application)
    visitor.request()
    cookie = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())
    # As browsers do, and there is another cookie of the application's.
    environ = make_environ(HTTP_COOKIE=f"session=0123456789abcdef0123456789abcdef; {cookie}".strip("; "))

    def start_response(status: Any, headers: Any) -> Any:
        return None

    def run() -> float:
        began = perf_counter()
        for _ in range(REQUESTS):
            for _chunk in application(environ.copy(), start_response):
                pass
        return (perf_counter() - began) / REQUESTS * 1e6

    return run


def main(rounds: int) -> None:
    contenders = {
        (policy, replicas): contender(
            with_replicas=replicas != "without replicas",
            positions="positions" in replicas,
            retry=RetryPolicy() if policy == "with a RetryPolicy" else None,
        )
        for policy in ("without a RetryPolicy", "with a RetryPolicy")
        for replicas in ("without replicas", "with replicas", "with replicas and positions")
    }
    fastest = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            fastest[name] = min(fastest[name], run())
    print("microseconds of a request that reads; the fastest of", rounds, "rounds of", REQUESTS)
    for (policy, replicas), microseconds in fastest.items():
        more = microseconds - fastest[policy, "without replicas"]
        print(f"{policy:22} {replicas:28} {microseconds:8.2f} {more:+8.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3000)
