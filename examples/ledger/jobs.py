"""The scheduled job: the bank pays interest, in a thread beside the server.

The same unit of work as in a request: committed when the function returns, rolled back when an
exception leaves it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import orm, select

from sa_wsgi_session import with_session

from .model import Account, Session, account_named, ensure_funds, new_transfer, post

INTEREST_MEMO = "Interest"

_logger = logging.getLogger(__name__)


@with_session(Session)
def pay_interest(*, session: orm.Session) -> None:
    """A penny for each thousand pounds or part of them, from the bank's own account."""
    bank = account_named("The bank")
    customers = session.execute(select(Account).where(Account.id != bank.id)).scalars().all()
    interest = {customer: 1 + customer.balance // 1_000_00 for customer in customers}
    ensure_funds(bank, sum(interest.values()))
    transfer = new_transfer(INTEREST_MEMO)
    post(transfer, bank, -sum(interest.values()))
    for customer, pence in interest.items():
        post(transfer, customer, pence)


class Scheduler:
    """Runs a job every few seconds, on a thread of its own, until it is stopped."""

    def __init__(
        self,
        job: Callable[[], None],
        every: float,
        watch: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self._job = job
        self._every = every
        self._watch = watch
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="interest")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let a run that is under way finish, and start no other."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._every):
            try:
                with self._watch("interest"):
                    self._job()
            except Exception:
                # One failed run, rolled back, is no reason to stop paying.
                _logger.exception("The interest was not paid")
