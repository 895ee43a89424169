"""Requests per second, and how long they take, over real servers with PostgreSQL; the load is made by wrk.

All contenders are up at the same time, each with a server and a database of its own; one of them is under load for a
second, then the next one is.  Server, database and wrk share the machine.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, FAMILIES, Contender
from benchmarks.serve import SERVERS, Served, Setup, serving, turns
from tests.servers import NotInstalled, find_program

#: What is asked for, by how many clients at once.
LOADS = [("/read", 1), ("/read", 8), ("/read", 32), ("/insert", 8)]
ROUNDS = 3
#: The shortest that wrk can do: the rounds are what there are more of.
SECONDS = 1

#: All are answered, if need be late: what wrk gives up is an error.
_TIMEOUT = 10
_SCRIPT = """
done = function(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format(
        '\\n{"requests": %d, "microseconds": %d, "status": %d, "socket": %d, "p50": %d, "p99": %d}\\n',
        summary.requests, summary.duration, errors.status,
        errors.connect + errors.read + errors.write + errors.timeout,
        latency:percentile(50), latency:percentile(99)))
end
"""


def measure(
    database_url: str, tell: Callable[[str], None], *, scale: float = 1.0, families: Collection[str] = FAMILIES
) -> Iterator[dict[str, Any]]:
    """All contenders, under waitress, then under gunicorn.

    :param tell: called with what is being measured.
    :param scale: of the number of rounds.
    :param families: of the contenders.
    :raises NotInstalled: without wrk.
    """
    try:
        wrk = find_program("wrk")
    except NotInstalled as missing:
        raise NotInstalled(f"{missing} (apt install wrk)") from None
    rounds = max(1, round(ROUNDS * scale))
    # What these two cost beside the others is measured in one process.
    contenders = [
        each
        for each in CONTENDERS
        if each.family in families and not each.name.endswith((", contextual", ", observed"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "report.lua"
        script.write_text(_SCRIPT)
        for server in SERVERS:
            setup = Setup(server=server)
            tell(f"throughput: {server}, {len(contenders)} contenders start")
            with serving(contenders, database_url, setup) as all_served:
                for path, clients in LOADS:
                    yield from _measure_load(
                        [each for each in all_served if _takes_part(each.contender, server, path, clients)],
                        [wrk, "--threads=1", f"--connections={clients}", f"--script={script}"],
                        (path, clients, rounds),
                        setup,
                        tell,
                    )


def _takes_part(contender: Contender, server: str, path: str, clients: int) -> bool:
    if path == "/insert" and contender.name == "no session management":
        return False  # it never commits, and so it never inserts
    # What the policy costs can be seen once.
    return not contender.name.endswith(", retry") or (server == "waitress" and clients == 8)


def _measure_load(
    all_served: list[Served], wrk: list[str], load: tuple[str, int, int], setup: Setup, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    path, clients, rounds = load
    before = {}
    figures: dict[str, list[dict[str, Any]]] = {}
    for each in all_served:
        _warm_up(each, path)
        before[each.contender.name] = _rows(each)
        figures[each.contender.name] = []
    for number, in_turn in enumerate(turns(all_served, rounds), 1):
        for each in in_turn:
            name = each.contender.name
            tell(f"throughput: {setup.server}, {path}, {clients} clients, round {number} of {rounds}: {name}")
            figures[name].append(_load(wrk, each.address + path))
    if path == "/insert":
        time.sleep(1)  # who commits after the answer has had the time to
    for each in all_served:
        name = each.contender.name
        found = figures[name]
        good = [_good(figure) for figure in found]
        result = {
            "part": "served",
            "contender": name,
            "family": each.contender.family,
            "server": setup.server,
            "threads": setup.threads,
            "case": path,
            "clients": clients,
            "requests_per_second": [
                count / figure["microseconds"] * 1e6 for count, figure in zip(good, found, strict=True)
            ],
            "p50_ms": [figure["p50"] / 1000 for figure in found],
            "p99_ms": [figure["p99"] / 1000 for figure in found],
            "errors": int(sum(figure["status"] + figure["socket"] for figure in found)),
        }
        if path == "/insert":
            result["missing"] = max(0, sum(good) - (_rows(each) - before[name]))
        if result["errors"]:
            tell(f"throughput: {result['errors']} errors of {name}; it said:\n{each.said()}")
        yield result


def _warm_up(served: Served, path: str) -> None:
    """Fill its pool of connections, and its caches of compiled statements."""

    def ask(_: int) -> None:
        with closing(http.client.HTTPConnection(served.host, served.port, timeout=_TIMEOUT)) as connection:
            connection.request("GET", path)
            connection.getresponse().read()

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(ask, range(100)))


def _rows(served: Served) -> int:
    table = "django_row" if served.contender.family == "Django" else '"row"'
    return int(served.execute(f"SELECT count(*) FROM {table}")[0][0])


def _good(figure: dict[str, Any]) -> int:
    return int(figure["requests"] - figure["status"])


def _load(wrk: list[str], url: str) -> dict[str, Any]:
    """What wrk says of a second of it."""
    command = [*wrk, f"--duration={SECONDS}", f"--timeout={_TIMEOUT}", url]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
