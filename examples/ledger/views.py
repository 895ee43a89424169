"""The views: what an application looks like that leaves its sessions to the middleware.

Each of them just uses ``Session``. None of them commits, rolls back, removes or closes anything.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from webob import Request, Response
from webob.static import FileApp

from sa_wsgi_session import current_scope, session_scope

from . import pages
from .jobs import INTEREST_MEMO
from .model import (
    LARGEST_AMOUNT,
    LONGEST_MEMO,
    Account,
    Entry,
    Refusal,
    Session,
    Transfer,
    account_named,
    ensure_funds,
    move,
    new_transfer,
    post,
    pounds,
)
from .safety import Forgery, FormGuard

LARGEST_FORM = 10_000  # bytes
REPORT_FEE = 1_00
REPORT_PAGES = 60
_TEN_POUNDS = 10_00
_STANDING_ORDER = 5_00
_ROWS_AT_ONCE = 50
_NUMBER = re.compile(r"[0-9]{1,9}")
_AMOUNT = re.compile(r"([0-9]{1,7})(?:[.,]([0-9]{1,2}))?")

STATIC_FILES = {
    f"/static/{path.name}": FileApp(str(path), cache_control="no-cache")
    for path in (Path(__file__).parent / "static").iterdir()
}

CASES = [
    pages.Case(
        "/cases/server-error",
        "A transfer that ends in a 500",
        "The view moves £10 from Ada to Grace, then answers 500. You see its page; the money stays where it was.",
        "Transfer, then answer 500",
    ),
    pages.Case(
        "/cases/crash",
        "A transfer that crashes halfway",
        "The debit is written, then an exception comes before the credit. "
        "The exception goes on to the error page; the debit is undone.",
        "Debit, then crash",
    ),
    pages.Case(
        "/cases/refused-commit",
        "A COMMIT that the database refuses",
        "The view succeeds, but the transfer names an approval that does not exist, "
        "which the database checks at COMMIT. You see a 500, not the success that the view meant.",
        "Transfer without approval",
    ),
    pages.Case(
        "/statement.csv",
        "A statement from an open result",
        "The view runs the query, the generator reads its rows while they are sent. "
        "The CSV is complete; its last line counts the rows.",
        "Stream the statement",
        method="get",
    ),
    pages.Case(
        "/cases/dry-run",
        "A dry run",
        "Moves £10 from Ada to Grace and shows what that would do: a success (200) that keeps "
        "nothing, because the view doomed it.",
        "Try without keeping",
    ),
    pages.Case(
        "/cases/after-commit",
        "Work done after the commit",
        "Moves £10 from Ada to Grace. The receipt is sent once the money has moved; "
        "each transfer above has asked for one too, and none came.",
        "Transfer with a receipt",
    ),
    pages.Case(
        "/cases/collision",
        "Two transfers that collide",
        "Before the view has moved £10 from Ada to Grace, a standing order moves £5 from Ada to Alan, and the database "
        "refuses the slower one. The request is replayed: both are in the books, with one receipt.",
        "Transfer and collide",
    ),
    pages.Case(
        "/cases/download",
        "A download, cancelled midway",
        "Ada is charged £1 while a slow report streams. Cancel the download, and the charge is "
        "undone and the connection is back. Read it to the end, and the charge stands. "
        "Until then other transfers wait: on SQLite all, as it has one writer at a time.",
        "Download the report",
    ),
]


class HalfwayCrash(Exception):
    """The power went out between the debit and the credit."""


class Application:
    """The ledger as a WSGI application, to be wrapped in a ``SessionMiddleware``."""

    def __init__(self) -> None:
        self.guard = FormGuard()
        #: What has been sent, newest first. In earnest this would be a mail server.
        self.receipts: deque[str] = deque(maxlen=5)
        #: Seconds between two pages of the slow report.
        self.pause = 0.1
        #: Set when the server stops: a slow report then hurries to its end.
        self.stopping = threading.Event()
        self._views = {
            ("GET", "/"): self.home,
            ("GET", "/statement.csv"): self.statement,
            ("POST", "/transfer"): self.transfer,
            ("POST", "/cases/server-error"): self.server_error,
            ("POST", "/cases/crash"): self.crash,
            ("POST", "/cases/refused-commit"): self.refused_commit,
            ("POST", "/cases/download"): self.download,
            ("POST", "/cases/dry-run"): self.dry_run,
            ("POST", "/cases/after-commit"): self.after_commit,
            ("POST", "/cases/collision"): self.collision,
        }

    # The page and the transfer form.

    def home(self, request: Request, form: pages.Form | None = None) -> Response:
        response = Response(status=200 if form is None else 400)
        token = self.guard.token(request)
        self.guard.remember(request, response, token)
        accounts = Session.execute(select(Account).order_by(Account.id)).scalars().all()
        latest = Session.execute(
            select(Account.name, Transfer.memo, Entry.pence)
            .join(Entry.transfer)
            .join(Entry.account)
            .where(Transfer.memo != INTEREST_MEMO)
            .order_by(Entry.id.desc())
            .limit(8)
        ).all()
        response.text = pages.home(
            pages.Home(
                token=token,
                accounts=[(a.id, a.name, pounds(a.balance)) for a in accounts],
                latest=[(name, memo, pounds(pence)) for name, memo, pence in latest],
                receipts=list(self.receipts),
                cases=CASES,
                panel=request.environ["ledger.panel"].snapshot(),
                flash=self.guard.take_flash(request, response),
                form=form or pages.Form(),
            )
        )
        return response

    def transfer(self, request: Request) -> Response:
        form = pages.Form(
            **{name: str(request.POST.get(name, "")).strip() for name in ("source", "target", "amount", "memo")}
        )
        try:
            source = _account(form.source, "source")
            target = _account(form.target, "target")
            if source is target:
                raise Refusal("From and To are the same account.", field="target")
            pence = _amount(form.amount)
            move(source, target, pence, _memo(form.memo))
        except Refusal as refusal:
            return self._try_again(request, form, refusal)
        except IntegrityError:
            # Another transfer was quicker, and the database keeps the rule that we had checked before.
            Session.rollback()
            return self._try_again(request, form, Refusal("The money has just gone elsewhere.", field="amount"))
        self._send_receipt_later(source, target, pence)
        return self._back(request, f"Transferred {pounds(pence)} from {source.name} to {target.name}.")

    def _try_again(self, request: Request, form: pages.Form, refusal: Refusal) -> Response:
        return self.home(request, dataclasses.replace(form, problem=refusal.reason, wrong_field=refusal.field))

    # The cases that bite.

    def server_error(self, request: Request) -> Response:
        """Changes the database, then answers 500: the status decides, nothing is kept."""
        done = self._ten_pounds("Ended in a 500")
        return Response(pages.failed_in_view(done), status=500)

    def crash(self, request: Request) -> Response:
        """Crashes between debit and credit: nothing is kept, and the exception goes on."""
        ada = account_named("Ada")
        ensure_funds(ada, _TEN_POUNDS)
        self._send_receipt_later(ada, account_named("Grace"), _TEN_POUNDS)
        post(new_transfer("Crashed halfway"), ada, -_TEN_POUNDS)
        raise HalfwayCrash

    def refused_commit(self, request: Request) -> Response:
        """Succeeds as far as it can tell. The answer is a 500 all the same."""
        done = self._ten_pounds("Never approved", approval_id=404)
        return self._back(request, done)

    def dry_run(self, request: Request) -> Response:
        """Does it all, shows what came of it, and keeps nothing."""
        people = [account_named("Ada"), account_named("Grace")]
        before = [pounds(person.balance) for person in people]
        self._ten_pounds("Dry run")
        after = [pounds(person.balance) for person in people]
        current_scope(Session).doom("dry run")
        names = [person.name for person in people]
        return Response(pages.dry_run(zip(names, before, after, strict=True)))

    def after_commit(self, request: Request) -> Response:
        """The receipt is sent by ``on_commit``: after the money has moved, or never."""
        return self._back(request, self._ten_pounds("With a receipt"))

    def collision(self, request: Request) -> Response:
        """Loses a race in its first attempt: the whole view is called once more, as if for the first time."""

        def standing_order() -> None:
            with request.environ["ledger.panel"].job("standing order"), session_scope(Session):
                move(account_named("Ada"), account_named("Alan"), _STANDING_ORDER, "Standing order")

        attempt = current_scope(Session).attempt
        if attempt == 1:
            # Staged from here ... sqlite3 by itself begins a transaction with the first change. This one begins before
            # it reads, and what it has read is out of date when it comes to write: SQLite refuses that, and PostgreSQL
            # does where transactions are serializable.
            if Session.connection().dialect.name == "sqlite":
                Session.connection().exec_driver_sql("BEGIN")
            ensure_funds(account_named("Ada"), _TEN_POUNDS)
            with ThreadPoolExecutor(1) as somebody_else:
                somebody_else.submit(standing_order).result()
            # ... to here. The rest is a transfer like any other.
        done = self._ten_pounds("Collided")
        order = f"a standing order of {pounds(_STANDING_ORDER)}"
        return self._back(request, f"{done} Attempt 1 lost the race against {order}; attempt {attempt} got through.")

    def statement(self, request: Request) -> Response:
        """The query runs here; its rows are read while they are sent."""
        result = Session.execute(
            select(Entry.id, Transfer.at, Account.name, Entry.pence, Transfer.memo)
            .join(Entry.transfer)
            .join(Entry.account)
            .order_by(Entry.id)
            .execution_options(yield_per=_ROWS_AT_ONCE)
        )

        def lines() -> Iterator[bytes]:
            yield _csv(["entry", "at", "account", "amount", "memo"])
            count = 0
            for rows in result.partitions():
                yield b"".join(
                    _csv([number, at.isoformat(), name, f"{pence / 100:.2f}", _harmless(memo)])
                    for number, at, name, pence, memo in rows
                )
                count += len(rows)
            yield _csv(["rows", count])

        return _attachment("statement.csv", "text/csv", lines())

    def download(self, request: Request) -> Response:
        """Changes the database *while* it streams: kept if it is read to its end, else not."""

        def report() -> Iterator[bytes]:
            move(account_named("Ada"), account_named("The bank"), REPORT_FEE, "Annual report")
            for number in range(1, REPORT_PAGES + 1):
                yield f"Annual report, page {number} of {REPORT_PAGES}\n".encode().ljust(2000, b".")
                self.stopping.wait(self.pause)

        ensure_funds(account_named("Ada"), REPORT_FEE)
        return _attachment("annual-report.txt", "text/plain", report())

    # What they share.

    def _ten_pounds(self, memo: str, approval_id: int | None = None) -> str:
        ada, grace = account_named("Ada"), account_named("Grace")
        self._send_receipt_later(ada, grace, _TEN_POUNDS)
        move(ada, grace, _TEN_POUNDS, memo, approval_id)
        return f"Transferred {pounds(_TEN_POUNDS)} from {ada.name} to {grace.name}."

    def _send_receipt_later(self, source: Account, target: Account, pence: int) -> None:
        receipt = f"{pounds(pence)} from {source.name} to {target.name}"
        current_scope(Session).on_commit(lambda: self.receipts.appendleft(receipt))

    def _back(self, request: Request, message: str) -> Response:
        """Redirect to the page, so that reloading it sends no form again."""
        response = Response(status=303, location="/")
        self.guard.flash(request, response, message)
        return response

    # WSGI.

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        static = STATIC_FILES.get(environ["PATH_INFO"])
        if static is not None:
            return static(environ, start_response)
        request = Request(environ)
        response = self._respond(request)
        if "Cache-Control" not in response.headers:
            response.cache_control = "no-store"
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        path = request.environ["PATH_INFO"] or "/"
        method = "GET" if request.method == "HEAD" else request.method
        view = self._views.get((method, path))
        if view is None:
            allowed = sorted(m for m, p in self._views if p == path)
            if not allowed:
                return _refused(404, "Not found", "There is no such page.")
            response = _refused(405, "Not so", "This address is used in another way.")
            response.allow = allowed
            return response
        try:
            if method == "POST":
                if (request.content_length or 0) > LARGEST_FORM:
                    return _refused(413, "Too large", "No form of ours is as large as that.")
                if request.content_type != "application/x-www-form-urlencoded":
                    return _refused(415, "Not a form", "This address takes a form, as sent by our page.")
                self.guard.check(request)
            return view(request)
        except Forgery as forgery:
            return _refused(403, "Not accepted", str(forgery))
        except Refusal as refusal:
            return _refused(400, "Not done", refusal.reason)


def _refused(status: int, title: str, reason: str) -> Response:
    return Response(pages.refused(title, reason), status=status)


def _attachment(filename: str, content_type: str, body: Iterator[bytes]) -> Response:
    return Response(
        app_iter=body,
        content_type=content_type,
        charset="utf-8",
        content_disposition=f'attachment; filename="{filename}"',
    )


def _csv(row: list[object]) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow(row)
    return line.getvalue().encode()


def _harmless(text: str) -> str:
    """A spreadsheet takes a cell that begins so for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _account(text: str, field: str) -> Account:
    account = Session.get(Account, int(text)) if _NUMBER.fullmatch(text) else None
    if account is None:
        raise Refusal("There is no such account.", field)
    return account


def _amount(text: str) -> int:
    """``"12.5"`` → ``1250`` pence."""
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise Refusal("The amount must be a number of pounds, such as 12 or 12.50.", field="amount")
    pence = int(match[1]) * 100 + int((match[2] or "").ljust(2, "0"))
    if not 1 <= pence <= LARGEST_AMOUNT:
        raise Refusal(f"The amount must be from {pounds(1)} to {pounds(LARGEST_AMOUNT)}.", field="amount")
    return pence


def _memo(text: str) -> str:
    if len(text) > LONGEST_MEMO or not text.isprintable():
        raise Refusal(f"What it is for must be one line of {LONGEST_MEMO} characters at most.", field="memo")
    return text or "Transfer"
