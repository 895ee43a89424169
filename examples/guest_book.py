"""The guest book that the examples of the frameworks share: what has nothing to do with any framework.

Each of them is the same application, written the way its framework wants it:

=========================  ===========================================================================================
``GET /``                  the page: the latest entries, and the form
``POST /``                 add an entry, then 303; 400 where there is no text
``POST /fail``             add an entry, then change one's mind: a 409, in the way the framework has for errors
``POST /crash``            add an entry, then raise an exception that nobody expects
``GET /export.csv``        all entries, streamed from the database
``GET /events``            how many entries there are, over and over, as server-sent events without an end
=========================  ===========================================================================================
"""

# The model is declared in the way that SQLAlchemy 1.4 and 2.x share, which tells mypy little.
# mypy: allow-subclassing-any, no-warn-unreachable

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from sqlalchemy import Column, Integer, String, create_engine, event, func, select
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker

#: The session of the request; what an application had before it met the middleware.
Session: Any = scoped_session(sessionmaker())
Base: Any = declarative_base()


class Entry(Base):
    __tablename__ = "entries"
    id = Column(Integer, primary_key=True)
    name = Column(String(80), nullable=False)
    text = Column(String(500), nullable=False)


class BadEntry(ValueError):
    """What the visitor sent is no entry; the message tells them why."""


def sign(form: Mapping[str, str]) -> None:
    """Add the entry that the visitor has filled in.

    :raises BadEntry: if it has no text, or too much.
    """
    name, text = form.get("name", "").strip(), form.get("text", "").strip()
    if not text:
        raise BadEntry("Please write something.")
    if "\0" in name + text:
        raise BadEntry("Please write text.")  # PostgreSQL stores no such character
    if len(name) > 80 or len(text) > 500:
        raise BadEntry("At most 80 characters of name, and 500 of text, please.")
    Session.add(Entry(name=name or "Anonymous", text=text))


def page() -> str:
    """The page, with the latest entries."""
    entries = Session.execute(select(Entry).order_by(Entry.id.desc()).limit(20)).scalars().all()
    items = (f"<li><b>{escape(entry.name)}</b>: {escape(entry.text)}</li>" for entry in entries)
    return _PAGE.format(items="\n".join(items))


def export() -> Iterator[bytes]:
    """All entries as lines of CSV, however many there are.

    The query runs now, in the view; its rows are read by and by, while the body streams.
    """
    query: Any = select(Entry.id, Entry.name, Entry.text).order_by(Entry.id)
    return _csv_lines(Session.execute(query.execution_options(yield_per=100)))


def _csv_lines(rows: Iterable[Any]) -> Iterator[bytes]:
    line = _Line()
    write = csv.writer(line).writerow
    write(("id", "name", "text"))
    yield line.last
    for row in rows:
        write((row.id, _as_text(row.name), _as_text(row.text)))
        yield line.last


def _as_text(cell: str) -> str:
    # A spreadsheet would run it as a formula, but for the apostrophe (OWASP, "CSV Injection").
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


class _Line:
    """What a csv.writer writes to: keeps the last line."""

    last: bytes

    def write(self, text: str) -> None:
        self.last = text.encode()


#: Seconds between two events.
PAUSE = 1.0


def events() -> Iterator[bytes]:
    """How many entries there are, as server-sent events, until the visitor goes away."""
    while True:
        count = Session.execute(select(func.count(Entry.id))).scalar_one()
        # Between two events there is no transaction, so that this stream holds no connection while it sleeps.
        Session.rollback()
        yield f"data: {count}\n\n".encode()
        time.sleep(PAUSE)


def open_database(url: str | None = None) -> None:
    """Point ``Session`` at the database of ``$GUEST_BOOK_URL``, or else at this one, or else at an SQLite file."""
    engine = create_engine(os.environ.get("GUEST_BOOK_URL") or url or "sqlite:///guest_book.sqlite")
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _let_readers_be(connection: Any, record: Any) -> None:
            # Who reads a long export must not keep the others from writing.
            connection.execute("PRAGMA journal_mode = WAL")

    Base.metadata.create_all(engine)
    # A server that forks after the import (uWSGI) would share the connection among its processes.
    engine.dispose()
    Session.configure(bind=engine)


def serve(application: Any, name: str) -> None:
    """Serve it with waitress until Ctrl-C: ``python -m examples.flask --port 8080``."""
    import waitress

    parser = argparse.ArgumentParser(prog=f"python -m {name}", description="A guest book.")
    parser.add_argument("--port", type=int, default=8080, help="port to serve; 0 takes a free one (%(default)s)")
    options = parser.parse_args()
    try:
        server = waitress.create_server(application, host="127.0.0.1", port=options.port, threads=8)
    except (OSError, OverflowError) as error:
        parser.error(f"cannot serve port {options.port}: {error}")
    print(f"The guest book is at http://127.0.0.1:{server.effective_port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.run()  # returns on Ctrl-C
    finally:
        server.close()


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Guest book</title>
<style>:root {{ color-scheme: light dark }} body {{ font: 1rem/1.5 system-ui; margin: 2rem auto; max-width: 40rem }}
body {{ padding: 0 1rem }} form {{ display: grid; gap: 0.75rem; justify-items: start }}
input, button {{ font: inherit }} li {{ overflow-wrap: anywhere }}</style>
<h1>Guest book</h1>
<form method="post" action="/">
<label>Name <input name="name" maxlength="80"></label>
<label>Text <input name="text" maxlength="500" required></label>
<div><button>Sign</button> <button formaction="/fail">Sign, and fail</button>
<button formaction="/crash">Sign, and crash</button></div>
</form>
<p><a href="/export.csv">All entries as CSV</a>, <a href="/events">their number, live</a></p>
<ul>
{items}
</ul>
</html>
"""
