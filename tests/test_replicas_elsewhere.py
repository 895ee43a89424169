"""Read replicas: what is refused when they are set up, and databases that have no positions."""

from __future__ import annotations

import inspect
import io
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from sa_wsgi_session import RetryPolicy, SessionMiddleware, contextual_session, current_scope
from sa_wsgi_session._cluster import Cluster, Replica
from sa_wsgi_session._transient import Conflict
from sa_wsgi_session.replicas import ReadReplicas, ReplicaError
from tests.replicated import SECRET, Site, Visitor
from tests.support import Base, Exchange, Note, make_environ, make_session, note, respond

# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.fixture
def engines() -> Iterator[list[Any]]:
    """Three of them, each with a database of its own."""
    engines = [sa.create_engine("sqlite://") for _ in range(3)]
    yield engines
    for engine in engines:
        engine.dispose()


def AsyncEngine() -> Any:
    return type("AsyncEngine", (), {"__module__": "sqlalchemy.ext.asyncio.engine"})()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engines": 5}, TypeError, "engines must be a list of Engines, not an object of type int"),
        ({"engines": []}, ValueError, "engines must have one Engine or more"),
        ({"engines": ["sqlite://"]}, TypeError, "engine 1 of replicas must be an Engine, not an object of type str"),
        ({"engines": [AsyncEngine()]}, TypeError, "an AsyncEngine could not be awaited"),
        ({"secret": 5}, TypeError, "secret must be a str or bytes, not an object of type int"),
        ({"secret": ""}, ValueError, "secret must have 32 characters"),
        ({"secret": b"short and known"}, ValueError, "secret must have 32 characters"),
        ({"max_lag": "1"}, TypeError, "max_lag must be a number of seconds, more than 0"),
        ({"max_lag": 0}, ValueError, "max_lag must be a number of seconds, more than 0, not 0"),
        ({"max_lag": -1}, ValueError, "max_lag must be a number of seconds, more than 0, not -1"),
        ({"sticky": None}, TypeError, "sticky must be a number of seconds, 0 or more"),
        ({"sticky": -1}, ValueError, "sticky must be a number of seconds, 0 or more"),
        ({"read_only": True}, TypeError, "read_only must be a callable that takes the environ, or None"),
        ({"positions": 1}, TypeError, "positions must be True, False or None, not an object of type int"),
        ({"cookie_name": 1}, TypeError, "cookie_name must be a str"),
        ({"cookie_name": "a b"}, ValueError, "cookie_name must be a token of RFC 9110"),
        ({"header": b"X"}, TypeError, "header must be a str"),
        ({"header": "X:"}, ValueError, "header must be a token of RFC 9110"),
        ({"clock": 1}, TypeError, "clock must be a callable without arguments"),
    ],
)
def test_a_wrong_argument_is_told_at_construction(engines, options, error, message):
    arguments = {"engines": engines[:1], "secret": SECRET, **options}
    with pytest.raises(error, match=message) as raised:
        ReadReplicas(arguments.pop("engines"), **arguments)
    assert "short and known" not in str(raised.value)


def test_an_engine_that_is_there_twice_is_refused(engines):
    for twice in (engines[0], engines[0].execution_options(any_option=1)):
        with pytest.raises(ValueError, match="engine 2 of replicas is there twice"):
            ReadReplicas([engines[0], twice], secret=SECRET)


def app(environ: Any, start_response: Any) -> Any:
    raise NotImplementedError


def refused(session: Any, replicas: Any) -> Any:
    return lambda: SessionMiddleware(app, session, replicas=replicas)


