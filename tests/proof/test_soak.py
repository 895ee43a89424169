"""A long run on each of four servers: nothing is left of any request, be it answered or hung up.

``SOAK_REQUESTS`` requests altogether, a fifth of them hung up by their clients. What they are is told in
``soak_shapes.py``, how they are made and what is measured in ``soak.py``.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from tests.conftest import unavailable
from tests.proof.conftest import Tell
from tests.proof.soak import OURS, Result, soak
from tests.proof.soak_shapes import HANG_UP_EVERY, HUNG_UP, ORDINARY, SEEDS
from tests.proof.soak_views import VIEWS
from tests.servers import NotInstalled

SERVERS = ("waitress", "gunicorn-gthread", "cheroot", "uwsgi")

REQUESTS_IN_CI = 12_000
REQUESTS = int(os.environ.get("SOAK_REQUESTS", REQUESTS_IN_CI))

MB = 1024 * 1024
#: By how much resident memory may grow, in bytes.
LARGEST_GROWTH = 3 * MB
#: And what is in use, also where the garbage collector does not see it. It converges: some 100 KiB come with the first
#: ten thousand requests, in ever smaller steps, and nothing after them.
LARGEST_GROWTH_IN_USE = MB // 8

_SHOWN = 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc tells how much memory a process has")
@pytest.mark.parametrize("server", SERVERS)
def test_a_long_run_leaves_nothing_behind(server: str, tmp_path: Path, tell: Tell):
    if REQUESTS > REQUESTS_IN_CI:
        # The limit for a test that hangs is made for shorter ones. Here each answer has its own.
        faulthandler.cancel_dump_traceback_later()
    try:
        result = soak(server, REQUESTS // len(SERVERS), tmp_path)
    except NotInstalled as reason:
        unavailable(reason)
    tell(server, figures(result))
    found = list(complaints(result))
    assert not found, "\n".join(found)


def figures(result: Result) -> dict[str, object]:
    seen, warm, last = result.seen, result.warm, result.last
    return {
        "Python": sys.version.split()[0],
        "SQLAlchemy": sqlalchemy.__version__,
        "requests": seen.requests,
        "hung up": seen.hung_up,
        "hung up in an endless answer": seen.endless,
        "requests per second": round(seen.requests / result.seconds),
        "replays": last.state["tally"].get("replays", 0),
        "requests of the warm-up": result.warm_up,
        "resident KiB after the warm-up": warm.resident // 1024,
        "resident KiB at the end": last.resident // 1024,
        "KiB in use after the warm-up": None if warm.in_use is None else warm.in_use // 1024,
        "KiB in use at the end": None if last.in_use is None else last.in_use // 1024,
        "objects after the warm-up": warm.objects,
        "objects at the end": last.objects,
        "checked out": last.state["checked_out"],
        "resource warnings": last.state["resource_warnings"]["count"],
    }


def complaints(result: Result) -> Iterator[str]:
    """All that is not as it has to be."""
    yield from _of_requests(result)
    yield from _of_rows(result)
    yield from _of_what_the_server_tells(result)
    yield from _of_objects(result)
    yield from _of_memory(result)


def _of_requests(result: Result) -> Iterator[str]:
    seen, tally = result.seen, result.last.state["tally"]
    if seen.hung_up != seen.requests // HANG_UP_EVERY:
        yield f"{seen.hung_up} of {seen.requests} were hung up"
    # Else a client would have left too late, or the server would not have noticed.
    if tally.get("cut off", 0) != seen.endless or "endless ones read to their end" in tally:
        yield f"of {seen.endless} endless answers that were hung up, the application has seen: {tally}"
    if tally.get("warnings of failed callbacks") != tally.get("failed callbacks") or "wrong callbacks" in tally:
        yield f"callbacks: {tally}"
    if not {"replays", "failed callbacks", "warnings of open results"} <= set(tally):
        yield f"some of what the views provoke has not come about: {tally}"


def _of_rows(result: Result) -> Iterator[str]:
    seen = result.seen
    rows = result.rows - {f"seed {number}" for number in range(1, SEEDS + 1)}
    kept, unknown = set(seen.kept), set(seen.unknown)
    for what, labels in (
        ("acknowledged, and not there", kept - rows),
        ("refused, and there", rows & set(seen.refused)),
        ("there, and nobody's", rows - kept - unknown - set(seen.refused)),
    ):
        if labels:
            yield f"{len(labels)} rows {what}: {sorted(labels)[:_SHOWN]}"
    if result.number != seen.added:
        yield f"{seen.added} have added one, and the number is {result.number}"


def _of_what_the_server_tells(result: Result) -> Iterator[str]:
    state = result.last.state
    # cheroot leaves the file of a client that has gone to Python, whose finalizer tries to write the rest of it into
    # the closed socket; from Python 3.13 on that is told (cherrypy/cheroot#734).
    if "writes into a closed socket" in state["tally"] and result.server != "cheroot":
        yield f"files were left open: {state['tally']}"
    if state["checked_out"]:
        yield f"{state['checked_out']} connections are checked out"
    if state["garbage"]:
        yield f"{state['garbage']} objects are garbage that cannot be collected"
    if "sessions left in their registry" in state["tally"]:
        yield f"sessions left in their registry: {state['tally']}"
    for what in ("resource_warnings", "unraisable", "unexpected_logs"):
        if state[what]["count"]:
            yield f"{what}: {state[what]}"


def _of_objects(result: Result) -> Iterator[str]:
    """By none: of what a request makes, nothing is there; of all else, no more than after the warm-up."""
    before, warm, last = result.before, result.warm, result.last
    if last.per_request != before.per_request:
        yield f"still there of requests: {dict(last.per_request.items() - before.per_request.items())}"
    more = last.more_than(warm)
    if last.objects > warm.objects or any(name.startswith((*OURS, "sqlalchemy.")) for name in more):
        yield f"{last.objects - warm.objects} more objects: {dict(list(more.items())[:_SHOWN])}"


def _of_memory(result: Result) -> Iterator[str]:
    seen, warm, last = result.seen, result.warm, result.last
    if last.resident - warm.resident >= LARGEST_GROWTH:
        yield f"resident memory has grown from {warm.resident:,} to {last.resident:,} bytes"
    if warm.in_use is not None and last.in_use is not None and last.in_use - warm.in_use >= LARGEST_GROWTH_IN_USE:
        yield f"{last.in_use - warm.in_use:,} bytes more are in use, after {seen.requests - result.warm_up:,} requests"


def test_every_view_is_asked_for():
    asked_for = {shape.name for shape in (*ORDINARY, *HUNG_UP)}
    assert asked_for == set(VIEWS) - {"streams_and_writes_inside"}
