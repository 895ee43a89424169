"""``examples/webpy_jobs`` over HTTP: eight threads, clients and jobs at the same time, and a database that is right."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from examples.webpy_jobs.application import Jobs, application, count, open_database, take_down

ROOT = Path(__file__).parents[1]
SECONDS_TO_WAIT = 15
VISITORS, TURNS = 6, 3


def wait_until(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class Client:
    """Sends requests, each on a connection of its own."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    def ask(self, method: str, path: str, **fields: str) -> tuple[int, str]:
        """The status and the body."""
        with closing(HTTPConnection(self.host, self.port, timeout=SECONDS_TO_WAIT)) as connection:
            body = urlencode(fields) if method == "POST" else None
            connection.request(method, path, body, {"Content-Type": "application/x-www-form-urlencoded"})
            response = connection.getresponse()
            return response.status, response.read().decode()

    def put_up(self, text: str, **fields: str) -> int:
        return self.ask("POST", "/", text=text, **fields)[0]

    def export(self) -> list[str]:
        status, body = self.ask("GET", "/export")
        assert status == 200
        return body.splitlines()


class Database:
    """The file, read by sqlite3 alone, and the connections that the application holds."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self.checked_out: set[Any] = set()
        event.listen(engine, "checkout", lambda connection, record, proxy: self.checked_out.add(record))
        event.listen(engine, "checkin", lambda connection, record: self.checked_out.discard(record))

    def query(self, sql: str) -> list[Any]:
        with closing(sqlite3.connect(self.path, timeout=SECONDS_TO_WAIT)) as connection, connection:
            return connection.execute(sql).fetchall()

    @property
    def texts(self) -> list[str]:
        return [text for (text,) in self.query("SELECT text FROM notices ORDER BY id")]

    @property
    def found_out(self) -> Any:
        """What the jobs have written down: how many notices there are, how many were taken down."""
        [row] = self.query("SELECT counted, taken_down FROM board")
        return row


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    path = tmp_path / "notices.sqlite"
    engine = open_database(str(path))
    yield Database(path, engine)
    engine.dispose()


@pytest.fixture
def client(database: Database, waitress_server: Any) -> Client:
    server = waitress_server(application, threads=8, outbuf_high_watermark=1000)
    return Client(server.host, server.port)


def test_what_was_acknowledged_is_in_the_database_and_nothing_else(client, database):
    def visit(visitor: int) -> tuple[list[str], int]:
        """What this visitor was told is there, and how much of it the jobs take down."""
        acknowledged, briefly = [], 0
        for number in range(TURNS):
            name = f"{visitor}/{number}"
            assert client.put_up(name) == 303
            acknowledged.append(name)
            assert client.put_up(f"{name} for a moment", seconds="0.01") == 303
            briefly += 1
            assert client.ask("POST", "/crash", text=f"{name} and crash") == (500, "internal server error")
            assert client.put_up("", seconds="9") == 400
            assert client.put_up(f"{name} for a while", seconds="some") == 500
            # Everybody tries this one. The database lets one of them have it, and says so at COMMIT.
            if (status := client.put_up(f"taken/{number}")) == 303:
                acknowledged.append(f"taken/{number}")
            else:
                assert status == 500
            assert set(acknowledged) <= set(client.export())
            assert client.ask("GET", "/")[0] == 200
        return acknowledged, briefly

    jobs = Jobs(count, take_down, seconds=0.05)
    try:
        with ThreadPoolExecutor(VISITORS) as visitors:
            results = list(visitors.map(visit, range(VISITORS)))
    finally:
        jobs.stop()
    take_down()
    count()

    acknowledged = sorted(text for texts, _ in results for text in texts)
    assert sorted(database.texts) == acknowledged
    assert len(acknowledged) == VISITORS * TURNS + TURNS
    assert database.found_out == (len(acknowledged), sum(briefly for _, briefly in results))
    wait_until(lambda: not database.checked_out)


def test_an_error_page_of_web_py_rolls_back_what_the_handler_has_sent_to_the_database(client, database):
    assert client.ask("POST", "/crash", text="half of it") == (500, "internal server error")
    assert database.texts == []


def test_a_text_that_the_commit_refuses_is_not_answered_with_success(client, database):
    assert [client.put_up("once"), client.put_up("once")] == [303, 500]
    assert database.texts == ["once"]


def test_a_visitor_who_leaves_in_the_middle_of_the_export_leaves_no_connection_behind(client, database):
    database.query(
        "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 60000)"
        " INSERT INTO notices (text) SELECT printf('%0200d', n) FROM numbers"
    )
    with socket.create_connection((client.host, client.port), timeout=SECONDS_TO_WAIT) as connection:
        connection.sendall(b"GET /export HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")
        assert len(database.checked_out) == 1
    wait_until(lambda: not database.checked_out)
    assert client.put_up("next") == 303


def test_a_page_shows_what_visitors_wrote_as_text(client):
    client.put_up("<script>alert(1)</script>")
    _, page = client.ask("GET", "/")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_job_that_fails_is_logged_and_runs_again(caplog):
    runs: list[int] = []

    def job() -> None:
        runs.append(len(runs))
        raise RuntimeError("failed on purpose")

    jobs = Jobs(job, seconds=0.01)
    wait_until(lambda: len(runs) > 1)
    jobs.stop()
    assert "A job failed" in caplog.text


def test_a_file_that_is_uploaded_is_no_text(client, database):
    """web.py gives it out as bytes, which SQLite would store, and no page could show."""
    form = b'--b\r\nContent-Disposition: form-data; name="text"; filename="f"\r\n\r\n\xff\r\n--b--\r\n'
    with closing(HTTPConnection(client.host, client.port, timeout=SECONDS_TO_WAIT)) as connection:
        connection.request("POST", "/", form, {"Content-Type": "multipart/form-data; boundary=b"})
        assert connection.getresponse().status == 400
    assert database.texts == []


def test_the_command_of_its_readme_serves_it_until_ctrl_c(tmp_path):
    text = (ROOT / "examples/webpy_jobs/README.rst").read_text()
    [one_line, in_environment] = re.findall(r"^    (.*-m examples\.webpy_jobs.*)$", text, re.MULTILINE)
    assert one_line.split(" && ")[-1] == ".venv/bin/python -m examples.webpy_jobs"
    _python, *command = shlex.split(in_environment)
    path = tmp_path / "notices.sqlite"
    # Those of its options that are said twice count in the last form.
    command = [sys.executable, *command, "--port", "0", "--database", str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            [(host, port)] = re.findall(r"http://([0-9.]+):([0-9]+)/", process.stdout.readline())
            client = Client(host, int(port))
            assert client.put_up("hello") == 303
            assert client.put_up("bye", seconds="0") == 303
            wait_until(lambda: "1 notices at the last count, 1 taken down" in client.ask("GET", "/")[1])
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=SECONDS_TO_WAIT)
        finally:
            process.kill()
    # waitress warns of a request that has to wait for a thread, on a busy machine.
    assert (process.returncode, "Traceback" in errors) == (0, False)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT text FROM notices").fetchall() == [("hello",)]
