"""The fixtures that all tests share. What runs behind them is in ``servers.py``."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest
import sqlalchemy
from sqlalchemy.engine import URL

from tests.servers import (
    DatabaseServer,
    NotInstalled,
    Replicated,
    WaitressServer,
    find_program,
    run_mariadb,
    run_postgresql,
    run_replicated,
)
from tests.support import World, Worlds

SQLALCHEMY_14 = sqlalchemy.__version__.startswith("1.4.")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background has Ctrl-C ignored, and so would the programs that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    """What a module leaves open is an error there, and not in whichever test the collector happens to run next."""
    yield
    gc.collect()


def unavailable(reason: NotInstalled) -> NoReturn:
    """Skip what cannot be tested on this machine; in CI, which must test it all, fail."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"CI skips nothing: {reason}", pytrace=False)
    pytest.skip(str(reason))


# -- databases --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sqlite_url(tmp_path: Path) -> URL:
    """An SQLite file that does not exist yet."""
    return URL.create("sqlite", database=str(tmp_path / "test.sqlite"))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[DatabaseServer]:
    """A PostgreSQL server for all tests, with prepared transactions."""
    try:
        with run_postgresql() as server:
            yield server
    except NotInstalled as reason:
        unavailable(reason)


@pytest.fixture
def postgresql_url(postgresql: DatabaseServer) -> Iterator[URL]:
    """An empty PostgreSQL database for this test alone.

    The driver is psycopg2 on SQLAlchemy 1.4 and psycopg on later ones; for a certain one, say
    ``postgresql_url.set(drivername="postgresql+psycopg2")``.
    """
    driver = "psycopg2" if SQLALCHEMY_14 else "psycopg"
    with postgresql.database() as url:
        yield url.set(drivername=f"postgresql+{driver}")


@pytest.fixture
def other_postgresql_url(postgresql: DatabaseServer, postgresql_url: URL) -> Iterator[URL]:
    """A second one, for what spans two databases."""
    with postgresql.database() as url:
        yield url.set(drivername=postgresql_url.drivername)


@pytest.fixture(scope="session")
def replicated() -> Iterator[Replicated]:
    """A PostgreSQL primary with two standbys, of which the second one replays 150 milliseconds late."""
    try:
        with run_replicated() as servers:
            yield servers
    except NotInstalled as reason:
        unavailable(reason)


@pytest.fixture(scope="session")
def mariadb() -> Iterator[DatabaseServer]:
    """A MariaDB server for all tests."""
    try:
        with run_mariadb() as server:
            yield server
    except NotInstalled as reason:
        unavailable(reason)


@pytest.fixture
def mariadb_url(mariadb: DatabaseServer) -> Iterator[URL]:
    """An empty MariaDB database for this test alone, over PyMySQL."""
    with mariadb.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def database_url(request: pytest.FixtureRequest) -> URL:
    """An empty database for this test alone; the test runs once on each of the databases."""
    url = request.getfixturevalue(f"{request.param}_url")
    assert isinstance(url, URL)
    return url


@pytest.fixture
def world(request: pytest.FixtureRequest, sqlite_url: URL) -> Iterator[World]:
    """An SQLite database, and a thread-local session or that of ``in_each_registry``; nothing may be left over."""
    with closing(World(sqlite_url, getattr(request, "param", "thread-local"))) as world:
        yield world
        assert world.checked_out == 0
        assert not world.Session.registry.has()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    with closing(Worlds(tmp_path_factory.mktemp("worlds"))) as worlds:
        yield worlds


# -- servers and browsers ---------------------------------------------------------------------------------------------


@pytest.fixture
def waitress_server() -> Iterator[Callable[..., WaitressServer]]:
    """Call it with an application, and waitress serves that until the test ends.

    It takes the options of ``waitress.create_server``. What it returns has ``.host``, ``.port``, ``.url``, and
    ``.stop()`` for tests that cannot wait for the end.
    """
    servers: list[WaitressServer] = []

    def serve(app: Any, **options: Any) -> WaitressServer:
        servers.append(WaitressServer(app, **options))
        return servers[-1]

    yield serve
    for server in reversed(servers):
        server.stop()


@pytest.fixture(scope="session")
def chromium_process() -> Iterator[Any]:
    """A headless Chromium for all tests. Tests use ``chromium``."""
    try:
        browser, driver = find_program("chromium", "chromium-browser", "google-chrome"), find_program("chromedriver")
    except NotInstalled as reason:
        unavailable(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            # Nothing but the pages of the tests is to be asked for.
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1280,1000",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        # With both paths given, selenium looks for no browser and no driver of its own.
        with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as chromium:
            yield chromium


@pytest.fixture
def chromium(chromium_process: Any) -> Iterator[Any]:
    """A headless Chromium (a selenium ``WebDriver``) with one empty window, no cookies and JavaScript on."""
    yield chromium_process
    first, *others = chromium_process.window_handles
    for window in others:
        chromium_process.switch_to.window(window)
        chromium_process.close()
    chromium_process.switch_to.window(first)
    chromium_process.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    chromium_process.execute_cdp_cmd("Network.clearBrowserCookies", {})
    chromium_process.get("about:blank")
