"""Measures this package beside what else there is, on this machine::

    python -m benchmarks                       # everything: minutes
    python -m benchmarks --parts requests      # a part of it
    python -m benchmarks --scale 0.1           # in a hurry
    python -m benchmarks --parts served --families WSGI --scale 10     # one question, thoroughly

``tox -e bench`` does the first.  Prints tables; leaves these, all figures as JSON, and plots as SVG in a folder.
(``--output docs/measured`` is where the documentation has its own.)
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import growth, in_process, lost_races, report, served, slow_clients
from benchmarks.contenders import CONTENDERS, FAMILIES
from tests.servers import NotInstalled, run_postgresql

Measure = Callable[..., Iterator[dict[str, Any]]]
#: What needs nothing but this process.
IN_PROCESS: dict[str, Measure] = {"requests": in_process.measure, "growth": growth.measure}
#: What needs servers, and a database of its own.
SERVED: dict[str, Measure] = {
    "served": served.measure,
    "slow-clients": slow_clients.measure,
    "lost-races": lost_races.measure,
}
PARTS = (*IN_PROCESS, *SERVED)
#: Those of all contenders. (The other parts have few, of their own.)
WITH_FAMILIES = ("requests", "served")


def facts() -> dict[str, str]:
    """What the figures depend on."""
    found = {
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "SQLAlchemy": metadata.version("SQLAlchemy"),
        "sa_wsgi_session": metadata.version("sa_wsgi_session"),
    }
    for package in sorted({package for contender in CONTENDERS for package in contender.packages}, key=str.lower):
        found[package] = metadata.version(package)
    for server in ("waitress", "gunicorn", "psycopg"):
        found[server] = metadata.version(server)
    found["system"] = platform.platform()
    found["processors"] = f"{os.cpu_count()} of {_processor()}"
    return found


def _processor() -> str:
    try:
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except FileNotFoundError:  # another system than Linux
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def measure(
    parts: list[str], families: list[str], scale: float, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """What the parts find.  A part whose programs are missing is told of, and left out."""

    def options(name: str) -> dict[str, Any]:
        return {"scale": scale, "families": families} if name in WITH_FAMILIES else {"scale": scale}

    for name in [name for name in IN_PROCESS if name in parts]:
        yield from IN_PROCESS[name](tell, **options(name))
    names = [name for name in SERVED if name in parts]
    if names:
        with _missing_is_told(tell, names), run_postgresql() as server:
            for name in names:
                with _missing_is_told(tell, [name]), server.database() as url:
                    address = url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
                    yield from SERVED[name](address, tell, **options(name))


@contextmanager
def _missing_is_told(tell: Callable[[str], None], names: list[str]) -> Iterator[None]:
    try:
        yield
    except NotInstalled as missing:
        tell(f"LEFT OUT: {', '.join(names)}: {missing}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("::")[0])
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)} (default: all)", default=",".join(PARTS))
    known = ",".join(FAMILIES)
    parser.add_argument("--families", help=f"of contenders, some of {known} (default: all)", default=known)
    parser.add_argument("--scale", type=float, default=1.0, help="of the time that is spent (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"), help="the folder for what comes out")
    parser.add_argument("--again", type=Path, metavar="FILE", help="make tables and plots of the figures in this file")
    arguments = parser.parse_args()
    parts, families = arguments.parts.split(","), arguments.families.split(",")
    for option, given, there in (("--parts", parts, PARTS), ("--families", families, FAMILIES)):
        if unknown := set(given) - set(there):
            parser.error(f"{option}: there is no {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    if not 0 < arguments.scale <= 100:
        parser.error(f"--scale must be more than 0 and at most 100, not {arguments.scale}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.again:
        found = json.loads(arguments.again.read_text(encoding="utf-8"))
    else:
        found = {"facts": facts(), "results": run(parts, families, arguments.scale)}
        path = arguments.output / "results.json"
        path.write_text(_as_json(found), encoding="utf-8")
    for name, text in report.tables(found["facts"], found["results"]).items():
        # Not .rst: they are parts of a page of the documentation, and no pages.
        (arguments.output / f"{name}.txt").write_text(text, encoding="utf-8")
        print(text, end="\n\n")
    for path in report.plot(found["results"], arguments.output):
        print(path)


def _as_json(found: dict[str, Any]) -> str:
    """One line for each result; of each figure what can be meant."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        return [short(each) for each in value] if isinstance(value, list) else value

    lines = (json.dumps({name: short(value) for name, value in result.items()}) for result in found["results"])
    results = ",\n".join(lines)
    return f'{{"facts": {json.dumps(found["facts"], indent=1)},\n"results": [\n{results}\n]}}\n'


def run(parts: list[str], families: list[str], scale: float) -> list[dict[str, Any]]:
    # A replay is logged; where that goes is not what is measured.
    logging.getLogger("sa_wsgi_session").addHandler(logging.NullHandler())
    logging.getLogger("sa_wsgi_session").propagate = False
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        return list(measure(parts, families, scale, tell))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}\n{error.stderr or ''}")


if __name__ == "__main__":
    main()
