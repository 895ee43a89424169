"""A notice board: handlers that just use ``Session``, jobs that just use theirs, and no thread that cleans up."""

# The model is declared in the way that SQLAlchemy 1.4 and 2.x share, which tells mypy little.
# mypy: allow-subclassing-any, no-warn-unreachable

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import web
from sqlalchemy import Column, Float, Integer, String, create_engine, delete, func, select, update
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker

from sa_wsgi_session import SessionMiddleware, session_scope, with_session

web.config.debug = False  # else web.py's error page shows the code, and the values in it, to everybody

Session = scoped_session(sessionmaker())
Base: Any = declarative_base()


class Notice(Base):
    __tablename__ = "notices"
    id = Column(Integer, primary_key=True)
    text = Column(String(200), nullable=False, unique=True)
    #: When it is taken down, in seconds since 1970; never where there is none.
    until = Column(Float)


class Board(Base):
    """What the jobs have found out; one row."""

    __tablename__ = "board"
    id = Column(Integer, primary_key=True)
    counted = Column(Integer, nullable=False, default=0)
    taken_down = Column(Integer, nullable=False, default=0)


# The handlers. Before, each of them ended in try, commit, except, rollback, finally, remove.


class Index:
    def GET(self) -> str:
        web.header("Content-Type", "text/html; charset=utf-8")
        board = Session.execute(select(Board)).scalar_one()
        notices = Session.execute(select(Notice).order_by(Notice.id.desc()).limit(50)).scalars().all()
        return _PAGE.format(board=board, items="\n".join(f"<li>{web.websafe(notice.text)}</li>" for notice in notices))

    def POST(self) -> None:
        """Put a notice up. A text that is there already is refused by the COMMIT, which makes it a 500."""
        form = web.input(text="", seconds="")
        until = time.time() + float(form.seconds) if form.seconds else None
        Session.add(Notice(text=form.text, until=until))
        if not isinstance(form.text, str) or not form.text.strip():  # a file that is uploaded comes as bytes
            Session.flush()  # even what was sent to the database by now is rolled back by an error status
            raise web.badrequest("A notice needs a text.")
        raise web.seeother("/")  # in web.py this is an exception; to the middleware it is a 303, a success


class Crash:
    def POST(self) -> None:
        """Fail with the work half done. web.py swallows the exception; its 500 is enough."""
        Session.add(Notice(text=web.input(text="").text))
        Session.flush()
        raise RuntimeError("failed on purpose")


class Export:
    def GET(self) -> Iterator[str]:
        """Stream all notices, however many there are, from a result that stays open meanwhile."""
        web.header("Content-Type", "text/plain; charset=utf-8")
        query: Any = select(Notice.text).order_by(Notice.id).execution_options(yield_per=100)
        for text in Session.execute(query).scalars():
            yield f"{text}\n"


application = SessionMiddleware(
    web.application(("/", "Index", "/crash", "Crash", "/export", "Export"), globals()).wsgifunc(), Session
)


# The jobs, each in a thread of its own. Handlers and jobs can call the same functions, which just use ``Session``.


@with_session(Session)
def count(*, session: Any) -> None:
    """Write down how many notices there are."""
    session.execute(update(Board).values(counted=select(func.count(Notice.id)).scalar_subquery()))


@with_session(Session)
def take_down(*, session: Any) -> None:
    """Delete the notices whose time has come, and add up how many; both or neither."""
    due: Any = Notice.until <= time.time()
    old = session.execute(delete(Notice).where(due)).rowcount
    session.execute(update(Board).values(taken_down=Board.taken_down + old))


class Jobs:
    """Runs each function every so many seconds, until :meth:`stop`."""

    def __init__(self, *functions: Callable[[], object], seconds: float) -> None:
        self._stopping = threading.Event()
        self._seconds = seconds
        self._threads = [threading.Thread(target=self._run, args=(function,)) for function in functions]
        for thread in self._threads:
            thread.start()

    def _run(self, function: Callable[[], object]) -> None:
        while not self._stopping.wait(self._seconds):
            try:
                function()
            except Exception:
                logging.getLogger(__name__).exception("A job failed; the next run is in %s seconds", self._seconds)

    def stop(self) -> None:
        """Let what runs finish, and start nothing more."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()


def open_database(path: str) -> Engine:
    """Point ``Session`` at this SQLite file, made if need be."""
    # All threads write, and SQLite has one writer at a time: the others wait, up to so many seconds.
    engine = create_engine(URL.create("sqlite", database=path), connect_args={"timeout": 30})
    Base.metadata.create_all(engine)
    Session.configure(bind=engine)
    with session_scope(Session) as session:
        if session.get(Board, 1) is None:
            session.add(Board(id=1))
    return engine


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Notice board</title>
<style>:root {{ color-scheme: light dark }} body {{ font: 1rem/1.5 system-ui; margin: 2rem auto; max-width: 40rem }}
body {{ padding: 0 1rem }} form {{ display: grid; gap: 0.75rem; justify-items: start }}
input, button {{ font: inherit }} li {{ overflow-wrap: anywhere }}</style>
<h1>Notice board</h1>
<p>{board.counted} notices at the last count, {board.taken_down} taken down so far. <a href="/export">All as text</a>
<form method="post" action="/">
<label>Text <input name="text" maxlength="200"></label>
<label>Take it down after so many seconds (empty: never)
<input name="seconds" type="number" min="0" step="any"></label>
<div><button>Put it up</button> <button formaction="/crash">Put it up and crash</button></div>
</form>
<ul>
{items}
</ul>
</html>
"""
