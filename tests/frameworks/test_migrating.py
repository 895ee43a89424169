"""``docs/migrating.rst``: what is said of the code before, and of the code after, is what each of them does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flask
import flask_sqlalchemy
import pyramid.config
import pyramid.httpexceptions
import pyramid.response
import pytest
import sqlalchemy as sa
import transaction
import zope.sqlalchemy
from repoze.tm import after_end
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.orm.exc import DetachedInstanceError

from sa_wsgi_session import SessionMiddleware, current_scope, session_scope
from tests.frameworks.support import ask, start, status_code
from tests.reading import README, Reader, blocks
from tests.support import Exchange, respond

PAGE = "docs/migrating.rst"
BY_HAND = "From hand-written remove()"
FLASK = "From Flask-SQLAlchemy's COMMIT_ON_TEARDOWN"
FLASK_SESSION = "From flask-sqlalchemy-session"
REPOZE = "From repoze.tm2"
PYRAMID = "From pyramid_tm and zope.sqlalchemy"

both = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


def test_every_python_block_is_run_by_a_test():
    # Flask-SQLAlchemy-Session, before, does not work with a Flask of these days.
    assert {title: len(there) for title, there in blocks(PAGE).items()} == dict.fromkeys(
        (BY_HAND, FLASK, FLASK_SESSION, REPOZE, PYRAMID), 2
    )


class Case:
    """The code before, or after, with an application of the test's."""

    def __init__(self, title: str, *, after: bool, **names: Any) -> None:
        self._source = blocks(PAGE)[title][after]
        self.reader = Reader(README, "sa_wsgi_session")
        self.reader.run()
        self.reader.names.update(names)
        self.after = after
        self.engine: Any = self.reader["engine"]

    def run(self) -> None:
        self.reader._execute(PAGE, self._source)

    def __getitem__(self, name: str) -> Any:
        return self.reader[name]

    @property
    def Session(self) -> Any:
        return self["Session"]

    @property
    def Guest(self) -> Any:
        return self["Guest"]

    def guests(self) -> set[str]:
        observer = sa.create_engine(self.engine.url)
        try:
            with observer.connect() as connection:
                return set(connection.execute(sa.select(self.Guest.name)).scalars())
        finally:
            observer.dispose()

    @property
    def checked_out(self) -> int:
        return int(self.engine.pool.checkedout())

    def add(self, *names: str) -> None:
        """Past the application."""
        with self.engine.begin() as connection:
            connection.execute(sa.insert(self.Guest), [{"name": name} for name in names])


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Case]]:
    monkeypatch.chdir(tmp_path)
    made: list[Case] = []

    def make(title: str, after: bool, **names: Any) -> Case:
        made.append(Case(title, after=after, **names))
        return made[-1]

    yield make
    transaction.abort()
    for case in made:
        case.engine.dispose()
        case.reader.close()
    gc.collect()


def when_the_status_leaves(case: Case, app: Any, *path_and_method: str) -> tuple[Exchange, list[set[str]]]:
    """The request, and what was durable when the server was told its status."""
    durable: list[set[str]] = []
    return start(app, *path_and_method, on_start=lambda status: durable.append(case.guests())), durable


# -- by hand ----------------------------------------------------------------------------------------------------------


def by_hand(make: Callable[..., Case], after: bool, view: Callable[[Case], Any], status: str = "200 OK") -> Case:
    case = make(BY_HAND, after)
    case.reader.names["welcome"] = respond(partial(view, case), status)
    case.run()
    return case


def add(name: str, case: Case) -> list[bytes]:
    case.Session.add(case.Guest(name=name))
    return [b"Welcome!\n"]


@both
def test_by_hand_a_success_is_committed_and_an_exception_is_not(make, after):
    case = by_hand(make, after, partial(add, "Ada"))
    assert ask(case["application"]).content == b"Welcome!\n"
    assert case.guests() == {"Ada"}
    with pytest.raises(IntegrityError):
        ask(case["application"])
    assert case.checked_out == 0


@both
def test_by_hand_an_error_is_committed(make, after):
    case = by_hand(make, after, partial(add, "Ada"), "409 Conflict")
    ask(case["application"])
    assert case.guests() == (set() if after else {"Ada"})


