"""All parts of the ledger, put together."""

from __future__ import annotations

from pathlib import Path

from sa_wsgi_session import RetryPolicy, SessionMiddleware

from .jobs import Scheduler, pay_interest
from .model import Session, open_books
from .panel import Panel
from .safety import ErrorPage, SecurityHeaders, WSGIApplication
from .views import Application


class Ledger:
    """The ledger on one database file. One at a time, as its ``Session`` is a global."""

    def __init__(self, database: str | Path) -> None:
        self.Session = Session
        self.engine = open_books(database)
        self.views = Application()

        # The one line that this example is about. (Anybody may see the timing here: the books are for show.)
        application: WSGIApplication = SessionMiddleware(self.views, Session, retry=RetryPolicy(), server_timing=True)

        self.panel = Panel(ErrorPage(application), self.engine)
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
        self.engine.dispose()
