"""Makes ``docs/matrix.rst`` of what test_guest_books.py and test_framework_facts.py have seen.

::

    python -m tests.frameworks.page REPORT           # write the page
    python -m tests.frameworks.page REPORT --check   # compare the page with what was seen; versions may differ

REPORT is the folder that ``$GUEST_BOOK_REPORT`` named when the tests ran. ``tox -e frameworks`` does the second.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.frameworks.wsgi_servers import WSGI_SERVERS, WSGIServer

PAGE = Path(__file__).parents[2] / "docs" / "matrix.rst"
#: Where they are other than before, the page is no less true.
_VERSION = re.compile(r"\b\d+(\.\d+)+((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?\b")

#: As the frameworks call themselves.
TITLES = {
    "plain_wsgi": "plain WSGI",
    "flask": "Flask",
    "bottle": "Bottle",
    "pyramid": "Pyramid",
    "falcon": "Falcon",
    "django": "Django",
    "cherrypy": "CherryPy",
    "turbogears": "TurboGears 2",
    "morepath": "Morepath",
    "webpy": "web.py",
}

_YES = {True: "yes", False: "no"}
_FRAMING = {"chunked": "chunks", "close": "the end of the connection", "content-length": "its length"}

#: What can differ from cell to cell: the letter, when it applies, and what it means.
NOTES: tuple[tuple[str, Callable[[dict[str, Any]], bool], str], ...] = (
    (
        "b",
        lambda seen: seen["crash"] != "500",
        "the client of the view that crashes sees its transfer broken off, not the whole of a 500 page",
    ),
    (
        "e",
        lambda seen: seen.get("status_without_body") is not None,
        "a response without a body, such as a redirect, reaches the client as a 500; what it acknowledges is committed",
    ),
    (
        "g",
        lambda seen: not seen["hang_up_closes_the_stream"],
        "a stream without an end goes on when its client has gone",
    ),
    (
        "h",
        lambda seen: seen["half_a_form"] == "kept",
        "the form of a client that leaves in the middle of it is taken for a whole one",
    ),
)


def page(cells: Sequence[dict[str, Any]], frameworks: dict[str, dict[str, Any]]) -> str:
    """The page.

    :param cells: what test_guest_books.py has reported, a cell each.
    :param frameworks: what test_framework_facts.py has reported, by the names of the frameworks.
    """
    postgresql = {(seen["framework"], seen["server"]): seen for seen in cells if seen["database"] == "postgresql"}
    sqlite = len(cells) - len(postgresql)
    first = cells[0]
    drivers = {name: version for seen in cells for name, version in seen["driver"].items()}
    versions = {"CPython": first["python"], "SQLAlchemy": first["sqlalchemy"], **drivers}
    answered, cut_off, acknowledged = (
        sum(seen[name] for seen in cells) for name in ("answered", "cut_off", "acknowledged")
    )
    parts = [
        ".. Made of what the tests have seen, by tests/frameworks/page.py: do not edit.",
        _heading("What was seen", "="),
        "The guest book in :doc:`each framework, under each server <frameworks>`, with real clients: they read, post,\n"
        "make views fail and crash, hang up in the middle of an export, of a form and of a stream without an end, and\n"
        "stop reading for a while. ✓ means that it was found afterwards that",
        "* the database held what was acknowledged, once, and nothing that was refused (but see note e);\n"
        "* no connection was checked out, and none was in a transaction;\n"
        "* every body that the server was given had been closed, once (but for those of note g);\n"
        "* the server's log told of no error but the one that was made on purpose, and of clients that had gone.",
        f"{len(postgresql)} times on PostgreSQL, and {sqlite} times, under waitress, on SQLite: {answered} requests "
        f"were answered,\n{cut_off} cut off by their clients, {acknowledged} entries acknowledged. With "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        _matrix(postgresql),
        "\n".join(f"{letter}\n    {meaning}." for letter, _, meaning in NOTES),
        _heading("Frameworks", "-"),
        _frameworks(frameworks),
        _heading("Servers", "-"),
        _servers(postgresql),
    ]
    return "\n\n".join(parts) + "\n"


def _matrix(cells: dict[tuple[str, str], dict[str, Any]]) -> str:
    def cell(seen: dict[str, Any]) -> str:
        return " ".join(["✓", *(letter for letter, applies, _ in NOTES if applies(seen))])

    return _table(
        ["", *TITLES.values()],
        [[_title(server), *(cell(cells[framework, server.name]) for framework in TITLES)] for server in WSGI_SERVERS],
    )


def _frameworks(frameworks: dict[str, dict[str, Any]]) -> str:
    header = [
        "",
        "Version",
        "A page is",
        "The first chunk is asked for",
        "An unexpected exception",
        "After a hang-up, a generator is",
        "HEAD",
    ]
    rows = [
        [
            title,
            seen["version"],
            "a list" if seen["page_is_a_list"] else "a stream",
            "before the status" if seen["pulls_first_chunk"] else "after it",
            "becomes a 500" if seen["crash"] == "500" else "goes on to the server",
            "closed, with its session" if seen["closes_generator"] else "left to the garbage collector",
            str(seen["head"]),
        ]
        for title, seen in ((title, frameworks[name]) for name, title in TITLES.items())
    ]
    return _table(header, rows)


def _servers(cells: dict[tuple[str, str], dict[str, Any]]) -> str:
    header = ["", "Versions", "Several requests at a time", "A stream is framed by", "``wsgi.file_wrapper``"]
    rows = []
    for server in WSGI_SERVERS:
        seen = [cells[framework, server.name] for framework in TITLES]
        rows.append(
            [
                _title(server),
                ", ".join(f"{name} {version}" for name, version in seen[0]["server_versions"].items())
                or "Python's own",
                _one(_YES[each["others_are_served"]] for each in seen),
                _one(_FRAMING[each["framing"]] for each in seen),
                _one(_YES[each["file_wrapper"]] for each in seen),
            ]
        )
    return _table(header, rows)


def _title(server: WSGIServer) -> str:
    return server.name.replace("-", " ")


def _one(values: Iterable[str]) -> str:
    return " or ".join(sorted(set(values)))


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", "   :stub-columns: 1", ""]
    for row in [header, *rows]:
        lines += [f"   {'* -' if number == 0 else '  -'} {cell}".rstrip() for number, cell in enumerate(row)]
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.frameworks.page")
    parser.add_argument("report", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    cells = [_read(path) for path in sorted(options.report.glob("*.json"))]
    frameworks = {path.stem: _read(path) for path in sorted(options.report.glob("frameworks/*.json"))}
    seen = {(each["framework"], each["server"]) for each in cells if each["database"] == "postgresql"}
    missing = {(framework, server.name) for framework in TITLES for server in WSGI_SERVERS} - seen
    if missing or frameworks.keys() != TITLES.keys():
        print(f"Not everything was seen (not {len(missing)} of the cells), so nothing can be said of {PAGE.name}.")
        return 0 if options.check else 1
    made = page(cells, frameworks)
    if not options.check:
        PAGE.write_text(made, encoding="utf-8")
    elif _VERSION.sub("", made) != _VERSION.sub("", PAGE.read_text(encoding="utf-8")):
        print(f"{PAGE.name} does not say what was seen; without --check, this writes what does:\n\n{made}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