@both
def test_by_hand_a_commit_that_fails_comes_after_the_status(make, after):
    case = by_hand(make, after, partial(add, "Ada"))
    case.add("Ada")
    seen: list[str] = []
    with pytest.raises(IntegrityError):
        start(case["application"], on_start=seen.append)
    assert seen == ([] if after else ["200 OK"])


@both
def test_by_hand_a_body_has_lost_its_objects(make, after):
    def view(case: Case) -> Iterator[bytes]:
        guest = case.Session.get(case.Guest, "Ada")
        return (each.name.encode() for each in [guest])

    case = by_hand(make, after, view)
    case.add("Ada")
    if after:
        assert ask(case["application"]).content == b"Ada"
    else:
        with pytest.raises(DetachedInstanceError):
            ask(case["application"])


@both
def test_by_hand_a_body_begins_a_session_that_the_next_request_finds(make, after):
    def view(case: Case) -> Iterator[bytes]:
        yield b"first"
        case.Session.add(case.Guest(name="body"))
        case.Session.flush()
        yield b"second"

    case = by_hand(make, after, view)
    if after:
        ask(case["application"])
        assert case.guests() == {"body"}
        case.Session.remove()
        with case.engine.begin() as connection:
            connection.execute(sa.delete(case.Guest))
    exchange = start(case["application"])
    exchange.next()
    exchange.next()
    exchange.close()  # the client hangs up
    assert case.guests() == set()
    assert (case.Session.registry.has(), case.checked_out) == ((False, 0) if after else (True, 1))
    case.Session.remove()


# -- Flask-SQLAlchemy -------------------------------------------------------------------------------------------------


def in_flask(make: Callable[..., Case], after: bool, title: str = FLASK) -> tuple[Case, Any]:
    app: Any = flask.Flask("guests")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{Path.cwd() / 'flask.sqlite'}"
    case = make(
        title,
        after,
        app=app,
        SQLAlchemy=flask_sqlalchemy.SQLAlchemy,
        SessionMiddleware=SessionMiddleware,
        scoped_session=scoped_session,
        sessionmaker=sessionmaker,
    )
    case.run()
    if title == FLASK:
        case.engine.dispose()
        with app.app_context():
            case["db"].create_all()
            case.engine = case["db"].engine
    return case, app


def session_of(case: Case) -> Any:
    return case.Session if case.after else case["db"].session


@both
def test_flask_commits_a_page_and_not_an_exception(make, after):
    case, app = in_flask(make, after)

    @app.get("/broken")
    def broken() -> str:
        session_of(case).add(case.Guest(name="Alan"))
        raise RuntimeError("broken")

    assert ask(app, "/Ada", "POST").content == b"Welcome!"
    assert status_code(ask(app, "/broken")) == 500
    assert case.guests() == {"Ada"}


@both
def test_flask_commits_what_was_aborted_or_handled(make, after):
    case, app = in_flask(make, after)

    @app.get("/conflict")
    def conflict() -> str:
        session_of(case).add(case.Guest(name="conflict"))
        flask.abort(409)

    @app.get("/half")
    def half() -> str:
        session_of(case).add(case.Guest(name="half"))
        raise ValueError("the other half")

    @app.errorhandler(ValueError)
    def handle(error: ValueError) -> tuple[str, int]:
        return "sorry", 500

    assert status_code(ask(app, "/conflict")) == 409
    assert status_code(ask(app, "/half")) == 500
    assert case.guests() == (set() if after else {"conflict", "half"})


@both
def test_flask_has_told_the_status_before_the_commit_fails(make, after):
    case, app = in_flask(make, after)
    case.add("Ada")
    seen: list[str] = []
    with pytest.raises(IntegrityError):
        start(app, "/Ada", "POST", on_start=seen.append)
    assert seen == ([] if after else ["200 OK"])
    assert status_code(ask(app, "/Grace", "POST")) == 200  # the next one has a session that works


@both
@pytest.mark.parametrize("with_context", [False, True])
def test_flask_streams_without_the_session_of_the_view(make, after, with_context):
    case, app = in_flask(make, after)
    sessions: list[Any] = []

    @app.get("/stream")
    def stream() -> Any:
        sessions.append(session_of(case)())

        def body() -> Iterator[bytes]:
            sessions.append(session_of(case)())
            session_of(case).add(case.Guest(name="body"))
            yield b"first"
            yield b"second"

        return flask.Response(flask.stream_with_context(body()) if with_context else body())

    if not after and not with_context:
        with pytest.raises(RuntimeError, match="Working outside of application context"):
            ask(app, "/stream")
        return
    ask(app, "/stream")
    assert (sessions[0] is sessions[1]) == after
    assert case.guests() == {"body"}


