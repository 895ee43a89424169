"""What the fixtures of the pytest plugin do.  (The plugin itself is ``_sa_wsgi_session_pytest``, and says why.)"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pytest

from ._errors import shown, type_name
from .testing import isolated

_REMEDY = (
    'say what it shall isolate, in the ini file, "sa_wsgi_session = myapp.models:Session", or by a fixture of your '
    'own, named "sa_wsgi_session", that returns the session, or a list of sessions and engines'
)


def configured(names: Sequence[str]) -> list[Any]:
    """What the ini option says.

    :raises pytest.UsageError: if it says nothing, or something that cannot be found.
    """
    if not names:
        raise pytest.UsageError(f'the fixture "isolated" does not know the session: {_REMEDY}')
    return [_find(name) for name in names]


def _find(name: str) -> Any:
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise pytest.UsageError(
            f'sa_wsgi_session in the ini file must be of the form "package.module:name", not {shown(name)}'
        )
    found: Any
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise  # something that the module imports
        raise pytest.UsageError(
            f"sa_wsgi_session = {name} in the ini file: there is no module {error.name}; pytest's ini option "
            f"pythonpath says where modules are looked for"
        ) from error
    for attribute in path.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            raise pytest.UsageError(
                f"sa_wsgi_session = {name} in the ini file: {module} has no {shown(path)}"
            ) from error
    return found


def isolate(given: Any) -> isolated[Any]:
    """The block for what the fixture ``sa_wsgi_session`` has returned."""
    sources = given if isinstance(given, (list, tuple)) else [given]
    if not sources:
        raise pytest.UsageError(f'the fixture "sa_wsgi_session" has returned nothing to isolate: {_REMEDY}')
    try:
        return isolated(*sources)
    except TypeError as error:
        raise pytest.UsageError(
            f'the fixture "sa_wsgi_session" must return a session or an engine, or a list of them; among what it has '
            f"returned is {', '.join(sorted({type_name(source) for source in sources}))} ({error})"
        ) from error
