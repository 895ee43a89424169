"""The servers that the other tests stand on are real, separate, and gone in the end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL

from tests.servers import DatabaseServer, NotInstalled, WaitressServer, find_program


def scalar(url: URL, statement: str) -> Any:
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return connection.execute(text(statement)).scalar()
    finally:
        engine.dispose()


def test_each_database_is_the_real_thing(database_url: URL) -> None:
    backend = database_url.get_backend_name()
    version = scalar(database_url, "SELECT sqlite_version()" if backend == "sqlite" else "SELECT version()")
    expected = {"sqlite": "3.", "postgresql": "PostgreSQL ", "mysql": "MariaDB"}[backend]
    assert expected in version


@pytest.mark.parametrize("server", ["postgresql", "mariadb"])
def test_each_database_is_empty_and_is_dropped_although_somebody_is_connected(
    server: str, request: pytest.FixtureRequest
) -> None:
    running: DatabaseServer = request.getfixturevalue(server)
    with running.database() as url:
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE left_open (id INTEGER)"))
        connection = engine.connect()
        connection.begin()
        connection.execute(text("SELECT * FROM left_open")).all()
    connection.invalidate()
    connection.close()
    engine.dispose()
    with running.database() as url:
        assert (
            scalar(
                url,
                "SELECT count(*) FROM information_schema.tables WHERE table_schema NOT IN "
                "('information_schema', 'pg_catalog', 'mysql', 'performance_schema', 'sys')",
            )
            == 0
        )


def test_postgresql_prepares_transactions_and_leaves_none_behind(postgresql: DatabaseServer) -> None:
    with postgresql.database() as url:
        engine = create_engine(url)
        with engine.connect() as connection:
            transaction = connection.begin_twophase()
            connection.execute(text("CREATE TABLE prepared (id INTEGER)"))
            transaction.prepare()
            assert postgresql.execute("SELECT count(*) FROM pg_prepared_xacts") == [(1,)]
            connection.detach()
        engine.dispose()
    assert postgresql.execute("SELECT count(*) FROM pg_prepared_xacts") == [(0,)]


def test_postgresql_is_reached_by_the_driver_that_a_test_asks_for(postgresql_url: URL) -> None:
    assert scalar(postgresql_url.set(drivername="postgresql+psycopg2"), "SELECT 1") == 1


def test_waitress_serves_and_leaves_no_thread_behind(waitress_server: Callable[..., WaitressServer]) -> None:
    before = threading.active_count()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [environ["PATH_INFO"].encode()]

    server = waitress_server(app, threads=2)
    with urllib.request.urlopen(server.url + "/hello") as response:
        assert response.read() == b"/hello"
    assert threading.active_count() == before + 3
    server.stop()
    assert threading.active_count() == before


def test_waitress_hangs_up_on_clients_that_do_not_read(waitress_server: Callable[..., WaitressServer]) -> None:
    closed = threading.Event()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        try:
            while True:
                yield b"." * 65536
        finally:
            closed.set()

    server = waitress_server(app)
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(1)
        server.stop()
    assert closed.wait(5)


def test_chromium_shows_a_page_and_runs_its_script(
    chromium: Any, waitress_server: Callable[..., WaitressServer]
) -> None:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/html")])
        return [b"<title>before</title><script>document.title = 'after'</script>"]

    chromium.get(waitress_server(app).url)
    assert chromium.title == "after"


def test_a_database_server_does_not_outlive_tests_that_are_killed(postgresql: DatabaseServer) -> None:
    script = textwrap.dedent(
        """
        import time
        from tests.servers import run_postgresql
        with run_postgresql() as server:
            print(server.url.port, flush=True)
            time.sleep(60)
        """
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777)  # the server is another user
        command, environment = [sys.executable, "-c", script], {**os.environ, "TMPDIR": folder}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as tests:
            assert tests.stdout is not None
            port = int(tests.stdout.readline())
            socket.create_connection(("127.0.0.1", port)).close()
            tests.kill()
        deadline = time.monotonic() + 10
        while os.listdir(folder):
            assert time.monotonic() < deadline, "its files are still there"
            time.sleep(0.05)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(NotInstalled, match="no-such-program or neither-this is not installed"):
        find_program("no-such-program", "neither-this")