def test_what_does_not_fit_the_session_is_told_when_the_middleware_is_made(engines):
    primary, *others = engines
    replicas = ReadReplicas(others, secret=SECRET)
    with pytest.raises(TypeError, match="replicas must be a ReadReplicas, or None, not an object of type list"):
        SessionMiddleware(app, sessionmaker(primary), replicas=others)
    with pytest.raises(ValueError, match="engine 2 of replicas is the one that the session is bound to"):
        SessionMiddleware(app, sessionmaker(primary), replicas=ReadReplicas([others[0], primary], secret=SECRET))
    other_dialect = sa.create_engine("postgresql+psycopg2://localhost/nothing")
    with pytest.raises(ValueError, match="engine 1 of replicas is of the dialect 'postgresql', and the primary"):
        SessionMiddleware(app, sessionmaker(primary), replicas=ReadReplicas([other_dialect], secret=SECRET))
    with pytest.raises(ValueError, match="positions must be False, or None, for 'sqlite'"):
        SessionMiddleware(app, sessionmaker(primary), replicas=ReadReplicas(others, secret=SECRET, positions=True))
    with pytest.raises(TypeError, match="session must be a sessionmaker, or a scoped_session of one"):
        SessionMiddleware(app, make_session("thread-local", lambda: Session(primary)), replicas=replicas)
    with pytest.raises(ValueError, match=r"bound to an Engine where there are replicas, .*, not to nothing"):
        SessionMiddleware(app, sessionmaker(), replicas=replicas)
    with primary.connect() as connection, pytest.raises(ValueError, match="not to an object of type sqlalchemy"):
        SessionMiddleware(app, sessionmaker(connection), replicas=replicas)
    with pytest.raises(ValueError, match="must not be in two-phase mode"):
        SessionMiddleware(app, sessionmaker(primary, twophase=True), replicas=replicas)


def test_middlewares_of_one_primary_share_their_replicas_and_others_do_not(engines):
    primary, replica, other = engines
    replicas = ReadReplicas([replica], secret=SECRET.encode())
    factory = sessionmaker(primary)
    SessionMiddleware(app, factory, replicas=replicas)
    SessionMiddleware(app, contextual_session(factory), replicas=replicas)
    SessionMiddleware(app, sessionmaker(primary), replicas=replicas)
    with pytest.raises(ValueError, match="replicas is in use with a session that is bound to another primary"):
        SessionMiddleware(app, sessionmaker(other), replicas=replicas)


def test_outside_of_requests_a_replica_that_is_down_is_the_error_that_it_always_is(engines, tmp_path):
    down = sa.create_engine(f"sqlite:///{tmp_path}/no/such/folder")
    SessionMiddleware(app, sessionmaker(engines[0]), replicas=ReadReplicas([down], secret=SECRET))
    with pytest.raises(sa.exc.OperationalError, match="unable to open database file"):
        down.connect()


def test_a_replica_that_cannot_be_reached_is_not_noticed(engines, tmp_path):
    down = sa.create_engine(f"sqlite:///{tmp_path}/no/such/folder")
    Session: Any = make_session("thread-local", sessionmaker(engines[0]))

    def view() -> list[bytes]:
        return [str(Session.execute(sa.text("SELECT 7")).scalar()).encode()]

    visitor = Visitor(SessionMiddleware(respond(view), Session, replicas=ReadReplicas([down], secret=SECRET)))
    assert visitor.request() == "7"


def test_an_error_page_for_what_a_policy_takes_for_a_lost_race_is_replaced(copies):
    calls: list[None] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        calls.append(None)
        try:
            body = copies.texts()
            if len(calls) == 1:
                copies.Session.execute(sa.text("SELECT nothing FROM nowhere"))
        except sa.exc.OperationalError:
            start_response("500 Oops", [])
            return [b"sorry"]
        start_response("200 OK", [])
        return body

    policy = RetryPolicy(delay=0, is_transient=lambda error: isinstance(error, sa.exc.OperationalError))
    visitor = Visitor(SessionMiddleware(app, copies.Session, replicas=copies.replicas, retry=policy))
    assert visitor.request() in ("1", "2")
    assert len(calls) == 2


