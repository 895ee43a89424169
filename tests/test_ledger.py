"""The ledger of ``examples/ledger`` over HTTP: each promise on its page, checked in the database by somebody else."""

from __future__ import annotations

import csv
import errno
import gc
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from html.parser import HTMLParser
from http.client import HTTPConnection, IncompleteRead
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from wsgiref.validate import validator

import pytest
from webob import Request

from examples.ledger import model, views
from examples.ledger.__main__ import main
from examples.ledger.application import Ledger

ROOT = Path(__file__).parents[1]
SECONDS_TO_WAIT = 15
POSTED_CASES = [case.path for case in views.CASES if case.method == "post"]


def wait_until(what: Callable[[], Any]) -> Any:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while not (answer := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return answer


class Books:
    """The database file, read (and, where a test says so, tampered with) by sqlite3 alone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def query(self, sql: str) -> list[Any]:
        with closing(sqlite3.connect(self.path, timeout=SECONDS_TO_WAIT)) as connection, connection:
            return connection.execute(sql).fetchall()

    @property
    def balances(self) -> dict[str, int]:
        """What each account has, after a check that all of it adds up."""
        rows = self.query(
            "SELECT name, balance, (SELECT sum(pence) FROM entries WHERE account_id = accounts.id) FROM accounts"
        )
        assert sum(balance for _, balance, _ in rows) == model.INITIAL_TOTAL
        assert [balance for _, balance, _ in rows] == [entries for _, _, entries in rows]
        return {name: balance for name, balance, _ in rows}

    @property
    def entries(self) -> int:
        [[count]] = self.query("SELECT count(*) FROM entries")
        return int(count)

    @property
    def state(self) -> tuple[dict[str, int], int]:
        return self.balances, self.entries

    @property
    def ids(self) -> dict[str, str]:
        return {name: str(number) for name, number in self.query("SELECT name, id FROM accounts")}


class Answer:
    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers}
        self.cookies = [value for name, value in headers if name.lower() == "set-cookie"]
        self.body = body

    @property
    def text(self) -> str:
        return self.body.decode()


class Visitor:
    """A browser without its window: it keeps cookies and sends the token of the form that it has seen."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.cookies: dict[str, str] = {}
        self.token = ""

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        with closing(HTTPConnection(self.host, self.port, timeout=SECONDS_TO_WAIT)) as connection:
            connection.request(method, path, body, {**self._cookie_header(), **_dashed(headers)})
            response = connection.getresponse()
            answer = Answer(response.status, response.getheaders(), response.read())
        for line in answer.cookies:
            for name, cookie in SimpleCookie(line).items():
                self.cookies.pop(name, None)
                if cookie.value:
                    self.cookies[name] = cookie.value
        return answer

    def open(self) -> Answer:
        answer = self.ask("GET", "/")
        self.token = re.findall(r'name="token" value="([^"]+)"', answer.text)[0]
        return answer

    def send(self, path: str, fields: dict[str, str] | None = None, **headers: str) -> Answer:
        """Send a form, with the token unless the fields have one."""
        body = urlencode({"token": self.token, **(fields or {})}).encode()
        return self.ask("POST", path, body, **{"Content_Type": "application/x-www-form-urlencoded", **headers})

    def start(self, method: str, path: str) -> socket.socket:
        """Send a request and return the socket from which its response can be read, or not."""
        body = urlencode({"token": self.token}).encode() if method == "POST" else b""
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/x-www-form-urlencoded",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in self._cookie_header().items()),
        ]
        connection = socket.create_connection((self.host, self.port), timeout=SECONDS_TO_WAIT)
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return connection

    @property
    def panel(self) -> dict[str, Any]:
        answer = self.ask("GET", "/panel.json")
        assert answer.status == 200
        panel: dict[str, Any] = json.loads(answer.body)
        return panel

    def seen(self, path: str) -> dict[str, Any]:
        """What the panel shows of the last request (or job) to this path, once that has ended."""

        def ended() -> dict[str, Any] | None:
            lines = [line for line in self.panel["requests"] if line["path"] == path]
            return lines[0] if lines and lines[0]["kind"] != "running" else None

        found: dict[str, Any] = wait_until(ended)
        return found

    def _cookie_header(self) -> dict[str, str]:
        return {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())} if self.cookies else {}


