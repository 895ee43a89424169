"""What the table of frameworks in ``docs/matrix.rst`` says, seen on the guest books themselves, without a server.

With ``$GUEST_BOOK_REPORT`` set to the name of a folder, it is written there, one JSON file for each framework.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from examples import guest_book
from sa_wsgi_session import NoActiveScope, current_scope
from tests.frameworks.applications import EVERYTHING, Framework
from tests.frameworks.test_guest_books import FRAMEWORKS
from tests.support import Exchange, is_in_a_scope, make_environ, request


class Lines:
    """Stands in for the lines of the export, and notes what happens to them."""

    def __init__(self) -> None:
        self.begun = False
        self.closed_with_session = False

    def __call__(self, rows: Any) -> Iterator[bytes]:
        self.begun = True
        try:
            while True:
                yield b"line\n"
        finally:
            try:
                self.closed_with_session = current_scope().session is guest_book.Session()
            except NoActiveScope:
                self.closed_with_session = False


def test_it_does_what_the_documentation_says(framework: Framework, monkeypatch: pytest.MonkeyPatch) -> None:
    app = import_module(f"examples.{framework.name}.{framework.module}").application
    guest_book.open_database()
    lines = Lines()
    monkeypatch.setattr(guest_book, "_csv_lines", lines)

    page = Exchange(app, _environ("/"))
    page_is_a_list = type(page.body) is list
    page.read()

    begun_before_status: list[bool] = []
    export = Exchange(app, _environ("/export.csv"), on_start=lambda status: begun_before_status.append(lines.begun))
    assert export.next() == b"line\n"
    export.close()

    form = b"name=Ann&text=crash"
    try:
        crash = _post(app, "/crash", form).status[:3]
    except RuntimeError:
        crash = "goes on"

    head = int(request(app, "/", "HEAD", HTTP_HOST="127.0.0.1").status[:3])
    seen = (page_is_a_list, *begun_before_status, crash, lines.closed_with_session, head)
    assert seen == (
        framework.page_is_a_list,
        framework.pulls_first_chunk,
        "goes on" if framework.lets_through == EVERYTHING else "500",
        framework.closes,
        framework.head_of_page,
    )
    assert not is_in_a_scope()
    engine = guest_book.Session.session_factory.kw["bind"]
    assert engine.pool.checkedout() == 0
    engine.dispose()

    if folder := os.environ.get("GUEST_BOOK_REPORT"):
        _report(framework.name, seen, Path(folder) / "frameworks")


def _environ(path: str) -> dict[str, Any]:
    return make_environ(path, HTTP_HOST="127.0.0.1")


def _post(app: Any, path: str, form: bytes) -> Exchange:
    return request(
        app,
        path,
        "POST",
        HTTP_HOST="127.0.0.1",
        CONTENT_TYPE="application/x-www-form-urlencoded",
        CONTENT_LENGTH=str(len(form)),
        **{"wsgi.input": io.BytesIO(form)},
    )


def _report(framework: str, seen: tuple[Any, ...], folder: Path) -> None:
    distribution = FRAMEWORKS[framework]
    names = ("page_is_a_list", "pulls_first_chunk", "crash", "closes_generator", "head")
    content = {"version": version(distribution) if distribution else "", **dict(zip(names, seen, strict=True))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{framework}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
