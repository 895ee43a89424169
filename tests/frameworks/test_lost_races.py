"""Lost races are replayed, and no visitor hears of them: on PostgreSQL at SERIALIZABLE, with MariaDB's deadlocks, and
on SQLite, which has one writer at a time.

The visitors are threads, each with a connection to a waitress of as many threads, which serves Flask. That there are
races is left to no chance: the first requests wait for each other in the middle of their transactions.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from threading import Barrier
from typing import Any, NamedTuple

import flask
import pytest
import sqlalchemy as sa
from pyramid.response import Response
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from sa_wsgi_session import RetryPolicy, SessionMiddleware, current_scope
from tests.frameworks.applications import make_pyramid
from tests.frameworks.support import ask, status_code
from tests.support import make_session, make_sqlite_transactional

CLIENTS = 8
REQUESTS = 10  # of each client
SECONDS_TO_WAIT = 30

#: An attempt loses only to a request that succeeds, so no request needs more of them than there are requests. (On
#: SQLite several may lose to the same one; but the longer they pause, the fewer.)
PATIENT = RetryPolicy(attempts=CLIENTS * REQUESTS, delay=0.01, max_delay=0.1, deadline=None)


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Bank:
    """The accounts 1 and 2, with nothing on them at first, and a session of the application's."""

    def __init__(self, engine: Engine, registry: str) -> None:
        self.engine = engine
        self.Session: Any = make_session(registry, sessionmaker(engine))
        # Another pool, and so another connection.
        self.observer = sa.create_engine(engine.url)
        Base.metadata.create_all(engine)
        self.write(sa.insert(Account).values([{"id": 1, "balance": 0}, {"id": 2, "balance": 0}]))

    def write(self, statement: Any) -> None:
        """Past the session, and durable."""
        with self.observer.begin() as connection:
            connection.execute(statement)

    @property
    def balances(self) -> list[int]:
        """What another connection sees."""
        with self.observer.connect() as connection:
            return list(connection.execute(sa.select(Account.balance).order_by(Account.id)).scalars())

    @property
    def checked_out(self) -> int:
        """How many connections the pool has given out and not got back."""
        return self.engine.pool.checkedout()  # type: ignore[attr-defined]


OpenBank = Callable[..., Bank]


@pytest.fixture
def open_bank() -> Iterator[OpenBank]:
    """Call it with a URL, and with options of the engine. Nothing may be left over."""
    with ExitStack() as stack:
        banks: list[Bank] = []

        def open_bank(
            url: URL, *, registry: str = "thread-local", journal_mode: str | None = None, **options: Any
        ) -> Bank:
            engine = sa.create_engine(url, pool_size=CLIENTS, max_overflow=0, **options)
            stack.callback(engine.dispose)
            if journal_mode is not None:
                make_sqlite_transactional(engine, journal_mode)
            banks.append(Bank(engine, registry))
            stack.callback(banks[-1].observer.dispose)
            return banks[-1]

        yield open_bank
        assert [bank.checked_out for bank in banks] == [0] * len(banks)
        assert not any(bank.Session.registry.has() for bank in banks)


class Meeting:
    """Where as many threads wait for each other, once; whoever comes later passes by."""

    def __init__(self, size: int) -> None:
        self._places = iter(range(size))
        self._barrier = Barrier(size)

    def attend(self) -> None:
        if next(self._places, None) is not None:
            self._barrier.wait(SECONDS_TO_WAIT)


class Order(NamedTuple):
    """A request, which has a body unless it is a GET, and what it adds to the balances."""

    body: dict[str, int] | None
    effect: tuple[int, int]


class Answered(NamedTuple):
    """What came of all requests."""

    statuses: Counter[int]
    #: What the ones with a 200 have added to the balances.
    balances: list[int]


Send = Callable[[Any, Callable[[int, int], Order]], Answered]