def test_flask_needs_a_context_in_jobs_no_more(make):
    case, _ = in_flask(make, False)
    with pytest.raises(RuntimeError, match="Working outside of application context"):
        case["db"].session.add(case.Guest(name="job"))
    case, _ = in_flask(make, True)
    with session_scope(case.Session) as session:
        session.add(case.Guest(name="job"))
    assert case.guests() == {"job"}


# -- flask-sqlalchemy-session -----------------------------------------------------------------------------------------


def test_after_flask_sqlalchemy_session_the_status_decides(make):
    case, app = in_flask(make, True, FLASK_SESSION)

    @app.post("/conflict/<name>")
    def conflict(name: str) -> Any:
        case.Session.add(case.Guest(name=name))
        if name == "kept":
            case.Session.commit()
        flask.abort(409)

    @app.get("/stream")
    def stream() -> Any:
        own = case.Session()
        return flask.Response(b"%d" % (case.Session() is own) for _ in range(2))

    assert status_code(ask(app, "/Ada", "POST")) == 200
    ask(app, "/conflict/lost", "POST")
    ask(app, "/conflict/kept", "POST")
    assert case.guests() == {"Ada", "kept"}
    assert ask(app, "/stream").content == b"11"


# -- repoze.tm2 -------------------------------------------------------------------------------------------------------


def in_repoze(
    make: Callable[..., Case], after: bool, view: Callable[[Case], Any], status: str = "200 OK", **headers: str
) -> Case:
    case = make(REPOZE, after)

    def welcome(environ: Any, start_response: Any) -> Any:
        body = view(case)
        start_response(status, [(name.replace("_", "-"), value) for name, value in headers.items()])
        return body

    case.reader.names["welcome"] = welcome
    case.run()
    return case


@both
@pytest.mark.parametrize(
    ("status", "headers", "committed"),
    [
        ("200 OK", {}, True),
        ("409 Conflict", {}, False),
        ("409 Conflict", {"X_Tm": "commit"}, True),
        ("200 OK", {"X_Tm": "abort"}, False),
    ],
)
def test_the_veto_of_repoze_decides(make, after, status, headers, committed):
    case = in_repoze(make, after, partial(add, "Ada"), status, **headers)
    ask(case["application"])
    assert case.guests() == ({"Ada"} if committed else set())


def test_repoze_commits_errors_where_there_is_no_veto(make):
    from repoze.tm import TM

    case = in_repoze(make, False, partial(add, "Ada"), "409 Conflict")
    ask(TM(case["welcome"]))
    assert case.guests() == {"Ada"}
    case = in_repoze(make, True, partial(add, "Grace"), "409 Conflict", X_Tm="commit")
    ask(SessionMiddleware(case["welcome"], case.Session))
    assert case.guests() == {"Ada"}


@both
def test_repoze_commits_after_the_last_byte(make, after):
    case = in_repoze(make, after, partial(add, "Ada"))
    exchange, durable = when_the_status_leaves(case, case["application"])
    assert type(exchange.body) is list if after else not isinstance(exchange.body, list)
    assert exchange.next() == b"Welcome!\n"
    assert case.guests() == ({"Ada"} if after else set())
    exchange.read()
    assert durable == [{"Ada"} if after else set()]
    assert case.guests() == {"Ada"}


@both
def test_repoze_leaves_the_transaction_open_when_the_client_hangs_up(make, after):
    def view(case: Case) -> Iterator[bytes]:
        case.Session.add(case.Guest(name="view"))
        case.Session.flush()

        def body() -> Iterator[bytes]:
            yield b"first"
            yield b"second"

        return body()

    case = in_repoze(make, after, view)
    exchange = start(case["application"])
    exchange.next()
    exchange.close()
    assert case.checked_out == (0 if after else 1)
    assert case.guests() == ({"view"} if after else set())
    transaction.begin()  # the next request on that thread
    assert case.checked_out == 0


