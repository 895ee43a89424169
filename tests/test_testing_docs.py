"""``docs/testing.rst``: its files are written, and its tests are run, as a reader would do it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from docutils import nodes
from docutils.core import publish_doctree

ROOT = Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    """The blocks of the guide in that language."""
    # Sphinx's own roles and directives are unknown to docutils.
    settings = {"report_level": 5, "halt_level": 5, "syntax_highlight": "none"}
    document: Any = publish_doctree((ROOT / "docs/testing.rst").read_text("utf-8"), settings_overrides=settings)
    return [node.astext() for node in document.findall(nodes.literal_block) if language in node["classes"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a reader has who has typed in all of the guide."""
    (ini,) = blocks("ini")
    (tmp_path / "pytest.ini").write_text(ini)
    _teaser, *files = blocks("python")
    for block in files:
        first, _, content = block.partition("\n")
        assert first.startswith("# "), first
        path = tmp_path / first.removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(content + "\n\n")
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    environ |= {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "-W error -W ignore::DeprecationWarning:webob.compat",
    }
    command = [sys.executable, "-m", "pytest", "-p", "_sa_wsgi_session_pytest", "-v", *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize(
    ("file", "passed"),
    [
        ("test_guests.py", 5),
        ("test_fixture.py", 1),
        ("test_many.py", 2),
        ("test_unittest.py", 2),
        ("test_werkzeug.py", 1),
        pytest.param(
            *("test_flask.py", 2),
            marks=pytest.mark.skipif(not find_spec("flask_sqlalchemy"), reason="Flask-SQLAlchemy is not installed"),
        ),
    ],
)
def test_the_tests_of_the_guide_pass_in_any_order_and_leave_nothing(folder, file, passed):
    for _ in range(2):
        output = run(folder, file)
        assert f"= {passed} passed in" in output, output
    if file != "test_flask.py":
        check = "import guests; assert guests.Session.query(guests.Guest).count() == 0; guests.engine.dispose()"
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", check], cwd=folder, env=environ, check=True)


def test_every_file_of_the_guide_is_run(folder):
    assert {path.name for path in folder.glob("test_*.py")} == {
        "test_guests.py",
        "test_fixture.py",
        "test_many.py",
        "test_unittest.py",
        "test_werkzeug.py",
        "test_flask.py",
    }


def test_the_fixture_of_the_guide_overrides_the_option(folder):
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_fixture.py").rename(folder / "fixtures" / "test_fixture.py")
    assert "= 1 passed in" in run(folder, "fixtures")
