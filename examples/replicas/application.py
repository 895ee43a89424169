"""A wall that anybody writes on, and everybody reads: reads come from replicas, and nobody sees the past."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from html import escape
from typing import Any
from urllib.parse import parse_qs

from sqlalchemy import Column, Integer, String, create_engine, desc, select
from sqlalchemy.engine import URL
from sqlalchemy.orm import declarative_base, scoped_session, sessionmaker

from sa_wsgi_session import RetryPolicy, SessionMiddleware
from sa_wsgi_session.observers import FinishedUnit
from sa_wsgi_session.replicas import ReadReplicas

Base: Any = declarative_base()


class Line(Base):  # type: ignore[misc]
    __tablename__ = "lines"
    number = Column(Integer, primary_key=True)
    text = Column(String(200), nullable=False)


_PAGE = """<!doctype html><meta charset="utf-8"><title>The wall</title>
<form method="post"><input name="text" maxlength="200" autofocus> <button>Write</button></form>
<p><a href="">Read once more</a>. Who has answered is in the Server-Timing header, and in the terminal.</p>
<ol reversed>{lines}</ol>"""


class Wall:
    """The application, on a primary and its replicas."""

    def __init__(self, primary: URL, replicas: list[URL]) -> None:
        self.engines = [create_engine(url, pool_pre_ping=True) for url in (primary, *replicas)]
        Base.metadata.create_all(self.engines[0])
        self.Session: Any = scoped_session(sessionmaker(self.engines[0]))
        self.application = SessionMiddleware(
            self.view,
            self.Session,
            retry=RetryPolicy(),
            # In production it comes from where your other secrets are: it must be the same in each process.
            replicas=ReadReplicas(self.engines[1:], secret=secrets.token_hex()),
            observer=tell,
            server_timing=True,
        )

    def view(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            form = parse_qs(
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)).decode("utf-8", "replace")
            )
            self.Session.add(Line(text=form.get("text", ["…"])[0][:200]))
            start_response("303 See Other", [("Location", environ.get("SCRIPT_NAME") or "/")])
            return [b""]
        texts = self.Session.execute(select(Line.text).order_by(desc(Line.number)).limit(20)).scalars()
        lines = "".join(f"<li>{escape(text)}</li>" for text in texts)
        start_response("200 OK", [("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store")])
        return [_PAGE.format(lines=lines).encode()]

    def close(self) -> None:
        for engine in self.engines:
            engine.dispose()


def tell(unit: FinishedUnit) -> None:
    print(f"{unit.name}: {unit.status}, {unit.engine} ({unit.engine_reason})", flush=True)