def test_what_goes_on_elsewhere_goes_on_at_once(copies, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def view() -> list[bytes]:
        copies.Session.add(note("new"))
        return []

    copies.visitor(view).request("/moved")
    assert copies.units[-1].attempts == 2
    assert pauses == [0]


def test_where_there_are_no_positions_nobody_waits_for_the_primary(copies, caplog):
    caplog.set_level("DEBUG", "sa_wsgi_session")
    visitor = copies.visitor()
    assert visitor.request() in ("1", "2")
    assert visitor.request(method="POST") == "0"
    assert "could not be asked" not in caplog.text


def test_what_is_not_given_is_as_the_documentation_says(engines):
    parameters = inspect.signature(ReadReplicas).parameters
    assert (parameters["max_lag"].default, parameters["sticky"].default) == (10.0, 5.0)


def test_the_secret_is_not_shown(engines):
    replicas = ReadReplicas(engines, secret=SECRET)
    assert repr(replicas) == "<ReadReplicas, engines: 3>"
    SessionMiddleware(app, sessionmaker(sa.create_engine("sqlite://")), replicas=replicas)
    assert SECRET not in repr(vars(replicas)["_router"])


# -- databases that have no positions ---------------------------------------------------------------------------------


class Copies(Site):
    """SQLite databases, of which the replicas are filled by hand; each knows its name."""

    def __init__(self, folder: Any, copies: int, registry: str = "thread-local", **options: Any) -> None:
        self.now = 1e9
        urls = [sa.engine.URL.create("sqlite", database=str(folder / f"{number}")) for number in range(copies + 1)]
        super().__init__(urls[0], urls[1:], registry, **{"clock": lambda: self.now, **options})
        for number, engine in enumerate([self.primary, *self.engines]):
            Base.metadata.create_all(engine)
            with engine.begin() as connection:
                connection.execute(sa.insert(Note), [{"text": f"{number}"}])

    def where(self) -> list[bytes]:
        return self.texts()


@pytest.fixture
def copies(tmp_path: Any) -> Iterator[Copies]:
    with closing(Copies(tmp_path, 2)) as copies:
        yield copies


def test_a_visitor_reads_from_a_replica_and_stays_there(copies):
    visitors = [copies.visitor() for _ in range(4)]
    homes = [visitor.request() for visitor in visitors]
    assert sorted(homes) == ["1", "1", "2", "2"]
    assert [visitor.request() for visitor in visitors] == homes


def test_replicas_need_neither_a_policy_nor_an_observer(copies):
    visitor = copies.visitor(observer=None)
    assert visitor.request() in ("1", "2")
    assert visitor.request(method="POST") == "0"


def test_without_a_policy_a_lost_race_is_an_error(copies):
    seen = []

    def view() -> Any:
        seen.extend(copies.texts())
        raise sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError("database is locked"))

    app = copies.app(view, observer=None)
    with pytest.raises(sa.exc.OperationalError):
        Exchange(app, make_environ())
    assert len(seen) == 1


def test_a_body_waits_for_no_statement_that_has_failed(copies):
    def view() -> Any:
        try:
            copies.Session.execute(sa.text("SELECT nonsense"))
        except sa.exc.OperationalError as failure:
            kept.append(failure)
        return iter([b"done"])

    kept: list[Exception] = []
    exchange = copies.visitor(view).exchange()
    assert copies.checked_out == [0, 0, 0]
    assert exchange.read() == b"done"
    assert copies.units[-1].engine.startswith("replica")
    assert len(kept) == 1


def test_without_a_policy_a_body_is_there_once_more_on_the_primary(copies):
    def view() -> list[bytes]:
        body = current_environ["wsgi.input"].read()
        copies.Session.add(note(body.decode()))
        return []

    app = copies.app(view, observer=None)
    current_environ = make_environ() | {"CONTENT_LENGTH": "3", "wsgi.input": io.BytesIO(b"new")}
    Exchange(app, current_environ).read()
    assert copies.visitor(copies.texts).request(method="POST") == "0,new"


