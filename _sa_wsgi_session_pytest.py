"""The pytest plugin of ``sa_wsgi_session``: the fixture ``isolated``.

A module of its own, beside the package: pytest imports it at each start, where the package, and SQLAlchemy with it,
shall not be imported before a test asks for the fixture.  ``sa_wsgi_session/_pytest.py`` does the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "sa_wsgi_session",
        'what the fixture "isolated" isolates: sessions and engines, each as "package.module:name"',
        type="args",
        default=[],
    )


@pytest.fixture
def sa_wsgi_session(pytestconfig: pytest.Config) -> Any:
    """The session that the fixture ``isolated`` isolates, or a list of sessions and engines: override it.

    If it is not overridden, it is what the ini option of the same name says.
    """
    from sa_wsgi_session._pytest import configured

    return configured(pytestconfig.getini("sa_wsgi_session"))


@pytest.fixture
def isolated(sa_wsgi_session: Any) -> Iterator[Any]:
    """All that the test, and what it calls, commits is rolled back at its end: ``sa_wsgi_session.testing.isolated``.

    Yields the session.
    """
    from sa_wsgi_session._pytest import isolate

    with isolate(sa_wsgi_session) as session:
        yield session
