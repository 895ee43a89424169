"""What clients were told is true, whatever breaks meanwhile.

Each web server serves each database for :data:`SECONDS` (``FAULTS_SECONDS`` in the environment says for how many); what
breaks is told in ``faults.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from tests.conftest import unavailable
from tests.proof.faults import MARIADB_OPTIONS, run
from tests.proof.faults_servers import WEB_SERVERS
from tests.servers import DatabaseServer, NotInstalled, run_mariadb, run_postgresql

SECONDS = float(os.environ.get("FAULTS_SECONDS", "12"))

PSYCOPG = "postgresql+psycopg2" if sqlalchemy.__version__.startswith("1.4.") else "postgresql+psycopg"


@pytest.fixture(scope="module")
def crashing_postgresql() -> Iterator[DatabaseServer]:
    try:
        with run_postgresql(keeps_commits=True) as server:
            yield server
    except NotInstalled as reason:
        unavailable(reason)


@pytest.fixture(scope="module")
def crashing_mariadb() -> Iterator[DatabaseServer]:
    try:
        with run_mariadb(keeps_commits=True, options=MARIADB_OPTIONS) as server:
            yield server
    except NotInstalled as reason:
        unavailable(reason)


@pytest.mark.parametrize("web", WEB_SERVERS)
@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_all_that_was_told_is_true(database: str, web: str, request: pytest.FixtureRequest, tmp_path: Path, tell):
    server: DatabaseServer = request.getfixturevalue(f"crashing_{database}")
    with server.database() as url:
        if database == "postgresql":
            url = url.set(drivername=PSYCOPG)
        audit = run(server, url, WEB_SERVERS[web], tmp_path, SECONDS)
    tell(f"{database} behind {web}", audit.figures())
    audit.check()
