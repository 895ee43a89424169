"""What every guest book does, in whichever framework it is written.

Where the frameworks differ, ``applications.py`` has the fact, and :data:`FORMS` who takes which form.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
from sqlalchemy import select

from examples import guest_book
from tests.frameworks.applications import Framework
from tests.frameworks.support import MULTIPART, URLENCODED, elsewhere, headers, status_code
from tests.servers import PORTS_TO_TRY, free_port

ROOT = Path(__file__).parents[2]
SECONDS_TO_WAIT = 20


# -- the page and its three forms -------------------------------------------------------------------------------------


def test_an_entry_is_durable_before_the_server_hears_of_the_redirect(book):
    seen: list[tuple[str, list[str]]] = []
    form = urlencode({"name": "Ada", "text": "héllo"}).encode()
    exchange = book.start(
        "/",
        "POST",
        on_start=lambda status: seen.append((status[:3], book.texts)),
        CONTENT_TYPE=URLENCODED,
        CONTENT_LENGTH=str(len(form)),
        **{"wsgi.input": io.BytesIO(form)},
    )
    exchange.read()
    assert seen == [("303", ["héllo"])]
    assert headers(exchange)["location"] in ("/", "http://127.0.0.1/")


def test_the_page_shows_the_entries(book):
    book.sign("héllo", name="Ada")
    page = book.ask()
    assert status_code(page) == 200
    assert headers(page)["content-type"].lower() == "text/html; charset=utf-8"
    assert "<b>Ada</b>: héllo" in page.content.decode()


def test_the_page_shows_what_visitors_wrote_as_text(book):
    assert status_code(book.sign("<script>alert(1)</script>", name="<i>")) == 303
    page = book.ask().content
    assert b"<script>" not in page
    assert b"&lt;script&gt;" in page
    assert b"<i>" not in page


def test_a_page_is_a_list_or_at_least_settled_before_the_server_gets_it(book):
    left: list[bool] = []
    exchange = book.start(on_start=lambda status: left.append(guest_book.Session.registry.has()))
    assert (type(exchange.body) is list) == book.framework.page_is_a_list
    assert book.checked_out == 0
    if book.framework.page_is_a_list:
        assert left == [False]
    else:
        assert not isinstance(exchange.body, (list, tuple))
    exchange.close()


def test_of_a_view_that_changes_its_mind_nothing_remains_and_the_visitor_is_told_so(book):
    assert status_code(book.sign("kept")) == 303
    exchange = book.sign("never", "/fail")
    assert status_code(exchange) == 409
    assert b"Nothing of it was kept." in exchange.content
    assert book.texts == ["kept"]
    assert status_code(book.sign("kept too")) == 303
    assert book.texts == ["kept", "kept too"]


def test_of_a_view_that_crashes_nothing_remains_and_nothing_is_told(book):
    if issubclass(RuntimeError, book.framework.lets_through):
        with pytest.raises(RuntimeError, match=r"^failed on purpose$"):
            book.sign("never", "/crash")
    else:
        exchange = book.sign("never", "/crash")
        assert status_code(exchange) == 500
        for secret in (b"failed on purpose", b"Traceback", b".py", b"RuntimeError"):
            assert secret not in exchange.content
    assert book.texts == []
    assert book.checked_out == 0
    assert status_code(book.sign("next")) == 303
    assert book.texts == ["next"]


def test_what_is_not_there_is_a_404_and_the_wrong_method_an_error(book):
    assert status_code(book.ask("/nowhere")) == 404
    assert status_code(book.ask("/fail")) == book.framework.wrong_method


def test_no_error_page_shows_html_of_the_visitor_or_the_inside_of_the_application(book):
    pages = [
        book.ask("/<script>x</script>", HTTP_ACCEPT="text/html"),
        book.ask("/fail", QUERY_STRING="<script>", HTTP_ACCEPT="text/html"),
        book.ask("/", "<SCRIPT>", HTTP_ACCEPT="text/html"),
        book.send("/", b"<script>=<script>", HTTP_ACCEPT="text/html"),
    ]
    for page in pages:
        assert page.status.startswith("4")
        content = page.content.decode().lower()
        assert "<script" not in content
        assert "traceback (" not in content
        assert "predicate" not in content


# -- hostile forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        pytest.param(b"text=", "Please write something.", id="empty text"),
        pytest.param(b"text=+", "Please write something.", id="blank text"),
        pytest.param(b"text=" + b"a" * 501, "500 of text, please.", id="long text"),
        pytest.param(b"text=a&name=" + b"a" * 81, "80 characters of name", id="long name"),
        # PostgreSQL stores no such character.
        pytest.param(b"text=a%00b", "Please write text.", id="NUL in the text"),
        pytest.param(b"text=a&name=%00b", "Please write text.", id="NUL in the name"),
        # Which of them it is depends on whether the framework finds a form in it.
        pytest.param(b"", "Please write something.|That is no form.", id="empty"),
        pytest.param(b"no fields", "Please write something.|That is no form.", id="no fields"),
        pytest.param(b"name=Ada", "Please write something.", id="no text"),
    ],
)
def test_what_is_no_entry_is_refused_with_the_reason(book, form, reason):
    exchange = book.send("/", form)
    assert status_code(exchange) == 400
    assert re.search(reason, exchange.content.decode())
    assert book.texts == []


class Form(NamedTuple):
    body: bytes
    content_type: str = URLENCODED
    environ: Mapping[str, str] = MappingProxyType({})
    #: The frameworks that make an entry of it.
    taken_by: str = ""
    #: The fact that tells what the others answer; ``None`` for 400.
    refused_with: str | None = None


FILE = b'--b\r\nContent-Disposition: form-data; name="text"; filename="f"\r\n\r\n\xff\x00\r\n--b--\r\n'
TEXT_FILE = b'--b\r\nContent-Disposition: form-data; name="text"; filename="f"\r\n\r\nx\r\n--b--\r\n'
FIELD = b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\nx\r\n--b--\r\n'
WRONG_TYPE = "form_of_wrong_type"

ALL_BUT_CHERRYPY = "plain_wsgi flask bottle pyramid falcon django turbogears morepath webpy"
FORMS = {
    # Broken
    "NULs": Form(b"\x00" * 100),
    "1500 fields": Form("&".join(f"a{number}" for number in range(1500)).encode()),
    "1200 values": Form("&".join(f"a{number}=1" for number in range(1200)).encode()),
    "bad escapes": Form(b"text=%zz&&=&=%00", taken_by=ALL_BUT_CHERRYPY),
    "bytes, not UTF-8": Form(b"text=\xff", taken_by="pyramid django turbogears morepath"),
    "escapes, not UTF-8": Form(
        b"text=%ff%fe", taken_by="plain_wsgi flask pyramid falcon django turbogears morepath webpy"
    ),
    "cut off": Form(b"text=cut+off", environ={"CONTENT_LENGTH": "400"}, taken_by="bottle falcon django webpy"),
    "negative length": Form(b"text=x", environ={"CONTENT_LENGTH": "-6"}, taken_by="webpy"),
    "no length": Form(b"text=x", environ={"CONTENT_LENGTH": ""}),
    # Of a wrong type, or one that nobody knows
    "JSON": Form(b'{"text": "x"}', "application/json", refused_with=WRONG_TYPE),
    "JSON of a list": Form(b'{"text": ["x"]}', "application/json", refused_with=WRONG_TYPE),
    "JSON without fields": Form(b"[1]", "application/json", refused_with=WRONG_TYPE),
    "unknown type": Form(b"text=x", "nonsense", taken_by="plain_wsgi bottle webpy", refused_with=WRONG_TYPE),
    "no type": Form(b"text=x", "", taken_by="plain_wsgi bottle webpy", refused_with=WRONG_TYPE),
    "unknown charset": Form(
        b"text=x", f"{URLENCODED}; charset=nonsense", taken_by="plain_wsgi flask bottle falcon django cherrypy webpy"
    ),
    # Uploaded
    "field": Form(FIELD, MULTIPART, taken_by="flask bottle django webpy", refused_with=WRONG_TYPE),
    "file": Form(FILE, MULTIPART, refused_with=WRONG_TYPE),
    "file of text": Form(TEXT_FILE, MULTIPART, refused_with=WRONG_TYPE),
    "file, cut off": Form(FILE[:-20], MULTIPART, refused_with=WRONG_TYPE),
    "no part": Form(b"--b\r\n\r\n", MULTIPART, refused_with=WRONG_TYPE),
    "no boundary": Form(b"text=x", "multipart/form-data", taken_by="plain_wsgi", refused_with=WRONG_TYPE),
    # More than was asked for
    "other fields": Form(b"text=x&self=y&=z&request=1;&%&cls=4", taken_by=ALL_BUT_CHERRYPY),
    "query, not UTF-8": Form(
        b"text=x",
        environ={"QUERY_STRING": "text=y&name=%ff"},
        taken_by="plain_wsgi flask bottle pyramid falcon django morepath webpy",
        refused_with="query_not_in_utf8",
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_strange_form_is_an_entry_or_the_fault_of_who_sent_it(book, form):
    exchange = book.send("/", form.body, form.content_type, **form.environ)
    taken = book.framework.name in form.taken_by.split()
    refused_with = getattr(book.framework, form.refused_with) if form.refused_with else 400
    assert status_code(exchange) == (303 if taken else refused_with)
    assert len(book.texts) == taken
    # Whatever was kept can be shown.
    assert status_code(book.ask("/")) == 200
    assert status_code(book.ask("/export.csv")) == 200


def test_of_a_field_that_comes_twice_one_counts_or_it_is_refused(book):
    counts = book.framework.of_two_fields
    status = status_code(book.send("/", b"text=x&text=y"))
    assert (status, book.texts) == ((400, []) if counts is None else (303, [["x", "y"][counts]]))


def test_with_a_length_that_is_no_number_nothing_is_kept(book):
    status = status_code(book.send("/", b"text=x", CONTENT_LENGTH="six"))
    # A server refuses such a request by itself, so that these two (Django up to 5) do not expect it.
    assert status == 400 or (status == 500 and book.framework.name in ("bottle", "django"))
    assert book.texts == []


class Endless(io.RawIOBase):
    """A form without an end; counts what was read of it."""

    count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.count += len(buffer)
        buffer[:] = b"a" * len(buffer)
        return len(buffer)


endless = pytest.mark.parametrize("make", [io.BufferedReader, lambda form: form], ids=["buffered", "unbuffered"])
content_types = pytest.mark.parametrize("content_type", [URLENCODED, MULTIPART])


@content_types
@endless
def test_a_form_that_is_too_large_is_refused_and_little_of_it_read(book, content_type, make):
    form = Endless()
    exchange = book.send("/", b"", content_type, **{"CONTENT_LENGTH": str(10**12), "wsgi.input": make(form)})
    looks_at_type_first = content_type == MULTIPART and book.framework.name == "cherrypy"
    refused_with = "form_of_wrong_type" if looks_at_type_first else "form_too_large"
    assert status_code(exchange) == getattr(book.framework, refused_with)
    assert form.count <= book.framework.reads_at_most
    assert book.texts == []


@content_types
@endless
def test_a_form_in_chunks_is_refused_or_taken_for_none_and_little_of_it_read(book, content_type, make):
    form = Endless()
    exchange = book.send(
        "/",
        b"",
        content_type,
        HTTP_TRANSFER_ENCODING="chunked",
        CONTENT_LENGTH="",
        **{"wsgi.input": make(form), "wsgi.input_terminated": True},
    )
    assert status_code(exchange) == book.framework.form_in_chunks[content_type == MULTIPART]
    assert form.count <= book.framework.reads_at_most
    assert book.texts == []


# -- streams ----------------------------------------------------------------------------------------------------------


def test_the_export_streams_from_a_result_that_stays_open(book):
    book.fill(300)
    exchange = book.start("/export.csv")
    assert status_code(exchange) == 200
    assert headers(exchange)["content-type"] == "text/csv; charset=utf-8"
    assert not isinstance(exchange.body, (list, tuple))
    assert book.checked_out == 1
    assert [exchange.next(), exchange.next()] == [b"id,name,text\r\n", b"1,Ada,entry 0\r\n"]
    assert book.checked_out == 1
    assert not guest_book.Session.registry.has()  # between two chunks
    # Meanwhile, on the same thread where the framework bears that:
    if book.framework.takes_turns:
        assert status_code(book.sign("hello")) == 303
    else:
        assert status_code(elsewhere(book.sign, "hello")) == 303
    rest = exchange.read().decode().splitlines()
    assert rest[:299] == [f"{number + 1},Ada,entry {number}" for number in range(1, 300)]
    assert book.checked_out == 0


def test_no_cell_of_the_export_is_a_formula(book):
    book.sign("=1+1", name="@Ada")
    book.sign("1=1", name="-Ada")
    assert book.ask("/export.csv").content == b"id,name,text\r\n1,'@Ada,'=1+1\r\n2,'-Ada,1=1\r\n"


def test_events_hold_no_connection_between_two_of_them_and_tell_what_is_new(book):
    exchange = book.start("/events")
    assert headers(exchange)["content-type"].startswith("text/event-stream")
    assert headers(exchange)["cache-control"] == "no-store"
    assert exchange.next() == b"data: 0\n\n"
    assert book.checked_out == 0
    assert status_code(book.sign("hello")) == 303
    assert exchange.next() == b"data: 1\n\n"
    assert book.checked_out == 0
    exchange.close()


@pytest.mark.parametrize("path", ["/export.csv", "/events"])
@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_who_hangs_up_leaves_nothing_behind(book, path, chunks):
    book.fill(1000)
    exchange = book.start(path)
    for _ in range(chunks):
        exchange.next()
    exchange.close()
    assert book.checked_out == 0
    assert not guest_book.Session.registry.has()


def test_hanging_up_ends_the_events(book, monkeypatch):
    ended: list[str] = []

    def events() -> Iterator[bytes]:
        try:
            while True:
                guest_book.Session.execute(select(guest_book.Entry))
                yield b"data: 0\n\n"
        finally:
            ended.append("ended")

    monkeypatch.setattr(book.views, "events", events)
    exchange = book.start("/events")
    exchange.next()
    exchange.close()
    assert book.checked_out == 0
    del exchange
    assert ended == ["ended"]


@pytest.mark.parametrize(
    ("path", "fact"), [("/", "head_of_page"), ("/export.csv", "head_of_export"), ("/events", "head_of_events")]
)
def test_a_head_is_answered_as_get_is_where_the_framework_has_it_and_ends(book, path, fact):
    book.fill(3)
    head, get = book.ask(path, "HEAD"), book.start(path)
    get.close()
    assert status_code(head) == getattr(book.framework, fact)
    if status_code(head) == 200:
        assert headers(head)["content-type"] == headers(get)["content-type"]
        assert (head.content != b"") == book.framework.head_has_body


# -- the command of its README ----------------------------------------------------------------------------------------

#: Every warning is to be seen, above all that of a socket that was not closed, but for those that the settings of the
#: tests let pass.
WARNINGS = (
    "always::ResourceWarning",
    # The pool keeps its connections to the end of the process, which Python 3.13 remarks of those to SQLite.
    "ignore:unclosed database in:ResourceWarning",
    "error::DeprecationWarning",
    "ignore:'cgi' is deprecated:DeprecationWarning",
    "ignore:pkg_resources is deprecated as an API",
    "ignore:Deprecated call to `pkg_resources.declare_namespace:DeprecationWarning",
)


def command_of(framework: Framework, folder: Path) -> list[str]:
    """What the one line of the README runs in the end, on a free port."""
    text = (ROOT / "examples" / framework.name / "README.rst").read_text(encoding="utf-8")
    assert f"examples.{framework.name}.{framework.module}" in text.partition("What to know")[0]
    [line] = re.findall(r"^    (python3 -m venv .*)$", text, re.MULTILINE)
    python, *command = shlex.split(line.split(" && ")[-1])
    assert python == ".venv/bin/python"
    if framework.name != "pyramid":
        assert command == ["-m", f"examples.{framework.name}"]
        return [*command, "--port", "0"]
    # It has its port in a file.
    settings = (ROOT / command[-1]).read_text(encoding="utf-8")
    assert settings.count(":8080") == 1
    ini = folder / "development.ini"
    ini.write_text(settings.replace(":8080", f":{free_port()}"), encoding="utf-8")
    return [*command[:-1], str(ini)]


@contextmanager
def serving(framework: Framework, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """Run it until the block ends; at which host and port?"""
    warn = [f"-W{what}" for what in WARNINGS]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    said = ""
    for _ in range(PORTS_TO_TRY):
        command = [sys.executable, *warn, *command_of(framework, folder)]
        with subprocess.Popen(command, cwd=folder, env=environ, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                output = process.stderr if framework.name == "pyramid" else process.stdout
                assert output is not None
                said = ""
                for line in output:
                    said += line
                    if address := re.search(r"http://([0-9.]+):([0-9]+)", line):
                        yield process, address[1], int(address[2])
                        return
            finally:
                process.kill()
        # It has ended. Somebody else may have taken the port before it did: then another one is tried.
        if "in use" not in said:
            break
    raise RuntimeError(f"it does not start; it said:\n{said}")


def ask_server(host: str, port: int, form: str | None) -> bytes:
    """The whole answer, read until the server has closed the connection."""
    head = f"{'GET' if form is None else 'POST'} / HTTP/1.0\r\nHost: {host}\r\nContent-Type: {URLENCODED}\r\n"
    with socket.create_connection((host, port), timeout=SECONDS_TO_WAIT) as connection:
        connection.sendall(f"{head}Content-Length: {len(form or '')}\r\n\r\n{form or ''}".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_the_command_of_its_readme_serves_it_until_it_is_ended(framework, ending, guest_book_path, tmp_path):
    with serving(framework, tmp_path) as (process, host, port):
        answers = [ask_server(host, port, form) for form in ("text=hello", "text=", None)]
        process.send_signal(ending)
        _, errors = process.communicate(timeout=SECONDS_TO_WAIT)
    assert [answer.split(b" ")[1] for answer in answers] == [b"303", b"400", b"200"]
    assert b"hello" in answers[-1]
    assert process.returncode == (0 if ending == signal.SIGINT else -ending)
    if framework.name == "pyramid":
        # pserve tells what it does, and leaves the sockets of waitress to the end of the process.
        assert "Traceback" not in errors
    else:
        # waitress says the first where all of its threads are busy, be it with starting; Django the second.
        expected = ("Task queue depth is ", "Bad Request: /")
        assert [line for line in errors.splitlines() if not line.startswith(expected)] == []
    with closing(sqlite3.connect(guest_book_path)) as connection:
        assert connection.execute("SELECT text FROM entries").fetchall() == [("hello",)]