@both
def test_repoze_and_pyramid_tm_do_not_commit_what_is_not_the_orms(make, after):
    def view(case: Case) -> list[bytes]:
        case.Session.execute(sa.insert(case.Guest.__table__).values(name="Core"))
        case.Session.execute(sa.text("INSERT INTO guests VALUES ('text')"))
        return [b""]

    case = in_repoze(make, after, view)
    ask(case["application"])
    assert case.guests() == ({"Core", "text"} if after else set())


@both
def test_repoze_doom_and_callbacks(make, after):
    ran: list[str] = []

    def view(case: Case) -> list[bytes]:
        add("Ada", case)
        if after:
            current_scope().doom("why")
            current_scope().on_commit(lambda: ran.append("on_commit"))
            current_scope().on_rollback(lambda: ran.append("on_rollback"))
        else:
            transaction.doom()
            after_end.register(lambda: ran.append("after_end"), transaction.get())
        return [b""]

    case = in_repoze(make, after, view)
    assert status_code(ask(case["application"])) == 200
    assert case.guests() == set()
    assert ran == (["on_rollback"] if after else ["after_end"])


def test_zope_sqlalchemy_refuses_the_commit_of_the_middleware(make):
    case = in_repoze(make, False, partial(add, "Ada"))
    with pytest.raises(AssertionError, match="must be committed using the transaction manager"):
        ask(SessionMiddleware(case["welcome"], case.Session))


# -- pyramid_tm -------------------------------------------------------------------------------------------------------


def in_pyramid(make: Callable[..., Case], after: bool, view: Callable[[Case, Any], Any], **views: Any) -> Case:
    config = pyramid.config.Configurator()
    case = make(
        PYRAMID,
        after,
        config=config,
        register=zope.sqlalchemy.register,
        SessionMiddleware=SessionMiddleware,
        scoped_session=scoped_session,
    )
    case.reader.names["factory"] = sessionmaker(case.engine)
    config.add_route("view", "/")
    config.add_view(partial(view, case), route_name="view")
    for context, exception_view in views.get("exceptions", {}).items():
        config.add_exception_view(exception_view, context=context)
    case.run()
    return case


def page(case: Case, request: Any) -> Any:
    request.dbsession.add(case.Guest(name="Ada"))
    return pyramid.response.Response("Welcome!")


@both
def test_pyramid_commits_a_page(make, after):
    case = in_pyramid(make, after, page)
    assert ask(case["application"]).content == b"Welcome!"
    assert case.guests() == {"Ada"}


@both
def test_pyramid_commits_an_error_that_was_returned_and_not_a_redirection_that_was_raised(make, after):
    def conflict(case: Case, request: Any) -> Any:
        request.dbsession.add(case.Guest(name="conflict"))
        return pyramid.httpexceptions.HTTPConflict()

    def found(case: Case, request: Any) -> Any:
        request.dbsession.add(case.Guest(name="found"))
        raise pyramid.httpexceptions.HTTPFound("/elsewhere")

    for view in conflict, found:
        case = in_pyramid(make, after, view)
        ask(case["application"])
    assert case.guests() == ({"found"} if after else {"conflict"})


@both
def test_pyramid_has_an_exception_view_for_a_commit_that_fails(make, after):
    def sorry(error: Any, request: Any) -> Any:
        return pyramid.response.Response("sorry", status=503)

    case = in_pyramid(make, after, page, exceptions={IntegrityError: sorry})
    case.add("Ada")
    if after:
        with pytest.raises(IntegrityError):
            ask(case["application"])
    else:
        assert status_code(ask(case["application"])) == 503


@both
def test_pyramid_streams_without_the_session(make, after):
    def stream(case: Case, request: Any) -> Any:
        guest = request.dbsession.get(case.Guest, "Ada")
        return pyramid.response.Response(app_iter=(each.name.encode() for each in [guest]))

    case = in_pyramid(make, after, stream)
    case.add("Ada")
    if after:
        assert ask(case["application"]).content == b"Ada"
    else:
        with pytest.raises(DetachedInstanceError):
            ask(case["application"])


@both
def test_pyramid_runs_response_callbacks_after_the_commit(make, after):
    durable: list[set[str]] = []

    def view(case: Case, request: Any) -> Any:
        request.add_response_callback(lambda request, response: durable.append(case.guests()))
        if after:
            current_scope().on_commit(lambda: durable.append(case.guests()))
        return page(case, request)

    case = in_pyramid(make, after, view)
    ask(case["application"])
    assert durable == ([set(), {"Ada"}] if after else [{"Ada"}])
