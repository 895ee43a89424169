"""What the README of the guest book in Flask says of Flask-SQLAlchemy, and of Flask-SQLAlchemy-Lite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import flask
import flask_sqlalchemy
import flask_sqlalchemy.session
import flask_sqlalchemy_lite
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import QueuePool
from werkzeug.exceptions import NotFound

from sa_wsgi_session import SessionMiddleware, contextual_session, session_scope
from tests.frameworks.support import ask, status_code
from tests.support import Base, Note, note

#: The same pool on each version of SQLAlchemy, so that it can be asked what is checked out.
ENGINE = {"poolclass": QueuePool, "connect_args": {"check_same_thread": False}}


class Extended:
    """A Flask application with Flask-SQLAlchemy, two databases, and a model in each."""

    def __init__(self, folder: Path) -> None:
        self.app: Any = flask.Flask("tests")
        self.app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{folder / 'one.sqlite'}"
        self.app.config["SQLALCHEMY_BINDS"] = {"other": f"sqlite:///{folder / 'other.sqlite'}"}
        self.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = ENGINE
        db: Any = flask_sqlalchemy.SQLAlchemy(self.app)

        class Guest(db.Model):  # type: ignore[misc, unused-ignore]
            name = db.Column(db.String(80), primary_key=True)

        class Order(db.Model):  # type: ignore[misc, unused-ignore]
            __bind_key__ = "other"
            number = db.Column(db.Integer, primary_key=True)

        self.db, self.Guest, self.Order = db, Guest, Order
        with self.app.app_context():
            db.create_all()
            self.engines = dict(db.engines)

    def serve(self, view: Callable[[], Any], Session: Any) -> Any:
        self.app.wsgi_app = SessionMiddleware(self.app.wsgi_app, Session)
        self.app.add_url_rule("/", view_func=view, endpoint="view")
        return self.app

    def durable(self) -> tuple[list[str], list[int]]:
        with self.engines[None].connect() as one, self.engines["other"].connect() as other:
            return (
                list(one.execute(select(self.Guest.name)).scalars()),
                list(other.execute(select(self.Order.number)).scalars()),
            )

    def close(self) -> None:
        for engine in self.engines.values():
            engine.dispose()


@pytest.fixture
def extended(tmp_path: Path) -> Iterator[Extended]:
    with closing(Extended(tmp_path)) as extended:
        yield extended
        assert [engine.pool.checkedout() for engine in extended.engines.values()] == [0, 0]


def test_its_session_cannot_be_bound_around_flask(extended):
    app = extended.serve(lambda: "page", extended.db.session)
    with pytest.raises(RuntimeError, match="Working outside of application context"):
        ask(app)


def test_putting_our_session_in_its_place_loses_the_work_because_its_teardown_comes_before_the_commit(extended):
    Session = extended.db.session = scoped_session(sessionmaker(extended.engines[None]))

    def view() -> str:
        Session.add(extended.Guest(name="lost"))
        Session.flush()
        return "page"

    assert status_code(ask(extended.serve(view, Session))) == 200
    assert extended.durable() == ([], [])


def test_its_class_of_sessions_needs_the_application_in_bodies_and_jobs_too(extended):
    Session = scoped_session(sessionmaker(class_=flask_sqlalchemy.session.Session, db=extended.db))

    def view() -> Iterator[bytes]:
        yield b"first"
        yield str(Session.query(extended.Guest).count()).encode()

    with pytest.raises(RuntimeError, match="Working outside of application context"):
        ask(extended.serve(view, Session))
    with pytest.raises(RuntimeError, match="Working outside of application context"), session_scope(Session) as session:
        session.query(extended.Guest).count()


@pytest.mark.parametrize("make", [scoped_session, contextual_session])
def test_its_models_engines_and_queries_work_with_a_session_of_our_own(extended, make):
    app, db, Guest, Order = extended.app, extended.db, extended.Guest, extended.Order
    with app.app_context():
        engines = {
            table: db.engines[key] for key, metadata in db.metadatas.items() for table in metadata.tables.values()
        }
    Session = make(sessionmaker(binds=engines))
    db.Model.query = Session.query_property(db.Query)

    def view() -> Iterator[bytes]:
        Session.add_all([Guest(name="Ada"), Order(number=1)])
        assert Guest.query.filter_by(name="Ada").first_or_404() is Session.get(Guest, "Ada")
        yield b"first"
        yield str(Guest.query.count()).encode()

    def missing() -> str:
        Session.add(Guest(name="never"))
        return str(Guest.query.filter_by(name="nobody").first_or_404())

    app.add_url_rule("/missing", view_func=missing)
    extended.serve(view, Session)
    assert ask(app).content == b"first1"
    assert extended.durable() == (["Ada"], [1])
    assert status_code(ask(app, "/missing")) == 404
    assert extended.durable() == (["Ada"], [1])
    with session_scope(Session):
        assert Order.query.one().number == 1


def test_its_own_functions_use_its_own_session(extended):
    db, Guest = extended.db, extended.Guest
    with extended.app.app_context():
        Session = scoped_session(sessionmaker(db.engine))
    db.Model.query = Session.query_property(db.Query)

    def view() -> str:
        Session.add(Guest(name="Ada"))
        Session.flush()
        with pytest.raises(NotFound):
            db.get_or_404(Guest, "Ada")
        with pytest.raises(NotFound):
            db.first_or_404(select(Guest))
        with pytest.raises(NotFound):
            db.one_or_404(select(Guest))
        assert db.paginate(db.select(Guest)).total == 0
        assert Guest.query.paginate().total == 1
        return "page"

    assert status_code(ask(extended.serve(view, Session))) == 200
    assert extended.durable() == (["Ada"], [])


def test_of_the_lite_one_the_sessionmaker_is_enough(world):
    app: Any = flask.Flask("tests")
    app.config["SQLALCHEMY_ENGINES"] = {"default": {"url": world.engine.url, **ENGINE}}
    db = flask_sqlalchemy_lite.SQLAlchemy(app)
    with app.app_context():
        Session = scoped_session(db.sessionmaker)
        engine: Any = db.engine
    Base.metadata.create_all(engine)
    app.wsgi_app = SessionMiddleware(app.wsgi_app, Session)

    @app.get("/")
    def view() -> Iterator[bytes]:
        Session.add(note("view"))
        assert Session() is not db.session

        def chunks() -> Iterator[bytes]:
            yield str(Session.execute(select(func.count(Note.id))).scalar_one()).encode()
            Session.add(note("body"))

        return chunks()

    @app.get("/crash")
    def crash() -> str:
        Session.add(note("never"))
        Session.flush()
        raise RuntimeError("failed on purpose")

    assert ask(app).content == b"1"
    assert status_code(ask(app, "/crash")) == 500
    with session_scope(Session) as session:
        session.add(note("job"))
    assert world.durable() == ["body", "job", "view"]
    assert engine.pool.checkedout() == 0
    assert not Session.registry.has()
    engine.dispose()
