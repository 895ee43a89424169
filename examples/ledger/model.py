"""The books: four tables, one module-level ``Session``, and the rules that the database keeps.

An amount is a whole number of pence. Each movement is a transfer with two or more entries that add
up to nothing; the balance of an account is kept beside it, so that there is something to get wrong.
:func:`audit` tells whether anybody did.
"""

from __future__ import annotations

import datetime
import random
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    CheckConstraint,
    DateTime,
    ForeignKey,
    Integer,
    String,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Mapped, registry, relationship, scoped_session, sessionmaker
from sqlalchemy.orm.decl_api import DeclarativeMeta
from sqlalchemy.pool import NullPool, Pool, QueuePool

from sa_wsgi_session import session_scope

if TYPE_CHECKING:
    from sqlalchemy.orm import mapped_column
else:
    try:
        from sqlalchemy.orm import mapped_column
    except ImportError:  # SQLAlchemy 1.4
        from sqlalchemy import Column as mapped_column

#: The session of this request, or of this job. Everything that follows just uses it.
Session = scoped_session(sessionmaker())

OPENING_BALANCES = {
    "The bank": 50_000_00,
    "Ada": 2_500_00,
    "Grace": 1_800_00,
    "Alan": 1_200_00,
}
INITIAL_TOTAL = sum(OPENING_BALANCES.values())
LARGEST_AMOUNT = 1_000_000_00
LONGEST_MEMO = 80
OPENING_APPROVAL = 1

_PAST_TRANSFERS = 240
# Stamped into the file, so that a database that belongs to something else is left alone.
_APPLICATION_ID = 0x1ED6E201
_LAYOUT = 1
_SECONDS_TO_WAIT_FOR_THE_WRITER = 15

_mapper_registry = registry()


class Base(metaclass=DeclarativeMeta):
    __abstract__ = True
    registry = _mapper_registry
    metadata = _mapper_registry.metadata

    def __init__(self, **values: Any) -> None:
        _mapper_registry.constructor(self, **values)