def test_where_a_replica_cannot_serve_it_is_no_race_that_is_lost(copies, caplog):
    caplog.set_level("DEBUG", "sa_wsgi_session")
    tried = []

    def view() -> list[bytes]:
        tried.extend(copies.texts())
        route: Any = current_scope().route
        if route.replica is not None:
            route.leaves(route.replica, Conflict("test"))
        if len(tried) < 5:
            raise sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError("database is locked"))
        return [b"done"]

    assert copies.visitor(view, retry=RetryPolicy(3, delay=0)).request() == "done"
    # Two replicas, which the policy does not count, and three attempts on the primary.
    assert sorted(tried) == [b"0", b"0", b"0", b"1", b"2"]
    lost = [message for message in caplog.messages if "attempt" in message]
    assert [message.partition(" in 0.")[0] for message in lost] == [
        "GET /: attempt 1 cannot go on where it is (test)",
        "GET /: attempt 2 cannot go on where it is (test)",
        "GET /: attempt 1 of 3 lost a race (SQLite BUSY) and is replayed",
        "GET /: attempt 2 of 3 lost a race (SQLite BUSY) and is replayed",
    ]


def test_who_has_used_the_primary_is_served_by_it_for_a_while(copies):
    visitor = copies.visitor()
    visitor.request(method="POST")
    assert visitor.request() == "0"
    assert copies.units[-1].engine_reason == "this visitor has just used the primary"
    copies.now += 3
    assert visitor.request() == "0"  # which is said anew: they have read there
    copies.now += 7
    assert visitor.request() in ("1", "2")


def test_a_change_is_not_sent_to_a_replica(copies):
    def view() -> list[bytes]:
        copies.texts()
        copies.Session.add(note("new"))
        return []

    copies.visitor(view).request("/change")
    assert (copies.units[-1].engine, copies.units[-1].attempts) == ("primary", 2)
    visitor = copies.visitor()
    assert visitor.request(method="POST") == "0,new"
    assert [visitor.request() for visitor in (copies.visitor(), copies.visitor())] in (["1", "2"], ["2", "1"])


def test_a_change_in_the_body_of_a_safe_request_is_an_error(copies):
    def view() -> Any:
        first = copies.texts()[0]

        def body() -> Any:
            yield first
            copies.Session.add(note("new"))
            copies.Session.flush()

        return body()

    exchange = copies.visitor(view).exchange()
    with pytest.raises(ReplicaError, match="GET / was about to change something on replica"):
        exchange.read()
    exchange.close()


def test_the_engine_of_a_replica_can_be_used_outside_of_requests(copies):
    copies.app(copies.texts)
    with copies.engines[0].begin() as connection:
        connection.execute(sa.insert(Note), [{"text": "replicated"}])


def test_where_the_replica_of_a_visitor_cannot_be_used_nobody_but_the_primary_can(copies):
    visitor = copies.visitor()
    home = visitor.request()
    replica: Replica = copies.replicas._router.cluster.replicas[int(home) - 1]
    replica.fails("a test")
    assert visitor.request() == "0"
    assert copies.units[-1].engine_reason == "the replica where this visitor reads cannot be used"


def test_a_visitor_who_says_to_be_at_home_in_two_places_is_at_home_nowhere(copies):
    app = copies.app(copies.texts)
    visitors = [Visitor(app) for _ in range(2)]
    homes = [visitor.request() for visitor in visitors]
    assert homes in (["1", "2"], ["2", "1"])
    cookie = "; ".join(f"replica_position_home={visitor.cookies['replica_position_home']}" for visitor in visitors)
    assert Visitor(app).request(HTTP_COOKIE=cookie) == "0"


def test_who_only_asks_for_the_engine_has_not_read(copies):
    def view() -> list[bytes]:
        return [str(copies.Session.get_bind().url.database)[-1].encode()]

    visitor = copies.visitor(view)
    assert visitor.request() in ("1", "2")
    assert visitor.set_cookies == []


def test_a_body_that_reads_first_when_the_headers_have_left(copies):
    def view() -> Any:
        yield b"-"
        yield copies.texts()[0]

    app = copies.app(view)
    # Nobody can tell this visitor any more where they have read.
    stranger = Visitor(app)
    assert stranger.request() == "-0"
    assert copies.units[-1].engine_reason == "too late to tell the visitor where"
    # This one knows it.
    visitor = Visitor(copies.app(copies.texts))
    home = visitor.request()
    visitor.app = app
    assert visitor.request() == f"-{home}"
    # And this one's home is gone.
    copies.replicas._router.cluster.replicas[int(home) - 1].fails("a test")
    assert visitor.request() == "-0"
    assert copies.units[-1].engine_reason == "too late to tell the visitor where"


