"""The guest book in Flask."""

from __future__ import annotations

from typing import NoReturn

from flask import Flask, Response, abort, redirect, request
from werkzeug.wrappers import Response as AnyResponse

from examples.guest_book import BadEntry, Session, events, export, open_database, page, sign
from sa_wsgi_session import SessionMiddleware

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 10_000  # bytes of a form


@app.get("/")
def index() -> str:
    return page()


@app.post("/")
def add() -> AnyResponse:
    sign(request.form)
    return redirect("/", 303)


@app.post("/fail")
def fail() -> NoReturn:
    sign(request.form)
    Session.flush()  # even what the database has been told is rolled back by an error status
    abort(409, "Nothing of it was kept.")


@app.post("/crash")
def crash() -> NoReturn:
    sign(request.form)
    Session.flush()
    raise RuntimeError("failed on purpose")


@app.get("/export.csv")
def export_csv() -> Response:
    return Response(export(), mimetype="text/csv")


@app.get("/events")
def event_stream() -> Response:
    return Response(events(), mimetype="text/event-stream", headers={"Cache-Control": "no-store"})


@app.errorhandler(BadEntry)
def bad_entry(error: BadEntry) -> AnyResponse:
    return Response(f"{error}\n", 400, mimetype="text/plain")


open_database()
# Not "app = SessionMiddleware(app, ...)": app stays the Flask object, for its command and its test client.
app.wsgi_app = SessionMiddleware(app.wsgi_app, Session)  # type: ignore[method-assign]
application = app
