"""What waits for a transaction to become durable, or not to.

A callback belongs to the transaction, or to the SAVEPOINT, in which it was registered:

* a SAVEPOINT is released → its callbacks belong to the transaction around it;
* a SAVEPOINT is rolled back, or a transaction is → ``on_rollback`` callbacks are due,
  ``on_commit`` ones are dropped;
* a transaction is durable → ``on_commit`` callbacks are due, ``on_rollback`` ones are dropped;
* a transaction has gone without a word → it was not committed: its ``ROLLBACK`` has failed.

What is due is run by the scope, later, when no session is bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ._errors import callable_name, warn_of_error

if TYPE_CHECKING:
    from sqlalchemy.orm import SessionTransaction

    Callback = Callable[[], object]


class _Waiting:
    __slots__ = ("callback", "number", "on_commit", "savepoint")

    def __init__(self, number: int, callback: Callback, on_commit: bool, savepoint: SessionTransaction | None) -> None:
        #: Of the callbacks of its unit, in the order in which they were registered.
        self.number = number
        self.callback = callback
        self.on_commit = on_commit
        #: The SAVEPOINT it belongs to; ``None`` for the transaction itself.
        self.savepoint = savepoint


class Callbacks:
    """The callbacks of one unit of work, in the order in which they were registered."""

    __slots__ = ("_number", "_transaction", "_waiting", "due")

    def __init__(self) -> None:
        self._number = 0
        #: The transaction in progress, until its end is told.
        self._transaction: SessionTransaction | None = None
        self._waiting: list[_Waiting] = []
        #: Those whose time has come, in that order.
        self.due: list[_Waiting] = []

    def add(self, callback: Callback, *, on_commit: bool, savepoint: SessionTransaction | None) -> None:
        self._number += 1
        self._waiting.append(_Waiting(self._number, callback, on_commit, savepoint))

    def within(self, transaction: SessionTransaction | None) -> None:
        """The session is in *transaction*, or in none."""
        if self._transaction is not None and self._transaction is not transaction:
            self.ended(None)
        self._transaction = transaction

    def committed(self, savepoint: SessionTransaction | None) -> None:
        """*savepoint* was released, or (``None``) the transaction is durable."""
        if savepoint is None:
            self._transaction = None
            self._settle([], self._waiting, committed=True)
            return
        around = savepoint.parent
        while around is not None and not around.nested:
            around = around.parent
        for waiting in self._waiting:
            if waiting.savepoint is savepoint:
                waiting.savepoint = around

    def ended(self, savepoint: SessionTransaction | None) -> None:
        """*savepoint*, or (``None``) the transaction, is over.

        What still belongs to it then was not committed: :meth:`committed` comes first.
        """
        if savepoint is None:
            self._transaction = None
            self._settle([], self._waiting, committed=False)
        else:
            self._settle(
                [waiting for waiting in self._waiting if waiting.savepoint is not savepoint],
                [waiting for waiting in self._waiting if waiting.savepoint is savepoint],
                committed=False,
            )

    def _settle(self, remain: list[_Waiting], settled: list[_Waiting], *, committed: bool) -> None:
        self._waiting = remain
        self.due += [waiting for waiting in settled if waiting.on_commit is committed]
        # That of a SAVEPOINT is settled before what was registered around it.
        self.due.sort(key=lambda waiting: waiting.number)

    def run(self) -> None:
        """Run what is due.  One that raises is logged and does not stop the others.

        What is no ``Exception`` (``SystemExit``, a timeout of gevent) is not ours to swallow: it goes on, after them.
        """
        interruption: BaseException | None = None
        try:
            while self.due:
                callback = self.due.pop(0).callback
                try:
                    callback()
                except Exception as error:
                    warn_of_error(
                        error,
                        "the callback %s failed (its transaction is over and stays as it is)",
                        callable_name(callback),
                    )
                except BaseException as error:
                    interruption = interruption or error
            if interruption is not None:
                raise interruption
        finally:
            del interruption  # its traceback refers to this frame
