"""A reader of the documentation: somebody who types in its Python blocks, one after the other."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from docutils import nodes
from docutils.core import publish_doctree
from sqlalchemy.engine import Engine

from sa_wsgi_session import SessionMiddleware
from tests.support import Exchange
from tests.support import request as make_request

ROOT = Path(__file__).parents[1]
README = "README.rst"
#: The smallest example, from which all others go on.
FIRST = (README, "sa_wsgi_session")


def visit(app: Any, *path_and_method: str, **environ: Any) -> Exchange:
    """A whole request, with its ``status`` and its ``content``."""
    return make_request(app, *path_and_method, **environ)


def parse(document: str) -> Any:
    settings = {
        # Sphinx's own roles and directives are unknown to docutils.
        "report_level": 5,
        "halt_level": 5,
        "file_insertion_enabled": False,
        "syntax_highlight": "none",
    }
    path = ROOT / document
    return publish_doctree(path.read_text("utf-8"), source_path=str(path), settings_overrides=settings)


def title_of(node: Any) -> str:
    """The title of the section that the node is in."""
    while not isinstance(node, (nodes.section, nodes.document)):
        node = node.parent
    return str(next(iter(node.findall(nodes.title))).astext())


def blocks(document: str, language: str = "python") -> dict[str, list[str]]:
    """The blocks in that language, by the titles of their sections."""
    found: dict[str, list[str]] = {}
    for node in parse(document).findall(nodes.literal_block):
        if language in node["classes"]:
            found.setdefault(title_of(node), []).append(node.astext())
    return found


class Reader:
    """Somebody who has typed in the smallest example, and now tries a section."""

    def __init__(self, document: str, title: str) -> None:
        self._document, self._title = document, title
        self._blocks = blocks(document)[title]
        self.names: dict[str, Any] = {"__name__": "__main__"}
        #: All that were made, also those whose names now stand for something else.
        self._engines: set[Engine] = set()
        if (document, title) != FIRST:
            self._execute(README, *blocks(FIRST[0])[FIRST[1]])

    def run(self) -> None:
        """Run the next block of the section."""
        self._execute(self._document, self._blocks.pop(0))

    def write(self, path: Path) -> None:
        """Write the next block to a file instead."""
        path.write_text(self._blocks.pop(0) + "\n", "utf-8")

    def recall(self, title: str, document: str | None = None) -> None:
        """Run the first block of another section, whose names this one uses."""
        document = document or self._document
        self._execute(document, blocks(document)[title][0])

    def _execute(self, document: str, source: str) -> None:
        exec(compile(source, f"<{document}: {self._title}>", "exec", dont_inherit=True), self.names)
        self._engines.update(value for value in self.names.values() if isinstance(value, Engine))

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def wrap(self, name: str, **options: Any) -> SessionMiddleware:
        """The application of that name, with its session."""
        return SessionMiddleware(self[name], self["Session"], **options)

    def guests(self, engine: Engine | None = None) -> set[str]:
        """The names that another connection sees."""
        observer = sa.create_engine((engine or self["engine"]).url)
        try:
            with observer.connect() as connection:
                return set(connection.execute(sa.text("SELECT name FROM guests")).scalars())
        finally:
            observer.dispose()

    def insert(self, *names: str) -> None:
        with self["engine"].begin() as connection:
            connection.execute(sa.insert(self["Guest"]), [{"name": name} for name in names])

    def finish(self) -> None:
        assert not self._blocks, f"not run: {self._blocks}"
        self.close()

    def close(self) -> None:
        for engine in self._engines:
            engine.dispose()


class Sections:
    """Which sections of some documents a file of tests runs."""

    def __init__(self, *documents: str) -> None:
        self.documents = documents
        self._tested: list[tuple[str, str]] = []

    def __call__(self, document: str, title: str) -> pytest.MarkDecorator:
        """The test runs all blocks of that section, one after the other."""
        self._tested.append((document, title))
        return pytest.mark.parametrize("reader", [(document, title)], indirect=True, ids=[title])

    def check(self) -> None:
        """There is a test, and one only, for each section that has a Python block."""
        there = [(document, title) for document in self.documents for title in blocks(document)]
        assert sorted(self._tested) == sorted(there)


@pytest.fixture
def reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """The reader of that section, in an empty folder; at the end no block of it may be left."""
    monkeypatch.chdir(tmp_path)
    reader = Reader(*request.param)
    try:
        yield reader
        reader.finish()
    finally:
        reader.close()


class Rival:
    """Another writer of the SQLite file, who gives way as soon as somebody has lost against it."""

    def __init__(self, engine: Engine) -> None:
        self.won = 0
        # Without a rest for those who wait.
        engine.dispose()
        sa.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout = 0"))
        sa.event.listen(engine, "handle_error", self._give_way)
        self._connection = sqlite3.connect(str(engine.url.database), isolation_level=None)

    def write(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def _give_way(self, context: Any) -> None:
        assert "database is locked" in str(context.original_exception)
        self.won += 1
        self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()