def _dashed(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def hang_up(connection: socket.socket) -> None:
    """Close without reading the rest, as a browser whose user cancels."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def make_new_books(folder: Path) -> Path:
    """Begin a ledger once, to be copied for each test: quicker than to begin one for each."""
    path = folder / "ledger.sqlite"
    Ledger(path).close()
    return path


@contextmanager
def open_ledger(new_books: Path, books: Books) -> Iterator[Ledger]:
    shutil.copy(new_books, books.path)
    ledger = Ledger(books.path)
    ledger.views.pause = 0.001
    yield ledger
    ledger.close()


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path / "ledger.sqlite")


@pytest.fixture(scope="module")
def new_books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_new_books(tmp_path_factory.mktemp("new"))


@pytest.fixture
def ledger(new_books: Path, books: Books) -> Iterator[Ledger]:
    with open_ledger(new_books, books) as ledger:
        yield ledger


@pytest.fixture
def visitor(ledger: Ledger, waitress_server: Callable[..., Any]) -> Visitor:
    server = waitress_server(ledger.application)
    visitor = Visitor(server.host, server.port)
    visitor.open()
    return visitor


@pytest.fixture
def payment(books: Books) -> dict[str, str]:
    ids = books.ids
    return {"source": ids["Ada"], "target": ids["Alan"], "amount": "12.34", "memo": "Lunch"}


class TestTransferForm:
    def test_a_transfer_moves_the_money_and_says_so_once(self, visitor, books, payment):
        before = books.balances

        answer = visitor.send("/transfer", payment)

        assert answer.status == 303
        assert answer.headers["location"].endswith(f":{visitor.port}/")
        after = books.balances
        assert after == {**before, "Ada": before["Ada"] - 1234, "Alan": before["Alan"] + 1234}
        sentence = "Transferred £12.34 from Ada to Alan."
        assert sentence in visitor.open().text
        assert sentence not in visitor.open().text
        assert visitor.seen("/transfer")["outcome"] == "committed"

    @pytest.mark.parametrize(
        ("typed", "pence"), [("7", 700), ("7.5", 750), ("7,05", 705), (" 0.01 ", 1), ("0000007.00", 700)]
    )
    def test_an_amount_may_be_written_as_people_do(self, visitor, books, payment, typed, pence):
        before = books.balances
        assert visitor.send("/transfer", {**payment, "amount": typed}).status == 303
        assert books.balances["Alan"] == before["Alan"] + pence

    @pytest.mark.parametrize(
        ("field", "typed", "sentence"),
        [
            ("amount", "", "must be a number of pounds"),
            ("amount", "abc", "must be a number of pounds"),
            ("amount", "-1", "must be a number of pounds"),
            ("amount", "1e3", "must be a number of pounds"),
            ("amount", "1.234", "must be a number of pounds"),
            ("amount", "١٢", "must be a number of pounds"),
            ("amount", "12345678901234567890", "must be a number of pounds"),
            ("amount", "nan", "must be a number of pounds"),
            ("amount", "0", "must be from £0.01 to £1,000,000.00"),
            ("amount", "1000000.01", "must be from £0.01 to £1,000,000.00"),
            ("amount", "999999", "Ada has only £"),
            ("source", "", "no such account"),
            ("source", "99", "no such account"),
            ("source", "1 OR 1=1", "no such account"),
            ("target", "-1", "no such account"),
            ("target", "99999999999999999999", "no such account"),
            ("memo", "x" * 81, "one line of 80 characters"),
            ("memo", "two\nlines", "one line of 80 characters"),
            ("memo", "nul\0byte", "one line of 80 characters"),
        ],
    )
    def test_bad_input_is_explained_and_changes_nothing(self, visitor, books, payment, field, typed, sentence):
        before = books.state

        answer = visitor.send("/transfer", {**payment, field: typed})

        assert answer.status == 400
        assert sentence in answer.text
        assert re.search(rf'id="{field}"[^>]* aria-invalid="true" aria-describedby="problem"', answer.text, re.DOTALL)
        assert books.state == before
        check_html(answer.text)

    def test_what_was_typed_is_still_there_after_a_mistake(self, visitor, books, payment):
        answer = visitor.send("/transfer", {**payment, "amount": '5"<b>', "memo": "<i>Tea"})
        assert 'value="5&quot;&lt;b&gt;"' in answer.text
        assert 'value="&lt;i&gt;Tea"' in answer.text
        assert f'<option value="{books.ids["Alan"]}" selected>' in answer.text

    def test_an_account_cannot_pay_itself(self, visitor, books, payment):
        before = books.state
        answer = visitor.send("/transfer", {**payment, "target": payment["source"]})
        assert answer.status == 400
        assert "are the same account" in answer.text
        assert books.state == before

    def test_a_missing_field_is_bad_input(self, visitor, books):
        before = books.state
        assert visitor.send("/transfer").status == 400
        assert books.state == before

    def test_the_database_keeps_the_rule_when_two_spend_the_same_money(self, visitor, books, payment, monkeypatch):
        monkeypatch.setattr(model, "ensure_funds", lambda source, pence: None)  # as if it had still been there
        before = books.state
        answer = visitor.send("/transfer", {**payment, "amount": "999999"})
        assert answer.status == 400
        assert "The money has just gone elsewhere." in answer.text
        assert books.state == before

    def test_markup_in_a_memo_is_text(self, visitor, payment):
        visitor.send("/transfer", {**payment, "memo": "<script>alert(1)</script>&"})
        page = visitor.open().text
        assert '<td class="memo">&lt;script&gt;alert(1)&lt;/script&gt;&amp;</td>' in page
        check_html(page)

    def test_transfers_at_the_same_time_lose_nothing(self, ledger, visitor, books):
        ids, before = books.ids, books.balances
        ledger.start_jobs(every=0.01)

        def pay(number: int) -> int:
            payer = Visitor(visitor.host, visitor.port)
            payer.open()
            source, target = ("Ada", "Grace") if number % 3 else ("Grace", "Ada")
            fields = {"source": ids[source], "target": ids[target], "amount": "1.00"}
            return payer.send("/transfer", {**fields, "memo": "at once"}).status

        with ThreadPoolExecutor(4) as crowd:
            assert set(crowd.map(pay, range(30))) == {303}

        assert books.query("SELECT count(*) FROM transfers WHERE memo = 'at once'") == [(30,)]
        # In one statement, for the job goes on paying.
        [[balance, interest]] = books.query(
            "SELECT balance, (SELECT coalesce(sum(pence), 0) FROM entries JOIN transfers ON transfers.id = transfer_id"
            "  WHERE memo = 'Interest' AND account_id = accounts.id)"
            f" FROM accounts WHERE id = {ids['Ada']}"
        )
        assert balance - interest == before["Ada"] - 10_00


class TestCases:
    @pytest.mark.parametrize(
        ("path", "sentence"),
        [
            ("/cases/server-error", "Then the view answered 500"),
            ("/cases/crash", "<code>HalfwayCrash</code>"),
            ("/cases/refused-commit", "<code>IntegrityError</code>"),
        ],
    )
    def test_a_failed_transfer_is_a_500_that_leaves_nothing(self, ledger, visitor, books, path, sentence):
        before = books.state

        answer = visitor.send(path)

        assert answer.status == 500
        assert sentence in answer.text
        assert 'href="/"' in answer.text
        assert books.state == before
        assert not ledger.views.receipts
        line = visitor.seen(path)
        assert (line["method"], line["status"], line["outcome"]) == ("POST", "500", "rolled back")
        assert line["statements"] > 3
        assert ledger.engine.pool.checkedout() == 0

    def test_a_dry_run_shows_what_would_be_and_keeps_nothing(self, ledger, visitor, books):
        before = books.state

        answer = visitor.send("/cases/dry-run")

        assert answer.status == 200
        ada = before[0]["Ada"]
        assert f'{model.pounds(ada)}</td><td class="number">{model.pounds(ada - 10_00)}' in answer.text
        assert books.state == before
        assert not ledger.views.receipts
        assert visitor.seen("/cases/dry-run")["outcome"] == "rolled back"

    def test_a_receipt_is_sent_after_the_commit(self, ledger, visitor, books, monkeypatch):
        before = books.balances
        in_the_books_when_sent = []

        class Mail:
            def appendleft(self, receipt: str) -> None:
                in_the_books_when_sent.append((receipt, books.balances["Grace"]))

        with monkeypatch.context() as patch:
            patch.setattr(ledger.views, "receipts", Mail())
            assert visitor.send("/cases/after-commit").status == 303

        assert in_the_books_when_sent == [("£10.00 from Ada to Grace", before["Grace"] + 10_00)]
        visitor.send("/cases/after-commit")
        assert "<li>£10.00 from Ada to Grace</li>" in visitor.open().text
        assert books.balances["Grace"] == before["Grace"] + 20_00

    def test_two_transfers_that_collide_are_both_in_the_books(self, ledger, visitor, books, caplog):
        before = books.balances

        assert visitor.send("/cases/collision").status == 303

        assert books.balances == {
            **before,
            "Ada": before["Ada"] - 15_00,
            "Grace": before["Grace"] + 10_00,
            "Alan": before["Alan"] + 5_00,
        }
        newest = books.query("SELECT memo FROM transfers ORDER BY id DESC LIMIT 2")
        assert newest == [("Collided",), ("Standing order",)]
        assert list(ledger.views.receipts) == ["£10.00 from Ada to Grace"]
        shown = [visitor.seen(path) for path in ("/cases/collision", "standing order")]
        assert [(line["status"], line["outcome"], line["attempts"]) for line in shown] == [
            ("303", "committed", 2),
            ("done", "committed", 1),
        ]
        page = visitor.open().text
        assert "Attempt 1 lost the race against a standing order of £5.00; attempt 2 got through." in page
        assert '<span class="committed">committed</span> <span class="attempt">attempt 2</span>' in page
        check_html(page)
        [warning] = [record.getMessage() for record in caplog.records if record.name == "sa_wsgi_session"]
        assert "attempt 1 of 3 lost a race (SQLite BUSY)" in warning
        assert ledger.engine.pool.checkedout() == 0

    def test_the_loser_of_a_race_reads_what_the_winner_has_left(self, ledger, visitor, books, payment):
        visitor.send("/transfer", {**payment, "amount": f"{(books.balances['Ada'] - 12_00) / 100:.2f}"})
        before = books.balances

        answer = visitor.send("/cases/collision")

        assert answer.status == 400
        assert "Ada has only £7.00." in answer.text
        assert books.balances == {**before, "Ada": 7_00, "Alan": before["Alan"] + 5_00}
        line = visitor.seen("/cases/collision")
        assert (line["outcome"], line["attempts"]) == ("no change", 2)
        assert len(ledger.views.receipts) == 1  # of what Ada has spent before

    def test_the_statement_is_complete(self, ledger, visitor, books):
        visitor.send("/cases/after-commit")

        answer = visitor.ask("GET", "/statement.csv")

        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/csv")
        assert answer.headers["content-disposition"] == 'attachment; filename="statement.csv"'
        header, *rows, last = csv.reader(answer.text.splitlines())
        assert header == ["entry", "at", "account", "amount", "memo"]
        assert last == ["rows", str(len(rows))]
        assert [(int(number), name, round(float(amount) * 100), memo) for number, _, name, amount, memo in rows] == (
            books.query(
                "SELECT entries.id, name, pence, memo FROM entries"
                " JOIN accounts ON accounts.id = account_id JOIN transfers ON transfers.id = transfer_id"
                " ORDER BY entries.id"
            )
        )
        assert len(rows) > 2 * views._ROWS_AT_ONCE
        assert visitor.seen("/statement.csv")["statements"] == 1
        assert ledger.engine.pool.checkedout() == 0

    def test_a_memo_in_the_statement_is_no_formula(self, visitor, payment):
        visitor.send("/transfer", {**payment, "memo": "=1+1"})
        assert ",'=1+1\r\n" in visitor.ask("GET", "/statement.csv").text

    def test_a_statement_that_nobody_reads_gives_its_connection_back(self, ledger, visitor):
        hang_up(visitor.start("GET", "/statement.csv"))
        visitor.seen("/statement.csv")
        assert ledger.engine.pool.checkedout() == 0

    def test_a_download_read_to_its_end_is_charged(self, ledger, visitor, books):
        before = books.balances

        answer = visitor.send("/cases/download")

        assert answer.status == 200
        assert len(answer.body) == views.REPORT_PAGES * 2000
        line = visitor.seen("/cases/download")
        assert (line["status"], line["outcome"]) == ("200", "committed")
        assert books.balances == {
            **before,
            "Ada": before["Ada"] - views.REPORT_FEE,
            "The bank": before["The bank"] + views.REPORT_FEE,
        }
        assert ledger.engine.pool.checkedout() == 0

    def test_a_download_cancelled_midway_is_not_charged(self, ledger, visitor, books):
        ledger.views.pause = 0.05
        before = books.state

        connection = visitor.start("POST", "/cases/download")
        assert connection.recv(4000).startswith(b"HTTP/1.1 200 OK")
        panel = visitor.panel
        assert (panel["connections"], panel["units"]) == (1, 1)
        assert (panel["requests"][0]["path"], panel["requests"][0]["outcome"]) == ("/cases/download", "running")
        hang_up(connection)

        line = visitor.seen("/cases/download")
        assert (line["status"], line["outcome"]) == ("200 cancelled", "rolled back")
        assert books.state == before
        wait_until(lambda: ledger.engine.pool.checkedout() == 0)
        panel = visitor.panel
        assert (panel["connections"], panel["units"]) == (0, 0)

    def test_a_download_that_breaks_midway_is_not_charged(self, visitor, ledger, books, monkeypatch):
        class Trouble:
            def wait(self, seconds: float) -> None:
                raise OSError("no more paper")

        before = books.state
        monkeypatch.setattr(ledger.views, "stopping", Trouble())

        with pytest.raises(IncompleteRead):
            visitor.send("/cases/download")

        line = visitor.seen("/cases/download")
        assert (line["status"], line["outcome"]) == ("200 broken off", "rolled back")
        assert books.state == before
        assert ledger.engine.pool.checkedout() == 0

    @pytest.mark.parametrize("path", POSTED_CASES)
    def test_without_money_the_case_says_so(self, visitor, books, path):
        ids = books.ids
        poor = f"UPDATE accounts SET balance = balance {{}} WHERE id = {ids['Ada']}"
        money = books.balances["Ada"]
        books.query(poor.format(f"- {money}"))
        answer = visitor.send(path)
        books.query(poor.format(f"+ {money}"))
        assert answer.status == 400
        assert "Ada has only £0.00." in answer.text
        assert books.balances["Ada"] == money


class TestPanel:
    def test_polls_and_static_files_are_not_listed(self, visitor):
        visitor.ask("GET", "/static/style.css")
        assert [line["path"] for line in visitor.panel["requests"]] == ["/"]

    def test_the_page_that_is_being_made_does_not_count_itself(self, visitor):
        page = visitor.open().text
        assert '<dd id="connections">0</dd>' in page
        assert '<dd id="units">0</dd>' in page
        assert "running" not in page

    def test_the_page_shows_it_without_javascript(self, visitor):
        visitor.send("/cases/crash")
        page = visitor.open().text
        assert '<td class="path">/cases/crash</td><td>500</td><td><span class="rolled-back">rolled back</span>' in page
        assert "The books add up: £55,500.00 in all" in page

    def test_the_list_is_short_and_the_newest_come_first(self, visitor):
        for number in range(20):
            visitor.ask("GET", f"/{number}")
        lines = visitor.panel["requests"]
        assert [line["path"] for line in lines] == [f"/{number}" for number in range(19, 4, -1)]
        assert {(line["status"], line["outcome"], line["statements"]) for line in lines} == {("404", "no change", 0)}

    def test_a_reader_changes_nothing(self, visitor):
        line = visitor.seen("/")
        assert (line["method"], line["status"], line["kind"], line["statements"]) == ("GET", "200", "nothing", 2)

    @pytest.mark.parametrize(
        ("tampering", "sentence"),
        [
            ("UPDATE accounts SET balance = balance + 1 WHERE name = 'Alan'", "not the sum of its entries: Alan."),
            ("DELETE FROM entries WHERE id = 9", "not the sum of its entries: "),
            (
                "UPDATE entries SET pence = pence + 1 WHERE id = 1; UPDATE accounts SET balance = balance + 1"
                " WHERE id = (SELECT account_id FROM entries WHERE id = 1)",
                "£55,500.01 in all, not £55,500.00.",
            ),
        ],
    )
    def test_books_that_do_not_add_up_are_shown(self, visitor, books, tampering, sentence):
        for statement in tampering.split("; "):
            books.query(statement)
        panel = visitor.panel
        assert not panel["sound"]
        assert panel["verdict"].startswith("The books are wrong: ")
        assert sentence in panel["verdict"]
        assert f'<p class="note bad" role="status" id="verdict">{panel["verdict"]}</p>' in visitor.open().text


class TestJob:
    def test_interest_is_paid_until_the_ledger_is_closed(self, ledger, visitor, books):
        before = books.balances
        ledger.start_jobs(every=0.01)
        wait_until(lambda: books.query("SELECT count(*) FROM transfers WHERE memo = 'Interest'")[0][0] >= 2)
        line = visitor.seen("interest")
        assert (line["method"], line["status"], line["outcome"]) == ("job", "done", "committed")

        ledger.close()

        assert "interest" not in [thread.name for thread in threading.enumerate()]
        after = books.balances
        assert after["The bank"] < before["The bank"]
        assert all(after[name] > before[name] for name in ("Ada", "Grace", "Alan"))

    def test_many_runs_leave_room_for_requests_in_the_list(self, ledger, visitor):
        ledger.start_jobs(every=0.001)
        wait_until(lambda: sum(line["method"] == "job" for line in visitor.panel["requests"]) >= 3)
        assert visitor.seen("/")["status"] == "200"

    def test_a_run_that_fails_is_undone_and_the_next_one_comes(self, ledger, visitor, books, monkeypatch, caplog):
        from examples.ledger import jobs

        before, failed = books.state, threading.Event()

        def post(transfer: model.Transfer, account: model.Account, pence: int) -> None:
            model.post(transfer, account, pence)
            if not failed.is_set() and account.name == "Grace":
                assert books.state == before
                failed.set()
                raise RuntimeError("the light went out")

        monkeypatch.setattr(jobs, "post", post)
        ledger.start_jobs(every=0.2)

        wait_until(
            lambda: (
                ("job", "failed", "rolled back")
                in [(line["method"], line["status"], line["outcome"]) for line in visitor.panel["requests"]]
            )
        )
        wait_until(lambda: "The interest was not paid" in caplog.text)  # the observer is told first
        wait_until(lambda: books.state != before)


class TestForgery:
    def test_a_form_of_our_own_page_is_accepted(self, visitor, payment):
        origin = f"http://{visitor.host}:{visitor.port}"
        answer = visitor.send("/transfer", payment, Origin=origin, Sec_Fetch_Site="same-origin")
        assert answer.status == 303

    @pytest.mark.parametrize("path", ["/transfer", *POSTED_CASES])
    def test_no_form_is_accepted_without_its_token(self, visitor, books, payment, path):
        before = books.state
        assert visitor.send(path, {**payment, "token": ""}).status == 403
        assert books.state == before

    @pytest.mark.parametrize(
        ("fields", "headers"),
        [
            ({"token": ""}, {}),
            ({"token": "A" * 43}, {}),
            ({"token": "é"}, {}),
            ({}, {"Cookie": ""}),
            ({}, {"Cookie": "ledger-{port}-token=AAAA"}),
            ({}, {"Cookie": "ledger-{port}-token=\xff\xfe"}),
            ({}, {"Origin": "https://elsewhere.example"}),
            ({}, {"Origin": "http://{host}:1"}),
            ({}, {"Origin": "null"}),
            ({}, {"Sec_Fetch_Site": "cross-site"}),
            ({}, {"Sec_Fetch_Site": "same-site"}),
        ],
    )
    def test_a_forged_form_is_refused(self, visitor, books, payment, fields, headers):
        before = books.state
        headers = {name: value.format(host=visitor.host, port=visitor.port) for name, value in headers.items()}
        answer = visitor.send("/transfer", {**payment, **fields}, **headers)
        assert answer.status == 403
        assert "Nothing was changed." in answer.text
        assert books.state == before

    def test_the_token_of_another_visitor_is_refused(self, visitor, payment):
        other = Visitor(visitor.host, visitor.port)
        other.open()
        assert other.token != visitor.token
        assert visitor.send("/transfer", {**payment, "token": other.token}).status == 403

    def test_the_cookie_is_for_our_own_forms_only(self, visitor):
        [cookie] = [line for line in visitor.open().cookies if "-token=" in line]
        assert cookie.startswith(f"ledger-{visitor.port}-token=")
        assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= {part.strip() for part in cookie.split(";")}

    def test_looking_changes_nothing(self, visitor, books):
        before = books.state
        for path in ["/transfer", *POSTED_CASES]:
            answer = visitor.ask("GET", path)
            assert (answer.status, answer.headers["allow"]) == (405, "POST")
        assert books.state == before


class TestHTTP:
    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/", 200),
            ("HEAD", "/", 200),
            ("GET", "/panel.json", 200),
            ("GET", "/static/style.css", 200),
            ("GET", "/static/panel.js", 200),
            ("GET", "/static/icon.svg", 200),
            ("GET", "/statement.csv", 200),
            ("HEAD", "/statement.csv", 200),
            ("GET", "/elsewhere", 404),
            ("GET", "/static/../views.py", 404),
            ("GET", "/static/", 404),
            ("GET", "/%ff%fe", 404),
            ("PUT", "/", 405),
            ("POST", "/statement.csv", 405),
            ("POST", "/cases/crash", 500),
            ("POST", "/transfer", 400),
        ],
    )
    def test_every_answer_has_the_security_headers(self, visitor, method, path, status):
        answer = visitor.send(path) if method == "POST" else visitor.ask(method, path)
        assert answer.status == status
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cache-control"] == ("no-cache" if "/static/" in path and status == 200 else "no-store")
        assert (answer.body == b"") == (method == "HEAD")

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/"),
            ("GET", "/elsewhere"),
            ("PUT", "/"),
            ("POST", "/transfer"),
            ("POST", "/cases/server-error"),
            ("POST", "/cases/crash"),
            ("POST", "/cases/dry-run"),
        ],
    )
    def test_every_page_is_well_formed_and_loads_nothing_from_elsewhere(self, visitor, method, path):
        answer = visitor.send(path) if method == "POST" else visitor.ask(method, path)
        assert answer.headers["content-type"] == "text/html; charset=UTF-8"
        check_html(answer.text)

    def test_the_static_files_load_nothing_from_elsewhere(self, visitor):
        for name in views.STATIC_FILES:
            text = visitor.ask("GET", name).text.replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)

    @pytest.mark.parametrize("path", ["/", "/panel.json", "/statement.csv", "/static/panel.js", "/elsewhere"])
    def test_it_keeps_to_pep_3333(self, ledger, path):
        response = Request.blank(path).get_response(validator(ledger.application))
        assert response.status_code == (404 if path == "/elsewhere" else 200)
        assert response.body

    @pytest.mark.parametrize(
        ("body", "content_type", "status"),
        [
            (b"x" * (views.LARGEST_FORM + 1), "application/x-www-form-urlencoded", 413),
            (b"{}", "application/json", 415),
            (b"", "multipart/form-data; boundary=x", 415),
            (b"token=%ff%fe", "application/x-www-form-urlencoded", 403),
            (b"token=\xff\xfe", "application/x-www-form-urlencoded", 403),
        ],
    )
    def test_a_body_that_is_no_form_of_ours_is_refused(self, visitor, books, body, content_type, status):
        before = books.state
        answer = visitor.ask("POST", "/transfer", body, Content_Type=content_type)
        assert answer.status == status
        check_html(answer.text)
        assert books.state == before


class TestBooks:
    def test_they_are_the_same_when_they_are_opened_again(self, books):
        Ledger(books.path).close()
        before = books.state
        Ledger(books.path).close()
        assert books.state == before

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE accounts SET balance = -1 WHERE id = 1",
            "UPDATE accounts SET balance = 'much' WHERE id = 1",
            "UPDATE entries SET pence = 0 WHERE id = 1",
            "UPDATE entries SET pence = 1.5 WHERE id = 1",
            "UPDATE transfers SET memo = printf('%81s', '')",
        ],
    )
    def test_the_database_keeps_the_rules(self, ledger, books, statement):
        with pytest.raises(sqlite3.IntegrityError, match="CHECK constraint failed"):
            books.query(statement)

    def test_a_database_of_something_else_is_left_alone(self, books):
        books.query("CREATE TABLE diary (day TEXT)")
        with pytest.raises(model.Refusal, match="holds something else than this ledger"):
            Ledger(books.path)
        assert books.query("SELECT name FROM sqlite_master") == [("diary",)]

    @pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
    def test_a_file_that_is_no_database_is_left_alone(self, books):
        books.path.write_text("Dear diary, " * 100)
        with pytest.raises(model.Refusal, match="cannot be used: file is not a database"):
            Ledger(books.path)
        gc.collect()  # SQLAlchemy 1.4 drops a connection for which a listener to "connect" has failed
        assert books.path.read_text().startswith("Dear diary")

    def test_a_database_in_memory_cannot_be_shared(self):
        with pytest.raises(model.Refusal, match="needs a database file"):
            Ledger(":memory:")


class TestCommand:
    """``python -m examples.ledger``"""

    @pytest.fixture
    def run(self) -> Iterator[Callable[..., subprocess.Popen[str]]]:
        processes = []

        def run(*arguments: object) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "examples.ledger", *map(str, arguments)]
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
            return processes[-1]

        yield run
        for process in processes:
            process.kill()
            process.communicate()

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
    def test_it_tells_its_address_and_stops_cleanly(self, run, books, how):
        process = run("--port", 0, "--database", books.path)
        first_line = process.stdout.readline()
        [(host, port)] = re.findall(r"open at http://([0-9.]+):([0-9]+)/ ", first_line)
        visitor = Visitor(host, int(port))
        assert visitor.open().status == 200
        assert visitor.send("/cases/after-commit").status == 303
        connection = visitor.start("POST", "/cases/download")  # one that would take seconds yet
        assert connection.recv(4000).startswith(b"HTTP/1.1 200 OK")

        process.send_signal(how)

        stdout, stderr = process.communicate(timeout=SECONDS_TO_WAIT)
        connection.close()
        assert (process.returncode, stdout, stderr) == (0, "The ledger is closed.\n", "")
        assert books.balances

    def test_a_port_in_use_is_told_in_one_sentence(self, run, books):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            process = run("--port", port, "--database", books.path)
            stdout, stderr = process.communicate(timeout=SECONDS_TO_WAIT)
        assert (process.returncode, stdout) == (2, "")
        assert stderr == (
            f"Cannot serve port {port} of 127.0.0.1: {os.strerror(errno.EADDRINUSE)}."
            " Choose another with --host and --port.\n"
        )
        assert not books.path.exists()

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--port", "http"], "'http' is not a port: give a number from 0 to 65535\n"),
            (["--port", "65536"], "'65536' is not a port: give a number from 0 to 65535\n"),
            (["--port", "0", "--host", "..."], "Cannot serve port 0 of ...: there is no such host."),
            (["--port", "0", "--database", "no/such/folder/x"], "'no/such/folder/x' cannot be used: unable to open"),
        ],
    )
    def test_bad_arguments_are_told_in_one_sentence(self, capsys, arguments, sentence):
        try:
            status: object = main(arguments)
        except SystemExit as error:  # argparse's own way
            status = error.code
        printed = capsys.readouterr()
        assert (status, printed.out) == (2, "")
        assert sentence in printed.err


class _PageChecker(HTMLParser):
    """Notes what is not well-formed, not accessible, or not allowed by our own Content-Security-Policy."""

    VOID = frozenset({"input", "link", "meta", "br"})
    REFERENCES = ("for", "aria-labelledby", "aria-describedby")

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.fields: list[str] = []
        self.labelled: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if len(attrs) != len(dict(attrs)):
            self.problems.append(f"an attribute twice in <{tag}>")
        for name, value in attrs:
            if name == "style" or name.startswith("on"):
                self.problems.append(f"inline {name} in <{tag}>")
            if name in ("href", "src", "action") and not re.match(r"/(?!/)", value or ""):
                self.problems.append(f"{name}={value}")
            if name == "id":
                self.ids.append(value or "")
            if name in self.REFERENCES:
                self.references += (value or "").split()
            if name == "for":
                self.labelled.append(value or "")
        given = dict(attrs)
        if tag in ("input", "select") and given.get("type") != "hidden":
            self.fields.append(given.get("id") or "")
        if tag == "style" or (tag == "script" and "src" not in given):
            self.problems.append(f"inline <{tag}>")
        if tag == "th" and "scope" not in given:
            self.problems.append("<th> without scope")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> out of place")


def check_html(page: str) -> None:
    checker = _PageChecker()
    checker.feed(page)
    checker.close()
    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    assert checker.problems == []
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.references) <= set(checker.ids)
    assert set(checker.fields) <= set(checker.labelled)
    assert checker.tags.count("main") == checker.tags.count("h1") == checker.tags.count("title") == 1
    assert checker.tags.count("table") == checker.tags.count("caption")