@pytest.fixture
def send(waitress_server: Any) -> Send:
    """Serve an application to all visitors at once, of whom each sends one request after the other."""

    def send(app: Any, make_order: Callable[[int, int], Order]) -> Answered:
        server = waitress_server(app, threads=CLIENTS)

        def visit(client: int) -> list[tuple[Order, int]]:
            answers = []
            with closing(HTTPConnection(server.host, server.port, timeout=SECONDS_TO_WAIT)) as connection:
                for number in range(REQUESTS):
                    order = make_order(client, number)
                    if order.body is None:
                        connection.request("GET", "/")
                    else:
                        body = json.dumps(order.body)
                        connection.request("POST", "/", body, {"Content-Type": "application/json"})
                    with connection.getresponse() as response:
                        response.read()
                        answers.append((order, response.status))
            return answers

        with ThreadPoolExecutor(CLIENTS) as threads:
            answers = [answer for answers in threads.map(visit, range(CLIENTS)) for answer in answers]
        server.stop()
        effects = [order.effect for order, status in answers if status == 200]
        return Answered(
            Counter(status for _, status in answers), [sum(column) for column in zip(*effects, strict=True)]
        )

    return send


def replays(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """How often which kind of lost race was replayed; and whatever else the package complains of."""
    lines = [record.getMessage() for record in caplog.records if record.name == "sa_wsgi_session"]
    return Counter(re.sub(r".* lost a race \((.*)\) and is replayed in .*", r"\1", line) for line in lines)


# -- one balance, which all of them read and then write ---------------------------------------------------------------


def make_counter(bank: Bank, retry: RetryPolicy | None) -> flask.Flask:
    app: Any = flask.Flask("tests")
    meeting = Meeting(CLIENTS)

    def read() -> Account:
        account: Account = bank.Session.get_one(Account, 1)
        meeting.attend()
        return account

    @app.get("/")
    def add_one() -> str:
        read().balance += 1
        return "the middleware flushes this, and hears of it if the race is lost"

    @app.post("/")
    def add() -> str:
        read().balance += flask.request.get_json()["amount"]
        bank.Session.flush()
        return "if the race is lost, Flask has heard of that, and made an error page of it"

    app.wsgi_app = SessionMiddleware(app.wsgi_app, bank.Session, retry=retry)
    return app


def addition(client: int, number: int) -> Order:
    if (client + number) % 2:
        return Order(None, (1, 0))
    amount = 1000 + number
    return Order({"amount": amount}, (amount, 0))


def check_without_a_policy(bank: Bank, send: Send) -> None:
    statuses, balances = send(make_counter(bank, retry=None), addition)
    assert bank.balances == balances
    assert statuses.keys() == {200, 500}
    assert statuses[500] >= CLIENTS - 1  # all but one of those that met


def check_with_a_policy(bank: Bank, send: Send) -> None:
    statuses, balances = send(make_counter(bank, PATIENT), addition)
    assert bank.balances == balances
    assert statuses == {200: CLIENTS * REQUESTS}


@pytest.mark.parametrize("registry", ["thread-local", "contextual"])
def test_postgresql_refuses_increments_at_serializable_and_all_of_them_succeed(
    postgresql_url, open_bank, send, caplog, registry
):
    check_with_a_policy(open_bank(postgresql_url, registry=registry, isolation_level="SERIALIZABLE"), send)
    lost = replays(caplog)
    assert lost.keys() == {"SQLSTATE 40001"}
    assert lost["SQLSTATE 40001"] >= CLIENTS - 1


def test_without_a_policy_that_makes_error_pages(postgresql_url, open_bank, send, caplog):
    check_without_a_policy(open_bank(postgresql_url, isolation_level="SERIALIZABLE"), send)
    assert not replays(caplog)


# With the former, readers go on while somebody writes; with the latter, a writer waits at COMMIT for those who read.
each_journal_mode = pytest.mark.parametrize("journal_mode", ["WAL", "MEMORY"])
#: Seconds to wait for a lock, where waiting may help.
SHORT = {"timeout": 0.05}


@each_journal_mode
def test_sqlite_has_one_writer_and_all_increments_succeed(sqlite_url, open_bank, send, caplog, journal_mode):
    check_with_a_policy(open_bank(sqlite_url, journal_mode=journal_mode, connect_args=SHORT), send)
    lost = replays(caplog)
    assert lost.keys() == {"SQLite BUSY"}
    assert lost["SQLite BUSY"] >= CLIENTS - 1


@each_journal_mode
def test_without_a_policy_its_other_writers_get_error_pages(sqlite_url, open_bank, send, caplog, journal_mode):
    check_without_a_policy(open_bank(sqlite_url, journal_mode=journal_mode, connect_args=SHORT), send)
    assert not replays(caplog)


# -- two rows, which half of them lock the other way round ------------------------------------------------------------


def make_transfers(bank: Bank, retry: RetryPolicy | None) -> flask.Flask:
    app: Any = flask.Flask("tests")
    # Of two who have a row each. Whoever comes next gets none, as long as these are there.
    meeting = Meeting(2)

    @app.post("/")
    def transfer() -> str:
        order = flask.request.get_json()
        source = bank.Session.get_one(Account, order["from"], with_for_update=True)
        meeting.attend()
        target = bank.Session.get_one(Account, order["to"], with_for_update=True)
        source.balance -= order["amount"]
        target.balance += order["amount"]
        return "transferred"

    app.wsgi_app = SessionMiddleware(app.wsgi_app, bank.Session, retry=retry)
    return app


def transfer(client: int, number: int) -> Order:
    amount = 1000 * client + number
    if client % 2:
        return Order({"from": 1, "to": 2, "amount": amount}, (-amount, amount))
    return Order({"from": 2, "to": 1, "amount": amount}, (amount, -amount))


def test_mariadb_ends_deadlocks_and_all_transfers_succeed(mariadb_url, open_bank, send, caplog):
    bank = open_bank(mariadb_url)
    statuses, balances = send(make_transfers(bank, PATIENT), transfer)
    assert bank.balances == balances
    assert statuses == {200: CLIENTS * REQUESTS}
    assert replays(caplog).keys() == {"MySQL 1213"}


def test_without_a_policy_deadlocks_make_error_pages(mariadb_url, open_bank, send, caplog):
    bank = open_bank(mariadb_url)
    statuses, balances = send(make_transfers(bank, retry=None), transfer)
    assert bank.balances == balances
    assert statuses.keys() == {200, 500}
    assert not replays(caplog)


# -- one race, which somebody else is sure to win ---------------------------------------------------------------------


def make_loser(bank: Bank, attempts: list[int]) -> Callable[[], str]:
    """A view that loses a race in the first attempt, and then none."""

    def view() -> str:
        attempts.append(current_scope().attempt)
        account = bank.Session.get_one(Account, 1)
        if attempts == [1]:
            bank.write(sa.update(Account).values(balance=100))
        account.balance += 1
        bank.Session.flush()
        return f"{account.balance}"

    return view


def test_a_lost_race_is_replayed_in_each_framework(framework, sqlite_url, open_bank, caplog):
    bank = open_bank(sqlite_url, journal_mode="WAL")
    attempts: list[int] = []
    app = SessionMiddleware(framework.make(make_loser(bank, attempts)), bank.Session, retry=RetryPolicy(delay=0))
    exchange = ask(app)
    assert (status_code(exchange), exchange.content) == (200, b"101")
    assert attempts == [1, 2]
    assert bank.balances == [101, 100]
    assert replays(caplog) == {"SQLite BUSY": 1}


def test_without_a_policy_it_is_an_exception_or_a_page_of_the_framework(framework, sqlite_url, open_bank, caplog):
    bank = open_bank(sqlite_url, journal_mode="WAL")
    attempts: list[int] = []
    app = SessionMiddleware(framework.make(make_loser(bank, attempts)), bank.Session)
    if issubclass(OperationalError, framework.lets_through):
        with pytest.raises(OperationalError):
            ask(app)
    else:
        assert status_code(ask(app)) == 500
    assert attempts == [1]
    assert bank.balances == [100, 100]
    assert not replays(caplog)


@pytest.mark.parametrize(
    ("code", "retry", "answer", "balance"),
    [
        (503, RetryPolicy(delay=0), (200, b"101"), 101),
        (503, RetryPolicy(attempts=1), (503, b"come back later"), 100),
        # It is the application that says what an error is.
        (409, RetryPolicy(delay=0), (409, b"come back later"), 100),
    ],
)
def test_what_an_exception_view_of_pyramid_answers_decides(sqlite_url, open_bank, code, retry, answer, balance):
    def configure(config: Any) -> None:
        config.add_exception_view(lambda error, request: Response("come back later", code), context=OperationalError)

    bank = open_bank(sqlite_url, journal_mode="WAL")
    app = SessionMiddleware(make_pyramid(make_loser(bank, []), configure), bank.Session, retry=retry)
    exchange = ask(app)
    assert (status_code(exchange), exchange.content) == answer
    assert bank.balances == [balance, 100]
