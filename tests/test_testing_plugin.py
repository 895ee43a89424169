"""The pytest plugin: the fixture ``isolated``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import URL

from sa_wsgi_session._pytest import configured, isolate
from sa_wsgi_session._shared_pool import SharedPool
from tests.support import World

ROOT = Path(__file__).parents[1]

MODELS = """
import sqlalchemy as sa
from sqlalchemy.orm import scoped_session, sessionmaker
from tests.support import Base, Note, note
engine = sa.create_engine("sqlite:///notes.sqlite")
other_engine = sa.create_engine("sqlite:///other.sqlite")
Session = scoped_session(sessionmaker(engine))
class Names:
    session = Session
for each in engine, other_engine:
    Base.metadata.create_all(each)
"""

TESTS = """
import pytest
import sqlalchemy as sa
from models import Note, Session, note
from sa_wsgi_session import session_scope

@pytest.mark.parametrize("number", [1, 2])
def test_a_commit(isolated, number):
    assert isolated is Session
    with session_scope(Session) as session:
        session.add(note("always the same"))
    assert Session.execute(sa.select(sa.func.count(Note.id))).scalar() == 1
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Run pytest on these files, with the plugin and no other, and return what it prints."""

    def run(*arguments: str, **files: str) -> str:
        for name, content in {"models": MODELS, **files}.items():
            (tmp_path / f"{name}.py").write_text(content)
        environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        environ.pop("PYTEST_ADDOPTS", None)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "_sa_wsgi_session_pytest",
            "-p",
            "no:cacheprovider",
            *arguments,
        ]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    return run


@pytest.fixture
def ini(tmp_path: Path) -> Callable[[str], object]:
    return lambda value: (tmp_path / "pytest.ini").write_text(f"[pytest]\nsa_wsgi_session = {value}\n")


def test_the_session_is_named_in_the_ini_file(run, ini):
    for value in "models:Session", "models:Names.session models:other_engine":
        ini(value)
        assert "2 passed" in run(test_it=TESTS)


def test_the_session_is_given_by_a_fixture(run):
    conftest = """
import pytest
import models

@pytest.fixture
def sa_wsgi_session():
    return {}
"""
    for returned in "models.Session", "[models.Session, models.other_engine]", "(models.Session,)":
        assert "2 passed" in run(conftest=conftest.format(returned), test_it=TESTS)


def test_for_all_tests(run, ini):
    ini("models:Session\nusefixtures = isolated")
    test = TESTS.replace("isolated, ", "").replace("    assert isolated is Session\n", "")
    assert "isolated" not in test
    assert "2 passed" in run(test_it=test)


def test_where_no_session_is_named_the_error_says_how(run):
    output = run(test_it=TESTS)
    assert 'the fixture "isolated" does not know the session: say what it shall isolate' in output
    assert "sa_wsgi_session = myapp.models:Session" in output
    assert "2 errors" in output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models", "must be of the form \"package.module:name\", not 'models'"),
        ("models:", "must be of the form \"package.module:name\", not 'models:'"),
        ("none_such:Session", "there is no module none_such; pytest's ini option pythonpath"),
        ("notes_of_the_plugin.deeper:Session", "there is no module notes_of_the_plugin.deeper"),
        ("notes_of_the_plugin:none_such", "notes_of_the_plugin has no 'none_such'"),
    ],
)
def test_a_wrong_name_is_told(importable, name, message):
    with pytest.raises(pytest.UsageError, match=re.escape(message)):
        configured([name])


def test_what_a_module_lacks_itself_is_its_own_error(importable):
    importable("broken_notes", "import missing")
    with pytest.raises(ModuleNotFoundError, match="No module named 'missing'"):
        configured(["broken_notes:Session"])


def test_what_is_named_is_found(importable):
    assert [found.__name__ for found in configured(["notes_of_the_plugin:Deep.er", "notes_of_the_plugin:Deep"])] == [
        "er",
        "Deep",
    ]


def test_no_name_at_all_is_told():
    with pytest.raises(pytest.UsageError, match="does not know the session: say what it shall isolate"):
        configured([])


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """A folder whose modules can be imported, and the way to put one there."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, content: str) -> None:
        (tmp_path / f"{name}.py").write_text(content)

    write("notes_of_the_plugin", "class Deep:\n    class er:\n        pass\n")
    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_what_cannot_be_isolated_is_told():
    nothing: Any
    for nothing in [], ():
        with pytest.raises(pytest.UsageError, match="has returned nothing to isolate: say what it shall isolate"):
            isolate(nothing)
    with pytest.raises(pytest.UsageError, match=r"must return a session or an engine, or a list of them; .* is str"):
        isolate("models:Session")


def test_one_or_several_are_isolated(sqlite_url: URL):
    with closing(World(sqlite_url)) as world:
        for given in world.Session, [world.Session, world.engine], (world.engine,):
            with isolate(given) as first:
                assert first is (given if given is world.Session else given[0])
                assert isinstance(world.engine.pool, SharedPool)


def test_what_differs_from_production_fails_the_test(run, ini):
    ini("models:Session")
    test = """
from models import Session, note

def test_it(isolated):
    first, second = Session.session_factory(), Session.session_factory()
    first.add(note("1"))
    first.flush()
    second.add(note("2"))
    second.commit()
    first.rollback()
"""
    output = run(test_it=test)
    assert "1 passed, 1 error" in output
    assert "that work is undone, too, where production would keep it" in output


def test_a_failed_guard_shows_the_statements(run, ini):
    ini("models:Session")
    test = """
from models import Note, Session, note
from sa_wsgi_session.testing import count_statements

def test_it(isolated):
    with count_statements(Session) as statements:
        for number in range(3):
            Session.get(Note, number)
    assert len(statements) <= 1
"""
    output = run(test_it=test)
    assert "assert 3 <= 1" in output
    assert "where 3 = len(<3 statements: 3x SELECT … FROM note WHERE note.id = ?>)" in output


@pytest.mark.parametrize("guard", ["exactly", "at_most"])
def test_a_failed_guard_shows_the_test_and_no_code_of_the_package(run, ini, guard):
    ini("models:Session")
    test = f"""
from models import Note, Session, note
from sa_wsgi_session.testing import count_statements

def test_it(isolated):
    with count_statements(Session) as statements:
        for number in range(3):
            Session.get(Note, number)
    statements.{guard}(1)
"""
    output = run(test_it=test)
    assert "1 failed" in output
    assert f">       statements.{guard}(1)\nE       AssertionError: expected" in output
    assert f"def {guard}" not in output


def test_pytest_starts_without_the_package(run):
    test = """
import sys

def test_it(request):
    assert "_sa_wsgi_session_pytest" in sys.modules
    assert not {"sa_wsgi_session", "sqlalchemy", "webob"} & set(sys.modules)
"""
    assert "1 passed" in run(test_it=test)
    assert "isolated" in run("--fixtures")


def test_the_plugin_is_registered():
    (plugin,) = [found for found in entry_points(group="pytest11") if found.name == "sa_wsgi_session"]
    assert plugin.value == "_sa_wsgi_session_pytest"
