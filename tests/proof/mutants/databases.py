"""A pytest plugin: the database servers that run already, for the processes in which a mutant is imported anew.

To start them takes longer than what most of those processes do.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.servers import DatabaseServer

#: Names the file in which they are described.
VARIABLE = "MUTANTS_DATABASES"


def describe(servers: Mapping[str, DatabaseServer], path: Path) -> None:
    """Write down, by the name of what runs it in ``conftest.py``, how to reach each."""
    found = {name: (type(server), server.url, server._pid_file) for name, server in servers.items()}
    path.write_bytes(pickle.dumps(found))
    os.environ[VARIABLE] = str(path)


def pytest_collection() -> None:
    from tests import conftest

    for name, (cls, url, pid_file) in pickle.loads(Path(os.environ[VARIABLE]).read_bytes()).items():
        server: DatabaseServer = cls(url, pid_file)
        use_databases_of_its_own(server)
        setattr(conftest, name, partial(nullcontext, server))


def use_databases_of_its_own(server: DatabaseServer) -> None:
    """Another process may have been stopped before it had dropped those that it had made."""
    server._numbers = count(os.getpid() * 100_000)
