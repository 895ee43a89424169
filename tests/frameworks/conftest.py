"""The fixtures of the tests of the frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from examples import guest_book
from tests.frameworks.applications import FRAMEWORKS, Framework
from tests.frameworks.support import Book
from tests.support import is_in_a_scope


@pytest.fixture(autouse=True)
def guest_book_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a guest book opens its database when it is imported; the settings of Django's are in one, too."""
    path = tmp_path / "guest_book.sqlite"
    monkeypatch.setenv("GUEST_BOOK_URL", f"sqlite:///{path}")
    return path


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Framework:
    """Each framework, unless the test says which, with ``only``."""
    return FRAMEWORKS[request.param]


@pytest.fixture
def book(framework: Framework, guest_book_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Book]:
    """The guest book in the framework; nothing may be left over."""
    monkeypatch.setattr(guest_book, "PAUSE", 0)
    with closing(Book(framework, guest_book_path)) as book:
        yield book
        assert book.checked_out == 0
        assert not guest_book.Session.registry.has()
        assert not is_in_a_scope()