class Account(Base):
    __tablename__ = "accounts"
    __table_args__ = (CheckConstraint("round(balance) = balance AND balance >= 0", name="no_overdraft"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(40), nullable=False, unique=True)
    balance: Mapped[int] = mapped_column(Integer, nullable=False, default=0)


class Approval(Base):
    """What somebody signed. A transfer may name one; whether it exists is checked at COMMIT."""

    __tablename__ = "approvals"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    given_by: Mapped[str] = mapped_column(String(40), nullable=False)


class Transfer(Base):
    __tablename__ = "transfers"
    __table_args__ = (CheckConstraint(f"length(memo) <= {LONGEST_MEMO}", name="short_memo"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    at: Mapped[datetime.datetime] = mapped_column(DateTime, nullable=False)
    memo: Mapped[str] = mapped_column(String(LONGEST_MEMO), nullable=False)
    approval_id: Mapped[int | None] = mapped_column(
        Integer, ForeignKey("approvals.id", deferrable=True, initially="DEFERRED"), nullable=True
    )


class Entry(Base):
    """One line of the books: so much into (or, below zero, out of) one account."""

    __tablename__ = "entries"
    __table_args__ = (CheckConstraint("round(pence) = pence AND pence <> 0", name="some_amount"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    transfer_id: Mapped[int] = mapped_column(Integer, ForeignKey("transfers.id"), nullable=False, index=True)
    account_id: Mapped[int] = mapped_column(Integer, ForeignKey("accounts.id"), nullable=False, index=True)
    pence: Mapped[int] = mapped_column(Integer, nullable=False)

    transfer: Mapped[Transfer] = relationship(Transfer)
    account: Mapped[Account] = relationship(Account)


class Refusal(Exception):
    """The ledger does not do this, and says why in a sentence for the person who asked."""

    def __init__(self, reason: str, field: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        #: The form field to look at, if it was one.
        self.field = field


def new_transfer(memo: str, approval_id: int | None = None) -> Transfer:
    transfer = Transfer(memo=memo, approval_id=approval_id, at=_now())
    Session.add(transfer)
    return transfer


def post(transfer: Transfer, account: Account, pence: int) -> None:
    """Write one entry and the balance it changes, and send both to the database."""
    Session.add(Entry(transfer=transfer, account=account, pence=pence))
    # The database adds, so that two transfers at the same time cannot overwrite each other's sum.
    account.balance = Account.balance + pence
    Session.flush()


def move(source: Account, target: Account, pence: int, memo: str, approval_id: int | None = None) -> Transfer:
    """Move money from one account to another: the debit, then the credit."""
    ensure_funds(source, pence)
    transfer = new_transfer(memo, approval_id)
    post(transfer, source, -pence)
    post(transfer, target, pence)
    return transfer


def ensure_funds(source: Account, pence: int) -> None:
    if source.balance < pence:
        raise Refusal(f"{source.name} has only {pounds(source.balance)}.", field="amount")


def account_named(name: str) -> Account:
    return Session.execute(select(Account).where(Account.name == name)).scalar_one()


def pounds(pence: int) -> str:
    """``-123456`` → ``-£1,234.56``"""
    sign = "-" if pence < 0 else ""
    return f"{sign}£{abs(pence) // 100:,}.{abs(pence) % 100:02}"


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found."""

    balances: dict[int, int]
    total: int
    #: The names of the accounts whose balance is not the sum of their entries.
    wrong: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return self.total == INITIAL_TOTAL and not self.wrong

    @property
    def verdict(self) -> str:
        if self.wrong:
            return f"The books are wrong: not the sum of its entries: {', '.join(sorted(self.wrong))}."
        if self.total != INITIAL_TOTAL:
            return f"The books are wrong: {pounds(self.total)} in all, not {pounds(INITIAL_TOTAL)}."
        return (
            f"The books add up: {pounds(self.total)} in all, as on the first day, "
            "and each balance is the sum of its entries."
        )


def audit(connection: Connection) -> Audit:
    """Check the invariant of the ledger, in one statement and so in one snapshot."""
    rows = connection.execute(
        select(
            Account.id,
            Account.name,
            Account.balance,
            func.coalesce(
                select(func.sum(Entry.pence)).where(Entry.account_id == Account.id).scalar_subquery(),
                0,
            ),
        ).order_by(Account.id)
    ).all()
    return Audit(
        balances={number: balance for number, _, balance, _ in rows},
        total=sum(balance for _, _, balance, _ in rows),
        wrong=[name for _, name, balance, entries in rows if balance != entries],
    )


def open_engine(path: str | Path, poolclass: type[Pool] = QueuePool) -> Engine:
    """An engine on the SQLite file: one writer and many readers at a time, rules enforced."""
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=poolclass,
        # A streamed body may hop threads, and its connection with it.
        connect_args={"timeout": _SECONDS_TO_WAIT_FOR_THE_WRITER, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")

    return engine


def open_books(database: str | Path | Engine) -> Engine:
    """Open the ledger in this file, or this database, or begin a new one, and point ``Session`` at it.

    Raises :class:`Refusal` for a file that cannot be a ledger.
    """
    if isinstance(database, Engine):
        engine, where = database, f"database {database.url.database!r}"
    elif str(database) in ("", ":memory:"):
        raise Refusal("The ledger needs a database file that its threads can share.")
    else:
        _ensure_ours(database)
        engine, where = open_engine(database), f"database file {str(database)!r}"
    try:
        Base.metadata.create_all(engine)
        Session.configure(bind=engine)
        _begin_books()
    except DatabaseError as error:
        engine.dispose()
        raise Refusal(f"The {where} cannot be used: {error.orig}.") from error
    return engine


def open_aside(engine: Engine) -> Engine:
    """Another engine on the same database, which keeps no connection."""
    if engine.dialect.name == "sqlite":
        return open_engine(engine.url.database or "", NullPool)
    return create_engine(engine.url, poolclass=NullPool)


def _ensure_ours(path: str | Path) -> None:
    engine = open_engine(path, NullPool)
    try:
        with engine.begin() as connection:
            run = connection.exec_driver_sql
            tables = run("SELECT count(*) FROM sqlite_master").scalar()
            stamps = (run("PRAGMA application_id").scalar(), run("PRAGMA user_version").scalar())
            if tables and stamps != (_APPLICATION_ID, _LAYOUT):
                raise Refusal(f"The database file {str(path)!r} holds something else than this ledger.")
            run(f"PRAGMA application_id = {_APPLICATION_ID}")
            run(f"PRAGMA user_version = {_LAYOUT}")
    except DatabaseError as error:
        raise Refusal(f"The database file {str(path)!r} cannot be used: {error.orig}.") from error
    finally:
        engine.dispose()


def _begin_books() -> None:
    """Opening balances and a past, the same for everybody, so that there is something to stream."""
    with session_scope(Session) as session:
        if session.execute(select(Account.id)).first() is not None:
            return

        def record(transfer: Transfer, account: Account, pence: int) -> None:
            # Unlike post(): nobody else has seen these accounts yet, and all of it is sent at once.
            session.add(Entry(transfer=transfer, account=account, pence=pence))
            account.balance += pence

        session.add(Approval(id=OPENING_APPROVAL, given_by="The board"))
        accounts = [Account(name=name, balance=0) for name in OPENING_BALANCES]
        opening = new_transfer("Opening balance", OPENING_APPROVAL)
        for account, pence in zip(accounts, OPENING_BALANCES.values(), strict=True):
            record(opening, account, pence)
        chance = random.Random(1494)  # the year in which Pacioli explained double entry
        for _ in range(_PAST_TRANSFERS):
            source, target = chance.sample(accounts, 2)
            pence = chance.randint(1_00, 20_00)
            transfer = new_transfer(chance.choice(["Rent", "Groceries", "Coffee", "Books", "Train ticket"]))
            record(transfer, source, -pence)
            record(transfer, target, pence)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None, microsecond=0)