def test_use_primary_in_a_body_that_has_only_asked_for_nothing(copies):
    def view() -> Any:
        yield b"-"
        current_scope().use_primary()
        yield copies.texts()[0]

    assert copies.visitor(view).request() == "-0"


def test_server_timing_says_who_has_served(copies):
    visitor = copies.visitor(server_timing=True)
    exchange = visitor.exchange()
    exchange.read()
    (timing,) = (value for name, value in exchange.headers if name == "Server-Timing")
    assert timing.endswith(('engine;desc="replica 1 of 2: least busy"', 'engine;desc="replica 2 of 2: least busy"'))
    visitor = copies.visitor(lambda: [], server_timing=True)
    exchange = visitor.exchange()
    assert "engine" not in dict(exchange.headers)["Server-Timing"]


def test_without_a_header_there_is_none(tmp_path):
    with closing(Copies(tmp_path, 1, header=None)) as copies:
        visitor = copies.visitor()
        exchange = visitor.exchange()
        exchange.read()
        assert [name for name, _value in exchange.headers] == ["Content-Type", "Set-Cookie"]


def test_patterns_of_paths_are_told_of_up_to_a_number(copies, monkeypatch, caplog):
    from sa_wsgi_session import _routing

    monkeypatch.setattr(_routing, "_told", {str(number) for number in range(199)})

    def view() -> list[bytes]:
        copies.Session.add(note(str(current_scope())))
        return []

    copies.visitor(view).request("/last")
    assert "/last" in caplog.text
    copies.visitor(view).request("/one-more")
    assert "one-more" not in caplog.text


def test_an_exception_with_replicas_is_the_applications_own(copies):
    def fails(environ: Any, start_response: Any) -> Any:
        copies.texts()
        raise LookupError("of the application's own")

    application = SessionMiddleware(fails, copies.Session, replicas=copies.replicas)
    with pytest.raises(LookupError):
        Visitor(application).request()
    assert copies.served == [0, 0]


def test_a_replica_that_has_failed_is_asked_whether_it_answers(copies):
    app = copies.app(copies.where)
    Visitor(app).request()
    replicas = copies.replicas._router.cluster.replicas
    for replica in replicas:
        replica.fails("of a test")
        replica._until = float("inf")
        replica.fails("of a request that was under way")
    assert [replica.failures for replica in replicas] == [1, 1]
    replicas[0]._until = 0.0  # its time is over
    assert Visitor(app).request() == "1"
    assert [replica.failures for replica in replicas] == [0, 1]


def test_a_replica_that_answers_again_and_lags_stays_out_of_the_rotation(copies):
    app = copies.app(copies.where)
    Visitor(app).request()
    cluster = copies.replicas._router.cluster
    cluster.primary.floor = 1
    for replica in cluster.replicas:
        replica.fails("of a test")
        replica._until = 0.0
    assert Visitor(app).request() == "0"
    assert [replica.failures for replica in cluster.replicas] == [2, 2]


def test_a_replica_that_was_started_anew_when_the_body_begins_does_not_serve_it(copies):
    def view() -> Any:
        copies.where()
        return body()

    def body() -> Any:
        [replica] = [replica for replica in copies.replicas._router.cluster.replicas if replica.serving]
        replica.learns(0, 1, time.monotonic())
        yield copies.where()[0]

    with pytest.raises(ReplicaError, match="was started anew"):
        copies.visitor(view).request()
    assert copies.units[-1].attempts == 1


def test_nobody_waits_for_who_asks_the_primary(engines):
    cluster = Cluster(engines[0], engines[1:], key=b"key", max_lag=1.0, positions=True)
    primary = cluster.primary
    with primary._asking:
        primary.check(0.0)
    assert primary.due == float("-inf")  # it was not asked
    primary.check(0.0)
    assert primary.due > 0.0
