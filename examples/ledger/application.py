"""All parts of the ledger, put together."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from sqlalchemy.engine import Engine

from sa_wsgi_session import RetryPolicy, SessionMiddleware
from sa_wsgi_session.observers import FinishedUnit
from sa_wsgi_session.replicas import ReadReplicas

from .jobs import Scheduler, pay_interest
from .model import Session, open_books
from .panel import Panel
from .safety import ErrorPage, SecurityHeaders, WSGIApplication
from .views import Application


class Ledger:
    """The ledger on one database file. One at a time, as its ``Session`` is a global.

    Or on a database server that has replicas: see ``examples/replicas``.
    """

    def __init__(
        self,
        database: str | Path | Engine,
        replicas: Sequence[Engine] = (),
        observer: Callable[[FinishedUnit], object] | None = None,
    ) -> None:
        self.Session = Session
        self.engine = open_books(database)
        self.replicas = replicas
        self.views = Application()
        # In production the secret comes from where your other secrets are: it must be the same in each process.
        reads = ReadReplicas(replicas, secret=secrets.token_hex()) if replicas else None

        # The one line that this example is about. (Anybody may see the timing here: the books are for show.)
        application: WSGIApplication = SessionMiddleware(
            self.views, Session, retry=RetryPolicy(), server_timing=True, observer=observer, replicas=reads
        )

        self.panel = Panel(ErrorPage(application), self.engine, replicas)
        self.application: WSGIApplication = SecurityHeaders(self.panel)
        self._scheduler: Scheduler | None = None

    def start_jobs(self, every: float = 5.0) -> None:
        """Pay interest every so many seconds, from a thread of its own."""
        self._scheduler = Scheduler(pay_interest, every, self.panel.job)
        self._scheduler.start()

    def close(self) -> None:
        """Stop the job, and give the database back. To close it twice does no harm."""
        if self._scheduler is not None:
            self._scheduler.stop()
        self.panel.close()
        for engine in (self.engine, *self.replicas):
            engine.dispose()
