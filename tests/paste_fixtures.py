"""What the ini files of ``test_paste.py`` name: sessions, applications, vetoes, hooks."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

import sa_wsgi_session.paste
from sa_wsgi_session import contextual_session
from sa_wsgi_session.replicas import ReadReplicas
from tests.support import PLAIN, note

Scoped: Any = scoped_session(sessionmaker())
Other: Any = scoped_session(sessionmaker())
Maker: Any = sessionmaker()
Contextual: Any = contextual_session(Maker)


def make_session() -> Session:
    return Session()


_factory: Any = make_session
#: What it calls can be bound to nothing.
Homemade: Any = scoped_session(_factory)

FACTORIES = (Scoped.session_factory, Other.session_factory, Maker, sa_wsgi_session.paste.Session.session_factory)

number = 42

#: Of a database that nobody has.
replicas = ReadReplicas([create_engine("sqlite://")], secret=64 * "0")

#: What an observer has been told.
seen: list[Any] = []


class Contention(Exception):
    """Another way to lose a race."""


def is_contention(error: BaseException) -> bool:
    return isinstance(error, Contention)


class Pool(NullPool):
    """A pool that is told by its name."""


def make_writer(global_conf: Any, environ_key: str = "sa_wsgi_session") -> Any:
    """The application that adds a note with the path for its text, by way of the environ.

    Its status is the query string.
    """

    def writer(environ: Any, start_response: Any) -> Any:
        environ[f"{environ_key}.session"].add(note(environ["PATH_INFO"].strip("/")))
        start_response(unquote(environ["QUERY_STRING"]) or "200 OK", [*PLAIN, *environ.get("headers", [])])
        return [b"written\n"]

    return writer


def make_importer(global_conf: Any) -> Any:
    """The application that does so by way of the documented name."""

    def importer(environ: Any, start_response: Any) -> Any:
        sa_wsgi_session.paste.Session.add(note(environ["PATH_INFO"].strip("/")))
        start_response("200 OK", PLAIN)
        return [b"written\n"]

    return importer


def make_twofold(global_conf: Any) -> Any:
    """The application that writes into both databases."""

    def twofold(environ: Any, start_response: Any) -> Any:
        environ["left.session"].add(note("left"))
        environ["right.session"].add(note("right"))
        start_response("200 OK", PLAIN)
        return [b"written\n"]

    return twofold


def make_streamer(global_conf: Any) -> Any:
    """The application that says, chunk by chunk, which notes are durable: the one of the view, or none."""

    def streamer(environ: Any, start_response: Any) -> Any:
        Scoped.add(note("from the view"))
        start_response("200 OK", PLAIN)
        return iter([b"first\n", b"last\n"])

    return streamer


def make_bystander(global_conf: Any) -> Any:
    """The application that tells whether it has a session."""

    def bystander(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", PLAIN)
        return [str("sa_wsgi_session.scope" in environ).encode()]

    return bystander


def veto_everything(environ: Any, status: str, headers: Any) -> bool:
    return True


async def veto_in_time(environ: Any, status: str, headers: Any) -> bool:
    return False


class Vetoes:
    """A name in a name."""

    @staticmethod
    def none(environ: Any, status: str, headers: Any) -> bool:
        return False


def is_not_static(environ: Any) -> bool:
    return not environ["PATH_INFO"].startswith("/static")
